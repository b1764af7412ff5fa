"""Errors that the user can mend, and the nearest name that would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

NOT_SENT = "has not come with the job: it was not there, or runtime_env.yaml or .gitignore excludes it"
"""`ray job submit` leaves out what git ignores."""


class UserError(Exception):
    """A mistake the user can mend: the command line prints it as it is, without a traceback, and exits with 2."""


class ConfigErrors(UserError):
    """Every mistake of a configuration; `errors` holds one line for each."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors

    def __reduce__(self) -> tuple[type[ConfigErrors], tuple[list[str]]]:
        return ConfigErrors, (self.errors,)


class ClusterError(Exception):
    """Ray has lost a run's processes, machines or data, and could not begin them again; one line. The same command goes
    on from the run's last checkpoint."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Ends a message: `, did you mean 'x'?` where a known name is near to `word`, else nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.7)
    return f", did you mean {near[0]!r}?" if near else ""


def nearest_file(path: Path, pattern: str) -> str:
    """Ends a message on a file that is not there: the one beside it with the nearest name, and why a job may lack it."""
    names = {sibling.stem: str(sibling) for sibling in path.parent.glob(pattern)}
    near = difflib.get_close_matches(path.stem, names, n=1)
    return (f", did you mean {names[near[0]]!r}?" if near else "") + ("" if path.is_absolute() else left_behind())


def left_behind() -> str:
    """Ends a message on a file or a module that a job does not find in its folder; nothing where this is no job."""
    return f"; it {NOT_SENT}" if in_job_copy(Path.cwd()) else ""


def in_job_copy(path: Path) -> bool:
    """Whether it lies in a job's working directory: a copy that Ray makes on each machine, and clears away."""
    return "working_dir_files" in path.parts
