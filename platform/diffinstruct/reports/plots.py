"""Figures of runs and sweeps, each a function that writes a PNG. What they draw are the tables of `frames`.

Pictures come from the grids that runs leave in `images/`: rows are prompts; the columns are the starting generator,
then the current one on the same noise and on more.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from PIL import Image

from diffinstruct.metrics import METRICS
from diffinstruct.reports.frames import Measures, described, pareto_front, plain, reward_gap, short, swept

COLUMNS = 4  # of a run's picture grid: the start, and three noises of the current generator
WIDTH = 11.0  # inches
LETTERS = "ABCDEFGH"  # for the points of a front that are named and shown
MOST_LINES = 10  # that a reader can tell apart by colour where more than two keys vary
MARKERS, DASHES = "osD^vP*X", ("-", "--", ":", "-.")
Look = tuple[Any, int | None]  # a colour, and the number of a mark or dash; None: any
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.6",
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "xtick.color": "0.35",
    "ytick.color": "0.35",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "savefig.dpi": 140,
    "text.parse_math": False,  # prompts and names of rewards are no TeX
}


@contextmanager
def canvas(path: Path, height: float) -> Iterator[Figure]:
    """A figure of our style, WIDTH wide and `height` inches high, written to `path` at the end."""
    with rc_context(STYLE):
        picture = Figure(figsize=(WIDTH, height), layout="constrained")
        yield picture
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path)


# -------------------------------------------------------------------------------------------------------- sweeps
def pareto(points: pd.DataFrame, of: Measures, keys: Sequence[str], path: Path) -> dict[str, str]:
    """Held-out reward against distance, a mark a configuration (`frames.points`), its intervals as bars, the front as
    a line. Above it pictures of those on the front whose run has some, beside the start. Colours and marks are the
    swept `keys`, where there are one or two. Returns which configuration each letter names. Raises ValueError where one
    of the two measures is missing."""
    up, down, titles = of.held_out, of.distance, of.titles()
    if up is None or down is None:
        raise ValueError("a Pareto front takes a held-out reward and a distance")
    front = pareto_front(points, up, down)
    chosen = _apart(front[[down, up]].to_numpy(np.float64), len(LETTERS))
    named = front.iloc[chosen].assign(letter=list(LETTERS[: len(chosen)]))
    pictures = {str(point["letter"]): made for _, point in named.iterrows() if (made := _thumbnails(point["runs"]))}
    with canvas(path, 5.0 + 1.4 * bool(pictures)) as picture:
        axes = picture.subplots(1 + bool(pictures), 1, squeeze=False, height_ratios=[1.4] * bool(pictures) + [5.0]).ravel()
        axis = axes[-1]
        axis.plot(front[down], front[up], color="0.7", linewidth=1.2, zorder=1, label="Pareto front")
        looks, legend = _encoding(points, keys, len(MARKERS))
        for (_, point), (colour, mark) in zip(points.iterrows(), looks, strict=True):
            middle = (point[down], point[up])
            axis.errorbar(*middle, xerr=_bar(point, down), yerr=_bar(point, up), color=colour, elinewidth=0.7, alpha=0.45)
            axis.plot(*middle, MARKERS[mark or 0], color=colour, markersize=7, markeredgecolor="white", markeredgewidth=0.6)
        for _, point in named.iterrows():
            place = {"textcoords": "offset points", "xytext": (5, 6), "fontweight": "bold"}
            axis.annotate(point["letter"], (point[down], point[up]), **place)
        for value, (colour, mark) in legend.items():
            axis.plot([], [], "s" if mark is None else MARKERS[mark], color=colour, label=value)
        axis.set(xlabel=f"{titles[down]} (less is nearer)", ylabel=titles[up])
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        if pictures:
            _strip(picture, axes[0], axis, pictures, named.set_index("letter"), (down, up), keys)
    return {str(point["letter"]): described(point, keys) for _, point in named.iterrows()}


def heat_maps(frame: pd.DataFrame, of: Measures, x: str, y: str, path: Path) -> None:
    """Trained and held-out reward, distance, diversity, and the gap between the two rewards (`frames.reward_gap`) over
    two swept keys. A cell is the mean over the finished runs there, training seeds and whatever else varies."""
    (gap, unit), said = reward_gap(frame), short([x, y])
    panels = {title: frame[measure] for measure, title in of.titles().items()}
    costs = [title for name, title in of.titles().items() if name in METRICS and METRICS[name].direction == "down"]
    if gap.notna().any():
        costs.append(f"trained minus held-out gain,\n{unit}")
        panels[costs[-1]] = gap
    done = frame["status"] == "finished"
    rows = math.ceil(len(panels) / 3)
    height = 0.9 + 0.42 * frame.loc[done, y].nunique(dropna=False)
    with canvas(path, rows * max(2.2, height)) as picture:
        axes = picture.subplots(rows, 3, squeeze=False).ravel()
        for axis, (title, values) in zip(axes, panels.items(), strict=False):
            cells = values[done].groupby([frame.loc[done, y], frame.loc[done, x]], dropna=False).mean().unstack()
            _heat(axis, cells.sort_index().sort_index(axis=1), "Oranges" if title in costs else "Blues")
            axis.set(title=title, xlabel=said[x], ylabel=said[y])
        for axis in axes[len(panels) :]:
            axis.set_axis_off()


def curves(values: pd.DataFrame, frame: pd.DataFrame, titles: Mapping[str, str], path: Path) -> None:
    """The course of the metrics `titles` (key -> title), a panel each, from `frames.learning_curves`. A line is one
    configuration: the mean over training seeds, in a band from lowest to highest. A cross: a run's first alarm."""
    keys = swept(frame)
    groups = [group for _, group in frame.groupby(keys or np.zeros(len(frame)), sort=False, dropna=False)]
    firsts = pd.DataFrame([group.iloc[0] for group in groups])
    looks, legend = _encoding(firsts, keys, len(DASHES))
    rows = math.ceil(len(titles) / 3)
    blank = 3 * rows - len(titles)
    with canvas(path, 2.7 * rows + 0.25 * math.ceil(len(legend) / 4) * (not blank)) as picture:
        axes = picture.subplots(rows, 3, squeeze=False).ravel()
        for axis, (key, title) in zip(axes, titles.items(), strict=False):
            of_key = values[values["key"] == key].pivot(index="step", columns="run", values="value")
            for group, (colour, mark) in zip(groups, looks, strict=True):
                course = of_key[[run for run in group["run"] if run in of_key]].dropna(how="all")
                style = DASHES[mark or 0] if len(course) > 1 else "o"  # a line takes two points
                axis.plot(course.mean(axis=1), style, color=colour, linewidth=1.4, markersize=4)
                if course.shape[1] > 1:
                    axis.fill_between(course.index, course.min(axis=1), course.max(axis=1), color=colour, alpha=0.15, lw=0)
                for run, step in group.dropna(subset=["alarm"]).set_index("run")["alarm"].items():
                    if run in course and step in course.index:
                        axis.plot(step, course.loc[step, run], "X", color=colour, mec="black", mew=0.7, markersize=6)
            axis.set(title=title, xlabel="step")
        for axis in axes[len(titles) :]:
            axis.set_axis_off()
        for value, (colour, mark) in legend.items():
            axes[-1].plot([], [], DASHES[mark or 0], color=colour, label=value, linewidth=3 if mark is None else 1.4)
        lines, words = axes[-1].get_legend_handles_labels()
        if blank and lines:
            axes[-1].legend(lines, words, loc="center")
        elif lines:
            picture.legend(lines, words, loc="outside lower center", ncols=4)


