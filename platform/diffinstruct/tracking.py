"""The journal of a run, and its delivery to MLflow. Training writes a line to a file and goes on; a thread does the rest.

    <run>/journal.jsonl   one JSON object a line, appended, never rewritten; each has "time" (ms) and one of
                          "start": {...}   who the run is; another one at each resume
                          "metrics": {key: value}, "step": n        (Python's JSON: NaN and Infinity are kept as such)
                          "image": "images/....png", "key": ..., "step": n
                          "event": kind, "step": n, "text": ...     (MLflow has the last of a kind in the tag event.<kind>)
                                "back_to": n      steps after this one are measured once more, and count as then measured
                          "artifact": path                          (relative to the run's folder, in which it lies)
                          "finish": status, "reason": ...
    <run>/journal.ack     how far MLflow has confirmed it: {"offset": bytes, "postponed": [offsets of pictures and files]}
    <run>/mlflow.json     the MLflow run: uri, experiment_id, run_id

What MLflow has not confirmed is sent again: by the thread, at the next start in the same folder, or by `deliver(folder)`.
Sending twice changes nothing (a metric is the same row if key, step, time and value are the same; a picture that is
there is not sent again), so everything arrives exactly once. A run that MLflow does not know (any more) is made anew
and gets the whole journal.

MLflow turns inf into 1.8e308, so values that are not finite are not sent: the tag `nonfinite.<key>` holds the first such
step, the journal the value. Parameters are write-once: where a resumed run differs, the tag `resumed.<key>` says how.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import shlex
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

import numpy as np

from diffinstruct.experiment import UserError, keeps_nothing, load, spelled, without_password

logger = logging.getLogger(__name__)

INTERVAL = 2.0  # seconds between deliveries; on sqlite a batch of 20 values costs 12 ms of CPU, one of 200 30 ms
LONGEST_PAUSE = 30.0  # seconds between two attempts while MLflow does not answer
POSTPONED_AGAIN = 60.0  # seconds until pictures and files that could not be stored are tried again
HURRY = 1.0  # seconds it waits where somebody has asked twice
PATIENCE = 20.0  # seconds `finish` waits for a server; six times that for a file, which is there however slow
LIMITS = {"Metric": 1000, "Param": 100, "RunTag": 100}  # entities MLflow takes in a batch
LONGEST_PARAM, LONGEST_TAG = 6000, 5000  # characters; what is longer is cut
COMMIT = "mlflow.source.git.commit"
"""The tag that MLflow's pages show as a run's version."""
ENVIRONMENT = {  # of this process, where the user has not said otherwise: fail fast, the journal is what waits
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def tracking_uri(uri: str | None, runs: Path | str) -> str:
    """Where a run is tracked: `uri`, else MLFLOW_TRACKING_URI, else `mlflow.db` in `runs`; sqlite paths made absolute.

    Ask in the process the user started: Ray's workers have other folders and another environment.
    """
    uri = spelled(uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(runs).absolute() / 'mlflow.db'}")
    if keeps_nothing(uri):
        raise UserError(f"tracking.uri: {uri} is in memory and keeps nothing; a file is sqlite:///PATH")
    return f"sqlite:///{Path(path).absolute()}" if (path := uri.removeprefix("sqlite:///")) != uri else uri


class Parent(NamedTuple):
    """Where in MLflow a run stands that is not by itself: under `run_id` (None: there was no answer), with the name `child`."""

    run_id: str | None
    child: str


class Tracker:
    """One run's journal, delivered to MLflow by a thread. No method waits for MLflow but `run_id` and `finish`.

    A folder that has a journal is a resumed run: the same MLflow run goes on. If its parameters are the same, the steps
    between the checkpoint and the crash are not journaled a second time.
    """

    def __init__(
        self,
        uri: str | None,
        experiment_name: str,
        run_name: str,
        run_folder: Path | str,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        parent_run_id: str | None = None,
    ) -> None:
        self.folder = Path(run_folder).absolute()
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        self.uri = tracking_uri(uri, self.folder.parent)
        start = {
            "journal": uuid.uuid4().hex,  # by it the run is found again if the answer to its creation was lost
            "uri": without_password(self.uri),
            "experiment": experiment_name,
            "name": run_name,
            "params": {key: str(value) for key, value in params.items()},
            "tags": {key: str(value) for key, value in tags.items()} | commit_of_code(),
            "parent": parent_run_id,
        }
        journal = self.folder / "journal.jsonl"
        before = [record for _, _, record in records(journal)]
        starts = [record["start"] for record in before if _begins(record)]
        self._seen: dict[int, set[str]] = {}  # keys the journal has, by step
        if starts:
            start["journal"] = starts[-1]["journal"]
        if starts and starts[-1]["params"] == start["params"]:
            for record in before:
                if "back_to" in record:
                    self._forget(record["back_to"])
                elif "step" in record:
                    once = f"event:{record['event']}" if "event" in record else f"image:{record.get('key')}"
                    self._seen.setdefault(record["step"], set()).update(record.get("metrics") or [once])
        torn = journal.exists() and not journal.read_bytes().endswith(b"\n")
        self._file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._separator = b"\n" if torn else b""
        self._append({"start": start})
        self._delivery, self._complete = _Delivery(self.folder, self.uri), False
        self._finishing, self._answered = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Journals `values` (floats or 0-d tensors) of `step`."""
        seen = self._seen.get(step, ())
        if fresh := {key: float(value) for key, value in values.items() if key not in seen}:
            self._append({"step": int(step), "metrics": fresh})

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """Stores an image (uint8, [H, W, 3]) in the run's folder and journals it. One key has a step slider in MLflow."""
        from PIL import Image

        if f"image:{key}" not in self._seen.get(step, ()):
            path = f"images/{_name(key).replace('/', '~')}-{step:08d}.png"
            try:
                Image.fromarray(pixels).save(self.folder / path, compress_level=1)  # the quickest
            except OSError as error:
                logger.warning("%s is not drawn (%s); training goes on", self.folder / path, error)
            else:
                self._append({"step": int(step), "key": key, "image": path})

    def event(self, step: int, kind: str, text: str) -> None:
        """Journals that something has happened, at most once of a kind and step."""
        if f"event:{kind}" not in self._seen.get(step, ()):
            self._append({"step": int(step), "event": kind, "text": text})

    def back_to(self, step: int, at: int, text: str) -> None:
        """Journals that the run has gone back from `at` to an earlier step, and comes by the steps between once more."""
        self._forget(step)
        self._append({"step": int(at), "event": "back_to", "text": text, "back_to": int(step)})

    def _forget(self, step: int) -> None:
        self._seen = {of: keys for of, keys in self._seen.items() if of <= step}

    def artifact(self, path: Path | str) -> None:
        """Journals a file, or a folder in the run's own, to be stored under its own name. It is read when it is delivered."""
        self._append({"artifact": _kept(self.folder, Path(path))})

    def finish(self, status: str = "FINISHED", reason: str | None = None, hurry: bool = False) -> bool:
        """Ends the run as FINISHED, FAILED or KILLED and waits a while (PATIENCE) for the delivery; whether all of it arrived.
        In a `hurry`, since somebody has asked twice, for HURRY seconds.

        What did not arrive is kept; one warning says how to deliver it.
        """
        if not self._finishing.is_set():
            if not _after_the_end(self.folder, status):
                self._append({"finish": status, "reason": reason})
            self._finishing.set()
            self._thread.join(HURRY if hurry else PATIENCE if self.uri.startswith("http") else 6 * PATIENCE)
            if not self._complete:
                how = f"diffinstruct sync {shlex.quote(str(self.folder))}"
                logger.warning("not all of this run has reached MLflow; later: %s", how)
        return self._complete

    @property
    def run_id(self) -> str | None:
        """The MLflow run; waits until MLflow has answered once. None while it has not given one."""
        self._answered.wait()
        return self._delivery.run_id

    @property
    def url(self) -> str:
        """The line to print: the run's page on a server (the server's, until the run is known), or how to open the file."""
        if self.uri.startswith("sqlite:"):
            return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}"
        page = f"/#/experiments/{self._delivery.experiment_id}/runs/{self._delivery.run_id}"
        return without_password(self.uri).rstrip("/") + (page if self._delivery.run_id else "")

    def _append(self, record: dict[str, Any]) -> None:
        line = self._separator + json.dumps({"time": int(time.time() * 1000), **record}).encode() + b"\n"
        try:
            written = os.write(self._file, line)  # one write: lines of two processes do not mix, a kill loses at most one
            why = "it took a part of it"
        except OSError as error:
            written, why = 0, str(error)
        if written < len(line):
            logger.warning("the journal of %s does not take a line (%s); training goes on", self.folder, why)
        self._separator = b"" if written == len(line) else b"\n"

    def _deliver(self) -> None:
        """The thread: deliver, pause, until the journal is finished and confirmed. While MLflow is away, ever more rarely."""
        pause, away = INTERVAL, False
        while not self._complete:
            finishing = self._finishing.is_set()
            try:
                self._delivery.connect()
                self._answered.set()
                self._complete = self._delivery.pump(everything=finishing) and finishing
                if away:
                    logger.info("MLflow answers again")
                pause, away = INTERVAL, False
            except Exception as error:  # whatever it is, training must not hear of it
                self._answered.set()
                if not away:
                    logger.warning(
                        "MLflow (%s) does not take this run's data: %s. Training goes on, %s keeps them until it does",
                        without_password(self.uri),
                        in_one_line(error),
                        self._delivery.journal,
                    )
                pause, away = min(2 * pause, LONGEST_PAUSE) if away else 1.0, True
            if finishing and not self._complete:
                time.sleep(0.5)
            self._finishing.wait(pause)


