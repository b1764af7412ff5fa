"""What tests ask of the command line."""

import subprocess
import sys

from diffinstruct.cli.main import main


def complaint(capsys, *arguments: object) -> str:
    """What is said on stderr by a command that ends 2."""
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.removesuffix("\n")


def imported(*arguments: object) -> tuple[int, set[str]]:
    """Exit status and packages imported by `python -m diffinstruct ...` in a fresh process."""
    command = [sys.executable, "-X", "importtime", "-m", "diffinstruct", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