# ------------------------------------------------------------------------------------------------------ pictures
def picture_grid(prompts: Sequence[str], columns: Mapping[str, Sequence[Image.Image]], path: Path) -> None:
    """Pictures side by side: a row a prompt, with its text, a column a generator, with its name."""
    with canvas(path, 0.4 + 1.3 * len(prompts)) as picture:
        axes = picture.subplots(len(prompts), 1 + len(columns), squeeze=False, width_ratios=[2, *[1] * len(columns)])
        for axis in axes.ravel():
            axis.set_axis_off()
        for prompt, row in zip(prompts, axes, strict=True):
            row[0].text(0, 0.5, textwrap.fill(prompt, 32), va="center", transform=row[0].transAxes)
        for j, (name, pictures) in enumerate(columns.items(), start=1):
            axes[0, j].set_title(name)
            for axis, made in zip(axes[:, j], pictures, strict=True):
                axis.imshow(made)


def grids(run: Path | str) -> dict[int, Path]:
    """Step -> the picture grid that the run in this folder drew there, in order."""
    return {int(file.stem.removeprefix("grid-")): file for file in sorted(Path(run).glob(f"images/grid-{'[0-9]' * 8}.png"))}


def cells(grid: Path) -> list[list[Image.Image]]:
    """A picture grid's rows, each a list of its COLUMNS square pictures. [] for a file that is no picture."""
    try:
        with Image.open(grid) as opened:
            whole = opened.convert("RGB")
    except OSError:
        return []
    edge = whole.width // COLUMNS
    return [
        [whole.crop((j * edge, i * edge, (j + 1) * edge, (i + 1) * edge)) for j in range(COLUMNS)]
        for i in range(whole.height // edge)
    ]


# --------------------------------------------------------------------------------------------------------- parts
def _encoding(rows: pd.DataFrame, keys: Sequence[str], marks: int) -> tuple[list[Look], dict[str, Look]]:
    """How each configuration is drawn, and the legend of that. Of one or two keys the one with more values is the
    colour, the other one of `marks` marks. Otherwise each row has a colour, or none where they are too many."""
    factors = {key: pd.factorize(rows[key], sort=True, use_na_sentinel=False) for key in keys}
    by = sorted(keys, key=lambda key: -len(factors[key][1]))
    if not 1 <= len(by) <= 2 or (len(by) == 2 and len(factors[by[1]][1]) > marks):
        if len(rows) > MOST_LINES:
            return [("0.45", 0)] * len(rows), {}
        looks: list[Look] = [(f"C{i}", 0) for i in range(len(rows))]
        words = [described(row, keys) for _, row in rows.iterrows()]
        return looks, dict(zip(words, looks, strict=True)) if keys else {}
    (colours, values), (marked, others) = factors[by[0]], factors[by[1]] if by[1:] else (np.zeros(len(rows), int), [])
    numeric = pd.api.types.is_numeric_dtype(rows[by[0]])
    shades = [*colormaps["viridis"](np.linspace(0, 0.88, len(values)))] if numeric else [f"C{i}" for i in range(len(values))]
    said = short(keys)
    legend: dict[str, Look] = {
        f"{said[by[0]]} {plain(value) or 'as the recipe'}": (shade, None) for shade, value in zip(shades, values, strict=True)
    }
    legend |= {f"{said[by[1]]} {plain(value) or 'as the recipe'}": ("0.4", i) for i, value in enumerate(others)}
    return [(shades[colour], mark) for colour, mark in zip(colours, marked, strict=True)], legend


def _bar(point: pd.Series, measure: str) -> np.ndarray | None:
    """An interval as matplotlib's error bar, [2, 1]; None where there is none."""
    ends = np.array([[point[measure] - point[f"{measure}.low"]], [point[f"{measure}.high"] - point[measure]]], np.float64)
    return ends.clip(0) if np.isfinite(ends).all() else None


def _apart(path: np.ndarray, most: int) -> list[int]:
    """The numbers of at most `most` points of a path [n, 2], its two ends among them, that lie apart along it as drawn:
    where many points lie together one stands for them."""
    steps = np.diff(path, axis=0) / np.where(np.ptp(path, axis=0) > 0, np.ptp(path, axis=0), 1)
    along = np.concatenate([[0], np.hypot(*steps.T).cumsum()])
    apart, chosen = 0.999 * along[-1] / (most - 1), [0]
    if not apart:  # all are in one place
        return chosen
    for i in range(1, len(along)):
        if along[i] - along[chosen[-1]] >= apart:
            chosen.append(i)
    last = len(along) - 1
    return [*chosen[:-1], last] if last and along[last] - along[chosen[-1]] < apart and len(chosen) > 1 else chosen


def _thumbnails(runs: Sequence[str]) -> tuple[Image.Image, Image.Image] | None:
    """The start and the last grid of the first of these runs that has pictures: each four prompts, two by two."""
    for run in runs:
        if len(rows := cells([*grids(run).values()][-1]) if grids(run) else []) >= 4:
            return _mosaic([row[0] for row in rows[:4]]), _mosaic([row[1] for row in rows[:4]])
    return None


def _mosaic(four: Sequence[Image.Image]) -> Image.Image:
    edge = 96
    made = Image.new("RGB", (2 * edge, 2 * edge))
    for i, part in enumerate(four):
        made.paste(part.resize((edge, edge), Image.Resampling.LANCZOS), (i % 2 * edge, i // 2 * edge))
    return made


def _strip(
    picture: Figure,
    strip: Axes,
    axis: Axes,
    pictures: Mapping[str, tuple[Image.Image, Image.Image]],
    named: pd.DataFrame,
    at: tuple[str, str],
    keys: Sequence[str],
) -> None:
    """Thumbnails in the order of the front, so that the lines to their points do not cross."""
    strip.set_axis_off()
    axis.patch.set_visible(False)
    places = 1 + len(LETTERS)
    start = next(iter(pictures.values()))[0]
    for i, (letter, made) in enumerate([("start", start), *((letter, last) for letter, (_, last) in pictures.items())]):
        inset = strip.inset_axes((i / places, 0.0, 0.94 / places, 0.8))
        inset.imshow(made)
        inset.set_axis_off()
        inset.set_anchor("S")
        title = letter
        if letter in named.index:
            point = named.loc[letter]
            title = f"{letter}:  {' / '.join(plain(point[key]) or '–' for key in keys)}" if 1 <= len(keys) <= 2 else letter
            line = ConnectionPatch((0.5, 0), (point[at[0]], point[at[1]]), inset.transAxes, axis.transData)
            line.set(color="0.75", linewidth=0.7, zorder=-1)
            picture.add_artist(line)
        inset.set_title(title, fontsize=8, pad=3)
    if 1 <= len(keys) <= 2:
        said = short(keys)
        strip.set_title(" / ".join(said[key] for key in keys) + " along the front", loc="left", fontsize=8, color="0.35")


def _heat(axis: Axes, values: pd.DataFrame, colours: str) -> None:
    numbers = values.to_numpy(np.float64)
    axis.imshow(np.ma.masked_invalid(numbers), cmap=colours, aspect="auto", origin="lower")
    axis.set_xticks(range(len(values.columns)), [plain(value) or "recipe" for value in values.columns])
    axis.set_yticks(range(len(values.index)), [plain(value) or "recipe" for value in values.index])
    axis.grid(False)
    low, high = (np.nanmin(numbers), np.nanmax(numbers)) if np.isfinite(numbers).any() else (0.0, 0.0)
    for (i, j), value in np.ndenumerate(numbers):
        text = f"{value:#.3g}".rstrip(".") if np.isfinite(value) else "–"
        axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if value > (low + high) / 2 else "0.15")
