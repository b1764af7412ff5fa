"""The cost of a round, counted by running it: the training's own step on tensors that have shapes and no content.

Memory is what tensors hold at once, to the byte; what kernels use inside themselves and what an allocator keeps in
reserve come on top. Work is what torch's own formulas say of each product, recomputation included. Passes are counted
where they happen, at each role's network.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.sections import RewardsConfig
from diffinstruct.method.noise import NoiseStreams
from diffinstruct.method.rewards import Collect, LatentRewards, RewardModel, RewardRequest, Scores, Send, scored
from diffinstruct.method.step import Metrics, StepConfig, TrainState, alternating_round
from diffinstruct.models.lora import Role
from diffinstruct.models.pipeline import Reference
from diffinstruct.models.roles import GENERATOR, SCORE, START, Roles, make_roles
from diffinstruct.planning.shapes import RememberedShapes
from diffinstruct.reward_service.reward_validation import BATCH, CANDIDATES, FEW, PICTURES, pictures_for
from diffinstruct.training.build import make_step_config, make_train_state

CPU = torch.device("cpu")
aten = torch.ops.aten
FORMULAS = {  # torch knows the GPUs' kernels alone
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[aten._scaled_dot_product_flash_attention_backward],
}


@dataclass(frozen=True)
class Passes:
    """The passes of one sample through a network in a round; backward ones end at its input, or reach the weights, too."""

    forwards: int = 0
    backwards: int = 0
    to_weights: int = 0

    def repeated(self, times: int, first: Passes, second: Passes) -> Passes:
        """These passes, and so many times those that lie between two earlier counts."""
        counts = zip(astuple(self), astuple(first), astuple(second), strict=True)
        return Passes(*(total + times * (after - before) for total, before, after in counts))

    @property
    def work(self) -> int:
        """In forward passes: a backward pass costs one for the input and one more for the weights."""
        return self.forwards + self.backwards + self.to_weights


@dataclass(frozen=True)
class Footprint:
    """The cost of one process. `held`: bytes between two rounds. `peak`: the most bytes at once, those included.
    `flops`: of a round. `passes`: by role, "decoder" among them. `parameters`: of each role's own weights."""

    held: int
    peak: int
    flops: int
    passes: Mapping[str, Passes] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)

    @property
    def passing(self) -> int:
        """Activations, and what else comes and goes within a round."""
        return self.peak - self.held


