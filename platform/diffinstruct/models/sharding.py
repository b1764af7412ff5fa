"""Networks that are spread over the training processes (FSDP2, `fully_shard`), for what one GPU does not hold.

Each process keeps its rows of every weight, and with them of gradients, Adam states and average; a block's weights are
whole for as long as the block computes. A forward pass is then a collective call: all processes make it, also for
pictures that one alone looks at.

A file's weights are read by one process, into main memory, and dealt out from there; the others never hold a whole
network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from diffinstruct.run_folder.state_tree import TensorShard


def sharded(load: Callable[[str], nn.Module], mesh: DeviceMesh, precision: str) -> nn.Module:
    """The network that `load(device)` gives, spread over the mesh; `load("meta")` gives it without weights.

    precision: "bf16" gathers and computes in bf16, under autocast; gradients meet in fp32.
    """
    network: Any = load("meta")
    rank = mesh.get_rank()
    weights = dict(load("cpu").named_parameters()) if rank == 0 else {}
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else MixedPrecisionPolicy()
    for module in blocks(network):
        # A flow's times are floats: where they come in, nothing is rounded
        of = replace(policy, cast_forward_inputs=module is not network)
        # Reshard the root after forward, too: a no-grad forward would leave it unsharded and the optimizer would see
        # mixed tensors.
        fully_shard(module, mesh=mesh, mp_policy=of, reshard_after_forward=True)
    placed = {}
    for name, parameter in network.named_parameters():
        whole = weights.pop(name).detach() if rank == 0 else torch.empty(parameter.shape, dtype=parameter.dtype)
        placed[name] = distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements)
    network.load_state_dict(placed, strict=False, assign=True)  # buffers are there
    return network


def blocks(network: Any) -> list[nn.Module]:
    """The parts whose weights are gathered together, inner ones first; the network itself, for what is in none,
    last."""
    found = [module for module in network.modules() if type(module).__name__ in network._no_split_modules]
    return [*reversed(found), network]


@torch.no_grad()
def gathered(network: nn.Module, whole: nn.Module) -> nn.Module:
    """`whole`, which comes without weights, with those of a sharded network, on the CPU. All processes call it, the
    first one gets the weights."""
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
    """A state with this process's Rows in the place of sharded tensors."""
    if isinstance(state, DTensor):
        return TensorShard(state.to_local(), tuple(state.shape))
    if isinstance(state, dict):
        return {key: to_shards(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(to_shards(value) for value in state)
    return state


def to_dtensors(state: Any, mesh: DeviceMesh) -> Any:
    """The inverse of `rows`."""
    if isinstance(state, TensorShard):
        stride = torch.empty(state.shape, device="meta").stride()
        own = state.own.to(mesh.device_type)
        return DTensor.from_local(own, mesh, [Shard(0)], shape=torch.Size(state.shape), stride=stride, run_check=False)
    if isinstance(state, dict):
        return {key: to_dtensors(value, mesh) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(to_dtensors(value, mesh) for value in state)
    return state
