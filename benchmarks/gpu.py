"""What only a GPU can show, measured on the package's own round: networks of real size with random weights, nothing
downloaded.

    PYTHONPATH=platform:. python benchmarks/gpu.py --count     # anywhere, before: work and memory as `check` counts them
    PYTHONPATH=platform:. python benchmarks/gpu.py             # one GPU, under 10 minutes; needs neither ray nor mlflow
    PYTHONPATH=platform:. python benchmarks/gpu.py --smoke     # the same rows, tiny networks on the CPU: no figures

Each row is written to --results as it ends, and a second call goes on with what is not there, or has failed for another
reason than memory. Every call prints tables for RESULTS.md; it exits with 1 where a floor is missed or something failed.

All families train, SD 1.5 and PixArt at 512 px, SDXL and SD3 at 1024 px, in bf16; the reward is the decoder and a mean of
pixels, so that it costs what a decoder costs. Batch sizes double until memory ends or the rate stands still. What is
compiled, compared or KL takes the batch that was fastest. MFU is the work of a round without checkpointing, with the
decoder and with what flash attention computes again, per second over the device's dense bf16 peak. "idle" is the share of
a round in which the GPU computes nothing, "waits" how often the program waits for it.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial, partialmethod
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gpu_results import COUNTED, COUNTED_BATCH, OUT_OF_MEMORY, PHASES, PLAN, RESUME, Results, Setting, report
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import diffinstruct
from diffinstruct.config.experiment import Experiment
from diffinstruct.method.memory import out_of_memory
from diffinstruct.method.noise import NoiseStreams
from diffinstruct.method.precision import use_deterministic_kernels, use_precision
from diffinstruct.method.rewards import Collect, LatentRewards, Scores
from diffinstruct.method.step import Metrics, alternating_round
from diffinstruct.models.lora import Role
from diffinstruct.models.roles import make_roles
from diffinstruct.models.sources import RandomWeights
from diffinstruct.planning.footprint import training_footprint
from diffinstruct.reward_service.client import LocalRewards, RewardClient
from diffinstruct.training.build import make_step_config, make_train_state, open_reference

SHAPES = Path(diffinstruct.__file__).parent / "models" / "hub_configs"  # configurations as published, no weights
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # folder in SHAPES, what its one-step generator is fed
    "SD1.5": ("stable-diffusion-v1-5--stable-diffusion-v1-5", {"timestep": 625, "input_scale": "sigma"}),
    "SDXL": ("stabilityai--stable-diffusion-xl-base-1.0", {"timestep": 399, "input_scale": "unit"}),
    "PixArt": ("PixArt-alpha--PixArt-XL-2-512x512", {"timestep": 440, "input_scale": "sigma"}),
    "SD3": ("stabilityai--stable-diffusion-3-medium-diffusers", {"timestep": 999, "input_scale": "unit"}),
}
OBJECTIVES = {"DI*": "di_star", "KL": "diff_instruct_pp", "plain": "di_star"}  # KL: Diff-Instruct with the same reward
RANK, REWARD = 64, "gpu:brightness"
WARM_UP, ROUNDS = 1, 3
BEFORE = 25.0  # seconds that imports take before the clock runs, and the last words after it
RESUMED_BATCH = 2


class TimeUp(BaseException):
    """No Exception: torch.compile swallows those."""

    @classmethod
    def now(cls, *_: Any) -> None:
        raise cls


# ---------------------------------------------------------------------------------------------------- what is measured
def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1).mean(1)


def experiment_of(setting: Setting, folder: Path, batch: int = 1, precision: str = "bf16") -> Experiment:
    return Experiment.model_validate(
        {
            "precision": precision,
            "global_batch_size": batch,
            "reference": {"model": str(folder)},
            "generator": {"init_from": "reference", "lora_rank": RANK * setting.lora, **MODELS[setting.model][1]},
            "score_network": {"lora_rank": RANK * setting.lora},
            "objective": {"name": OBJECTIVES[setting.loop]},
            "rewards": {"trained": [{"name": REWARD}], "held_out": []},
            "activation_checkpointing": setting.checkpointing,
            "compile": setting.compiled,
        }
    )


class World:
    """The roles of a setting, and their reward, as a run has them."""

    def __init__(self, setting: Setting, folder: Path, device: torch.device, precision: str = "bf16") -> None:
        self.device, self.experiment = device, experiment_of(setting, folder, precision=precision)
        self.reference = open_reference(self.experiment, device, RandomWeights())
        self.roles = make_roles(self.experiment, self.reference)
        self.train_state = make_train_state(
            self.experiment, self.roles, self.reference.null_conditions(), lambda module: module
        )
        self.settings = make_step_config(self.experiment, self.reference.schedule)
        rewards = LatentRewards(self.reference.decode, {REWARD: brightness})
        self.reward_client = RewardClient(
            self.experiment.rewards, self.experiment.cluster.rewards, None, lambda: LocalRewards(rewards)
        )

    @property
    def networks(self) -> list[Any]:
        """diffusers' own, of generator, score network and reference: the same one where they are adapters over it."""
        roles: list[Any] = [self.roles.generator.denoiser, self.roles.score_network, self.roles.reference]
        networks = (role.network for role in roles)
        return [network.base.network if isinstance(network, Role) else network for network in networks]

    def draws(self, batch: int, step: int) -> tuple[NoiseStreams, list[str]]:
        draws = NoiseStreams(0, step, self.reference.latent_shape, slice(0, batch), self.device)
        return draws, [f"prompt {i}" for i in range(batch)]

    def devices(self) -> dict[str, int]:
        """How many tensors of weights, optimizers and conditions are on which device."""
        modules = [*self.networks, self.train_state.ema, self.reference.vae]
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        tensors += [leaf for leaf in tree_leaves(self.train_state.state_dict()) if isinstance(leaf, Tensor)]
        tensors += self.reference.null_conditions().values()
        return Counter(str(tensor.device) for tensor in tensors)


