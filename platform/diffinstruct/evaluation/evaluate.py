"""What a generator is worth: its figures over a prompt table, each with its n, its seed and its 95 % interval.

Figures are functions of arrays, one value a prompt; `evaluate` fills the arrays, `compare` pairs two generators on the
same prompts and noise. Shares have Wilson's interval, everything else a bootstrap over prompts.

Shapes: n prompts, B of them in a batch, F features, m reference pictures; images are float [B, 3, H, W] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd
from diffinstruct.evaluation.features import Examiner
from diffinstruct.evaluation.metrics import kid, kid_replicates, mean_pairwise_distance
from diffinstruct.statistics import Array, Summary, bootstrap_mean, from_replicates, paired_difference, wilson, win_rate

Sampler = Callable[[list[str], Tensor], Tensor]
"""(prompts, noise [B, ...] on the CPU) -> images [B, 3, H, W] in [0, 1], on the device of classifier and rewards."""


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
    value_a, replicates_a = kid_replicates(a.features, a.reference, a.seed)
    value_b, replicates_b = kid_replicates(b.features, b.reference, b.seed)
    return figures | {"kid": from_replicates(value_a - value_b, replicates_a - replicates_b, len(a.features), a.seed)}


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
    table.loc[chosen, "diversity"] = [mean_pairwise_distance(of_prompt) for of_prompt in by_noise.swapaxes(0, 1)]
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
