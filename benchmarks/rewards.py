"""What asking reward actors costs, and what it saves.

    python benchmarks/rewards.py [all | overlap batching tower latents gradient] [-s key=value ...]

    overlap   a Ray Train worker and one reward actor with the recipe's rewards; a sleep in the actor stretches each
    answer to a
              share of the window: the time between the sample's departure and the moment its gradient is needed. Rounds
              of each share and rounds that ask nobody take turns. Hidden is (latency - exposed) / min(latency, window)
    batching  one question of micro-batches against a question for each sample, at one actor: with the recipe's rewards,
    whose
              arithmetic takes its time either way, and with one that takes next to none; the bound is on the latter
    tower     CPU time of two rewards that share decoder and image tower, as in one actor, and of two with their own, as
    in two
    latents   there and back through Ray: latents against the pixels they decode to, at the size of Stable Diffusion 1.5
    gradient  an actor's answer against one graph from latents to the weighted sum of the rewards

Intervals are 95 % bootstraps over rounds, turns or repetitions; a bound holds if the whole interval keeps it.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there; Ray's workers inherit it

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import ray
import torch
from torch import Tensor, nn

from diffinstruct.cluster.attach import attached
from diffinstruct.cluster.reward_actor import ActorReply, RewardActor
from diffinstruct.cluster.reward_pool import RewardPool, reward_pool
from diffinstruct.cluster.train import fit
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.reading import load
from diffinstruct.method.rewards import Collect, LatentRewards, RewardRequest, Scores
from diffinstruct.models.pipeline import load_reference
from diffinstruct.reward_service.client import make_rewards
from diffinstruct.reward_service.reward_validation import Report

RECIPE = Path(__file__).parents[1] / "experiments/recipes/pocket.yaml"
NOBODY = -1.0
SHARES = (NOBODY, 0.0, 0.25, 0.5, 1.0, 2.0)
ROUNDS, WARM_UP = 30, 5  # of each share; rounds before the first
HIDDEN, FREE = (0.9, 1.05)  # of what a window can hide; the time of a round at latency 0 over that of one that asks nobody
BATCHING, SHARED, SMALLER, EXACT = 4.0, 1.3, 5.0, 1e-5


def said(what: str, figures: np.ndarray, bound: float, least: bool, statistic: Callable[..., np.ndarray] = np.median) -> bool:
    """Print a statistic of `figures`, its interval and the bound; whether the bound holds."""
    drawn = figures[np.random.default_rng(0).integers(len(figures), size=(10_000, len(figures)))]
    low, high = np.percentile(statistic(drawn, axis=1), [2.5, 97.5])
    good = bool(low >= bound if least else high <= bound)
    print(
        f"{what}: {statistic(figures, axis=0):.4g}  95 % [{low:.4g}, {high:.4g}], n {len(figures)}, "
        f"bound {'>=' if least else '<='} {bound:g}: {'ok' if good else 'MISSED'}",
        flush=True,
    )
    return good


def in_turn(repeats: int, *work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> np.ndarray:
    """Seconds [repeats, len(work)], each turn in another order; a turn before does not count."""
    times = np.zeros((repeats + 1, len(work)))
    for turn, row in enumerate(times):
        for i in np.random.default_rng(turn).permutation(len(work)):
            began = clock()
            work[i]()
            row[i] = clock() - began
    return times[1:]


# ------------------------------------------------------------------------------------------------------- overlap
class SlowActor(RewardActor):
    """Answers when `latency` seconds have passed since it was asked, if its models do not take longer."""

    latency = 0.0

    def answer_in(self, seconds: float) -> None:
        self.latency = seconds

    def score(self, request: str, latents: np.ndarray, prompts: Sequence[str], terms: RewardRequest) -> ActorReply:
        began = time.perf_counter()
        answer = super().score(request, latents, prompts, terms)
        time.sleep(max(0.0, self.latency - (time.perf_counter() - began)))
        return answer


@dataclass
class Turns:
    """Sets each round's share, and keeps (share, latency, window, exposed, when it was asked)."""

    pool: RewardPool
    path: Path
    rows: list[tuple[float, float, float, float, float]] = field(default_factory=list)
    last: Scores | None = None

    def ask(self, latents: Tensor, prompts: Sequence[str], terms: RewardRequest) -> Collect:
        turn, place = divmod(max(0, len(self.rows) - WARM_UP), len(SHARES))
        warm = len(self.rows) >= WARM_UP
        share = SHARES[np.random.default_rng(turn).permutation(len(SHARES))[place]] if warm else 0.0
        windows = [window for of, _, window, *_ in self.rows if of == (NOBODY if warm and turn else 0)]
        latency = max(0.0, share) * float(np.median(windows[-ROUNDS:] or [0.0]))
        asked = time.perf_counter()
        if share == NOBODY:
            assert self.last
            scores = Scores(self.last.scores, torch.zeros_like(latents), 0.0, terms.micro_batch)
            collect: Collect = lambda: scores  # noqa: E731
        else:
            self.pool.actors()[0].answer_in.remote(latency)  # an actor's calls keep their order
            collect = self.pool.ask(latents, prompts, terms)
        sent = time.perf_counter()

        def measured() -> Scores:
            wanted = time.perf_counter()
            self.last = collect()
            self.rows.append((share, latency, wanted - sent, time.perf_counter() - wanted, asked))
            if len(self.rows) > WARM_UP + ROUNDS * len(SHARES):
                self.path.write_text(json.dumps(self.rows))
            return self.last

        return measured

    def validate(
        self, latents: Tensor, prompts: Sequence[str], trained: Collection[str], known: Collection[str] = ()
    ) -> list[Report]:
        return self.pool.validate(latents, prompts, trained)