@dataclass
class Clock:
    """When phases begin, by the device's own time where it has one."""

    device: torch.device
    marks: list[tuple[str, Any]] = field(default_factory=list)

    def begin(self, phase: str) -> None:
        if self.device.type == "cuda":
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append((phase, mark))

    def seconds(self) -> dict[str, float]:
        """What each phase has taken; the last ends now."""
        self.begin("")
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        taken = dict.fromkeys(PHASES, 0.0)
        for (phase, began), (_, ended) in pairwise(self.marks):
            taken[phase] += began.elapsed_time(ended) / 1000 if self.device.type == "cuda" else ended - began
        return taken


Loop = Callable[[World, int, int, Clock], Metrics]
"""(world, batch, step, clock): one round."""


def ours(world: World, batch: int, step: int, clock: Clock) -> Metrics:
    """The package's round; it tells the clock by the calls that it makes."""
    draws, prompts = world.draws(batch, step)
    c = world.reference.encode_prompts(prompts)

    def send(latents: Tensor, prompts: Sequence[str]) -> Collect:
        clock.begin("reward")
        collect = world.reward_client.send(latents, prompts)
        clock.begin("score network")

        def collected() -> Scores:
            clock.begin("backward")
            return collect()

        return collected

    def objective(*given: Any, **more: Any) -> Any:
        clock.begin("regulariser")
        assert world.settings.objective
        return world.settings.objective(*given, **more)

    clock.begin("forward")
    settings = replace(world.settings, objective=objective)
    return alternating_round(world.train_state, settings, world.reference.schedule, draws, prompts, c, send)


