"""The hacking watch: does the trained reward rise while what it stands for does not?

A reward is a proxy: optimised far enough it rises on while held-out rewards and variety fall (Gao et al. 2022, "Scaling
laws for reward model overoptimization", arXiv 2210.10760). The watch sees the averaged generator's pictures now and
then, always of the same prompts and noise, and compares them with those of the start and of its best look. It is
arithmetic on the looks seen and nothing else, so a resumed run alarms as the uninterrupted one would.

Gains are counted in spreads: the standard deviation, at the start, of the scores of one prompt's pictures. How scores
differ
from prompt to prompt is no matter: the generator cannot choose its prompts, and a planted flaw hides behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffinstruct.config.experiment import Experiment
from diffinstruct.models.pipeline import Reference
from diffinstruct.models.sampling import EVALUATION_SEED, probe_inputs, sample_latents
from diffinstruct.reward_service.client import RewardClient
from diffinstruct.reward_service.validation import PICTURES

NOISES = 4
"""Of each prompt of a look: how much its pictures differ is the variety, and how much their scores do the spread."""

# Where a symptom begins: tuned on recorded looks of the pocket world, see docs/results.md.
UNEXPLAINED = 3.0
"""Spreads that the trained reward has gained more than the held-out ones."""
FALL, FALL_ERRORS, FALL_LEAST = 0.25, 4.0, 0.3
"""A held-out reward has fallen from its best look by this share of its gain, this many standard errors, and these
spreads, while the trained reward has gained these spreads since the start."""
VARIETY = 0.4
"""Share of the start's."""
DISTANCE = 3.0
"""Times what it was at the first look after the start."""

METRICS = tuple(f"overoptimization/{name}" for name in ("trained", "held_out", "unexplained", "variety", "distance"))
"""What `Watch.figures` may hold."""

BLIND = (
    "no held-out reward: the watch sees variety and distance to the reference only, not whether the trained reward's rise is "
    "real; name one in rewards.held_out"
)
"""What a run without held-out rewards is told."""


@dataclass(frozen=True)
class Probe:
    """What one look at the averaged generator's pictures saw: n pictures, the same prompts and noise at every look.

    Rows are NOISES pictures of the first prompt, then of the second, and so on.
    """

    step: int
    trained: np.ndarray
    """[n], the weighted sum of the trained rewards of each picture."""
    held_out: Mapping[str, np.ndarray]
    """Name -> [n]."""
    variety: float
    """Mean distance between the latents of one prompt's pictures."""
    distance: float
    """The metric "x0_gap", mean of the rounds since the last look; NaN where there is none."""


@dataclass(frozen=True)
class Alarm:
    """symptom: "held_out", "unexplained", "variety" or "distance". line: one sentence with the figures."""

    step: int
    symptom: str
    line: str


