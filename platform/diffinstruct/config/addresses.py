"""URIs as they may be shown and kept: without passwords, queries and blanks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from diffinstruct.errors import UserError

TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
IN_ENVIRONMENT = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or all of it in MLFLOW_TRACKING_URI"
NO_STORES = (
    *("blockcache", "cached", "data", "dir", "filecache", "generic", "http", "https", "libarchive", "local"),
    *("reference", "simplecache", "tar", "zip"),
)
"""What fsspec knows and nothing can be kept in, or only by way of another."""


def redact(text: str) -> str:
    """A URI, or a message about it, with scheme, host, port and path alone: for eyes and files."""
    # A password may hold a /, an @ or a quote, and so may a query: where both may be meant, nothing is left of either.
    text = re.sub(r"(?<=://)(?![^\s/:?]*/)[^\s?]*\?\S*@\S*", "", text)
    text = re.sub(r"(?<=://)([^\s/:]*:\S*|[^\s/]+)@", "", text)
    text = re.sub(r"(://[^\s?]*)\?\S*?(?=['\"]?(\s|$))", r"\1", text)
    return re.sub(r"\?[^\s?=]+=\S*", "", text)  # of the part of a URI that a client of HTTP names


def quote_uri(uri: str) -> str:
    """A URI with its blanks as %20, since those of a password would be taken for its end; not an sqlite file's path."""
    return uri if uri.startswith("sqlite:") else re.sub(r"\s", "%20", uri)


def keeps_nothing(uri: str) -> bool:
    """Whether it is an sqlite database in memory."""
    return re.fullmatch(r"sqlite:/*(:memory:)?", uri) is not None


def sqlite_uri(path: Path) -> str:
    """The URI of an sqlite file. SQLAlchemy takes a ? in it for the path's end and decodes a %, so a path with one of them
    is encoded: the slashes too, since MLflow makes the folder that is named by what stands before the last one."""
    plain = str(path.absolute())
    return f"sqlite:////{quote(plain[1:], safe='')}" if {*"%?"} & {*plain} else f"sqlite:///{plain}"


def sqlite_path(uri: str) -> Path | None:
    """The file of an sqlite URI, None for another URI: as SQLAlchemy reads it."""
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else Path(unquote(path.partition("?")[0]))


def tracking_uri(uri: str | None, runs: Path | str) -> str:
    """Where a run is tracked: `uri`, else MLFLOW_TRACKING_URI, else `mlflow.db` in `runs`; sqlite paths made absolute.

    Ask in the process the user started: Ray's workers have other folders and another environment.
    """
    uri = quote_uri(uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(Path(runs) / "mlflow.db"))
    if uri.partition("://")[0].partition("+")[0] not in TRACKING_SCHEMES:  # a recipe's has been looked at
        known = ", ".join(f"{scheme}://" for scheme in TRACKING_SCHEMES)
        raise UserError(f"MLFLOW_TRACKING_URI: should begin with one of {known}, got {redact(uri)!r}; a file is sqlite:///PATH")
    if keeps_nothing(uri):
        raise UserError(f"tracking.uri: {uri} is in memory and keeps nothing; a file is sqlite:///PATH")
    if (path := sqlite_path(uri)) is None:
        return uri
    _, mark, query = uri.partition("?")
    return sqlite_uri(path) + mark + query


def one_line(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {' '.join(str(error).split())}")[:200]