def deliver(run_folder: Path | str, uri: str | None = None, status: str | None = None, reason: str | None = None) -> None:
    """Sends what a run's journal still holds; nothing if there is nothing. Raises whatever keeps it from arriving.

    `uri` where it is not the one the run began with (a password in a URI is not stored), or nobody but the journal names
    it. `status` ends a run that could not do so itself, such as a trial that a scheduler stopped.
    """
    folder = Path(run_folder).absolute()
    if status and not _after_the_end(folder, status):
        _add(folder, {"finish": status, "reason": reason})
    delivery = _Delivery(folder, uri)
    delivery.connect()
    if not delivery.pump(everything=True):
        raise RuntimeError(f"{len(delivery.postponed)} pictures or files of {folder} could not be stored in MLflow")


def undelivered(run_folder: Path | str) -> int:
    """Bytes of a run's journal that MLflow has not confirmed."""
    folder = Path(run_folder)
    return (folder / "journal.jsonl").stat().st_size - int(_read_json(folder / "journal.ack").get("offset", 0))


def attach(run_folder: Path | str, *paths: Path) -> None:
    """Adds files to a run that has ended: journaled, then delivered; a warning where MLflow does not take them now."""
    folder = Path(run_folder).absolute()
    for path in paths:
        _add(folder, {"artifact": _kept(folder, path)})
    _deliver_now(folder)


