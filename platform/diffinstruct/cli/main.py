"""The command line, a thin face: read the configuration, call one function, say in one line what the user can mend.

Heavy packages are imported inside the commands: `--help` and a mistake in the configuration answer at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffinstruct.config.experiment import Experiment


PATIENCE = 5.0
"""Seconds in which a process that was killed on another machine is gone from its run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, or 2 where the user has to mend something (said on stderr). A run that
    breaks off and a reward that fails or is refused end with 1."""
    arguments = parser().parse_args(argv)
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # where a reward of one's own may lie; `python -m diffinstruct` has it there already
    from diffinstruct.errors import UserError
    from diffinstruct.run_folder.locks import FULL

    try:
        arguments.command(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        theirs = error.errno in (errno.ENAMETOOLONG, errno.EACCES) and error.filename
        if error.errno not in FULL and not theirs:
            raise
        print(f"{error.filename or arguments.command.__name__}: {error.strerror}", file=sys.stderr)
        return 2 if theirs else 1
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="diffinstruct",
        description="Diff-Instruct*: one-step text-to-image generators aligned with human preference.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: object, help: str, group: Any = commands) -> argparse.ArgumentParser:
        sub = group.add_parser(name, help=help, description=help)
        sub.set_defaults(command=function)
        return sub

    def takes_experiment(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("file", type=Path, metavar="FILE", help="an experiment in YAML, see experiments/recipes")
        sub.add_argument(
            "-s",
            dest="overrides",
            action="append",
            default=[],
            metavar="key=value",
            help="change one key, e.g. -s steps=10",
        )

    def measures(sub: argparse.ArgumentParser) -> None:
        help = "may be repeated; default: the run's own"
        sub.add_argument("--reward", dest="rewards", action="append", default=[], metavar="NAME", help=help)
        help = "that distances are measured to; 0: none (default 256)"
        sub.add_argument("--reference-pictures", type=int, default=256, metavar="N", help=help)
        sub.add_argument(
            "--seed", type=int, default=2_000_000, help="of the noise (default 2000000, far from training's)"
        )

    sub = command("train", train, "train a generator on Ray")
    takes_experiment(sub)
    sub.add_argument("--local", action="store_true", help="in this process, without Ray")
    sub.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    sub.add_argument(
        "--allow", action="append", default=[], metavar="KEY",
        help="with --resume: go on though this key has changed; may be repeated",
    )  # fmt: skip

    sub = command("sync", sync, "send MLflow, and its mirror, what a run or the runs of a sweep could not")
    sub.add_argument("path", type=Path, metavar="RUN_OR_SWEEP", help="a run's folder, or a sweep's")
    sub.add_argument(
        "--uri", help="of the tracking server, where it is not the one of the run, or its journal alone names it"
    )

    sub = command("check", check, "say what a run takes, and whether it fits this machine, without starting it")
    takes_experiment(sub)

    sub = command("rayjob", rayjob, "print a run as a manifest for KubeRay, for `kubectl apply -f -`")
    takes_experiment(sub)
    sub.add_argument("--image", required=True, help="a container image with this project and its Ray in it")
    sub.add_argument(
        "--claim", default="diffinstruct-runs", help="the PersistentVolumeClaim of the runs (default diffinstruct-runs)"
    )
    sub.add_argument("--resume", metavar="RUN", help="go on with the run in this folder of the claim")

    sub = command("evaluate", evaluate, "measure generators side by side, on the same prompts and noise")
    sub.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN_OR_FOLDER", help="a finished run, or an exported pipeline"
    )
    sub.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="a .csv with a column `prompt`, a .txt, or pocket:eval, pocket:open",
    )
    measures(sub)
    sub.add_argument(
        "-o", dest="out", type=Path, metavar="FOLDER", help="for table.md and a .csv a generator, a row a prompt"
    )

    sub = command("compare", compare, "two runs: what differs between them, and what comes of it")
    sub.add_argument(
        "runs", nargs=2, type=Path, metavar="RUN", help="a finished run; differences are second minus first"
    )
    sub.add_argument("--prompts", metavar="FILE", help="as for `evaluate`; in the pocket world pocket:eval without")
    measures(sub)
    sub.add_argument(
        "-o", dest="out", type=Path, metavar="OUT", help="a page (.html), or a folder for tables and pictures"
    )

    sub = command("report", report, "a run or a sweep as one HTML file")
    sub.add_argument(
        "path", type=Path, metavar="RUN_OR_SWEEP", help="a run's folder, a sweep's, or a .csv of kept rows"
    )
    sub.add_argument("-o", dest="out", type=Path, required=True, metavar="out.html", help="the file to write")

    sub = command(
        "export", export, "write a checkpoint's averaged generator as a stock pipeline, also of an unfinished run"
    )
    sub.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    help = "a number, last, or best: the most gain in held-out rewards, without a symptom of hacking (default last)"
    sub.add_argument("--step", default="last", help=help)
    sub.add_argument(
        "-o", dest="out", type=Path, required=True, metavar="FOLDER", help="the pipeline's folder to write"
    )

    sub = command("generate", generate, "make pictures with a trained generator, in one step")
    sub.add_argument("run", type=Path, metavar="RUN_OR_FOLDER", help="a finished run, or an exported pipeline")
    sub.add_argument("prompt")
    sub.add_argument("-o", dest="out", type=Path, required=True, metavar="out.png", help="the picture to write")
    sub.add_argument("--seed", type=int, default=0, help="of the first picture; the next has the next one (default 0)")
    sub.add_argument("--n", type=int, default=1, help="how many, side by side (default 1)")

    help = "what rewards there are, whether one can be trusted, and what they say of pictures"
    rewards = commands.add_parser("rewards", help=help, description=help).add_subparsers(
        required=True, metavar="COMMAND"
    )
    command(
        "list",
        list_rewards,
        "the built-in rewards: what they measure, their scores, papers, weights, licences",
        rewards,
    )

    sub = command("test", test_reward, "the handshake that every run begins with, check by check", rewards)
    sub.add_argument("reward", metavar="NAME", help="a built-in reward, or your own as module:callable")
    sub.add_argument(
        "--images", type=Path, metavar="FOLDER", help="of pictures; default: made by the pocket world's generator"
    )
    sub.add_argument("--prompts", metavar="FILE", help="as for `rewards score`; default: the pocket world's")
    sub.add_argument("--held-out", action="store_true", help="to judge only, not to train on: it needs no gradient")

    help = (
        "score a folder of pictures, each with its prompt; whether a reward can be trusted is what `rewards test` tells"
    )
    sub = command("score", score_pictures, help, rewards)
    sub.add_argument("images", type=Path, metavar="IMAGES", help="a folder of .png, .jpg or .webp")
    sub.add_argument(
        "prompts",
        metavar="PROMPTS",
        help="a .txt or .csv, a prompt a picture in the order of names; or a .csv that names them",
    )
    sub.add_argument("--reward", dest="rewards", action="append", default=[], metavar="NAME", help="may be repeated")
    sub.add_argument("-o", dest="out", type=Path, metavar="scores.csv", help="a row a picture, a column a reward")
    return top


def train(arguments: argparse.Namespace) -> None:
    from diffinstruct.errors import UserError
    from diffinstruct.run_folder.locks import COMMAND, only_writer

    experiment = _experiment(arguments)
    folder = run_folder(experiment) if arguments.resume is None else _existing_run(arguments.resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: cannot make {folder}: {error.strerror}") from None
    if arguments.allow and not arguments.resume:
        raise UserError("--allow: goes with --resume RUN")
    with only_writer(folder, PATIENCE, COMMAND):  # from here on: another command would take this one's orders back
        with only_writer(folder, PATIENCE):  # what a command has started may outlive it
            if (folder / "experiment.yaml").is_file():
                _same_as_before(experiment, folder, arguments.allow)
        _train(experiment, folder, arguments.local)


def _train(experiment: Experiment, folder: Path, local: bool) -> None:
    if local:
        from diffinstruct.training.local import run
    else:
        from diffinstruct.cluster.train import run
    from diffinstruct.method.nonfinite import NonFinite
    from diffinstruct.method.rewards import RewardError
    from diffinstruct.run_folder.checkpoint import CheckpointError
    from diffinstruct.run_folder.locks import COMMAND, LOCK, Busy, only_writer
    from diffinstruct.run_folder.signals import EXIT_PAUSED, Paused

    file = folder / "experiment.yaml"
    go_on = f"diffinstruct train {shlex.quote(str(file))} --resume {shlex.quote(str(folder))}{' --local' * local}"
    try:
        run(experiment, folder)
    except (RewardError, NonFinite, CheckpointError, Paused, KeyboardInterrupt) as error:
        print(error if str(error) else "\ninterrupted", file=sys.stderr)
        if any((folder / "checkpoints").glob("step-*")):
            print(f"from its last checkpoint the run goes on with: {go_on}", file=sys.stderr)
        status = {KeyboardInterrupt: 130, Paused: EXIT_PAUSED}.get(type(error), 1)
        raise SystemExit(status) from None
    finally:
        with suppress(OSError, Busy):  # if nothing has begun in it
            if {path.name for path in folder.iterdir()} <= {LOCK, COMMAND}:
                with only_writer(folder):
                    shutil.rmtree(folder)


def sync(arguments: argparse.Namespace) -> None:
    from diffinstruct.config.addresses import one_line
    from diffinstruct.config.reading import load_run
    from diffinstruct.errors import UserError
    from diffinstruct.run_folder.locks import Busy, only_writer
    from diffinstruct.tracking.journal import deliver, undelivered

    folders = [
        path.parent for path in sorted([*arguments.path.glob("journal.jsonl"), *arguments.path.glob("*/journal.jsonl")])
    ]
    if not folders:
        _existing_run(arguments.path)
    failed = 0
    for folder in folders:
        try:
            left = undelivered(folder)
            deliver(folder, arguments.uri)
        except UserError as error:
            print(error, file=sys.stderr)
            failed = 2
            continue  # nor does its mirror get what may be somebody else's
        except Exception as error:  # whatever MLflow and what lies between raise
            print(f"{folder}: {one_line(error)}", file=sys.stderr)
            failed = failed or 1
        else:
            print(f"{folder}: {left} bytes of the journal delivered" if left else f"{folder}: all of it is there")
        try:
            if (folder / "experiment.yaml").is_file() and (url := load_run(folder).mirror):
                from diffinstruct.run_folder.mirror import Mirror

                with only_writer(folder):
                    Mirror(url, folder.absolute()).push()
                print(f"{folder}: all of it is at {url}")
        except Busy as error:  # which copies it itself
            print(error, file=sys.stderr)
        except Exception as error:  # of another version's recipe, and whatever the store does
            print(f"{folder}: mirror: {one_line(error)}", file=sys.stderr)
            failed = failed or 1
    if failed:
        raise SystemExit(failed)


def check(arguments: argparse.Namespace) -> None:
    experiment = _experiment(arguments)
    from diffinstruct.errors import UserError
    from diffinstruct.planning.check import report

    text, problem = report(experiment)
    print(experiment.to_yaml())
    print(text)
    if problem:
        raise UserError(problem)


def rayjob(arguments: argparse.Namespace) -> None:
    from diffinstruct.cluster.kuberay import manifest
    from diffinstruct.config.reading import load

    # Files that it names lie in the image: they are not looked for here.
    experiment = load(arguments.file, arguments.overrides)
    print(manifest(experiment, arguments.image, arguments.claim, arguments.resume), end="")


def evaluate(arguments: argparse.Namespace) -> None:
    _enough_reference_pictures(arguments.reference_pictures)
    from diffinstruct.evaluation.generators import examine, report, save

    found = examine(
        arguments.folders, arguments.prompts, arguments.rewards, arguments.reference_pictures, arguments.seed
    )
    print(report(found))
    if arguments.out:
        save(found, arguments.out)
        print(arguments.out / "table.md")


def compare(arguments: argparse.Namespace) -> None:
    _enough_reference_pictures(arguments.reference_pictures)
    out: Path | None = arguments.out
    if out and out.suffix:
        _writable(out, ".html")
    folders = [_existing_run(folder) for folder in arguments.runs]
    from diffinstruct.evaluation.comparison import compare_runs

    compared = compare_runs(folders, arguments.prompts, arguments.rewards, arguments.reference_pictures, arguments.seed)
    print(compared.text())
    if out:
        compared.save(out)
        print(out)


def report(arguments: argparse.Namespace) -> None:
    _writable(arguments.out, ".html")
    from diffinstruct.reports.page import write

    write(arguments.path, arguments.out)
    print(arguments.out)


def export(arguments: argparse.Namespace) -> None:
    from diffinstruct.config.reading import load_run
    from diffinstruct.errors import UserError

    folder, out = _existing_run(arguments.run), arguments.out
    if os.path.lexists(out):
        raise UserError(f"-o: {str(out)!r} is there already")
    if not out.absolute().parent.is_dir():
        raise UserError(f"-o: no folder {str(out.parent)!r}")
    experiment = load_run(folder)
    from diffinstruct.run_folder.checkpoint import CheckpointError, full_disk_as_error
    from diffinstruct.training.resume import export_checkpoint

    try:
        with full_disk_as_error(out.absolute().parent):
            step, best = export_checkpoint(experiment, folder, arguments.step, out)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        raise UserError(f"-o: {str(out)!r}: {error.strerror or error}") from None
    print(f"{out}  step {step}{', the best' * best}")


def generate(arguments: argparse.Namespace) -> None:
    from diffinstruct.errors import UserError

    model: Path = arguments.run
    if not (model / "model_index.json").is_file():
        model = _existing_run(model) / "export"
        if not model.is_dir():
            raise UserError(f"{model.parent}: no exported model in it, the run has not finished")
    if arguments.n < 1:
        raise UserError(f"--n: should be at least 1, got {arguments.n}")
    if not 0 <= arguments.seed <= 2**63 - arguments.n:
        raise UserError(f"--seed: should be between 0 and 2**63, got {arguments.seed}")
    try:
        arguments.prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"prompt: not UTF-8 text: {arguments.prompt!r}") from None
    if arguments.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"-o: should be a .png, .jpg or .webp file, got {str(arguments.out)!r}")

    import torch
    from PIL import Image

    from diffinstruct.models.export import load_export

    reference, generator = load_export(model, "cuda" if torch.cuda.is_available() else "cpu")
    seeds = range(arguments.seed, arguments.seed + arguments.n)
    # One generator for each picture, as a pipeline draws it: a picture depends on its seed, not on its neighbours.
    z = torch.stack([torch.randn(reference.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    images = reference.sampler(generator)([arguments.prompt] * arguments.n, z).cpu()
    row = torch.cat(list(images), dim=2).permute(1, 2, 0)
    try:
        Image.fromarray((row * 255).round().byte().numpy()).save(arguments.out)
    except (OSError, ValueError) as error:  # some formats end at some width
        raise UserError(f"{arguments.out}: {getattr(error, 'strerror', None) or error}") from None
    print(arguments.out)


def list_rewards(arguments: argparse.Namespace) -> None:
    from reward_models import NAMES

    width = max(map(len, NAMES)) + 2
    for name, entry in NAMES.items():
        paper = "no paper" if entry.paper == "-" else f"arXiv {entry.paper}"
        print(f"{name:<{width}}{entry.line}")
        for line in (
            f"scores {entry.range}",
            f"{paper}; licences: {entry.licences}",
            f"weights: {entry.weights}",
            entry.path,
        ):
            print(" " * width + line)


def test_reward(arguments: argparse.Namespace) -> None:
    _known_rewards([arguments.reward], "rewards test")
    from diffinstruct.method.rewards import RewardError
    from diffinstruct.reward_service.score_folder import validate
    from diffinstruct.reward_service.validation import refuse
    from reward_models import NAMES

    report = validate(arguments.reward, arguments.images, arguments.prompts, not arguments.held_out)
    if arguments.reward in NAMES:
        print(f"{'declared':<12}{NAMES[arguments.reward].range}")
    for check, seen in [*report.checks.items(), *(("remark", remark) for remark in report.remarks)]:
        print(f"{check:<12}{seen}")
    try:
        refuse([report])
    except RewardError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    print(f"reward {arguments.reward} can be {'held out' if arguments.held_out else 'trained on'}")


def score_pictures(arguments: argparse.Namespace) -> None:
    from diffinstruct.errors import UserError

    names = list(dict.fromkeys(arguments.rewards))
    _known_rewards(names, "--reward")
    out: Path | None = arguments.out
    if out:
        _writable(out, ".csv")
        if out.exists() and Path(arguments.prompts).exists() and out.samefile(arguments.prompts):
            raise UserError(f"-o: {str(out)!r} is the prompts' own file, name another")
    from diffinstruct.method.rewards import RewardError
    from diffinstruct.reward_service.score_folder import pictures_with_prompts, save, score, summary

    table = pictures_with_prompts(arguments.images, arguments.prompts)
    print(f"scoring {len(table)} pictures", flush=True)
    try:
        table = score(arguments.images, table, names)
    except RewardError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    print(summary(table, names))
    if out:
        save(table, out)
        print(out)


def run_folder(experiment: Experiment) -> Path:
    """The absolute path of a configuration's run, <runs>/<name>-<derived id>: the same command finds it again."""
    from diffinstruct.errors import UserError

    try:
        runs = Path(experiment.output_dir).expanduser()
    except RuntimeError:  # of a run's own experiment.yaml that came from elsewhere nobody asks this
        raise UserError(f"output_dir: nobody here has the home of {experiment.output_dir!r}") from None
    return runs.absolute() / f"{experiment.name}-{experiment.config_hash}"


