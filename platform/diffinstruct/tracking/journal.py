"""The journal of a run, and its delivery to trackers. Training writes a line to a file, threads do the rest.

    <run>/journal.jsonl   one JSON object a line, appended, never rewritten: `records` has their types
    <run>/journal.ack     how far MLflow has confirmed it: {"offset": bytes, "postponed": [offsets of images and files]}
    <run>/mlflow.json     the MLflow run: uri, experiment_id, run_id
    <run>/tensorboard.ack and other trackers' files: how far they have confirmed it

What a tracker has not confirmed is sent again: by its thread, at the next start in the same folder, or by
`deliver(folder)`. Sending twice to MLflow changes nothing (a metric is the same row if key, step, time and value are
the same; an image that is there is not sent again), so everything arrives exactly once. A run that MLflow does not know
(any more) is made anew and gets the whole journal.

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
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffinstruct.config.addresses import one_line, redact, tracking_uri
from diffinstruct.config.sections import TrackingConfig
from diffinstruct.tracking.delivery import Delivery, DeliveryThread, delivery_named
from diffinstruct.tracking.mlflow import MlflowDelivery, mlflow_key
from diffinstruct.tracking.records import (
    ArtifactRecord,
    EvaluationRecord,
    EventRecord,
    FinishRecord,
    ImageRecord,
    MetricsRecord,
    Record,
    RollbackRecord,
    RunDescription,
    StartRecord,
    read_json,
    records,
)
from diffinstruct.tracking.tensorboard import ACKNOWLEDGEMENT as TENSORBOARD

logger = logging.getLogger(__name__)

HURRIED_WAIT_S = 1.0  # seconds it waits where somebody has asked twice
DELIVERY_WAIT_S = 20.0  # seconds `finish` waits for a server; six times that for a file, which is there however slow
COMMIT = "mlflow.source.git.commit"  # the tag that MLflow's pages show as a run's version
CODE_COMMIT = "diffinstruct.commit"


class Parent(NamedTuple):
    """The MLflow run that one of many runs stands under (None where MLflow gave no answer), and its name there."""

    run_id: str | None
    child: str


class Journal:
    """One run's journal, delivered to MLflow and to other trackers by a thread each. No method waits for a tracker but
    `run_id` and `finish`.

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
        also: Sequence[str] = (),
    ) -> None:
        """`also`: the trackers besides MLflow, as the key `tracking.also` names them; UserError for an unknown one."""
        self.folder = Path(run_folder).absolute()
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        self.uri = tracking_uri(uri, self.folder.parent)
        self._mlflow = MlflowDelivery(self.folder, self.uri)
        self._deliveries: list[Delivery] = [self._mlflow, *(delivery_named(name, self.folder) for name in also)]
        description = RunDescription(
            journal=uuid.uuid4().hex,
            uri=redact(self.uri),
            experiment=experiment_name,
            name=run_name,
            params={key: str(value) for key, value in params.items()},
            tags={key: str(value) for key, value in tags.items()} | commits(),
            parent=parent_run_id,
        )
        self._seen: set[tuple[int, str]] = set()  # steps and keys that the journal has
        description = self._resumed(description)
        journal = self.folder / "journal.jsonl"
        torn = journal.exists() and not journal.read_bytes().endswith(b"\n")
        self._file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._separator = b"\n" if torn else b""
        self._append(StartRecord(time=_now_ms(), start=description))
        self._finished = False
        self._threads = [DeliveryThread(delivery, journal) for delivery in self._deliveries]
        for thread in self._threads:
            thread.start()

    def _resumed(self, description: RunDescription) -> RunDescription:
        """The description under which the folder's run goes on; with equal parameters `_seen` is what the journal has."""
        before = [record for _, _, record in records(self.folder / "journal.jsonl")]
        starts = [record.start for record in before if isinstance(record, StartRecord) and record.is_complete]
        if not starts:
            return description
        if _untracked_params(starts[-1]) == _untracked_params(description):
            for record in before:
                match record:
                    case RollbackRecord():
                        self._forget(record.back_to)
                    case MetricsRecord():
                        self._seen |= {(record.step, key) for key in record.metrics}
                    case ImageRecord():
                        self._seen.add((record.step, f"image:{record.key}"))
                    case EventRecord():
                        self._seen.add((record.step, f"event:{record.event}"))
        return description.model_copy(update={"journal": starts[-1].journal})

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Journals `values` (floats or 0-d tensors) of `step`."""
        if fresh := {key: float(value) for key, value in values.items() if (step, key) not in self._seen}:
            self._append(MetricsRecord(time=_now_ms(), step=int(step), metrics=fresh))

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """Stores an image (uint8, [H, W, 3]) in the run's folder and journals it; a key has a step slider in MLflow."""
        from PIL import Image

        if (step, f"image:{key}") not in self._seen:
            path = f"images/{mlflow_key(key).replace('/', '~')}-{step:08d}.png"
            try:
                Image.fromarray(pixels).save(self.folder / path, compress_level=1)  # the quickest
            except OSError as error:
                logger.warning("%s is not drawn (%s); training goes on", self.folder / path, error)
            else:
                self._append(ImageRecord(time=_now_ms(), step=int(step), key=key, image=path))

    def event(self, step: int, kind: str, text: str) -> None:
        """Journals that something has happened, at most once of a kind and step."""
        if (step, f"event:{kind}") not in self._seen:
            self._append(EventRecord(time=_now_ms(), step=int(step), event=kind, text=text))

    def back_to(self, step: int, at: int, text: str) -> None:
        """Journals that the run has gone back from `at` to an earlier step, and takes the steps between once more."""
        self._forget(step)
        self._append(RollbackRecord(time=_now_ms(), step=int(at), event="back_to", text=text, back_to=int(step)))

    def _forget(self, step: int) -> None:
        self._seen = {seen for seen in self._seen if seen[0] <= step}

    def artifact(self, path: Path | str) -> None:
        """Journals a file, or a folder in the run's own, to be stored under its name; it is read when delivered."""
        self._append(ArtifactRecord(time=_now_ms(), artifact=_path_inside(self.folder, Path(path))))

    def finish(self, status: str = "FINISHED", reason: str | None = None, hurry: bool = False) -> bool:
        """Ends the run as FINISHED, FAILED or KILLED and waits a while (DELIVERY_WAIT_S) for the deliveries; whether all of it
        arrived. In a `hurry`, since somebody has asked twice, for HURRIED_WAIT_S seconds.

        What did not arrive is kept; one warning says how to deliver it.
        """
        if not self._finished:
            self._finished = True
            if not _ended_by_hand(self.folder, status):
                self._append(FinishRecord(time=_now_ms(), finish=status, reason=reason))
            patience = HURRIED_WAIT_S if hurry else DELIVERY_WAIT_S if self.uri.startswith("http") else 6 * DELIVERY_WAIT_S
            until = time.monotonic() + patience
            for thread in self._threads:
                thread.finishing.set()
            for thread in self._threads:
                thread.join(max(0.0, until - time.monotonic()))
            mlflow, *others = self._threads
            if not mlflow.complete:
                how = f"diffinstruct sync {shlex.quote(str(self.folder))}"
                logger.warning("not all of this run has reached MLflow; later: %s", how)
            for name in (thread.delivery.name for thread in others if not thread.complete):
                logger.warning("not all of this run has reached %s; the run's next start goes on with it", name)
        return all(thread.complete for thread in self._threads)

    @property
    def run_id(self) -> str | None:
        """The MLflow run; waits until MLflow has answered once. None while it has not given one."""
        self._threads[0].attempted.wait()
        return self._mlflow.run_id

    @property
    def url(self) -> str:
        """Where the run is to be seen, to be printed: an address or a command for each tracker."""
        return "  ".join(delivery.url for delivery in self._deliveries if delivery.url)

    def _append(self, record: Record) -> None:
        line = self._separator + _encoded(record)
        try:  # one write: lines of two processes do not mix, a kill loses at most one
            written = os.write(self._file, line)
            problem = "it took a part of it"
        except OSError as error:
            written, problem = 0, str(error)
        if written < len(line):
            logger.warning("the journal of %s does not take a line (%s); training goes on", self.folder, problem)
        self._separator = b"" if written == len(line) else b"\n"


