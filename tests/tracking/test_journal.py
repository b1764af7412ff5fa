"""The journal and its delivery, against real sqlite files and a real MLflow server that dies."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny.server import Server, free_port

from diffinstruct.config.addresses import sqlite_path, tracking_uri
from diffinstruct.errors import UserError
from diffinstruct.tracking import delivery, journal
from diffinstruct.tracking.journal import Journal, add_evaluation, attach, deliver, publish
from diffinstruct.tracking.mlflow import ENVIRONMENT, TIMEOUT, MlflowDelivery, _prepared_database, _time_for_upload
from diffinstruct.tracking.records import read_journal

PARAMS = {"seed": 0, "generator.learning_rate": 1e-4}
GRID = np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)
RACER = """
import sys
from diffinstruct.tracking import delivery, journal
from diffinstruct.tracking.journal import Journal
journal.DELIVERY_WAIT_S = 100  # creating the tables takes 4 s of CPU
tracker = Journal(sys.argv[1], "race", sys.argv[2], sys.argv[3], {}, {})
tracker.metrics(1, {"loss": 1.0})
sys.exit(0 if tracker.finish() else 1)
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(journal.__file__).parents[2])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """An sqlite file that two processes created at the same moment, and how they ended. The other tests get copies."""
    folder = tmp_path_factory.mktemp("race")
    racers = [python(RACER, f"sqlite:///{folder}/mlflow.db", name, folder / name) for name in "ab"]
    ends = [(racer, racer.communicate()[1]) for racer in racers]
    return folder / "mlflow.db", [(racer.returncode, errors) for racer, errors in ends]


