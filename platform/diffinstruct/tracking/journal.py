"""The journal of a run, and its delivery to MLflow. Training writes a line to a file and goes on; a thread does the
rest.

    <run>/journal.jsonl   one JSON object a line, appended, never rewritten; each has "time" (ms) and one of
                          "start": {...}   who the run is; another one at each resume
                          "metrics": {key: value}, "step": n        (Python's JSON: NaN and Infinity are kept as such)
                          "image": "images/....png", "key": ..., "step": n
                          "event": kind, "step": n, "text": ...     (MLflow has the last of a kind in the tag
                          event.<kind>)
                                "back_to": n      steps after this one are measured once more, and count as then
                                measured
                          "artifact": path                          (relative to the run's folder, in which it lies)
                          "finish": status, "reason": ...
    <run>/journal.ack     how far MLflow has confirmed it: {"offset": bytes, "postponed": [offsets of pictures and
    files]}
    <run>/mlflow.json     the MLflow run: uri, experiment_id, run_id

What MLflow has not confirmed is sent again: by the thread, at the next start in the same folder, or by
`deliver(folder)`. Sending twice changes nothing (a metric is the same row if key, step, time and value are the same; a
picture that is there is not sent again), so everything arrives exactly once. A run that MLflow does not know (any more)
is made anew and gets the whole journal.

MLflow turns inf into 1.8e308, so values that are not finite are not sent: the tag `nonfinite.<key>` holds the first
such step, the journal the value. Parameters are write-once: where a resumed run differs, the tag `resumed.<key>` says
how.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffinstruct.config.addresses import one_line, redact, tracking_uri
from diffinstruct.tracking.mlflow import MlflowDelivery, mlflow_key
from diffinstruct.tracking.records import is_start, read_journal, read_json, records

logger = logging.getLogger(__name__)

INTERVAL = 2.0  # seconds between deliveries; on sqlite a batch of 20 values costs 12 ms of CPU, one of 200 30 ms
LONGEST_PAUSE = 30.0  # seconds between two attempts while MLflow does not answer
HURRY = 1.0  # seconds it waits where somebody has asked twice
PATIENCE = 20.0  # seconds `finish` waits for a server; six times that for a file, which is there however slow
COMMIT = "mlflow.source.git.commit"
"""The tag that MLflow's pages show as a run's version."""


class Parent(NamedTuple):
    """Where in MLflow a run stands that is not by itself: under `run_id` (None: there was no answer), with the name
    `child`."""

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
            "uri": redact(self.uri),
            "experiment": experiment_name,
            "name": run_name,
            "params": {key: str(value) for key, value in params.items()},
            "tags": {key: str(value) for key, value in tags.items()} | commit_of_code(),
            "parent": parent_run_id,
        }
        journal = self.folder / "journal.jsonl"
        before = [record for _, _, record in records(journal)]
        starts = [record["start"] for record in before if is_start(record)]
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
        self._delivery, self._complete = MlflowDelivery(self.folder, self.uri), False
        self._finishing, self._answered = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Journals `values` (floats or 0-d tensors) of `step`."""
        seen = self._seen.get(step, ())
        if fresh := {key: float(value) for key, value in values.items() if key not in seen}:
            self._append({"step": int(step), "metrics": fresh})

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """Stores an image (uint8, [H, W, 3]) in the run's folder and journals it. One key has a step slider in
        MLflow."""
        from PIL import Image

        if f"image:{key}" not in self._seen.get(step, ()):
            path = f"images/{mlflow_key(key).replace('/', '~')}-{step:08d}.png"
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
        """Journals that the run has gone back from `at` to an earlier step, and comes by the steps between once
        more."""
        self._forget(step)
        self._append({"step": int(at), "event": "back_to", "text": text, "back_to": int(step)})

    def _forget(self, step: int) -> None:
        self._seen = {of: keys for of, keys in self._seen.items() if of <= step}

    def artifact(self, path: Path | str) -> None:
        """Journals a file, or a folder in the run's own, to be stored under its own name. It is read when it is
        delivered."""
        self._append({"artifact": _kept(self.folder, Path(path))})

    def finish(self, status: str = "FINISHED", reason: str | None = None, hurry: bool = False) -> bool:
        """Ends the run as FINISHED, FAILED or KILLED and waits a while (PATIENCE) for the delivery; whether all of it
        arrived. In a `hurry`, since somebody has asked twice, for HURRY seconds.

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
        """The line to print: the run's page on a server (the server's, until the run is known), or how to open the
        file."""
        if self.uri.startswith("sqlite:"):
            return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}"
        page = f"/#/experiments/{self._delivery.experiment_id}/runs/{self._delivery.run_id}"
        return redact(self.uri).rstrip("/") + (page if self._delivery.run_id else "")

    def _append(self, record: dict[str, Any]) -> None:
        line = self._separator + json.dumps({"time": int(time.time() * 1000), **record}).encode() + b"\n"
        try:
            written = os.write(
                self._file, line
            )  # one write: lines of two processes do not mix, a kill loses at most one
            why = "it took a part of it"
        except OSError as error:
            written, why = 0, str(error)
        if written < len(line):
            logger.warning("the journal of %s does not take a line (%s); training goes on", self.folder, why)
        self._separator = b"" if written == len(line) else b"\n"

    def _deliver(self) -> None:
        """The thread: deliver, pause, until the journal is finished and confirmed. While MLflow is away, ever more
        rarely."""
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
                        redact(self.uri),
                        one_line(error),
                        self._delivery.journal,
                    )
                pause, away = min(2 * pause, LONGEST_PAUSE) if away else 1.0, True
            if finishing and not self._complete:
                time.sleep(0.5)
            self._finishing.wait(pause)


def deliver(
    run_folder: Path | str, uri: str | None = None, status: str | None = None, reason: str | None = None
) -> None:
    """Sends what a run's journal still holds; nothing if there is nothing. Raises whatever keeps it from arriving.

    `uri` where it is not the one the run began with (a password in a URI is not stored), or nobody but the journal
    names it. `status` ends a run that could not do so itself, such as a trial that a scheduler stopped.
    """
    folder = Path(run_folder).absolute()
    if status and not _after_the_end(folder, status):
        _add(folder, {"finish": status, "reason": reason})
    delivery = MlflowDelivery(folder, uri)
    delivery.connect()
    if not delivery.pump(everything=True):
        raise RuntimeError(f"{len(delivery.postponed)} pictures or files of {folder} could not be stored in MLflow")


def undelivered(run_folder: Path | str) -> int:
    """Bytes of a run's journal that MLflow has not confirmed."""
    folder = Path(run_folder)
    return (folder / "journal.jsonl").stat().st_size - int(read_json(folder / "journal.ack").get("offset", 0))


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
        logger.warning("%s: what was added has not all reached MLflow: %s", folder, one_line(error))


def commit_of_code() -> dict[str, str]:
    """The tag COMMIT, "-dirty" where files other than docs (a study's rows) differ; nothing where git knows of no
    commit."""
    git = ["git", "-C", str(Path(__file__).parent)]

    def said(*command: str) -> str:
        try:
            return subprocess.run([*git, *command], capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = said("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/docs")
    return {COMMIT: commit + "-dirty" * bool(changed)} if (commit := said("rev-parse", "--short", "HEAD")) else {}


def _after_the_end(folder: Path, status: str) -> bool:
    """Whether somebody has ended the run since it was last started: what breaks in it after that is no failure."""
    marks = [record for _, _, record in records(folder / "journal.jsonl") if record.keys() & {"start", "finish"}]
    return status == "FAILED" and bool(marks) and marks[-1].get("finish") == "KILLED"


def _kept(folder: Path, path: Path) -> str:
    """How a run's journal names a file; one from elsewhere is copied first: a delivery reads nothing outside of the
    folder."""
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
