"""URIs as they may be shown and kept: without passwords, queries and blanks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from diffinstruct.errors import UserError

TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
DRIVERS = ("postgresql", "mysql", "mssql")  # the schemes that may name one: postgresql+psycopg2://
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


def tracking_fault(uri: str) -> tuple[str, str] | None:
    """What is wrong with the address of a tracking server and what helps, in words: what MLflow would find out only when
    the run is under way. None where it can be asked there."""
    scheme, mark, rest = uri.partition("://")
    name, plus, _ = scheme.partition("+")
    if uri == "databricks":
        return None
    if not mark or name not in TRACKING_SCHEMES or (plus and name not in DRIVERS):
        return (
            f"should begin with one of {', '.join(f'{known}://' for known in TRACKING_SCHEMES)}",
            "; a file is sqlite:///PATH",
        )
    if name == "sqlite" and (not rest.startswith("/") or re.fullmatch("/*(:memory:)?", rest)):
        return "should name a file: sqlite:///PATH", ""
    if name == "databricks" and not rest:
        return "should be databricks, or databricks://PROFILE", ""
    if name in ("http", "https") and not _has_host(uri):
        return f"should name a host, and a port below 65536 if any: {name}://HOST:PORT", ""
    return None


def _has_host(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number or too large, an IPv6 address without its end
        return False


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
    if fault := tracking_fault(uri):  # a recipe's has been looked at
        what, hint = fault
        raise UserError(f"MLFLOW_TRACKING_URI: {what}, got {redact(uri)!r}{hint}")
    if (path := sqlite_path(uri)) is None:
        return uri
    _, mark, query = uri.partition("?")
    return sqlite_uri(path) + mark + query


def one_line(error: Exception) -> str:
    """The error in about 300 characters. A longer one keeps its end, where clients of HTTP say what has happened."""
    text = redact(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-95:]}"
