"""Records of a journal: what they hold, and how they are read."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

logger = logging.getLogger(__name__)


def read_journal(run_folder: Path | str) -> list[dict[str, Any]]:
    """The records of a run's journal, in order. A line that cannot be read is left out, with a warning if it is a whole
    one."""
    journal = Path(run_folder) / "journal.jsonl"
    found = [(begin, end, record if "time" in record else {}) for begin, end, record in records(journal)]
    for begin in (begin for begin, end, record in found if not record and end > begin + 1):
        logger.warning("%s: the line at byte %d cannot be read and is left out", journal, begin)
    return [record for _, _, record in found if record]


def records(journal: Path, offset: int = 0) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(first byte, byte after the end, record) of each complete line from `offset` on; {} for one that cannot be
    read."""
    if not journal.exists():
        return
    with journal.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # being written, or torn by a crash
            begin, offset = offset, offset + len(line)
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = {}
            yield begin, offset, record if _is_record(record) else {}


TYPES: Mapping[str, type | UnionType] = {
    **dict.fromkeys(("time", "step", "back_to"), int),
    **dict.fromkeys(("start", "metrics", "examined"), dict),
    **dict.fromkeys(("image", "key", "event", "text", "artifact", "finish"), str),
    "reason": str | None,
}
ASKED = {
    **dict.fromkeys(("start", "artifact"), ("time",)),
    **dict.fromkeys(("metrics", "examined"), ("time", "step")),
    "image": ("time", "step", "key"),
    "event": ("time", "step", "text"),
    "finish": ("time", "reason"),
}
"""What a journal's readers ask of a kind of record without looking."""
OF_A_START: Mapping[str, type | UnionType] = {
    **dict.fromkeys(("journal", "uri", "experiment", "name"), str),
    **dict.fromkeys(("params", "tags"), dict),
    "parent": str | None,
}
LAST_DAY = 253_402_300_800_000
"""The first millisecond that no date has."""


def _is_record(record: Any) -> bool:
    """Whether it has what its readers ask for without looking; of other files' lines they ask nothing."""
    if not isinstance(record, dict) or not all(
        isinstance(record[key], TYPES[key]) for key in record.keys() & TYPES.keys()
    ):
        return False
    start = record.get("start", {})
    numbers = [x for kind in ("metrics", "examined") for x in record.get(kind, {}).values()]
    return (
        all(key in record for kind in record.keys() & ASKED.keys() for key in ASKED[kind])
        and 0 <= record.get("time", 0) < LAST_DAY
        and all(isinstance(x, float) or (isinstance(x, int) and abs(x) < 2**1023) for x in numbers)  # a float holds it
        and all(isinstance(start[key], OF_A_START[key]) for key in start.keys() & OF_A_START.keys())
        and all(isinstance(x, str) for key in ("params", "tags") for x in start.get(key, {}).values())
    )


def is_start(record: dict[str, Any]) -> bool:
    """Whether it says all that a run in MLflow is made of."""
    return record.get("start", {}).keys() >= OF_A_START.keys()


def read_json(path: Path) -> dict[str, Any]:
    """{} if it is not there or not whole: what these files hold can be found again."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def replace_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.{threading.get_native_id()}.tmp")  # two may deliver the same journal
    temporary.write_text(json.dumps(content))
    temporary.replace(path)