def overlap(overrides: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as temporary:
        own = [f"steps={WARM_UP + ROUNDS * len(SHARES) + 1}", f"tracking.uri=sqlite:///{temporary}/mlflow.db"]
        own += ["overoptimization.every=0", "cluster.rewards.placement=actor", "logging.every=1000"]
        own += ["logging.grid_every=1000", "logging.checkpoint_every=1000"]
        path = Path(temporary) / "rows.json"
        experiment = load(RECIPE, [*own, *overrides])
        (Path(temporary) / "run").mkdir()
        with reward_pool(experiment, SlowActor) as pool:
            fit(experiment, Path(temporary) / "run", Turns(pool, path), "")
        rows = np.array(json.loads(path.read_text()))[WARM_UP:]
    spans = np.diff(rows[:, 4])  # from question to question: each round's work once
    rows = rows[:-1]
    turns = [spans.reshape(ROUNDS, -1)[rows[:, 0].reshape(ROUNDS, -1) == share] for share in SHARES]
    good = True
    for share, span in zip(SHARES[1:], turns[1:], strict=True):
        _, latency, window, exposed, _ = rows[rows[:, 0] == share].T
        print(
            f"overlap, latency {share:g} x window: window {np.median(window):.3f} s, latency {np.median(latency):.3f} s, "
            f"exposed median {np.median(exposed) * 1e3:.1f} ms, largest {exposed.max() * 1e3:.1f} ms, "
            f"round {np.median(span):.3f} s, {np.median(span - turns[0]) * 1e3:+.1f} ms to one that asks nobody"
        )
        if share:
            hidden = (latency - exposed) / np.minimum(latency, np.median(window))
            good &= said("  hidden of what can be", hidden, HIDDEN, least=True, statistic=np.mean)
        else:
            good &= said("  round over one that asks nobody", span / turns[0], FREE, least=False)
    return good


# ------------------------------------------------------------------------------------------------ what it saves
def terms_of(experiment: Experiment) -> RewardRequest:
    return RewardRequest(
        {reward.name: reward.weight for reward in experiment.rewards.trained}, experiment.rewards.micro_batch_size
    )


def noise(experiment: Experiment, rows: int, seed: int = 0) -> Tensor:
    shape = load_reference(experiment.reference.model).latent_shape
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


class LightActor(RewardActor):
    """Its models take next to nothing: what is left is what asking costs."""

    def __init__(self, experiment: Experiment, names: tuple[str, ...], folder: str) -> None:
        super().__init__(experiment, names, folder)
        self.rewards = LatentRewards(lambda latents: latents[:, :3].sigmoid(), dict.fromkeys(names, brightness))


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1).mean(1)


def batching(overrides: list[str]) -> bool:
    experiment = load(RECIPE, overrides)
    terms, latents, prompts = terms_of(experiment), noise(experiment, 64), ["a happy pink sprout"] * 64
    good = True
    for what, actor in {"the recipe's rewards": RewardActor, "next to nothing": LightActor}.items():
        with reward_pool(experiment, actor) as pool:

            def single(pool: RewardPool = pool) -> None:
                for collect in [pool.ask(latents[i : i + 1], prompts[i : i + 1], terms) for i in range(64)]:
                    collect()

            def whole(pool: RewardPool = pool) -> None:
                pool.ask(latents, prompts, terms)()

            times = in_turn(20, whole, single)
        ratio = times[:, 1] / times[:, 0]
        one, many = 64 / np.median(times, axis=0)
        print(f"batching, {what}: {one:.0f} samples/s in one question, {many:.0f} in 64, ratio {np.median(ratio):.2f}")
        if actor is LightActor:
            good = said("  throughput of one over that of 64", ratio, BATCHING, least=True)
    return good


