"""Records of a journal: their types, and how they are read.

A record is one line of `<run>/journal.jsonl`, a JSON object with "time" (ms). Its kind is the key that only this kind
has, such as "metrics"; each field is called as its key on disk.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

logger = logging.getLogger(__name__)

LAST_DAY = 253_402_300_800_000  # the first millisecond that no date has


def _well_formed(value: Any) -> Any:
    """A string without the surrogates that stand for the bytes of a file's name, which no tracker takes."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_well_formed)]


class Record(BaseModel):
    """One line of a journal. Keys that a later version adds are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)

    time: Annotated[int, Field(ge=0, lt=LAST_DAY)]


class RunDescription(BaseModel):
    """What a run in MLflow is made of. Reports do with a part of it."""

    model_config = ConfigDict(frozen=True, strict=True)

    journal: Text = ""  # a token; by it the run is found again if the answer to its creation was lost
    uri: Text = ""
    experiment: Text = ""
    name: Text = ""
    params: dict[Text, Text] = {}
    tags: dict[Text, Text] = {}
    parent: Text | None = None


class StartRecord(Record):
    """The run starts, or resumes."""

    start: RunDescription

    @property
    def is_complete(self) -> bool:
        """Whether it says all that a run in MLflow is made of."""
        return self.start.model_fields_set == RunDescription.model_fields.keys()


class StepRecord(Record):
    """Something that belongs to a step."""

    step: int


class MetricsRecord(StepRecord):
    """Metrics of a step; NaN and Infinity are kept as such."""

    metrics: dict[str, float]


class EvaluationRecord(StepRecord):
    """Results of an evaluation of the finished run. Journals of older versions call the key "examined"."""

    evaluated: dict[str, float] = Field(validation_alias=AliasChoices("evaluated", "examined"))


class ImageRecord(StepRecord):
    """An image; `image` is its path, relative to the run's folder."""

    key: Text
    image: Text


class EventRecord(StepRecord):
    """Something has happened; `event` is its kind."""

    event: Text
    text: Text


class RollbackRecord(EventRecord):
    """The run has gone back to step `back_to`: later steps are measured again, and count as then measured."""

    back_to: int


class ArtifactRecord(Record):
    """A file or folder; `artifact` is its path, relative to the run's folder, in which it lies."""

    artifact: Text


class FinishRecord(Record):
    """The run has ended; `finish` is MLflow's status for it."""

    finish: Text
    reason: Text | None


KINDS: dict[str, type[Record]] = {
    "metrics": MetricsRecord,
    "start": StartRecord,
    "image": ImageRecord,
    "back_to": RollbackRecord,  # before "event", which it has, too
    "event": EventRecord,
    "evaluated": EvaluationRecord,
    "examined": EvaluationRecord,
    "artifact": ArtifactRecord,
    "finish": FinishRecord,
}
"""The key that tells the kind of a record -> its type."""


def read_journal(run_folder: Path | str) -> list[dict[str, Any]]:
    """The records of a run's journal, in order, as they stand on disk; a warning for a line that is none."""
    journal = Path(run_folder) / "journal.jsonl"
    lines = []
    for begin, end, line in json_lines(journal):
        if _record(line) is not None:
            lines.append(line)
        else:
            warn_of_unreadable(journal, begin, end)
    return lines


def records(journal: Path, offset: int = 0) -> Iterator[tuple[int, int, Record | None]]:
    """(first byte, byte after the end, record) of each complete line from `offset` on; None: no record."""
    return ((begin, end, _record(line)) for begin, end, line in json_lines(journal, offset))


def json_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(first byte, byte after the end, JSON object) of each complete line of a file from `offset` on; {}: no object."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # being written, or torn by a crash
            begin, offset = offset, offset + len(line)
            yield begin, offset, _parsed(line)


def warn_of_unreadable(journal: Path, begin: int, end: int) -> None:
    """Warns of a line that is no record. An empty one is no loss: it ends a line that was torn."""
    if end > begin + 1:
        logger.warning("%s: the line at byte %d cannot be read and is left out", journal, begin)


def _record(line: dict[str, Any]) -> Record | None:
    kind = next((kind for key, kind in KINDS.items() if key in line), None)
    try:
        return kind.model_validate(line) if kind else None
    except ValidationError:
        return None


def _parsed(text: bytes) -> dict[str, Any]:
    """The JSON object in a text; {} where there is none."""
    content: Any = None
    try:
        content = from_json(text)  # three times as fast as the standard library, which takes lone surrogates, too
    except ValueError:
        with suppress(ValueError, RecursionError):
            content = json.loads(text)
    return content if isinstance(content, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; {} if the file is not there or not whole: what these files hold can be found again."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return {}


def replace_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces a file by a JSON object. At no moment is it half written."""
    temporary = path.with_name(f"{path.name}.{threading.get_native_id()}.tmp")  # two may deliver the same journal
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)