def add_examination(run_folder: Path | str, uri: str | None, step: int, figures: Mapping[str, float]) -> None:
    """Adds what was found on examination to a run that has ended, once: in MLflow these are metrics `examined/...`."""
    folder = Path(run_folder).absolute()
    if not any("examined" in record for record in read_journal(folder)):
        _add(folder, {"step": step, "examined": dict(figures)})
    _deliver_now(folder, uri)


def _deliver_now(folder: Path, uri: str | None = None) -> None:
    try:
        deliver(folder, uri)
    except Exception as error:
        logger.warning("%s: what was added has not all reached MLflow: %s", folder, in_one_line(error))


def commit_of_code() -> dict[str, str]:
    """The tag COMMIT, "-dirty" where files other than docs (a study's rows) differ; nothing where git knows of no commit."""
    git = ["git", "-C", str(Path(__file__).parent)]

    def said(*command: str) -> str:
        try:
            return subprocess.run([*git, *command], capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = said("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/docs")
    return {COMMIT: commit + "-dirty" * bool(changed)} if (commit := said("rev-parse", "--short", "HEAD")) else {}


def read_journal(run_folder: Path | str) -> list[dict[str, Any]]:
    """The records of a run's journal, in order. A line that cannot be read is left out, with a warning if it is a whole one."""
    journal = Path(run_folder) / "journal.jsonl"
    found = [(begin, end, record if "time" in record else {}) for begin, end, record in records(journal)]
    for begin in (begin for begin, end, record in found if not record and end > begin + 1):
        logger.warning("%s: the line at byte %d cannot be read and is left out", journal, begin)
    return [record for _, _, record in found if record]


def _after_the_end(folder: Path, status: str) -> bool:
    """Whether somebody has ended the run since it was last started: what breaks in it after that is no failure."""
    marks = [record for _, _, record in records(folder / "journal.jsonl") if record.keys() & {"start", "finish"}]
    return status == "FAILED" and bool(marks) and marks[-1].get("finish") == "KILLED"


def _kept(folder: Path, path: Path) -> str:
    """How a run's journal names a file; one from elsewhere is copied first: a delivery reads nothing outside of the folder."""
    if not path.absolute().is_relative_to(folder):
        (folder / "files").mkdir(exist_ok=True)
        path = Path(shutil.copy(path, folder / "files"))
    return str(path.absolute().relative_to(folder))


def _add(folder: Path, record: dict[str, Any]) -> None:
    """A line in the journal of a run whose own process is gone; the line before it may be torn."""
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(b"\n" + json.dumps({"time": int(time.time() * 1000), **record}).encode() + b"\n")


def publish(uri: str, experiment_name: str, folder: Path, *paths: Path) -> None:
    """A finished run, kept in `folder` and named like it, that holds files only. The same call again replaces them."""
    tracker = Tracker(uri, experiment_name, folder.name, folder, {}, {})
    for path in paths:
        tracker.artifact(path)
    tracker.finish()


class _Delivery:
    """Brings a journal to MLflow. A function of the run's folder alone, so anybody can go on with it."""

    def __init__(self, folder: Path, uri: str | None) -> None:
        self.folder, self.journal = folder, folder / "journal.jsonl"
        self.uri = uri and spelled(uri)
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self.offset = 0
        self.postponed: list[int] = []
        self._postponed_again = 0.0
        self._client: Any = None
        self._nonfinite: set[str] = set()  # keys whose first step without a finite value has been told
        self._refused: set[str] = set()  # what has been reported as not taken

    def connect(self) -> None:
        """Finds the journal's run, or makes it, and what of the journal it has. Nothing if that is known."""
        if self._client is not None:
            return
        with self.journal.open("r+b") as file:
            with suppress(OSError):  # not every disk knows locks
                fcntl.flock(file, fcntl.LOCK_EX)  # a run and a `sync` that meet MLflow at once would make a run each
            self._connect()

    def _connect(self) -> None:
        starts = [(record["start"], record["time"]) for _, _, record in records(self.journal) if _begins(record)]
        if not starts:
            raise FileNotFoundError(f"{self.journal} does not hold a run")
        (_, began), (start, _) = starts[0], starts[-1]
        self.uri = self.uri or self._server(without_password(start["uri"]))
        client, experiment_id = _open(self.uri, start["experiment"])
        known = _read_json(self.folder / "mlflow.json").get("run_id")
        run = _active_run(client, known)
        if run is None:
            token = start["journal"]
            found = client.search_runs([experiment_id], f"tags.journal = '{token}'", max_results=1)
            parent = {"mlflow.parentRunId": start["parent"]} if start["parent"] else {}
            tags = {"journal": token, **parent}
            run = found[0] if found else client.create_run(experiment_id, began, tags=tags, run_name=start["name"])
        confirmed = _read_json(self.folder / "journal.ack") if run.info.run_id == known else {}
        self.offset, self.postponed = confirmed.get("offset", 0), confirmed.get("postponed", [])
        if self.offset > self.journal.stat().st_size:  # lines confirmed, then lost with the machine's memory
            self.offset, self.postponed = 0, []
        self._confirm(self.offset)
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        where = {"uri": without_password(self.uri), "experiment_id": self.experiment_id, "run_id": self.run_id}
        _replace(self.folder / "mlflow.json", where)
        self._nonfinite = {tag for tag in run.data.tags if tag.startswith("nonfinite.")}
        self._client = client

    def _server(self, named: str) -> str:
        """What the journal names, with its password. Journals come from others, too: a server gets files and MLflow's
        password only where the environment or the recipe names it as well. An sqlite file is no server."""
        own, recipe = spelled(os.environ.get("MLFLOW_TRACKING_URI", "")), self.folder / "experiment.yaml"
        if named == without_password(own):
            return own
        if named.startswith("sqlite:///"):
            return named
        asked = load(recipe).tracking.uri if recipe.is_file() else None
        if named != asked:
            there = without_password(tracking_uri(asked, self.folder.parent))
            raise UserError(f"{self.journal}: uri: {named!r} is not where the run would be tracked, {there!r}: --uri decides")
        return named

    def pump(self, everything: bool) -> bool:
        """Delivers all complete lines that are not confirmed; whether no picture or file had to be postponed.

        Raises what MLflow raises; what was confirmed stays so. `everything`: try what was postponed now.
        """
        try:
            batch: list[Any] = []
            end = self.offset
            for begin, end, record in records(self.journal, self.offset):
                if "metrics" in record:
                    batch += self._measured(record)
                    if len(batch) < LIMITS["Metric"]:
                        continue
                self._send(batch)
                batch = []
                if "image" in record or "artifact" in record:
                    self._store(begin, record)
                elif "examined" in record:
                    figures = {f"examined/{key}": value for key, value in record["examined"].items()}
                    self._send(self._measured({**record, "metrics": figures}))
                elif "event" in record:
                    self._send(_entities(tags={f"event.{record['event']}": f"step {record['step']}: {record['text']}"}))
                elif _begins(record):
                    self._start(record["start"])
                elif "finish" in record:
                    _finish(self._client, self.run_id, record["finish"], record["reason"], record["time"])
                elif "metrics" not in record and begin + 1 < end:
                    logger.warning("%s: the line at byte %d cannot be read and is left out", self.journal, begin)
                self._confirm(end)
            if end > self.offset:
                self._send(batch)
                self._confirm(end)
            if self.postponed and (everything or time.monotonic() > self._postponed_again):
                for begin in list(self.postponed):
                    _, _, record = next(records(self.journal, begin))
                    self._store(begin, record)
                    self._confirm(self.offset)
                    if begin in self.postponed:
                        break  # one attempt may take long
            return not self.postponed
        except Exception:
            self._client = None  # look again whether the run is still there
            raise

    def _measured(self, record: dict[str, Any]) -> list[Any]:
        finite = {key: value for key, value in record["metrics"].items() if math.isfinite(value)}
        tags = {f"nonfinite.{_name(key)}": record["step"] for key in record["metrics"] if key not in finite}
        first = {tag: step for tag, step in tags.items() if tag not in self._nonfinite}
        self._nonfinite.update(first)
        return _entities(metrics=finite, tags=first, step=record["step"], at=record["time"])

    def _start(self, start: dict[str, Any]) -> None:
        run = self._client.get_run(self.run_id)
        asked = {_name(key): value[:LONGEST_PARAM] for key, value in start["params"].items()}
        changed = {f"resumed.{key}": value for key, value in asked.items() if run.data.params.get(key, value) != value}
        new = {key: value for key, value in asked.items() if key not in run.data.params}
        self._send(_entities(params=new, tags={**start["tags"], **changed}))
        if run.info.status != "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        if "reason" in run.data.tags:  # why it had ended
            self._client.delete_tag(self.run_id, "reason")

    def _store(self, begin: int, record: dict[str, Any]) -> None:
        """A picture or file. What holds one up (a store without credentials, say) must not hold up the metrics."""
        path = self.folder / (record.get("image") or record["artifact"])
        if begin in self.postponed:
            self.postponed.remove(begin)
        try:
            if not path.exists():
                logger.warning("%s is gone and does not reach MLflow", path)
            elif not all(file.resolve().is_relative_to(self.folder.resolve()) for file in (path, *path.rglob("*"))):
                logger.warning("%r is, or leads, outside of the run's folder and does not reach MLflow", str(path))
            elif "image" in record:
                self._image(path, record)
            elif path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), path.name)
            else:
                self._client.log_artifact(self.run_id, str(path))
        except Exception as error:
            self.postponed.append(begin)
            self._postponed_again = time.monotonic() + POSTPONED_AGAIN
            if str(path) not in self._refused:
                self._refused.add(str(path))
                logger.warning("%s does not reach MLflow yet: %s", path, in_one_line(error))

    def _image(self, path: Path, record: dict[str, Any]) -> None:
        from PIL import Image

        key, step, at = _name(record["key"]), record["step"], record["time"]
        # MLflow gives each picture a new name; its thumbnail comes last, so where that one is, the picture is
        sent = f"images/{key.replace('/', '~')}+step+{step}+timestamp+{at}+"
        there = [file.path for file in self._client.list_artifacts(self.run_id, "images")]
        if any(name.startswith(sent) and name.endswith("+compressed.webp") for name in there):
            self._client.set_tag(self.run_id, "mlflow.loggedImages", True)
            return
        with Image.open(path) as image:
            self._client.log_image(self.run_id, image, key=key, step=step, timestamp=at)

    def _send(self, entities: list[Any]) -> None:
        _send(self._client, self.run_id, entities, self._refused)

    def _confirm(self, offset: int) -> None:
        self.offset = offset
        _replace(self.folder / "journal.ack", {"offset": offset, "postponed": self.postponed})


