"""One-step generators side by side, on the same prompts and noise: what `diffinstruct evaluate` measures.

A generator is a run's folder or an exported pipeline. Where the run's reference belongs to a world (`world.json`), that
world's classifier is the ground truth; elsewhere features come from the image tower of a reward that has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from diffinstruct.config.inputs import import_named
from diffinstruct.config.prompts import read_prompts
from diffinstruct.config.reading import load_run
from diffinstruct.config.sections import ReferenceConfig
from diffinstruct.errors import UserError
from diffinstruct.evaluation import REFERENCE_PICTURES, SEED
from diffinstruct.evaluation.evaluate import Evaluation, Sampler, compare, evaluate, image_features
from diffinstruct.evaluation.features import AttributeClassifier, FeatureExtractor, FeaturesOnly
from diffinstruct.evaluation.world import world_prompts
from diffinstruct.method.memory import Batches, out_of_memory
from diffinstruct.method.precision import autocast, frozen_dtype, use_precision
from diffinstruct.method.rewards import RewardError, RewardModel
from diffinstruct.metrics import METRICS, Metric, find_metric
from diffinstruct.models.export import load_export
from diffinstruct.models.pipeline import load_reference
from diffinstruct.models.sampling import pictures_at_once
from diffinstruct.models.world import World, world_of
from diffinstruct.reports.frames import markdown
from diffinstruct.reward_service.client import load_reward
from diffinstruct.statistics import Array, Summary

STEPS = 50  # of the reference's own pictures, which distances are measured to


def evaluate_generators(
    folders: Sequence[Path | str],
    prompts: str | None = None,
    rewards: Sequence[str] = (),
    reference_pictures: int = REFERENCE_PICTURES,
    seed: int = SEED,
    metrics: Sequence[str | Metric] = (),
) -> dict[str, Evaluation]:
    """Every metric of the generators in `folders`, by the folder's name.

    prompts: a prompt set, see `read_prompts`; columns named like the classifier's attributes are checked against the
        pictures. None: the first evaluation split of the first run's world.
    rewards: names; none means those of the first run among the folders.
    reference_pictures: how many the reference makes, of the first prompts and other noise; 0 leaves distances out. The
        reference, and its guidance, are those of the first run.
    metrics: of your own, beside the table's: a Metric with a function of pictures, or `module:attribute` of one.
    Raises UserError for what is neither run nor export, and where nothing says what to measure.
    """
    paths = [Path(folder) for folder in folders]
    runs = {path: load_run(path) for path in paths if (path / "experiment.yaml").is_file()}
    exports = [_export_of(path, path in runs) for path in paths]
    first = next(iter(runs.values()), None)
    world = world_of(first.reference.model) if first else None
    if not prompts and not world:
        model = f"of {first.reference.model!r}" if first else "no run"
        raise UserError(f"--prompts: name some; {paths[0]} is {model}, which has none built in")
    table = world_prompts(world, world.evaluation_splits[:1]) if world and not prompts else read_prompts(str(prompts))
    names = list(rewards) or list(first.rewards.names if first else ())
    if not names:
        raise UserError(f"{folders[0]}: is no run that names rewards; name some with --reward")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = _metrics(world, metrics)
    models = {name: load_reward(name, device) for name in names}
    extractor = _extractor(world, models, device)
    features = None
    if first and reference_pictures:
        texts = table["prompt"].tolist()[:reference_pictures]
        features = _reference_features(first.reference, first.precision, extractor, texts, seed, device)
    evaluations = {}
    for path, folder, name in zip(paths, exports, _short(paths), strict=True):
        print(f"measuring {name}: {len(table)} prompts", flush=True)
        sample, latent_shape = sampler(folder, run.precision if (run := runs.get(path, first)) else "fp32", device)
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
                metrics=rows,
            )
        del sample  # the next generator takes its place in memory
    return evaluations


def sampler(export: Path, precision: str, device: torch.device) -> tuple[Sampler, tuple[int, ...]]:
    """Samples an exported generator in a run's precision; and the shape of its noise."""
    use_precision(precision)
    reference, generator = load_export(export, device, frozen_dtype(precision))
    return reference.sampler(generator, precision), reference.latent_shape


@contextmanager
def _one_line(model: Path | str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RewardError) as error:  # a prompt table's attributes, or a reward
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
    (folder / "table.md").write_text(report(evaluations), encoding="utf-8")
    for name, evaluation in evaluations.items():
        evaluation.table.to_csv(folder / f"{name}.csv", index=False)


def _export_of(folder: Path, is_run: bool) -> Path:
    export = folder / "export" if is_run else folder
    if not (export / "model_index.json").is_file():
        what = "has not finished: no exported model in it" if is_run else "is neither a run nor an exported pipeline"
        raise UserError(f"{folder}: {what}")
    return export


def _metrics(world: World | None, own: Sequence[str | Metric]) -> Mapping[str, Metric]:
    rows = dict(world.metrics() if world else METRICS)
    for name in own:
        metric = import_named("--metric", name) if isinstance(name, str) else name
        if not isinstance(metric, Metric) or metric.function is None:
            raise UserError(f"--metric: {name!r} should be a diffinstruct.metrics.Metric with a function of pictures")
        if find_metric(metric.name, rows):
            raise UserError(f"--metric: {metric.name!r} is there already, {name!r} needs a name of its own")
        rows[metric.name] = metric
    return rows


def _extractor(world: World | None, rewards: Mapping[str, RewardModel], device: torch.device) -> FeatureExtractor:
    if world:
        return AttributeClassifier.load(world.classifier).to(device)
    for reward in reversed(list(rewards.values())):  # held-out ones come last: better than what was trained on
        if callable(features := getattr(reward, "features", None)):
            return FeaturesOnly(features)
    raise UserError(f"--reward: none of {', '.join(rewards)} has image features to measure distances with; add 'pickscore'")


@torch.no_grad()
def _reference_features(
    config: ReferenceConfig, precision: str, extractor: FeatureExtractor, texts: list[str], seed: int, device: torch.device
) -> Array:
    use_precision(precision)
    reference = load_reference(config.model, device=device, decoder_dtype=frozen_dtype(precision))
    generator = torch.Generator().manual_seed(seed + 1)  # noise that no generator is given
    noise = torch.randn(len(texts), *reference.latent_shape, generator=generator)
    print(f"the reference makes {len(texts)} pictures in {STEPS} steps", flush=True)

    def features_of(rows: slice) -> Array:
        with autocast(precision, device):
            latents = reference.sample(texts[rows], noise[rows].to(device), STEPS, config.guidance_scale)
        return image_features(extractor, reference.decode(latents))

    with _one_line(config.model):
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