def plain(world: World, batch: int, step: int, clock: Clock) -> Metrics:
    """The same round as one writes it by hand, on the same networks with the same draws: SD 1.5, trained in full."""
    e, train_state, vae = world.experiment, world.train_state, world.reference.vae
    generator, score_network, reference = world.networks
    draws, prompts = world.draws(batch, step)
    c = world.reference.encode_prompts(prompts)["prompt_embeds"]
    null = world.reference.null_conditions()["prompt_embeds"].expand_as(c)
    alphas, sigmas = (values.to(world.device) for values in (world.reference.schedule.alphas, world.reference.schedule.sigmas))
    autocast = partial(torch.autocast, world.device.type, torch.bfloat16, enabled=e.precision == "bf16")

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        return alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)

    def noised(x0: Tensor, place: int) -> tuple[Tensor, Tensor]:
        t, eps = draws.t(place, world.settings.timestep_distribution), draws.normal(place + 1)
        alpha, sigma = at(t)
        return alpha * x0 + sigma * eps, t

    def x0_hat(unet: Any, xt: Tensor, t: Tensor, c: Tensor) -> Tensor:
        alpha, sigma = at(t)
        return (xt - sigma * unet(xt.to(unet.dtype), t, c.to(unet.dtype), return_dict=False)[0].to(xt.dtype)) / alpha

    def stepped(network: nn.Module, adam: torch.optim.Optimizer, limit: float) -> float:
        norm = nn.utils.clip_grad_norm_(network.parameters(), limit).item()
        adam.step()
        return norm

    clock.begin("forward")
    t = torch.full((batch,), e.generator.timestep, device=world.device)
    with autocast():
        x0 = x0_hat(generator, at(t)[1] * draws.normal(0), t, c)
    sample = x0.detach()

    clock.begin("reward")
    pushes = []
    for some in sample.split(world.reward_client.micro_batch_size):
        leaf = some.clone().requires_grad_()
        scaled = (leaf / vae.config.scaling_factor).to(vae.dtype)
        images = (vae.decode(scaled, return_dict=False)[0].to(leaf.dtype) * 0.5 + 0.5).clamp(0, 1)
        pushes.append(torch.autograd.grad(images.flatten(1).mean(1).sum(), leaf)[0])
    push = e.objective.reward_scale * torch.cat(pushes)

    clock.begin("score network")
    with autocast():
        xt, t = noised(sample, 8)
        alpha, sigma = at(t)
        error = (alpha / sigma) * (x0_hat(score_network, xt, t, c) - sample)
        score_loss = error.pow(2).flatten(1).mean(1).mean()
    assert train_state.score_optimizer is not None  # DI* has one
    train_state.score_optimizer.zero_grad()
    score_loss.backward()
    metrics = {"loss/score_network": score_loss.item()}
    metrics["gradient_norm/score_network"] = stepped(score_network, train_state.score_optimizer, e.score_network.max_grad_norm)

    clock.begin("regulariser")
    leaf = sample.clone().requires_grad_()
    with autocast():
        xt, t = noised(leaf, 1)
        f = x0_hat(score_network, xt, t, c)
        both = x0_hat(reference, torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([c, null]))
        with_c, without = both.chunk(2)
        y = f - (with_c + (e.reference.guidance_scale - 1) * (with_c - without))
        norm = (y.flatten(1).pow(2).sum(1) + e.objective.distance_args["c"] ** 2 * y[0].numel()).sqrt()
        loss = -((y / norm.view(-1, 1, 1, 1)) * (f - leaf)).flatten(1).sum(1)
    pull = e.objective.regularization_weight * torch.autograd.grad(loss.sum(), leaf)[0]
    metrics["loss/regularizer"] = loss.mean().item()

    clock.begin("backward")
    train_state.generator_optimizer.zero_grad()
    x0.backward((pull - push) / batch)
    metrics["gradient_norm/generator"] = stepped(generator, train_state.generator_optimizer, e.generator.max_grad_norm)
    decay = min(e.generator.ema_decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_([*train_state.ema.parameters()], [*generator.parameters()], 1 - decay)
    return metrics


# ----------------------------------------------------------------------------------------------------------- measuring
def measured(world: World, setting: Setting, batch: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Rounds of the setting's loop, or of both loops in turns: ours, plain, plain, ours."""
    loops: dict[str, Loop] = {"ours": ours, "plain": plain} if setting.loop == "plain" else {setting.loop: ours}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
    memory = dict.fromkeys(loops, 0)
    on_gpu = world.device.type == "cuda"
    for step in range(WARM_UP + rounds):
        for name in list(loops)[:: -1 if step % 2 else 1]:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            clock = Clock(world.device)
            loops[name](world, batch, step, clock)
            phases = clock.seconds()
            if on_gpu:
                memory[name] = max(memory[name], torch.cuda.max_memory_allocated())
            if step >= WARM_UP:
                taken[name].append(phases)
    for name, loop in loops.items():
        row = {"loop": name, "batch": batch, "memory": memory[name], "devices": world.devices(), "taken": taken[name]}
        if on_gpu and (setting.one_batch or batch == COUNTED_BATCH):
            one_more = partial(loop, world, batch, WARM_UP + rounds, Clock(world.device))
            row |= {"busy": busy(one_more), "waits": waits(one_more)}
        yield row


def busy(one_round: Callable[[], Any]) -> float:
    """Seconds of a round in which the GPU computes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        one_round()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def waits(one_round: Callable[[], Any]) -> dict[str, int]:
    """How often a round waits for the GPU, by the line of Python that it waits in."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            one_round()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message))


def resumed(folder: Path, device: torch.device) -> dict[str, Any]:
    """Two rounds in one go against other networks that get the state in between, with deterministic kernels."""
    use_deterministic_kernels()
    straight, other = World(Setting("SD1.5"), folder, device), World(Setting("SD1.5"), folder, device)
    for world in (straight, other):  # conditions are random, and kept
        torch.manual_seed(1)
        world.reference.encode_prompts(world.draws(RESUMED_BATCH, 0)[1])
    one_round = partial(ours, batch=RESUMED_BATCH, clock=Clock(device))
    one_round(straight, step=0)
    between = tree_map_only(Tensor, Tensor.clone, straight.train_state.state_dict())
    one_round(other, step=7)  # whatever it did before is forgotten
    other.train_state.load_state_dict(between)
    metrics, again = one_round(straight, step=1), one_round(other, step=1)
    same = all(again[key] == value for key, value in metrics.items() if not key.startswith("time/"))
    states = [tree_leaves(world.train_state.state_dict()) for world in (straight, other)]
    pairs = [pair for pair in zip(*states, strict=True) if isinstance(pair[0], Tensor)]
    return {"tensors": len(pairs), "equal": sum(torch.equal(*pair) for pair in pairs), "metrics": same}


def counted(setting: Setting, folder: Path, batch: int = COUNTED_BATCH) -> dict[str, float]:
    """Work of a sample's round, and the bytes of a process at its most, as `check` counts them."""
    experiment = experiment_of(setting, folder, batch)
    footprint = training_footprint(
        experiment, open_reference(experiment, torch.device("cpu"), RandomWeights()), {REWARD: brightness}
    )
    return {"flops": footprint.flops / batch, "memory": footprint.peak}


# ----------------------------------------------------------------------------------------------------------- the plan
def shrunk(folder: Path, into: Path) -> Path:
    """The same pipeline with networks that a CPU runs in no time."""
    tiny = {"layers_per_block": 1, "sample_size": 8, "norm_num_groups": 8, "cross_attention_dim": 16}
    tiny |= {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
    two = {"down_block_types": slice(-2, None), "up_block_types": slice(2)}  # levels; the ones that have attention
    for path in (folder / "model_index.json", *folder.glob("*/*.json")):
        content = json.loads(path.read_text())
        if path.parent.name in ("unet", "transformer", "vae"):
            content |= {key: value for key, value in tiny.items() if key in content}
        if "block_out_channels" in content:
            content |= {key: content[key][levels] for key, levels in two.items()} | {"block_out_channels": [16, 16]}
        if "transformer_layers_per_block" in content:
            content["transformer_layers_per_block"] = 1
        copy = into / folder.name / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(content))
    return into / folder.name


def measure(results: Results, setting: Setting, folder: Path, device: torch.device) -> bool:
    """Measure what the setting lacks; returns whether nothing failed but memory."""
    world = None
    while (batch := results.next_batch(setting)) is not None:
        try:
            if device.type == "cpu" and batch > 1:
                raise torch.OutOfMemoryError("as if")
            world = world or World(setting, folder, device)
            for row in measured(world, setting, batch, ROUNDS if device.type == "cuda" else 1):
                results.add(results.rows, f"{setting}, {row['loop']} {batch}", row)
        except RuntimeError as error:  # whatever it is, the other rows are wanted: GPUs are rare
            if not out_of_memory(error.__cause__ or error):
                traceback.print_exc()
                return False
            row = {"loop": setting.loop, "batch": batch, "said": OUT_OF_MEMORY}
            results.add(results.rows, f"{setting}, {setting.loop} {batch}", row)
    return True


def go_on(results: Results, args: argparse.Namespace, where: dict[str, Path], device: torch.device) -> bool:
    """Measure what is not there; returns whether nothing failed."""
    good = True
    for task in PLAN:
        if isinstance(task, Setting):
            good &= measure(results, task, where[task.model], device)
        elif task not in results.rows:
            command = [sys.executable, __file__, "--results", str(results.path), "--resume", *["--smoke"] * args.smoke]
            good &= subprocess.run(command).returncode == 0
            results = Results(results.path, results.machine)
        gc.collect()
        torch.cuda.empty_cache()
    return good


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="after which what remains is printed as not reached")
    parser.add_argument("--results", type=Path, default=Path("gpu.json"), help="the file that has the rows")
    parser.add_argument("--count", action="store_true", help="work and memory as `check` counts them, which takes no GPU")
    parser.add_argument("--resume", action="store_true", help="that row alone, which changes the kernels of a process")
    parser.add_argument("--smoke", action="store_true", help="tiny networks on the CPU, in a minute or two")
    args = parser.parse_args()
    if not (args.smoke or args.count or torch.cuda.is_available()):
        parser.error("torch sees no GPU here; --count and --smoke go without")
    return args


def main() -> int:
    args, good = parsed(), True
    device = torch.device("cuda" if torch.cuda.is_available() and not args.smoke else "cpu")
    use_precision("bf16")
    where = {model: SHAPES / of for model, (of, _) in MODELS.items()}
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            where = {model: shrunk(of, Path(folder)) for model, of in where.items()}
            eager: Any = partialmethod(nn.Module.compile, backend="eager")  # a CPU's compiler takes minutes
            nn.Module.compile = eager  # type: ignore[method-assign]
        machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, tiny networks: no figures" * args.smoke
        results = Results(args.results, machine)
        if args.resume:
            results.add(results.rows, RESUME, resumed(where["SD1.5"], device))
            return 0
        signal.signal(signal.SIGALRM, TimeUp.now)  # each second: an exception that a destructor raises is lost
        with suppress(TimeUp):
            signal.setitimer(signal.ITIMER_REAL, max(60 * args.minutes - BEFORE, 1e-3) * (not args.count), 1)
            if args.count or args.smoke:
                for setting in COUNTED[:1] if args.smoke else COUNTED:  # without content some seconds each, or minutes
                    if str(setting) not in results.counted:
                        results.add(results.counted, str(setting), counted(setting, where[setting.model]))
            if not args.count:
                good = go_on(results, args, where, device)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return int(not (report(Results(args.results, machine), device.type == "cuda") and good))


if __name__ == "__main__":
    sys.exit(main())
