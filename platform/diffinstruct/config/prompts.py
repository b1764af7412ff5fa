"""Prompt sets: texts in their order and, where the truth is known, a table with one column for each attribute."""

from __future__ import annotations

import hashlib
import json
import reprlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

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
    """

    texts: tuple[str, ...]
    digest: str
    source: str
    table: pd.DataFrame

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.texts[index]


def read_prompt_set(source: str | Path, column: str = "prompt") -> PromptSet:
    """The prompts of a source as one value; see `read_prompts` for sources and errors."""
    table = read_prompts(source, column=column)
    texts = tuple(table["prompt"])
    return PromptSet(texts, digest(texts), str(source), table)


def digest(texts: Iterable[str]) -> str:
    """The sha256 of prompts in their order, in hex."""
    sha256 = hashlib.sha256()
    for text in texts:
        sha256.update(text.encode(errors="surrogatepass") + b"\0")  # which is in none
    return sha256.hexdigest()


def read_prompts(source: str | Path, empty: bool = False, column: str = "prompt") -> pd.DataFrame:
    """The prompts of "pocket:<split>", of a .csv, .jsonl or .parquet file, of a .txt with one prompt a line, or of
    "datasets:<hub id, maybe @commit, or folder>:<split>".

    column: which one holds the prompts; it is called `prompt` in what is returned, the others stay as they are
        ("datasets:" gives no others).
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
        if path.suffix not in READERS:
            known = f"'{POCKET}:<split>', a file ({', '.join(READERS)}) or 'datasets:<hub id or folder>:<split>'"
            raise UserError(f"{source}: prompts are {known}")
        try:
            table = READERS[path.suffix](path, column)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file{nearest_file(path, '*')}") from None
        except pd.errors.ParserWarning:
            raise UserError(f"{path}: a row has more fields than the header; a prompt with a comma wants quotes") from None
        except (OSError, ValueError) as error:  # pandas' parser and decoding errors are ValueErrors
            raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if column not in table:
        hint = did_you_mean(column, map(str, table.columns))
        raise UserError(f"{source}: no column {column!r}, columns are {', '.join(map(str, table.columns))}{hint}")
    if column != "prompt":
        table = table.drop(columns="prompt", errors="ignore").rename(columns={column: "prompt"})
    texts = table["prompt"].astype(object)  # a categorical column would not take the empty string
    missing = texts.isna()
    if not (fit := missing | texts.map(lambda prompt: isinstance(prompt, str))).all():
        odd = texts[~fit]
        got = " ".join(reprlib.repr(odd.iloc[0]).split())
        raise UserError(f"{source}: row {odd.index[0] + 1}: {column!r} should be text, got {got}")
    table = table.assign(prompt=texts.where(~missing, ""))
    if (nul := table["prompt"].str.contains("\0", regex=False)).any():
        raise UserError(f"{source}: row {table.index[nul][0] + 1}: {column!r} should be text, got a NUL byte")
    if name == POCKET:
        table = table[table["split"] == split]
    filled = table[table["prompt"].str.strip() != ""]
    if filled.empty:
        raise UserError(f"{source}: no prompts in it")
    return (table if empty else filled).reset_index(drop=True)


def _of_txt(path: Path, column: str) -> pd.DataFrame:
    # Some editors begin a file with a byte order mark; `splitlines` would also cut at form feeds and at U+2028.
    return pd.DataFrame({column: path.read_text(encoding="utf-8-sig").split("\n")}, dtype=str)


def _of_csv(path: Path, column: str) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # a row longer than the header would lose its end
        # "" and "None" are what they look like
        table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
        header = pd.read_csv(path, dtype=str, keep_default_na=False, header=None, nrows=1)
    if (header.iloc[0] == column).sum() > 1:  # pandas would read the first one
        raise ValueError(f"column {column!r} is there twice")
    return table


def _of_jsonl(path: Path, column: str) -> pd.DataFrame:
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {i}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {i}: should be an object, got {row!r}")
        rows.append(row)
    return pd.DataFrame(rows)


def _of_parquet(path: Path, column: str) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except OSError:
        raise
    except Exception as error:  # a damaged one raises whatever it leads to
        raise ValueError(f"{type(error).__name__}: {error}") from None


READERS: dict[str, Callable[[Path, str], pd.DataFrame]] = {
    ".csv": _of_csv,
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