def _open(uri: str, experiment_name: str | None = None) -> tuple[Any, str | None]:
    """(client, experiment id). One process at a time on an sqlite file: two that create its tables at once both fail."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with _alone(uri) as artifacts:
        client = MlflowClient(uri)
        if experiment_name is None:
            return client, None
        if (experiment := client.get_experiment_by_name(experiment_name)) is None:
            try:
                return client, client.create_experiment(experiment_name, artifact_location=artifacts)
            except MlflowException as error:  # on a server, another client may have been faster
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(experiment_name)
        return client, experiment.experiment_id


@contextmanager
def _alone(uri: str) -> Iterator[str | None]:
    """Where artifacts of new experiments go, absolute, beside an sqlite file, which is locked. None: the server decides."""
    if (database := uri.removeprefix("sqlite:///")) == uri:
        yield None
        return
    Path(database).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not Path(database).exists():
            # MLflow takes seconds to make its tables and never mends a file that it was killed over: make it aside.
            from mlflow import MlflowClient

            for left_over in (f"{database}.tmp", f"{database}.tmp-journal"):
                Path(left_over).unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{database}.tmp").search_experiments(max_results=1)
            os.replace(f"{database}.tmp", database)
        yield (Path(database).absolute().parent / "mlartifacts").as_uri()


def _active_run(client: Any, run_id: str | None) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run and run.info.lifecycle_stage == "active" else None


def _entities(
    metrics: Mapping[str, float] | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    step: int = 0,
    at: int = 0,
) -> list[Any]:
    """MLflow's own objects, names and lengths as it takes them."""
    from mlflow.entities import Metric, Param, RunTag

    return [
        *(Metric(_name(key), value, at, step) for key, value in (metrics or {}).items()),
        *(Param(_name(key), str(value)[:LONGEST_PARAM]) for key, value in (params or {}).items()),
        *(RunTag(_name(key), str(value)[:LONGEST_TAG]) for key, value in (tags or {}).items()),
    ]


