"""One frozen network with adapters that several roles share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class SharedBase:
    """A frozen network that several roles share.

    adapted: endings of the names of the layers that adapters belong to.
    layers: those that have some, by the names that they have without.
    exact: reads the network anew, in fp32, where what is held here may be rounded.
    """

    def __init__(
        self,
        network: Any,
        adapted: Sequence[str],
        activation_checkpointing: bool = False,
        exact: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.exact = exact
        self.network: Any = network.requires_grad_(False).eval()
        self.adapted = list(adapted)
        self.active_adapters: list[str] = []
        self.layers: Mapping[str, LoraLayer] = {}
        if activation_checkpointing:
            network.enable_gradient_checkpointing(self._checkpoint)

    @property
    def without_weights(self) -> bool:
        """Whether it is there for counting: on the meta device."""
        return bool(next(self.network.parameters()).is_meta)

    def add(self, adapter: str, rank: int, seed: int) -> None:
        """An adapter that changes nothing yet: B is 0, A is drawn by `seed`."""
        with torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(seed)
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=self.adapted)
            inject_adapter_in_model(config, self.network, adapter, low_cpu_mem_usage=self.without_weights)
        self.layers = {name: module for name, module in self.network.named_modules() if isinstance(module, LoraLayer)}
        for name, parameter in self.network.named_parameters():
            if f".{adapter}." in name:
                parameter.data = parameter.data.float()  # whatever the base is in
        self.network.requires_grad_(False)  # each role says what of it is trained
        for layer in self.layers.values():  # one list for all: a role is changed in one place, also within a backward pass
            layer._active_adapter = self.active_adapters

    def add_difference(self, adapter: str, other: nn.Module, rank: int) -> float:
        """An adapter that makes this network as much like `other` as its rank allows. Returns the share of the
        difference, in the Frobenius norm over all weights, that it does not hold."""
        if self.without_weights:
            self.add(adapter, rank, 0)
            return 0.0
        whole, target = 0.0, dict(other.named_parameters())
        for name, parameter in _own(dict(self.network.named_parameters())):
            whole += (target[name].float() - parameter.float()).square().sum().item()
        lost = whole
        self.add(adapter, rank, 0)
        for name, layer in self.layers.items():
            weight = layer.get_base_layer().weight
            difference = target[f"{name}.weight"].float() - weight.float()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                u, s, v = torch.svd_lowrank(difference.flatten(1), q=min(rank, *difference.flatten(1).shape), niter=4)
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            a.data.zero_()
            b.data.zero_()
            a.data.flatten(1)[: len(s)].copy_((v * s.sqrt()).T)
            b.data.flatten(1)[:, : len(s)].copy_(u * s.sqrt())
            held = ((u * s) @ v.T).view_as(difference)
            lost += (difference - held).square().sum().item() - difference.square().sum().item()
        return (max(lost, 0.0) / whole) ** 0.5 if whole else 0.0

    def role(self, adapter: str | None = None, frozen_adapters: tuple[str, ...] = ()) -> Role:
        """The network with an adapter, or alone. frozen_adapters: adapters that it adds, too, and that it does not train."""
        return Role(self, adapter, frozen_adapters)

    @contextmanager
    def with_adapters(self, names: tuple[str, ...]) -> Iterator[None]:
        before = tuple(self.active_adapters)
        self.active_adapters[:] = names
        try:
            yield
        finally:
            self.active_adapters[:] = before

    def _checkpoint(self, block: Any, *inputs: Any) -> Any:
        """Recompute a block in the backward pass in the role of the forward pass, whatever role it plays by then."""
        names = tuple(self.active_adapters)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), self.with_adapters(names)))


class Role(nn.Module):
    """A shared network in one role, called as the network itself. Its parameters and state are its own adapter's."""

    def __init__(self, base: SharedBase, adapter: str | None, frozen_adapters: tuple[str, ...]) -> None:
        super().__init__()
        self.base, self.adapter, self.frozen_adapters = base, adapter, frozen_adapters
        self.weights = nn.ParameterDict()
        for name, parameter in base.network.named_parameters():
            if adapter and f".{adapter}." in name:
                self.weights[name.replace(".", "/")] = parameter

    def forward(self, *inputs: Any, **more: Any) -> Any:
        with self.base.with_adapters((*self.frozen_adapters, self.adapter) if self.adapter else self.frozen_adapters):
            return self.base.network(*inputs, **more)

    @property
    def dtype(self) -> Any:
        return self.base.network.dtype

    @property
    def config(self) -> Any:
        return self.base.network.config

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The network's weights as the files have them with the adapters added, in fp32, one after another: all at once
        would be a second network. To be read: weights without adapters may be the base's own."""
        held = self.base.exact() if self.base.exact and self.dtype != torch.float32 else self.base.network
        for name, value in _own(held.state_dict()):
            weight = value.float()
            if layer := self.base.layers.get(name.removesuffix(".weight")):
                for adapter in (*self.frozen_adapters, self.adapter):
                    weight = weight + layer.get_delta_weight(adapter).to(weight)  # a new tensor: the base's own stays
            yield name, weight

    def lora_weights(self) -> Mapping[str, Tensor]:
        """Its own adapter as diffusers' `save_lora_weights` wants it: "<layer>.lora_A.weight" -> weight."""
        named = ((name.replace("/", "."), weight) for name, weight in self.weights.items())
        return {name.replace(f".{self.adapter}.", "."): weight.detach().cpu() for name, weight in named}


def _own(named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A network's own parameters (or parameters and buffers), under the names that they have without adapters."""
    for name, value in named.items():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), value
