"""Tables of prompts from files and folders, in the layouts in which they are published and saved."""

from __future__ import annotations

import csv
import io
import json
import re
import reprlib
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from diffinstruct.config.fields import POCKET
from diffinstruct.config.files import file_text, natural_order, refuse_stand_in
from diffinstruct.errors import UserError, nearest_file

UNPACKED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
"""A field in quotes, with quotes of its own doubled."""


def read_table(path: Path, column: str, source: str) -> pd.DataFrame:
    """The table of a file or a folder. Raises UserError in one line."""
    suffix = Path(path.stem if path.suffix.lower() == ".gz" else path).suffix.lower()
    reader = _of_folder if path.is_dir() else READERS.get(suffix)
    if reader is None:
        if not path.suffix and not path.exists():
            raise UserError(f"{path}: no such file or folder{nearest_file(path, '*')}")
        files = f"a file ({', '.join(READERS)}, maybe .gz), a folder of .txt files"
        raise UserError(f"{source}: prompts are '{POCKET}:<split>', {files} or 'datasets:<hub id or folder>:<split>'")
    try:
        if not path.is_dir():
            refuse_stand_in(path)
        return reader(path, column)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{nearest_file(path, '*')}") from None
    except UnicodeDecodeError as error:
        raise _no_text(path, error) from None
    except UnicodeEncodeError as error:
        half = f"{error.object[error.start]!r}, half of a character outside of UTF-16's first plane"
        raise UserError(f"{path}: holds {half}; save it with whole characters") from None
    except pd.errors.ParserWarning:
        raise UserError(f"{path}: a row has more fields than the header; a prompt with a comma wants quotes") from None
    except (OSError, ValueError, EOFError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


def _no_text(path: Path, error: UnicodeDecodeError) -> UserError:
    name = shlex.quote(str(path))
    mend = f"if it is in GBK, say, `iconv -f GBK -t UTF-8 {name} > FILE` converts it"
    return UserError(f"{path}: is not UTF-8 text (byte {error.start}); {mend}")


def _of_txt(path: Path, column: str) -> pd.DataFrame:
    # `splitlines` would also cut at form feeds and at U+2028.
    return pd.DataFrame({column: file_text(path).removesuffix("\n").split("\n")}, dtype=str)


def _of_folder(path: Path, column: str) -> pd.DataFrame:
    visible = (file for file in path.iterdir() if not file.name.startswith("."))
    captions = [file for file in visible if file.suffix.lower() == ".txt" and file.is_file()]
    files = sorted(captions, key=lambda file: natural_order(file.name))
    if not files and any(next(path.rglob(pattern), None) for pattern in ("*.parquet", "*.arrow")):
        raise ValueError(f"no .txt files in it; 'datasets:{path}:<split>' reads a folder of tables")
    texts = []
    for file in files:
        try:
            texts.append(file_text(file).strip())
        except UnicodeDecodeError as error:
            raise _no_text(file, error) from None
    return pd.DataFrame({column: texts, "file": [file.name for file in files]}, dtype=str)


# ------------------------------------------------------------------------------------------------- separated values
def _of_csv(path: Path, column: str) -> pd.DataFrame:
    text = file_text(path)
    first, _, rest = text.partition("\n")
    if named := re.fullmatch("sep=(.)", first):  # a spreadsheet's own line
        return _separated(rest, column, named[1])
    # As some locales' spreadsheets write it, or with another ending than its content's: told by the header alone
    separators = [s for s in (",", "\t", ";") if column in (name.strip('"') for name in first.split(s))]
    return _separated(text, column, separators[0] if separators else "," if "," in first or "\t" not in first else "\t")


def _of_tsv(path: Path, column: str) -> pd.DataFrame:
    return _separated(file_text(path), column, "\t")


def _separated(text: str, column: str, separator: str) -> pd.DataFrame:
    form: dict[str, Any] = {"sep": separator, "dtype": str, "keep_default_na": False}  # "" and "None" are what they look like
    plain = separator == "\t" and not text.lstrip().startswith('"')
    if plain:
        form["quoting"] = csv.QUOTE_NONE  # as in PartiPrompts, whose prompts have quotes of their own
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # a row longer than the header would lose its end
        table = pd.read_csv(io.StringIO(text), index_col=False, **form)
        header = pd.read_csv(io.StringIO(text), header=None, nrows=1, **form)
    if (header.iloc[0] == column).sum() > 1:  # pandas would read the first one
        raise ValueError(f"column {column!r} is there twice")
    if plain and column in table:
        table[column] = [_unquoted(field) for field in table[column]]
    return table


def _unquoted(field: Any) -> Any:
    """A field's text, which pandas' own writer puts in quotes where it has quotes."""
    return field[1:-1].replace('""', '"') if isinstance(field, str) and UNPACKED.fullmatch(field) else field


# ------------------------------------------------------------------------------------------------- JSON
def _of_json(path: Path, column: str) -> pd.DataFrame:
    text = file_text(path)
    if not text.strip():
        return pd.DataFrame({column: []}, dtype=str)
    try:
        content = _parsed(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise ValueError(f"not JSON: {error}") from None
        return _of_rows(_lines(text), column, "line")  # objects one after the other
    return _of_content(content, column)


def _of_jsonl(path: Path, column: str) -> pd.DataFrame:
    text = file_text(path)
    try:
        rows = _lines(text)
    except ValueError:
        try:
            content = _parsed(text)  # one value over many lines
        except ValueError:
            content = None
        if content is None:
            raise
        return _of_content(content if isinstance(content, list) else [content], column)
    return _of_rows(rows, column, "line")


def _lines(text: str) -> list[Any]:
    rows = []
    for i, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [_parsed(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {i}: not JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"line {i}: {error}") from None
    return rows


def _parsed(text: str) -> Any:
    """The value of JSON text. Raises ValueError, also for an object that has a key twice: the first would be lost."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(f"not JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice in one object")
    return content


def _of_content(content: Any, column: str) -> pd.DataFrame:
    if isinstance(content, dict):
        content = _rows_of_object(content, column)
    if isinstance(content, pd.DataFrame):
        return content
    if not isinstance(content, list):
        raise ValueError("should be a list of prompts or of objects, or lists of prompts by style")
    return _of_rows(content, column, "item")


def _rows_of_object(content: dict[str, Any], column: str) -> Any:
    """A table, or the rows, of a JSON object: by columns, by style, by a row's name, or with a list of rows in it."""
    values = list(content.values())
    if values and all(isinstance(value, list) for value in values):
        if column in content and not any(isinstance(item, dict) for item in content[column]):
            return pd.DataFrame(content)
        if not any(isinstance(item, dict) for value in values for item in value):
            return [{"style": style, column: prompt} for style, prompts in content.items() for prompt in prompts]
    if isinstance(content.get(column), dict) and all(isinstance(value, dict) for value in values):  # as pandas writes it
        return pd.DataFrame(content)
    if values and all(isinstance(value, dict) for value in values):
        return [{"key": key, **value} for key, value in content.items()]
    if values and all(isinstance(value, str) for value in values) and all(re.fullmatch(r"\d+|.+\.\w+", key) for key in content):
        return [{"key": key, column: value} for key, value in content.items()]
    first = column.partition(".")[0]
    rows = [
        {"list": key, **item}
        for key, value in content.items()
        if isinstance(value, list) and any(isinstance(item, dict) and first in item for item in value)
        for item in value
        if isinstance(item, dict)
    ]
    return rows or content


def _of_rows(rows: list[Any], column: str, unit: str) -> pd.DataFrame:
    rows = [{column: row} if row is None or isinstance(row, str) else row for row in rows]
    for i, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{unit} {i}: should be text or an object, got {reprlib.repr(row)}")
    return pd.DataFrame(rows) if rows else pd.DataFrame({column: []}, dtype=str)


def _of_parquet(path: Path, column: str) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except OSError:
        raise
    except Exception as error:  # a damaged one raises whatever it leads to
        raise ValueError(f"{type(error).__name__}: {error}") from None


READERS: dict[str, Callable[[Path, str], pd.DataFrame]] = {
    ".csv": _of_csv,
    ".tsv": _of_tsv,
    ".json": _of_json,
    ".jsonl": _of_jsonl,
    ".ndjson": _of_jsonl,
    ".parquet": _of_parquet,
    ".txt": _of_txt,
}
