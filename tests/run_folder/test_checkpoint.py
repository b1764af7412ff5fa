"""The checkpoint store: exact round trips, and every way to break one."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos.store import exchanges, flips, full_disks, truncations
from tiny.runs import same

from diffinstruct.ranks import Ranks
from diffinstruct.run_folder import checkpoint
from diffinstruct.run_folder.checkpoint import CheckpointError, CheckpointStore
from diffinstruct.run_folder.state_tree import TensorShard


def state(seed: int = 0) -> dict:
    torch.manual_seed(seed)
    base, spectrum = torch.randn(4, 6), torch.tensor([1 + 2j])
    return {
        "generator": {
            "weight": base,
            "transposed": base.T,
            "row": base[1],
            "every_second": base[:, ::2],
            "tied": base,
            "flat": base.view(-1),
        },
        "kinds": {
            "bf16": torch.randn(3).bfloat16(),
            "half": torch.randn(3).half(),
            "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
            "scalar": torch.tensor(3.5),
            "empty": torch.empty(0, 3),
            "empty_too": torch.empty(0, 3),
            "bools": torch.tensor([True, False]),
            "long": torch.tensor([2**60 + 1]),
            "complex": spectrum,
            "conjugate": spectrum.conj(),
            "parameter": torch.nn.Parameter(torch.randn(2)),
            "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
            "expanded": torch.randn(1, 3).expand(5, 3),
        },
        "optimizer": {
            "state": {0: {"step": torch.tensor(7.0)}, 11: {}},
            "groups": [{"betas": (0.0, 0.99), "params": [0, 11], "foreach": None}],
        },
        "odd": {
            "a/b": torch.zeros(1),
            "a": {"b": torch.ones(1)},
            0: torch.ones(2),
            "0": torch.zeros(2),
            "$tensor": "no tensor",
            "nothing": {},
        },
        "plain": [1, True, None, "\u00e9\ud800", 0.1, float("nan"), float("inf"), -0.0, 2**70, [], (), ""],
        "seed": seed,
    }


def test_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    written = state()
    CheckpointStore(tmp_path / "checkpoints").save(100, written)
    files = (tmp_path / "checkpoints/step-00000100").iterdir()
    assert sorted(path.name for path in files) == ["manifest.json", "state.json", "tensors.safetensors"]
    step, read = CheckpointStore(tmp_path / "checkpoints").latest()  # type: ignore[misc]
    assert step == 100
    assert same(read, written)
    assert read["generator"]["tied"] is read["generator"]["weight"]
    read["generator"]["weight"].add_(1)  # its memory is its own: neither a neighbour nor the file changes with it
    assert same(read["generator"]["row"], written["generator"]["row"])
    assert same(CheckpointStore(tmp_path / "checkpoints").latest()[1], written)  # type: ignore[index]


def test_adam_goes_on_exactly(tmp_path: Path) -> None:
    def fresh() -> tuple[torch.nn.Linear, torch.optim.Adam]:
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.0, 0.99))

    def steps(model: torch.nn.Linear, optimizer: torch.optim.Adam, count: int) -> None:
        for index in range(count):
            optimizer.zero_grad()
            model(torch.full((1, 3), 0.5 + index)).square().sum().backward()
            optimizer.step()

    model, optimizer = fresh()
    steps(model, optimizer, 3)
    CheckpointStore(tmp_path).save(3, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    steps(model, optimizer, 3)
    resumed, its_optimizer = fresh()
    _, read = CheckpointStore(tmp_path).latest()  # type: ignore[misc]
    resumed.load_state_dict(read["model"])
    its_optimizer.load_state_dict(read["optimizer"])
    steps(resumed, its_optimizer, 3)
    assert same(dict(resumed.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("value", [object(), {1, 2}, {(1, 2): 3}, {True: 1}, {"x": b"bytes"}, torch.ones(2).to_sparse()])
def test_what_has_no_place_is_refused_by_name_before_anything_is_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="checkpoint: here"):
        CheckpointStore(tmp_path).save(1, {"here": value})
    assert not list(tmp_path.iterdir())


def test_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    assert store.latest() is None
    for step in (50, 100, 150, 200):
        store.save(step, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000150", "step-00000200"]


def test_the_best_is_kept_beside_them(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    seen = []
    for step, best in ((50, None), (100, 50), (150, 50), (200, 150), (250, 150)):
        store.save(step, {"step": step}, best)
        seen.append(store.steps())
    assert seen == [[50], [100, 50], [150, 100, 50], [200, 150], [250, 200, 150]]
    store.save(100, {"step": 100}, 150)  # of a run that has gone back: what came later is nobody's best any more
    assert store.steps() == [100]


def test_a_part_is_read_without_the_files_that_it_does_not_take(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    folder = store.save(1, {"networks": {"ema": {"w": torch.ones(2)}, "other": torch.zeros(3)}, "said": {"best": 7}})
    assert same(store.read_part(1, "networks", "ema"), {"w": torch.ones(2)}) and store.read_part(1, "said", "best") == 7
    with pytest.raises(CheckpointError, match=r"step-00000001 cannot be used: state\.json: it has no 'networks/average'"):
        store.read_part(1, "networks", "average")
    flip(folder / "tensors.safetensors")
    assert store.read_part(1, "said", "best") == 7
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors: its content is not what was written"):
        store.read_part(1, "networks", "ema")
    with pytest.raises(CheckpointError, match="step-00000002 cannot be used"):
        store.read_part(2, "said")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_damage_is_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    store.save(50, state(50))
    store.save(100, state(100))
    damage(tmp_path / "step-00000100" / name)
    step, read = store.latest()  # type: ignore[misc]
    assert step == 50 and same(read, state(50))
    (message,) = [record.message for record in caplog.records]
    assert "step-00000100" in message and (name in message or name == "manifest.json")
    store.save(100, state(3))  # the resumed run writes the same step again
    assert same(store.latest(), (100, state(3)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000050", "step-00000100"]


@pytest.mark.parametrize("harm", [partial(flips, count=100, seed=0), truncations, exchanges, full_disks])
def test_no_harm_is_taken_for_a_checkpoint(tmp_path: Path, harm) -> None:
    """The quick part of tests/chaos/store.py."""
    assert sum(1 for _ in harm(tmp_path)) >= 18


def test_a_broken_newer_one_does_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(100, state())
    truncate(tmp_path / "step-00000100/state.json")
    store.save(60, state(60))
    assert same(store.latest(), (60, state(60)))


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(100, state()).rename(tmp_path / "step-00000900")
    assert CheckpointStore(tmp_path).latest() is None


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step again"])
def test_death_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills the writer (SIGKILL, in a fork) before the n-th of its file operations, for every n to the last."""
    step = 50 if again else 100
    for deadline in range(1, 50):
        folder = tmp_path / str(deadline)
        CheckpointStore(folder, keep=1).save(50, state(1))
        (folder / "step-00000020.tmp").mkdir()  # what an earlier death left
        child = os.fork()
        if child == 0:
            count = 0

            def deadly(function, deadline=deadline):
                def call(*args, **kwargs):
                    nonlocal count
                    count += 1
                    if count == deadline:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return call

            operations = {checkpoint: ["save_file", "_fingerprint", "flush"], Path: ["mkdir", "rename", "write_text"]}
            for owner, names in {**operations, shutil: ["rmtree"]}.items():
                for name in names:
                    monkeypatch.setattr(owner, name, deadly(getattr(owner, name)))
            try:
                CheckpointStore(folder, keep=1).save(step, state(2))
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        survived = os.WIFEXITED(status)
        found = CheckpointStore(folder).latest()
        before = not survived and same(found, (50, state(1)))
        assert before or same(found, (step, state(2))), deadline
        CheckpointStore(folder, keep=1).save(150, state(3))  # and the next one finds its way through the remains
        assert [path.name for path in folder.iterdir()] == ["step-00000150"]
        if survived:
            assert deadline > 12  # the walk really went through the writer's operations
            return
    raise AssertionError("the writer never got through")


