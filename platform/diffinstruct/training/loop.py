"""A run, whoever runs it: build the players of an Experiment, go round, and keep journal, pictures and checkpoints.

`local.py` calls `train` once in this process, `cluster/train.py` once in each Ray Train worker; all that differs is
handed in (where rewards are computed, how modules are wrapped, how numbers are averaged), so both give the same
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffinstruct.config.experiment import Experiment
from diffinstruct.method.noise import NoiseStreams
from diffinstruct.method.nonfinite import NonFinite
from diffinstruct.method.precision import use_deterministic_kernels
from diffinstruct.method.step import TrainState, alternating_round
from diffinstruct.models.denoiser import OneStepGenerator
from diffinstruct.models.pipeline import Reference
from diffinstruct.models.roles import make_roles, unsharded
from diffinstruct.models.sampling import EVALUATION_SEED, probe_inputs, sample_latents
from diffinstruct.models.sharding import gathered, sharded, to_dtensors, to_shards
from diffinstruct.reward_service.client import LocalRewards, RewardBackend, RewardClient, make_rewards
from diffinstruct.reward_service.monitor import BLIND, OveroptimizationMonitor
from diffinstruct.reward_service.validation import PICTURES
from diffinstruct.run_folder import signals
from diffinstruct.run_folder.checkpoint import CheckpointError, CheckpointStore, Ranks, full_disk_as_error
from diffinstruct.run_folder.locks import only_writer
from diffinstruct.run_folder.mirror import mirrored
from diffinstruct.tracking.journal import Parent
from diffinstruct.training.build import (
    digest,
    make_step_config,
    make_train_state,
    open_reference,
    resolve_device,
    training_prompts,
)
from diffinstruct.training.guards import GO_ON, SKIPS, Skips, heed
from diffinstruct.training.resume import STATE, newest
from diffinstruct.training.run_log import Grid, Output, Result, Window
from diffinstruct.training.worker import Worker

PATIENCE = 60.0
"""Seconds that a run waits for a process that holds its folder: a worker that was lost may take a while to be gone."""


def train(
    experiment: Experiment,
    folder: Path,
    actors: RewardBackend | None = None,
    worker: Worker = Worker(),  # noqa: B008
    parent: Parent | None = None,
) -> Result | None:
    """Run or resume `experiment` in `folder`; the result on rank 0, None elsewhere. Without `actors` rewards are
    computed here.

    A step with something in it that is not finite is left out and counted. After SKIPS of them in a row the run goes
    back to its last checkpoint and on from there with other prompts and noise, once; if that comes to the same it
    raises NonFinite.

    Raises NonFinite, RewardError or, where the disk is full, CheckpointError with the run resumable: weights on disk
    are from the last checkpoint; UserError where another process is at work on the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with full_disk_as_error(folder):
        if worker.rank:
            return _train(experiment, folder, actors, worker, parent)
        with only_writer(folder, PATIENCE), mirrored(experiment.mirror, folder):
            return _train(experiment, folder, actors, worker, parent)