@pytest.fixture
def uri(raced: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(delivery, "INTERVAL", 0.05)
    monkeypatch.setattr(journal, "DELIVERY_WAIT_S", 100.0)  # a busy machine is no failure
    shutil.copy(raced[0], tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def journal_of(folder: Path, uri: str | None = None, params: dict | None = None, **rest: Any) -> Journal:
    return Journal(uri, "test", "a run", folder / "run", PARAMS if params is None else params, {"kind": "test"}, **rest)


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def history(uri: str, run_id: str | None, key: str = "loss") -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client_of(uri).get_metric_history(run_id, key))


def pictures(uri: str, run_id: str | None) -> list[str]:
    return [Path(file.path).suffix for file in client_of(uri).list_artifacts(run_id, "images")]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/journal.jsonl").read_text().splitlines()]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("diffinstruct.tracking")]


def test_two_processes_start_at_once_on_a_new_file(raced: tuple[Path, list[tuple[int, str]]]) -> None:
    database, ends = raced
    assert [code for code, _ in ends] == [0, 0], ends
    client = client_of(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("race")
    assert experiment.artifact_location == (database.parent / "mlartifacts").as_uri()
    assert {run.info.run_name for run in client.search_runs([experiment.experiment_id])} == {"a", "b"}


def test_import_is_cheap() -> None:
    code = "import sys, diffinstruct.tracking.journal; sys.exit(bool({'mlflow', 'torch', 'PIL'} & set(sys.modules)))"
    assert python(code).wait() == 0


def test_everything_arrives_once(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "run/export/unet").mkdir(parents=True)
    (tmp_path / "run/export/unet/config.json").write_text("{}")
    params = {**PARAMS, "prompts": "x" * 7000, "empty": "", "none": None, **{f"p{n}": n for n in range(250)}}
    tracker = journal_of(tmp_path, uri, params)
    for step in range(60):
        tracker.metrics(step, {"loss": step / 3, **{f"reward/{n}": float(n) for n in range(40)}})
    tracker.metrics(60, {"loss": float("nan"), "scale": float("inf"), "odd@name": 1.0})
    tracker.metrics(61, {"loss": float("inf")})
    for step in (0, 50):
        tracker.image("samples/grid", step, GRID)
    tracker.artifact(tmp_path / "table.csv")
    tracker.artifact(tmp_path / "run/export")
    assert tracker.finish("FINISHED")
    assert warnings(caplog) == []
    client, run_id = client_of(uri), tracker.run_id
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name, run.data.tags["kind"]) == ("FINISHED", "a run", "test")
    assert run.data.params == {key: str(value)[:6000] for key, value in params.items()}
    assert history(uri, run_id) == [(step, step / 3) for step in range(60)]
    assert history(uri, run_id, "reward/39") == [(step, 39.0) for step in range(60)]
    assert history(uri, run_id, "odd_name") == [(60, 1.0)]
    assert (run.data.tags["nonfinite.loss"], run.data.tags["nonfinite.scale"]) == ("60", "60")
    assert "scale" not in run.data.metrics
    assert lines(tmp_path)[61]["metrics"]["scale"] == float("inf")
    at = [record["time"] for record in lines(tmp_path) if "metrics" in record]
    assert [point.timestamp for point in client.get_metric_history(run_id, "loss")] == at[:60]
    assert sorted(pictures(uri, run_id)) == [".png", ".png", ".webp", ".webp"]
    names = sorted(file.path for file in client.list_artifacts(run_id, "images"))
    assert names[0].startswith("images/samples~grid+step+0+timestamp+")
    assert run.data.tags["mlflow.loggedImages"] == "True"
    assert {file.path for file in client.list_artifacts(run_id)} == {"images", "table.csv", "export"}
    assert client.list_artifacts(run_id, "export/unet")[0].path == "export/unet/config.json"
    from PIL import Image

    with Image.open(tmp_path / "run/images/samples~grid-00000050.png") as image:
        assert np.array_equal(np.asarray(image), GRID)
    assert tracker.url == f"mlflow ui --backend-store-uri {uri}"


def test_a_resumed_run_goes_on_in_the_same_one(tmp_path: Path, uri: str) -> None:
    first = journal_of(tmp_path, uri)
    for step in (1, 2, 3):
        first.metrics(step, {"loss": float(step), "seconds": 0.1})
    first.image("grid", 3, GRID)
    first.finish("KILLED", "preempted")
    assert client_of(uri).get_run(first.run_id).data.tags["reason"] == "preempted"
    second = journal_of(tmp_path, uri)  # from a checkpoint at step 1
    for step in (2, 3, 4):
        second.metrics(step, {"loss": float(step), "seconds": 0.2})
        second.image("grid", step, GRID)
    second.metrics(3, {"held_out": 1.0})  # a key the first did not get to at this step
    assert second.run_id == first.run_id
    assert second.finish()
    run = client_of(uri).get_run(first.run_id)
    assert history(uri, first.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert history(uri, first.run_id, "seconds") == [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.2)]
    assert history(uri, first.run_id, "held_out") == [(3, 1.0)]
    assert sorted(pictures(uri, first.run_id)) == [".png"] * 3 + [".webp"] * 3
    assert run.info.status == "FINISHED"
    assert "reason" not in run.data.tags
    assert not [tag for tag in run.data.tags if tag.startswith("resumed.")]


def test_a_run_resumed_with_other_parameters_says_so_and_shows_both(tmp_path: Path, uri: str) -> None:
    first = journal_of(tmp_path, uri)
    first.metrics(1, {"loss": 1.0})
    first.finish("FAILED", "the loss is not finite")
    second = journal_of(tmp_path, uri, {"seed": 0, "generator.learning_rate": 5e-5, "steps": 9})
    second.metrics(1, {"loss": 0.5})
    assert second.finish()
    run = client_of(uri).get_run(first.run_id)
    assert run.data.params == {"seed": "0", "generator.learning_rate": "0.0001", "steps": "9"}
    assert run.data.tags["resumed.generator.learning_rate"] == "5e-05"
    assert "resumed.seed" not in run.data.tags
    assert history(uri, first.run_id) == [(1, 0.5), (1, 1.0)]


def test_sending_all_of_it_again_changes_nothing(tmp_path: Path, uri: str) -> None:
    tracker = journal_of(tmp_path, uri)
    for step in range(5):
        tracker.metrics(step, {"loss": float(step), "bad": float("nan")})
    tracker.image("grid", 3, GRID)
    tracker.finish("FAILED", "a reason")
    before = client_of(uri).get_run(tracker.run_id).to_dictionary()
    (tmp_path / "run/journal.ack").unlink()
    deliver(tmp_path / "run")
    (tmp_path / "run/journal.ack").write_text('{"offset": 10')
    deliver(tmp_path / "run")
    assert client_of(uri).get_run(tracker.run_id).to_dictionary() == before
    assert history(uri, tracker.run_id) == [(step, float(step)) for step in range(5)]
    assert sorted(pictures(uri, tracker.run_id)) == [".png", ".webp"]


def test_lines_lost_with_the_machine_do_not_hide_the_ones_that_follow(tmp_path: Path, uri: str) -> None:
    first = journal_of(tmp_path, uri)
    for step in range(50):
        first.metrics(step, {"loss": float(step)})
    assert first.finish()
    os.truncate(tmp_path / "run/journal.jsonl", 500)  # confirmed by MLflow, not by the disk
    second = journal_of(tmp_path, uri)
    second.metrics(50, {"loss": 50.0})
    assert second.finish()
    assert history(uri, first.run_id) == [(step, float(step)) for step in range(51)]


def test_a_run_whose_creation_was_not_confirmed_is_found_again(tmp_path: Path, uri: str) -> None:
    tracker = journal_of(tmp_path, uri)
    tracker.metrics(1, {"loss": 1.0})
    assert tracker.finish()
    (tmp_path / "run/mlflow.json").unlink()
    deliver(tmp_path / "run")
    assert len(client_of(uri).search_runs([client_of(uri).get_experiment_by_name("test").experiment_id])) == 1
    assert history(uri, tracker.run_id) == [(1, 1.0)]


@pytest.mark.parametrize("loss", ["another store", "deleted between", "deleted meanwhile"])
def test_a_run_mlflow_has_lost_is_made_anew_with_the_whole_journal(
    tmp_path: Path, uri: str, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = journal_of(tmp_path, uri)
    tracker.metrics(1, {"loss": 1.0})
    tracker.image("grid", 1, GRID)
    first = tracker.run_id
    if loss == "deleted meanwhile":
        while client_of(uri).get_run(first).data.metrics == {}:
            time.sleep(0.05)
        client_of(uri).delete_run(first)
        tracker.metrics(2, {"loss": 2.0})
    assert tracker.finish()
    if loss == "deleted between":
        client_of(uri).delete_run(first)
        deliver(tmp_path / "run")
    if loss == "another store":
        uri = f"sqlite:///{shutil.copy(tmp_path / 'mlflow.db', tmp_path / 'moved.db')}"
        client_of(uri).delete_run(first)
        deliver(tmp_path / "run", uri)
    second = json.loads((tmp_path / "run/mlflow.json").read_text())["run_id"]
    assert second != first
    assert history(uri, second)[0] == (1, 1.0)
    assert len(history(uri, second)) == 1 + (loss == "deleted meanwhile")
    assert sorted(pictures(uri, second)) == [".png", ".webp"]
    assert client_of(uri).get_run(second).info.status == "FINISHED"


def test_death_in_the_middle_of_a_line(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    code = """
import os, signal, sys
from diffinstruct.tracking.journal import Journal
tracker = Journal(sys.argv[1], "test", "a run", sys.argv[2], {}, {})
tracker.run_id
for step in range(200):
    tracker.metrics(step, {"loss": float(step)})
os.write(tracker._file, b'{"time": 1, "start": 5}\\n{"time": 1, "step": 200, "metr')
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code, uri, tmp_path / "run").wait(240) == -signal.SIGKILL
    deliver(tmp_path / "run")
    run_id = json.loads((tmp_path / "run/mlflow.json").read_text())["run_id"]
    assert history(uri, run_id) == [(step, float(step)) for step in range(200)]
    assert client_of(uri).get_run(run_id).info.status == "RUNNING"
    tracker = journal_of(tmp_path, params={})
    for step in range(190, 210):
        tracker.metrics(step, {"loss": float(step)})
    assert tracker.finish()
    assert tracker.run_id == run_id
    assert history(uri, run_id) == [(step, float(step)) for step in range(210)]
    assert client_of(uri).get_run(run_id).data.tags["kind"] == "test"  # the line after the torn one is whole
    assert len(warnings(caplog)) == 2  # of the start that is none, and of the torn one
    assert all("cannot be read" in line for line in warnings(caplog))


def test_a_stopped_trial_is_closed_by_another_process(tmp_path: Path, uri: str) -> None:
    code = """
import os, signal, sys
from diffinstruct.tracking.journal import Journal
tracker = Journal(sys.argv[1], "experiment", "run", sys.argv[2], {}, {})
tracker.metrics(1, {"loss": 1.0})
tracker.run_id
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code, uri, tmp_path / "run").wait(240) == -signal.SIGKILL
    deliver(tmp_path / "run", status="KILLED", reason="stopped by the scheduler")
    run = client_of(uri).get_run(json.loads((tmp_path / "run/mlflow.json").read_text())["run_id"])
    assert (run.info.status, run.data.tags["reason"]) == ("KILLED", "stopped by the scheduler")
    with pytest.raises(FileNotFoundError, match=r"journal\.jsonl"):
        deliver(tmp_path)


def test_lines_that_no_run_wrote_hold_nothing_up(tmp_path: Path, uri: str) -> None:
    (tmp_path / "run").mkdir()
    lines: list[dict] = [{"start": {}}, {"start": {"params": {"a": 5}}}, {"step": 1, "metrics": {"loss": 10**400}}]
    (tmp_path / "run/journal.jsonl").write_text("".join(json.dumps({"time": 1, **line}) + "\n" for line in lines))
    tracker = journal_of(tmp_path, uri)
    tracker.metrics(2, {"loss": 2.0})
    assert tracker.finish()
    assert [value.step for value in client_of(uri).get_metric_history(str(tracker.run_id), "loss")] == [2]


def test_two_that_meet_mlflow_at_once_make_one_run(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that could not reach it and a `sync`: both see that there is none, unless one waits for the other."""
    (tmp_path / "run").mkdir()
    start = {"journal": "a token", "uri": uri, "experiment": "test", "name": "a run", "params": {}, "tags": {}, "parent": None}
    (tmp_path / "run/journal.jsonl").write_text(json.dumps({"time": 1, "start": start}) + "\n")
    sound = type(client_of(uri)).search_runs

    def slow(*arguments: Any, **options: Any) -> Any:
        found = sound(*arguments, **options)
        time.sleep(1)
        return found

    monkeypatch.setattr(type(client_of(uri)), "search_runs", slow)
    both = [threading.Thread(target=deliver, args=(tmp_path / "run",)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    client = client_of(uri)
    assert len(sound(client, [client.get_experiment_by_name("test").experiment_id])) == 1


def test_what_breaks_in_a_run_that_was_ended_by_hand_is_no_failure(tmp_path: Path, uri: str) -> None:
    """Ctrl-C in the driver, and a worker that loses its reward actors meanwhile, in either order; until it starts
    again."""

    def status() -> str:
        return client_of(uri).get_run(tracker.run_id).info.status

    for worker_first in (False, True):
        tracker = journal_of(tmp_path, uri)
        tracker.metrics(1, {"loss": 1.0})
        if worker_first:
            tracker.finish("FAILED", "a reward actor is dead")
            deliver(tmp_path / "run", uri, "KILLED", "KeyboardInterrupt")
        else:
            deliver(tmp_path / "run", uri, "KILLED", "KeyboardInterrupt")
            tracker.finish("FAILED", "a reward actor is dead")
            deliver(tmp_path / "run", uri, "FAILED", "the workers are gone")
        assert status() == "KILLED"
    tracker = journal_of(tmp_path, uri)
    tracker.finish("FAILED", "its own fault")
    assert status() == "FAILED"


def test_what_mlflow_refuses_is_named_and_the_rest_arrives(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    tracker = journal_of(tmp_path, uri, {"k" * 300: 1, "seed": 0})
    for step in range(3):
        tracker.metrics(step, {"loss": 1.0, "a//b": 1.0, **{f"m{n}": 1.0 for n in range(1200)}})
    assert tracker.finish()
    run = client_of(uri).get_run(tracker.run_id)
    assert len(history(uri, tracker.run_id)) == len(history(uri, tracker.run_id, "m1199")) == 3
    assert run.data.params == {"seed": "0"}
    assert sorted(message.split(":")[0][:25] for message in warnings(caplog)) == [
        "MLflow refuses a//b",
        "MLflow refuses kkkkkkkkkk",
    ]


def test_a_file_store_that_refuses_does_not_hold_up_the_metrics(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def refused(*_: object) -> None:
        raise PermissionError("no credentials")

    monkeypatch.setattr(journal, "DELIVERY_WAIT_S", 1.0)
    (tmp_path / "table.csv").write_text("a,b")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", refused)
        tracker = journal_of(tmp_path, uri)
        tracker.artifact(tmp_path / "table.csv")
        tracker.artifact(tmp_path / "run/never_was.csv")
        tracker.metrics(1, {"loss": 1.0})
        while len(warnings(caplog)) < 2:
            time.sleep(0.05)
        assert not tracker.finish()
        with pytest.raises(RuntimeError, match="not all images or files"):
            deliver(tmp_path / "run")
    assert history(uri, tracker.run_id) == [(1, 1.0)]
    assert client_of(uri).get_run(tracker.run_id).info.status == "FINISHED"
    told = warnings(caplog)
    assert any("never_was.csv is gone" in message for message in told)
    assert sum("table.csv does not reach MLflow yet: PermissionError: no cred" in message for message in told) == 2
    deliver(tmp_path / "run")
    assert {file.path for file in client_of(uri).list_artifacts(tracker.run_id)} == {"table.csv"}


def test_a_full_disk_does_not_stop_training(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = journal_of(tmp_path, uri)
    write = os.write

    def half(file: int, line: bytes) -> int:
        return write(file, line[: len(line) // 2])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tracker.metrics(1, {"loss": 1.0})
    for failure in (half, full):
        with monkeypatch.context() as patch:
            patch.setattr(journal.os, "write", failure)
            tracker.metrics(2, {"loss": 2.0})
    tracker.metrics(3, {"loss": 3.0})
    assert tracker.finish()
    assert history(uri, tracker.run_id) == [(1, 1.0), (3, 3.0)]
    assert any("No space left on device" in message for message in warnings(caplog))


def test_nested_runs(tmp_path: Path, uri: str) -> None:
    parent = Journal(uri, "test", "sweep", tmp_path / "sweep", {"trials": 4}, {"kind": "sweep"})
    tracker = journal_of(tmp_path, uri, parent_run_id=parent.run_id)
    assert tracker.finish() and parent.finish("FAILED", "a trial died")
    run = client_of(uri).get_run(parent.run_id)
    assert (run.info.run_name, run.info.status, run.data.params) == ("sweep", "FAILED", {"trials": "4"})
    assert run.data.tags["reason"] == "a trial died"
    assert client_of(uri).get_run(tracker.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_without_a_server_training_goes_on_and_all_is_kept(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "DELIVERY_WAIT_S", 1.0)
    nowhere = f"http://user:a secret@127.0.0.1:{free_port()}/?access_token=secret"
    tracker = journal_of(tmp_path, nowhere)
    for step in range(100):
        tracker.metrics(step, {"loss": float(step)})
    tracker.image("grid", 0, GRID)
    assert tracker.run_id is None
    assert not tracker.finish()
    away, later = warnings(caplog)
    assert "Training goes on" in away
    assert "\n" not in away
    assert f"diffinstruct sync {tmp_path}/run" in later
    assert "secret" not in (tmp_path / "run/journal.jsonl").read_text() + tracker.url + str(warnings(caplog))
    deliver(tmp_path / "run", uri)
    run_id = json.loads((tmp_path / "run/mlflow.json").read_text())["run_id"]
    assert history(uri, run_id) == [(step, float(step)) for step in range(100)]
    assert client_of(uri).get_run(run_id).info.status == "FINISHED"


def test_the_end_of_a_run_waits_for_no_file(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for one that was journaled before, whose upload hangs; for that MLflow has all the time it takes."""
    import mlflow.environment_variables as variables
    from mlflow import MlflowClient

    may_end, timeouts, store = threading.Event(), [], MlflowClient.log_artifacts

    def slow(self: Any, *arguments: Any) -> None:
        timeouts.append(variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get())
        may_end.wait(100)
        store(self, *arguments)

    monkeypatch.setattr(MlflowClient, "log_artifacts", slow)
    monkeypatch.setattr(journal, "DELIVERY_WAIT_S", 1.0)
    monkeypatch.setattr(delivery, "INTERVAL", 1000.0)  # all of the journal is there at the next look
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    tracker = journal_of(tmp_path, uri)
    run_id = tracker.run_id
    (tmp_path / "run/export").mkdir()
    (tmp_path / "run/export/large").write_bytes(b"abc")
    tracker.artifact(tmp_path / "run/export")
    assert not tracker.finish()
    try:
        assert client_of(uri).get_run(run_id).info.status == "FINISHED"
    finally:
        may_end.set()
    tracker._threads[0].join()
    assert [file.path for file in client_of(uri).list_artifacts(run_id, "export")] == ["export/large"]
    assert timeouts == [60] and variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 10


def test_an_upload_has_time_for_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT, ENVIRONMENT[TIMEOUT])
    with (tmp_path / "model").open("wb") as file:
        file.truncate(10 * 2**30)
    with _time_for_upload(tmp_path):
        assert os.environ[TIMEOUT] == str(60 + 2048)
    monkeypatch.setenv(TIMEOUT, "7")
    with _time_for_upload(tmp_path):
        assert os.environ[TIMEOUT] == "7"  # as the user has it


@pytest.fixture
def server(raced: tuple[Path, Any], tmp_path: Path) -> Iterator[Server]:
    shutil.copy(raced[0], tmp_path / "mlflow.db")
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def test_a_server_that_comes_late_dies_and_comes_back(
    tmp_path: Path,
    server: Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(delivery, "INTERVAL", 0.2)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE", 1.0)
    monkeypatch.setattr(journal, "DELIVERY_WAIT_S", 240.0)
    caplog.set_level(logging.INFO, logger="diffinstruct.tracking")
    tracker = journal_of(tmp_path, server.uri)  # it is still starting
    steps = iter(range(100_000))
    written = []

    def train_until(condition: Any) -> None:
        deadline = time.monotonic() + 240  # a server starts in 10 s on a free machine
        while not condition():
            step = next(steps)
            tracker.metrics(step, {"loss": step / 7})
            written.append((step, step / 7))
            assert time.monotonic() < deadline
            time.sleep(0.05)

    train_until(lambda: any("answers again" in line for line in warnings(caplog)))
    run_id = tracker.run_id
    tracker.image("grid", 0, GRID)
    server.kill()
    train_until(lambda: sum("Training goes on" in message for message in warnings(caplog)) == 2)
    server.start()
    for step in (1, 2):
        tracker.image("grid", step, GRID)
    (tmp_path / "table.csv").write_text("a,b")
    tracker.artifact(tmp_path / "table.csv")
    assert tracker.finish()
    assert history(server.uri, run_id) == written
    assert sorted(pictures(server.uri, run_id)) == [".png"] * 3 + [".webp"] * 3
    run = client_of(server.uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert {file.path for file in client_of(server.uri).list_artifacts(run_id)} == {"images", "table.csv"}
    assert "".join(capfd.readouterr()) == ""  # the terminal belongs to the progress line
    assert tracker.url == f"{server.uri}/#/experiments/{run.info.experiment_id}/runs/{run_id}"


def test_a_step_waits_for_no_tracker(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    may_deliver, deliver_now = threading.Event(), MlflowDelivery.deliver

    def waiting(self: MlflowDelivery, final: bool) -> bool:
        may_deliver.wait(60)
        return deliver_now(self, final)

    monkeypatch.setattr(MlflowDelivery, "deliver", waiting)
    tracker = journal_of(tmp_path, uri)
    for step in range(500):
        tracker.metrics(step, {f"reward/{n}": n / 7 for n in range(20)})
    assert not may_deliver.is_set() and sum("metrics" in line for line in lines(tmp_path)) == 500
    may_deliver.set()
    assert tracker.finish()


def test_where_a_run_is_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(None, "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    assert tracking_uri(None, "runs") == f"sqlite:///{tmp_path}/mine.db"
    assert tracking_uri("http://127.0.0.1:5000", "runs") == "http://127.0.0.1:5000"
    assert tracking_uri("sqlite:////at/it.db", "runs") == "sqlite:////at/it.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg2://host/runs")
    assert tracking_uri(None, "runs") == "postgresql+psycopg2://host/runs"
    for uri in ("file:///a/mlruns", "./mlruns"):  # MLflow's own default of old
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI: should begin with one of http://, .*; a file is sqlite:"):
            tracking_uri(None, "runs")


def test_a_folder_may_be_called_as_it_likes(raced: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A ? would end the database's path, and %41 would be an A in it."""
    folder = tmp_path / "a?b=c 100%41#;'x"
    folder.mkdir()
    shutil.copy(raced[0], folder / "mlflow.db")
    uri = tracking_uri(None, folder)
    assert sqlite_path(uri) == folder / "mlflow.db"
    tracker = journal_of(folder, None)
    tracker.metrics(1, {"loss": 1.0})
    tracker.image("grid", 1, GRID)
    assert tracker.finish() and not warnings(caplog)
    assert history(uri, tracker.run_id) == [(1, 1.0)] and pictures(uri, tracker.run_id).count(".png") == 1
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]  # and no folder of the undecoded name
    assert json.loads((folder / "run" / "mlflow.json").read_text())["uri"] == uri


# ---------------------------------------------------------------------------------- what MLflow refuses for good
def refused(tracker: Journal, caplog: pytest.LogCaptureFixture) -> str:
    """What is said of a refusal, at once and once; the end of the run does not wait for another answer."""
    assert tracker.run_id is None
    for thread in tracker._threads:
        thread.join(100)
        assert not thread.is_alive()  # it does not ask again
    tracker.metrics(1, {"loss": 1.0})
    assert not tracker.finish()
    refusal, later = warnings(caplog)
    assert "diffinstruct sync" in later and "\n" not in refusal
    return refusal


def test_a_deleted_experiment_is_said_and_restored(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    client = client_of(uri)
    deleted = client.create_experiment("test")
    client.delete_experiment(deleted)
    said = refused(journal_of(tmp_path, uri), caplog)
    assert f"its experiment 'test' is deleted; `mlflow experiments restore --experiment-id {deleted}` brings it back" in said
    client.restore_experiment(deleted)
    deliver(tmp_path / "run")
    run_id = json.loads((tmp_path / "run/mlflow.json").read_text())["run_id"]
    assert history(uri, run_id) == [(1, 1.0)]


@pytest.mark.parametrize(("status", "said"), [(401, "wrong password"), (403, "may not write"), (404, "no MLflow server")])
def test_an_answer_that_stays_the_same_is_asked_for_once(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture, status: int, said: str
) -> None:
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"no")

        do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert said in refused(journal_of(tmp_path, f"http://127.0.0.1:{server.server_port}"), caplog)
    server.shutdown()
    assert len(asked) == 1


def test_a_folder_that_cannot_be_made_is_a_refusal(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    said = refused(journal_of(tmp_path, f"sqlite:///{tmp_path}/file/mlflow.db"), caplog)
    assert f"{tmp_path}/file" in said and "tracking.uri names another place" in said


@pytest.mark.parametrize(
    ("kind", "said"),
    [("text", "no sqlite database"), ("others", "no tables of MLflow's"), ("folder", "cannot be opened"),
     ("newer", "newer ones need that MLflow here")],
)  # fmt: skip
def test_a_file_that_is_no_database_of_ours_is_a_refusal(
    kind: str, said: str, raced: tuple[Path, Any], tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "other.db"
    if kind == "text":
        file.write_text("hello")
    elif kind == "folder":
        file.mkdir()
    else:
        if kind == "newer":
            shutil.copy(raced[0], file)
        statement = "UPDATE alembic_version SET version_num = 'f'" if kind == "newer" else "CREATE TABLE a (b)"
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute(statement)
    assert said in refused(journal_of(tmp_path, f"sqlite:///{file}"), caplog)


@pytest.mark.parametrize("address", ["postgresql+no_such_driver://host/db", "mssql+no_such_driver://host/db"])
def test_a_database_without_its_driver_is_a_refusal(address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "no_such_driver" in refused(journal_of(tmp_path, address), caplog)


def test_an_experiments_name_that_mlflow_does_not_take_is_a_refusal(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert "exceeds the maximum length" in refused(Journal(uri, "x" * 600, "a run", tmp_path / "run", {}, {}), caplog)


def test_an_empty_file_becomes_a_database(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mlflow.db").touch()
    with _prepared_database(f"sqlite:///{tmp_path}/mlflow.db"):
        assert (tmp_path / "mlflow.db").stat().st_size


# ------------------------------------------------------------------------------------------------ moved, elsewhere
PICTURE = """
import sys
import numpy as np
from diffinstruct.tracking import journal
journal.DELIVERY_WAIT_S = 100
tracker = journal.Journal(sys.argv[1], "test", "a run", sys.argv[2], {}, {})
tracker.image("grid", 1, np.zeros((8, 8, 3), np.uint8))
sys.exit(0 if tracker.finish() else 1)
"""


def test_a_folder_of_runs_that_was_moved_keeps_its_files_beside_its_database(
    raced: tuple[Path, Any], tmp_path: Path, uri: str
) -> None:
    runs, moved = tmp_path / "runs", tmp_path / "moved"
    runs.mkdir()
    shutil.copy(raced[0], runs / "mlflow.db")
    first = python(PICTURE, f"sqlite:///{runs}/mlflow.db", runs / "run")  # MLflow's client keeps addresses while it lives
    assert first.wait() == 0, first.communicate()
    runs.rename(moved)
    again = journal_of(moved, f"sqlite:///{moved}/mlflow.db", params={})
    again.image("grid", 2, GRID)
    assert again.finish() and not runs.exists()
    client = client_of(f"sqlite:///{moved}/mlflow.db")
    assert pictures(f"sqlite:///{moved}/mlflow.db", again.run_id).count(".png") == 2
    assert client.get_run(again.run_id).info.artifact_uri.startswith((moved / "mlartifacts").as_uri())


def test_a_run_that_goes_on_with_another_tracker_says_that_all_of_it_goes_there(
    raced: tuple[Path, Any], tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = journal_of(tmp_path, uri)
    first.metrics(1, {"loss": 1.0})
    assert first.finish() and not warnings(caplog)
    shutil.copy(raced[0], tmp_path / "other.db")
    other = f"sqlite:///{tmp_path}/other.db"
    second = journal_of(tmp_path, other)
    assert second.finish() and history(other, second.run_id) == [(1, 1.0)]
    assert warnings(caplog) == [f"{tmp_path}/run was tracked at {uri}; all of it goes to {other} now"]


def test_the_commit_is_that_of_the_users_repository_and_ours_by_name(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*command: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    theirs = git("rev-parse", "--short", "HEAD").strip()
    monkeypatch.chdir(tmp_path)
    found = journal.commits()
    assert found[journal.COMMIT] == theirs and found.get(journal.CODE_COMMIT) != theirs
    installed = tmp_path / "lib" / "journal.py"  # inside their repository, and not of it
    installed.parent.mkdir()
    installed.write_text("")
    monkeypatch.setattr(journal, "__file__", str(installed))
    assert journal.commits() == {journal.COMMIT: theirs}


# ------------------------------------------------------------------------------------------ files from outside a run
def test_a_run_that_has_ended_takes_more_files_and_stays_ended(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = journal_of(tmp_path, uri)
    tracker.metrics(1, {"loss": 1.0})
    assert tracker.finish()
    (tmp_path / "table.md").write_text("a table\n")
    attach(tmp_path / "run", tmp_path / "table.md")
    assert read_journal(tmp_path / "run")[-1]["artifact"] == "files/table.md"  # a copy: a delivery never leaves the folder
    client = client_of(uri)
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["table.md"]
    assert client.get_run(tracker.run_id).info.status == "FINISHED" and not caplog.records

    start = json.loads((tmp_path / "run/journal.jsonl").read_text().splitlines()[0])
    dead = (tmp_path / "run/journal.jsonl").read_text().replace(start["start"]["uri"], "http://127.0.0.1:9")  # gone since
    (tmp_path / "run/journal.jsonl").write_text(dead)
    attach(tmp_path / "run", tmp_path / "table.md")
    assert "what was added has not all reached MLflow" in caplog.text


@pytest.mark.parametrize("key", ["evaluated", "examined"])
def test_an_evaluation_is_added_once_and_arrives_from_old_journals_too(tmp_path: Path, uri: str, key: str) -> None:
    tracker = journal_of(tmp_path, uri)
    tracker.metrics(1, {"loss": 1.0})
    assert tracker.finish()
    if key == "examined":  # as the version before wrote it
        with (tmp_path / "run/journal.jsonl").open("a") as file:
            file.write(json.dumps({"time": 1, "step": 7, "examined": {"kid": 1.5, "bad": float("nan")}}) + "\n")
    for _ in range(2):
        add_evaluation(tmp_path / "run", uri, 7, {"kid": 1.5, "bad": float("nan")})
    assert history(uri, tracker.run_id, "eval/kid") == [(7, 1.5)]
    assert client_of(uri).get_run(tracker.run_id).data.tags["nonfinite.eval/bad"] == "7"
    assert sum(key in record for record in read_journal(tmp_path / "run")) == 1


def test_files_are_published_in_a_run_of_their_own(tmp_path: Path, uri: str) -> None:
    (tmp_path / "table.md").write_text("a table\n")
    publish(uri, "test", tmp_path / "the answer", tmp_path / "table.md")
    (tmp_path / "table.md").write_text("a better table\n")
    publish(uri, "test", tmp_path / "the answer", tmp_path / "table.md")
    client = client_of(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert (run.info.run_name, run.info.status) == ("the answer", "FINISHED")
    (file,) = client.list_artifacts(run.info.run_id)
    assert (file.path, file.file_size) == ("table.md", len("a better table\n"))


def test_a_death_while_the_tables_are_made_spoils_nothing(tmp_path: Path) -> None:
    """MLflow's migration takes seconds and cannot be mended: a killed first run must not keep the next from its
    database."""
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    code = """
import os, signal, sys, threading, time
from diffinstruct.tracking.journal import Journal
def kill():
    file = sys.argv[1].removeprefix("sqlite:///") + ".tmp"
    while not (os.path.exists(file) and os.path.getsize(file) > 40_000):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
os.makedirs(os.path.dirname(sys.argv[1].removeprefix("sqlite:///")))
threading.Thread(target=kill).start()
Journal(sys.argv[1], "test", "first", sys.argv[2], {}, {}).finish()
"""
    assert python(code, uri, tmp_path / "first").wait(240) == -signal.SIGKILL
    assert not (tmp_path / "runs" / "mlflow.db").exists()
    second = Journal(uri, "test", "second", tmp_path / "second", {}, {})
    assert second.run_id and client_of(uri).get_run(second.run_id).info.run_name == "second"
    assert second.finish()
