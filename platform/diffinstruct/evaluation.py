"""What a generator is worth: its figures over a prompt table, each with its n, its seed and its 95 % interval.

Figures are functions of arrays, one value a prompt; `evaluate` fills the arrays, `compare` pairs two generators on the
same prompts and noise. Shares have Wilson's interval, everything else a bootstrap over prompts.

Shapes: n prompts, B of them in a batch, F features, m reference pictures; images are float [B, 3, H, W] in [0, 1].
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[Any]
Sampler = Callable[[list[str], Tensor], Tensor]
"""(prompts, noise [B, ...] on the CPU) -> images [B, 3, H, W] in [0, 1], on the device of classifier and rewards."""


class Examiner(Protocol):
    """What looks at pictures: `features` to measure distances between them, and which attributes it can tell."""

    @property
    def classes(self) -> dict[str, list[str]]:
        """Attribute -> its class names, in the order of the logits; empty where there is no ground truth."""

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [B, 3, H, W] -> features [B, F] and, per attribute, logits [B, number of its classes]."""


@dataclass(frozen=True)
class FeaturesOnly:
    """An examiner without ground truth: the image tower of a reward, say."""

    features: Callable[[Tensor], Tensor]
    classes: dict[str, list[str]] = field(default_factory=dict)

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.features(images), {}


RESAMPLES = 2000
Z = 1.959963984540054
"""The standard normal's 97.5 % point."""


def _block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(8, channels_out), nn.SiLU())


