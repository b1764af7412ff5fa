"""Commands that read finished runs: figures, reports, exported models, pictures."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from diffinstruct.cli import arguments
from diffinstruct.errors import UserError
from diffinstruct.evaluation import REFERENCE_PICTURES, SEED


def evaluate(
    folders: Annotated[list[Path], Argument(metavar="RUN_OR_FOLDER", help="a finished run, or an exported pipeline")],
    prompts: Annotated[
        str, Option("--prompts", metavar="FILE", help="a .csv with a column `prompt`, a .txt, or pocket:eval, pocket:open")
    ],
    rewards: arguments.RewardNames,
    metrics: arguments.MetricNames,
    reference_pictures: arguments.ReferencePictures = REFERENCE_PICTURES,
    seed: arguments.EvaluationSeed = SEED,
    out: Annotated[
        Path | None, Option("-o", metavar="FOLDER", help="for table.md and one .csv a generator, with a row a prompt")
    ] = None,
) -> None:
    """Measure generators side by side, on the same prompts and noise."""
    arguments.check_reference_pictures(reference_pictures)
    from diffinstruct.evaluation.generators import evaluate_generators, report, save

    evaluations = evaluate_generators(folders, prompts, rewards, reference_pictures, seed, metrics)
    print(report(evaluations))
    if out:
        save(evaluations, out)
        print(out / "table.md")


def compare(
    runs: Annotated[
        tuple[Path, Path], Argument(metavar="RUN RUN", help="two finished runs; differences are second minus first")
    ],
    rewards: arguments.RewardNames,
    metrics: arguments.MetricNames,
    prompts: Annotated[
        str | None, Option("--prompts", metavar="FILE", help="as for `evaluate`; default in the pocket world: pocket:eval")
    ] = None,
    reference_pictures: arguments.ReferencePictures = REFERENCE_PICTURES,
    seed: arguments.EvaluationSeed = SEED,
    out: Annotated[Path | None, Option("-o", metavar="OUT", help="a page (.html), or a folder for tables and pictures")] = None,
) -> None:
    """Compare two runs: keys that differ, paired figures."""
    arguments.check_reference_pictures(reference_pictures)
    if out and out.suffix:
        arguments.check_output(out, ".html")
    folders = [arguments.existing_run(folder) for folder in runs]
    from diffinstruct.evaluation.comparison import compare_runs

    comparison = compare_runs(folders, prompts, rewards, reference_pictures, seed, metrics)
    print(comparison.text())
    if out:
        comparison.save(out)
        print(out)


def report(
    path: Annotated[Path, Argument(metavar="RUN_OR_SWEEP", help="a run's folder, a sweep's, or a .csv of kept rows")],
    out: Annotated[Path, Option("-o", metavar="out.html", help="the file to write")],
) -> None:
    """Write a run or a sweep as one HTML file."""
    arguments.check_output(out, ".html")
    from diffinstruct.reports.page import write

    write(path, out)
    print(out)


def export(
    run: arguments.Run,
    out: Annotated[Path, Option("-o", metavar="FOLDER", help="the pipeline's folder to write")],
    step: Annotated[
        str, Option("--step", help="a number, last, or best: the largest gain in held-out rewards without a symptom of hacking")
    ] = "last",
) -> None:
    """Write a checkpoint's generator as a stock pipeline.

    The weights are the generator's EMA. The run need not have finished.
    """
    from diffinstruct.config.reading import load_run

    folder = arguments.existing_run(run)
    if os.path.lexists(out):
        raise UserError(f"-o: {str(out)!r} is there already")
    arguments.check_parent(out)
    experiment = load_run(folder)
    from diffinstruct.run_folder.checkpoint import CheckpointError, full_disk_as_error
    from diffinstruct.training.resume import export_checkpoint

    try:
        with full_disk_as_error(out.absolute().parent):
            exported, best = export_checkpoint(experiment, folder, step, out)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        raise UserError(f"-o: {str(out)!r}: {error.strerror or error}") from None
    print(f"{out}  step {exported}{', the best' * best}")


def generate(
    run: Annotated[Path, Argument(metavar="RUN_OR_FOLDER", help="a finished run, or an exported pipeline")],
    prompt: Annotated[str, Argument(metavar="PROMPT")],
    out: Annotated[Path, Option("-o", metavar="out.png", help="the picture to write")],
    seed: Annotated[int, Option("--seed", help="seed of the first picture; the next has the next one")] = 0,
    n: Annotated[int, Option("--n", help="how many pictures, side by side")] = 1,
) -> None:
    """Make pictures with a trained generator, in one step."""
    model = run
    if not (model / "model_index.json").is_file():
        model = arguments.existing_run(run) / "export"
        if not model.is_dir():
            raise UserError(f"{model.parent}: no exported model in it, the run has not finished")
    if n < 1:
        raise UserError(f"--n: should be at least 1, got {n}")
    if not 0 <= seed <= 2**63 - n:
        raise UserError(f"--seed: should be between 0 and 2**63, got {seed}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"prompt: not UTF-8 text: {prompt!r}") from None
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"-o: should be a .png, .jpg or .webp file, got {str(out)!r}")
    import numpy as np
    from PIL import Image

    from diffinstruct.models.export import generate

    pictures = generate(model, [prompt] * n, seed)
    try:
        Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures], axis=1)).save(out)
    except (OSError, ValueError) as error:  # some formats end at some width
        raise UserError(f"{out}: {getattr(error, 'strerror', None) or error}") from None
    print(out)
