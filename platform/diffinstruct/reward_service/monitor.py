"""The over-optimization monitor: does the trained reward rise while what it stands for does not?

A reward is a proxy: optimised far enough it rises on while held-out rewards and variety fall (Gao et al. 2022, "Scaling
laws for reward model overoptimization", arXiv 2210.10760). Every few rounds the monitor takes a probe: pictures of the
generator's EMA, always of the same prompts and noise. It compares them with those of the start and of the best probe:
arithmetic on the probes and nothing else, so a resumed run alarms as the uninterrupted one would.

Gains are counted in the start's within-prompt standard deviation, that of the scores of one prompt's pictures. How
scores differ between prompts does not matter: a planted flaw hides behind that difference.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffinstruct.method.step import Metrics
from diffinstruct.models.sampling import EVALUATION_SEED, LatentSampler, probe_inputs
from diffinstruct.ranks import SINGLE_PROCESS, Ranks
from diffinstruct.reward_service.client import RewardClient
from diffinstruct.reward_service.reward_validation import PICTURES

NOISES = 4  # A probe has so many pictures of each prompt

# Where a symptom begins: tuned on recorded probes of the pocket world, see docs/results.md.
MAX_UNEXPLAINED_STD = 3.0  # the trained reward has gained this much more than the held-out ones, in within-prompt std
FALL_SHARE, FALL_ERRORS, FALL_STD, TRAINED_GAIN_STD = 0.25, 4.0, 0.3, 0.3
"""A held-out reward has fallen from its best probe by this share of its gain, this many standard errors, and this many
within-prompt std, while the trained reward has gained TRAINED_GAIN_STD within-prompt std since the start."""
MIN_VARIETY_SHARE = 0.4  # the variety is below this share of the start's
MAX_DISTANCE_RATIO = 3.0  # the distance is beyond this multiple of the first probe's after the start

PROBE_METRICS = tuple(f"overoptimization/{name}" for name in ("trained", "held_out", "unexplained", "variety", "distance"))
"""The keys that `ProbeHistory.figures` may have."""

NO_HELD_OUT = (
    "no held-out reward: the monitor sees variety and distance to the reference only, not whether the trained reward's "
    "rise is real; name one in rewards.held_out"
)
"""The remark of a run without held-out rewards."""


@dataclass(frozen=True)
class Probe:
    """Scores and figures of n pictures: NOISES of the first prompt, then of the second, and so on."""

    step: int
    trained: np.ndarray  # [n], the weighted sum of the trained rewards
    held_out: Mapping[str, np.ndarray]  # name -> [n]
    variety: float  # mean distance between the latents of one prompt's pictures
    distance: float  # the metric "x0_gap", mean of the rounds since the last probe; NaN where there is none


@dataclass(frozen=True)
class Alarm:
    """symptom: "held_out", "unexplained", "variety" or "distance". line: one sentence with the figures."""

    step: int
    symptom: str
    line: str


class ProbeHistory:
    """One run's probes, in order; the first is its start. Without held-out rewards two symptoms remain: see NO_HELD_OUT."""

    def __init__(self) -> None:
        self.best: dict[str, Any] = {}  # "step" and "held_out" (its gain) of the best probe at a checkpoint
        self._start: dict[str, Any] = {}  # the first probe's scores and variety; "distance" of the first that has one
        self._highest: dict[str, dict[str, Any]] = {}  # held-out reward -> step and scores of the probe with the highest mean
        self._active: list[str] = []  # symptoms that were reported and have not gone away
        self._figures: dict[str, float] = {}

    @property
    def best_step(self) -> int | None:
        return self.best.get("step")

    def observe(self, probe: Probe, has_checkpoint: bool = False) -> Alarm | None:
        """Returns one new symptom per probe, as an Alarm. Raises ValueError for a broken probe.

        best: the symptom-free probe with a checkpoint and the highest held-out gain.
        has_checkpoint: whether there is one of the probe's step.
        """
        shape = probe.trained.shape
        if len(shape) != 1 or shape[0] % NOISES or shape[0] < 2 * NOISES:
            raise ValueError(f"a probe has {NOISES} pictures of each of several prompts, got scores {list(shape)}")
        if not self._start:
            held_out = {name: scores.tolist() for name, scores in probe.held_out.items()}
            self._start = {"trained": probe.trained.tolist(), "held_out": held_out, "variety": probe.variety, "distance": None}
        if self._start["distance"] is None and math.isfinite(probe.distance):
            self._start["distance"] = probe.distance
        for name, scores in probe.held_out.items():
            if name not in self._highest or scores.mean() > np.mean(self._highest[name]["scores"]):
                self._highest[name] = {"step": probe.step, "scores": scores.tolist()}
        self._figures = self._compare(probe)
        symptoms = self._symptoms(probe)
        gained = self._figures.get("held_out", -math.inf)
        if has_checkpoint and not symptoms and gained > self.best.get("held_out", -math.inf):
            self.best = {"step": probe.step, "held_out": gained}
        self._active = [symptom for symptom in self._active if symptom in symptoms]
        new = next((symptom for symptom in symptoms if symptom not in self._active), None)
        if new is None:
            return None
        self._active.append(new)
        return Alarm(probe.step, new, symptoms[new])

    def figures(self) -> dict[str, float]:
        """The metrics of the last probe: gains in within-prompt std (held_out: the mean of those rewards), variety and
        distance as multiples of what they were."""
        return {f"overoptimization/{name}": value for name, value in self._figures.items()}

    def _compare(self, probe: Probe) -> dict[str, float]:
        figures = {"trained": gain(self._start["trained"], probe.trained)}
        gains = [gain(self._start["held_out"][name], scores) for name, scores in probe.held_out.items()]
        if gains := [value for value in gains if math.isfinite(value)]:
            figures["held_out"] = sum(gains) / len(gains)
            figures["unexplained"] = figures["trained"] - figures["held_out"]
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        if self._start["variety"] > 0:
            figures["variety"] = probe.variety / self._start["variety"]
        if self._start["distance"] and math.isfinite(probe.distance):
            figures["distance"] = probe.distance / self._start["distance"]
        return figures

    def _symptoms(self, probe: Probe) -> dict[str, str]:
        """The symptoms of this probe, each with its line."""
        figures, symptoms = self._figures, {}
        trained = figures.get("trained", math.inf)  # gain not countable: treat it as risen
        for name, scores in probe.held_out.items():
            start, best = self._start["held_out"][name], self._highest[name]
            fall = by_prompt(best["scores"]) - by_prompt(scores)
            error = fall.std(ddof=1) / math.sqrt(len(fall))
            rise = float(np.mean(best["scores"]) - np.mean(start))
            threshold = max(FALL_SHARE * rise, FALL_ERRORS * error, FALL_STD * within_prompt_std(start))
            if "held_out" not in symptoms and trained > TRAINED_GAIN_STD and fall.mean() > threshold:
                symptoms["held_out"] = (
                    f"at step {probe.step} the held-out reward {name} is {fall.mean():.3g} (standard error "
                    f"{error:.2g}) below its best at step {best['step']}, where it had gained {rise:.3g}; the trained "
                    f"reward has gained {trained:.2g} within-prompt std"
                )
        if figures.get("unexplained", 0.0) > MAX_UNEXPLAINED_STD:
            symptoms["unexplained"] = (
                f"at step {probe.step} the trained reward has gained {figures['trained']:.2g} within-prompt std and "
                f"the held-out {figures['held_out']:.2g}: {figures['unexplained']:.2g} more, beyond {MAX_UNEXPLAINED_STD:g}"
            )
        if figures.get("variety", 1.0) < MIN_VARIETY_SHARE:
            symptoms["variety"] = (
                f"at step {probe.step} pictures of one prompt differ by {figures['variety']:.2g} of what they did at "
                f"the start, less than {MIN_VARIETY_SHARE:g}"
            )
        if figures.get("distance", 0.0) > MAX_DISTANCE_RATIO:
            symptoms["distance"] = (
                f"at step {probe.step} the x0 gap to the reference is {figures['distance']:.3g} times what it was at "
                f"the first probe, beyond {MAX_DISTANCE_RATIO:g}"
            )
        return symptoms

    def state_dict(self) -> dict[str, Any]:
        """What the coming probes are compared with."""
        return {"start": self._start, "highest": self._highest, "active": list(self._active), "best": dict(self.best)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._start, self._highest, self.best = (dict(state[key]) for key in ("start", "highest", "best"))
        self._active = list(state["active"])


def by_prompt(scores: Any) -> np.ndarray:
    """[n] -> the means of each prompt's pictures, [n / NOISES]. Pictures of one prompt are no independent witnesses."""
    return np.reshape(scores, (-1, NOISES)).mean(axis=1)


def within_prompt_std(scores: Any) -> float:
    """The standard deviation of scores [n] about the means of their prompts."""
    return math.sqrt(np.reshape(scores, (-1, NOISES)).var(axis=1, ddof=1).mean())


def gain(start: Any, scores: np.ndarray) -> float:
    """The gain since the start in its within-prompt std; 0 where nothing has risen. NaN where that std is 0, which
    happens with yes/no rewards."""
    risen, unit = float(np.mean(scores) - np.mean(start)), within_prompt_std(start)
    if not risen:
        return 0.0
    return risen / unit if unit else math.nan


ProbeResult = tuple[dict[str, float], Alarm | None]  # the metrics of a probe, and the alarm that it may raise


class OveroptimizationMonitor:
    """Probes the generator's EMA, always with the same prompts and noise, and keeps the history of the probes.

    A probe is sent before a round and collected after it: the rewards score it meanwhile. All ranks sample, which sharded
    networks do together; the first one alone has its samples scored.
    """

    def __init__(
        self,
        held_out: Sequence[str],
        sample: LatentSampler,
        prompts: Sequence[str],
        rewards: RewardClient,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        self.held_out, self.sample, self.rewards, self.ranks = held_out, sample, rewards, ranks
        self.history = ProbeHistory()
        chosen, self.noise = probe_inputs(sample.reference, prompts, PICTURES // NOISES, EVALUATION_SEED + 1, NOISES)
        self.prompts = [prompt for prompt in chosen for _ in range(NOISES)]
        self.x0_gaps: list[float] = []  # of the rounds since the last probe

    def add_round(self, metrics: Metrics) -> None:
        """Keep a round's distance to the reference, if it has one."""
        if (x0_gap := metrics.get("x0_gap")) is not None:
            self.x0_gaps.append(x0_gap)

    def probe(self, step: int, generator: nn.Module, has_checkpoint: bool) -> Callable[[], ProbeResult]:
        """Probe the generator after `step` rounds; collecting gives the result."""
        latents = self.sample(generator, self.noise, self.prompts)
        if not self.ranks.first:
            return lambda: ({}, None)
        weights, answer = self.rewards.request.weights, self.rewards.send_for_scores(latents, self.prompts)
        distance = sum(self.x0_gaps) / len(self.x0_gaps) if self.x0_gaps else float("nan")
        self.x0_gaps = []

        def collect() -> ProbeResult:
            scores = {name: score.double().cpu() for name, score in answer().scores.items()}
            trained = sum((weight * scores[name] for name, weight in weights.items()), torch.zeros(len(latents)).double())
            held_out = {name: scores[name].numpy() for name in self.held_out}
            alarm = self.history.observe(Probe(step, trained.numpy(), held_out, variety(latents), distance), has_checkpoint)
            return self.history.figures(), alarm

        return collect

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict(), "x0_gaps": list(self.x0_gaps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_state_dict(state["history"])
        self.x0_gaps = list(state["x0_gaps"])


def variety(latents: Tensor) -> float:
    """Mean distance between the latents [n * NOISES, ...] of one prompt, per square root of a dimension."""
    grouped = latents.flatten(1).double().unflatten(0, (-1, NOISES))
    distances = torch.cdist(grouped, grouped).sum((1, 2)) / (NOISES * (NOISES - 1))
    return (distances.mean() / latents[0].numel() ** 0.5).item()
