"""The delivery of a journal to MLflow; the only file that imports mlflow."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from diffinstruct.config.addresses import one_line, quote_uri, redact, sqlite_path, sqlite_uri, tracking_uri
from diffinstruct.config.reading import load_run
from diffinstruct.errors import UserError
from diffinstruct.locks import exclusive, locked
from diffinstruct.tracking.delivery import Acknowledgement, Refused, leads_outside
from diffinstruct.tracking.records import (
    ArtifactRecord,
    EvaluationRecord,
    EventRecord,
    FinishRecord,
    ImageRecord,
    MetricsRecord,
    Record,
    RunDescription,
    StartRecord,
    StepRecord,
    read_json,
    records,
    replace_json,
)

logger = logging.getLogger(__name__)

POSTPONED_AGAIN = 60.0  # seconds until images and files that could not be stored are tried again
LIMITS = {"Metric": 1000, "Param": 100, "RunTag": 100}  # entities MLflow takes in a batch
LONGEST_PARAM, LONGEST_TAG = 6000, 5000  # characters; what is longer is cut
ARTIFACTS = "mlartifacts"  # the folder beside an sqlite file in which its runs' files lie
MENDS = {  # what the user can do, by MLflow's code of an error that will be the same the next time
    "UNAUTHENTICATED": "no user, or a wrong password; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD name them",
    "PERMISSION_DENIED": "the user of MLFLOW_TRACKING_USERNAME may not write there",
    "ENDPOINT_NOT_FOUND": "what answers at this address is no MLflow server; tracking.uri names another",
}
MENDS_BY_TEXT = {  # the same, by what is in the text of an error whose code, if any, says nothing
    "maintenance mode": "it keeps no runs in folders any more; a file is sqlite:///PATH/mlflow.db",
    "out-of-date database schema": "its tables are of another MLflow: `mlflow db upgrade URI` changes older ones for good, "
    "newer ones need that MLflow here",
    "Databricks credential": "no credentials; DATABRICKS_HOST and DATABRICKS_TOKEN, or a profile of ~/.databrickscfg, are some",
    "file is not a database": "the file is no sqlite database; tracking.uri names another",
    "no such table": "the database holds no tables of MLflow's; tracking.uri names another",
    "unable to open database file": "the file cannot be opened; tracking.uri names another",
    "readonly database": "the file cannot be written; tracking.uri names another",
}
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
"""MLflow's variable for the seconds that a request may take, an upload through the server included."""
UPLOAD_SPEED = 5 * 2**20  # bytes a second that a server takes at least
ENVIRONMENT = {  # of this process, where the user has not said otherwise: fail fast, the journal is what waits
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    TIMEOUT: "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class MlflowDelivery:
    """Brings a journal to MLflow. A function of the run's folder alone, so anybody can go on with it."""

    def __init__(self, folder: Path, uri: str | None) -> None:
        self.folder = folder
        self.acknowledgement = Acknowledgement(folder, "journal.ack")
        self.journal = self.acknowledgement.journal
        self.uri = uri and quote_uri(uri)
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self.postponed: list[int] = []  # first bytes of the records whose images and files could not be stored
        self._postponed_again = 0.0
        self._client: Any = None
        self._nonfinite: set[str] = set()  # tags of keys whose first step without a finite value has been told
        self._refused: set[str] = set()  # what has been reported as not taken

    @property
    def name(self) -> str:
        return f"MLflow ({redact(self.uri or '')})"

    @property
    def url(self) -> str:
        """The run's page on a server (the server's, until the run is known), or the command that shows the file."""
        uri = self.uri or ""
        if uri.startswith("sqlite:"):
            return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        page = f"/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return redact(uri).rstrip("/") + (page if self.run_id else "")

    def connect(self) -> None:
        """Finds the journal's run, or makes it, and what of the journal it has. Nothing if that is known."""
        if self._client is not None:
            return
        with self.journal.open("r+b") as file, _refusals("INVALID_PARAMETER_VALUE"):
            locked(file, wait=True)  # a run and a `sync` that reach MLflow at once would make a run each
            self._connect()

    def _connect(self) -> None:
        starts = [record for _, _, record in records(self.journal) if isinstance(record, StartRecord) and record.is_complete]
        if not starts:
            raise FileNotFoundError(f"{self.journal} does not hold a run")
        description = starts[-1].start
        self.uri = self.uri or self._server(redact(description.uri))
        client, experiment_id = _open(self.uri, description.experiment)
        before = read_json(self.folder / "mlflow.json")
        known = before.get("run_id")
        run = _active_run(client, known) or _find_or_create_run(client, experiment_id, description, starts[0].time)
        confirmed = self.acknowledgement.read() if run.info.run_id == known else {}
        if known and not confirmed and before.get("uri") != redact(self.uri):
            logger.warning("%s was tracked at %s; all of it goes to %s now", self.folder, before.get("uri"), redact(self.uri))
        self.postponed = confirmed.get("postponed", [])
        self._confirm(confirmed.get("offset", 0))
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        where = {"uri": redact(self.uri), "experiment_id": self.experiment_id, "run_id": self.run_id}
        replace_json(self.folder / "mlflow.json", where)
        self._nonfinite = {tag for tag in run.data.tags if tag.startswith("nonfinite.")}
        self._client = client

    def _server(self, named: str) -> str:
        """What the journal names, with its password. Journals come from others, too: a server gets files and MLflow's
        password only where the environment or the recipe names it as well. An sqlite file is no server."""
        environment = quote_uri(os.environ.get("MLFLOW_TRACKING_URI", ""))
        if named == redact(environment):
            return environment
        if named.startswith("sqlite:///"):
            return named
        recipe = self.folder / "experiment.yaml"
        configured = load_run(self.folder).tracking.uri if recipe.is_file() else None
        if named != configured:
            there = redact(tracking_uri(configured, self.folder.parent))
            raise UserError(f"{self.journal}: uri: {named!r} is not where the run would be tracked, {there!r}: --uri decides")
        return named

    def deliver(self, final: bool) -> bool:
        """Delivers all complete lines that are not confirmed; whether no image or file had to be postponed.

        Raises what MLflow raises; what was confirmed stays so. `final`: try what was postponed now.
        """
        try:
            with _refusals():
                self._deliver_unconfirmed()
            if final or time.monotonic() > self._postponed_again:
                for begin in list(self.postponed):
                    _, _, record = next(records(self.journal, begin))
                    self._deliver(begin, record)
                    self._confirm(self.acknowledgement.offset)
                    if begin in self.postponed:
                        break  # one attempt may take long
            return not self.postponed
        except Exception:
            self._client = None  # look again whether the run is still there
            raise

    def _deliver_unconfirmed(self) -> None:
        batch: list[Any] = []
        end: int | None = None
        for begin, end, record in self.acknowledgement.unconfirmed():
            if isinstance(record, MetricsRecord):
                batch += self._metrics(record.metrics, record)
                if len(batch) < LIMITS["Metric"]:
                    continue
            self._send(batch)
            batch = []
            if isinstance(record, ArtifactRecord):  # metrics and the run's end wait for no file, however large
                self.postponed.append(begin)
            else:
                self._deliver(begin, record)
            self._confirm(end)
        if end is not None:
            self._send(batch)
            self._confirm(end)

    def _deliver(self, begin: int, record: Record | None) -> None:
        """One record that is no batch of metrics."""
        match record:
            case ImageRecord() | ArtifactRecord():
                self._store(begin, record)
            case EvaluationRecord():
                self._send(self._metrics({f"eval/{key}": value for key, value in record.evaluated.items()}, record))
            case EventRecord():
                self._send(_entities(tags={f"event.{record.event}": f"step {record.step}: {record.text}"}))
            case StartRecord() if record.is_complete:
                self._start(record.start)
            case FinishRecord():
                if record.reason:
                    self._client.set_tag(self.run_id, "reason", record.reason[:LONGEST_TAG])
                self._client.set_terminated(self.run_id, record.finish, record.time)

    def _metrics(self, values: Mapping[str, float], record: StepRecord) -> list[Any]:
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        tags = {f"nonfinite.{mlflow_key(key)}": record.step for key in values if key not in finite}
        first = {tag: step for tag, step in tags.items() if tag not in self._nonfinite}
        self._nonfinite.update(first)
        return _entities(metrics=finite, tags=first, step=record.step, at=record.time)

    def _start(self, start: RunDescription) -> None:
        run = self._client.get_run(self.run_id)
        params = {mlflow_key(key): value[:LONGEST_PARAM] for key, value in start.params.items()}
        changed = {f"resumed.{key}": value for key, value in params.items() if run.data.params.get(key, value) != value}
        new = {key: value for key, value in params.items() if key not in run.data.params}
        self._send(_entities(params=new, tags={**start.tags, **changed}))
        if run.info.status != "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        if "reason" in run.data.tags:  # why it had ended
            self._client.delete_tag(self.run_id, "reason")

    def _store(self, begin: int, record: ImageRecord | ArtifactRecord) -> None:
        """An image or file. What holds one up (a store without credentials, say) must not hold up the metrics."""
        path = self.folder / (record.image if isinstance(record, ImageRecord) else record.artifact)
        if begin in self.postponed:
            self.postponed.remove(begin)
        try:
            if not path.exists():
                logger.warning("%s is gone and does not reach MLflow", path)
            elif leads_outside(self.folder, path):
                logger.warning("%r is, or leads, outside of the run's folder and does not reach MLflow", str(path))
            elif isinstance(record, ImageRecord):
                self._image(path, record)
            else:
                with _time_for_upload(path):
                    if path.is_dir():
                        self._client.log_artifacts(self.run_id, str(path), path.name)
                    else:
                        self._client.log_artifact(self.run_id, str(path))
        except Exception as error:
            self.postponed.append(begin)
            self._postponed_again = time.monotonic() + POSTPONED_AGAIN
            if str(path) not in self._refused:
                self._refused.add(str(path))
                logger.warning("%s does not reach MLflow yet: %s", path, one_line(error))

    def _image(self, path: Path, record: ImageRecord) -> None:
        from PIL import Image

        key = mlflow_key(record.key)
        # MLflow gives each image a new name; its thumbnail comes last, so where that one is, the image is
        prefix = f"images/{key.replace('/', '~')}+step+{record.step}+timestamp+{record.time}+"
        stored = [file.path for file in self._client.list_artifacts(self.run_id, "images")]
        if any(name.startswith(prefix) and name.endswith("+compressed.webp") for name in stored):
            self._client.set_tag(self.run_id, "mlflow.loggedImages", True)
            return
        with Image.open(path) as image:
            self._client.log_image(self.run_id, image, key=key, step=record.step, timestamp=record.time)

    def _send(self, entities: list[Any]) -> None:
        """`log_batch` in pieces MLflow takes; what it refuses for good is found by halves, named once, and left out."""
        from mlflow.exceptions import MlflowException

        if not entities:
            return
        half = len(entities) // 2
        kinds = {kind: [entity for entity in entities if type(entity).__name__ == kind] for kind in LIMITS}
        if len(entities) <= LIMITS["Metric"] and all(len(kinds[kind]) <= limit for kind, limit in LIMITS.items()):
            try:
                self._client.log_batch(self.run_id, kinds["Metric"], kinds["Param"], kinds["RunTag"])
                return
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE" or _active_run(self._client, self.run_id) is None:
                    raise
                if not half:
                    if entities[0].key not in self._refused:
                        self._refused.add(entities[0].key)
                        logger.warning("MLflow refuses %s: %s", entities[0].key, one_line(error))
                    return
        self._send(entities[:half])
        self._send(entities[half:])

    def _confirm(self, offset: int) -> None:
        self.acknowledgement.confirm(offset, postponed=self.postponed)


@contextmanager
def _refusals(*final: str) -> Iterator[None]:
    """In the block an answer that will be the same the next time is raised as Refused, with what the user can do. `final`:
    codes of MLflow's errors that are such answers there."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise Refused(f"{error.filename}: {error.strerror}; tracking.uri names another place") from error
    except ImportError as error:
        raise Refused(f"its driver needs the package {error.name!r}, which is not installed here") from error
    except (MlflowException, sqlite3.Error) as error:
        code = getattr(error, "error_code", "")
        mends = (mend for text, mend in MENDS_BY_TEXT.items() if text in str(error))
        if mend := MENDS.get(code) or next(mends, None) or (one_line(error) if code in final else None):
            raise Refused(mend) from error
        raise


@contextmanager
def _time_for_upload(path: Path) -> Iterator[None]:
    """In the block MLflow's requests may take as long as `path` does at UPLOAD_SPEED, unless the user has set a timeout:
    a server that keeps files in an object store answers only when they are there."""
    if os.environ.get(TIMEOUT) != ENVIRONMENT[TIMEOUT]:
        yield
        return
    size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    os.environ[TIMEOUT] = str(60 + size // UPLOAD_SPEED)
    try:
        yield
    finally:
        os.environ[TIMEOUT] = ENVIRONMENT[TIMEOUT]


def _open(uri: str, experiment_name: str) -> tuple[Any, str]:
    """(client, experiment id). One process at a time on an sqlite file: two that make its tables at once both fail."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with _prepared_database(uri) as artifacts:
        client = MlflowClient(uri)
        if (experiment := client.get_experiment_by_name(experiment_name)) is None:
            try:
                return client, client.create_experiment(experiment_name, artifact_location=artifacts)
            except MlflowException as error:  # on a server, another client may have been faster
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(experiment_name)
        if experiment.lifecycle_stage == "deleted":
            mend = f"`mlflow experiments restore --experiment-id {experiment.experiment_id}` brings it back"
            raise Refused(f"its experiment {experiment_name!r} is deleted; {mend}, or tracking.experiment names another")
        return client, experiment.experiment_id


@contextmanager
def _prepared_database(uri: str) -> Iterator[str | None]:
    """Where artifacts of new experiments go, beside an sqlite file, which is locked. None: the server decides."""
    if (database := sqlite_path(uri)) is None:
        yield None
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(Path(f"{database}.lock")):
        if not database.exists() or not database.stat().st_size:
            # MLflow takes seconds to make its tables and never mends a file that it was killed over: make it aside.
            from mlflow import MlflowClient

            for left_over in (f"{database}.tmp", f"{database}.tmp-journal"):
                Path(left_over).unlink(missing_ok=True)
            MlflowClient(sqlite_uri(Path(f"{database}.tmp"))).search_experiments(max_results=1)
            os.replace(f"{database}.tmp", database)
        artifacts = database.absolute().with_name(ARTIFACTS)
        _follow(database, artifacts.as_uri())
        yield artifacts.as_uri()


def _follow(database: Path, artifacts: str) -> None:
    """Take the artifacts of a database that was moved, or copied, with the folder ARTIFACTS beside it to lie there: MLflow
    has absolute addresses alone, and none of its calls changes one."""
    with closing(sqlite3.connect(database)) as connection, connection:
        places = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (place,) in places:
            if place and place != artifacts and place.startswith("file:") and place.endswith(f"/{ARTIFACTS}"):
                connection.execute(
                    "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (artifacts, place)
                )
                rest = "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE artifact_uri LIKE ? || '/%'"
                connection.execute(rest, (artifacts, len(place) + 1, place))


def _find_or_create_run(client: Any, experiment_id: str, run: RunDescription, began: int) -> Any:
    """The journal's run where the answer to its creation was lost, else a new one."""
    runs = client.search_runs([experiment_id], f"tags.journal = '{run.journal}'", max_results=1)
    if runs:
        return runs[0]
    parent = {"mlflow.parentRunId": run.parent} if run.parent else {}
    return client.create_run(experiment_id, began, tags={"journal": run.journal, **parent}, run_name=run.name)


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
        *(Metric(mlflow_key(key), value, at, step) for key, value in (metrics or {}).items()),
        *(Param(mlflow_key(key), str(value)[:LONGEST_PARAM]) for key, value in (params or {}).items()),
        *(RunTag(mlflow_key(key), str(value)[:LONGEST_TAG]) for key, value in (tags or {}).items()),
    ]


def mlflow_key(key: str) -> str:
    """A key in the characters MLflow takes for metrics and images alike."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)