class AttributeClassifier(nn.Module):
    """The ground truth of the pocket world: which attributes a 64 px picture shows.

    `classes` maps an attribute to its class names, in the order of the logits. The features keep the position of what
    they saw (no pooling): the artwork is at fixed places.
    """

    def __init__(self, classes: dict[str, list[str]]) -> None:
        super().__init__()
        self.classes = classes
        self.trunk = nn.Sequential(_block(3, 32), _block(32, 64, 2), _block(64, 96, 2), _block(96, 128, 2), _block(128, 128))
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(128 * 8 * 8, 256), nn.SiLU())
        self.heads = nn.ModuleDict({attribute: nn.Linear(256, len(names)) for attribute, names in classes.items()})

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [B, 3, 64, 64] -> features [B, 256] and, per attribute, logits [B, number of its classes]."""
        features = self.features(self.trunk(images))
        return features, {attribute: head(features) for attribute, head in self.heads.items()}

    def save(self, folder: Path | str) -> None:
        """Write `model.safetensors` and `config.json`."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(folder, "model.safetensors"))
        Path(folder, "config.json").write_text(json.dumps({"classes": self.classes}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read what `save` wrote: frozen, in evaluation mode, on the CPU."""
        from safetensors.torch import load_file

        classifier = cls(json.loads(Path(folder, "config.json").read_text())["classes"])
        classifier.load_state_dict(load_file(Path(folder, "model.safetensors")))
        return classifier.eval().requires_grad_(False)


@dataclass(frozen=True)
class Figure:
    """A measured value and its 95 % interval; `n` prompts (or pairs), `seed` of noise and resamples."""

    value: float
    low: float
    high: float
    n: int
    seed: int | None = None

    def __str__(self) -> str:
        """`value [low, high]`, with two significant digits of the interval's width; "?" where n is too small for one."""
        width = self.high - self.low
        if not math.isfinite(width):
            return f"{self.value:.3f} [?]"
        digits = min(9, max(0, 1 - math.floor(math.log10(width)))) if width > 0 else 3
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


Summary = dict[str, Figure]


# ------------------------------------------------------------------------------------------ figures of arrays
def wilson(successes: float, n: int, seed: int | None = None) -> Figure:
    """A share and its score interval (Wilson 1927), which stays inside [0, 1] and is honest at 0 of n and n of n."""
    share, spread = successes / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return Figure(share, max(0.0, middle - half), min(1.0, middle + half), n, seed)


def resamples(n: int, seed: int) -> Array:
    """How often each of n prompts is drawn in each bootstrap resample: [RESAMPLES, n], every row sums to n.

    The same seed gives the same resamples: differences between two models evaluated on the same prompts stay paired.
    """
    drawn = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    in_row = drawn + n * np.arange(RESAMPLES)[:, None]  # each resample counts in bins of its own
    return np.bincount(in_row.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n).astype(np.float64)


def bootstrap_mean(values: ArrayLike, seed: int) -> Figure:
    """The mean of `values` [n], one a prompt, with the percentile bootstrap's interval. Raises on NaN and infinity."""
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} of {len(values)} values are not finite")
    if len(values) == 1:
        return Figure(float(values[0]), -math.inf, math.inf, 1, seed)
    return _figure(values.mean(), resamples(len(values), seed) @ values / len(values), len(values), seed)


def paired_difference(a: ArrayLike, b: ArrayLike, seed: int) -> Figure:
    """The mean of a - b over prompts, both models given the same prompts and noise."""
    return bootstrap_mean(np.asarray(a, np.float64) - np.asarray(b, np.float64), seed)


def win_rate(a: ArrayLike, b: ArrayLike, seed: int | None = None) -> Figure:
    """The share of prompts on which a is above b; a tie is half a win."""
    a, b = np.asarray(a), np.asarray(b)
    return wilson(float((a > b).sum() + 0.5 * (a == b).sum()), len(a), seed)


def kid(features: Array, reference: Array, seed: int) -> Figure:
    """Kernel distance between `features` [n, F] and `reference` [m, F] (Binkowski et al. 2018, arXiv 1801.01401).

    The unbiased squared MMD under the kernel (x.y / F + 1)^3, 0 in the mean if both have one law. Over all pairs rather
    than over random subsets, whose spread is no interval: prompts and reference pictures are resampled instead, and
    a picture is never paired with its own copy, which keeps every resample unbiased.
    """
    value, replicates = _kid_resamples(features, reference, seed)
    return _figure(value, replicates, len(features), seed)


def _kid_resamples(features: Array, reference: Array, seed: int) -> tuple[float, Array]:
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    x_weights = np.vstack([np.ones(len(x)), resamples(len(x), seed)])  # the first row is the sample itself
    y_weights = np.vstack([np.ones(len(y)), resamples(len(y), seed + 1)])
    between = ((x_weights @ _kernel(x, y)) * y_weights).sum(1) / (len(x) * len(y))
    distances = _mean_over_pairs(x, x_weights) + _mean_over_pairs(y, y_weights) - 2 * between
    return float(distances[0]), distances[1:]


def _kernel(x: Array, y: Array) -> Array:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_over_pairs(x: Array, weights: Array) -> Array:
    """For each row of weights [R, n], the mean of kernel(x_i, x_j) over pairs of different originals i, j."""
    kernel = _kernel(x, x)
    np.fill_diagonal(kernel, 0)
    return ((weights @ kernel) * weights).sum(1) / (len(x) ** 2 - (weights**2).sum(1))


def spread(features: Array) -> float:
    """Diversity of pictures of one prompt: the mean distance between two of `features` [K, F]."""
    k = len(features)
    return float(np.linalg.norm(features[:, None] - features[None], axis=-1).sum() / (k * (k - 1)))


def _figure(value: float, replicates: Array, n: int, seed: int) -> Figure:
    low, high = np.quantile(replicates, [0.025, 0.975])
    return Figure(float(value), float(low), float(high), n, seed)


# ------------------------------------------------------------------------------------------ figures of a generator
@dataclass(frozen=True)
class Evaluation:
    """What one generator did on a prompt table.

    `table`, one row a prompt, has the prompt's own columns and `reward/<name>`; `seen/<attribute>`, what the
    classifier sees; `accuracy/<attribute>`, 1 if that is what the prompt names, and `accuracy`, their mean over the
    row; `smiling`, 1 if the face smiles though the prompt leaves it open; `diversity`. NaN means: does not apply.
    """

    table: pd.DataFrame
    features: Array
    """[n, F], of the pictures behind the rows."""
    reference: Array | None
    """[m, F], of the pictures that KID compares with; None leaves it out."""
    seed: int

    def summary(self) -> Summary:
        """Every figure over the prompts that it applies to; one that applies to none is left out."""
        figures = {}
        for column in self.measures():
            values = self.table[column].dropna().to_numpy(np.float64)
            if len(values):
                is_share = column == "smiling" or column.startswith("accuracy/")
                figures[column] = (
                    wilson(values.sum(), len(values), self.seed) if is_share else bootstrap_mean(values, self.seed)
                )
        return figures if self.reference is None else figures | {"kid": kid(self.features, self.reference, self.seed)}

    def measures(self) -> list[str]:
        """The columns of the table that are figures."""
        return [
            column
            for column in self.table
            if column in ("accuracy", "smiling", "diversity") or column.startswith(("reward/", "accuracy/"))
        ]


def compare(a: Evaluation, b: Evaluation) -> Summary:
    """Paired differences a - b of every measure, KID's too, and `wins/<reward>`.

    Raises ValueError unless both were given the same prompts, noise and reference pictures.
    """
    if a.seed != b.seed or list(a.table["prompt"]) != list(b.table["prompt"]):
        raise ValueError("paired figures need the same prompts and the same seed on both sides")
    neither = a.reference is None and b.reference is None
    if not neither and (a.reference is None or b.reference is None or not np.array_equal(a.reference, b.reference)):
        raise ValueError("paired figures need the same reference pictures on both sides")
    figures = {}
    for column in a.measures():
        pairs = np.array([a.table[column], b.table[column]], np.float64)
        left, right = pairs[:, ~np.isnan(pairs).any(0)]
        if len(left):
            figures[column] = paired_difference(left, right, a.seed)
            if column.startswith("reward/"):
                figures[column.replace("reward/", "wins/")] = win_rate(left, right, a.seed)
    if a.reference is None or b.reference is None:
        return figures
    value_a, replicates_a = _kid_resamples(a.features, a.reference, a.seed)
    value_b, replicates_b = _kid_resamples(b.features, b.reference, b.seed)
    return figures | {"kid": _figure(value_a - value_b, replicates_a - replicates_b, len(a.features), a.seed)}


@torch.no_grad()
def evaluate(
    sample: Sampler,
    prompts: pd.DataFrame,
    rewards: Mapping[str, Callable[[Tensor, list[str]], Tensor]],
    examiner: Examiner,
    reference: Array | None,
    *,
    noise_shape: tuple[int, ...],
    seed: int = 0,
    batch_size: int = 32,
    diversity_prompts: int = 64,
    diversity_noises: int = 4,
) -> Evaluation:
    """One picture for every row of `prompts`, scored; `diversity_noises` pictures for some rows, spread over the table.

    `prompts` has a column `prompt` and may have one for each of the examiner's attributes, empty where the prompt
    leaves it open. `reference` [m, F] are `image_features` of the pictures to compare with. The noise, of
    `noise_shape` a picture, depends on `seed` and the table's length only: equal for every generator and batch size.
    Raises ValueError for an attribute's value that the examiner does not know and for a score that is not finite.
    """
    table = prompts.reset_index(drop=True)
    named = _named_attributes(table, examiner)
    texts: list[str] = table["prompt"].tolist()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(texts), *noise_shape, generator=generator)

    features: list[Array] = []
    seen: dict[str, list[str]] = {attribute: [] for attribute in examiner.classes}
    scores: dict[str, list[Array]] = {name: [] for name in rewards}
    for rows in _batches(len(texts), batch_size):
        images = sample(texts[rows], noise[rows])
        batch_features, logits = examiner(images)
        features.append(_numpy(batch_features))
        for attribute, names in examiner.classes.items():
            seen[attribute] += [names[i] for i in logits[attribute].argmax(1).tolist()]
        for name, reward in rewards.items():
            scores[name].append(_numpy(reward(images, texts[rows])))

    for name, batches in scores.items():
        table[f"reward/{name}"] = np.concatenate(batches)
        if not np.isfinite(table[f"reward/{name}"]).all():
            raise ValueError(f"reward {name!r}: a score is not finite")
    for attribute, names in seen.items():
        table[f"seen/{attribute}"] = names
        if attribute in named:
            right = (table[f"seen/{attribute}"] == named[attribute]).astype(float)
            table[f"accuracy/{attribute}"] = right.where(named[attribute] != "")
    if named:
        table["accuracy"] = table[[f"accuracy/{attribute}" for attribute in named]].mean(axis=1)
    if "mouth" in named:
        table["smiling"] = (table["seen/mouth"] == "smiling").astype(float).where(named["mouth"] == "")

    first = np.concatenate(features)
    chosen = np.linspace(0, len(texts) - 1, min(len(texts), diversity_prompts)).round().astype(int)
    pictures = [first[chosen]]
    for _ in range(1, diversity_noises):
        noise = torch.randn(len(chosen), *noise_shape, generator=generator)
        for rows in _batches(len(chosen), batch_size):
            images = sample([texts[i] for i in chosen[rows]], noise[rows])
            pictures.append(_numpy(examiner(images)[0]))
    by_noise = np.concatenate(pictures).reshape(diversity_noises, len(chosen), -1)
    table.loc[chosen, "diversity"] = [spread(of_prompt) for of_prompt in by_noise.swapaxes(0, 1)]
    return Evaluation(table, first, reference, seed)


