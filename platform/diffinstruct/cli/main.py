"""The command line, a thin face: read the configuration, call one function, say in one line what the user can mend.

Heavy packages are imported inside the commands: `--help` and a mistake in the configuration answer at once.
"""

from __future__ import annotations

import errno
import getpass
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from diffinstruct.cli import cluster, evaluate, rewards, train
from diffinstruct.cli.arguments import CommandGroup
from diffinstruct.errors import UserError

app = typer.Typer(
    cls=CommandGroup,
    help="Diff-Instruct*: one-step text-to-image generators aligned with human preference.",
    rich_markup_mode=None,
)
for command in (
    *(train.train, train.sync, train.check, cluster.rayjob),
    *(evaluate.evaluate, evaluate.compare, evaluate.report, evaluate.export, evaluate.generate),
):
    app.command()(command)
app.add_typer(rewards.app, name="rewards")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, or 2 where the user has to mend something (said on stderr). A run that
    breaks off and a reward that fails or is refused end with 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # where a reward of one's own may lie; `python -m diffinstruct` has it there already
    from diffinstruct.locks import FULL

    _complete_environment()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack what stands in a prompt or a name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # typer's own handling would print usage errors in several lines
        status = typer.main.get_command(app).main(arguments, prog_name="diffinstruct", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "diffinstruct"
        print(f"{where}: {' '.join(error.format_message().split())}", file=sys.stderr)
        return 2
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        avoidable = error.errno in (errno.ENAMETOOLONG, errno.EACCES, errno.EROFS) and error.filename
        if error.errno not in FULL and not avoidable:
            raise
        print(f"{error.filename or arguments[0]}: {error.strerror}", file=sys.stderr)
        return 2 if avoidable else 1
    return status or 0


def _complete_environment() -> None:
    """Set HOME and USER where the system knows neither for the number of this user, as in a container: MLflow, Ray and
    torch ask for them, and fail without an answer."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"  # as container runtimes do
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the second since Python 3.13
        os.environ["USER"] = f"uid{os.getuid()}"
