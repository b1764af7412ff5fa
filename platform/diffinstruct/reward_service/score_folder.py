"""Rewards without a run: score a folder of pictures, and put a reward to the test on pictures at hand."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.files import natural_order, refuse_stand_in
from diffinstruct.config.prompts import read_prompts
from diffinstruct.errors import UserError, did_you_mean, nearest_file
from diffinstruct.method.rewards import LatentRewards, RewardRequest
from diffinstruct.models.pipeline import load_reference
from diffinstruct.reward_service.client import load_reward
from diffinstruct.reward_service.reward_validation import PICTURES, Report, validate_reward
from diffinstruct.statistics import bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff")
BATCH = 16  # pictures of one size that are scored at once, fewer where memory ends
SEED = 0  # of the resamples behind the intervals


def pictures_with_prompts(folder: Path, prompts: str | Path) -> pd.DataFrame:
    """The prompts' table with a first column `image`, file names in `folder`.

    Without such a column in the table there has to be one prompt for each picture, in the order of names, numbers by
    value: 2.png comes before 10.png. A folder's captions belong to the pictures of the same names. Raises UserError where
    they do not match.
    """
    names, table, everything = _names(folder), read_prompts(prompts), read_prompts(prompts, empty=True)
    if Path(prompts).is_dir():
        table, everything = _paired(table, names), _paired(everything, names)
    if "image" in table:
        for name in table["image"]:
            if not (isinstance(name, str) and os.path.isfile(folder / name)):  # which has no error for a name that is too long
                raise UserError(f"{prompts}: no picture {name!r} in {folder}{did_you_mean(name, names)}")
        left = set(names) - set(table["image"])
        empty = left & {name for name in everything["image"] if isinstance(name, str)}
        for some, why in ((empty, "have an empty prompt"), (left - empty, "are not named")):
            if some:
                print(f"{len(some)} of {len(names)} pictures in {folder} {why} in {prompts} and are not scored", flush=True)
        return table[["image", *table.columns.drop("image")]]
    for column in table.columns.drop("prompt"):
        cells = (cell for cell in table[column] if isinstance(cell, str))
        if str(column).strip().lower() == "image" or {Path(cell.strip()).name for cell in cells} & set(names):
            raise UserError(
                f"{prompts}: column {column!r} names pictures of {folder}; call it 'image', each name as in the folder"
            )
    if len(names) != len(table):
        raise UserError(
            f"{folder}: {len(names)} pictures, but {len(table)} prompts in {prompts}; give one for each, in the order of "
            "names, or a .csv with columns 'image' and 'prompt'"
        )
    table.insert(0, "image", names)
    return table


def _paired(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """A folder's captions with the pictures that are called as they are; by their order where none is."""
    by_stem = {Path(name).stem: name for name in names}
    stems = [Path(file).stem for file in table["file"]]
    if not by_stem.keys() & set(stems):
        return table
    return table.assign(image=[by_stem.get(stem, stem) for stem in stems])


