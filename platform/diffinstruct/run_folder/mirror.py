"""A run's copy in an object store: where machines go with their disks, the same command goes on from there.

    <mirror>/<run>/checkpoints/step-00000100/...   the checkpoint's files; its manifest.json comes last
                   journal.jsonl, images/, ...     what else the run's folder held before that checkpoint came

The folder stays what a run works with, and the truth: a thread follows it and copies what is new. While the store takes
nothing the run goes on. What comes back is read against the checkpoints' digests; foreign names are left where they are.
"""

import json
import logging
import re
import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import fsspec

from diffinstruct.config.addresses import one_line
from diffinstruct.errors import UserError
from diffinstruct.locks import COMMAND, LOCK
from diffinstruct.run_folder import signals
from diffinstruct.run_folder.checkpoint import MANIFEST, TREE, CheckpointError, CheckpointStore, reading, verify

INTERVAL = 1.0  # seconds between two looks for a new checkpoint
LONGEST_PAUSE = 30.0  # seconds between two attempts while the store takes nothing
ATTEMPTS = 3  # at the end of a run, a second longer apart each time
BROUGHT = ("experiment.yaml", "journal.jsonl", "mlflow.json")
IMAGE = re.compile(r"[^/\\]+\.png")
ACKNOWLEDGEMENT = re.compile(r"[\w-]+\.ack")
"""How far a tracker has confirmed the journal: goes with it, else the tracker would be sent all of it once more."""
FILE = re.compile(rf"{re.escape(TREE)}|tensors(-\d{{5}}-of-\d{{5}})?\.safetensors")
NOT_COPIED = {LOCK, COMMAND, "checkpoints", "ray", "tensorboard", "tensorboard.ack", *signals.FILES.values()}
"""What of a run's folder is not copied as it lies there. TensorBoard's files are made again from the journal."""

logger = logging.getLogger(__name__)


class Mirror:
    """The copy of the run in `folder`, below `url`; raises whatever fsspec and the store do."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = f"{url.rstrip('/')}/{folder.name}", folder
        options = {"auto_mkdir": True} if url.startswith("file://") else {}
        self.files, self.root = fsspec.url_to_fs(self.url, **options)
        if "file" in self.files.protocol and Path(self.root).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"mirror: {url} is where the run itself lies")
        self.store = CheckpointStore(folder / "checkpoints")
        self._copied: dict[str, tuple[int, int]] = {}  # of the folder's other files: when they were written, and their size

    def push(self) -> None:
        """Copy what the store has not, and clear away there what the folder has no more. A checkpoint damaged here
        is left untouched in the store. Raises CheckpointError for a folder that is behind its copy, such as an old disk's."""
        steps, there = self.store.steps(), self._stored_steps()
        if behind := [step for step in there if step > max(steps, default=-1) and self._stored_manifest(step) is not None]:
            raise CheckpointError(f"{self.folder} lacks step {max(behind)} of {self.url}: the run's command brings it")
        self._push_others()
        for step in sorted(steps):
            try:
                self._push_step(step)
            except CheckpointError as error:
                logger.warning("checkpoint %s of %s is not copied: %s", step, self.folder, error)
        for step in there if steps else []:
            if step not in steps:
                self._clear(step)

    def pull(self) -> int | None:
        """Bring checkpoints and journal here, where the store's newest whole checkpoint is newer than the folder's; its
        step, or None. A damaged one is named and left out; UserError where that leaves none, there and here."""
        is_whole = cache(self._is_whole)  # all of it is read for that
        here = next((step for step in self.store.steps() if is_whole(step)), -1)
        there = [(step, manifest) for step in self._stored_steps() if (manifest := self._stored_manifest(step)) is not None]
        if max(there, default=(-1, b""))[0] <= here:
            return None
        self.store.folder.mkdir(parents=True, exist_ok=True)
        brought = []
        for step, manifest in sorted(there):
            if is_whole(step):
                continue
            try:
                brought.append((step, self._fetch(step, manifest)))
            except CheckpointError as error:
                logger.warning("checkpoint %s cannot be used (%s)", self._at(step, ""), error)
        if not brought and not self.store.steps():
            raise UserError(f"mirror: {self.url}: no checkpoint in it can be read; without it the run begins anew")
        if max(brought, default=(-1, Path()))[0] <= here:
            return None
        self._bring_others()
        for step, passing in brought:  # the newest last: only then nothing is left to bring
            final = self.store.folder / f"step-{step:08d}"
            shutil.rmtree(final, ignore_errors=True)  # which is damaged
            passing.rename(final)
        return brought[-1][0]

    def touch(self) -> None:
        """Write a small file, so that a store that refuses writes fails here."""
        self.files.pipe_file(f"{self.root}/mirror.txt", b"A copy of a run of diffinstruct: its command goes on from here.\n")

    def _bring_others(self) -> None:
        (self.folder / "images").mkdir(exist_ok=True)
        images = [f"images/{name}" for name in self._names("images") if IMAGE.fullmatch(name)]
        names = {*self._names(""), *(path.name for path in self.folder.iterdir())}
        acknowledgements = [name for name in sorted(names) if ACKNOWLEDGEMENT.fullmatch(name)]
        for name in (*images, *BROUGHT, *acknowledgements):
            if self.files.exists(f"{self.root}/{name}"):
                self.files.get_file(f"{self.root}/{name}", passing := f"{self.folder / name}.tmp")
                Path(passing).replace(self.folder / name)
            else:
                (self.folder / name).unlink(missing_ok=True)

    def _push_others(self) -> None:
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if name.partition("/")[0] in NOT_COPIED or name.endswith(".tmp") or path.is_symlink() or not path.is_file():
                continue
            as_it_is = (path.stat().st_mtime_ns, path.stat().st_size)
            if self._copied.get(name) != as_it_is:
                self.files.put_file(str(path), f"{self.root}/{name}")
                self._copied[name] = as_it_is

    def _push_step(self, step: int) -> None:
        place = self.store.folder / f"step-{step:08d}"
        if not place.resolve().is_relative_to(self.folder.resolve()):
            raise CheckpointError("it lies, by a link, outside of the run's folder")
        with ExitStack() as held:
            try:
                manifest = held.enter_context(reading(place))
            except OSError as error:
                if not place.exists():  # just cleared away
                    return
                raise CheckpointError(f"{MANIFEST}: {error.strerror}") from None
            if self._stored_manifest(step) == manifest:
                return
            verify(place)
            self._clear(step)  # half of one, or of the same step before the run went back
            for name in _names_in(manifest):
                self.files.put_file(str(place / name), self._at(step, name))
            self.files.pipe_file(self._at(step, MANIFEST), manifest)

    def _fetch(self, step: int, manifest: bytes) -> Path:
        """Bring the store's checkpoint; returns the folder beside its place here."""
        passing = self.store.folder / f"step-{step:08d}.tmp"
        shutil.rmtree(passing, ignore_errors=True)
        passing.mkdir()
        for name in _names_in(manifest):
            try:
                self.files.get_file(self._at(step, name), str(passing / name))
            except FileNotFoundError:
                raise CheckpointError(f"{name}: it is not there") from None
        (passing / MANIFEST).write_bytes(manifest)
        verify(passing)
        return passing

    def _is_whole(self, step: int) -> bool:
        with suppress(CheckpointError):
            verify(self.store.folder / f"step-{step:08d}")
            return True
        return False

    def _clear(self, step: int) -> None:
        if self._stored_manifest(step) is not None:  # the manifest first: without it the checkpoint does not count
            self.files.rm_file(self._at(step, MANIFEST))
        with suppress(FileNotFoundError):
            self.files.rm(self._at(step, ""), recursive=True)

    def _stored_manifest(self, step: int) -> Any:
        with suppress(FileNotFoundError):
            return self.files.cat_file(self._at(step, MANIFEST))

    def _stored_steps(self) -> list[int]:
        return [int(match[1]) for name in self._names("checkpoints") if (match := re.fullmatch(r"step-(\d{8,})", name))]

    def _names(self, folder: str) -> list[str]:
        self.files.invalidate_cache()
        with suppress(FileNotFoundError):
            return [path.rstrip("/").rpartition("/")[2] for path in self.files.ls(f"{self.root}/{folder}", detail=False)]
        return []

    def _at(self, step: int, name: str) -> str:
        return f"{self.root}/checkpoints/step-{step:08d}/{name}"


