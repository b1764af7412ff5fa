"""Prompt sets: texts in their order and, where the truth is known, a table with one column for each attribute."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import reprlib
import shlex
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import pandas as pd

from diffinstruct.config.fields import POCKET, POCKET_PROMPTS
from diffinstruct.errors import UserError, did_you_mean, nearest_file

POCKET_CSV = Path(__file__).parents[1] / "pocket" / "prompts.csv"


@dataclass(frozen=True, eq=False)
class PromptSet(Sequence[str]):
    """The prompts of one source, read once; a sequence of their texts.

    texts: in the order of the source.
    digest: sha256 of the texts. The configuration has the source's name alone, and what stands there may change.
    source: what they were read from, as in the configuration.
    table: column `prompt`, and what else the source has, see `read_prompts`.
    empty: so many rows of the source have no prompt, and are left out.
    """

    texts: tuple[str, ...]
    digest: str
    source: str
    table: pd.DataFrame
    empty: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.texts[index]

    def __str__(self) -> str:
        """One line on how many there are, and on what one would not expect of them."""
        again, said = len(self.texts) - len(set(self.texts)), [f"{len(self.texts)} prompts of {self.source}"]
        said += [f"{again} of them repeat an earlier one"] * (again > 0)
        return ", ".join([*said, *[f"{self.empty} empty ones left out"] * (self.empty > 0)])


def read_prompt_set(source: str | Path, column: str = "prompt") -> PromptSet:
    """The prompts of a source as one value; see `read_prompts` for sources and errors."""
    everything = read_prompts(source, empty=True, column=column)
    table = _filled(everything)
    texts = tuple(table["prompt"])
    return PromptSet(texts, digest(texts), str(source), table, len(everything) - len(table))


def digest(texts: Iterable[str]) -> str:
    """The sha256 of prompts in their order, in hex."""
    sha256 = hashlib.sha256()
    for text in texts:
        sha256.update(text.encode(errors="surrogatepass") + b"\0")  # which is in none
    return sha256.hexdigest()


def read_prompts(source: str | Path, empty: bool = False, column: str = "prompt") -> pd.DataFrame:
    """The prompts of "pocket:<split>", of a table (.csv, .tsv, .json, .jsonl, .parquet), of a .txt with one prompt a
    line, of a folder of .txt files with one prompt each, or of "datasets:<hub id, maybe @commit, or folder>:<split>".

    A .json file is a list of prompts, a list of objects, or lists of prompts by their style, as HPSv2's. Text is UTF-8,
    or UTF-16 with a byte order mark.

    column: which one holds the prompts, "a.b" for b in an object a; it is called `prompt` in what is returned, the
        others stay as they are ("datasets:" gives no others).
    The built-in table has the columns split, prompt, kind, subject, colour, background, mouth; an empty string is an
    attribute that the prompt leaves open. Rows without a prompt are left out, unless `empty` asks for them. Rows are
    numbered from 0. Raises UserError in one line that names the source.
    """
    name, _, split = str(source).partition(":")
    if name == "datasets":
        table = _of_datasets(str(source), column)
    else:
        path, column = (POCKET_CSV, "prompt") if name == POCKET else (Path(source), column)
        if name == POCKET and str(source) not in POCKET_PROMPTS:
            raise UserError(f"{source}: unknown split{did_you_mean(source, POCKET_PROMPTS)}")
        table = _read(path, column, str(source))
    if column not in table:
        hint = did_you_mean(column, map(str, table.columns))
        raise UserError(f"{source}: no column {column!r}, columns are {', '.join(map(str, table.columns))}{hint}")
    if column != "prompt":
        table = table.drop(columns="prompt", errors="ignore").rename(columns={column: "prompt"})
    texts = table["prompt"].astype(object)  # a categorical column would not take the empty string
    missing = texts.isna()
    if not (fit := missing | texts.map(lambda prompt: isinstance(prompt, str))).all():
        odd = texts[~fit]
        got, inside = " ".join(reprlib.repr(odd.iloc[0]).split()), odd.iloc[0] if isinstance(odd.iloc[0], dict) else {}
        names = [f"{column}.{key}" for key, value in inside.items() if isinstance(value, str)]
        hint = f"; prompts.column may name {' or '.join(names)}" if names else ""
        raise UserError(f"{source}: row {odd.index[0] + 1}: {column!r} should be text, got {got}{hint}")
    table = table.assign(prompt=texts.where(~missing, ""))
    if (nul := table["prompt"].str.contains("\0", regex=False)).any():
        raise UserError(f"{source}: row {table.index[nul][0] + 1}: {column!r} should be text, got a NUL byte")
    if name == POCKET:
        table = table[table["split"] == split]
    if (filled := _filled(table)).empty:
        raise UserError(f"{source}: no prompts in it")
    return table.reset_index(drop=True) if empty else filled


def _filled(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that have a prompt, numbered from 0."""
    return table[table["prompt"].str.strip() != ""].reset_index(drop=True)


