"""What a round costs on a GPU: the package's own round on networks of real size with random weights, nothing
downloaded.

    PYTHONPATH=platform:. python benchmarks/gpu.py              # one GPU, under 9 minutes; needs neither ray nor mlflow
    PYTHONPATH=platform:. python benchmarks/gpu.py --smoke      # the same rows, tiny networks on the CPU: no figures

SD 1.5 at 512 px and SDXL at 1024 px, arithmetic in bf16; the reward is the decoder and a mean of pixels, so that it
costs what a decoder costs. Batch sizes double until memory ends. What is compiled, compared or KL takes the batch that
was fastest.

A round's work is counted on the meta device without checkpointing: what is computed again does not count. MFU is that
work, decoder included, per second over the device's dense bf16 peak. Prints tables for RESULTS.md; exits with 1 where a
floor is missed or anything but memory fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache, partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import diffinstruct
from diffinstruct.config.experiment import Experiment
from diffinstruct.method.memory import out_of_memory
from diffinstruct.method.noise import NoiseStreams
from diffinstruct.method.precision import frozen_dtype
from diffinstruct.method.rewards import Collect, LatentRewards, Scores, Send
from diffinstruct.method.step import Metrics, alternating_round
from diffinstruct.models.lora import Role
from diffinstruct.models.pipeline import load_reference
from diffinstruct.models.roles import make_roles
from diffinstruct.models.sources import RandomWeights
from diffinstruct.reward_service.client import LocalRewards, RewardClient
from diffinstruct.training.build import make_step_config, make_train_state

SHAPES = Path(diffinstruct.__file__).parent / "models" / "hub_configs"  # configurations as published, no weights
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # folder in SHAPES, what its one-step generator is fed
    "SD1.5": ("stable-diffusion-v1-5--stable-diffusion-v1-5", {"timestep": 625, "input_scale": "sigma"}),
    "SDXL": ("stabilityai--stable-diffusion-xl-base-1.0", {"timestep": 399, "input_scale": "unit"}),
}
OBJECTIVES = {"DI*": "di_star", "KL": "diff_instruct_pp", "plain": "di_star"}  # KL: Diff-Instruct with the same reward
RANK, REWARD = 64, "gpu:brightness"
PEAKS = {  # dense bf16 FLOP/s by the beginning of the device's name, the first that fits
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}
PHASES = ("forward", "reward", "score network", "regulariser", "backward")  # the last with Adam and the average
WARM_UP, ROUNDS = 1, 3
BEFORE = 20.0  # seconds that imports take before the clock runs, and the last words after it
SMOKE_BATCH = 1
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Setting:
    """What is measured. `loop`: a key of OBJECTIVES; "plain" is the hand-written loop and ours, taking turns."""

    model: str
    lora: bool = False
    checkpointing: bool = False
    compiled: bool = False
    loop: str = "DI*"

    @property
    def one_batch(self) -> bool:
        return self.compiled or self.loop != "DI*"


PLAN = (  # what the aims need first, what may take the rest of the time last
    Setting("SD1.5"),
    Setting("SD1.5", loop="plain"),
    Setting("SD1.5", loop="KL"),
    Setting("SDXL", lora=True, checkpointing=True),
    Setting("SD1.5", lora=True),
    Setting("SD1.5", checkpointing=True),
    Setting("SD1.5", lora=True, checkpointing=True),
    Setting("SD1.5", compiled=True),
    Setting("SD1.5", lora=True, compiled=True),
)


class TimeUp(BaseException):
    """No Exception: torch.compile swallows those."""


# ---------------------------------------------------------------------------------------------------- what is measured
def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1).mean(1)


class World:
    """The roles of a setting, and their reward, as a run has them."""

    def __init__(self, setting: Setting, folder: Path, device: torch.device, precision: str = "bf16") -> None:
        rank = RANK if setting.lora else 0
        self.device = device
        self.experiment = Experiment.model_validate(
            {
                "precision": precision,
                "reference": {"model": str(folder)},
                "generator": {"init_from": "reference", "lora_rank": rank, **MODELS[setting.model][1]},
                "score_network": {"lora_rank": rank},
                "objective": {"name": OBJECTIVES[setting.loop]},
                "rewards": {"trained": [{"name": REWARD}], "held_out": []},
                "activation_checkpointing": setting.checkpointing,
            }
        )
        decoder = frozen_dtype(precision)  # as in a run
        self.reference = load_reference(
            str(folder), torch.float32, device, setting.checkpointing, decoder_dtype=decoder, weights=RandomWeights()
        )
        with device:  # else adapters are made on the CPU, and do not follow their layers to "meta"
            self.roles = make_roles(self.experiment, self.reference)
        self.train_state = make_train_state(
            self.experiment, self.roles, self.reference.null_conditions(), lambda module: module
        )
        self.settings = make_step_config(self.experiment, self.reference.schedule)
        rewards = LatentRewards(self.reference.decode, {REWARD: brightness})
        self.reward_client = RewardClient(
            self.experiment.rewards, self.experiment.cluster.rewards, None, lambda: LocalRewards(rewards)
        )
        if setting.compiled:
            backend = "inductor" if device.type == "cuda" else "eager"  # a CPU's compiler takes minutes
            for network in {id(network): network for network in self.networks}.values():
                network.compile(dynamic=False, backend=backend)  # adapters share a network that sees two batch sizes

    @property
    def networks(self) -> list[Any]:
        """diffusers' own, of generator, score network and reference: one and the same where they are adapters over
        it."""
        train_state: list[Any] = [self.roles.generator.denoiser, self.roles.score_network, self.roles.reference]
        networks = (role.network for role in train_state)
        return [network.base.network if isinstance(network, Role) else network for network in networks]

    def draws(self, batch: int, step: int) -> tuple[NoiseStreams, list[str]]:
        draws = NoiseStreams(0, step, self.reference.latent_shape, slice(0, batch), self.device)
        return draws, [f"prompt {i}" for i in range(batch)]


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


def ours(world: World, batch: int, step: int, clock: Clock, ask: Send | None = None) -> Metrics:
    """The package's round; it tells the clock by the calls that it makes."""
    draws, prompts = world.draws(batch, step)
    c = world.reference.encode_prompts(prompts)

    def send(latents: Tensor, prompts: Sequence[str]) -> Collect:
        clock.begin("reward")
        collect = (ask or world.reward_client.send)(latents, prompts)
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


