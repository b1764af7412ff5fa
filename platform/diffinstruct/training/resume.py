"""Going on with a run: its newest checkpoint, other values for some keys, another run's weights."""

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.prompts import read_prompt_set
from diffinstruct.errors import UserError, did_you_mean
from diffinstruct.method.precision import DTYPES
from diffinstruct.models.roles import trained_generator
from diffinstruct.ranks import Ranks
from diffinstruct.run_folder.checkpoint import CheckpointError, CheckpointStore, flush
from diffinstruct.run_folder.state_tree import TensorShard
from diffinstruct.training.build import open_reference
from diffinstruct.training.loop_state import BEST_PATH, EMA_PATH, STATE_OF_0_1, Identity, check_version, moved


def identity_of(experiment: Experiment) -> Identity:
    """The identity of a run of `experiment` with its prompts as they are now."""
    prompts = experiment.prompts
    return Identity(experiment.config_hash, read_prompt_set(prompts.train, prompts.column).digest)


def newest(store: CheckpointStore, ranks: Ranks, identity: Identity, prompts: str) -> tuple[int, dict[str, Any]] | None:
    """The step and the state of the newest good checkpoint, of a run of this identity, whose prompts come from
    `prompts`; None where there is none. A collective call.

    Raises CheckpointError where ranks see different ones, since their weights would differ from then on, and where
    there are some and none can be read: a disk that does not answer for a moment is no reason to begin anew over them.
    Raises UserError for a checkpoint of another configuration or other prompts.
    """
    store.finish_save(wait=True)
    ranks.min(0)  # now all ranks see what the first one was writing
    found = store.latest()
    step = found[0] if found else 0
    if (first := ranks.min(step)) != -ranks.min(-step):
        raise CheckpointError(f"{store.folder}: worker {ranks.rank} sees the checkpoint of step {step}, another {first}")
    if found is None:
        if store.steps():
            raise CheckpointError(f"{store.folder}: no checkpoint in it can be read; without it the run begins anew")
        return None
    check_version(store.folder, found[1].get("format"))
    saved = Identity.of(found[1])
    _check_configuration(store.folder, identity.experiment, saved.experiment)
    if saved.prompts != identity.prompts:
        remedy = "with those that it was begun with the run goes on, with these under --resume RUN --allow prompts.train"
        raise UserError(f"prompts.train: the prompts of {prompts} have changed since step {step} of {store.folder}; {remedy}")
    return found


def _check_configuration(folder: Path, config_hash: str, saved: object) -> None:
    """Raises UserError for a checkpoint that another configuration has written."""
    if saved != config_hash:
        raise UserError(
            f"{folder}: belongs to another configuration ({saved}, this one is {config_hash}); "
            "resume with the run's own experiment.yaml"
        )


def export_checkpoint(experiment: Experiment, folder: Path, which: str, out: Path) -> tuple[int, bool]:
    """Write the generator's EMA of a checkpoint of `folder`, a run of `experiment`, as `export` does: of "last", the
    newest that can be read, of "best", by the monitor, or of a step. Returns its step, and whether it is the best.

    Checkpoints of version 0.1 are read, too. Raises UserError where there is no such checkpoint, or of another
    configuration; CheckpointError for one that is damaged.
    """
    from diffinstruct.models.export import export

    store = CheckpointStore(folder / "checkpoints")
    if not (steps := store.steps()):
        raise UserError(f"{folder}: no checkpoint in it yet")
    best = _best_step(store)
    named = {str(step): [step] for step in steps} | {"last": steps} | ({} if best is None else {"best": [best]})
    if which not in named:
        known = f"; there are {', '.join(named)}" + ", and the monitor knows of no best one" * (best is None)
        raise UserError(f"--step: no checkpoint {which!r} in {folder}{did_you_mean(which, named) or known}")
    for step in named[which]:
        try:
            weights = _ema_weights(store, step, experiment.config_hash)
            break
        except CheckpointError as error:
            if step == named[which][-1]:
                raise
            print(error, file=sys.stderr)
    ema = trained_generator(experiment, open_reference(experiment, torch.device("cpu")), weights)
    export(experiment.reference.model, ema, out, DTYPES[experiment.export.dtype])
    return step, step == best


def _ema_weights(store: CheckpointStore, step: int, config_hash: str) -> dict[str, Any]:
    """The weights of the generator's EMA in a checkpoint, and no other tensor of it."""
    version = store.read_part(step, "format")
    if version != STATE_OF_0_1:  # whose keys had other names, so that its configuration has another hash
        check_version(store.folder, version)
        _check_configuration(store.folder, config_hash, store.read_part(step, "experiment"))
    weights = store.read_part(step, *EMA_PATH[version])
    return {name: value.own if isinstance(value, TensorShard) else value for name, value in weights.items()}


def _best_step(store: CheckpointStore) -> int | None:
    """The step of the best checkpoint, by the newest one that can be read."""
    for step in store.steps():
        try:
            version = store.read_part(step, "format")
            path = next((path for known, path in BEST_PATH.items() if known == version), None)
            best: int | None = store.read_part(step, *path).get("step") if path else None
            return best
        except CheckpointError:
            continue
    return None


def take_over(experiment: Experiment, folder: Path, donor: Path) -> int:
    """Make `folder` a run of `experiment` that goes on from the newest checkpoint of another run, whose configuration
    may have other values for all but the networks' shapes; returns its step. Raises CheckpointError where there is
    none."""

    def of_this_run(_: int, state: dict[str, Any]) -> dict[str, Any]:
        check_version(donor / "checkpoints", state.get("format"))
        return moved(state, identity_of(experiment), experiment, {"objective.reward_scale"})

    step = CheckpointStore(folder / "checkpoints").derive(CheckpointStore(donor / "checkpoints"), of_this_run)
    if step is None:
        raise CheckpointError(f"{donor}: no checkpoint whose weights could be taken over")
    return step


def change(experiment: Experiment, folder: Path, keys: Collection[str]) -> int | None:
    """Make the newest checkpoint in `folder`, of a run with other values of these keys, one of `experiment`. Returns
    its step, 0 where there is none, and None where it is one already.

    Raises UserError for fewer steps than are done, CheckpointError where there are checkpoints and none can be read.
    """
    store = CheckpointStore(folder / "checkpoints", keep=1)  # older ones stay the other configuration's
    changed: int | None = 0

    def with_other_values(step: int, state: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal changed
        check_version(store.folder, state.get("format"))
        if step > experiment.steps:
            raise UserError(f"steps: should be at least the {step} that are done, got {experiment.steps}")
        identity = identity_of(experiment)
        changed = None if Identity.of(state) == identity else step
        return None if changed is None else moved(state, identity, experiment, keys)

    if store.derive(store, with_other_values) is None and store.steps():
        raise CheckpointError(f"{store.folder}: no checkpoint in it can be read; nothing is changed")
    keep_configuration(experiment, folder)
    return changed


def keep_configuration(experiment: Experiment, folder: Path) -> None:
    """Write the run's experiment.yaml, whole or not at all."""
    passing = folder / "experiment.yaml.tmp"
    passing.write_text(experiment.without_secrets().to_yaml(), encoding="utf-8")
    flush(passing)  # or a power cut leaves an empty one
    passing.replace(folder / "experiment.yaml")
