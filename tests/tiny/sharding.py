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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from diffinstruct.config.experiment import Experiment
from diffinstruct.method.noise import NoiseStreams
from diffinstruct.method.rewards import Scores
from diffinstruct.method.step import TrainState, alternating_round
from diffinstruct.models.pipeline import Reference, load_reference
from diffinstruct.models.roles import make_roles, unsharded
from diffinstruct.models.sharding import gathered, sharded, to_dtensors, to_shards
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


def process(rank: int, world: int, experiment: Experiment, folder: Path) -> None:
    """Ten rounds with one stop in between, from which other networks go on; the first process leaves what came out."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.distributed.init_process_group(
        "gloo", f"file://{folder / 'meeting'}", timedelta(minutes=5), rank=rank, world_size=world
    )
    mesh, reference = init_device_mesh("cpu", (world,)), opened(experiment)
    store, each = (CheckpointStore(folder / "checkpoints", ranks=Ranks(rank, world, all_reduce_min)), len(PROMPTS) // world)
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
    networks = {}
    for name, by in (("straight", train_state), ("resumed", again)):
        for role in ("generator", "ema", "score_network"):
            module: Any = getattr(by, role)
            network = getattr(module, "denoiser", module).network
            networks[f"{name}/{role}"] = gathered(network, reference.network(device="meta")).state_dict()
    held = sum(cast(Any, parameter).to_local().numel() for parameter in train_state.generator.parameters())
    all_of_it = sum(parameter.numel() for parameter in train_state.generator.parameters())
    torch.save({"held": held / all_of_it}, folder / f"rank-{rank}.pt")
    if rank == 0:
        torch.save({"networks": networks, "said": said}, folder / "result.pt")
    torch.distributed.destroy_process_group()