@cache
def flops(setting: Setting, folder: Path) -> float:
    """Of a setting's round, for each sample, counted without weights."""
    world = World(setting, folder, torch.device("meta"), precision="fp32")  # meta knows no autocast; the work is the same

    def decoded(latents: Tensor, prompts: Sequence[str]) -> Collect:
        """LatentRewards would not trust a score without a value."""
        leaf = latents.clone().requires_grad_()
        scores = brightness(world.reference.decode(leaf), prompts)
        gradient = torch.autograd.grad(scores.sum(), leaf)[0]
        return lambda: Scores({REWARD: scores.detach()}, gradient, 0.0, 1)

    without_values = mock.patch.multiple(Tensor, item=lambda self: 1.0, cpu=lambda self: self)
    with FlopCounterMode(display=False) as counter, without_values:
        ours(world, 1, 0, Clock(torch.device("cpu")), decoded)
    return float(counter.get_total_flops())


# ----------------------------------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class Row:
    """A line of the table. `taken`: each measured round's seconds by phase; without any, `said` is why."""

    setting: Setting
    batch: int
    loop: str
    taken: Sequence[dict[str, float]] = ()
    memory: int = 0
    said: str = ""
    flops: float = 0.0

    @property
    def rounds(self) -> list[float]:
        return [sum(phases.values()) for phases in self.taken]

    @property
    def images_per_second(self) -> float:
        return self.batch / statistics.median(self.rounds) if self.taken else 0.0

    @property
    def flop_per_second(self) -> float:
        return self.flops * self.images_per_second

    def line(self, peak: float | None) -> str:
        of = self.setting
        cells = [of.model, "LoRA" if of.lora else "full", *("yes" if on else "no" for on in (of.checkpointing, of.compiled))]
        cells += [self.loop, str(self.batch)]
        if self.taken:
            cells += [f"{self.images_per_second:.3g}", f"{self.flop_per_second / 1e12:.3g}"]
            cells += [f"{self.flop_per_second / peak:.1%}" if peak else "-", f"{self.memory / 1e9:.1f}" if self.memory else "-"]
            whole = sum(self.rounds)
            cells += [f"{sum(phases[phase] for phases in self.taken) / whole:.1%}" for phase in PHASES]
        else:
            cells += [self.said] + [""] * (3 + len(PHASES))
        return f"| {' | '.join(cells)} |"


