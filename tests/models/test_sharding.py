"""Networks spread over two processes (FSDP2 on gloo), against one process that holds them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import pipelines
from tiny import sharding as tiny_sharding
from tiny.sharding import ROUNDS, go, make_state, opened
from torch.distributed.device_mesh import init_device_mesh

from diffinstruct.config.reading import load
from diffinstruct.method.precision import autocast
from diffinstruct.models.pipeline import load_reference
from diffinstruct.models.sharding import sharded
from diffinstruct.ranks import Ranks
from diffinstruct.run_folder.checkpoint import CheckpointError, CheckpointStore
from diffinstruct.run_folder.state_tree import TensorShard

WORLD = 2
ROLES = ("generator", "ema", "score_network")


@pytest.fixture(scope="module")
def spread_out(tmp_path_factory) -> tuple[Any, Path]:
    """The experiment, and the folder in which two processes have left what came of it."""
    folder = tmp_path_factory.mktemp("sharded")
    pipelines.build(folder / "tiny")
    (folder / "empty.yaml").write_text("{}")
    own = [f"reference.model={folder / 'tiny'}", "generator.init_from=reference", "generator.max_grad_norm=0.5"]
    own += ["score_network.updates_per_step=2", "activation_checkpointing=true", "micro_batch_size=1"]
    experiment = load(folder / "empty.yaml", own)
    torch.multiprocessing.spawn(tiny_sharding.process, (WORLD, experiment, folder), WORLD)
    return experiment, folder


@pytest.mark.long
def test_two_processes_equal_one_over_ten_alternating_rounds(spread_out) -> None:
    experiment, folder = spread_out
    reference = opened(experiment)
    train_state = make_state(experiment, reference)
    before = {name: value.clone() for name, value in train_state.generator.denoiser.network.state_dict().items()}
    said = go(experiment, reference, train_state, range(ROUNDS))
    result = torch.load(folder / "result.pt", weights_only=True)
    for ours, theirs in zip(result["said"], said, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-7)
    for role in ROLES:
        module = getattr(train_state, role)
        exact = getattr(module, "denoiser", module).network.state_dict()
        ours = result["networks"][f"straight/{role}"]
        assert ours.keys() == exact.keys()
        for name, value in exact.items():
            assert (ours[name] - value).abs().max() < 1e-6, (role, name)
        assert max((ours[name] - before[name]).abs().max() for name in before) > 1e-4
    for rank in range(WORLD):
        assert torch.load(folder / f"rank-{rank}.pt", weights_only=True)["held"] == pytest.approx(1 / WORLD, abs=0.05)


@pytest.mark.long
def test_a_checkpoint_of_rows_goes_on_to_the_bit(spread_out) -> None:
    _, folder = spread_out
    networks = torch.load(folder / "result.pt", weights_only=True)["networks"]
    for role in ROLES:
        straight, resumed = (networks[f"{how}/{role}"] for how in ("straight", "resumed"))
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.long
def test_rows_are_dealt_out_to_however_many_read_them(spread_out, tmp_path) -> None:
    _, folder = spread_out
    names = {path.name for path in (folder / "checkpoints/step-00000005").iterdir()}
    files = {f"tensors-{rank:05d}-of-00002.safetensors" for rank in range(WORLD)}
    assert names == {"manifest.json", "state.json"} | files
    _, whole = CheckpointStore(folder / "checkpoints").latest()  # type: ignore[misc]
    parts = [CheckpointStore(folder / "checkpoints", ranks=Ranks(rank, 3)).latest()[1] for rank in range(3)]  # type: ignore[index]
    for name, rows in whole["generator"].items():
        assert isinstance(rows, TensorShard) and rows.own.shape == rows.shape
        assert torch.equal(torch.cat([part["generator"][name].own for part in parts]), rows.own)
    CheckpointStore(tmp_path).save(5, whole)  # and a process that read them all may write them
    (_, again) = CheckpointStore(tmp_path, ranks=Ranks(1, 2)).latest()  # type: ignore[misc]
    (_, once) = CheckpointStore(folder / "checkpoints", ranks=Ranks(1, 2)).latest()  # type: ignore[misc]
    assert all(torch.equal(again["ema"][name].own, rows.own) for name, rows in once["ema"].items())


@pytest.fixture(scope="module")
def copies(spread_out, tmp_path_factory) -> Path:
    """The folder in which four processes, two copies of two shards each, have left what came of it."""
    folder = tmp_path_factory.mktemp("copies")
    torch.multiprocessing.spawn(tiny_sharding.process, (2 * WORLD, spread_out[0], folder, WORLD), 2 * WORLD)
    return folder


def agree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys() and all((ours[name] - value).abs().max() < 1e-6 for name, value in theirs.items())


@pytest.mark.long
def test_two_copies_of_two_shards_equal_one_copy(spread_out, copies) -> None:
    one, two = (torch.load(folder / "result.pt", weights_only=True) for folder in (spread_out[1], copies))
    for ours, theirs in zip(two["said"], one["said"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-7)
    for role in ROLES:
        agree(two["networks"][f"straight/{role}"], one["networks"][f"straight/{role}"])
        resumed = two["networks"][f"resumed/{role}"]
        assert all(torch.equal(resumed[name], value) for name, value in two["networks"][f"straight/{role}"].items())
    for rank in range(2 * WORLD):  # a shard of a copy, not of all processes
        assert torch.load(copies / f"rank-{rank}.pt", weights_only=True)["held"] == pytest.approx(1 / WORLD, abs=0.05)


@pytest.mark.long
def test_a_checkpoint_of_copies_has_one_of_them_and_goes_on_with_any_number(spread_out, copies, tmp_path) -> None:
    experiment, folder = spread_out
    names = {path.name for path in (copies / "checkpoints/step-00000005").iterdir()}
    assert names == {path.name for path in (folder / "checkpoints/step-00000005").iterdir()}
    straight = torch.load(copies / "result.pt", weights_only=True)["networks"]
    torch.multiprocessing.spawn(tiny_sharding.go_on, (WORLD, experiment, tmp_path, copies / "checkpoints"), WORLD)
    for role, weights in torch.load(tmp_path / "result.pt", weights_only=True).items():
        agree(weights, straight[f"straight/{role}"])
    reference = opened(experiment)
    train_state = make_state(experiment, reference)
    _, state = CheckpointStore(copies / "checkpoints").latest()  # type: ignore[misc]
    train_state.load_state_dict(_whole(state))
    go(experiment, reference, train_state, range(ROUNDS // 2, ROUNDS))
    for role in ROLES:
        module = getattr(train_state, role)
        agree(getattr(module, "denoiser", module).network.state_dict(), straight[f"straight/{role}"])


def _whole(state: Any) -> Any:
    """A state that one process has read, with full tensors in the place of their only shard."""
    if isinstance(state, TensorShard):
        return state.own
    if isinstance(state, dict):
        return {key: _whole(value) for key, value in state.items()}
    return type(state)(map(_whole, state)) if isinstance(state, list | tuple) else state


def test_what_one_process_cannot_write_is_nobodys_checkpoint(tmp_path) -> None:
    """What the others say stands in for the collective call."""
    rows = TensorShard(torch.arange(3.0), (6,))
    for rank in reversed(range(WORLD)):
        store = CheckpointStore(tmp_path, ranks=Ranks(rank, WORLD, lambda value: 0))
        with pytest.raises(CheckpointError, match="another process could not write its part"):
            store.save(7, {"x": rows})
    assert not list(tmp_path.iterdir())


def test_what_one_process_cannot_read_none_takes(tmp_path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (5, 7):
        store.save(step, {"step": step})
    others = iter([7, 0, 5, 1])  # the newest that they see, and whether they can read it
    ranks = Ranks(min=lambda value: min(value, next(others)))
    assert CheckpointStore(tmp_path, ranks=ranks).latest() == (5, {"step": 5})


def test_a_sharded_flow_in_bf16_is_told_its_times_unrounded(tmp_path) -> None:
    """All that is sharded is computed in bf16, so digits are lost; but fewer than with times in bf16, which has 8
    bits."""
    reference = load_reference(str(pipelines.build(tmp_path / "sd3", family="sd3")))
    xt, t = (torch.randn(64, *reference.latent_shape, generator=torch.Generator().manual_seed(0)), torch.arange(300, 940, 10))
    c = reference.encode_prompts(["a red hat"] * len(t))
    times = reference.schedule.fed(t)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        network = sharded(lambda device: reference.network(device=device), init_device_mesh("cpu", (1,)), "bf16")
        with torch.no_grad(), autocast("bf16", torch.device("cpu")):
            ours = reference.denoiser(network).output(xt, times, c)
    finally:
        torch.distributed.destroy_process_group()
    with torch.no_grad():
        exact, rounded = (reference.denoiser().output(xt, fed, c) for fed in (times, times.bfloat16().float()))
    assert (ours - exact).square().mean() < (rounded - exact).square().mean() / 4