def test_a_state_that_was_read_goes_with_its_last_reader(tmp_path: Path, monkeypatch) -> None:
    """256 MiB, without Python's search for cycles, which may come after hours; nor does one that was written stay."""
    store = CheckpointStore(tmp_path)
    state = {"big": torch.zeros(2**26)}
    store.save(1, state)
    written, copy = weakref.ref(state.pop("big")), weakref.ref(store._copies["big"])
    gc.collect()
    gc.disable()
    try:
        read = weakref.ref(store.latest()[1]["big"])  # type: ignore[index]
        del store
        assert read() is None and written() is None and copy() is None
    finally:
        gc.enable()


def _scaled(step: int, state: dict) -> dict:
    state["optimizer"]["groups"][0]["betas"] = (0.5, 0.9)
    return state | {"seed": 1000 + step}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("same_store", [True, False])
def test_another_checkpoint_is_made_of_one_without_its_tensors(
    tmp_path: Path, monkeypatch, links: bool, same_store: bool
) -> None:
    """Its tensors are the same files where the disk knows links, and a flipped byte in them is still noticed."""
    source = CheckpointStore(tmp_path / "source")
    source.save(50, state(50))
    source.save(100, state(100))
    store = CheckpointStore(source.folder if same_store else tmp_path / "other", keep=1)
    inode = (source.folder / "step-00000100/tensors.safetensors").stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "safe_open", None)
        patch.setattr(checkpoint, "save_file", None)
        if not links:
            patch.setattr(os, "link", lambda *_: exec("raise OSError(errno.EXDEV, 'another disk')", {"errno": errno}))
        assert store.derive(source, lambda step, state: None) == 100 and len(source.steps()) == 2
        assert store.derive(source, _scaled) == 100
    assert [path.name for path in store.folder.iterdir()] == ["step-00000100"]
    expected = state(100) | {"seed": 1100}
    expected["optimizer"]["groups"][0]["betas"] = (0.5, 0.9)
    assert same(store.latest(), (100, expected))
    tensors = store.folder / "step-00000100/tensors.safetensors"
    assert (tensors.stat().st_ino == inode) == links
    flip(tensors)
    assert store.latest() is None


