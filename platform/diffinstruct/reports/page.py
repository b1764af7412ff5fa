"""A run or a sweep as one HTML file to send to a colleague: `diffinstruct report`.

The file needs nothing else: figures and pictures are in it, there is no script. It stays under MOST_BYTES because
pictures are shrunk to EDGE and every list has an end; what is left out is said where it is missing.
"""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.prompts import read_prompt_set
from diffinstruct.config.reading import load_run
from diffinstruct.config.sections import LoggingConfig, PromptsConfig
from diffinstruct.errors import UserError
from diffinstruct.metrics import METRICS, find_metric
from diffinstruct.reports import frames, plots
from diffinstruct.reports.frames import Measures, described, estimate_text, plain, swept

MOST_BYTES = 10_000_000
EDGE = 224  # pixels, of a picture in the page
MOST_PROMPTS, MOST_TIMES, MOST_BEST = 8, 4, 5
"""Rows of a table of pictures; grids of a run between start and end; trials beside the start."""
MOST_COLUMNS = 3  # with more swept keys than this a table has one column "configuration"
MOST_ROWS, MOST_EVENTS, MOST_CHARACTERS = 400, 200, 1000  # of a table of trials; of a run; of a cell
CURVES = ("x0_gap", "overoptimization/unexplained", "overoptimization/variety")
"""Metrics of training that a page draws, beside the rewards."""


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side: `rows` are (prompt, one data URI a column)."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]
    note: str = ""


def write(path: Path, out: Path) -> None:
    """The report of what `load_sweep` reads at `path` into `out`. Raises UserError."""
    frame = frames.load_sweep(path)
    is_run = path.suffix != ".csv" and (path / "experiment.yaml").is_file()
    save(out, of_run(path, frame.iloc[0]) if is_run else of_sweep(path, frame))


def save(out: Path, page: str) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from None


def of_run(folder: Path, run: pd.Series) -> str:
    """A run's page; `run` is its row in a frame."""
    experiment, records = load_run(folder), frames.read_run(folder)
    starts = frames.start_tags(records)
    frame, values = run.to_frame().T, frames.learning_curves(folder)
    events = [record for record in records if "event" in record]
    alarms = [record["text"] for record in events if record["event"] == "overoptimization"]
    intervals = [measure for measure in frames.with_intervals(frame) if pd.notna(run[measure])]
    return render(
        "run.html",
        title=folder.absolute().name,
        run=run,
        experiment=experiment,
        tags=starts[-1] if starts else {},
        times=[_time(records[0]), _time(records[-1])] if records else [],
        resumed=max(0, len(starts) - 1),
        changes=experiment.changes(Experiment()),
        curves=_curves(values, frame),
        pictures=pictures_over_time(folder, _grid_prompts(experiment.prompts, experiment.logging)),
        evaluation=[
            (name, metric.title if (metric := find_metric(name)) else "", estimate_text(run, name), int(run[f"{name}.n"]))
            for name in intervals
        ],
        metrics={key: plain(run[key]) for key in values["key"].unique() if key not in intervals},
        alarms=alarms[:MOST_EVENTS],
        events=events[:MOST_EVENTS],
        events_left_out=len(events[MOST_EVENTS:]),
    )


