"""The seam between the journal and trackers, with a tracker of one file (collector.py) and with TensorBoard's files."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffinstruct.config.reading import load
from diffinstruct.errors import ConfigErrors, UserError
from diffinstruct.tracking import delivery, journal
from diffinstruct.tracking.journal import Journal, add_evaluation, deliver
from diffinstruct.tracking.mlflow import MlflowDelivery

GRID = np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)


@pytest.fixture(autouse=True)
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLflow that takes everything and keeps nothing."""
    monkeypatch.setattr(MlflowDelivery, "connect", lambda self: None)
    monkeypatch.setattr(MlflowDelivery, "deliver", lambda self, final: True)
    monkeypatch.setattr(delivery, "INTERVAL", 0.05)
    monkeypatch.setattr(journal, "DELIVERY_WAIT_S", 500.0)  # a busy machine is no failure
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def journal_of(folder: Path, *also: str, params: dict[str, Any] | None = None) -> Journal:
    return Journal("http://127.0.0.1:9", "test", "a run", folder / "run", params or {}, {}, also=also)


def collected(folder: Path) -> list[str]:
    return (folder / "run/collected.txt").read_text().splitlines()


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "run/tensorboard"), {"scalars": 0, "tensors": 0, "images": 0})
    return accumulator.Reload()


def scalars(folder: Path, key: str = "loss") -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(key)]


# ---------------------------------------------------------------------------------------------------------- the seam
def test_a_tracker_of_ones_own_gets_each_record_once(tmp_path: Path) -> None:
    first = journal_of(tmp_path, "collector:Collector")
    assert first.url == f"http://127.0.0.1:9  {tmp_path}/run/collected.txt"
    for step in (1, 2, 3):
        first.metrics(step, {"loss": step / 2})
    assert first.finish()
    assert collected(tmp_path) == ["1 loss 0.5", "2 loss 1.0", "3 loss 1.5"]
    second = journal_of(tmp_path, "collector:Collector", params={"tracking.also": "changed, which changes no result"})
    for step in (3, 4):
        second.metrics(step, {"loss": step / 2})
    second.finish()
    assert collected(tmp_path)[3:] == ["4 loss 2.0"]
    size = (tmp_path / "run/journal.jsonl").stat().st_size
    assert json.loads((tmp_path / "run/collector.ack").read_text()) == {"offset": size}
    assert not (tmp_path / "run/journal.ack").exists()


def test_those_that_are_away_hold_up_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: MlflowDelivery) -> None:
        raise ConnectionError("MLflow is away")

    monkeypatch.setattr(MlflowDelivery, "connect", away)
    monkeypatch.setattr(journal, "DELIVERY_WAIT_S", 3.0)
    tracker = journal_of(tmp_path, "collector:Broken", "collector:Collector")
    tracker.metrics(1, {"loss": 1.0})
    assert not tracker.finish()
    assert collected(tmp_path) == ["1 loss 1.0"]
    messages = [record.message for record in caplog.records]
    assert sum("the broken one does not take this run's data: ConnectionError: away" in line for line in messages) == 1
    assert "not all of this run has reached the broken one; the run's next start goes on with it" in messages
    assert any("not all of this run has reached MLflow; later: diffinstruct sync" in line for line in messages)
    (tmp_path / "run/collected.txt").unlink()
    (tmp_path / "run/collector.ack").unlink()
    with pytest.raises(ConnectionError, match="MLflow is away"):
        deliver(tmp_path / "run", also=["collector:Collector"])
    assert collected(tmp_path) == ["1 loss 1.0"]


