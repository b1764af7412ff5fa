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
from torch import nn

from diffinstruct.config.experiment import Experiment
from diffinstruct.method.objectives import facts
from diffinstruct.method.precision import frozen_dtype
from diffinstruct.models.denoiser import NetworkDenoiser, OneStepGenerator
from diffinstruct.models.lora import SharedBase
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


def make_roles(experiment: Experiment, reference: Reference, materialize: Materialize = unsharded) -> Roles:
    """The roles of a configuration. `lora_rank` 0 is a full copy in fp32; what is frozen is in `precision`."""
    generator, score_network, error = experiment.generator, experiment.score_network, None
    frozen = frozen_dtype(experiment.precision)

    def network(start: str = "reference", dtype: torch.dtype | None = None) -> nn.Module:
        loaded = materialize(lambda device: reference.network(start, dtype, device))
        if experiment.compile:
            loaded.compile()
        return loaded

    def base_of(start: str) -> SharedBase:
        exact = partial(reference.network, start, torch.float32, "cpu")
        return SharedBase(network(start, frozen), reference.family.adapted, experiment.activation_checkpointing, exact)

    base = cache(partial(base_of, "reference"))  # with rewards alone nothing may need it
    trained: nn.Module
    ema: nn.Module
    if generator.lora_rank:
        differs, frozen_adapters = generator.init_from != "reference", tuple[str, ...]()
        shared = base_of(generator.init_from) if differs and not generator.init_rank else base()
        if differs and generator.init_rank:
            error = shared.add_difference(START, network(generator.init_from), generator.init_rank)
            frozen_adapters = (START,)
        shared.add(GENERATOR, generator.lora_rank, experiment.seed)
        shared.add(EMA, generator.lora_rank, experiment.seed)
        trained, ema = shared.role(GENERATOR, frozen_adapters), shared.role(EMA, frozen_adapters)
    else:
        trained, ema = network(generator.init_from), network(generator.init_from)
    divergence = facts(experiment.objective.name).divergence
    if divergence and score_network.lora_rank:  # before any role says what it trains: to add an adapter freezes all
        base().add(SCORE, score_network.lora_rank, experiment.seed + 1)
    one_step = partial(reference.one_step, timestep=generator.timestep, input_scale=generator.input_scale)
    generators = one_step(trained.requires_grad_(True)), one_step(ema.requires_grad_(False)).eval()
    if not divergence:
        return Roles(*generators, start_error=error)
    score = base().role(SCORE) if score_network.lora_rank else network()
    trained_score = reference.denoiser(score.requires_grad_(True))
    return Roles(*generators, trained_score, reference.denoiser(base().role()).eval(), error)