def _read(path: Path, column: str, source: str) -> pd.DataFrame:
    """The table of a file or a folder. Raises UserError in one line."""
    reader = _of_folder if path.is_dir() else READERS.get(path.suffix.lower())
    if reader is None:
        if not path.suffix and not path.exists():
            raise UserError(f"{path}: no such file or folder{nearest_file(path, '*')}")
        files = f"a file ({', '.join(READERS)}), a folder of .txt files"
        raise UserError(f"{source}: prompts are '{POCKET}:<split>', {files} or 'datasets:<hub id or folder>:<split>'")
    try:
        return reader(path, column)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{nearest_file(path, '*')}") from None
    except UnicodeDecodeError as error:
        name = shlex.quote(str(path))
        mend = f"if it is in GBK, say, `iconv -f GBK -t UTF-8 {name} > FILE` converts it"
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); {mend}") from None
    except pd.errors.ParserWarning:
        raise UserError(f"{path}: a row has more fields than the header; a prompt with a comma wants quotes") from None
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


def _text(path: Path) -> str:
    """A file's text, with the ends of lines of this system. Windows writes a byte order mark, and some of its programs
    UTF-16."""
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    return path.read_text(encoding=encoding)


def _of_txt(path: Path, column: str) -> pd.DataFrame:
    # `splitlines` would also cut at form feeds and at U+2028.
    return pd.DataFrame({column: _text(path).removesuffix("\n").split("\n")}, dtype=str)


def _of_folder(path: Path, column: str) -> pd.DataFrame:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt")
    return pd.DataFrame({column: [_text(file).strip() for file in files], "file": [file.name for file in files]}, dtype=str)


def _of_csv(path: Path, column: str) -> pd.DataFrame:
    text = _text(path)
    first = text.partition("\n")[0]
    # As some locales' spreadsheets write it, or with another ending than its content's: told by the header alone
    separators = [s for s in (",", "\t", ";") if column in (name.strip('"') for name in first.split(s))]
    return _separated(text, column, separators[0] if separators else "," if "," in first or "\t" not in first else "\t")


def _of_tsv(path: Path, column: str) -> pd.DataFrame:
    return _separated(_text(path), column, "\t")


def _separated(text: str, column: str, separator: str) -> pd.DataFrame:
    form: dict[str, Any] = {"sep": separator, "dtype": str, "keep_default_na": False}  # "" and "None" are what they look like
    if separator == "\t" and not text.lstrip().startswith('"'):
        form["quoting"] = csv.QUOTE_NONE  # as in PartiPrompts, whose prompts have quotes of their own
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # a row longer than the header would lose its end
        table = pd.read_csv(io.StringIO(text), index_col=False, **form)
        header = pd.read_csv(io.StringIO(text), header=None, nrows=1, **form)
    if (header.iloc[0] == column).sum() > 1:  # pandas would read the first one
        raise ValueError(f"column {column!r} is there twice")
    return table


def _of_json(path: Path, column: str) -> pd.DataFrame:
    try:
        content = json.loads(_text(path))
    except RecursionError as error:
        raise ValueError(f"not JSON: {error}") from None
    if isinstance(content, dict) and all(isinstance(value, list) for value in content.values()):
        if column in content:  # a table by columns
            return pd.DataFrame(content)
        content = [{"style": style, column: prompt} for style, prompts in content.items() for prompt in prompts]
    if not isinstance(content, list):
        raise ValueError("should be a list of prompts or of objects, or lists of prompts by style")
    return _of_rows([{column: row} if isinstance(row, str) else row for row in content], column, "item")


def _of_jsonl(path: Path, column: str) -> pd.DataFrame:
    rows = []
    for i, line in enumerate(_text(path).split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {i}: not JSON: {error}") from None
    return _of_rows(rows, column, "line")


def _of_rows(rows: list[Any], column: str, unit: str) -> pd.DataFrame:
    for i, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{unit} {i}: should be an object, got {reprlib.repr(row)}")
    table = pd.DataFrame(rows)
    outer, dot, inner = column.partition(".")
    if dot and column not in table and outer in table:
        table[column] = [_inside(row.get(outer), inner) for row in rows]
    return table


def _inside(value: Any, path: str) -> Any:
    """The value at "a.b" in an object, None where there is none."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


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
    ".parquet": _of_parquet,
    ".txt": _of_txt,
}


def _of_datasets(source: str, column: str) -> pd.DataFrame:
    _, _, rest = source.partition(":")
    name, _, split = rest.rpartition(":")
    if not name or not split:
        raise UserError(f"{source}: should be 'datasets:<hub id, maybe @commit, or folder>:<split>'")
    name, commit = (name, "") if Path(name).exists() else name.partition("@")[::2]
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{source}: takes the package datasets (pip install 'diffinstruct[datasets]')") from None
    try:
        found = load_dataset(name, split=split, revision=commit or None)
    except Exception as error:  # hub, disk, script or split: all that can be wrong with somebody's data
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None
    kept = [column] if column in found.column_names else found.column_names  # pictures beside the captions stay where they are
    return found.select_columns(kept).to_pandas()
