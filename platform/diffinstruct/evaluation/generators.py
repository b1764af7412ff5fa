"""One-step generators side by side, on the same prompts and noise: what `diffinstruct evaluate` measures.

A generator is a run's folder or an exported pipeline. Where the run's reference belongs to a world (`world.json`), that
world's classifier is the ground truth; elsewhere features come from the image tower of a reward that has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.prompts import read_prompts
from diffinstruct.config.reading import load_run
from diffinstruct.errors import UserError
from diffinstruct.evaluation import REFERENCE_PICTURES, SEED
from diffinstruct.evaluation.evaluate import Evaluation, Sampler, compare, evaluate, image_features
from diffinstruct.evaluation.features import AttributeClassifier, FeatureExtractor, FeaturesOnly
from diffinstruct.evaluation.world import world_prompts
from diffinstruct.method.memory import Batches, out_of_memory
from diffinstruct.method.precision import autocast, frozen_dtype, use_precision
from diffinstruct.method.rewards import RewardModel
from diffinstruct.metrics import METRICS
from diffinstruct.models.export import load_export
from diffinstruct.models.pipeline import load_reference
from diffinstruct.models.sampling import pictures_at_once
from diffinstruct.models.world import World, world_of
from diffinstruct.reports.frames import markdown
from diffinstruct.reward_service.client import load_reward
from diffinstruct.statistics import Array, Summary

if TYPE_CHECKING:
    import pandas as pd


STEPS = 50
"""Of the reference's own pictures, which distances are measured to."""


def evaluate_generators(
    folders: Sequence[Path | str],
    prompts: str | None = None,
    rewards: Sequence[str] = (),
    reference_pictures: int = REFERENCE_PICTURES,
    seed: int = SEED,
) -> dict[str, Evaluation]:
    """Every metric of the generators in `folders`, by the folder's name.

    prompts: a prompt set, see `read_prompts`; columns named like the classifier's attributes are checked against the
        pictures. None: the first evaluation split of the first run's world.
    rewards: names; none means those of the first run among the folders.
    reference_pictures: how many the reference makes, of the first prompts and other noise; 0 leaves distances out. The
        reference, and its guidance, are those of the first run.
    Raises UserError for what is neither run nor export, and where nothing says what to measure.
    """
    paths = [Path(folder) for folder in folders]
    runs = {path: load_run(path) for path in paths if (path / "experiment.yaml").is_file()}
    exports = [_export_of(path, runs.get(path)) for path in paths]
    first = next(iter(runs.values()), None)
    world = world_of(first.reference.model) if first else None
    table = read_prompts(prompts) if prompts else _prompts_of(world, first, paths[0])
    names = list(rewards) or ([r.name for r in first.rewards.trained] + list(first.rewards.held_out) if first else [])
    if not names:
        raise UserError(f"{folders[0]}: is no run that names rewards; name some with --reward")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: load_reward(name, device) for name in names}
    extractor = _extractor(world, models, device)
    features = _reference_features(first, extractor, table, reference_pictures, seed, device)
    evaluations = {}
    for path, folder, name in zip(paths, exports, _short(paths), strict=True):
        print(f"measuring {name}: {len(table)} prompts", flush=True)
        sample, latent_shape = sampler(folder, runs.get(path, first), device)
        with _one_line(folder):
            evaluations[name] = evaluate(
                sample,
                table,
                models,
                extractor,
                features,
                noise_shape=latent_shape,
                seed=seed,
                open_attributes=world.open_attributes if world else {},
                metrics=world.metrics() if world else METRICS,
            )
        del sample  # the next generator takes its place in memory
    return evaluations


def sampler(export: Path, run: Experiment | None, device: torch.device) -> tuple[Sampler, tuple[int, ...]]:
    """Samples an exported generator in a run's precision; and the shape of its noise."""
    use_precision(precision := run.precision if run else "fp32")
    reference, generator = load_export(export, device, frozen_dtype(precision))
    return reference.sampler(generator, precision), reference.latent_shape


@contextmanager
def _one_line(model: Path | str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # a prompt table's attributes, or a reward that is not finite
        raise UserError(f"{model}: {error}") from None
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"{model}: out of memory with one picture at a time; give it a device with more that is free") from None


def report(evaluations: Mapping[str, Evaluation]) -> str:
    """The table of all, and below it each against the first, paired over prompts and noise; Markdown."""
    (first, start), *others = evaluations.items()
    text = markdown({name: evaluation.summary() for name, evaluation in evaluations.items()})
    differences: dict[str, Summary] = {name: compare(evaluation, start) for name, evaluation in others}
    return text + (f"\nMinus {first}, paired:\n\n{markdown(differences)}" if differences else "")


def save(evaluations: Mapping[str, Evaluation], folder: Path) -> None:
    """`table.md`, and for each generator one row a prompt in `<name>.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(report(evaluations))
    for name, evaluation in evaluations.items():
        evaluation.table.to_csv(folder / f"{name}.csv", index=False)


def _export_of(folder: Path, run: Experiment | None) -> Path:
    export = folder / "export" if run else folder
    if not (export / "model_index.json").is_file():
        what = "has not finished: no exported model in it" if run else "is neither a run nor an exported pipeline"
        raise UserError(f"{folder}: {what}")
    return export


def _prompts_of(world: World | None, run: Experiment | None, folder: Path) -> pd.DataFrame:
    if world is None:
        model = f"of {run.reference.model!r}" if run else "no run"
        raise UserError(f"--prompts: name some; {folder} is {model}, which has none built in")
    return world_prompts(world, world.evaluation_splits[:1])


def _extractor(world: World | None, rewards: Mapping[str, RewardModel], device: torch.device) -> FeatureExtractor:
    if world:
        return AttributeClassifier.load(world.classifier).to(device)
    for reward in reversed(list(rewards.values())):  # held-out ones come last: better than what was trained on
        if callable(features := getattr(reward, "features", None)):
            return FeaturesOnly(features)
    raise UserError(f"--reward: none of {', '.join(rewards)} has image features to measure distances with; add 'pickscore'")


@torch.no_grad()
def _reference_features(
    run: Experiment | None, extractor: FeatureExtractor, table: pd.DataFrame, pictures: int, seed: int, device: torch.device
) -> Array | None:
    if run is None or pictures == 0:
        return None
    use_precision(run.precision)
    reference = load_reference(run.reference.model, device=device, decoder_dtype=frozen_dtype(run.precision))
    texts: list[str] = table["prompt"].tolist()[:pictures]
    generator = torch.Generator().manual_seed(seed + 1)  # noise that no generator is given
    noise = torch.randn(len(texts), *reference.latent_shape, generator=generator)
    print(f"the reference makes {len(texts)} pictures in {STEPS} steps", flush=True)

    def features_of(rows: slice) -> Array:
        with autocast(run.precision, device):
            latents = reference.sample(texts[rows], noise[rows].to(device), STEPS, run.reference.guidance_scale)
        return image_features(extractor, reference.decode(latents))

    with _one_line(run.reference.model):
        return np.concatenate(list(Batches(pictures_at_once(reference.latent_shape)).map(features_of, len(texts))))


def _short(folders: Sequence[Path]) -> list[str]:
    """The folders' names; where two are alike, with their parents'."""
    names = [folder.absolute().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    longer = ["-".join(folder.absolute().parts[-2:]) for folder in folders]
    if len(set(longer)) < len(longer):
        raise UserError("evaluate: the same folder is named twice")
    return longer