def of_sweep(path: Path, frame: pd.DataFrame) -> str:
    """A sweep's page; `frame` as `load_sweep` reads it at `path`."""
    keys, of, by_point = swept(frame), frames.measures(frame), frames.points(frame)
    titles = of.titles()
    order = frame.sort_values(of.held_out, ascending=False, na_position="last") if of.held_out else frame
    configuration = {
        key: _cut(plain(frame[key].iloc[0])) for key in frames.identity_keys(frame) if key not in keys and key != "seed"
    }
    default = {key: _cut(plain(value)) for key, value in Experiment().to_params().items() if value is not None}
    highest_held_out = by_point.sort_values(of.held_out, ascending=False) if of.held_out else by_point
    counts = frame["status"].value_counts().to_dict()
    if (begun := len(frame)) < (trials := frames.planned(path)):
        counts["not begun"] = trials - begun
    done = frame[frame["status"] == "finished"]  # a run that has just begun would bend the curves' mean over seeds
    is_folder, several = path.suffix != ".csv", bool(len(by_point)) and max(map(len, by_point["runs"])) > 1
    return render(
        "sweep.html",
        title=path.absolute().name,
        counts=counts,
        alarms=int(frame["alarm"].notna().sum()) if "alarm" in frame else 0,
        swept={key: [plain(value) or "as the recipe" for value in frame[key].drop_duplicates().sort_values()] for key in keys},
        seeds=[plain(seed) for seed in sorted(frame["seed"].unique())] if "seed" in frame else [],
        same={key: (default[key], value) for key, value in configuration.items() if value != default.get(key, value)},
        commits=sorted(frame["commit"].dropna().unique()) if "commit" in frame else [],
        titles=titles,
        heads=_heads(keys),
        pareto=_pareto(by_point, of, keys),
        compared=0 if of.held_out is None or of.distance is None else len(by_point.dropna(subset=[of.held_out, of.distance])),
        by_point=[
            {"keys": _cells(row, keys), "n": len(row["runs"]), "estimates": [estimate_text(row, measure) for measure in titles]}
            for _, row in highest_held_out.head(MOST_ROWS).iterrows()
            if several
        ],
        heat=_heat_maps(frame, of, keys),
        curves=_curves(frames.learning_curves(path), frame if done.empty else done) if is_folder else None,
        pictures=pictures_of_the_highest(highest_held_out, keys) if is_folder else None,
        table=[_trial(row, keys, titles) for _, row in order.head(MOST_ROWS).iterrows()],
        left_out=len(order[MOST_ROWS:]),
    )


# ------------------------------------------------------------------------------------------------------ pictures
def pictures_over_time(folder: Path, prompts: Sequence[str]) -> Pictures | None:
    """The start, then the same noise at a few steps to the last, then the last on more noise; None without pictures."""
    drawn = {step: rows for step, file in plots.grids(folder).items() if (rows := plots.cells(file))}
    if not drawn:
        return None
    after = [step for step in drawn if step > 0]
    times = [after[i] for i in np.unique(np.linspace(0, len(after) - 1, min(len(after), MOST_TIMES)).round().astype(int))]
    first = next(iter(drawn.values()))
    columns = {"start": [row[0] for row in first]} | {f"step {step}": [row[1] for row in drawn[step]] for step in times}
    if times:
        columns |= {f"step {times[-1]}, other noise": [row[2] for row in drawn[times[-1]]]}
        columns |= {"and other": [row[3] for row in drawn[times[-1]]]}
    left_out = f"{len(times)} of {len(after)} times are shown. " * (len(times) < len(after))
    return side_by_side(prompts, columns, left_out)


def pictures_of_the_highest(points: pd.DataFrame, keys: Sequence[str]) -> Pictures | None:
    """The start beside the last pictures of the first of these points that have some, on the same prompts and noise."""
    columns: dict[str, list[Image.Image]] = {}
    prompts: list[str] | None = None
    for _, point in points.iterrows():
        for run in point["runs"]:
            drawn = [*plots.grids(run).values()]
            experiment = load_run(Path(run))
            texts = _grid_prompts(experiment.prompts, experiment.logging)
            if not drawn or prompts not in (None, texts) or not (rows := plots.cells(drawn[-1])):
                continue
            prompts = texts
            columns.setdefault("start", [row[0] for row in rows])
            columns[described(point, keys) if keys else Path(run).name] = [row[1] for row in rows]
            break
        if len(columns) > MOST_BEST:
            break
    return side_by_side(prompts or [], columns) if columns else None


def side_by_side(prompts: Sequence[str], columns: Mapping[str, Sequence[Image.Image]], note: str = "") -> Pictures:
    """Pictures as the page has them, small; `prompts` may be fewer than there are pictures, or none."""
    n = max(map(len, columns.values()))
    edge = max(picture.width for pictures in columns.values() for picture in pictures)
    rows = [
        (_cut(prompts[i]) if i < len(prompts) else "", [inlined(made[i]) if i < len(made) else "" for made in columns.values()])
        for i in range(min(n, MOST_PROMPTS))
    ]
    note += f"The first {MOST_PROMPTS} of {n} prompts. " * (n > MOST_PROMPTS)
    return Pictures(list(columns), rows, note + f"Pictures are shrunk from {edge} to {EDGE} pixels. " * (edge > EDGE))


