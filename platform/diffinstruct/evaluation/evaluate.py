"""A generator's evaluation: every metric over a prompt table, each with its n, its seed and its 95 % interval.

Metrics are functions of arrays, one value a prompt; `evaluate` fills the arrays, `compare` pairs two generators on the
same prompts and noise. Which metrics there are, and with which interval, is the table in `diffinstruct.metrics`.

Shapes: n prompts, B of them in a batch, F features, m reference pictures; images are float [B, 3, H, W] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diffinstruct.evaluation.features import FeatureExtractor
from diffinstruct.method.memory import Batches
from diffinstruct.method.rewards import RewardModel, scored
from diffinstruct.metrics import ACCURACY, METRICS, REWARD, Metric, find_metric, mean_pairwise_distance
from diffinstruct.models.sampling import pictures_at_once
from diffinstruct.models.world import OpenAttribute
from diffinstruct.statistics import Array, Summary, from_replicates, paired_difference, win_rate

Sampler = Callable[[list[str], Tensor], Tensor]
"""(prompts, noise [B, ...] on the CPU) -> images [B, 3, H, W] in [0, 1], on the device of classifier and rewards."""


@dataclass(frozen=True)
class Evaluation:
    """One generator's values on a prompt table.

    `table`, one row a prompt, has the prompt's own columns and `reward/<name>`; `seen/<attribute>`, what the
    classifier sees; `accuracy/<attribute>`, 1 if that is what the prompt names, and `accuracy`, their mean over the
    row; for each open attribute of a world its own metric, 1 if the picture has the preferred value though the prompt
    leaves it open; the metrics that are functions of a picture; `diversity`. NaN means: does not apply.
    """

    table: pd.DataFrame
    features: Array
    """[n, F], of the pictures behind the rows."""
    reference: Array | None
    """[m, F], of the pictures that distances compare with; None leaves them out."""
    seed: int
    metrics: Mapping[str, Metric] = field(default_factory=lambda: METRICS)

    def summary(self) -> Summary:
        """Every metric over the prompts that it applies to; one that applies to none is left out."""
        estimates = {}
        for column, metric in self.columns().items():
            values = self.table[column].dropna().to_numpy(np.float64)
            if len(values):
                estimates[column] = metric.estimate(values, self.seed)
        for name, (value, replicates) in self.distance_replicates().items():
            estimates[name] = from_replicates(value, replicates, len(self.features), self.seed)
        return estimates

    def columns(self) -> dict[str, Metric]:
        """The columns of the table that hold metrics, in the table's order."""
        rows = {column: find_metric(column, self.metrics) for column in self.table}
        return {column: row for column, row in rows.items() if row and row.interval != "features"}

    def distances(self) -> dict[str, Metric]:
        """The metrics of all pictures together."""
        return {name: metric for name, metric in self.metrics.items() if metric.interval == "features"}

    def distance_replicates(self) -> dict[str, tuple[float, Array]]:
        """Each distance and its values on resamples; none without a reference."""
        if self.reference is None:
            return {}
        functions = {name: metric.function for name, metric in self.distances().items() if metric.function}
        return {name: function(self.features, self.reference, self.seed) for name, function in functions.items()}


def compare(a: Evaluation, b: Evaluation) -> Summary:
    """Paired differences a - b of every metric, distances too, and `wins/<reward>`.

    Raises ValueError unless both were given the same prompts, noise and reference pictures.
    """
    if a.seed != b.seed or list(a.table["prompt"]) != list(b.table["prompt"]):
        raise ValueError("paired metrics need the same prompts and the same seed on both sides")
    neither = a.reference is None and b.reference is None
    if not neither and (a.reference is None or b.reference is None or not np.array_equal(a.reference, b.reference)):
        raise ValueError("paired metrics need the same reference pictures on both sides")
    differences = {}
    for column in a.columns():
        pairs = np.array([a.table[column], b.table[column]], np.float64)
        left, right = pairs[:, ~np.isnan(pairs).any(0)]
        if len(left):
            differences[column] = paired_difference(left, right, a.seed)
            if column.startswith(REWARD):
                differences[column.replace(REWARD, "wins/")] = win_rate(left, right, a.seed)
    others = replace(b, metrics=a.metrics).distance_replicates()
    for name, (value, replicates) in a.distance_replicates().items():
        other, other_replicates = others[name]
        differences[name] = from_replicates(value - other, replicates - other_replicates, len(a.features), a.seed)
    return differences


