"""Networks that are spread over the training processes (FSDP2, `fully_shard`), for what one GPU does not hold.

Each process keeps its rows of every weight, gradient, Adam state and of the EMA; a block's weights are whole for as long
as the block computes. A forward pass is a collective call: all processes make it, also for pictures that one looks at.
One process reads a file's weights, into main memory, and deals them out; the others never hold a whole network.
With a shard degree (HSDP) each group of so many processes holds all of it, so that only gradients leave a machine.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from diffinstruct.ranks import Ranks
from diffinstruct.run_folder.state_tree import TensorShard


def shard_mesh(device: str, world: int, degree: int | None = None) -> DeviceMesh:
    """The mesh of all processes over which networks are sharded; with a degree below their number, two-dimensional:
    copies by shards. Ray Train numbers processes machine by machine, so a group of neighbours lies on one machine."""
    if degree is None or degree == world:
        return init_device_mesh(device, (world,))
    return init_device_mesh(device, (world // degree, degree), mesh_dim_names=("replicate", "shard"))


def shard_ranks(mesh: DeviceMesh, ranks: Ranks) -> tuple[Ranks, bool]:
    """A process among those that hold one copy of the networks, as a CheckpointStore numbers them, and whether that copy
    is the first, which is written."""
    copy, shard = divmod(ranks.rank, mesh.shape[-1])
    return replace(ranks, rank=shard, world=mesh.shape[-1]), copy == 0


def sharded(load: Callable[[str], nn.Module], mesh: DeviceMesh, precision: str) -> nn.Module:
    """The network that `load(device)` gives, spread over the mesh; `load("meta")` gives it without weights.

    precision: "bf16" gathers and computes in bf16, under autocast; gradients are reduced in fp32.
    """
    network: Any = load("meta")
    rank = mesh.get_rank()
    weights = dict(load("cpu").named_parameters()) if rank == 0 else {}
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else MixedPrecisionPolicy()
    for module in blocks(network):
        # A flow's times are floats: where they come in, nothing is rounded
        own = replace(policy, cast_forward_inputs=module is not network)
        # Reshard the root after forward, too: a no-grad forward would leave it unsharded and the optimizer would see
        # mixed tensors.
        fully_shard(module, mesh=mesh, mp_policy=own, reshard_after_forward=True)
    placed = {}
    for name, parameter in network.named_parameters():
        whole = weights.pop(name).detach() if rank == 0 else torch.empty(parameter.shape, dtype=parameter.dtype)
        placed[name] = distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements)
    network.load_state_dict(placed, strict=False, assign=True)  # buffers are there
    return network


def blocks(network: Any) -> list[nn.Module]:
    """The modules whose weights are gathered together, inner ones first, the network itself last."""
    found = [module for module in network.modules() if type(module).__name__ in network._no_split_modules]
    return [*reversed(found), network]


@torch.no_grad()
def gathered(network: nn.Module, whole: nn.Module) -> nn.Module:
    """`whole`, which comes without weights, with those of a sharded network, on the CPU. A collective call; only the
    first process gets the weights."""
    first = torch.distributed.get_rank() == 0
    weights = {}
    for name, tensor in network.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if first:
            weights[name] = full.cpu()
    if first:
        whole.load_state_dict(weights, assign=True)
    return whole


def to_shards(state: Any) -> Any:
    """A state with this process's TensorShards in the place of sharded tensors."""
    return _replaced(state, DTensor, lambda tensor: TensorShard(tensor.to_local(), tuple(tensor.shape)))


def to_dtensors(state: Any, mesh: DeviceMesh) -> Any:
    """The inverse of `to_shards`."""

    def of_all(shard: TensorShard) -> DTensor:
        stride, own = torch.empty(shard.shape, device="meta").stride(), shard.own.to(mesh.device_type)
        placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
        return DTensor.from_local(own, mesh, placements, shape=torch.Size(shard.shape), stride=stride, run_check=False)

    return _replaced(state, TensorShard, of_all)


def _replaced(state: Any, kind: type, replace: Callable[[Any], Any]) -> Any:
    if isinstance(state, kind):
        return replace(state)
    if isinstance(state, dict):
        return {key: _replaced(value, kind, replace) for key, value in state.items()}
    return type(state)(_replaced(value, kind, replace) for value in state) if isinstance(state, list | tuple) else state
