"""Commands around one run: train it, say what it would take, send its journal to MLflow."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from diffinstruct.cli.arguments import Overrides, Recipe, existing_run, read_experiment
from diffinstruct.errors import ClusterError, UserError, did_you_mean

if TYPE_CHECKING:
    from diffinstruct.config.experiment import Experiment

OTHER_PROCESS_WAIT_S = 5.0
"""Seconds in which a process that was killed is gone from its run; `only_writer` waits longer for another machine's."""


def train(
    file: Recipe,
    overrides: Overrides,
    local: Annotated[bool, Option("--local", help="train in this process, without Ray")] = False,
    resume: Annotated[Path | None, Option("--resume", metavar="RUN", help="go on with the run in this folder")] = None,
    allow: Annotated[
        list[str] | None,
        Option("--allow", metavar="KEY", help="with --resume: go on though this key has changed; may be repeated"),
    ] = None,
) -> None:
    """Train a generator on Ray."""
    from diffinstruct.locks import COMMAND, only_writer
    from diffinstruct.run_folder.location import folder_of_run

    experiment = read_experiment(file, overrides)
    folder = folder_of_run(experiment) if resume is None else existing_run(resume)
    if folder_of_run(experiment).parent != folder.parent:  # it was moved; what it keeps of itself is where it is now
        experiment = experiment.model_copy(update={"output_dir": str(folder.parent)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        link = next((path for path in (folder, *folder.parents) if path.is_symlink() and not path.exists()), None)
        reason = f"{link} is a link to {link.readlink()}, which is not there" if link else error.strerror
        raise UserError(f"output_dir: cannot make {folder}: {reason}") from None
    if allow and resume is None:
        raise UserError("--allow: goes with --resume RUN")
    with only_writer(folder, OTHER_PROCESS_WAIT_S, COMMAND):  # from here on: another command would clear this one's signals
        with only_writer(folder, OTHER_PROCESS_WAIT_S):  # what a command has started may outlive it
            if (folder / "experiment.yaml").is_file():
                _check_resume(experiment, folder, allow or [])
        _run(experiment, folder, local)


def _run(experiment: Experiment, folder: Path, local: bool) -> None:
    """Train, and end the command with a run's own exit status: 1 broke off, 75 paused, 130 interrupted."""
    import diffinstruct
    from diffinstruct.locks import COMMAND, LOCK, Busy, only_writer
    from diffinstruct.method.nonfinite import NonFiniteGradient
    from diffinstruct.method.rewards import RewardError
    from diffinstruct.run_folder.checkpoint import CheckpointError
    from diffinstruct.run_folder.signals import EXIT_PAUSED, Paused

    file = folder / "experiment.yaml"
    command = f"diffinstruct train {shlex.quote(str(file))} --resume {shlex.quote(str(folder))}{' --local' * local}"
    try:
        diffinstruct.train(experiment, folder, local)
    except (RewardError, NonFiniteGradient, CheckpointError, ClusterError, Paused, KeyboardInterrupt) as error:
        print(error if str(error) else "\ninterrupted", file=sys.stderr)
        if any((folder / "checkpoints").glob("step-*")):
            print(f"from its last checkpoint the run goes on with: {command}", file=sys.stderr)
        status = {KeyboardInterrupt: 130, Paused: EXIT_PAUSED}.get(type(error), 1)
        raise SystemExit(status) from None
    finally:
        with suppress(OSError, Busy):  # if nothing has begun in it
            if {path.name for path in folder.iterdir()} <= {LOCK, COMMAND}:
                with only_writer(folder):
                    shutil.rmtree(folder)


def _check_resume(experiment: Experiment, folder: Path, allowed: Sequence[str]) -> None:
    """Refuse to go on under another configuration, or make the newest checkpoint one of it where that is allowed."""
    from diffinstruct.config.experiment import Experiment
    from diffinstruct.config.fields import keys_with
    from diffinstruct.config.reading import load_run, nearest_key

    file = folder / "experiment.yaml"
    if file.stat().st_size == 0:
        raise UserError(f"{file}: is empty, as a power cut may leave it; put the run's recipe there")
    changes, may_change = experiment.changes(load_run(folder)), keys_with(Experiment, "resume")
    for key in allowed:
        if key not in (known := experiment.to_params()):
            raise UserError(f"--allow: {key}: unknown key{nearest_key(key, known)}")
        if key not in may_change:
            raise UserError(f"--allow: {key}: cannot change in a run that has begun{did_you_mean(key, may_change)}")
    messages = {key: f"{key}: {now!r}, but the run in {folder} has {then!r}" for key, (then, now) in changes.items()}
    if refused := [message for key, message in messages.items() if key not in allowed]:
        options = [f"--allow {key}" for key in changes if key in may_change and key not in allowed]
        hint = f"; {' '.join(options)} goes on with what is new" if options else ""
        raise UserError("\n".join([*refused, f"--resume: goes on with {file}, unchanged{hint}"]))
    keys = {*changes, *({"prompts.train"} & {*allowed})}  # the prompts of a file may have changed under its name
    if not keys:
        return
    from diffinstruct.run_folder.checkpoint import CheckpointError
    from diffinstruct.training.resume import change

    try:
        step = change(experiment, folder, keys)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    if step is not None:
        older = ", and its older checkpoints are gone" * (step > 0)
        print("\n".join([*messages.values(), f"from step {step} on it has what is new{older}"]), flush=True)


def check(file: Recipe, overrides: Overrides) -> None:
    """Say what a run takes and whether it fits this machine."""
    experiment = read_experiment(file, overrides)
    from diffinstruct.planning.check import report

    text, problem = report(experiment)
    print(experiment.to_yaml())
    print(text)
    if problem:
        raise UserError(problem)


def sync(
    path: Annotated[Path, Argument(metavar="RUN_OR_SWEEP", help="a run's folder, or a sweep's")],
    uri: Annotated[
        str | None,
        Option("--uri", help="address of the tracking server, where it is not the run's own, or only the journal names it"),
    ] = None,
) -> None:
    """Send MLflow and the mirror what is still missing there."""
    folders = [file.parent for file in sorted([*path.glob("journal.jsonl"), *path.glob("*/journal.jsonl")])]
    if not folders:
        existing_run(path)
    failed = 0
    for folder in folders:
        delivered = _deliver_journal(folder, uri)
        # A journal that was refused may be somebody else's: the mirror does not get it, either.
        failed = max(failed, delivered, 0 if delivered == 2 else _push_mirror(folder))
    if failed:
        raise SystemExit(failed)


def _deliver_journal(folder: Path, uri: str | None) -> int:
    """Deliver one journal; the command's exit status for it."""
    from diffinstruct.config.addresses import one_line
    from diffinstruct.tracking.journal import deliver, undelivered

    try:
        size = undelivered(folder)
        deliver(folder, uri)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Exception as error:  # whatever MLflow and what lies between raise
        print(f"{folder}: {one_line(error)}", file=sys.stderr)
        return 1
    print(f"{folder}: {size} bytes of the journal delivered" if size else f"{folder}: all of it is there")
    return 0


def _push_mirror(folder: Path) -> int:
    """Bring one run's mirror up to date, where it has one; the command's exit status for it."""
    from diffinstruct.config.addresses import one_line
    from diffinstruct.config.reading import load_run
    from diffinstruct.locks import Busy, only_writer

    try:
        if (folder / "experiment.yaml").is_file() and (url := load_run(folder).mirror):
            from diffinstruct.run_folder.mirror import Mirror

            with only_writer(folder):
                Mirror(url, folder.absolute()).push()
            print(f"{folder}: all of it is at {url}")
    except Busy as error:  # the process at work on the run copies it itself
        print(error, file=sys.stderr)
    except Exception as error:  # another version's recipe, and whatever the store raises
        print(f"{folder}: mirror: {one_line(error)}", file=sys.stderr)
        return 1
    return 0