def deliver(
    run_folder: Path | str,
    uri: str | None = None,
    status: str | None = None,
    reason: str | None = None,
    also: Sequence[str] = (),
) -> None:
    """Sends what a run's journal still holds; nothing if there is nothing. Raises whatever keeps it from arriving.

    `uri` where it is not the one the run began with (a password in a URI is not stored), or nobody but the journal
    names it. `status` ends a run that could not do so itself, such as a trial that a scheduler stopped. `also`: the
    trackers besides MLflow, as the configuration names them. Without it a run that has TensorBoard's files gets them
    completed; a tracker of the user's own is code, which no folder from elsewhere may name.
    """
    folder = Path(run_folder).absolute()
    if status and not _ended_by_hand(folder, status):
        _append_line(folder, FinishRecord(time=_now_ms(), finish=status, reason=reason))
    also = also or ["tensorboard"] * (folder / TENSORBOARD).exists()
    errors = []
    for name in (None, *also):
        try:
            delivery: Delivery = delivery_named(name, folder) if name else MlflowDelivery(folder, uri)
            delivery.connect()
            if not delivery.deliver(final=True):
                raise RuntimeError(f"not all images or files of {folder} could be stored in {delivery.name}")
        except Exception as error:  # one that is down does not hold up another
            errors.append(error)
    if errors:
        for other in errors[1:]:
            logger.warning("%s: %s", folder, one_line(other))
        raise errors[0]


