"""Who may write to a run's folder, and which checkpoint is being read: locks that end with the process that holds
them."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from diffinstruct.errors import UserError

LOCK = "lock"
"""Of the process that writes checkpoints and journal."""
COMMAND = "command"
"""Of the command that has started it, maybe on another machine."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What is wrong with a disk, or somebody's quota on it, that takes no more."""

logger = logging.getLogger(__name__)


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
            raise Busy(
                f"{folder}: another process was at work on this run and has ended; the same command again begins it"
            )
        try:
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:  # of a file that is open it does not tell the name
            raise OSError(error.errno, error.strerror, file.name) from None
        yield


def locked(file: IO[Any], shared: bool = False) -> bool:
    """Whether the file is locked now, for as long as it is open. Where a disk knows no locks there is nothing to wait
    for."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s cannot be locked (%s): see to it that nobody else uses this run", file.name, error.strerror)
    return True