def _train(
    experiment: Experiment, folder: Path, actors: RewardBackend | None, worker: Worker, parent: Parent | None
) -> Result | None:
    if experiment.deterministic:
        use_deterministic_kernels()
    device = resolve_device(experiment.device)
    reference = open_reference(experiment, device)
    mesh = worker.mesh
    roles = make_roles(
        experiment, reference, partial(sharded, mesh=mesh, precision=experiment.precision) if mesh else unsharded
    )
    train_state = make_train_state(experiment, roles, reference.null_conditions(), worker.wrap)
    settings = make_step_config(experiment, reference.schedule)
    prompts = training_prompts(experiment)
    of_prompts = digest(prompts)
    jury = RewardClient(
        experiment, actors, lambda: LocalRewards(make_rewards(experiment.rewards.names, reference.decode, device))
    )
    watcher = OveroptimizationMonitor(experiment, reference, prompts, jury)
    grid = Grid(experiment, reference, train_state.ema)
    crew = Ranks(worker.rank, worker.world, worker.least) if mesh else Ranks()
    store = CheckpointStore(folder / "checkpoints", crew=crew)
    # before anything is written: a run of another configuration stays as it is
    done, state = newest(store, experiment, worker, of_prompts)
    if state is None:
        jury.call()
    output = Output(experiment, folder, reference, parent, worker.where, done) if worker.rank == 0 else None
    window = Window(experiment)
    skips, stopped = Skips(), False
    kept: dict[str, Any] = {"players": train_state, "jury": jury, "watcher": watcher, "window": window, "skips": skips}

    def take(state: dict[str, Any]) -> None:
        nonlocal settings, stopped
        state = to_dtensors(state, mesh) if mesh else state
        try:
            for name, part in kept.items():
                part.load_state_dict(state[name])
            settings, stopped = replace(settings, reward_scale=state["reward_scale"]), state["stopped"]
            if output:
                output.last = state["metrics"]
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())  # torch says it in many lines
            raise CheckpointError(f"{store.folder}: the run cannot go on from its newest checkpoint ({why})") from error

    def save(at: int) -> None:
        jury.micro_batch = worker.least(jury.micro_batch)
        window.share(worker.average)
        if output or mesh:
            own = {"format": STATE, "experiment": experiment.config_hash, "prompts": of_prompts, "stopped": stopped}
            own |= {"reward_scale": settings.reward_scale, "metrics": output.last if output else {}}
            state = own | to_shards({name: part.state_dict() for name, part in kept.items()})
            store.start(at, state, watcher.watch.best.get("step"))

    if state:
        take(state)
    per_worker = experiment.global_batch_size // worker.world
    own_rows = slice(worker.rank * per_worker, (worker.rank + 1) * per_worker)
    at, leaving = done, False
    try:
        if not stopped and done < experiment.steps:
            if output and done == 0 and roles.start_error is not None:
                output.said(
                    0, "start", f"generator.init_rank: {roles.start_error:.1%} of the start's difference is lost"
                )
            validate_rewards(reference, train_state, prompts, jury, grid, done, output)
        while not stopped and at < experiment.steps:
            step, at = at, at + 1
            looks = experiment.overoptimization.every > 0 and step % experiment.overoptimization.every == 0
            latents = watcher.pictures(train_state.ema) if looks else None
            regular = step > 0 and step % experiment.logging.checkpoint_every == 0 and not skips.in_a_row
            look = watcher.look(step, latents, regular) if output and latents is not None else None
            seed = skips.seed(experiment.seed)
            draws = NoiseStreams(seed, step, experiment.global_batch_size, reference.latent_shape, own_rows, device)
            chosen = [prompts[i] for i in draws.prompts(len(prompts))]
            c = reference.encode_prompts(chosen)
            try:
                metrics = alternating_round(train_state, settings, reference.schedule, draws, chosen, c, jury.send)
            except NonFinite as error:
                why = skips.add(error, worker.gather(error.cause))
                if output:
                    output.said(at, "skipped", f"left out, {skips.in_a_row} in a row: {why}")
                if skips.in_a_row == min(SKIPS, experiment.steps):
                    found = (0, None) if skips.returned else newest(store, experiment, worker, of_prompts)
                    if found[1] is None:
                        raise skips.given_up(at, error.player, why) from None
                    lost, at, count = at, found[0], skips.all
                    take(found[1])
                    skips.turn_back(count)
                    if output:
                        output.went_back(at, lost)
                    save(at)  # whoever goes on from there goes the other way, too
                    continue
            else:
                skips.in_a_row = 0
                for spike in window.add(metrics):
                    if output:
                        output.said(at, "spike", spike)
                watcher.note(metrics.get("x0_gap"))
            if looks:
                verdict = output.looked(step, look, watcher.watch) if output and look else GO_ON
                settings, stopped = heed(worker.least(verdict), settings, at, output)
            if (place := jury.settle(worker.least)) and output:
                output.said(at, "rewards", place)
            if not leaving and (leaving := worker.leaving()) and output:
                output.said(at, "preemption", "a machine of this run is about to go: every step is saved from here on")
            order = worker.least(signals.requested(folder) if output else signals.NONE)
            stopped = stopped or order == signals.STOP
            last, paused = stopped or at == experiment.steps, order == signals.PAUSE
            if order == signals.STOP and output:
                output.said(at, "stopped", "the run ends here: it was told to stop")
            if last and experiment.overoptimization.every:
                latents = watcher.pictures(train_state.ema)
                if output:
                    output.looked(at, watcher.look(at, latents, kept=True), watcher.watch)
            if at % experiment.logging.every == 0 or last:
                window.share(worker.average)
                metrics = window.mean() | {"steps/skipped": skips.all}
                if output:
                    output.metrics(at, metrics)
            if at % experiment.logging.grid_every == 0 or last:
                columns = grid.columns(train_state.ema)
                if output:
                    output.grid(at, columns)
            # What one goes back to should not lie in the middle of what one flees from
            now = last or paused or leaving
            if now or (at % experiment.logging.checkpoint_every == 0 and not skips.in_a_row):
                skips.returned = skips.returned and skips.in_a_row > 0
                save(at)
            store.settle(wait=now)
            if paused and not last:
                raise signals.Paused(f"paused at step {at}, all of it saved in {store.folder}")
    except BaseException as error:
        if not mesh and not isinstance(error, KeyboardInterrupt):  # which is to end at once
            try:
                store.settle(wait=True)
            except CheckpointError as lost:  # the run ends for another reason, which is raised
                print(lost, flush=True)
        if output:
            output.failed(error)
        raise
    average = train_state.ema
    assert isinstance(average, OneStepGenerator)
    if mesh:
        network = gathered(average.denoiser.network, reference.network(device="meta"))
        average = reference.one_step(network, average.timestep, average.input_scale)
    return output.finished(at, average, watcher.watch.best.get("step", at)) if output else None


def validate_rewards(
    reference: Reference,
    train_state: TrainState,
    prompts: Sequence[str],
    jury: RewardClient,
    grid: Grid,
    done: int,
    output: Output | None,
) -> None:
    """Before the first round from here: the handshake with the rewards on the generator's pictures, also in a resumed
    run, whose rewards somebody may have mended meanwhile; of a new run the start's pictures, and the rewards'
    scales."""
    if done == 0:
        columns = grid.columns(train_state.ema)
        if output:
            output.grid(0, columns)
    few, noise = probe_inputs(reference, prompts, PICTURES, EVALUATION_SEED + 2)
    latents = sample_latents(jury.experiment, reference, train_state.ema, noise, few)
    if output:
        for report in jury.validate(latents, few):
            output.said(done, f"reward.{report.name}", str(report))
        if output.experiment.overoptimization.every and not output.experiment.rewards.held_out:
            output.said(done, "overoptimization.blind", BLIND)
    if done == 0:
        jury.measure_scales(latents, few)