def heading() -> str:
    texts = ["model", "trained", "checkpointing", "compile", "loop"]
    figures = ["batch", "images/s", "TFLOP/s", "MFU", "peak GB", *PHASES]
    return f"| {' | '.join(texts + figures)} |\n|{'---|' * len(texts)}{'--:|' * len(figures)}"


def measured(world: World, setting: Setting, batch: int, folder: Path) -> list[Row]:
    """Rounds of the setting's loop, or of both loops in turns: ours, plain, plain, ours."""
    loops: dict[str, Loop] = {"ours": ours, "plain": plain} if setting.loop == "plain" else {setting.loop: ours}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
    memory = dict.fromkeys(loops, 0)
    for step in range(WARM_UP + ROUNDS):
        for name in list(loops)[:: -1 if step % 2 else 1]:
            if world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            clock = Clock(world.device)
            loops[name](world, batch, step, clock)
            phases = clock.seconds()
            if world.device.type == "cuda":
                memory[name] = max(memory[name], torch.cuda.max_memory_allocated())
            if step >= WARM_UP:
                taken[name].append(phases)
    counted = flops(Setting(setting.model, setting.lora, loop="KL" if setting.loop == "KL" else "DI*"), folder)
    return [Row(setting, batch, name, taken[name], memory[name], flops=counted) for name in loops]


def fastest(setting: Setting, table: Sequence[Row]) -> int:
    """The batch that was, of the same training without checkpointing or compilation."""
    tried = [row for row in table if row.setting == Setting(setting.model, setting.lora)]
    return max(tried, key=lambda row: row.images_per_second).batch if tried else 1


def rows(setting: Setting, best: int, folder: Path, device: torch.device) -> Iterator[Row]:
    """The setting at the batch that is best, or at 1, 2, 4, ... until memory ends."""
    world = None
    for batch in [best] if setting.one_batch else (2**i for i in count()):
        said = ""
        try:
            if device.type == "cpu" and batch > SMOKE_BATCH:
                raise torch.OutOfMemoryError("as if")
            world = world or World(setting, folder, device)
            yield from measured(world, setting, batch, folder)
        except RuntimeError as error:  # whatever it is, the other rows are wanted: GPUs are rare
            said = OUT_OF_MEMORY if out_of_memory(error.__cause__ or error) else type(error).__name__
            if said != OUT_OF_MEMORY:
                traceback.print_exc()
        if said:
            yield Row(setting, batch, setting.loop, said=said)
            return


def verdicts(table: Sequence[Row], peak: float | None, on_gpu: bool) -> tuple[str, bool]:
    """The aims as a table; whether every floor is kept that can be judged here."""
    product = [row for row in table if row.loop == "DI*"]
    sd15 = [row for row in product if row.setting.model == "SD1.5"]
    sdxl = [row for row in product if row.setting.model == "SDXL" and row.memory <= 80e9]
    lines, good = ["| what | seen | floor | aim |", "|---|--:|--:|--:|"], True
    for name, of, floor, aim in (("SD1.5 at 512 px", sd15, 0.20, 0.40), ("SDXL LoRA at 1024 px, in 80 GB", sdxl, None, 0.25)):
        if peak:
            mfu = max((row.flop_per_second for row in of), default=0.0) / peak
            good &= floor is None or mfu >= floor
            bounds = [f"{bound:.0%} {'ok' if mfu >= bound else 'missed'}" if bound else "" for bound in (floor, aim)]
            lines.append(f"| {name}: MFU | {mfu:.1%} | {' | '.join(bounds)} |")
        else:
            lines.append(f"| {name}: MFU | not judged here | {f'{floor:.0%}' if floor else ''} | {aim:.0%} |")
    rate = max((row.images_per_second for row in sdxl), default=0.0)
    good &= not on_gpu or rate >= 0.23
    verdict = f"{rate:.3g} | 0.23 {'ok' if rate >= 0.23 else 'missed'}" if on_gpu else "not judged here | 0.23"
    return "\n".join([*lines, f"| SDXL LoRA at 1024 px, in 80 GB: images/s | {verdict} | |"]), good


