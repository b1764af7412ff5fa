"""One-step generators side by side, on the same prompts and noise: what `diffinstruct evaluate` measures.

A generator is a run's folder or an exported pipeline. Where the reference is the pocket world, its classifier knows the
truth; elsewhere features come from the image tower of a reward that has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.prompts import read_prompts
from diffinstruct.config.reading import load_run
from diffinstruct.errors import UserError
from diffinstruct.evaluation.evaluate import Evaluation, compare, evaluate, image_features
from diffinstruct.evaluation.features import AttributeClassifier, Examiner, FeaturesOnly
from diffinstruct.method.rewards import RewardModel
from diffinstruct.models.export import load_export
from diffinstruct.models.pipeline import load_reference
from diffinstruct.models.sources import POCKET
from diffinstruct.reports.frames import markdown
from diffinstruct.reward_service.client import load_reward
from diffinstruct.statistics import Array, Summary

if TYPE_CHECKING:
    import pandas as pd


STEPS = 50
"""Of the reference's own pictures, which distances are measured to."""
BATCH = 32


def examine(
    folders: Sequence[Path], prompts: str, rewards: Sequence[str], reference_pictures: int, seed: int
) -> dict[str, Evaluation]:
    """Every figure of the generators in `folders`, by the folder's name.

    prompts: a prompt set, see `read_prompts`; columns named like the truth's attributes are checked against the
    pictures.
    rewards: names; none means those of the first run among the folders.
    reference_pictures: how many the reference makes, of the first prompts and other noise; 0 leaves distances out. The
        reference, and its guidance, are those of the first run.
    Raises UserError for what is neither run nor export, and where nothing says what to measure.
    """
    table = read_prompts(prompts)
    runs = {folder: load_run(folder) for folder in folders if (folder / "experiment.yaml").is_file()}
    exports = [_export_of(folder, runs.get(folder)) for folder in folders]
    first = next(iter(runs.values()), None)
    names = list(rewards) or ([r.name for r in first.rewards.trained] + list(first.rewards.held_out) if first else [])
    if not names:
        raise UserError(f"{folders[0]}: is no run that names rewards; name some with --reward")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judges = {name: load_reward(name, device) for name in names}
    examiner = _examiner(first, judges, device)
    own = _reference_features(first, examiner, table, reference_pictures, seed, device)
    found = {}
    for folder, name in zip(exports, _short(folders), strict=True):
        reference, generator = load_export(folder, device=device)
        print(f"measuring {name}: {len(table)} prompts", flush=True)
        try:
            found[name] = evaluate(
                reference.sampler(generator),
                table,
                judges,
                examiner,
                own,
                noise_shape=reference.latent_shape,
                seed=seed,
            )
        except ValueError as error:  # a prompt table's attributes, or a reward that is not finite
            raise UserError(f"{folder}: {error}") from None
    return found


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


def _examiner(run: Experiment | None, judges: Mapping[str, RewardModel], device: torch.device) -> Examiner:
    if run and run.reference.model == "pocket":
        return AttributeClassifier.load(POCKET / "classifier").to(device)
    for reward in reversed(list(judges.values())):  # held-out ones come last: better than what was trained on
        if callable(features := getattr(reward, "features", None)):
            return FeaturesOnly(features)
    raise UserError(
        f"--reward: none of {', '.join(judges)} has image features to measure distances with; add 'pickscore'"
    )


@torch.no_grad()
def _reference_features(
    run: Experiment | None, examiner: Examiner, table: pd.DataFrame, pictures: int, seed: int, device: torch.device
) -> Array | None:
    if run is None or pictures == 0:
        return None
    reference, texts = load_reference(run.reference.model, device=device), table["prompt"].tolist()[:pictures]
    generator = torch.Generator().manual_seed(seed + 1)  # noise that no generator is given
    noise = torch.randn(len(texts), *reference.latent_shape, generator=generator).to(device)
    print(f"the reference makes {len(texts)} pictures in {STEPS} steps", flush=True)
    made = [
        reference.decode(
            reference.sample(texts[i : i + BATCH], noise[i : i + BATCH], STEPS, run.reference.guidance_scale)
        )
        for i in range(0, len(texts), BATCH)
    ]
    return image_features(examiner, torch.cat(made))


def _short(folders: Sequence[Path]) -> list[str]:
    """The folders' names; where two are alike, with their parents'."""
    names = [folder.absolute().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    longer = ["-".join(folder.absolute().parts[-2:]) for folder in folders]
    if len(set(longer)) < len(longer):
        raise UserError("evaluate: the same folder is named twice")
    return longer
