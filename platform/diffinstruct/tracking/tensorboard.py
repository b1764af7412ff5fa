"""The delivery of a journal to TensorBoard's files, in `<run>/tensorboard/`, through torch's own writer.

    metrics        scalars under their own keys; results of an evaluation as eval/...
    images         images under their own keys
    events         texts, as event/<kind>

Everything arrives once: <run>/tensorboard.ack has the size of each file beside the journal's offset, and what a process
that died had written after that is cut off. Without the files the whole journal is written again.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np

from diffinstruct.config.addresses import one_line
from diffinstruct.errors import UserError
from diffinstruct.locks import exclusive
from diffinstruct.tracking.delivery import Acknowledgement, leads_outside
from diffinstruct.tracking.records import EvaluationRecord, EventRecord, ImageRecord, MetricsRecord, StepRecord

logger = getLogger(__name__)

ACKNOWLEDGEMENT = "tensorboard.ack"


class TensorBoardDelivery:
    """Brings a journal to TensorBoard. Several processes may do so in turn, such as a run and its end's report."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        if find_spec("tensorboard") is None:
            raise UserError("tracking.also: tensorboard is not installed: pip install 'diffinstruct[tensorboard]'")
        self.run_folder, self.folder = folder, folder / "tensorboard"
        self.acknowledgement = Acknowledgement(folder, ACKNOWLEDGEMENT)
        self._writer: Any = None

    @property
    def url(self) -> str:
        return f"tensorboard --logdir {shlex.quote(str(self.folder))}"

    def connect(self) -> None:
        """There is nothing to connect to: a file is there, or the disk says why not."""

    def deliver(self, final: bool) -> bool:
        self.folder.mkdir(exist_ok=True)
        with exclusive(self.folder / "lock"):
            try:
                self._write_unconfirmed()
            except BaseException:
                self._close()  # what it has written and nobody has confirmed is cut off by the next one
                raise
            if final:
                self._close()
        return True

    def _write_unconfirmed(self) -> None:
        confirmed: dict[str, int] = self.acknowledgement.read().get("files", {})
        sizes = self._sizes()
        if any(sizes.get(name, -1) < size for name, size in confirmed.items()):  # somebody has cleared them away
            self._close()
            confirmed = {}
            self.acknowledgement.confirm(0, files=confirmed)
        offset: int | None = None
        for _, end, record in self.acknowledgement.unconfirmed():
            self._writer = self._writer or self._opened(confirmed)
            if isinstance(record, StepRecord):
                self._write(record)
            offset = end
        if offset is not None:
            self._writer.flush()
            self.acknowledgement.confirm(offset, files=self._sizes())

    def _write(self, record: StepRecord) -> None:
        at = record.time / 1000
        match record:
            case MetricsRecord():
                self._scalars(record.metrics, record.step, at)
            case EvaluationRecord():
                self._scalars({f"eval/{key}": value for key, value in record.evaluated.items()}, record.step, at)
            case ImageRecord():
                self._image(record, at)
            case EventRecord():
                self._writer.add_text(f"event/{record.event}", record.text, record.step, at)

    def _scalars(self, values: Mapping[str, float], step: int, at: float) -> None:
        with np.errstate(over="ignore"):  # TensorBoard's scalars have 32 bits
            for key, value in values.items():
                self._writer.add_scalar(key, np.float32(value), step, at)

    def _image(self, record: ImageRecord, at: float) -> None:
        from PIL import Image

        path = self.run_folder / record.image
        if leads_outside(self.run_folder, path):
            logger.warning("%r is, or leads, outside of the run's folder and does not reach TensorBoard", str(path))
            return
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # of a file from elsewhere, Pillow raises what it likes
            logger.warning("%s does not reach TensorBoard: %s", path, one_line(error))
            return
        self._writer.add_image(record.key, pixels, record.step, at, dataformats="HWC")

    def _opened(self, sizes: Mapping[str, int]) -> Any:
        """A writer to a new file; the others are cut to the sizes that were confirmed."""
        from torch.utils.tensorboard import SummaryWriter

        for file in self._files():
            if file.name not in sizes:
                file.unlink()
            elif file.stat().st_size > sizes[file.name]:
                with file.open("r+b") as content:
                    content.truncate(sizes[file.name])
        return SummaryWriter(str(self.folder))

    def _sizes(self) -> dict[str, int]:
        return {file.name: file.stat().st_size for file in self._files()}

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("events.out.tfevents.*"))

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
