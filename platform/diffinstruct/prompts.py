"""Prompt sets: tables with a column `prompt` and, where the truth is known, one column for each attribute."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from diffinstruct.experiment import POCKET_SPLITS, UserError, did_you_mean, nearest_file

if TYPE_CHECKING:
    import pandas as pd

POCKET_CSV = Path(__file__).parent / "pocket" / "prompts.csv"


def read_prompts(source: str | Path, empty: bool = False) -> pd.DataFrame:
    """The prompts of "pocket:<split>", of a .csv with a column `prompt`, or of a .txt with one prompt a line.

    The built-in table has the columns split, prompt, kind, subject, colour, background, mouth; an empty string is an
    attribute that the prompt leaves open. Rows without a prompt are left out, unless `empty` asks for them. Rows are numbered
    from 0. Raises UserError in one line that names the source.
    """
    import pandas as pd

    name, _, split = str(source).partition(":")
    path = POCKET_CSV if name == "pocket" else Path(source)
    if name == "pocket" and split not in POCKET_SPLITS:
        raise UserError(f"{source}: unknown split{did_you_mean(source, [f'pocket:{known}' for known in POCKET_SPLITS])}")
    if path.suffix not in (".csv", ".txt"):
        raise UserError(f"{source}: prompts are 'pocket:<split>', a .csv or a .txt")
    try:
        if path.suffix == ".txt":
            # Some editors begin a file with a byte order mark; `splitlines` would also cut at form feeds and at U+2028.
            table = pd.DataFrame({"prompt": path.read_text(encoding="utf-8-sig").split("\n")}, dtype=str)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # a row longer than the header would lose its end
                # "" and "None" are what they look like
                table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{nearest_file(path, '*')}") from None
    except pd.errors.ParserWarning:
        raise UserError(f"{path}: a row has more fields than the header; a prompt with a comma wants quotes") from None
    except (OSError, ValueError) as error:  # pandas' parser and decoding errors are ValueErrors
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if "prompt" not in table:
        raise UserError(f"{path}: no column 'prompt', columns are {', '.join(table.columns)}")
    if name == "pocket":
        table = table[table["split"] == split]
    filled = table[table["prompt"].str.strip() != ""]
    if filled.empty:
        raise UserError(f"{source}: no prompts in it")
    return (table if empty else filled).reset_index(drop=True)
