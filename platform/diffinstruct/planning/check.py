"""What a run takes, said before it starts: memory and passes of each role, payloads, placement.

Counted on the pipeline's configuration files, without its weights: those of the usual hub models lie in
`models/hub_configs/`, as published, for that needs no network. Rewards are counted on the models themselves. What a
round holds and does beside is counted by `footprint`, and `life` puts it together with what comes before and after.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from textwrap import shorten
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.prompts import read_prompt_set
from diffinstruct.config.sections import ObjectiveConfig, RewardsConfig
from diffinstruct.errors import UserError
from diffinstruct.method.distances import DISTANCES
from diffinstruct.method.objectives import OBJECTIVES, facts
from diffinstruct.method.precision import frozen_dtype
from diffinstruct.method.rewards import RewardModel
from diffinstruct.models.pipeline import Reference, load_reference
from diffinstruct.models.prompt_conditions import CACHED_BYTES
from diffinstruct.models.sharding import blocks
from diffinstruct.models.sources import pinned
from diffinstruct.planning import footprint
from diffinstruct.planning.footprint import Footprint, Passes
from diffinstruct.planning.life import CUDA_CONTEXT, FRAGMENTATION, Life, ModelMemory, on_gpu
from diffinstruct.planning.remembered import remembered
from diffinstruct.reward_service.client import load_reward
from diffinstruct.training.build import check_reference, make_step_config, prompts_remark, rounding_remark
from reward_models import NAMES

SHAPES = Path(__file__).parents[1] / "models" / "hub_configs"
TRACKING = 160 * 2**20
"""What a run loads beside the libraries that are here, MLflow and its database above all: 100 to 140 MiB between
`check`'s figure without it and the tiny runs of `benchmarks/rehearse.py --tiny` (torch 2.13, mlflow 3.17)."""
KEPT = 4  # checkpoints on disk: the two newest, the best, and one that is being written
HEADER = f"{'role':<24}" + "".join(
    f"{title:>12}" for title in ("parameters/M", "weights", "gradients", "Adam", "average", "forwards", "backwards")
)


def shapes(model: str) -> str:
    """For counting alone: the configuration files that are shipped of a hub model; of another, its own name."""
    folder = SHAPES / pinned(model)[0].replace("/", "--")
    return str(folder) if folder.is_dir() and not Path(model).exists() else model


@dataclass(frozen=True)
class Plan:
    """What a run takes."""

    experiment: Experiment
    latent_bytes: int  # of one sample
    life: Life  # of each training process, with the rewards that it computes itself
    actor: list[ModelMemory]  # of each reward actor
    apart: tuple[str, ...]  # rewards in an environment of their own
    uncounted: dict[str, str]  # what could not be counted -> why
    scoring: Footprint
    validation: Footprint
    libraries: int  # bytes that a process takes before it loads anything

    @property
    def training(self) -> Footprint:
        return self.life.training

    @property
    def per_actor(self) -> float:
        passing = max(self.scoring.passing, self.validation.passing)
        size = sum(role.memory for role in self.actor) + passing
        return on_gpu(size) if self.experiment.cluster.rewards.gpus else size

    @property
    def checkpoint(self) -> int:
        return sum(role.weights * (3 * role.trained + role.averaged) for role in self.life.models)

    @property
    def in_ram(self) -> float:
        """Main memory of all processes here."""
        actors, in_ram = self.experiment.reward_actors, self.experiment.cluster.rewards.gpus == 0
        processes = self.experiment.cluster.workers + actors
        return self.life.in_ram + actors * self.per_actor * in_ram + processes * self.libraries

    @property
    def flops(self) -> float:
        """Of a round, in all processes."""
        batches = self.experiment.global_batch_size / self.experiment.rewards.micro_batch_size
        scoring = self.scoring.flops * batches * (self.experiment.reward_actors > 0)
        return float(self.experiment.cluster.workers * self.training.flops) + scoring

    @property
    def cpus(self) -> float:
        cluster = self.experiment.cluster
        return cluster.workers * cluster.cpus_per_worker + self.experiment.reward_actors * cluster.rewards.cpus

    @property
    def gpus(self) -> float:
        cluster = self.experiment.cluster
        return cluster.workers * cluster.use_gpu + self.experiment.reward_actors * cluster.rewards.gpus