def training_footprint(
    experiment: Experiment, reference: Reference, rewards: Mapping[str, RewardModel] | None = None
) -> Footprint:
    """The footprint of a process that trains, with whole networks and without text encoders; with rewards, if it
    computes them itself. Their own weights are not counted, the decoder's are."""
    experiment = experiment.model_copy(update={"compile": False})  # which may take less, and knows no such tensors
    per_worker = experiment.global_batch_size // experiment.cluster.workers
    # One micro-batch after another takes what two take, but for latents
    samples = min(per_worker, 2 * experiment.micro_batch_size) if experiment.micro_batch_size else per_worker
    config, roles = make_step_config(experiment, reference.schedule), roles_without_content(experiment, reference)
    # Later updates of the score network take what the second takes
    more, config = max(config.score_updates - 2, 0), replace(config, score_updates=min(config.score_updates, 2))
    decoder = reference.empty("vae")
    with _counting() as count:
        train_state, one_round = round_without_content(experiment, reference, roles, config, samples)
        send = scoring(experiment.rewards, reference, decoder, rewards) if rewards is not None else _no_rewards
        networks = {"generator": roles.generator.denoiser, "score network": roles.score_network, "reference": roles.reference}
        counters = {role: PassCounter(network) for role, network in networks.items() if network is not None}
        count.peak, count.flops = count.live, 0

        def work() -> tuple[int, dict[str, Passes]]:
            return count.flops, {role: counter.passes(samples) for role, counter in counters.items()}

        updates = list[tuple[int, dict[str, Passes]]]()
        if optimizer := train_state.score_optimizer:
            optimizer.register_step_post_hook(lambda *_: updates.append(work()))
        one_round(send)
        flops, passes = work()
        if more:
            (flops_before, before), (flops_after, after) = updates
            flops += more * (flops_after - flops_before)
            passes = {role: seen.repeated(more, before[role], after[role]) for role, seen in passes.items()}
        parameters = {
            "generator": _parameters(roles.generator, f".{GENERATOR}."),
            "score network": _parameters(roles.score_network, f".{SCORE}."),
            "start": _parameters(roles.generator, f".{START}."),
        }
        return Footprint(count.live, count.peak, flops * per_worker // samples, passes, parameters)


def roles_without_content(experiment: Experiment, reference: Reference) -> Roles:
    """The roles on the meta device. To be made before FakeTensorMode begins: peft cannot move its tensors."""
    return make_roles(experiment, reference, lambda load: load("meta"))


def round_without_content(
    experiment: Experiment, reference: Reference, roles: Roles, config: StepConfig, samples: int, device: torch.device = CPU
) -> tuple[TrainState, Callable[[Send], Metrics]]:
    """The round of these roles on a device that need not be there, with gradients and Adam states as a round before has
    left them, and its state. To be called in FakeTensorMode; `config` is to be made outside, since it computes with numbers."""
    with torch.device(device):
        null = {key: torch.empty_like(value, device=device) for key, value in reference.blank_conditions().items()}
        # Sharded networks are gathered in the arithmetic's precision, so autocast makes no copies of them
        sharded_bf16 = experiment.cluster.fully_shard and experiment.precision == "bf16"
        _fill_roles(roles, torch.bfloat16 if sharded_bf16 else None)
    train_state = make_train_state(experiment, roles, null, lambda module: module)
    # Of the round's samples that are not gone through, too
    whole = max(samples, experiment.global_batch_size // experiment.cluster.workers)
    c = {key: value.expand(whole, *value.shape[1:]).clone()[:samples] for key, value in null.items()}
    for optimizer in filter(None, (train_state.generator_optimizer, train_state.score_optimizer)):
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            weight.grad = torch.empty_like(weight)
        for group in optimizer.param_groups:
            group["fused"] = True  # as on a GPU: one operation, and no copies on the way
        optimizer.step()
    noise = NoiseStreams(0, 1, reference.latent_shape, slice(0, samples), device)
    return train_state, partial(alternating_round, train_state, config, reference.schedule, noise, [""] * samples, c)


def rewards_footprint(config: RewardsConfig, reference: Reference, rewards: Mapping[str, RewardModel]) -> Footprint:
    """The footprint of a reward actor without its rewards' own weights; `flops` are those of a micro-batch."""
    decoder = reference.empty("vae")
    with _counting() as count:
        send = scoring(config, reference, decoder, rewards)
        held, samples = count.live, config.micro_batch_size
        counter = PassCounter(decoder.decoder)
        send(torch.empty(samples, *reference.latent_shape), [""] * samples)
        return Footprint(held, count.peak, count.flops, {"decoder": counter.passes(samples)})


def validation_footprint(experiment: Experiment, reference: Reference, rewards: Mapping[str, RewardModel]) -> Footprint:
    """The footprint of what a process does that validates rewards, without their own weights: it decodes the pictures,
    scores them in batches, and asks a few for gradients and along directions."""
    pictures = PICTURES if experiment.rewards.normalize == "std" else pictures_for(experiment.global_batch_size)
    decoder = reference.empty("vae")
    with _counting() as count:
        reference.vae = _fill(decoder.requires_grad_(False), {})
        held = count.live
        with torch.no_grad():
            shape = reference.decode(torch.empty(1, *reference.latent_shape)).shape[1:]
        decoded = torch.empty(pictures, *shape)
        images = torch.empty_like(decoded)  # put together of those
        del decoded
        for name, reward in rewards.items():
            with torch.no_grad():
                scored(name, reward, images[:BATCH], [""] * len(images[:BATCH]), {})
            leaf = images[:FEW].clone().requires_grad_(name in {each.name for each in experiment.rewards.trained})
            scores = scored(name, reward, leaf, [""] * len(leaf), {})
            if scores.requires_grad:
                torch.autograd.grad(scores.sum(), leaf)
                torch.empty(CANDIDATES * 2, *leaf.shape)  # directions, and their products with the gradient
        return Footprint(held, count.peak, count.flops)


class PassCounter:
    """It counts the samples that pass through a network, forward and backward."""

    def __init__(self, network: nn.Module) -> None:
        self.forwards = self.backwards = self.to_weights = self._last = 0
        network.register_forward_hook(self._forward)
        if trained := [weight for weight in network.parameters() if weight.requires_grad]:
            trained[-1].register_post_accumulate_grad_hook(self._accumulated)  # the output layer's: first in a pass

    def passes(self, samples: int) -> Passes:
        return Passes(self.forwards // samples, self.backwards // samples, self.to_weights // samples)

    def _forward(self, network: nn.Module, inputs: Any, output: Tensor) -> None:
        self.forwards += len(output)
        if output.requires_grad:
            output.register_hook(partial(self._backward, len(output)))

    def _backward(self, samples: int, gradient: Tensor) -> None:
        self.backwards += samples
        self._last = samples

    def _accumulated(self, weight: Tensor) -> None:
        self.to_weights += self._last


def _fill_roles(roles: Roles, gathered: torch.dtype | None) -> None:
    """Tensors without content for every role's weights; roles over one base share its."""
    filled = dict[nn.Parameter, nn.Parameter]()
    for role in filter(None, (roles.generator.denoiser, roles.score_network, roles.ema.denoiser, roles.reference)):
        if isinstance(role.network, Role):
            _fill(role.network.base.network, filled, gathered)
        _fill(role.network, filled, gathered)


def _parameters(role: nn.Module | None, adapter: str) -> int:
    """How many of its own a role has; of a role over a shared network those of this adapter."""
    if role is None:
        return 0
    network: Any = next((module for module in role.modules() if isinstance(module, Role)), None)
    named = network.base.network.named_parameters() if network else role.named_parameters()
    return sum(weight.numel() for name, weight in named if not network or adapter in name)


def scoring(config: RewardsConfig, reference: Reference, decoder: nn.Module, rewards: Mapping[str, RewardModel]) -> Send:
    """The rewards in this process, behind a decoder that gets tensors without content on torch's default device."""
    reference.vae = _fill(decoder.requires_grad_(False), {})
    if reference.activation_checkpointing:
        reference.vae.enable_gradient_checkpointing()
    latent_rewards = LatentRewards(reference.decode, rewards)
    weights = {reward.name: reward.weight for reward in config.trained if reward.name in rewards}

    def send(latents: Tensor, prompts: Sequence[str]) -> Collect:
        answer = latent_rewards(latents, prompts, RewardRequest(weights, config.micro_batch_size))
        return lambda: answer

    return send


def _fill(network: nn.Module, filled: dict[nn.Parameter, nn.Parameter], dtype: torch.dtype | None = None) -> Any:
    """Put a tensor without content in the place of each weight and buffer; `filled`: the weights that have theirs."""
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight not in filled:  # roles over one base share its weights
                own = nn.Parameter(torch.empty(weight.shape, dtype=dtype or weight.dtype), weight.requires_grad)
                filled[weight] = filled[own] = own
            module._parameters[name] = filled[weight]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return network


def _no_rewards(latents: Tensor, prompts: Sequence[str]) -> Collect:
    return lambda: Scores({}, torch.zeros_like(latents), 0.0, len(latents))


@contextmanager
def _counting() -> Iterator[_Count]:
    with FakeTensorMode(allow_non_fake_inputs=True), norms_as_on_gpu(), _Count() as count:
        yield count


class _Count(TorchDispatchMode):
    """The bytes of all tensors that are there, and the work done. A number that the program asks a tensor for is 1/2:
    finite, positive, below 1."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()
        self._shapes = RememberedShapes()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and what keeps the compiler out takes longer than an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # more than half of all calls
            return args[0].fake_device
        if func is aten._local_scalar_dense.default:
            return 0.5
        result = self._shapes(func, args, kwargs or {})
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor):
                self._see(made)
        if formula := FORMULAS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result

    def _see(self, tensor: Tensor) -> None:
        if not isinstance(tensor, FakeTensor) and tensor.is_meta:  # in this order: a fake one's device is an operation
            return
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.live -= size


@contextmanager
def norms_as_on_gpu() -> Iterator[None]:
    """In the block, norms under autocast are computed in fp32 and keep their fp32 inputs, as a GPU's; a CPU's are not."""

    def in_fp32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def computed(*args: Any, **kwargs: Any) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args = tree_map_only(Tensor, Tensor.float, args)
            return norm(*args, **kwargs)

        return computed

    group_norm, layer_norm = in_fp32(torch.group_norm), in_fp32(torch.layer_norm)
    with mock.patch.object(torch, "group_norm", group_norm), mock.patch.object(torch, "layer_norm", layer_norm):
        yield