def _experiment(arguments: argparse.Namespace) -> Experiment:
    """The configuration, checked as far as can be without torch, so that mistakes show before anything starts."""
    from diffinstruct.config.inputs import check_inputs
    from diffinstruct.config.reading import load

    experiment = load(arguments.file, arguments.overrides)
    check_inputs(experiment)
    return experiment


def _known_rewards(names: Sequence[str], where: str) -> None:
    """Refuse a name that is neither built in nor an import path, before torch starts; and no names at all."""
    from diffinstruct.errors import UserError, did_you_mean
    from reward_models import NAMES

    known = f"there are {', '.join(NAMES)}, and your own as module:callable"
    if not names:
        raise UserError(f"{where}: name at least one; {known}")
    if wrong := next((name for name in names if name not in NAMES and ":" not in name), None):
        raise UserError(f"{where}: no reward is named {wrong!r}{did_you_mean(wrong, NAMES) or f'; {known}'}")


def _enough_reference_pictures(n: int) -> None:
    from diffinstruct.errors import UserError

    if n < 0 or n == 1:
        raise UserError(f"--reference-pictures: should be 0 or at least 2, got {n}")


def _writable(out: Path, suffix: str) -> None:
    """Refuse what `-o` names before the work for it begins."""
    from diffinstruct.errors import UserError

    if out.suffix != suffix:
        raise UserError(f"-o: should be a {suffix} file, got {str(out)!r}")
    if not out.absolute().parent.is_dir():
        raise UserError(f"-o: no folder {str(out.parent)!r}")