class Tower(nn.Module):
    """A CLIP image tower with random weights."""

    def __init__(self) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        size = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3}
        self.model = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=64, patch_size=8, projection_dim=64, **size))
        self.requires_grad_(False).eval()

    def features(self, images: Tensor) -> Tensor:
        pixels = nn.functional.interpolate(images, (64, 64), mode="bilinear", antialias=True)
        return self.model(pixels).image_embeds


class Judged(nn.Module):
    """A linear head on a tower."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower, self.linear = tower, nn.Linear(64, 1).requires_grad_(False)

    def head(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.linear(features)[:, 0]

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.tower.features(images), prompts)


def tower(overrides: list[str]) -> bool:
    torch.set_num_threads(1)
    experiment = load(RECIPE, overrides)
    decode, latents = load_reference(experiment.reference.model).decode, noise(experiment, 16)
    torch.manual_seed(0)
    one = Tower()
    together = LatentRewards(decode, {"first": Judged(one), "second": Judged(one)})
    apart = [LatentRewards(decode, {name: Judged(Tower())}) for name in together.models]

    def asked(rewards: LatentRewards) -> None:
        rewards(latents, [""] * 16, RewardRequest(dict.fromkeys(rewards.models, 1.0), experiment.rewards.micro_batch_size))

    def two() -> None:
        for rewards in apart:
            asked(rewards)

    times = in_turn(20, lambda: asked(together), two, clock=time.process_time)
    in_one, in_two = 16 / np.median(times, axis=0)
    print(f"tower: {in_one:.1f} samples per CPU second in one actor, {in_two:.1f} in two")
    return said("  throughput of one over that of two", times[:, 1] / times[:, 0], SHARED, least=True)


class Echo:
    """What an actor's call costs beside its work: as many numbers come back as a gradient, and none of them is
    shared."""

    def back(self, array: np.ndarray) -> np.ndarray:
        return array.copy()


def latents(overrides: list[str]) -> bool:
    small, large = (np.random.default_rng(0).random((16, *shape), np.float32) for shape in ((4, 64, 64), (3, 512, 512)))
    actor = ray.remote(Echo).options(num_cpus=1).remote()

    def there_and_back(array: np.ndarray) -> np.ndarray:
        return np.array(ray.get(actor.back.remote(array)))

    times = in_turn(20, partial(there_and_back, small), partial(there_and_back, large))
    ray.kill(actor)
    print(
        f"latents: {small.nbytes / 1e6:.2f} MB against {large.nbytes / 1e6:.2f} MB of pixels a way, "
        f"{large.nbytes / small.nbytes:g} times less; "
        f"{np.median(times[:, 0]) * 1e3:.1f} ms against {np.median(times[:, 1]) * 1e3:.1f} ms there and back"
    )
    return said("  time of pixels over that of latents", times[:, 1] / times[:, 0], SMALLER, least=True)


def gradient(overrides: list[str]) -> bool:
    experiment = load(RECIPE, overrides)
    terms, prompts = terms_of(experiment), ["a happy pink sprout"] * 40
    decode = load_reference(experiment.reference.model).decode
    models = make_rewards(experiment.rewards.names, decode, "cpu").models
    differences = []
    with reward_pool(experiment) as pool:
        for seed in range(10):
            x0 = noise(experiment, 40, seed).requires_grad_()
            total = sum(weight * models[name](decode(x0), prompts).sum() for name, weight in terms.weights.items())
            assert isinstance(total, Tensor)
            exact = torch.autograd.grad(total, x0)[0]
            difference = (pool.ask(x0.detach(), prompts, terms)().gradient - exact).flatten(1).norm(dim=1)
            differences.append((difference / exact.flatten(1).norm(dim=1)).max().item())
    what = "gradient: largest relative difference of a sample"
    return said(what, np.array(differences), EXACT, least=False, statistic=np.max)


PARTS = {"overlap": overlap, "batching": batching, "tower": tower, "latents": latents, "gradient": gradient}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["all"], choices=["all", *PARTS])
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    chosen = [*PARTS] if "all" in asked.parts else asked.parts
    with attached() if set(chosen) - {"tower"} else nullcontext():
        good = [PARTS[name](asked.overrides) for name in chosen]
    sys.exit(not all(good))