def _names_in(manifest: bytes) -> list[str]:
    """Of a checkpoint's files. Raises CheckpointError for what is no manifest of ours."""
    try:
        names = list(json.loads(manifest))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST}: {error}") from None
    for name in names:
        if not isinstance(name, str) or not FILE.fullmatch(name):
            raise CheckpointError(f"{MANIFEST}: {name!r} is no file of a checkpoint")
    return names


@contextmanager
def mirrored(url: str | None, folder: Path) -> Iterator[None]:
    """Bring what a run's mirror has more than its folder, and keep it up to date during the block and at its end.

    Raises UserError where the address cannot be opened at all, and where the store cannot be asked and the folder has no
    checkpoint: a run that has begun might start over.
    """
    if url is None:
        yield
        return
    begun = bool(CheckpointStore(folder / "checkpoints").steps())
    mirror = None
    try:
        mirror = Mirror(url, folder)
        if (step := mirror.pull()) is not None:
            print(f"step {step} comes from {mirror.url}", flush=True)
        mirror.touch()
    except UserError:
        raise
    except Exception as error:  # stores and what lies between raise what they like
        what = f"mirror: {url} does not answer as it should: {one_line(error)}"
        if mirror is None or not begun:
            raise UserError(what) from None
        logger.warning("%s; the run goes on from its folder", what)
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(mirror, ended), name="mirror", daemon=True)
    thread.start()
    skip_last_push = False
    try:
        yield
    except KeyboardInterrupt:  # it is to end at once
        skip_last_push = True
        raise
    finally:
        ended.set()
        if not skip_last_push:
            thread.join()
            _push_at_the_end(mirror)


def _follow(mirror: Mirror, ended: threading.Event) -> None:
    seen, pause, failing = None, INTERVAL, False
    while not ended.wait(pause):
        try:
            found = [(step, _written(mirror, step)) for step in mirror.store.steps()]
            if found != seen:
                mirror.push()
                seen = found
            pause, failing = INTERVAL, False
        except Exception as error:
            if not failing:
                logger.warning("%s takes nothing: %s. The run goes on", mirror.url, one_line(error))
            pause, failing = min(2 * pause, LONGEST_PAUSE), True


def _written(mirror: Mirror, step: int) -> int:
    """When a checkpoint was written; 0 for one that is just being cleared away."""
    with suppress(OSError):
        return (mirror.store.folder / f"step-{step:08d}" / MANIFEST).stat().st_mtime_ns
    return 0


def _push_at_the_end(mirror: Mirror) -> None:
    for attempt in range(ATTEMPTS):
        time.sleep(attempt)
        try:
            return mirror.push()
        except Exception as error:
            why = one_line(error)
    how = f"later: diffinstruct sync {shlex.quote(str(mirror.folder))}"
    logger.warning("not all of this run is at %s: %s; %s", mirror.url, why, how)
