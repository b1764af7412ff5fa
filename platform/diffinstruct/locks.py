"""Locks on open files; the only file that imports fcntl.

They are `flock` locks, since a lock here has to do three things at once: end with the process that holds it, however
that dies; be shared by readers of a file that exists (a checkpoint's manifest); leave the file's content alone (it says
who holds the lock). The package `filelock` locks files of its own, for one holder at a time.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)


def locked(file: IO[Any], shared: bool = False, wait: bool = False) -> bool:
    """Whether the file is locked now, for as long as it is open. With `wait` the answer comes when the lock is free.

    A disk that knows no locks has nothing to wait for: a warning, and the answer is yes. For an exclusive lock on a
    network disk the file has to be open for writing.
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
    """Holds the lock on a file for the block, and waits for whoever holds it. The file is made where it is missing, and
    stays: without it two processes could hold locks on two files of one name."""
    with path.open("a+b") as file:
        locked(file, wait=True)
        yield
