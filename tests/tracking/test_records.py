"""Records of a journal: what counts as one, what older versions wrote, and how much work reading is."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from diffinstruct.tracking.records import (
    ArtifactRecord,
    EvaluationRecord,
    EventRecord,
    FinishRecord,
    ImageRecord,
    MetricsRecord,
    Record,
    RollbackRecord,
    StartRecord,
    read_journal,
    records,
)

START = {"journal": "t", "uri": "sqlite:////a.db", "experiment": "e", "name": "n", "params": {"a": "1"}, "tags": {}}
LINES: list[tuple[type[Record], dict[str, Any]]] = [
    (StartRecord, {"start": {**START, "parent": None}}),
    (MetricsRecord, {"step": 1, "metrics": {"loss": 1.5, "whole": 2}}),
    (ImageRecord, {"step": 1, "key": "grid", "image": "images/grid.png"}),
    (EventRecord, {"step": 1, "event": "spike", "text": "a word"}),
    (RollbackRecord, {"step": 9, "event": "back_to", "text": "back", "back_to": 5}),
    (EvaluationRecord, {"step": 9, "evaluated": {"kid": 1.0}}),
    (EvaluationRecord, {"step": 9, "examined": {"kid": 1.0}}),
    (ArtifactRecord, {"artifact": "export"}),
    (FinishRecord, {"finish": "FINISHED", "reason": None}),
]


def written(folder: Path, *lines: dict[str, Any] | str) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "journal.jsonl").write_text(text)
    return folder / "journal.jsonl"


def test_each_kind_has_its_type_and_reads_as_it_was_written(tmp_path: Path) -> None:
    lines = [{"time": 1, **line, "of a later version": 1} for _, line in LINES]
    journal = written(tmp_path, *lines)
    found = [record for _, _, record in records(journal)]
    assert [type(record) for record in found] == [kind for kind, _ in LINES]
    assert read_journal(tmp_path) == lines
    assert isinstance(found[6], EvaluationRecord) and found[6].evaluated == {"kid": 1.0}
    for record, (_, line) in zip(found, LINES, strict=True):
        assert record and record.model_dump() == {
            "time": 1,
            **{"evaluated" if key == "examined" else key: value for key, value in line.items()},
        }


def test_values_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    journal = written(tmp_path, '{"time": 1, "step": 1, "metrics": {"a": NaN, "b": Infinity, "c": -Infinity}}')
    ((_, _, record),) = records(journal)
    assert isinstance(record, MetricsRecord) and math.isnan(record.metrics["a"])
    assert (record.metrics["b"], record.metrics["c"]) == (math.inf, -math.inf)
    assert read_journal(tmp_path)[0]["metrics"]["b"] == math.inf


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[1, 2]",
        "[" * 100_000,
        '{"time": 1}',
        '{"time": -1, "artifact": "a"}',
        '{"time": "1", "artifact": "a"}',
        '{"time": 253402300800000, "artifact": "a"}',
        '{"time": 1, "step": 1.5, "metrics": {}}',
        '{"time": 1, "metrics": {"a": 1.0}}',
        '{"time": 1, "step": 1, "metrics": {"a": "1"}}',
        f'{{"time": 1, "step": 1, "metrics": {{"a": 1{"0" * 400}}}}}',
        '{"time": 1, "step": 1, "image": "images/a.png"}',
        '{"time": 1, "step": 1, "event": "x", "text": "y", "back_to": "z"}',
        '{"time": 1, "finish": "FAILED"}',
        json.dumps({"time": 1, "start": 5}),
        json.dumps({"time": 1, "start": {**START, "parent": None, "params": {"a": 1}}}),
    ],
)
def test_what_is_no_record_is_left_out_with_a_warning(line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = written(tmp_path, line, "", {"time": 1, "artifact": "a"})
    assert [record is None for _, _, record in records(journal)] == [True, True, False]
    assert read_journal(tmp_path) == [{"time": 1, "artifact": "a"}]
    assert [record.message for record in caplog.records] == [f"{journal}: the line at byte 0 cannot be read and is left out"]


def test_a_start_that_says_a_part_is_for_reports_alone(tmp_path: Path) -> None:
    journal = written(tmp_path, *({"time": 1, "start": start} for start in (START, {}, {**START, "parent": None})))
    found = [record for _, _, record in records(journal) if isinstance(record, StartRecord)]
    assert [record.is_complete for record in found] == [False, False, True]
    assert len(read_journal(tmp_path)) == 3


def test_names_of_files_that_are_no_text_are_read(tmp_path: Path) -> None:
    """Python writes the bytes of such a name as lone surrogates, which no tracker takes."""
    name = b"/runs/\xff".decode(errors="surrogateescape")
    start = {**START, "parent": None, "params": {"output_dir": name}}
    journal = written(tmp_path, {"time": 1, "start": start})
    ((_, _, record),) = records(journal)
    assert isinstance(record, StartRecord) and record.start.params == {"output_dir": "/runs/?"}


def test_a_line_of_the_journal_costs_few_calls(tmp_path: Path) -> None:
    """Counted, not timed: a validator of our own for each of a line's 20 values would show, and so would a second
    reading."""
    line = json.dumps({"time": 1, "step": 1, "metrics": {f"reward/{n}": n / 7 for n in range(20)}})
    journal, calls = written(tmp_path, *[line] * 2_000), Counter[str]()
    sys.setprofile(lambda frame, event, value: calls.update([event]))
    try:
        count = len(list(records(journal)))
    finally:
        sys.setprofile(None)
    assert count == 2_000
    assert calls["call"] + calls["c_call"] < 20 * count  # 14 as it is
