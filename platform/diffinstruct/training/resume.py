"""Going on with a run: its newest checkpoint, other values for some keys, another run's weights."""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from diffinstruct.config.experiment import Experiment
from diffinstruct.errors import UserError, did_you_mean
from diffinstruct.models.roles import make_roles
from diffinstruct.reward_service.monitor import ProbeHistory
from diffinstruct.run_folder.checkpoint import CheckpointError, CheckpointStore, flush
from diffinstruct.run_folder.state_tree import TensorShard
from diffinstruct.training.build import digest, open_reference, training_prompts
from diffinstruct.training.worker import Worker

STATE = 3
"""Of what a checkpoint of a run holds: goes up with each change that makes older ones unreadable."""


def newest(
    store: CheckpointStore, experiment: Experiment, worker: Worker, of_prompts: str
) -> tuple[int, dict[str, Any] | None]:
    """The rounds already done and the run's state, of the newest good checkpoint; (0, None) where there is none. Raises
    CheckpointError where workers see different ones, since their weights would differ from then on, and where there are
    some
    and none can be read: a disk that does not answer for a moment is no reason to begin anew over them; UserError for
    one of another configuration or other prompts."""
    store.settle(wait=True)
    worker.least(0)  # now what the first one was writing is there for all
    found = store.latest()
    at = found[0] if found else 0
    if (first := worker.least(at)) != -worker.least(-at):
        raise CheckpointError(f"{store.folder}: worker {worker.rank} sees the checkpoint of step {at}, another {first}")
    if found is None:
        if store.steps():
            raise CheckpointError(f"{store.folder}: no checkpoint in it can be read; without it the run begins anew")
        return 0, None
    step, state = found
    _check_state(store.folder, experiment, state.get("format"), state.get("experiment"))
    if state.get("prompts") != of_prompts:
        source = experiment.prompts.train
        how = "with those that it was begun with the run goes on, with these under --resume RUN --allow prompts.train"
        raise UserError(
            f"prompts.train: the prompts of {source} have changed since step {step} of {store.folder}; {how}"
        )
    return step, state


def _check_state(folder: Path, experiment: Experiment, written: object, of: object) -> None:
    """Raises UserError for a checkpoint that another configuration has written, or another version of this."""
    if written != STATE:
        raise UserError(f"{folder}: written by another version of diffinstruct (state {written}, this one has {STATE})")
    if of != experiment.config_hash:
        raise UserError(
            f"{folder}: belongs to another configuration ({of}, this one is {experiment.config_hash}); "
            "resume with the run's own experiment.yaml"
        )


def export_checkpoint(experiment: Experiment, folder: Path, which: str, out: Path) -> tuple[int, bool]:
    """Write the averaged generator of a checkpoint of `folder`, a run of `experiment`, as `export` does: of "last", the
    newest that can be read, of "best", by the watch, or of a step. Its step, and whether it is the best.

    Raises UserError where there is no such checkpoint, or of another configuration; CheckpointError for one that is
    damaged.
    """
    from diffinstruct.models.export import export

    store = CheckpointStore(folder / "checkpoints")
    if not (steps := store.steps()):
        raise UserError(f"{folder}: no checkpoint in it yet")
    best = _best(store)
    named = {str(step): [step] for step in steps} | {"last": steps} | ({} if best is None else {"best": [best]})
    if which not in named:
        there = f"; there are {', '.join(named)}" + ", and the watch knows of no best one" * (best is None)
        raise UserError(f"--step: no checkpoint {which!r} in {folder}{did_you_mean(which, named) or there}")
    for step in named[which]:
        try:
            weights = store.part(step, "players", "ema")
            break
        except CheckpointError as error:
            if step == named[which][-1]:
                raise
            print(error, file=sys.stderr)
    _check_state(store.folder, experiment, store.part(step, "format"), store.part(step, "experiment"))
    average = make_roles(experiment, open_reference(experiment, torch.device("cpu"))).average
    average.load_state_dict(
        {name: value.own if isinstance(value, TensorShard) else value for name, value in weights.items()}
    )
    export(experiment.reference.model, average, out)
    return step, step == best


def _best(store: CheckpointStore) -> int | None:
    """The step of the best checkpoint, as the newest knows that can be read."""
    for at in store.steps():
        with suppress(CheckpointError):
            found: int | None = store.part(at, "watcher", "watch", "best").get("step")
            return found
    return None


def take_over(experiment: Experiment, folder: Path, donor: Path) -> int:
    """Make `folder` a run of `experiment` that goes on from the newest checkpoint of another run, whose configuration
    may have other values for all that is not its players' shapes; the step that it goes on from. Raises CheckpointError
    where there is none."""
    found = CheckpointStore(donor / "checkpoints").latest()
    if found is None:
        raise CheckpointError(f"{donor}: no checkpoint whose weights could be taken over")
    step, state = found
    own = {"reward_scale": experiment.objective.reward_scale, "stopped": False}
    CheckpointStore(folder / "checkpoints").save(step, _made_one_of(experiment, state) | own)
    return step


def change(experiment: Experiment, folder: Path, keys: Collection[str]) -> int | None:
    """Make the newest checkpoint in `folder`, of a run with other values of these keys, one of `experiment`; its step,
    0 where there is none, and None where it is one already. The reward scale stays what the watch has made of it,
    unless it is among the keys. Raises UserError for fewer steps than are done, CheckpointError where there are
    checkpoints and none can be read.
    """
    store = CheckpointStore(folder / "checkpoints", keep=1)  # older ones stay the other configuration's
    found = store.latest()
    if found is None:
        if store.steps():
            raise CheckpointError(f"{store.folder}: no checkpoint in it can be read; nothing is changed")
        keep_configuration(experiment, folder)
        return 0
    step, state = found
    if step > experiment.steps:
        raise UserError(f"steps: should be at least the {step} that are done, got {experiment.steps}")
    if state.get("experiment") == experiment.config_hash and state.get("prompts") == digest(
        training_prompts(experiment)
    ):
        keep_configuration(experiment, folder)
        return None
    own: dict[str, Any] = {"stopped": False}
    if "objective.reward_scale" in keys:
        own["reward_scale"] = experiment.objective.reward_scale
    if any(key.startswith("prompts.") for key in keys):  # looks are compared picture by picture
        own["watcher"] = {"watch": ProbeHistory().state_dict(), "divergences": []}
    if "rewards.micro_batch_size" in keys:
        own["jury"] = state["jury"] | {"micro_batch": experiment.rewards.micro_batch_size}
    store.save(step, _made_one_of(experiment, state) | own)
    keep_configuration(experiment, folder)
    return step


def keep_configuration(experiment: Experiment, folder: Path) -> None:
    """Write the run's experiment.yaml, whole or not at all."""
    passing = folder / "experiment.yaml.tmp"
    passing.write_text(experiment.without_secrets().to_yaml())
    flush(passing)  # or a power cut leaves an empty one
    passing.replace(folder / "experiment.yaml")


def _made_one_of(experiment: Experiment, state: dict[str, Any]) -> dict[str, Any]:
    """The state of another configuration's checkpoint, with this one's optimizers; what was the best there is not
    here."""
    state["watcher"]["watch"]["best"] = {}
    for optimizer, of in (("generator_optimizer", experiment.generator), ("score_optimizer", experiment.score_network)):
        for group in state["players"][optimizer]["param_groups"]:
            group |= {"lr": of.learning_rate, "betas": of.betas, "weight_decay": of.weight_decay}
    return state | {"experiment": experiment.config_hash, "prompts": digest(training_prompts(experiment))}
