"""The main job: see a one-step generator become preferred. `make quickstart`, or `python experiments/quickstart.py`.

Trains the pocket world's one-step generator twice, on the reward alone and with Diff-Instruct*, through Ray Train,
reward actors and MLflow, then measures both beside what they started from. Writes table.md and grid.png into its run
folder.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from diffinstruct import Experiment
    from diffinstruct.evaluation.evaluate import Evaluation

RECIPE = Path(__file__).parent / "recipes" / "pocket.yaml"
REFERENCE = "reference, 50 steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe")
    arguments = parser.parse_args()

    from diffinstruct import UserError, load, train

    try:
        recipe = load(RECIPE, arguments.set)
        folder = Path(recipe.output_dir).absolute() / f"quickstart-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        reward_only = load(RECIPE, [*arguments.set, "name=reward-only", "objective.name=reward_only"])
        trained = {
            "reward only": train(reward_only, folder / "reward-only").export,
            "DI*": train(recipe, folder / "di-star").export,
        }
    except UserError as error:
        raise SystemExit(str(error)) from None
    report(recipe, trained, folder)


def report(recipe: Experiment, trained: dict[str, Path], folder: Path) -> None:
    """Measure the starting points and the trained generators on the same prompts and noise; print, and write to
    `folder`."""
    import torch

    from diffinstruct.config.prompts import read_prompts
    from diffinstruct.evaluation.evaluate import compare
    from diffinstruct.evaluation.pocket import TITLES, evaluate_generator, reference_evaluation
    from diffinstruct.models.pipeline import load_reference
    from diffinstruct.reports.frames import markdown, table
    from diffinstruct.tracking.journal import attach

    reference = load_reference(recipe.reference.model)
    one_step = {"raw one step": "reference", "distilled start": recipe.generator.init_from}
    one_step |= {name: str(export) for name, export in trained.items()}
    prompts = read_prompts("pocket:grid")["prompt"].tolist()
    noise = torch.randn(len(prompts), *reference.latent_shape, generator=torch.Generator().manual_seed(0))
    evaluations: dict[str, Evaluation] = {}
    pictures: dict[str, Tensor] = {}
    for name, start in one_step.items():
        generator = reference.generator(recipe.generator.timestep, start, recipe.generator.input_scale)
        sample = reference.sampler(generator)
        print(f"measuring {name}", flush=True)
        evaluations[name], pictures[name] = evaluate_generator(sample), sample(prompts, noise)
        if name == "distilled start":  # the reference's figures are stored, its pictures are drawn
            evaluations[REFERENCE] = reference_evaluation()
            pictures[REFERENCE] = reference.decode(reference.sample(prompts, noise, 50, recipe.reference.guidance_scale))

    shown = {key: name for key, name in TITLES.items() if key != "accuracy"}  # its parts say more
    summaries = {n: {shown[k]: v for k, v in e.summary().items() if k in shown} for n, e in evaluations.items()}
    print(table(summaries).T.to_string())
    lines = [markdown(summaries)]
    for other in ("distilled start", REFERENCE):
        difference = compare(evaluations["DI*"], evaluations[other])
        judge, right = difference["reward/pocket_judge"], difference["accuracy"]
        wins = difference["wins/pocket_judge"]
        lines.append(
            f"DI* minus {other}, paired over {judge.n} prompts: held-out preference {judge}, wins {wins}, "
            f"attributes right {right}"
        )
        print(lines[-1])
    (folder / "table.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    draw(prompts, pictures, folder / "grid.png")
    attach(folder / "di-star", folder / "table.md", folder / "grid.png")
    print(f"table {folder / 'table.md'}  pictures {folder / 'grid.png'}")


def draw(prompts: list[str], pictures: dict[str, Tensor], path: Path) -> None:
    """A row for each prompt, a column for each generator, the same noise in a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(prompts), len(pictures), figsize=(1.5 * len(pictures) + 2.4, 1.35 * len(prompts)))
    for column, (name, images) in enumerate(pictures.items()):
        axes[0, column].set_title(name, fontsize=9)
        for row, image in enumerate(images):
            axes[row, column].imshow(image.permute(1, 2, 0).numpy())
            axes[row, column].set(xticks=[], yticks=[])
    for row, prompt in enumerate(prompts):
        axes[row, 0].set_ylabel("\n".join(wrap(prompt, 24)), rotation=0, ha="right", va="center", fontsize=7)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
