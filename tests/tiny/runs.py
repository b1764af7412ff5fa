"""What tests read of runs in the tiny world."""

import json
import math

import pytest
import torch

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


def same(a: object, b: object) -> bool:
    """Equal in structure, key types, dtype and every bit (NaN included)."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        as_bytes = [t.detach().contiguous().resolve_conj().clone().reshape(-1).view(torch.uint8) for t in (a, b)]
        return torch.equal(*as_bytes)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and [type(k) for k in a] == [type(k) for k in b] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b