def deliver_rest(run_folder: Path | str, tracking: TrackingConfig, *paths: Path) -> None:
    """Sends what the process that wrote a run's journal had no time for, and adds files to it; it takes as long as the
    trackers do that answer. A warning where one does not take it now."""
    folder = Path(run_folder).absolute()
    for path in paths:
        _append_line(folder, ArtifactRecord(time=_now_ms(), artifact=_path_inside(folder, path)))
    if undelivered(folder) or read_json(folder / "journal.ack").get("postponed"):
        _deliver_now(folder, tracking.uri, tracking.also)


def undelivered(run_folder: Path | str) -> int:
    """Bytes of a run's journal that MLflow has not confirmed."""
    folder = Path(run_folder)
    return (folder / "journal.jsonl").stat().st_size - int(read_json(folder / "journal.ack").get("offset", 0))


def attach(run_folder: Path | str, *paths: Path) -> None:
    """Adds files to a run that has ended: journaled, then delivered; a warning where MLflow does not take them now."""
    folder = Path(run_folder).absolute()
    for path in paths:
        _append_line(folder, ArtifactRecord(time=_now_ms(), artifact=_path_inside(folder, path)))
    _deliver_now(folder)


def add_evaluation(
    run_folder: Path | str, uri: str | None, step: int, values: Mapping[str, float], also: Sequence[str] = ()
) -> None:
    """Adds the results of an evaluation to a run that has ended, once: in trackers these are metrics `eval/...`."""
    folder = Path(run_folder).absolute()
    if not any(isinstance(record, EvaluationRecord) for _, _, record in records(folder / "journal.jsonl")):
        _append_line(folder, EvaluationRecord(time=_now_ms(), step=step, evaluated=dict(values)))
    _deliver_now(folder, uri, also)


def _deliver_now(folder: Path, uri: str | None = None, also: Sequence[str] = ()) -> None:
    try:
        deliver(folder, uri, also=also)
    except Exception as error:
        logger.warning("%s: what was added has not all reached MLflow: %s", folder, one_line(error))


def commits() -> dict[str, str]:
    """Tags: the commit of the repository in which the run was started, which MLflow's pages show as the run's version,
    and that of this package where it is run from its own repository. None of a repository without a commit, or without
    git; "-dirty" where files other than docs (a study's rows) differ."""
    own = Path(__file__)
    tracked = _git(str(own.parent), "ls-files", "--error-unmatch", own.name)  # it may be installed inside anybody's repository
    code = _commit(str(own.parent)) if tracked else ""
    found = {COMMIT: _commit(".") or code, CODE_COMMIT: code}
    return {tag: commit for tag, commit in found.items() if commit}


def _commit(folder: str) -> str:
    commit, changes = _git(folder, "rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no")
    return commit and commit + "-dirty" * bool(_git(folder, *changes, "--", ":/", ":!/docs"))


def _git(folder: str, *command: str) -> str:
    try:
        return subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _untracked_params(description: RunDescription) -> dict[str, str]:
    """The parameters of a run but those that say where it is tracked, which change nothing that it measures."""
    return {key: value for key, value in description.params.items() if not key.startswith("tracking.")}


def _ended_by_hand(folder: Path, status: str) -> bool:
    """Whether `status` is the failure of a run that somebody has ended: what breaks in it after that is none."""
    marks = [record for _, _, record in records(folder / "journal.jsonl") if isinstance(record, StartRecord | FinishRecord)]
    killed = bool(marks) and isinstance(marks[-1], FinishRecord) and marks[-1].finish == "KILLED"
    return status == "FAILED" and killed


def _path_inside(folder: Path, path: Path) -> str:
    """A file as a run's journal names it. One from elsewhere is copied: deliveries read nothing outside the folder."""
    if not path.absolute().is_relative_to(folder):
        (folder / "files").mkdir(exist_ok=True)
        path = Path(shutil.copy(path, folder / "files"))
    return str(path.absolute().relative_to(folder))


def _now_ms() -> int:
    return int(time.time() * 1000)


def _encoded(record: Record) -> bytes:
    return json.dumps(record.model_dump()).encode() + b"\n"


def _append_line(folder: Path, record: Record) -> None:
    """Adds a line to the journal of a run whose own process is gone; the line before it may be torn."""
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(b"\n" + _encoded(record))


def publish(uri: str, experiment_name: str, folder: Path, *paths: Path) -> None:
    """Publishes a finished run of files alone, kept in `folder` and named like it; the same call replaces them."""
    journal = Journal(uri, experiment_name, folder.name, folder, {}, {})
    for path in paths:
        journal.artifact(path)
    journal.finish()
