"""Prompt sets: texts in their order and, where the truth is known, a table with one column for each attribute."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import pandas as pd

from diffinstruct.config.fields import POCKET, POCKET_PROMPTS
from diffinstruct.config.prompt_files import read_table
from diffinstruct.errors import UserError, did_you_mean

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
        long = sum("\n" in text for text in self.texts)
        said += [f"{long} of several lines"] * (long > 0)
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

    A .json file is a list of prompts or of objects, such a list in an object, prompts by their style, as HPSv2's, or by
    their pictures' names. Text is UTF-8 or UTF-16, and may be packed by gzip.

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
        table = read_table(path, column, str(source))
    outer, dot, inner = column.partition(".")
    if dot and column not in table and outer in table:
        table[column] = [_inside(value, inner) for value in table[outer]]
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


def _inside(value: Any, path: str) -> Any:
    """The value at "a.b" in an object, None where there is none."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _filled(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that have a prompt, numbered from 0."""
    return table[table["prompt"].map(_is_text)].reset_index(drop=True)


def _is_text(prompt: str) -> bool:
    """Whether there is something to see in it: not spaces alone, nor marks without width, nor ends of files."""
    return any(character.isprintable() and not character.isspace() for character in prompt)


def _of_datasets(source: str, column: str) -> pd.DataFrame:
    _, _, rest = source.partition(":")
    name, _, split = rest.rpartition(":")
    if not name or not split:
        raise UserError(f"{source}: should be 'datasets:<hub id, maybe @commit, or folder>:<split>'")
    name, commit = (name, "") if Path(name).exists() else name.partition("@")[::2]
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError:
        raise UserError(f"{source}: takes the package datasets (pip install 'diffinstruct[datasets]')") from None
    try:
        if (Path(name) / "state.json").is_file():  # what `save_to_disk` wrote of one split
            found = load_from_disk(name)
        else:
            found = load_dataset(name, split=split, revision=commit or None)
    except Exception as error:  # hub, disk, script or split: all that can be wrong with somebody's data
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None
    kept = [column] if column in found.column_names else found.column_names  # pictures beside the captions stay where they are
    return found.select_columns(kept).to_pandas()
