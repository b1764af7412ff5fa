"""Does the checkpoint store lose anything? Saves are killed at every system call that touches a file, run into a full disk
at every
size, and what was saved is damaged in every way: what is read then has to be a checkpoint that was written, to the bit.

    python tests/chaos/store.py [--flips 1000] [--seed 0]

The kills need strace, which sends the signal as the call is made. (A power failure is another thing: that files are
flushed before they get their names is in the list of calls, and is not tried.) Exit status 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from diffinstruct.run_folder.checkpoint import CheckpointError, CheckpointStore

CALLS = "%file,%desc"
"""strace's words for calls that take a file's name or its descriptor."""
OLD, NEW = 50, 100


def state(step: int) -> dict:
    """A run's, small: networks, Adam, numbers."""
    draw = torch.Generator().manual_seed(step)
    return {
        "train_state": {
            "generator": {"weight": torch.randn(4, 3, generator=draw), "bias": torch.randn(3, generator=draw)},
            "adam": {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": torch.randn(3, generator=draw)}}},
        },
        "reward_scale": step / 3,
        "stopped": False,
    }


def read(folder: Path) -> int | None:
    """The step of the checkpoint that is read; raises AssertionError if it is not what was written as that step."""
    found = CheckpointStore(folder).latest()
    if found is None:
        return None
    step, tree = found
    assert repr_of(tree) == repr_of(state(step)), f"{folder}: step {step} is not what was written"
    return step


def repr_of(tree: object) -> str:
    """Equal for equal bits."""
    if isinstance(tree, torch.Tensor):
        return f"{tree.dtype}{list(tree.shape)}{tree.numpy().tobytes().hex()}"
    return f"{{{', '.join(f'{key!r}: {repr_of(of)}' for key, of in tree.items())}}}" if isinstance(tree, dict) else repr(tree)


def stored(folder: Path) -> Path:
    """A store with two checkpoints; the newer one's folder."""
    CheckpointStore(folder).save(OLD, state(OLD))
    return CheckpointStore(folder).save(NEW, state(NEW))


def traced(folder: Path, *more: str) -> tuple[bool, list[str]]:
    """A save in a process that strace watches: whether it came through, and the calls that it made."""
    CheckpointStore(folder).save(OLD, state(OLD))
    child = os.fork()
    if child == 0:
        # strace counts each thread's calls by themselves. The writer's are made here in the same order, by the one
        # thread.
        threading.Thread.start = threading.Thread.run  # type: ignore[method-assign]
        os.kill(os.getpid(), signal.SIGSTOP)
        CheckpointStore(folder).save(NEW, state(NEW))
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    said = folder.with_suffix(".txt")
    options = ["-f", "-e", f"trace={CALLS}", *more, "-o", str(said), "-p", str(child)]
    tracer = subprocess.Popen(["strace", *options], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    if "attached" not in (first := tracer.stderr.readline()):
        raise SystemExit(f"strace cannot look at a process here: {first.strip()}")
    os.kill(child, signal.SIGCONT)
    _, status = os.waitpid(child, 0)
    tracer.communicate()
    return os.WIFEXITED(status), re.findall(r"^\d+ +(\w+)\(", said.read_text(), re.MULTILINE)


def kills(scratch: Path) -> Iterator[str]:
    """What is read after a save that was killed as it made a call, for each call of one that comes through."""
    through, calls = traced(scratch / "whole")
    assert through and read(scratch / "whole") == NEW
    for n, call in enumerate(calls):
        folder = scratch / f"kill-{n}"
        nth = calls[: n + 1].count(call)  # strace counts each kind by itself
        through, made = traced(folder, "-e", f"inject={call}:signal=SIGKILL:when={nth}")
        assert not through and made == calls[: n + 1], f"call {n}, {call}: the save was another one"
        found = read(folder)
        assert found in (OLD, NEW), f"killed at call {n}, {call}: nothing can be read"
        CheckpointStore(folder).save(NEW + 1, state(NEW + 1))  # what the dead one left is in nobody's way
        assert read(folder) == NEW + 1 and not list(folder.glob("*.tmp"))
        shutil.rmtree(folder)
        yield f"step {found} read"


def full_disks(scratch: Path) -> Iterator[str]:
    """What a save does whose files may not be longer than so many bytes, for every number up to the one that is
    enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    folder = scratch / "full"
    CheckpointStore(folder).save(OLD, state(OLD))
    try:
        for size in range(10_000):
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
                CheckpointStore(folder).save(NEW, state(NEW))
            except CheckpointError as error:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                assert str(folder / f"step-{NEW:08d}") in str(error) and "\n" not in str(error), error
                assert read(folder) == OLD and not list(folder.glob("*.tmp")), f"{size} bytes"
                yield "refused in one line"
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                assert read(folder) == NEW
                return
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def flips(scratch: Path, count: int, seed: int) -> Iterator[str]:
    """What is read when one bit of the newest checkpoint is another, anywhere in its files."""
    newest, plan = stored(scratch / "flips"), random.Random(seed)
    files = sorted(newest.iterdir())
    places = [(path, bit) for path in files for bit in range(8 * path.stat().st_size)]
    for path, bit in plan.sample(places, count):
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert read(newest.parent) == OLD, f"{path.name}: bit {bit} is another, and the checkpoint was taken"
        path.write_bytes(whole)
        yield f"{path.name}: found"
    assert read(newest.parent) == NEW


def truncations(scratch: Path) -> Iterator[str]:
    """What is read when a file of the newest checkpoint ends early, at each of its bytes."""
    newest = stored(scratch / "truncations")
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            assert read(newest.parent) == OLD, f"{path.name}: {size} bytes of {len(whole)}, and the checkpoint was taken"
            yield f"{path.name}: found"
        path.write_bytes(whole)
    assert read(newest.parent) == NEW


def exchanges(scratch: Path) -> Iterator[str]:
    """What is read when a file of the newest checkpoint is missing, another, a link or no file."""
    for name in ("tensors.safetensors", "state.json", "manifest.json"):

        def other(path: Path) -> None:
            shutil.copy(path.parent.with_name(f"step-{OLD:08d}") / path.name, path)

        def swapped(path: Path) -> None:
            sibling = path.with_name("state.json" if path.name != "state.json" else "manifest.json")
            path.rename(path.with_name("x"))
            sibling.rename(path)
            path.with_name("x").rename(sibling)

        def linked(path: Path) -> None:
            path.rename(scratch / "elsewhere")
            path.symlink_to(scratch / "elsewhere")

        def folder(path: Path) -> None:
            path.unlink()
            path.mkdir()

        def to_nowhere(path: Path) -> None:
            path.unlink()
            path.symlink_to("nowhere")

        for how in (Path.unlink, other, swapped, linked, folder, to_nowhere):
            newest = stored(scratch / f"{name}-{how.__name__}")
            how(newest / name)
            assert read(newest.parent) == OLD, f"{name} {how.__name__}: the checkpoint was taken"
            yield how.__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if not shutil.which("strace"):
        raise SystemExit("strace is not here; the kills need it (apt install strace)")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for what, outcomes in {
            "killed at each system call of a save": kills(scratch),
            "disk full at each size of a file": full_disks(scratch),
            f"a bit flipped (seed {asked.seed})": flips(scratch, asked.flips, asked.seed),
            "cut at each byte": truncations(scratch),
            "missing, another's, swapped, linked, a folder": exchanges(scratch),
        }.items():
            began = time.monotonic()
            try:
                counted = Counter(outcomes)
            except AssertionError as error:
                sys.exit(f"LOST: {what}: {error}")
            kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(counted.items()))
            print(f"{what}: {counted.total()} times, nothing lost ({kinds}), {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