def _named_attributes(table: pd.DataFrame, examiner: Examiner) -> dict[str, pd.Series]:
    """Per attribute that the table has a column for, what each prompt names; "" where it names nothing."""
    named = {attribute: table[attribute].fillna("") for attribute in examiner.classes if attribute in table}
    for attribute, values in named.items():
        if unknown := set(values) - {"", *examiner.classes[attribute]}:
            raise ValueError(f"{attribute}: the examiner does not know {', '.join(map(repr, sorted(unknown)))}")
    return named


@torch.no_grad()
def image_features(examiner: Examiner, images: Tensor, batch_size: int = 256) -> Array:
    """The examiner's features [m, F] of images [m, 3, H, W] in [0, 1]."""
    return np.concatenate([_numpy(examiner(batch)[0]) for batch in images.split(batch_size)])


def _batches(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _numpy(x: Tensor) -> Array:
    return x.float().cpu().numpy()


# ------------------------------------------------------------------------------------------ tables
def table(rows: dict[str, Summary]) -> pd.DataFrame:
    """One row a generator, one column a measure, cells `value [low, high]`; empty where a row lacks the measure."""
    import pandas as pd

    return pd.DataFrame({name: {m: str(f) for m, f in row.items()} for name, row in rows.items()}).T.fillna("")


def markdown(rows: dict[str, Summary], over: str = "prompts") -> str:
    """`table` as Markdown; the head names each column's n, the last line what the intervals are over, and the seed."""
    cells = table(rows)
    lines = [["", *cells.columns], ["---", *["--:"] * len(cells.columns)]]
    lines += [[name, *cells.loc[name]] for name in cells.index]
    counts = {m: sorted({row[m].n for row in rows.values() if m in row}) for m in cells.columns}
    lines.insert(2, ["n", *[" or ".join(map(str, counts[m])) for m in cells.columns]])
    seeds = sorted({str(f.seed) for row in rows.values() for f in row.values() if f.seed is not None})
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    seed = f"; seed {', '.join(seeds)}" if seeds else ""
    return f"{text}\n\nIn brackets: 95 % intervals over {over}{seed}.\n"
