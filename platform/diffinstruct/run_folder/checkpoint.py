"""The checkpoint store: what a run needs to go on exactly where it was, safe from crashes and bad disks.

    <folder>/step-00000100/tensors.safetensors   every tensor of the state, named by its place: "generator/conv.weight"
                           state.json            the state's tree; {"$tensor": name} stands where a tensor was
                           manifest.json         sha256 and size of the files

Where the networks are sharded over several processes each writes a file of its own, tensors-00000-of-00008.safetensors,
with its shards. Reading cuts them anew for any number of processes.

A checkpoint is written beside its place, from a copy of the state and by a thread, flushed to the disk, and renamed
into it: it is there whole or not at all. Reading compares the digests first (safetensors alone loads a flipped byte
silently), names what is broken, and takes the one before. No pickles.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffinstruct.locks import FULL, locked
from diffinstruct.ranks import SINGLE_PROCESS, Ranks
from diffinstruct.run_folder.state_tree import State, decode, encode, outline

TREE, MANIFEST = "state.json", "manifest.json"
UNREADABLE = (OSError, ValueError, LookupError, OverflowError, TypeError, AttributeError, RecursionError, SafetensorError)
"""What a file raises that is not as it was written."""

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or one that was found cannot be used; the message names it and the reason."""


def tensor_files(world: int) -> list[str]:
    """The names of the files of tensors that `world` processes write."""
    if world == 1:
        return ["tensors.safetensors"]
    return [f"tensors-{rank:05d}-of-{world:05d}.safetensors" for rank in range(world)]


@dataclass(frozen=True)
class _Pending:
    """A checkpoint of `need` bytes that a thread is writing; all ranks do `rest` when each has written its part."""

    step: int
    need: int
    written: Future[None]
    rest: tuple[Callable[[], None], ...]


def _in_thread(*phases: Callable[[], None]) -> Future[None]:
    """Do things in turn, in a thread that does not keep the program from ending, as an executor's would."""
    future = Future[None]()

    def work() -> None:
        try:
            for phase in phases:
                phase()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="checkpoint", daemon=True).start()
    return future