def test_a_run_that_another_process_ends_reaches_all_of_its_trackers(tmp_path: Path) -> None:
    tracker = journal_of(tmp_path)
    tracker.metrics(1, {"loss": 1.0})
    tracker.finish()
    for _ in range(2):
        deliver(tmp_path / "run", also=["collector:Collector"])
    assert collected(tmp_path) == ["1 loss 1.0"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", r"should be 'tensorboard' or 'module:attribute', got 'tensorbord', did you mean 'tensorboard'\?"),
        ("wandb", r"should be 'tensorboard' or 'module:attribute', got 'wandb'$"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"tracking:\n  also: [{name}]\n")
    with pytest.raises(ConfigErrors, match=rf"run\.yaml:2: tracking\.also\S*: {message}"):
        load(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Delivery", "cannot import 'no_such_module:Delivery': No module named 'no_such_module'"),
        ("collector:Colector", "'collector:Colector': collector has no 'Colector', did you mean 'Collector'?"),
    ],
)
def test_a_tracker_that_cannot_be_made_is_a_line_before_anything_is_written(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        journal_of(tmp_path, name)
    assert str(caught.value) == f"tracking.also: {message}"
    assert not (tmp_path / "run/journal.jsonl").exists()


# ------------------------------------------------------------------------------------------------------- TensorBoard
def test_tensorboard_has_scalars_images_and_events(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = journal_of(tmp_path, "tensorboard")
    assert tracker.url.endswith(f"  tensorboard --logdir {tmp_path}/run/tensorboard")
    tracker.metrics(1, {"loss": 0.5, "large": 1e300, "lost": float("nan")})
    tracker.image("samples/grid", 1, GRID)
    tracker.event(2, "spike", "a word")
    tracker.finish()
    add_evaluation(tmp_path / "run", None, 2, {"kid": 1.5})
    found = events(tmp_path)
    assert scalars(tmp_path) == [(1, 0.5)] and scalars(tmp_path, "eval/kid") == [(2, 1.5)]
    assert scalars(tmp_path, "large") == [(1, math.inf)] and math.isnan(scalars(tmp_path, "lost")[0][1])
    (image,) = found.Images("samples/grid")
    assert (image.step, image.height, image.width) == (1, 8, 16)
    (text,) = found.Tensors("event/spike/text_summary")
    assert (text.step, text.tensor_proto.string_val) == (2, [b"a word"])
    record = json.loads((tmp_path / "run/journal.jsonl").read_text().splitlines()[1])
    assert found.Scalars("loss")[0].wall_time == record["time"] / 1000
    assert not [record for record in caplog.records if "TensorBoard" in record.message]


def test_tensorboard_goes_on_and_is_made_anew_where_its_files_are_gone(tmp_path: Path) -> None:
    for step in (1, 2):
        tracker = journal_of(tmp_path, "tensorboard")
        tracker.metrics(step, {"loss": float(step)})
        tracker.finish()
    assert scalars(tmp_path) == [(1, 1.0), (2, 2.0)]
    for file in (tmp_path / "run/tensorboard").glob("events*"):
        file.unlink()
    journal_of(tmp_path, "tensorboard").finish()
    assert scalars(tmp_path) == [(1, 1.0), (2, 2.0)]


def test_tensorboard_has_each_value_once_after_a_death(tmp_path: Path) -> None:
    """Killed after its file was written, before that was confirmed."""
    code = """
import os, signal, sys
from pathlib import Path
from diffinstruct.tracking.delivery import Acknowledgement
from diffinstruct.tracking.tensorboard import TensorBoardDelivery
delivery = TensorBoardDelivery(Path(sys.argv[1]))
Acknowledgement.confirm = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
delivery.deliver(False)
"""
    tracker = journal_of(tmp_path, "tensorboard")
    tracker.metrics(1, {"loss": 1.0})
    tracker.finish()
    with (tmp_path / "run/journal.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1, "step": 2, "metrics": {"loss": 2.0}}) + "\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(journal.__file__).parents[2])}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert scalars(tmp_path) == [(1, 1.0), (2, 2.0)]  # written, not confirmed
    for _ in range(2):
        deliver(tmp_path / "run")
    assert scalars(tmp_path) == [(1, 1.0), (2, 2.0)]


def test_tensorboard_reads_nothing_outside_of_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from PIL import Image

    tracker = journal_of(tmp_path, "tensorboard")
    Image.fromarray(GRID).save(tmp_path / "secret.png")
    (tmp_path / "run/images/broken.png").write_bytes(b"no picture")
    with (tmp_path / "run/journal.jsonl").open("a") as file:
        for name in ("../secret.png", "images/broken.png", "images/gone.png"):
            file.write(json.dumps({"time": 1, "step": 1, "key": "grid", "image": name}) + "\n")
    tracker.metrics(2, {"loss": 2.0})
    tracker.finish()
    assert scalars(tmp_path) == [(2, 2.0)] and events(tmp_path).Tags()["images"] == []
    messages = [record.message for record in caplog.records if "does not reach TensorBoard" in record.message]
    assert len(messages) == 3 and "outside of the run's folder" in messages[0]


def test_a_package_that_is_missing_is_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffinstruct.tracking.tensorboard.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracking\.also: tensorboard is not installed: pip install 'diffinstruct\[t"):
        journal_of(tmp_path, "tensorboard")
    assert not (tmp_path / "run/journal.jsonl").exists()
    journal_of(tmp_path).finish()
    (tmp_path / "run/tensorboard.ack").write_text("{}")  # a run from a machine that has the package
    delivered: list[Path] = []

    def deliver_nothing(self: MlflowDelivery, final: bool) -> bool:
        delivered.append(self.folder)
        return True

    monkeypatch.setattr(MlflowDelivery, "deliver", deliver_nothing)
    with pytest.raises(UserError, match="not installed"):
        deliver(tmp_path / "run")
    assert delivered == [tmp_path / "run"]
