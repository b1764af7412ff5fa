"""The state of a run: what its checkpoints keep, in a running loop and on disk. All keys of that state are here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from diffinstruct.config.experiment import Experiment
from diffinstruct.errors import UserError
from diffinstruct.method.step import Metrics, StepConfig, TrainState
from diffinstruct.models.sharding import to_dtensors, to_shards
from diffinstruct.ranks import Ranks
from diffinstruct.reward_service.client import RewardClient
from diffinstruct.reward_service.monitor import OveroptimizationMonitor, ProbeHistory
from diffinstruct.run_folder.checkpoint import CheckpointError
from diffinstruct.training.guards import NonFiniteGuard
from diffinstruct.training.metric_window import MetricWindow

STATE = 4  # the version of the state in a checkpoint: it goes up with each change that makes older ones unreadable
STATE_OF_0_1 = 3  # the state that version 0.1 wrote. This version exports its model and does not go on with it.
EMA_PATH = {STATE: ("train_state", "ema"), STATE_OF_0_1: ("players", "ema")}
"""Version of the state -> where the weights of the generator's EMA are in it."""
BEST_PATH = {STATE: ("overoptimization", "history", "best"), STATE_OF_0_1: ("watcher", "watch", "best")}
"""Version of the state -> where the best probe at a checkpoint is in it."""


@dataclass
class LoopState:
    """All that a run changes; a resumed run goes on from it bit for bit."""

    train_state: TrainState
    step_config: StepConfig
    rewards: RewardClient
    monitor: OveroptimizationMonitor
    metric_window: MetricWindow
    nonfinite_guard: NonFiniteGuard = field(default_factory=NonFiniteGuard)
    step: int = 0  # the rounds that are done; a checkpoint has it in its name
    stopped: bool = False  # whether the run has ended before its last step
    last_metrics: Metrics = field(default_factory=dict)  # the newest value of each metric

    def set_reward_scale(self, scale: float) -> None:
        self.step_config = replace(self.step_config, reward_scale=scale)

    def agree(self, ranks: Ranks) -> None:
        """Make what the ranks have measured by themselves the same on all of them. A collective call."""
        self.rewards.micro_batch_size = ranks.min(self.rewards.micro_batch_size)
        self.metric_window.share(ranks)

    def state_dict(self) -> dict[str, Any]:
        values = {"reward_scale": self.step_config.reward_scale, "stopped": self.stopped, "metrics": self.last_metrics}
        return values | to_shards({name: part.state_dict() for name, part in self._stateful().items()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        self.set_reward_scale(state["reward_scale"])
        self.stopped, self.last_metrics = state["stopped"], state["metrics"]

    def restore(self, step: int, state: dict[str, Any], mesh: DeviceMesh | None, folder: Path) -> None:
        """Take the state of the checkpoint of `step` in `folder`. Raises CheckpointError where it does not fit."""
        try:
            self.load_state_dict(to_dtensors(state, mesh) if mesh else state)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())  # torch says it in many lines
            raise CheckpointError(f"{folder}: the run cannot go on from its newest checkpoint ({reason})") from error
        self.step = step

    def _stateful(self) -> dict[str, Any]:
        return {
            "train_state": self.train_state,
            "rewards": self.rewards,
            "overoptimization": self.monitor,
            "metric_window": self.metric_window,
            "nonfinite_guard": self.nonfinite_guard,
        }


@dataclass(frozen=True)
class Identity:
    """Which run a state belongs to: the configuration's hash and the digest of its prompts."""

    experiment: str
    prompts: str

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Identity:
        return cls(state.get("experiment", ""), state.get("prompts", ""))

    def stamp(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state as a checkpoint keeps it."""
        return state | {"format": STATE, "experiment": self.experiment, "prompts": self.prompts}


def moved(state: dict[str, Any], identity: Identity, experiment: Experiment, keys: Collection[str]) -> dict[str, Any]:
    """A checkpoint's state as that of another configuration, which has other values for `keys`; with its optimizers.

    The other run's best checkpoint is not here, and its end is not this one's. The reward scale stays what an alarm has
    made of it, unless it is among the keys. Probes are compared picture by picture, so other prompts need a new start.
    """
    state = identity.stamp(state) | {"stopped": False}
    state["overoptimization"]["history"]["best"] = {}
    sections = {"generator_optimizer": experiment.generator, "score_optimizer": experiment.score_network}
    for optimizer, section in sections.items():
        for group in state["train_state"][optimizer]["param_groups"]:
            group |= {"lr": section.learning_rate, "betas": section.betas, "weight_decay": section.weight_decay}
    if "objective.reward_scale" in keys:
        state["reward_scale"] = experiment.objective.reward_scale
    if any(key.startswith("prompts.") for key in keys):
        state["overoptimization"] = {"history": ProbeHistory().state_dict(), "x0_gaps": []}
    if "rewards.micro_batch_size" in keys:
        state["rewards"]["micro_batch_size"] = experiment.rewards.micro_batch_size
    return state


def check_version(folder: Path, version: object) -> None:
    """Raises UserError where a checkpoint in `folder` has another version of the state."""
    if version == STATE_OF_0_1:
        raise UserError(
            f"{folder}: written by diffinstruct 0.1, and goes on with that version; its model is there with "
            f"`diffinstruct export {folder.parent} -o FOLDER`"
        )
    if version != STATE:
        raise UserError(f"{folder}: written by another version of diffinstruct (state {version}, this one has {STATE})")