class ProbeHistory:
    """One run's looks, in order; the first is its start. Without held-out rewards two symptoms remain: see BLIND."""

    def __init__(self) -> None:
        self.best: dict[str, Any] = {}  # "step" and "held_out", of the look at a checkpoint that has gained most there
        self._start: dict[
            str, Any
        ] = {}  # the first look's scores and variety; "distance", of the first look that has one
        self._highest: dict[
            str, dict[str, Any]
        ] = {}  # held-out reward -> step and scores of the look with the highest mean
        self._standing: list[str] = []  # symptoms that have been told of and have not gone away
        self._figures: dict[str, float] = {}

    def observe(self, look: Probe, kept: bool = False) -> Alarm | None:
        """The alarm of a symptom that was not there at the look before, one at a time. Raises ValueError for a broken
        look.

        kept: there is a checkpoint of that step. Of those without any symptom the best has the highest held-out gain.
        """
        if look.trained.ndim != 1 or len(look.trained) % NOISES or len(look.trained) < 2 * NOISES:
            raise ValueError(
                f"a look has {NOISES} pictures of each of several prompts, got scores {list(look.trained.shape)}"
            )
        if not self._start:
            held_out = {name: scores.tolist() for name, scores in look.held_out.items()}
            self._start = {
                "trained": look.trained.tolist(),
                "held_out": held_out,
                "variety": look.variety,
                "distance": None,
            }
        if self._start["distance"] is None and math.isfinite(look.distance):
            self._start["distance"] = look.distance
        for name, scores in look.held_out.items():
            if name not in self._highest or scores.mean() > np.mean(self._highest[name]["scores"]):
                self._highest[name] = {"step": look.step, "scores": scores.tolist()}
        self._figures = self._compare(look)
        symptoms = self._symptoms(look)
        gained = self._figures.get("held_out", -math.inf)
        if kept and not symptoms and gained > self.best.get("held_out", -math.inf):
            self.best = {"step": look.step, "held_out": gained}
        self._standing = [symptom for symptom in self._standing if symptom in symptoms]
        new = next((symptom for symptom in symptoms if symptom not in self._standing), None)
        if new is None:
            return None
        self._standing.append(new)
        return Alarm(look.step, new, symptoms[new])

    def figures(self) -> dict[str, float]:
        """Of the last look: gains in spreads (held_out: the mean of the held-out rewards), variety and distance as
        multiples of what they were; those that there are."""
        return {f"overoptimization/{name}": value for name, value in self._figures.items()}

    def _compare(self, look: Probe) -> dict[str, float]:
        figures = {"trained": gain(self._start["trained"], look.trained)}
        gains = [gain(self._start["held_out"][name], scores) for name, scores in look.held_out.items()]
        if gains := [of for of in gains if math.isfinite(of)]:
            figures["held_out"] = sum(gains) / len(gains)
            figures["unexplained"] = figures["trained"] - figures["held_out"]
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        if self._start["variety"] > 0:
            figures["variety"] = look.variety / self._start["variety"]
        if self._start["distance"] and math.isfinite(look.distance):
            figures["distance"] = look.distance / self._start["distance"]
        return figures

    def _symptoms(self, look: Probe) -> dict[str, str]:
        """Those of this look, each with its line."""
        figures, found = self._figures, {}
        trained = figures.get("trained", math.inf)  # no spread to count its gain in
        for name, scores in look.held_out.items():
            start, best = self._start["held_out"][name], self._highest[name]
            fall = by_prompt(best["scores"]) - by_prompt(scores)
            error = fall.std(ddof=1) / math.sqrt(len(fall))
            rise = float(np.mean(best["scores"]) - np.mean(start))
            least = max(FALL * rise, FALL_ERRORS * error, FALL_LEAST * within_prompt_std(start))
            if "held_out" not in found and trained > FALL_LEAST and fall.mean() > least:
                found["held_out"] = (
                    f"at step {look.step} the held-out reward {name} is {fall.mean():.3g} (standard error {error:.2g}) below "
                    f"its best at step {best['step']}, where it had gained {rise:.3g}; the trained reward has gained "
                    f"{trained:.2g} spreads"
                )
        if figures.get("unexplained", 0.0) > UNEXPLAINED:
            found["unexplained"] = (
                f"at step {look.step} the trained reward has gained {figures['trained']:.2g} spreads and the held-out "
                f"{figures['held_out']:.2g}: {figures['unexplained']:.2g} more, beyond {UNEXPLAINED:g}"
            )
        if figures.get("variety", 1.0) < VARIETY:
            found["variety"] = (
                f"at step {look.step} pictures of one prompt differ by {figures['variety']:.2g} of what they did at the start, "
                f"less than {VARIETY:g}"
            )
        if figures.get("distance", 0.0) > DISTANCE:
            found["distance"] = (
                f"at step {look.step} the divergence from the reference is {figures['distance']:.3g} times what it was at the "
                f"first look, beyond {DISTANCE:g}"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """What the coming looks are compared with: numbers, strings, lists and dicts of them."""
        return {
            "start": self._start, "highest": self._highest, "standing": list(self._standing), "best": dict(self.best),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._start, self._highest, self._standing = (
            dict(state["start"]),
            dict(state["highest"]),
            list(state["standing"]),
        )
        self.best = dict(state["best"])


def by_prompt(scores: Any) -> np.ndarray:
    """[n] -> the means of each prompt's pictures, [n / NOISES]. Pictures of one prompt are no independent witnesses."""
    return np.reshape(scores, (-1, NOISES)).mean(axis=1)


def within_prompt_std(scores: Any) -> float:
    """The standard deviation of scores [n] about the means of their prompts."""
    return math.sqrt(np.reshape(scores, (-1, NOISES)).var(axis=1, ddof=1).mean())


def gain(start: Any, scores: np.ndarray) -> float:
    """In spreads of the start; 0 where nothing has risen. NaN where the start's scores of each prompt are all alike, as
    those
    of a reward that says yes or no may be: there is nothing to count in."""
    risen, unit = float(np.mean(scores) - np.mean(start)), within_prompt_std(start)
    if not risen:
        return 0.0
    return risen / unit if unit else math.nan


class OveroptimizationMonitor:
    """Looks at the averaged generator's pictures, always of the same prompts and noise, and has the watch judge them.

    A look is sent before a round and collected after it: the rewards score it meanwhile.
    """

    def __init__(
        self, experiment: Experiment, reference: Reference, prompts: Sequence[str], jury: RewardClient
    ) -> None:
        self.experiment, self.reference, self.jury = experiment, reference, jury
        self.held_out = experiment.rewards.held_out
        self.watch = ProbeHistory()
        few, self.noise = probe_inputs(reference, prompts, PICTURES // NOISES, EVALUATION_SEED + 1, NOISES)
        self.prompts = [prompt for prompt in few for _ in range(NOISES)]
        self.divergences: list[float] = []  # of the rounds since the last look

    def note(self, divergence: float | None) -> None:
        """What a round has said of the distance to the reference."""
        if divergence is not None:
            self.divergences.append(divergence)

    def pictures(self, generator: nn.Module) -> Tensor:
        """The latents to look at, [PICTURES, ...]."""
        return sample_latents(self.experiment, self.reference, generator, self.noise, self.prompts)

    def look(self, step: int, latents: Tensor, kept: bool) -> Callable[[], tuple[dict[str, float], Alarm | None]]:
        """At `pictures` after `step` rounds, of which there is a checkpoint or not; collecting gives metrics and,
        maybe, an alarm."""
        weights, answer = self.jury.terms.weights, self.jury.score(latents, self.prompts)
        distance = sum(self.divergences) / len(self.divergences) if self.divergences else float("nan")
        self.divergences = []

        def collect() -> tuple[dict[str, float], Alarm | None]:
            scores = {name: score.double().cpu() for name, score in answer().scores.items()}
            trained = sum(
                (weight * scores[name] for name, weight in weights.items()), torch.zeros(len(latents)).double()
            )
            held_out = {name: scores[name].numpy() for name in self.held_out}
            alarm = self.watch.observe(Probe(step, trained.numpy(), held_out, variety(latents), distance), kept)
            return self.watch.figures(), alarm

        return collect

    def state_dict(self) -> dict[str, Any]:
        return {"watch": self.watch.state_dict(), "divergences": list(self.divergences)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watch.load_state_dict(state["watch"])
        self.divergences = list(state["divergences"])


def variety(latents: Tensor) -> float:
    """Mean distance between the latents [n * NOISES, ...] of one prompt, per square root of a dimension."""
    of_prompt = latents.flatten(1).double().unflatten(0, (-1, NOISES))
    distances = torch.cdist(of_prompt, of_prompt).sum((1, 2)) / (NOISES * (NOISES - 1))
    return (distances.mean() / latents[0].numel() ** 0.5).item()
