"""What a run takes, said before it starts: memory and passes of each role, payloads, placement.

Counted on the pipeline's configuration files, without its weights: those of the usual hub models lie in `shapes/`, as
published, for that needs no network. Of the rewards on the models themselves. What a round holds and does beside is
counted by `footprint`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from textwrap import shorten
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from diffinstruct.config.experiment import Experiment
from diffinstruct.errors import UserError
from diffinstruct.method.objectives import facts
from diffinstruct.method.precision import frozen_dtype
from diffinstruct.method.rewards import RewardModel
from diffinstruct.models.lora import SharedBase
from diffinstruct.models.pipeline import load_reference
from diffinstruct.models.sharding import blocks
from diffinstruct.models.sources import pinned
from diffinstruct.planning import footprint
from diffinstruct.reward_service.client import load_reward
from diffinstruct.training.build import make_step_config
from reward_models import NAMES

SHAPES = Path(__file__).parents[1] / "models" / "hub_configs"
KEPT = 4
"""Checkpoints on disk: the two newest, the best, and one that is being written."""


@dataclass(frozen=True)
class ModelMemory:
    """One model of a training process or of a reward actor: parameters, bytes, and passes per sample and step."""

    name: str
    parameters: int
    weights: int
    trained: bool = False  # then it has gradients and two Adam states beside its weights
    averaged: bool = False
    forwards: int = 0
    backwards: int = 0

    @property
    def memory(self) -> int:
        return self.weights * (1 + 3 * self.trained + self.averaged)

    @property
    def row(self) -> str:
        sizes = [
            self.weights,
            self.weights * self.trained,
            2 * self.weights * self.trained,
            self.weights * self.averaged,
        ]
        cells = [f"{self.parameters / 1e6:.2f}", *(_mib(size) if size else "-" for size in sizes)]
        cells += [str(passes) if passes else "-" for passes in (self.forwards, self.backwards)]
        return f"{self.name:<24}" + "".join(f"{cell:>12}" for cell in cells)


HEADER = f"{'role':<24}" + "".join(
    f"{title:>12}" for title in ("parameters/M", "weights", "gradients", "Adam", "average", "forwards", "backwards")
)


def shapes(model: str) -> str:
    """For counting alone: the configuration files that are shipped of a hub model; of another, its own name."""
    folder = SHAPES / pinned(model)[0].replace("/", "--")
    return str(folder) if folder.is_dir() and not Path(model).exists() else model


def report(experiment: Experiment) -> tuple[str, str | None]:
    """What `experiment` takes, as text, and one line on what does not fit this machine or is not there, or None.

    Raises UserError where the reference cannot be read or a reward is none.
    """
    frozen = frozen_dtype(experiment.precision)
    reference = load_reference(
        shapes(experiment.reference.model),
        activation_checkpointing=experiment.activation_checkpointing,
        decoder_dtype=frozen,
    )
    make_step_config(experiment, reference.schedule)  # refuses what only the schedule can tell
    generator, score = experiment.generator, experiment.score_network
    objective = facts(experiment.objective.name)
    k = score.updates_per_step if objective.divergence else 0
    guided = (k > 0) * (1 + (experiment.reference.guidance_scale != 0))  # conditional and null
    through = int(objective.divergence and objective.network_gradient)  # gradient to the networks' inputs; KL has none
    reference.one_step(nn.Identity(), generator.timestep)  # refuses a timestep that its schedule has not
    network = sum(p.numel() for p in reference.empty_network().parameters())
    held_frozen = frozen.itemsize * network

    def player(name: str, rank: int, **more: Any) -> ModelMemory:
        if not rank:
            return ModelMemory(name, network, 4 * network, **more)
        base = SharedBase(reference.empty_network(), reference.family.adapted)
        base.add("it", rank, 0)
        adapter = sum(weight.numel() for weight in base.role("it").parameters())
        return ModelMemory(f"{name}'s adapter", adapter, 4 * adapter, **more)

    worker = [
        player(
            "generator",
            generator.lora_rank,
            trained=True,
            averaged=True,
            forwards=1 + (0 if score.reuse_sample else k),
            backwards=1,
        ),
        player("score network", score.lora_rank, trained=k > 0, forwards=k + (k > 0), backwards=k + through),
        ModelMemory("reference", network, held_frozen, forwards=guided, backwards=guided * through),
    ]
    spread = list(worker)
    if generator.lora_rank and generator.init_from != "reference":
        second = ModelMemory("generator's base", network, held_frozen)
        start = player("start", generator.init_rank) if generator.init_rank else second
        worker.append(start)
    if experiment.prompts.embeddings is None:
        for name, encoder in reference.empty_encoders().items():
            worker.append(ModelMemory(name.replace("_", " "), *_count(encoder)))
    trained = [reward.name for reward in experiment.rewards.trained]
    apart = [name for environment in experiment.cluster.rewards.environments for name in environment.rewards]
    uncounted, models = {}, dict[str, RewardModel]()
    actor = [ModelMemory("decoder", *_count(reference.empty_decoder()), forwards=1, backwards=1)]
    for name in (name for name in experiment.rewards.names if name not in apart):  # those may not even import here
        try:
            models[name] = load_reward(name)
            actor.append(ModelMemory(name, *_count(models[name]), forwards=1, backwards=int(name in trained)))
        except UserError as error:
            if not _out_of_reach(name, error):
                raise
            uncounted[name] = shorten(str(error.__cause__), 96, placeholder=" ...")
            models |= {name: _brightness} if name in trained else {}
    libraries = psutil.Process().memory_info().rss - sum(
        role.weights for role in actor[1:]
    )  # nothing else is loaded yet
    try:
        judging = footprint.of_rewards(experiment, reference, models)
    except Exception as error:  # they may be anybody's, and do with numbers what cannot be done without
        uncounted["rewards' activations"] = shorten(str(error), 96, placeholder=" ...")
        models = dict.fromkeys(trained, _brightness)
        judging = footprint.of_rewards(experiment, reference, models)

    # In forward passes of one network: a backward that reaches the weights costs two, one to the input alone costs one.
    work = worker[0].forwards + 2 + 3 * k + (1 + through) * ((k > 0) + guided)
    per_sample = 4 * prod(reference.latent_shape)
    asked, actors = experiment.cluster, experiment.reward_actors
    if not actors:  # each training process has the rewards itself
        worker, actor = [*worker, *actor], []
    cpus = asked.workers * asked.cpus_per_worker + actors * asked.rewards.cpus
    gpus = asked.workers * asked.use_gpu + actors * asked.rewards.gpus
    have_cpus, have_gpus = os.cpu_count() or 1, torch.cuda.device_count()
    if network > 10**8:  # operation by operation, as python goes
        print("check: going through a round without content, some minutes", file=sys.stderr, flush=True)
    training = footprint.of_training(experiment, reference, None if actors else models)
    shares = asked.workers if asked.fully_shard else 1
    held = [role.memory / (shares if role in spread else 1) for role in worker]
    # Of the largest block, weights of this one and the next, and its gradient, in the arithmetic's precision and in
    # fp32
    gathered = largest_block(reference.empty_network()) * (10 if experiment.precision == "bf16" else 16) * (shares > 1)
    per_worker, per_actor = (
        sum(held) + gathered + training.passing,
        sum(role.memory for role in actor) + judging.passing,
    )
    in_ram = asked.workers * (per_worker + libraries) * (not asked.use_gpu)
    in_ram += actors * (per_actor + libraries) * (asked.rewards.gpus == 0)
    flops = float(asked.workers * training.flops)
    flops += judging.flops * experiment.global_batch_size / experiment.rewards.micro_batch_size * (actors > 0)
    checkpoint = sum(role.weights * (3 * role.trained + role.averaged) for role in worker)
    in_ram += checkpoint  # the copy that is written while training goes on
    runs = Path(experiment.output_dir).absolute()
    free = shutil.disk_usage(next(folder for folder in (runs, *runs.parents) if folder.exists())).free
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = [
        HEADER,
        f"each of {asked.workers} training processes, {_mib(sum(role.memory for role in worker))}",
        *(role.row for role in worker),
        *([f"each of {actors} reward actors, {_mib(sum(role.memory for role in actor))}"] if actors else []),
        *(role.row for role in actor),
        *(f"{name:<24}in an environment of its own: not counted" for name in apart),
        *(f"{name:<24}not counted: {why}" for name, why in uncounted.items()),
        f"work       {work} forwards' worth of one network per sample and step, {experiment.global_batch_size} samples a step; "
        f"in all {_flop(flops)}, {_flop(flops / experiment.global_batch_size)} a sample",
        f"payload    {_mib(experiment.global_batch_size * per_sample * (actors > 0))} of latents to the reward actors a step, "
        "as much back",
        f"placement  {asked.workers} x {asked.cpus_per_worker} + {actors} x {asked.rewards.cpus:g} = {cpus:g} "
        f"CPUs and {gpus:g} GPUs; this machine has {have_cpus} and {have_gpus}",
        *(
            f"{'':<11}{count} x {amount:g} = {count * amount:g} {name}, which nodes have to declare"
            for count, declared in ((asked.workers, asked.worker_resources), (actors, asked.rewards.resources))
            for name, amount in declared.items()
        ),
        f"memory     training process {_mib(per_worker)}: {_mib(sum(held))} held"
        + (f" (networks by {shares})" if shares > 1 else "")
        + (f", {_mib(gathered)} of a block that is whole" if gathered else "")
        + f", {_mib(training.passing)} that comes and goes in a round",
        *(
            [
                f"           reward actor {_mib(per_actor)}: {_mib(per_actor - judging.passing)} and {_mib(judging.passing)}"
            ]
            if actors
            else []
        ),
        f"           in main memory {_mib(in_ram)}, with {_mib(libraries)} of libraries a process and {_mib(checkpoint)} of a "
        f"checkpoint's copy; this machine has {_mib(ram)}",
        f"disk       a checkpoint {_mib(checkpoint)}, {KEPT} at a time; {_mib(free)} free for {experiment.output_dir}",
    ]
    problem = None
    try:
        reference.check_start(shapes(generator.init_from))
    except UserError as error:  # it is often still to be made, and nothing above depends on it
        return "\n".join(lines), str(error)
    if cpus > have_cpus or gpus > have_gpus:
        problem = f"cluster: asks for {cpus:g} CPUs and {gpus:g} GPUs, this machine has {have_cpus} and {have_gpus}"
    elif experiment.device == "cuda" and not have_gpus:
        problem = "device: 'cuda' asked for, but torch sees no GPU here"
    elif in_ram > ram:
        problem = f"memory: takes {_mib(in_ram)}, this machine has {_mib(ram)}"
    elif KEPT * checkpoint > free:
        problem = f"output_dir: {KEPT} checkpoints take {_mib(KEPT * checkpoint)}, {experiment.output_dir} has {_mib(free)} free"
    elif have_gpus:
        of_gpu = torch.cuda.get_device_properties(0).total_memory
        on_gpu = max(per_worker * asked.use_gpu, per_actor * (asked.rewards.gpus > 0))
        if on_gpu > of_gpu:
            problem = f"memory: one process takes {_mib(on_gpu)}, a GPU here has {_mib(of_gpu)}"
    return "\n".join(lines), problem


def _out_of_reach(name: str, error: UserError) -> bool:
    """Whether a reward is one, and only its weights are not to be had here: there is no network, say."""
    return isinstance(error.__cause__, OSError) and name.partition(":")[0] in {*NAMES, *sys.modules}


def largest_block(network: nn.Module) -> int:
    """Weights that a sharded network gathers at once, the most."""
    taken, largest = set[int](), 0
    for block in blocks(network):
        own = {id(weight): weight.numel() for weight in block.parameters() if id(weight) not in taken}
        taken |= own.keys()
        largest = max(largest, sum(own.values()))
    return largest


def _brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """In the place of a reward that is not here: what the decoder takes is counted at least."""
    return images.flatten(1).mean(1)


def _flop(number: float) -> str:
    return f"{number / 1e15:.2f} PFLOP" if number >= 1e15 else f"{number / 1e12:.3f} TFLOP"


def _count(model: object) -> tuple[int, int]:
    """(parameters, bytes of weights); a reward may be a plain function that has none."""
    tensors = list(model.parameters()) if isinstance(model, nn.Module) else []
    return sum(p.numel() for p in tensors), sum(p.numel() * p.element_size() for p in tensors)


def _mib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
