"""Locks on open files; the only file that imports fcntl.

They are `flock` locks: they end with the process that holds them, however it dies, readers can share them, and the
file's content is left alone (it says who holds it). The package `filelock` locks files of its own, for one holder.
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