@dataclass(frozen=True)
class Machine:
    """What this machine has."""

    cpus: int
    gpus: int
    ram: int
    gpu_memory: int
    disk: int  # free bytes for runs

    @classmethod
    def here(cls, output_dir: str) -> Machine:
        runs = Path(output_dir).absolute()
        gpus = torch.cuda.device_count()
        return cls(
            cpus=os.cpu_count() or 1,
            gpus=gpus,
            ram=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            gpu_memory=torch.cuda.get_device_properties(0).total_memory if gpus else 0,
            disk=shutil.disk_usage(next(folder for folder in (runs, *runs.parents) if folder.exists())).free,
        )


def report(experiment: Experiment) -> tuple[str, str | None]:
    """What `experiment` takes, as text, and one line on what does not fit this machine or is not there, or None.

    Raises UserError where the reference cannot be read or a reward is none.
    """
    reference = load_reference(
        shapes(experiment.reference.model),
        activation_checkpointing=experiment.activation_checkpointing,
        decoder_dtype=frozen_dtype(experiment.precision),
    )
    make_step_config(experiment, reference.schedule)  # refuses what only the schedule can tell
    check_reference(experiment, reference)
    plan, machine = make_plan(experiment, reference), Machine.here(experiment.output_dir)
    prompts = read_prompt_set(experiment.prompts.train, experiment.prompts.column)
    lines = [*_table(plan), *_lines(plan, machine), f"prompts    {prompts_remark(prompts, reference)}"]
    if remark := rounding_remark(experiment, reference):
        lines.append(f"precision  {remark}")
    text = "\n".join(lines)
    try:
        reference.check_start(shapes(experiment.generator.init_from))
    except UserError as error:  # it is often still to be made, and nothing above depends on it
        return text, str(error)
    return text, _problem(plan, machine)


def make_plan(experiment: Experiment, reference: Reference) -> Plan:
    """Count what `experiment` takes. Raises UserError where a reward is none."""
    trained = [reward.name for reward in experiment.rewards.trained]
    apart = experiment.cluster.rewards.apart
    rewards, models, uncounted = _rewards(experiment.rewards, apart)
    # Nothing else is loaded yet
    libraries = psutil.Process().memory_info().rss - sum(reward.weights for reward in rewards) + TRACKING
    try:
        scoring, validation = _of_rewards(experiment, reference, models)
    except Exception as error:  # they may be anybody's, and do with numbers what cannot be done without
        uncounted["rewards' activations"] = shorten(str(error), 96, placeholder=" ...")
        models = dict.fromkeys(trained, _brightness)
        scoring, validation = _of_rewards(experiment, reference, models)
    decoder = ModelMemory("decoder", *_count(reference.empty("vae")), passes=scoring.passes.get("decoder", Passes()))
    network = reference.empty(reference.family.part)
    in_process = not experiment.reward_actors
    training = _training(experiment, reference, models if in_process else None, uncounted)
    # The first training process decodes what it shows, wherever rewards are computed
    worker = [*_roles(experiment, reference, training), decoder, *(rewards if in_process else [])]
    others = max(_count(reference.empty(part))[0] for part in ("vae", *_encoders(reference)))
    block = largest_block(network)
    conditions, validating = _conditions(experiment, reference), validation if in_process else None
    life = Life(experiment, worker, _count(network)[0], block, others, conditions, training, validating)
    actor, latent_bytes = [] if in_process else [decoder, *rewards], 4 * prod(reference.latent_shape)
    return Plan(experiment, latent_bytes, life, actor, apart, uncounted, scoring, validation, libraries)


def _of_rewards(
    experiment: Experiment, reference: Reference, rewards: Mapping[str, RewardModel]
) -> tuple[Footprint, Footprint]:
    """The footprints of rewards at work, and of their validation."""
    scoring = partial(footprint.rewards_footprint, experiment.rewards, reference, rewards)
    validation = partial(footprint.validation_footprint, experiment, reference, rewards)
    given = (experiment, reference, rewards)
    return remembered(scoring, "scoring", *given), remembered(validation, "validation", *given)


def _encoders(reference: Reference) -> list[str]:
    return [part for part in reference.family.texts if not part.startswith("tokenizer")]


