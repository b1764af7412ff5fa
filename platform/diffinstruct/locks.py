"""Locks on open files; the only file that imports fcntl.

They are `flock` locks: they end with the process that holds them, however it dies, readers can share them, and the
file's content is left alone (it says who holds it). The package `filelock` locks files of its own, for one holder.
"""

import errno
import fcntl
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from diffinstruct.errors import UserError

LOCK = "lock"  # the file that the process holds which writes checkpoints and journal
COMMAND = "command"  # the file that the command holds which has started that process, maybe on another machine

FULL = (errno.ENOSPC, errno.EDQUOT)  # error numbers of a disk, or of somebody's quota on it, that takes no more

OUTLIVES_S = 150.0
"""Seconds after which a lock on a network disk is free whose machine is gone: NFSv4's lease is 90 s, unless set
otherwise."""
QUIET_S = 2.0  # seconds that one waits without a word

logger = logging.getLogger(__name__)


def locked(file: IO[Any], shared: bool = False, wait: bool = False) -> bool:
    """Whether the file is locked now, for as long as it is open. With `wait` the answer comes when the lock is free.

    On a disk that knows no locks it is yes, with a warning. Network disks lock exclusively what is open for writing.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s cannot be locked (%s): see to it that nobody else uses it", file.name, error.strerror)
    return True


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Waits for the lock on a file and holds it for the block. The file is made where it is missing, and stays, since two
    processes could hold locks on two files of one name."""
    with path.open("a+b") as file:
        locked(file, wait=True)
        yield


class Busy(UserError):
    """Another process is at work on the run."""


@contextmanager
def only_writer(folder: Path, patience: float = 0.0, name: str = LOCK) -> Iterator[None]:
    """Holds a run's folder for the block. Raises Busy if another process still does after `patience` seconds. Who has
    any waits for OUTLIVES_S where the other one is on another machine, which may be gone."""
    with (folder / name).open("a+", encoding="utf-8") as file:
        began, told = time.monotonic(), False
        while not locked(file):
            file.seek(0)
            who = file.read() or "another process"
            elsewhere = " on " in who and not who.endswith(f" on {socket.gethostname()}")
            limit = max(patience, OUTLIVES_S) if patience and elsewhere else patience
            waited = time.monotonic() - began
            if waited >= limit:
                raise Busy(f"{folder}: {who} is at work on this run; it can have one at a time")
            if waited >= QUIET_S and not told:
                told = True
                print(f"{folder}: waits up to {limit:.0f} s for {who} to let go of this run", file=sys.stderr, flush=True)
            time.sleep(0.5)
        if not (folder / name).exists():  # the one before had begun nothing and took the folder away
            raise Busy(f"{folder}: another process was at work on this run and has ended; the same command again begins it")
        try:
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:  # of a file that is open it does not tell the name
            raise OSError(error.errno, error.strerror, file.name) from None
        yield