def _same_as_before(experiment: Experiment, folder: Path, allowed: Sequence[str]) -> None:
    """Refuse to go on with a run under another configuration, and name the keys; with those that are allowed its newest
    checkpoint becomes one of the new configuration."""
    from diffinstruct.config.experiment import Experiment
    from diffinstruct.config.fields import keys_with
    from diffinstruct.config.reading import load_run, nearest_key
    from diffinstruct.errors import UserError, did_you_mean

    file = folder / "experiment.yaml"
    if file.stat().st_size == 0:
        raise UserError(f"{file}: is empty, as a power cut may leave it; put the run's recipe there")
    changes, may_change = experiment.changes(load_run(folder)), keys_with(Experiment, "resume")
    for key in allowed:
        if key not in (known := experiment.to_params()):
            raise UserError(f"--allow: {key}: unknown key{nearest_key(key, known)}")
        if key not in may_change:
            raise UserError(f"--allow: {key}: cannot change in a run that has begun{did_you_mean(key, may_change)}")
    told = [f"{key}: {now!r}, but the run in {folder} has {before!r}" for key, (before, now) in changes.items()]
    lines = [line for line, key in zip(told, changes, strict=True) if key not in allowed]
    if lines:
        may = [f"--allow {key}" for key in changes if key in may_change and key not in allowed]
        hint = f"; {' '.join(may)} goes on with what is new" if may else ""
        raise UserError("\n".join([*lines, f"--resume: goes on with {folder / 'experiment.yaml'}, unchanged{hint}"]))
    if keys := {*changes, *({"prompts.train"} & {*allowed})}:  # the prompts of a file may have changed under its name
        from diffinstruct.run_folder.checkpoint import CheckpointError
        from diffinstruct.training.resume import change

        try:
            step = change(experiment, folder, keys)
        except CheckpointError as error:
            print(error, file=sys.stderr)
            raise SystemExit(1) from None
        if step is not None:
            older = ", and its older checkpoints are gone" * (step > 0)
            print("\n".join([*told, f"from step {step} on it has what is new{older}"]), flush=True)


def _existing_run(folder: Path) -> Path:
    """`folder`, absolute, if a run has begun in it."""
    from diffinstruct.errors import UserError, did_you_mean

    if not (folder / "experiment.yaml").is_file():
        siblings = [str(path.parent) for path in folder.parent.glob("*/experiment.yaml")]
        if inside := sorted(str(path.parent) for path in folder.glob("*/experiment.yaml")):
            raise UserError(f"{folder}: is no run, but holds {', '.join(inside)}")
        raise UserError(f"{folder}: no run there (it has no experiment.yaml){did_you_mean(folder, siblings)}")
    return folder.absolute()