def inlined(picture: Image.Image) -> str:
    """A data URI of a picture, no larger than EDGE either way."""
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
    small.save(buffer, "WEBP", quality=82)
    return _uri("image/webp", buffer.getvalue())


def _grid_prompts(prompts: PromptsConfig, logging: LoggingConfig) -> list[str]:
    """[] where their file is gone: the pictures are still worth a look."""
    try:
        return list(read_prompt_set(prompts.grid, prompts.column)[: logging.grid_prompts])
    except UserError:
        return []


# ------------------------------------------------------------------------------------------------------- figures
def _curves(values: pd.DataFrame, frame: pd.DataFrame) -> str | None:
    rewards = sorted(key for key in values["key"].unique() if key.startswith(("reward/", "held_out/")))[::-1]
    kinds = {key: "trained" if key.startswith("reward/") else "held-out" for key in rewards[:6]}
    titles = {key: f"{kind} reward, {key.partition('/')[2]}" for key, kind in kinds.items()} | {
        key: METRICS[key].title for key in CURVES
    }
    known = {key: title for key, title in titles.items() if values["key"].eq(key).any()}
    return _drawn(lambda file: plots.curves(values, frame, known, file))[0] if known else None


def _pareto(by_point: pd.DataFrame, of: Measures, keys: Sequence[str]) -> tuple[str, dict[str, str]] | None:
    if of.held_out is None or of.distance is None or by_point[[of.held_out, of.distance]].dropna().empty:
        return None
    return _drawn(lambda file: plots.pareto(by_point, of, keys, file))


def _heat_maps(frame: pd.DataFrame, of: Measures, keys: Sequence[str]) -> str | None:
    done = frame[frame["status"] == "finished"]
    if len(keys) != 2 or not of.titles() or (done[list(keys)].nunique(dropna=False) < 2).any():
        return None
    x, y = sorted(keys, key=lambda key: done[key].nunique())
    return _drawn(lambda file: plots.heat_maps(frame, of, x, y, file))[0]


def _drawn(draw: Any) -> tuple[str, Any]:
    """What `draw` draws into a file, as a data URI, and what it returns."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "figure.png")
        returned = draw(file)
        return _uri("image/png", file.read_bytes()), returned


# -------------------------------------------------------------------------------------------------------- tables
def _trial(row: pd.Series, keys: Sequence[str], titles: Mapping[str, str]) -> dict[str, Any]:
    alarm = f"over-optimization: first alarm at step {plain(row['alarm'])}" if pd.notna(row.get("alarm")) else ""
    remarks = [alarm, "" if row["status"] == "finished" else row["status"], "" if pd.isna(row["reason"]) else row["reason"]]
    return {
        "run": Path(row["run"]).name,
        "kind": "failed" if row["status"] == "failed" else "hacked" if alarm else row["status"],
        "keys": _cells(row, keys),
        "seed": plain(row.get("seed")),
        "step": plain(row.get("step")),
        "estimates": [estimate_text(row, measure) for measure in titles],
        "remark": _cut(": ".join(filter(None, remarks))),
    }


def _cells(row: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """A trial's point, under `_heads`."""
    return [_cut(described(row, keys))] if len(keys) > MOST_COLUMNS else [_cut(plain(row[key])) or "–" for key in keys]


def _heads(keys: Sequence[str]) -> list[str]:
    return ["configuration"] if len(keys) > MOST_COLUMNS else [*frames.short(keys).values()]


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


def _time(record: Mapping[str, Any]) -> datetime:
    return datetime.fromtimestamp(record["time"] / 1000, UTC)


# ---------------------------------------------------------------------------------------------------------- page
def render(template: str, **content: Any) -> str:
    """A page of `templates/`; whatever is put into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffinstruct.reports"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["cut"] = _cut
    return environment.get_template(template).render(content | {"made": datetime.now(UTC)})


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