@torch.no_grad()
def evaluate(
    sample: Sampler,
    prompts: pd.DataFrame,
    rewards: Mapping[str, RewardModel],
    extractor: FeatureExtractor,
    reference: Array | None,
    *,
    noise_shape: tuple[int, ...],
    seed: int = 0,
    batch_size: int | None = None,
    diversity_prompts: int = 64,
    diversity_noises: int = 4,
    open_attributes: Mapping[str, OpenAttribute] = {},
    metrics: Mapping[str, Metric] | None = None,
) -> Evaluation:
    """One picture for every row of `prompts`, scored; `diversity_noises` pictures for some rows, evenly spaced.

    `prompts` has a column `prompt` and may have one for each of the extractor's attributes, empty where the prompt
    leaves it open. `reference` [m, F] are `image_features` of the pictures to compare with. `metrics` are the table
    itself, if not said. The noise, of `noise_shape` a picture, depends on `seed` and the table's length only: equal for
    every generator and batch size. `batch_size` pictures are alive at once, or `pictures_at_once`, and fewer where memory
    ends: each batch is scored and dropped. Raises ValueError for an attribute's value that the extractor does not know and for
    a score that is not finite.
    """
    table, metrics = prompts.reset_index(drop=True), METRICS if metrics is None else metrics
    named = _named_attributes(table, extractor)
    texts: list[str] = table["prompt"].tolist()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(texts), *noise_shape, generator=generator)
    batches = Batches(batch_size or pictures_at_once(noise_shape))
    features, classes = _score(table, sample, noise, rewards, extractor, metrics, batches)
    _add_accuracy(table, named, classes, open_attributes)

    chosen = np.linspace(0, len(texts) - 1, min(len(texts), diversity_prompts)).round().astype(int)
    pictures = [features[chosen]]
    for _ in range(1, diversity_noises):
        others = torch.randn(len(chosen), *noise_shape, generator=generator)

        def seen(rows: slice, noise: Tensor = others) -> Array:
            return _numpy(extractor(sample([texts[i] for i in chosen[rows]], noise[rows]))[0])

        pictures += batches.map(seen, len(chosen))
    by_noise = np.concatenate(pictures).reshape(diversity_noises, len(chosen), -1)
    table.loc[chosen, "diversity"] = [mean_pairwise_distance(prompt) for prompt in by_noise.swapaxes(0, 1)]
    return Evaluation(table, features, reference, seed, metrics)


def _score(
    table: pd.DataFrame,
    sample: Sampler,
    noise: Tensor,
    rewards: Mapping[str, RewardModel],
    extractor: FeatureExtractor,
    metrics: Mapping[str, Metric],
    batches: Batches,
) -> tuple[Array, dict[str, list[str]]]:
    """Make the pictures; add their scores, and the metrics that are functions of a picture, to the table.

    Returns their features [n, F] and, by attribute, the class of each.
    """
    texts: list[str] = table["prompt"].tolist()
    functions = {name: metric.function for name, metric in metrics.items() if metric.function and metric.interval != "features"}

    def scores_of(rows: slice) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        images = sample(texts[rows], noise[rows])
        features, logits = extractor(images)
        seen = {attribute: logits[attribute].argmax(1).cpu().numpy() for attribute in extractor.classes}
        values = {f"{REWARD}{name}": _numpy(scored(name, reward, images, texts[rows], {})) for name, reward in rewards.items()}
        return _numpy(features), seen, values | {name: _numpy(function(images)) for name, function in functions.items()}

    features, seen, values = zip(*batches.map(scores_of, len(texts)), strict=True)
    for name in values[0]:
        table[name] = np.concatenate([batch[name] for batch in values])
        if not np.isfinite(table[name]).all():
            raise ValueError(f"{name}: not finite")
    classes = {
        attribute: [names[i] for i in np.concatenate([batch[attribute] for batch in seen])]
        for attribute, names in extractor.classes.items()
    }
    return np.concatenate(features), classes


def _named_attributes(table: pd.DataFrame, extractor: FeatureExtractor) -> dict[str, pd.Series]:
    """Per attribute that the table has a column for, what each prompt names; "" where it names nothing."""
    named = {attribute: table[attribute].fillna("") for attribute in extractor.classes if attribute in table}
    for attribute, values in named.items():
        if unknown := set(values) - {"", *extractor.classes[attribute]}:
            raise ValueError(f"{attribute}: the classifier does not know {', '.join(map(repr, sorted(unknown)))}")
    return named


def _add_accuracy(
    table: pd.DataFrame,
    named: Mapping[str, pd.Series],
    classes: Mapping[str, list[str]],
    open_attributes: Mapping[str, OpenAttribute],
) -> None:
    """Add what the classifier sees, whether that is what prompts name, and what they get where they name nothing."""
    for attribute, names in classes.items():
        table[f"seen/{attribute}"] = names
        if attribute in named:
            right = (table[f"seen/{attribute}"] == named[attribute]).astype(float)
            table[f"{ACCURACY}{attribute}"] = right.where(named[attribute] != "")
    if named:
        table["accuracy"] = table[[f"{ACCURACY}{attribute}" for attribute in named]].mean(axis=1)
    for attribute, preference in open_attributes.items():
        if attribute in named:
            preferred = (table[f"seen/{attribute}"] == preference.preferred).astype(float)
            table[preference.metric] = preferred.where(named[attribute] == "")


@torch.no_grad()
def image_features(extractor: FeatureExtractor, images: Tensor, batch_size: int = 256) -> Array:
    """The extractor's features [m, F] of images [m, 3, H, W] in [0, 1]."""
    return np.concatenate([_numpy(extractor(batch)[0]) for batch in images.split(batch_size)])


def _numpy(x: Tensor) -> Array:
    return x.float().cpu().numpy()