def test_what_is_made_of_another_checkpoint_is_made_of_a_whole_one(tmp_path: Path, caplog) -> None:
    source = CheckpointStore(tmp_path / "source")
    assert CheckpointStore(tmp_path / "none").derive(source, _scaled) is None
    source.save(50, state(50))
    flip(source.save(100, state(100)) / "tensors.safetensors")
    assert CheckpointStore(tmp_path / "heir").derive(source, _scaled) == 50
    assert "step-00000100 cannot be used" in caplog.text and "sha256 differs" in caplog.text
    flip(source.folder / "step-00000050/tensors.safetensors")
    assert CheckpointStore(tmp_path / "other").derive(source, _scaled) is None and not (tmp_path / "other").exists()


def test_a_checkpoint_of_another_is_whole_or_not_there(tmp_path: Path, monkeypatch) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(50, state(50))
    monkeypatch.setattr(Path, "write_bytes", lambda *_: exec("raise OSError(28, 'No space left')"))
    with pytest.raises(CheckpointError, match=r"step-00000050 could not be written: .*No space left"):
        store.derive(store, _scaled)
    assert same(store.latest(), (50, state(50))) and len(list(tmp_path.iterdir())) == 1


def test_another_checkpoint_takes_no_memory(tmp_path: Path) -> None:
    """Of 256 MiB of tensors of two processes, in a process of its own."""
    meeting, said = threading.Barrier(2), [0, 0]

    def least(rank: int, value: int) -> int:
        said[rank] = value
        meeting.wait()
        found = min(said)
        meeting.wait()
        return found

    def save(rank: int) -> None:
        shard = TensorShard(torch.zeros(2**25), (2**26,))
        CheckpointStore(tmp_path, ranks=Ranks(rank, 2, partial(least, rank))).save(1, {"big": shard, "steps": 1})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(save, range(2)))
    code = """
import resource, sys
from diffinstruct.run_folder.checkpoint import CheckpointStore
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
store, before = CheckpointStore(sys.argv[1]), peak()
assert store.derive(store, lambda step, state: state | {"steps": 2}) == 1
print(peak() - before)
"""
    grown = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True)
    assert int(grown.stdout) < 32
    _, state = CheckpointStore(tmp_path).latest()  # type: ignore[misc]
    assert state["steps"] == 2 and state["big"].own.shape == (2**26,)


@pytest.mark.parametrize(("of", "name"), [(Path, "write_text"), (checkpoint, "save_file")], ids=["json", "tensors"])
def test_full_disk_is_one_clear_error_when_the_save_is_settled(of, name, tmp_path, monkeypatch) -> None:
    store = CheckpointStore(tmp_path)
    store.save(50, state())

    def no_space(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(of, name, no_space)
        store.start_save(100, state(1))
        with pytest.raises(CheckpointError, match=r"step-00000100.*No space left on device.*takes 0.0 MiB here, \d+"):
            store.finish_save(wait=True)
    assert same(store.latest(), (50, state()))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000050"]
    store.save(150, state(1))  # nothing of it is in the way
    assert same(store.latest(), (150, state(1)))


def test_a_write_the_system_cuts_short_is_the_same_error(tmp_path: Path) -> None:
    """A real refusal inside safetensors' own writer: the file size limit."""
    store = CheckpointStore(tmp_path)
    store.save(50, state())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(CheckpointError, match="step-00000100 could not be written"):
            store.save(100, {"large": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert same(store.latest(), (50, state()))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000050"]


def test_manifest_says_what_the_files_are(tmp_path: Path) -> None:
    folder = CheckpointStore(tmp_path).save(1, state())
    for name, entry in json.loads((folder / "manifest.json").read_text()).items():
        content = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state as it was when the writing began; it is a checkpoint once it is settled, not
    before."""
    store, weights = CheckpointStore(tmp_path), torch.zeros(1000)
    first, second, write = threading.Event(), threading.Event(), checkpoint.save_file
    gates = iter((first, second))
    monkeypatch.setattr(checkpoint, "save_file", lambda *of: next(gates).wait(60) and write(*of))
    store.start_save(1, {"weights": weights, "step": 1})
    weights += 1
    store.finish_save()
    assert not list(tmp_path.glob("step-00000001"))  # still at it
    first.set()
    store.start_save(2, {"weights": weights})  # waits for the one before
    weights += 1
    assert same(CheckpointStore(tmp_path).latest(), (1, {"weights": torch.zeros(1000), "step": 1}))
    second.set()
    assert same(store.latest(), (2, {"weights": torch.ones(1000)}))  # waits for its own
    store.finish_save(wait=True)  # there is nothing more


def test_one_that_is_being_read_is_not_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer, decode = CheckpointStore(tmp_path), CheckpointStore(tmp_path, keep=1), checkpoint.decode
    writer.save(1, state())

    def slowly(*of: Any) -> Any:
        for step in (2, 3):
            writer.save(step, state(step))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
        return decode(*of)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "decode", slowly)
        assert same(reader.latest(), (1, state()))
    writer.save(4, state(4))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
