"""The seam between the journal and trackers: what a tracker has to do, and the thread that makes it do so.

A tracker of your own is one class with the four members of `Delivery`, made with the run's folder, and named in the
configuration as `tracking.also: [mypackage.mytracker:MyDelivery]`. `Acknowledgement` keeps how far it has got.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from diffinstruct.config.addresses import one_line
from diffinstruct.config.inputs import import_named
from diffinstruct.config.sections import TRACKERS
from diffinstruct.tracking.records import Record, read_json, records, replace_json, warn_of_unreadable

logger = logging.getLogger(__name__)

INTERVAL = 2.0  # seconds between deliveries; on sqlite a batch of 20 values costs 12 ms of CPU, one of 200 30 ms
LONGEST_PAUSE = 30.0  # seconds between two attempts while a tracker does not answer


class Refused(Exception):
    """A tracker will not take a run's data, however often it is asked; says what the user can do."""


class Delivery(Protocol):
    """Brings the journal of a run's folder to one tracker. What is confirmed is kept there, so anybody can go on."""

    @property
    def name(self) -> str:
        """The tracker, in messages."""

    @property
    def url(self) -> str:
        """Where the run is to be seen, to be printed: an address, or the command that shows it."""

    def connect(self) -> None:
        """Makes sure that the tracker answers and has the run. Called before each `deliver`; raises whatever it likes, and
        Refused where it makes no sense to ask again."""

    def deliver(self, final: bool) -> bool:
        """Delivers what is not confirmed yet; returns whether nothing is left. Raises whatever it likes; what was
        confirmed stays so. `final`: the journal has ended, so what was put off is tried now."""


class Acknowledgement:
    """How far a tracker has confirmed a run's journal: a file of the run's folder, {"offset": bytes, ...}."""

    def __init__(self, folder: Path, file_name: str) -> None:
        self.journal, self.path, self.offset = folder / "journal.jsonl", folder / file_name, 0

    def read(self) -> dict[str, Any]:
        """What was confirmed last; from there `unconfirmed` goes on."""
        content = read_json(self.path)
        if content.get("offset", 0) > self.journal.stat().st_size:  # lines were lost with the machine's memory
            content = {}
        self.offset = content.get("offset", 0)
        return content

    def unconfirmed(self) -> Iterator[tuple[int, int, Record | None]]:
        """(first byte, byte after the end, record) of each complete line that is not confirmed; None: no record."""
        for begin, end, record in records(self.journal, self.offset):
            if record is None:
                warn_of_unreadable(self.journal, begin, end)
            yield begin, end, record

    def confirm(self, offset: int, **state: Any) -> None:
        """Keeps that all before `offset` has arrived, and what else the tracker has to know next time."""
        self.offset = offset
        replace_json(self.path, {"offset": offset, **state})


class DeliveryThread(threading.Thread):
    """Delivers and pauses, until the journal is finished and confirmed; while the tracker is away, ever more rarely."""

    def __init__(self, delivery: Delivery, journal: Path) -> None:
        super().__init__(name="tracking", daemon=True)
        self.delivery, self.journal = delivery, journal
        self.finishing, self.attempted = threading.Event(), threading.Event()
        self.complete = False

    def run(self) -> None:
        pause, away = INTERVAL, False
        while not self.complete:
            finishing = self.finishing.is_set()
            try:
                self.delivery.connect()
                self.attempted.set()
                self.complete = self.delivery.deliver(final=finishing) and finishing
                if away:
                    logger.info("%s answers again", self.delivery.name)
                pause, away = INTERVAL, False
            except Refused as error:
                self.attempted.set()
                refusal = "%s refuses this run's data: %s. Training goes on, %s keeps them"
                logger.warning(refusal, self.delivery.name, error, self.journal)
                return
            except Exception as error:  # whatever it is, training must not hear of it
                self.attempted.set()
                if not away:
                    logger.warning(
                        "%s does not take this run's data: %s. Training goes on, %s keeps them until it does",
                        self.delivery.name,
                        one_line(error),
                        self.journal,
                    )
                pause, away = min(2 * pause, LONGEST_PAUSE) if away else 1.0, True
            if finishing and not self.complete:
                time.sleep(0.5)
            self.finishing.wait(pause)


def delivery_named(name: str, folder: Path) -> Delivery:
    """The delivery of a run's folder to a tracker, as `tracking.also` names it. Raises UserError, one line."""
    delivery: Delivery = import_named("tracking.also", TRACKERS.get(name, name))(folder)
    return delivery


def leads_outside(folder: Path, path: Path) -> bool:
    """Whether a run's file, or a link in it, leads outside of the run's folder: journals come from others, too."""
    return not all(file.resolve().is_relative_to(folder.resolve()) for file in (path, *path.rglob("*")))