class CheckpointStore:
    """The checkpoints of one run. `folder` holds the `step-...` folders and nothing else; only `ranks` write to it.

    writes: False for a rank that has the same state as another one with its number. It makes the same collective calls.
    """

    def __init__(self, folder: Path | str, keep: int = 2, ranks: Ranks = SINGLE_PROCESS, writes: bool = True) -> None:
        self.folder = Path(folder).absolute()
        self.keep = max(1, keep)
        self.ranks, self.writes = ranks, writes
        self.leads = writes and ranks.rank == 0
        self._pending: _Pending | None = None
        self._copies: dict[str, Tensor] = {}  # of the last state: fresh memory takes five times as long to fill

    def save(self, step: int, state: State, best: int | None = None) -> Path:
        """`start_save`, and wait until it is there."""
        self.start_save(step, state, best)
        self.finish_save(wait=True)
        return self.folder / f"step-{step:08d}"

    def start_save(self, step: int, state: State, best: int | None = None) -> None:
        """Copy `state` (dicts, lists, tuples of tensors, TensorShards, numbers, strings, None; keys str or int) and
        leave writing the copy to a thread; `finish_save` makes it a checkpoint. Waits for the one before. A
        collective call: each rank writes its shards, and the first one all else.

        The newest `keep` stay, and that of the step `best`; those *after* `step` go, since the run has gone back. Raises
        CheckpointError when the disk does not take it, TypeError for a value that has no place in a checkpoint.
        """
        self.finish_save(wait=True)
        tree, self._copies = encode(state if self.writes else {}, self._copies)
        tensors = self._copies
        need = sum(tensor.nbytes for tensor in tensors.values())
        files = tensor_files(self.ranks.world)
        own_file = self._temporary(step) / files[self.ranks.rank]

        def write() -> None:
            if not self.writes:
                return
            save_file(tensors, own_file)
            own_file.with_suffix(".json").write_text(json.dumps(_fingerprint(own_file)), encoding="utf-8")
            flush(own_file)

        def end() -> None:
            if self.leads:
                self._rename_into_place(step, tree, files, best)

        self._together(step, need, lambda: self._begin(step))
        if self.ranks.world == 1:  # nobody else's part to wait for
            self._pending = _Pending(step, need, _in_thread(write, end), ())
        else:
            self._pending = _Pending(step, need, _in_thread(write), (end,))

    def finish_save(self, wait: bool = False) -> None:
        """Make a checkpoint of what `start_save` has begun, if it is written by now or with `wait`. A collective call.
        Raises as `start_save` does."""
        pending = self._pending
        if pending is None or not self.ranks.min(int(wait or pending.written.done())):
            return
        self._pending = None
        for phase in (pending.written.result, *pending.rest):
            self._together(pending.step, pending.need, phase)

    def derive(self, source: "CheckpointStore", edit: Callable[[int, State], State | None]) -> int | None:
        """Make a checkpoint of the newest whole one of `source`, which may be this store, with the state that `edit`
        makes of it; returns its step, None where there is none. With None from `edit` nothing is written.

        No tensor is loaded: `edit` sees StoredTensors, and the files of tensors are linked, or copied where the disk
        knows no links, and keep their digests. They are read once before: what is damaged is reported and left out, as
        by `latest`. Raises as `start` does, of a process that is alone.
        """
        source.finish_save(wait=True)
        for step, path in source._newest_first():
            with ExitStack() as lock:
                try:
                    manifest = _parsed(path, lock.enter_context(reading(path)))
                    for name, written in manifest.items():
                        _verify(path / name, written)
                    state = outline(_document(step, path, manifest)["state"])
                except (CheckpointError, *UNREADABLE) as error:
                    logger.warning("checkpoint %s cannot be used (%s); trying the one before", path, error)
                    continue
                if (edited := edit(step, state)) is None:
                    return step
                files = tensor_files(len(manifest) - 1)
                need = sum(manifest[name]["bytes"] for name in files)
                self._together(step, need, partial(self._link, step, path, {name: manifest[name] for name in files}))
            tree, _ = encode(edited)
            self._together(step, need, partial(self._rename_into_place, step, tree, files, None))
            return step
        return None

    def _link(self, step: int, source: Path, files: Mapping[str, Any]) -> None:
        self._begin(step)
        for name, written in files.items():
            file = self._temporary(step) / name
            try:
                os.link(source / name, file)
            except OSError:  # another disk, or one without links
                shutil.copyfile(source / name, file)
            file.with_suffix(".json").write_text(json.dumps(written), encoding="utf-8")
            flush(file)

    def _temporary(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.tmp"

    def _begin(self, step: int) -> None:
        if self.leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob("step-*.tmp"):
                shutil.rmtree(left_over)
            self._temporary(step).mkdir()

    def _rename_into_place(self, step: int, tree: Any, files: list[str], best: int | None) -> None:
        final, temporary = self.folder / f"step-{step:08d}", self._temporary(step)
        replaced = final.with_suffix(".old")
        (temporary / TREE).write_text(json.dumps({"step": step, "files": len(files), "state": tree}), encoding="utf-8")
        manifest = {TREE: _fingerprint(temporary / TREE)}
        for name in files:  # as each has seen its own: to read them all again would take long
            fingerprint = (temporary / name).with_suffix(".json")
            manifest[name] = json.loads(fingerprint.read_text(encoding="utf-8"))
            fingerprint.unlink()
        (temporary / MANIFEST).write_bytes(_manifest_bytes(manifest))
        for path in (temporary / TREE, temporary / MANIFEST, temporary):
            flush(path)
        if final.exists():  # no rename onto a folder: for a moment the old one is called .old, which `latest` reads
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        flush(self.folder)
        kept = [final, *[path for at, path in self._newest_first() if at < step][: self.keep - 1]]
        for at, path in self._newest_first():
            if path not in kept and not (at == best and at < step) and not _being_read(path):
                shutil.rmtree(path, ignore_errors=True)

    def _together(self, step: int, need: int, phase: Callable[[], None]) -> None:
        """Run `phase` on all ranks; where one fails all raise CheckpointError."""
        final, failure = self.folder / f"step-{step:08d}", None
        try:
            phase()
        except Exception as error:
            failure = error
        if self.ranks.min(int(failure is None)):
            return
        if self.leads:
            shutil.rmtree(final.with_suffix(".tmp"), ignore_errors=True)
        if failure and not isinstance(failure, OSError | ValueError | SafetensorError):
            raise failure
        raise CheckpointError(
            f"checkpoint {final} could not be written: {failure or 'another process could not write its part'}. "
            f"It takes {need / 2**20:.1f} MiB here, {_free(final) / 2**20:.1f} MiB are free. "
            "The ones before it are untouched."
        ) from failure

    def latest(self) -> tuple[int, State] | None:
        """(step, state) of the newest whole checkpoint, tensors on the CPU, or None; one that is being written is
        waited for. A broken one is reported. A collective call: what one rank cannot read no rank takes."""
        self.finish_save(wait=True)
        step = sys.maxsize
        while (step := self.ranks.min(next((at for at, _ in self._newest_first() if at < step), -1))) >= 0:
            state = self._read_if_whole(step)
            if self.ranks.min(int(state is not None)):
                assert state is not None
                return step, state
        return None

    def steps(self) -> list[int]:
        """Those of which there is a checkpoint, newest first; whether they are whole only reading tells."""
        return list(dict.fromkeys(at for at, _ in self._newest_first()))

    def read_part(self, step: int, *keys: str) -> Any:
        """What a checkpoint's state has under these keys, one inside the other, and of its files those alone that it
        takes. Raises CheckpointError where it cannot be read."""
        path = next((path for at, path in self._newest_first() if at == step), self.folder / f"step-{step:08d}")
        try:
            return _read(step, path, self.ranks, keys)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from None

    def _read_if_whole(self, step: int) -> State | None:
        for path in (path for at, path in self._newest_first() if at == step):
            try:
                return _read(step, path, self.ranks)
            except CheckpointError as error:
                logger.warning("checkpoint %s cannot be used (%s); trying the one before", path, error)
        return None

    def _newest_first(self) -> Iterator[tuple[int, Path]]:
        names = [re.fullmatch(r"step-(\d{8,})(\.old)?", path.name) for path in self.folder.glob("step-*")]
        for match in sorted(filter(None, names), key=lambda match: (-int(match[1]), match[0])):
            yield int(match[1]), self.folder / match[0]


def _read(step: int, path: Path, ranks: Ranks, keys: Sequence[str] = ()) -> Any:
    """The state in `path`, or what it has under `keys`; of a sharded tensor this rank's shard. Raises
    CheckpointError with the reason if any part of it is not what was written."""
    try:
        with ExitStack() as open_files:
            manifest = _parsed(path, open_files.enter_context(reading(path)))
            document = _document(step, path, manifest)
            files = tensor_files(document["files"])
            # Written by another number of processes: every rank reads all files
            own_files = files[ranks.rank : ranks.rank + 1] if len(files) == ranks.world else files

            @cache
            def tensors(name: str) -> Any:
                _verify(path / name, manifest[name])
                return open_files.enter_context(safe_open(path / name, "pt", backend="pread"))

            @cache
            def full_tensor(name: str) -> Tensor:
                return tensors(files[0]).get_tensor(name)

            def rows(name: str, shape: tuple[int, ...]) -> Tensor:
                begin, end = _span(shape[0], ranks.rank, ranks.world)
                found = []
                for rank, file in enumerate(files):
                    low, high = _span(shape[0], rank, len(files))
                    if max(low, begin) < min(high, end):
                        found.append(tensors(file).get_slice(name)[max(low, begin) - low : min(high, end) - low])
                return torch.cat(found) if found else tensors(own_files[0]).get_slice(name)[:0]

            state = document["state"]
            for depth, key in enumerate(keys, 1):
                if not isinstance(state, dict) or key not in state:
                    raise CheckpointError(f"{TREE}: it has no {'/'.join(keys[:depth])!r}")
                state = state[key]
            if not keys:  # also a file that this process takes nothing from says whether the checkpoint is whole
                for name in (files[0], *own_files):
                    tensors(name)
            found = decode(state, full_tensor, rows)
            return found
    except UNREADABLE as error:
        raise CheckpointError(f"{type(error).__name__}: {error}") from error


def _document(step: int, path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What is in the file TREE of the checkpoint in `path`. Raises CheckpointError where it is not what was written."""
    _verify(path / TREE, manifest[TREE])
    document: dict[str, Any] = json.loads((path / TREE).read_bytes())
    if document["step"] != step:
        raise CheckpointError(f"{TREE}: it is of step {document['step']}")
    if not 1 <= document["files"] == len(manifest) - 1:  # before as many names are made up
        raise CheckpointError(f"{TREE}: it is of {document['files']} files, {MANIFEST} of {len(manifest) - 1}")
    if not isinstance(state := outline(document["state"]), dict):
        raise CheckpointError(f"{TREE}: its state is a {type(state).__name__}")
    return document


@contextmanager
def reading(path: Path) -> Iterator[bytes]:
    """The manifest of the checkpoint in `path`, which retention leaves alone during the block."""
    with (path / MANIFEST).open("rb") as file:
        locked(file, shared=True)
        yield file.read()


def verify(path: Path) -> None:
    """Raises CheckpointError where a checkpoint's manifest or files are not what was written."""
    try:
        for name, written in _parsed(path, (path / MANIFEST).read_bytes()).items():
            _verify(path / name, written)
    except UNREADABLE as error:
        raise CheckpointError(f"{type(error).__name__}: {error}") from error


def _parsed(path: Path, manifest: bytes) -> dict[str, Any]:
    """A manifest's entries. Raises CheckpointError for one that is not as it was written."""
    _refuse_link(path / MANIFEST)
    entries: dict[str, Any] = json.loads(manifest)
    if manifest != _manifest_bytes(entries):
        raise CheckpointError(f"{MANIFEST}: it is not as it was written")
    return entries


def _span(rows: int, rank: int, world: int) -> tuple[int, int]:
    """The rows of a tensor that a process has."""
    size = -(-rows // world)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def _verify(path: Path, written: dict[str, Any]) -> None:
    """Raises CheckpointError for a file that is not what was written."""
    _refuse_link(path)
    found = _fingerprint(path)
    if found["bytes"] != written["bytes"]:
        raise CheckpointError(f"{path.name}: {found['bytes']} bytes of {written['bytes']}")
    if found["sha256"] != written["sha256"]:
        raise CheckpointError(f"{path.name}: its content is not what was written (sha256 differs)")


def _manifest_bytes(entries: dict[str, Any]) -> bytes:
    return json.dumps(entries, indent=1).encode()


def _being_read(path: Path) -> bool:
    try:
        with (path / MANIFEST).open("r+b") as file:  # network disks lock nothing that is open for reading alone
            return not locked(file)
    except OSError:  # there is none, so nobody reads it
        return False


def _refuse_link(path: Path) -> None:
    """Raises CheckpointError for a link: what a checkpoint says lies in its folder."""
    if path.is_symlink():
        raise CheckpointError(f"{path.name}: it is a link")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _free(path: Path) -> int:
    """Bytes on the disk on which `path` lies, or would lie."""
    return shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free


@contextmanager
def full_disk_as_error(folder: Path) -> Iterator[None]:
    """Make a full disk, or quota, a CheckpointError of one line, whichever file in `folder` it was that found out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        numbers = re.findall(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else [error.errno]
        full = [int(number) for number in numbers if number and int(number) in FULL]
        if not full:
            raise
        path = Path(getattr(error, "filename", None) or folder).absolute()  # a file that is open does not tell its name
        raise CheckpointError(f"{path}: {os.strerror(full[0])}, {_free(path) / 2**20:.1f} MiB are free") from None


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