def _conditions(experiment: Experiment, reference: Reference) -> int:
    """Bytes of prompts' conditions in a training process's main memory: what is kept of those that it encodes; of those
    that it reads, this round's and the next one's."""
    prompts, workers = experiment.prompts, experiment.cluster.workers
    each = sum(value.nbytes for value in reference.blank_conditions().values())
    if prompts.embeddings:
        return 2 * each * (experiment.global_batch_size // workers)
    return min(CACHED_BYTES, each * sum(len(read_prompt_set(uri, prompts.column)) for uri in (prompts.train, prompts.grid)))


def _training(
    experiment: Experiment, reference: Reference, rewards: Mapping[str, RewardModel] | None, uncounted: dict[str, str]
) -> Footprint:
    """A training process's footprint, counted by running the objective; where one of the user's own does not run
    without content, DI* takes its place and `uncounted` says so."""
    count = partial(footprint.training_footprint, experiment, reference, rewards)
    try:
        return remembered(count, "training", experiment, reference, rewards)
    except Exception as error:  # it may do with numbers what cannot be done without
        own = experiment.objective
        if own.name in OBJECTIVES and own.distance in DISTANCES:
            raise
        uncounted["objective"] = shorten(f"DI* is assumed in its place; {error}", 96, placeholder=" ...")
    default = ObjectiveConfig()
    built_in = {key: getattr(default, key) for key in ("name", "args", "distance", "distance_args")}
    assumed = experiment.model_copy(update={"objective": own.model_copy(update=built_in)})
    return footprint.training_footprint(assumed, reference, rewards)


def _roles(experiment: Experiment, reference: Reference, training: Footprint) -> list[ModelMemory]:
    """The networks of a training process, then what else it holds."""
    generator, score = experiment.generator, experiment.score_network
    network, _ = _count(reference.empty(reference.family.part))
    frozen = frozen_dtype(experiment.precision).itemsize * network

    def role(name: str, rank: int, **more: Any) -> ModelMemory:
        own = training.parameters.get(name, 0) if rank else network
        passes = training.passes.get(name, Passes())
        return ModelMemory(f"{name}'s adapter" if rank else name, own, 4 * own, passes=passes, **more)

    models = [role("generator", generator.lora_rank, trained=True, averaged=True)]
    own_base = generator.lora_rank > 0 and generator.init_from != "reference" and not generator.init_rank
    if divergence := facts(experiment.objective.name).divergence:
        models.append(role("score network", score.lora_rank, trained=score.updates_per_step > 0))
    if divergence or (generator.lora_rank and not own_base):
        models.append(ModelMemory("reference", network, frozen, passes=training.passes.get("reference", Passes())))
    if own_base:
        models.append(ModelMemory("generator's base", network, frozen))
    elif generator.init_rank:
        models.append(role("start", generator.init_rank))
    if experiment.prompts.embeddings is None:
        models += [ModelMemory(name.replace("_", " "), *_count(reference.empty(name))) for name in _encoders(reference)]
    return models


def _rewards(config: RewardsConfig, apart: Sequence[str]) -> tuple[list[ModelMemory], dict[str, RewardModel], dict[str, str]]:
    """The rewards but for those `apart`, which may not even import here; how each is called; what is not counted."""
    trained = [reward.name for reward in config.trained]
    rewards, models, uncounted = list[ModelMemory](), dict[str, RewardModel](), dict[str, str]()
    for name in (name for name in config.names if name not in apart):
        try:
            models[name] = load_reward(name)
            rewards.append(ModelMemory(name, *_count(models[name]), passes=Passes(1, int(name in trained))))
        except UserError as error:
            # It is a reward whose weights are not to be had here: there is no network, say
            if not (isinstance(error.__cause__, OSError) and name.partition(":")[0] in {*NAMES, *sys.modules}):
                raise
            uncounted[name] = shorten(str(error.__cause__), 96, placeholder=" ...")
            models |= {name: _brightness} if name in trained else {}
    return rewards, models, uncounted


def _table(plan: Plan) -> list[str]:
    """The models, a line each."""
    actors = plan.experiment.reward_actors
    worker, actor = (_mib(sum(role.memory for role in models)) for models in (plan.life.models, plan.actor))
    return [
        HEADER,
        f"each of {plan.experiment.cluster.workers} training processes, {worker}",
        *map(_row, plan.life.models),
        *([f"each of {actors} reward actors, {actor}"] if actors else []),
        *map(_row, plan.actor),
        *(f"{name:<24}in an environment of its own: not counted" for name in plan.apart),
        *(f"{name:<24}not counted: {reason}" for name, reason in plan.uncounted.items()),
    ]


def _lines(plan: Plan, machine: Machine) -> list[str]:
    """Work, payload, placement, memory and disk."""
    experiment, cluster = plan.experiment, plan.experiment.cluster
    samples, actors = experiment.global_batch_size, experiment.reward_actors
    resources = ((cluster.workers, cluster.worker_resources), (actors, cluster.rewards.resources))
    work, life = sum(passes.work for passes in plan.training.passes.values()), plan.life
    passing = max(plan.scoring.passing, plan.validation.passing)
    return [
        f"work       {work} forwards' worth of one network per sample and step, {samples} samples a step; "
        f"in all {_flop(plan.flops)}, {_flop(plan.flops / samples)} a sample",
        f"payload    {_mib(samples * plan.latent_bytes * (actors > 0))} of latents to the reward actors a step, as much back",
        f"placement  {cluster.workers} x {cluster.cpus_per_worker} + {actors} x {cluster.rewards.cpus:g} = "
        f"{plan.cpus:g} CPUs and {plan.gpus:g} GPUs; this machine has {machine.cpus} and {machine.gpus}",
        *(
            f"{'':<11}{count} x {amount:g} = {count * amount:g} {name}, which nodes have to declare"
            for count, declared in resources
            for name, amount in declared.items()
        ),
        f"memory     training process {_mib(life.most)}: {_mib(life.held)} held"
        + (f" (networks by {life.shares})" if life.shares > 1 else "")
        + (f", {_mib(life.gathered)} of a block that is whole" if life.gathered else "")
        + f", {_mib(life.training.passing)} that comes and goes in a round",
        f"{'':<11}by the parts of its life: {', '.join(f'{part} {_mib(size)}' for part, size in life.parts.items())}"
        + (f"; with {_mib(CUDA_CONTEXT)} of CUDA's own and {FRAGMENTATION:.0%} in reserve" if cluster.use_gpu else ""),
        *(
            [f"{'':<11}reward actor {_mib(plan.per_actor)}: {_mib(plan.per_actor - passing)} and {_mib(passing)}"]
            * (actors > 0)
        ),
        f"{'':<11}in main memory {_mib(plan.in_ram)}, with {_mib(plan.libraries)} of libraries a process and "
        f"{_mib(life.conditions)} of prompts' conditions a training process; this machine has {_mib(machine.ram)}",
        f"disk       a checkpoint {_mib(plan.checkpoint)}, {KEPT} at a time; {_mib(machine.disk)} free for "
        f"{experiment.output_dir}",
    ]


def _problem(plan: Plan, machine: Machine) -> str | None:
    """The first thing that this machine does not have, in one line."""
    cluster, output_dir = plan.experiment.cluster, plan.experiment.output_dir
    if plan.cpus > machine.cpus or plan.gpus > machine.gpus:
        asked = f"{plan.cpus:g} CPUs and {plan.gpus:g} GPUs"
        return f"cluster: asks for {asked}, this machine has {machine.cpus} and {machine.gpus}"
    if plan.experiment.device == "cuda" and not machine.gpus:
        return "device: 'cuda' asked for, but torch sees no GPU here"
    if plan.in_ram > machine.ram:
        return f"memory: takes {_mib(plan.in_ram)}, this machine has {_mib(machine.ram)}"
    if (size := KEPT * plan.checkpoint) > machine.disk:
        return f"output_dir: {KEPT} checkpoints take {_mib(size)}, {output_dir} has {_mib(machine.disk)} free"
    most = max(plan.life.most * cluster.use_gpu, plan.per_actor * (cluster.rewards.gpus > 0))
    if machine.gpus and most > machine.gpu_memory:
        return f"memory: one process takes {_mib(most)}, a GPU here has {_mib(machine.gpu_memory)}"
    return None


def _row(model: ModelMemory) -> str:
    size, trained = model.weights, model.weights * model.trained
    sizes = [_mib(size) if size else "-" for size in (size, trained, 2 * trained, size * model.averaged)]
    passes = [str(number or "-") for number in (model.passes.forwards, model.passes.backwards)]
    return f"{model.name:<24}" + "".join(f"{cell:>12}" for cell in (f"{model.parameters / 1e6:.2f}", *sizes, *passes))


def largest_block(network: nn.Module) -> int:
    """Weights that a sharded network gathers at once, the most."""
    taken, largest = set[int](), 0
    for block in blocks(network):
        weights = {id(weight): weight.numel() for weight in block.parameters() if id(weight) not in taken}
        taken |= weights.keys()
        largest = max(largest, sum(weights.values()))
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
