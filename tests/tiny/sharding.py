"""What the processes of test_sharding.py do; a module of its own, since they import it."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from diffinstruct.config.experiment import Experiment
from diffinstruct.method.noise import NoiseStreams
from diffinstruct.method.rewards import Scores
from diffinstruct.method.step import TrainState, alternating_round
from diffinstruct.models.pipeline import Reference, load_reference
from diffinstruct.models.roles import make_roles, unsharded
from diffinstruct.models.sharding import gathered, shard_mesh, shard_ranks, sharded, to_dtensors, to_shards
from diffinstruct.ranks import Ranks
from diffinstruct.run_folder.checkpoint import CheckpointStore
from diffinstruct.training.build import make_step_config, make_train_state

PROMPTS = ["a red hat", "something else", "a boat", "nothing"]
ROUNDS = 10


def make_state(experiment: Experiment, reference: Reference, mesh: DeviceMesh | None = None) -> TrainState:
    place: Any = partial(sharded, mesh=mesh, precision=experiment.precision) if mesh else unsharded
    return make_train_state(
        experiment, make_roles(experiment, reference, place), reference.null_conditions(), lambda module: module
    )


def opened(experiment: Experiment) -> Reference:
    """In double precision: Adam makes a whole step of a gradient that is 0 but for rounding."""
    return load_reference(experiment.reference.model, torch.float64)


def reward(latents: Tensor, prompts: Any) -> Any:
    """Pulls every latent towards 1."""
    gradient = 1 - latents
    answer = Scores({"one": -(gradient**2).flatten(1).sum(1) / 2}, gradient, 0.0, len(latents))
    return lambda: answer


def go(
    experiment: Experiment, reference: Reference, train_state: TrainState, steps: range, of: slice = slice(0, 4)
) -> list[dict[str, float]]:
    """Rounds, and what they say that is alike on all processes."""
    settings, c = make_step_config(experiment, reference.schedule), reference.encode_prompts(PROMPTS[of])
    found = []
    for step in steps:
        draws = NoiseStreams(0, step, reference.latent_shape, of, torch.device("cpu"))
        said = alternating_round(train_state, settings, reference.schedule, draws, PROMPTS[of], c, reward)
        found.append({key: said[key] for key in ("gradient_norm/generator", "gradient_norm/score_network")})
    return found


def all_reduce_min(value: int) -> int:
    values = torch.tensor(value)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN)
    return int(values)


def meet(rank: int, world: int, folder: Path) -> None:
    """The process group, whose processes meet in `folder`."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", meeting, timedelta(minutes=5), rank=rank, world_size=world)


def whole(train_state: TrainState, reference: Reference) -> dict[str, dict[str, Tensor]]:
    """The networks' weights by role, in the first process; a collective call."""
    networks = {}
    for role in ("generator", "ema", "score_network"):
        module: Any = getattr(train_state, role)
        network = getattr(module, "denoiser", module).network
        networks[role] = gathered(network, reference.network(device="meta")).state_dict()
    return networks


def process(rank: int, world: int, experiment: Experiment, folder: Path, degree: int | None = None) -> None:
    """Ten rounds with one stop in between, from which other networks go on; the first process leaves what came out."""
    meet(rank, world, folder)
    mesh, reference = shard_mesh("cpu", world, degree), opened(experiment)
    ranks, writes = shard_ranks(mesh, Ranks(rank, world, all_reduce_min))
    store, each = CheckpointStore(folder / "checkpoints", ranks=ranks, writes=writes), len(PROMPTS) // world
    own = slice(rank * each, (rank + 1) * each)
    train_state = make_state(experiment, reference, mesh)
    with torch.no_grad():  # as a picture of the average, before a round and between two
        train_state.ema(torch.zeros(2, *reference.latent_shape, dtype=torch.float64), reference.encode_prompts(PROMPTS[:2]))
    said = go(experiment, reference, train_state, range(ROUNDS // 2), own)
    store.save(ROUNDS // 2, to_shards(train_state.state_dict()))
    said += go(experiment, reference, train_state, range(ROUNDS // 2, ROUNDS), own)
    again = make_state(experiment, reference, mesh)
    found = store.latest()
    assert found
    again.load_state_dict(to_dtensors(found[1], mesh))
    go(experiment, reference, again, range(ROUNDS // 2, ROUNDS), own)
    networks = {
        f"{name}/{role}": weights
        for name, state in (("straight", train_state), ("resumed", again))
        for role, weights in whole(state, reference).items()
    }
    held = sum(cast(Any, parameter).to_local().numel() for parameter in train_state.generator.parameters())
    all_of_it = sum(parameter.numel() for parameter in train_state.generator.parameters())
    torch.save({"held": held / all_of_it}, folder / f"rank-{rank}.pt")
    if rank == 0:
        torch.save({"networks": networks, "said": said}, folder / "result.pt")
    torch.distributed.destroy_process_group()


def go_on(rank: int, world: int, experiment: Experiment, folder: Path, store: Path) -> None:
    """The second half of the rounds, from a checkpoint in `store` that another number of processes has written."""
    meet(rank, world, folder)
    mesh, reference = shard_mesh("cpu", world), opened(experiment)
    ranks, _ = shard_ranks(mesh, Ranks(rank, world, all_reduce_min))
    found, train_state = CheckpointStore(store, ranks=ranks).latest(), make_state(experiment, reference, mesh)
    assert found
    train_state.load_state_dict(to_dtensors(found[1], mesh))
    each = len(PROMPTS) // world
    go(experiment, reference, train_state, range(ROUNDS // 2, ROUNDS), slice(rank * each, (rank + 1) * each))
    networks = whole(train_state, reference)
    if rank == 0:
        torch.save(networks, folder / "result.pt")
    torch.distributed.destroy_process_group()