def _send(client: Any, run_id: str | None, entities: list[Any], refused: set[str]) -> None:
    """`log_batch` in pieces MLflow takes. What it refuses for good is narrowed down by halves, named once, and left out."""
    from mlflow.exceptions import MlflowException

    if not entities:
        return
    half = len(entities) // 2
    kinds = {kind: [entity for entity in entities if type(entity).__name__ == kind] for kind in LIMITS}
    if len(entities) <= LIMITS["Metric"] and all(len(kinds[kind]) <= limit for kind, limit in LIMITS.items()):
        try:
            client.log_batch(run_id, kinds["Metric"], kinds["Param"], kinds["RunTag"])
            return
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE" or _active_run(client, run_id) is None:
                raise
            if not half:
                if entities[0].key not in refused:
                    refused.add(entities[0].key)
                    logger.warning("MLflow refuses %s: %s", entities[0].key, in_one_line(error))
                return
    _send(client, run_id, entities[:half], refused)
    _send(client, run_id, entities[half:], refused)


def _finish(client: Any, run_id: str | None, status: str, reason: str | None, at: int) -> None:
    if reason:
        client.set_tag(run_id, "reason", reason[:LONGEST_TAG])
    client.set_terminated(run_id, status, at)


def records(journal: Path, offset: int = 0) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(first byte, byte after the end, record) of each complete line from `offset` on; {} for one that cannot be read."""
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
    if not isinstance(record, dict) or not all(isinstance(record[key], TYPES[key]) for key in record.keys() & TYPES.keys()):
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


def _begins(record: dict[str, Any]) -> bool:
    """Whether it says all that a run in MLflow is made of."""
    return record.get("start", {}).keys() >= OF_A_START.keys()


def _read_json(path: Path) -> dict[str, Any]:
    """{} if it is not there or not whole: what these files hold can be found again."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _replace(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.{threading.get_native_id()}.tmp")  # two may deliver the same journal
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def _name(key: str) -> str:
    """A key in the characters MLflow takes for metrics and pictures alike."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)


def in_one_line(error: Exception) -> str:
    return without_password(f"{type(error).__name__}: {' '.join(str(error).split())}")[:200]