def shrunk(folder: Path, into: Path) -> Path:
    """The same pipeline with networks that a CPU runs in no time."""
    tiny = {"layers_per_block": 1, "sample_size": 8, "attention_head_dim": 4, "norm_num_groups": 8, "cross_attention_dim": 16}
    two = {"down_block_types": slice(-2, None), "up_block_types": slice(2)}  # levels; the ones that have attention
    for path in (folder / "model_index.json", *folder.glob("*/*.json")):
        content = json.loads(path.read_text())
        if "block_out_channels" in content:
            content |= {key: value for key, value in tiny.items() if key in content}
            content |= {key: content[key][levels] for key, levels in two.items()} | {"block_out_channels": [16, 16]}
        if "transformer_layers_per_block" in content:
            content["transformer_layers_per_block"] = 1
        copy = into / folder.name / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(content))
    return into / folder.name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="after which what remains is printed as not reached")
    parser.add_argument("--smoke", action="store_true", help="tiny networks on the CPU, in a minute or two")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --smoke goes without")
    device = torch.device("cpu" if args.smoke else "cuda")
    name = "CPU, tiny networks: no figures" if args.smoke else torch.cuda.get_device_name()
    peak = next((peak for start, peak in PEAKS.items() if name.startswith(start)), None)
    stated = f"{peak / 1e12:.0f} TFLOP/s dense bf16" if peak else "no peak known, no MFU"
    print(f"### {name} ({stated}), torch {torch.__version__}, diffusers {diffusers.__version__}, {date.today()}\n")
    print(heading(), flush=True)

    def time_up(*_: Any) -> None:
        raise TimeUp

    table: list[Row] = []
    remaining = list(PLAN)
    with tempfile.TemporaryDirectory() as folder:
        where = {model: SHAPES / of for model, (of, _) in MODELS.items()}
        if args.smoke:
            where = {model: shrunk(of, Path(folder)) for model, of in where.items()}
        signal.signal(signal.SIGALRM, time_up)
        try:
            # Again and again: an exception that a destructor raises is lost.
            signal.setitimer(signal.ITIMER_REAL, max(60 * args.minutes - BEFORE, 1e-3), 1)
            while remaining:
                setting = remaining[0]
                for row in rows(setting, fastest(setting, table), where[setting.model], device):
                    table.append(row)
                    print(row.line(peak), flush=True)
                remaining.pop(0)
                gc.collect()
                torch.cuda.empty_cache()
        except TimeUp:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)
    for setting in remaining:
        last = max((row.batch for row in table if row.setting == setting), default=0)
        batch = fastest(setting, table) if setting.one_batch else 2 * last or 1
        print(Row(setting, batch, setting.loop, said="not reached").line(peak))

    turns = {row.loop: row for row in table if row.setting.loop == "plain" and row.taken}
    if turns:
        pairs = [a / b for a, b in zip(turns["ours"].rounds, turns["plain"].rounds, strict=True)]
        low, middle, high = min(pairs), statistics.median(pairs), max(pairs)
        print(f"\nours / plain, {len(pairs)} pairs in turns: {middle:.3f} [{low:.3f}, {high:.3f}]")
    said, good = verdicts(table, peak, device.type == "cuda")
    print(f"\n{said}")
    return int(not good or any(row.said not in ("", OUT_OF_MEMORY) for row in table))


if __name__ == "__main__":
    sys.exit(main())
