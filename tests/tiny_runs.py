"""What tests read of runs in the tiny world."""

import json

import pytest

SAME = 1e-6


def journal(folder):
    """Metrics by step, and how the run ended."""
    records = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines() if line]
    metrics: dict[int, dict] = {}
    for record in records:
        if "metrics" in record:
            metrics.setdefault(record["step"], {}).update(record["metrics"])
    return metrics, [record["finish"] for record in records if "finish" in record]


def agree(folder, other, rel=SAME):
    """Every number of two runs but the times."""
    ours, theirs = journal(folder)[0], journal(other)[0]
    assert ours.keys() == theirs.keys() and ours
    for step, metrics in ours.items():
        numbers = {key: value for key, value in metrics.items() if not key.startswith(("time/", "throughput/"))}
        assert numbers == pytest.approx({key: theirs[step][key] for key in numbers}, rel=rel, abs=rel), f"step {step}"


def starts(folder):
    return sum(line.startswith("run ") for line in (folder / "output.txt").read_text().splitlines())
