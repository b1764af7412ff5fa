"""A tracker of a user's own, in one file: it collects metrics in a text file."""

from __future__ import annotations

from pathlib import Path

from diffinstruct.tracking.delivery import Acknowledgement
from diffinstruct.tracking.records import MetricsRecord


class Collector:
    name = "the collector"

    def __init__(self, folder: Path) -> None:
        self.acknowledgement = Acknowledgement(folder, "collector.ack")
        self.file = folder / "collected.txt"
        self.url = str(self.file)

    def connect(self) -> None:
        self.acknowledgement.read()

    def deliver(self, final: bool) -> bool:
        for _, end, record in self.acknowledgement.unconfirmed():
            if isinstance(record, MetricsRecord):
                with self.file.open("a") as file:
                    file.writelines(f"{record.step} {key} {value}\n" for key, value in record.metrics.items())
            self.acknowledgement.confirm(end)
        return True


class Broken(Collector):
    name = "the broken one"

    def connect(self) -> None:
        raise ConnectionError("away")
