"""A world with ground truth: a folder whose `world.json` names a pipeline and what is known of its pictures.

The built-in one, "pocket", is such a folder inside the package; the keys of `World` are the keys of the file.
"""

import json
from dataclasses import replace
from pathlib import Path

from pydantic import Field, ValidationError

from diffinstruct.config.fields import Section, Text
from diffinstruct.errors import UserError, did_you_mean
from diffinstruct.metrics import METRICS, Metric, find_metric

POCKET = Path(__file__).parents[1] / "pocket"
WORLD_FILE = "world.json"
PATHS = ("pipeline", "classifier", "prompts", "generator", "evaluation")


class OpenAttribute(Section):
    """An attribute that some prompts leave open, and the value that an annotator prefers there."""

    preferred: Text = Field(description="one of the classifier's class names")
    metric: Text = Field(description="name of the share of open prompts whose picture has the preferred value")
    title: Text = Field(description="what tables call that metric")


class World(Section):
    """What `world.json` says; its paths are relative to its folder."""

    folder: Path = Field(description="the file's own, not a key")
    pipeline: Path = Field(description="the reference, a diffusers pipeline")
    classifier: Path = Field(description="model.safetensors and config.json, see AttributeClassifier.save")
    prompts: Path = Field(description="a column `prompt`, one for each attribute (empty: left open), maybe `split`")
    generator: Path | None = Field(None, description="a network that generates in one step, to start from")
    evaluation: Path | None = Field(None, description="the reference's stored evaluation: table.csv, features.safetensors")
    evaluation_splits: tuple[Text, ...] = Field((), strict=False, description="of the prompts; none: every row")
    rewards: tuple[Text, ...] = Field((), strict=False, description="rewards to evaluate with")
    open_attributes: dict[str, OpenAttribute] = Field({}, description="by the attribute's name")
    seed: int = Field(0, description="of the evaluation's noise and resamples")
    table: tuple[Text, ...] = Field((), strict=False, description="metrics that tables show, in order")
    titles: dict[str, Text] = Field({}, description="what tables call a metric, where its usual title says too little")

    def metrics(self) -> dict[str, Metric]:
        """The table of metrics with this world's own rows and titles."""
        rows = METRICS | {
            each.metric: Metric(each.metric, each.title, interval="share") for each in self.open_attributes.values()
        }
        for name, title in self.titles.items():
            if (metric := find_metric(name, rows)) is None:
                known = did_you_mean(name, rows)
                raise UserError(f"{self.folder / WORLD_FILE}: titles: {name!r} is no metric{known}")
            rows[name] = replace(metric, title=title)
        return rows


def read_world(folder: Path) -> World:
    """Raises UserError, one line, for a file that is not there or says something else than `World`."""
    file = folder / WORLD_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: should be an object, got {content!r}")
    paths = {key: folder / value for key, value in content.items() if key in PATHS and isinstance(value, str)}
    try:
        return World.model_validate(content | paths | {"folder": folder})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        message = "should be a path, relative to the file" if key in PATHS else first["msg"].lower()
        problems = {"extra_forbidden": f"unknown key{did_you_mean(key, World.model_fields)}", "missing": "is missing"}
        raise UserError(f"{file}: {key}: {problems.get(first['type'], message)}") from None


def named_world(model: str) -> World | None:
    """The world that `reference.model` names: "pocket", or a folder with a `world.json`."""
    folder = POCKET if model == "pocket" else Path(model)
    return read_world(folder) if model == "pocket" or (folder / WORLD_FILE).is_file() else None


def world_of(model: str) -> World | None:
    """The world that `reference.model` belongs to: the one it names, or the one whose pipeline it is."""
    if world := named_world(model):
        return world
    pipeline = Path(model).resolve()
    world = named_world(str(Path(model).absolute().parent)) if pipeline.is_dir() else None
    return world if world and world.pipeline.resolve() == pipeline else None
