"""What a run can be told while it runs: files in its folder, since whoever tells it may be on another machine.

<run>/pause   finish the step, save, end; the same command goes on from there
<run>/stop    finish the step, end here as if this had been the last one
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import Any


class Signal(IntEnum):
    """What a run is told; the smallest wins among workers: STOP, then PAUSE, then NONE."""

    STOP = 0
    PAUSE = 1
    NONE = 2


FILES = {Signal.STOP: "stop", Signal.PAUSE: "pause"}
EXIT_PAUSED = 75  # EX_TEMPFAIL: try again, with the same command


class Paused(RuntimeError):
    """A run or a sweep has ended because it was told to pause; its state is saved."""


def request(folder: Path, kind: Signal) -> None:
    (folder / FILES[kind]).touch()


def requested(folder: Path) -> Signal:
    """The signal that lies in `folder`, or NONE."""
    return next((kind for kind, name in FILES.items() if (folder / name).exists()), Signal.NONE)


def clear(folder: Path) -> None:
    for name in FILES.values():
        (folder / name).unlink(missing_ok=True)


@contextmanager
def on_sigterm(pause: Callable[[], None]) -> Iterator[None]:
    """During the block a first SIGTERM (`ray job stop`, a scheduler's notice) calls `pause`, a second one ends the
    program at once. Only the main thread can hear of signals; elsewhere nothing changes."""

    def heard(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        pause()
        with suppress(OSError):  # whoever read it may be gone
            print("SIGTERM: saving after this step; once more ends it at once", flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
