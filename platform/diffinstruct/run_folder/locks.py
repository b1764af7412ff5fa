"""Which process may write to a run's folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffinstruct.errors import UserError
from diffinstruct.locks import locked

LOCK = "lock"
"""The file that the process holds which writes checkpoints and journal."""
COMMAND = "command"
"""The file that the command holds which has started that process, maybe on another machine."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a disk, or of somebody's quota on it, that takes no more."""


class Busy(UserError):
    """Another process is at work on the run."""


@contextmanager
def only_writer(folder: Path, patience: float = 0.0, name: str = LOCK) -> Iterator[None]:
    """Holds a run's folder for the block. Raises Busy if another process still does after `patience` seconds."""
    with (folder / name).open("a+") as file:
        until = time.monotonic() + patience
        while not locked(file):
            if time.monotonic() >= until:
                file.seek(0)
                who = file.read() or "another process"
                raise Busy(f"{folder}: {who} is at work on this run; it can have one at a time")
            time.sleep(0.5)
        if not (folder / name).exists():  # the one before had begun nothing and took the folder away
            raise Busy(f"{folder}: another process was at work on this run and has ended; the same command again begins it")
        try:
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:  # of a file that is open it does not tell the name
            raise OSError(error.errno, error.strerror, file.name) from None
        yield