def score(folder: Path, table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The table with a column of scores for each reward. Raises UserError for a picture that cannot be read, and
    RewardError."""
    device = _device()
    rewards = LatentRewards(lambda images: images, {name: load_reward(name, device) for name in names})
    paths, texts = [folder / name for name in table["image"]], table["prompt"].tolist()
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, path in enumerate(paths):
        by_size[_size(path)].append(row)
    columns = {name: np.zeros(len(table)) for name in names}
    for alike in by_size.values():
        for rows in (alike[i : i + BATCH] for i in range(0, len(alike), BATCH)):
            images = torch.stack([read_picture(paths[row]) for row in rows]).to(device)
            for name, scores in rewards(images, [texts[row] for row in rows], RewardRequest({}, BATCH)).scores.items():
                columns[name][rows] = scores.double().cpu()
    return table.assign(**columns)


def summary(table: pd.DataFrame, names: Sequence[str]) -> str:
    """A line for each reward: mean over the pictures and its 95 % interval."""
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {bootstrap_mean(table[name], SEED)}  of {len(table)} pictures" for name in names)


def save(table: pd.DataFrame, path: Path) -> None:
    """All of it or nothing."""
    part = path.with_name(f".{path.name}.part")
    try:
        table.to_csv(part, index=False)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: {error.strerror}") from None


def validate_on_folder(
    name: str, folder: Path | None = None, prompts: str | Path | None = None, trained: bool = True
) -> Report:
    """Validate one reward, on at most 64 pictures of the size of the folder's first one. Without a folder the pocket
    world's one-step generator makes the pictures; without prompts its own stand in: no check asks whether they fit."""
    device = _device()
    if folder and prompts:
        table = pictures_with_prompts(folder, prompts)
        names, texts = table["image"].tolist(), table["prompt"].tolist()
    else:
        names, texts = _names(folder) if folder else [], read_prompts(prompts or "pocket:eval")["prompt"].tolist()
        texts = list(islice(cycle(texts), len(names) or PICTURES))
    if folder:
        paths = [folder / name for name in names]
        alike = [row for row, path in enumerate(paths) if _size(path) == _size(paths[0])][:PICTURES]
        images, texts = torch.stack([read_picture(paths[row]) for row in alike]), [texts[row] for row in alike]
    else:
        images = _pictures_of_the_start(texts, device)
    return validate_reward(name, load_reward(name, device), images.to(device), texts, trained)


def read_picture(path: Path) -> Tensor:
    """[3, H, W] in [0, 1], turned as its camera meant it, on white where it is transparent. Raises UserError."""
    with _opened(path) as file:
        if (frames := getattr(file, "n_frames", 1)) > 1 and file.format != "MPO":  # a phone's, with a preview
            raise UserError(f"{path}: is {frames} pictures in one file; save the one that is meant")
        picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith("I"):  # 16 bits of grey
            grey = torch.from_numpy(np.array(picture, np.float32)) / (2**16 - 1)
            if not 0 <= grey.min() <= grey.max() <= 1:
                raise UserError(f"{path}: has more than 16 bits a channel ({picture.mode}); save it with 16 or 8")
            if isinstance(glass := picture.info.get("transparency"), int):
                grey = torch.where(grey == glass / (2**16 - 1), 1.0, grey)
            return grey.expand(3, -1, -1)
        if picture.mode == "F":
            raise UserError(f"{path}: has floating-point pixels, of which nobody knows the range; save it with 16 or 8 bits")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255


def _size(path: Path) -> tuple[int, int]:
    """Of the picture as `read_picture` gives it, from its head alone."""
    with _opened(path) as file:
        lies = file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # it may be anything: as Pillow, ignore the rest
        return file.size[::-1] if lies else file.size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        refuse_stand_in(path)
        with Image.open(path) as file:
            yield file
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them Pillow's
        raise UserError(f"{path}: cannot be read as a picture: {' '.join(str(error).split())}") from None


def _names(folder: Path) -> list[str]:
    """Of the pictures in `folder`, in natural order."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder{nearest_file(folder, '*')}")
    visible = (path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())
    found = [path.name for path in visible if path.suffix.lower() in SUFFIXES]
    if not found:
        inside = sorted({path.parent.name for path in folder.glob("*/*") if path.suffix.lower() in SUFFIXES})
        hint = f", but in {', '.join(inside)} below it: score each with its own prompts" if inside else ""
        raise UserError(f"{folder}: no pictures in it ({', '.join(SUFFIXES)}){hint}")

    return sorted(found, key=natural_order)


def _pictures_of_the_start(texts: list[str], device: torch.device) -> Tensor:
    start = Experiment().generator
    reference = load_reference("pocket", device=device)
    generator = reference.generator(start.timestep, start.init_from, start.input_scale)
    noise = torch.randn(len(texts), *reference.latent_shape, generator=torch.Generator().manual_seed(SEED))
    return reference.sampler(generator)(texts, noise)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
