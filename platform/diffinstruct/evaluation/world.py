"""Evaluation in a world with ground truth, as its `world.json` describes it; every generator gets the same noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from diffinstruct.config.prompts import read_prompts
from diffinstruct.errors import UserError
from diffinstruct.evaluation.evaluate import Evaluation, Sampler, evaluate
from diffinstruct.evaluation.features import AttributeClassifier
from diffinstruct.models.pipeline import load_reference
from diffinstruct.models.world import World
from diffinstruct.reward_service.client import load_reward
from diffinstruct.statistics import Array


def world_prompts(world: World, splits: Sequence[str] = ()) -> pd.DataFrame:
    """The world's prompts of these splits, one after another; of all evaluation splits, if none is named."""
    table, splits = read_prompts(world.prompts), splits or world.evaluation_splits
    if not splits:
        return table
    if "split" not in table:
        raise UserError(f"{world.prompts}: no column 'split', which evaluation_splits in world.json takes")
    parts = [table[table["split"] == split] for split in splits]
    if empty := [split for split, part in zip(splits, parts, strict=True) if part.empty]:
        raise UserError(f"{world.prompts}: no prompts of split {empty[0]!r}")
    return pd.concat(parts, ignore_index=True)


def evaluate_in(world: World, sample: Sampler, reference_features: Array | None = None, every: int = 1) -> Evaluation:
    """Every metric of one generator. `reference_features` [m, F] replace the stored ones, where those are made anew.
    `every`: on every n-th prompt only, to see that it works."""
    if reference_features is None and world.evaluation:
        reference_features = stored_evaluation(world).reference
    return evaluate(
        sample,
        world_prompts(world).iloc[::every].reset_index(drop=True),
        {name: load_reward(name) for name in world.rewards},
        AttributeClassifier.load(world.classifier),
        reference_features,
        noise_shape=load_reference(str(world.pipeline)).latent_shape,
        seed=world.seed,
        open_attributes=world.open_attributes,
        metrics=world.metrics(),
    )


def stored_evaluation(world: World) -> Evaluation:
    """The reference's evaluation as the world's folder keeps it. Raises UserError for a world that keeps none."""
    if world.evaluation is None:
        raise UserError(f"{world.folder}: keeps no evaluation of its reference")
    stored = load_file(world.evaluation / "features.safetensors")
    arrays = {name: array.astype("float32") for name, array in stored.items()}
    table = pd.read_csv(world.evaluation / "table.csv", keep_default_na=False, na_values=["nan"])
    return Evaluation(table, arrays["features"], arrays["reference"], world.seed, world.metrics())


def store_evaluation(world: World, evaluation: Evaluation) -> None:
    """Write what `stored_evaluation` reads."""
    assert world.evaluation is not None
    world.evaluation.mkdir(parents=True, exist_ok=True)
    evaluation.table.to_csv(world.evaluation / "table.csv", index=False, na_rep="nan")
    arrays = {"features": evaluation.features, "reference": evaluation.reference}
    kept = {key: np.ascontiguousarray(value, np.float16) for key, value in arrays.items()}
    save_file(kept, world.evaluation / "features.safetensors")
