"""The roles of the method as modules: full copies of the pretrained network, or adapters over one frozen base.

With adapters (LoRA, arXiv 2106.09685) one network plays several roles: the reference is the base alone, the generator,
its EMA and the score network are the base with an adapter each. Changing roles changes which adapters the layers
add; it copies nothing, and it leaves `requires_grad` as it is. (peft's own `set_adapter` does not: called between the
generator's forward and backward pass it would make the generator's gradient 0 without a word.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from diffinstruct.config.experiment import Experiment
from diffinstruct.method.objectives import facts
from diffinstruct.method.precision import frozen_dtype
from diffinstruct.models.denoiser import NetworkDenoiser, OneStepGenerator
from diffinstruct.models.lora import Role, SharedBase
from diffinstruct.models.pipeline import Reference

GENERATOR, EMA, SCORE, START = "generator", "average", "score", "start"
"""The names of the adapters, which are part of the names of the weights in checkpoints."""


@dataclass(frozen=True)
class Roles:
    """`generator` and `score_network` are trained, `reference` and `ema` (the generator's, in fp32) are not. Where the
    rewards alone train, there is neither score network nor reference. `start_error`: the share of its difference from
    the reference that a low-rank start has lost; None: it is exact."""

    generator: OneStepGenerator
    ema: OneStepGenerator
    score_network: NetworkDenoiser | None = None
    reference: NetworkDenoiser | None = None
    start_error: float | None = None


Materialize = Callable[[Callable[[str | None], nn.Module]], nn.Module]
"""Makes of a loader, device -> network (None: the reference's device; "meta": without weights), the network as this
process keeps it: whole or sharded."""


def unsharded(load: Callable[[str | None], nn.Module]) -> nn.Module:
    return load(None)


@dataclass(frozen=True)
class _Networks:
    """Makes the networks of a configuration: whole ones in fp32, frozen ones in its `precision`."""

    experiment: Experiment
    reference: Reference
    materialize: Materialize

    def network(self, start: str = "reference", dtype: torch.dtype | None = None) -> nn.Module:
        loaded = self.materialize(lambda device: self.reference.network(start, dtype, device))
        if self.experiment.compile:
            loaded.compile()
        return loaded

    def base(self, start: str = "reference") -> SharedBase:
        network = self.network(start, frozen_dtype(self.experiment.precision))
        exact = partial(self.reference.network, start, torch.float32, "cpu")
        return SharedBase(network, self.reference.family.adapted, self.experiment.activation_checkpointing, exact)

    def adapted(self, adapters: tuple[str, ...], of_reference: Callable[[], SharedBase]) -> tuple[list[Role], float | None]:
        """The generator's start in roles with these adapters, and what a low-rank start has lost. of_reference: gives the
        reference's base, where the generator stands on it."""
        generator, error, frozen_adapters = self.experiment.generator, None, tuple[str, ...]()
        own = generator.init_from != "reference" and not generator.init_rank
        base = self.base(generator.init_from) if own else of_reference()
        if generator.init_rank:
            error = base.add_difference(START, self.network(generator.init_from), generator.init_rank)
            frozen_adapters = (START,)
        for adapter in adapters:
            base.add(adapter, generator.lora_rank, self.experiment.seed)
        return [base.role(adapter, frozen_adapters) for adapter in adapters], error


def trained_generator(experiment: Experiment, reference: Reference, weights: dict[str, Tensor]) -> OneStepGenerator:
    """The generator's EMA with the weights of a checkpoint; no other role's network is made."""
    generator = experiment.generator
    network: nn.Module
    if generator.lora_rank:
        networks = _Networks(experiment, reference, unsharded)
        (network,), _ = networks.adapted((EMA,), networks.base)
    else:
        network = reference.network(device="meta")
    ema = reference.one_step(network, generator.timestep, generator.input_scale)
    ema.load_state_dict(weights, assign=not generator.lora_rank)
    return ema


def make_roles(experiment: Experiment, reference: Reference, materialize: Materialize = unsharded) -> Roles:
    """The roles of a configuration. `lora_rank` 0 is a full copy in fp32; what is frozen is in `precision`."""
    generator, score_network, error = experiment.generator, experiment.score_network, None
    networks = _Networks(experiment, reference, materialize)
    base = cache(networks.base)  # with rewards alone nothing may need it
    trained: nn.Module
    ema: nn.Module
    if generator.lora_rank:
        (trained, ema), error = networks.adapted((GENERATOR, EMA), base)
    else:
        trained, ema = networks.network(generator.init_from), networks.network(generator.init_from)
    divergence = facts(experiment.objective.name).divergence
    if divergence and score_network.lora_rank:  # before any role says what it trains: to add an adapter freezes all
        base().add(SCORE, score_network.lora_rank, experiment.seed + 1)
    one_step = partial(reference.one_step, timestep=generator.timestep, input_scale=generator.input_scale)
    generators = one_step(trained.requires_grad_(True)), one_step(ema.requires_grad_(False)).eval()
    if not divergence:
        return Roles(*generators, start_error=error)
    score = base().role(SCORE) if score_network.lora_rank else networks.network()
    trained_score = reference.denoiser(score.requires_grad_(True))
    return Roles(*generators, trained_score, reference.denoiser(base().role()).eval(), error)
