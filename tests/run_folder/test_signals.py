"""A run that is told to pause or to stop does so after the step that it is in, and nothing of it is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny.runs import journal

from diffinstruct.run_folder import signals
from diffinstruct.run_folder.checkpoint import CheckpointStore
from diffinstruct.run_folder.signals import Signal
from diffinstruct.run_folder.state_tree import encode
from diffinstruct.training import local

ROOT = Path(__file__).parents[2]


def tell(monkeypatch, folder, step, kind):
    """Give `kind` in the middle of round `step`, as somebody elsewhere would."""
    from diffinstruct.training import loop

    rounds = loop.alternating_round

    def round_with_a_signal(train_state, settings, schedule, draws, *rest):
        if draws.step + 1 == step:
            signals.request(folder, kind)
        return rounds(train_state, settings, schedule, draws, *rest)

    monkeypatch.setattr(loop, "alternating_round", round_with_a_signal)


def numbers(folder):
    return {
        step: {key: value for key, value in metrics.items() if not key.startswith(("time/", "throughput/"))}
        for step, metrics in journal(folder)[0].items()
    }


def test_a_paused_run_goes_on_to_the_same_bits_and_metrics(world, tmp_path, monkeypatch):
    """Paused between two rows of the journal and two checkpoints: the rounds since the last row count in the next
    one."""
    experiment = world[1](steps=10, logging__every=4, logging__checkpoint_every=10, overoptimization__every=3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    local.run(experiment, whole)
    with monkeypatch.context() as patch:
        tell(patch, parts, 6, Signal.PAUSE)
        with pytest.raises(signals.Paused, match=r"^paused at step 6, all of it saved in .*checkpoints$"):
            local.run(experiment, parts)
    assert CheckpointStore(parts / "checkpoints").latest()[0] == 6 and journal(parts)[1] == ["KILLED"]
    local.run(experiment, parts)
    assert journal(parts)[1] == ["KILLED", "FINISHED"]
    assert numbers(parts) == numbers(whole) and [*numbers(whole)] == [0, 3, 4, 6, 8, 9, 10]
    (step, one), (same, other) = (CheckpointStore(run / "checkpoints").latest() for run in (whole, parts))
    (tree, tensors), (its_tree, its_tensors) = encode(one["train_state"]), encode(other["train_state"])
    assert (step, tree, [*tensors]) == (same, its_tree, [*its_tensors])
    assert all(torch.equal(tensor, its_tensors[name]) for name, tensor in tensors.items())


def test_a_stopped_run_is_a_finished_one(world, tmp_path, monkeypatch):
    tell(monkeypatch, tmp_path, 3, Signal.STOP)
    result = local.run(world[1](steps=10), tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["step"] == 3
    assert (result.export / "model_index.json").exists() and journal(tmp_path)[1] == ["FINISHED"]
    assert "told to stop" in next(
        record["text"]
        for record in map(json.loads, filter(None, (tmp_path / "journal.jsonl").read_text().splitlines()))
        if record.get("event") == "stopped"
    )
    monkeypatch.undo()
    assert local.run(world[1](steps=10), tmp_path).metrics == result.metrics  # there is nothing left to do


def test_a_sigterm_is_heard_also_where_nobody_reads(monkeypatch):
    def broken(*arguments, **options):
        raise BrokenPipeError

    heard = []
    monkeypatch.setattr("builtins.print", broken)
    with signals.on_sigterm(lambda: heard.append(True)):
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [True]


def test_sigterm_saves_and_says_how_to_go_on(world, tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(world[1](steps=100_000, logging__checkpoint_every=100_000, output_dir=str(tmp_path / "runs")).to_yaml())
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "platform", ROOT)))
    run = subprocess.Popen(
        [sys.executable, "-m", "diffinstruct", "train", file, "--local"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    while not (journals := [*(tmp_path / "runs").glob("*/journal.jsonl")]) or not journal(journals[0].parent)[0]:
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    said, complained = run.communicate(timeout=120)
    folder = journals[0].parent
    step = max(journal(folder)[0])
    assert run.returncode == signals.EXIT_PAUSED == 75
    assert "SIGTERM: saving after this step" in said
    assert f"paused at step {step}, " in complained and f"--resume {folder} --local" in complained
    assert CheckpointStore(folder / "checkpoints").latest()[0] == step
