"""A run, whoever runs it: build the players of an Experiment, go round, and keep journal, pictures and checkpoints.

`local.py` calls `train` once in this process, `cluster/train.py` once in each Ray Train worker; all that differs is handed in
(where rewards are computed, how modules are wrapped, how numbers are averaged), so both give the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from diffinstruct import orders
from diffinstruct.checkpoint import CheckpointError, CheckpointStore, Crew, Rows, a_full_disk_said, flush
from diffinstruct.diffusion import Conditions, Schedule, log_normal_t, uniform_t
from diffinstruct.distances import distance
from diffinstruct.embeddings import NULL
from diffinstruct.experiment import Experiment, UserError, did_you_mean
from diffinstruct.guidance import guided
from diffinstruct.handshake import PICTURES
from diffinstruct.jury import (
    EVALUATION_SEED,
    InProcess,
    Jury,
    RewardService,
    Watcher,
    make_rewards,
    pictures_to_meet,
    sample,
)
from diffinstruct.locks import only_writer
from diffinstruct.mirror import mirrored
from diffinstruct.objectives import objective
from diffinstruct.pretrained import OneStepGenerator, Reference, frozen_dtype, load_reference
from diffinstruct.prompts import read_prompts
from diffinstruct.rewards import NotFinite
from diffinstruct.roles import Roles, make_roles, whole
from diffinstruct.sharding import gathered, rows, sharded, spread
from diffinstruct.step import Draws, Metrics, NonFinite, Players, Settings, alternating_round, use_deterministic_kernels
from diffinstruct.tracking import Parent, Tracker
from diffinstruct.watch import BLIND, Alarm, Watch

GRID_NOISES = 3
GO_ON, LOWER_SCALE, STOP = 2, 1, 0
"""What a look leads to, for all workers: the least of them counts."""
STATE = 3
"""Of what a checkpoint of a run holds: goes up with each change that makes older ones unreadable."""
PATIENCE = 60.0
"""Seconds that a run waits for a process that holds its folder: a worker that was lost may take a while to be gone."""
SKIPS = 5
"""Steps in a row that are left out because something in them was not finite, until the run goes back."""
SPIKE = 10.0
"""A gradient's norm is a spike at so many times its mean over the rows of metrics before."""


@dataclass(frozen=True)
class Worker:
    """One training process among equals, and what it does differently from a lonely one."""

    rank: int = 0
    world: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module  # data parallelism
    mesh: DeviceMesh | None = None  # over which all networks are sharded, where they are
    average: Callable[[Metrics], Metrics] = lambda metrics: metrics  # over the workers
    least: Callable[[int], int] = lambda value: value  # of all workers
    gather: Callable[[Any], list[Any]] = lambda value: [value]  # of all workers, by rank
    leaving: Callable[[], bool] = lambda: False  # whether a worker's machine is about to go; the same for all workers
    where: str = ""  # the cluster's address, for the first and the last line


@dataclass(frozen=True)
class Result:
    """What a finished run leaves: its folder, the exported pipeline in it, the last metrics, the tracker's address."""

    folder: Path
    export: Path
    metrics: Metrics
    tracking: str


def train(
    experiment: Experiment,
    folder: Path,
    actors: RewardService | None = None,
    worker: Worker = Worker(),
    parent: Parent | None = None,
) -> Result | None:
    """Run or resume `experiment` in `folder`; the result on rank 0, None elsewhere. Without `actors` rewards are computed here.

    A step with something in it that is not finite is left out and counted. After SKIPS of them in a row the run goes back to
    its last checkpoint and on from there with other prompts and noise, once; if that comes to the same it raises NonFinite.

    Raises NonFinite, RewardError or, where the disk is full, CheckpointError with the run resumable: weights on disk are from
    the last checkpoint; UserError where another process is at work on the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with a_full_disk_said(folder):
        if worker.rank:
            return _train(experiment, folder, actors, worker, parent)
        with only_writer(folder, PATIENCE), mirrored(experiment.mirror, folder):
            return _train(experiment, folder, actors, worker, parent)


def _train(
    experiment: Experiment, folder: Path, actors: RewardService | None, worker: Worker, parent: Parent | None
) -> Result | None:
    if experiment.deterministic:
        use_deterministic_kernels()
    device = resolve_device(experiment.device)
    reference = open_reference(experiment, device)
    mesh = worker.mesh
    roles = make_roles(experiment, reference, partial(sharded, mesh=mesh, precision=experiment.precision) if mesh else whole)
    players = make_players(experiment, roles, reference.null_conditions(), worker.wrap)
    settings = make_settings(experiment, reference.schedule)
    prompts = training_prompts(experiment)
    of_prompts = digest(prompts)
    jury = Jury(experiment, actors, lambda: InProcess(make_rewards(experiment.rewards.names, reference.decode, device)))
    watcher = Watcher(experiment, reference, prompts, jury)
    grid = Grid(experiment, reference, players.ema)
    crew = Crew(worker.rank, worker.world, worker.least) if mesh else Crew()
    store = CheckpointStore(folder / "checkpoints", crew=crew)
    # before anything is written: a run of another configuration stays as it is
    done, state = newest(store, experiment, worker, of_prompts)
    if state is None:
        jury.call()
    output = Output(experiment, folder, reference, parent, worker.where, done) if worker.rank == 0 else None
    window = Window(experiment)
    skips, stopped = Skips(), False
    kept: dict[str, Any] = {"players": players, "jury": jury, "watcher": watcher, "window": window, "skips": skips}

    def take(state: dict[str, Any]) -> None:
        nonlocal settings, stopped
        state = spread(state, mesh) if mesh else state
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
            own = {"format": STATE, "experiment": experiment.derived_id, "prompts": of_prompts, "stopped": stopped}
            own |= {"reward_scale": settings.reward_scale, "metrics": output.last if output else {}}
            state = own | rows({name: part.state_dict() for name, part in kept.items()})
            store.start(at, state, watcher.watch.best.get("step"))

    if state:
        take(state)
    per_worker = experiment.global_batch_size // worker.world
    own_rows = slice(worker.rank * per_worker, (worker.rank + 1) * per_worker)
    at, leaving = done, False
    try:
        if not stopped and done < experiment.steps:
            if output and done == 0 and roles.start_error is not None:
                output.said(0, "start", f"generator.start_rank: {roles.start_error:.1%} of the start's difference is lost")
            meet(reference, players, prompts, jury, grid, done, output)
        while not stopped and at < experiment.steps:
            step, at = at, at + 1
            looks = experiment.watch.every > 0 and step % experiment.watch.every == 0
            latents = watcher.pictures(players.ema) if looks else None
            regular = step > 0 and step % experiment.logging.checkpoint_every == 0 and not skips.in_a_row
            look = watcher.look(step, latents, regular) if output and latents is not None else None
            seed = skips.seed(experiment.seed)
            draws = Draws(seed, step, experiment.global_batch_size, reference.latent_shape, own_rows, device)
            chosen = [prompts[i] for i in draws.prompts(len(prompts))]
            c = reference.encode_prompts(chosen)
            try:
                metrics = alternating_round(players, settings, reference.schedule, draws, chosen, c, jury.send)
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
                watcher.note(metrics.get("divergence"))
            if looks:
                verdict = output.looked(step, look, watcher.watch) if output and look else GO_ON
                settings, stopped = heed(worker.least(verdict), settings, at, output)
            if (place := jury.settle(worker.least)) and output:
                output.said(at, "rewards", place)
            if not leaving and (leaving := worker.leaving()) and output:
                output.said(at, "preemption", "a machine of this run is about to go: every step is saved from here on")
            order = worker.least(orders.given(folder) if output else orders.NONE)
            stopped = stopped or order == orders.STOP
            last, paused = stopped or at == experiment.steps, order == orders.PAUSE
            if order == orders.STOP and output:
                output.said(at, "stopped", "the run ends here: it was told to stop")
            if last and experiment.watch.every:
                latents = watcher.pictures(players.ema)
                if output:
                    output.looked(at, watcher.look(at, latents, kept=True), watcher.watch)
            if at % experiment.logging.every == 0 or last:
                window.share(worker.average)
                metrics = window.mean() | {"steps/skipped": skips.all}
                if output:
                    output.metrics(at, metrics)
            if at % experiment.logging.grid_every == 0 or last:
                columns = grid.columns(players.ema)
                if output:
                    output.grid(at, columns)
            # What one goes back to should not lie in the middle of what one flees from
            now = last or paused or leaving
            if now or (at % experiment.logging.checkpoint_every == 0 and not skips.in_a_row):
                skips.returned = skips.returned and skips.in_a_row > 0
                save(at)
            store.settle(wait=now)
            if paused and not last:
                raise orders.Paused(f"paused at step {at}, all of it saved in {store.folder}")
    except BaseException as error:
        if not mesh and not isinstance(error, KeyboardInterrupt):  # which is to end at once
            try:
                store.settle(wait=True)
            except CheckpointError as lost:  # the run ends for another reason, which is raised
                print(lost, flush=True)
        if output:
            output.failed(error)
        raise
    average = players.ema
    assert isinstance(average, OneStepGenerator)
    if mesh:
        network = gathered(average.denoiser.network, reference.network(device="meta"))
        average = reference.one_step(network, average.timestep, average.input_scale)
    return output.finished(at, average, watcher.watch.best.get("step", at)) if output else None


def meet(
    reference: Reference,
    players: Players,
    prompts: Sequence[str],
    jury: Jury,
    grid: Grid,
    done: int,
    output: Output | None,
) -> None:
    """Before the first round from here: the handshake with the rewards on the generator's pictures, also in a resumed run,
    whose rewards somebody may have mended meanwhile; of a new run the start's pictures, and the rewards' scales."""
    if done == 0:
        columns = grid.columns(players.ema)
        if output:
            output.grid(0, columns)
    few, noise = pictures_to_meet(reference, prompts, PICTURES, EVALUATION_SEED + 2)
    latents = sample(jury.experiment, reference, players.ema, noise, few)
    if output:
        for report in jury.meet(latents, few):
            output.said(done, f"reward.{report.name}", str(report))
        if output.experiment.watch.every and not output.experiment.rewards.held_out:
            output.said(done, "watch", BLIND)
    if done == 0:
        jury.measure_scales(latents, few)


def heed(verdict: int, settings: Settings, step: int, output: Output | None) -> tuple[Settings, bool]:
    """What a look leads to, on all workers alike: the settings from here on, and whether the run ends."""
    if verdict == LOWER_SCALE:
        settings = replace(settings, reward_scale=settings.reward_scale / 2)
    if output and verdict != GO_ON:
        halved = f"reward_scale is {settings.reward_scale:g} from here on"
        what = halved if verdict == LOWER_SCALE else "the run ends here, as if it were finished"
        output.said(step, "on_hacking", f"watch.on_hacking: {what}")
    return settings, verdict == STOP


# --------------------------------------------------------------------------------------------------- building
def resolve_device(name: str) -> torch.device:
    """ "auto" is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda' asked for, but torch sees no GPU here")
    return torch.device(name)


def open_reference(experiment: Experiment, device: torch.device) -> Reference:
    return load_reference(
        experiment.reference.model,
        device=device,
        activation_checkpointing=experiment.activation_checkpointing,
        decoder_dtype=frozen_dtype(experiment.precision),
        embeddings=Path(experiment.prompts.embeddings) if experiment.prompts.embeddings else None,
    )


def missing_embeddings(experiment: Experiment) -> list[str | None]:
    """The prompts of a run (and the null prompt) that its folder of embeddings lacks; none where it has no such folder."""
    if experiment.prompts.embeddings is None:
        return []
    prompts: list[str | None] = [NULL]
    for source in (experiment.prompts.train, experiment.prompts.grid):
        prompts += read_prompts(source, column=experiment.prompts.column)["prompt"].tolist()
    stored = open_reference(experiment, torch.device("cpu")).embeddings
    assert stored is not None
    return stored.missing(prompts)


def store_embeddings(experiment: Experiment, prompts: Sequence[str | None]) -> None:
    """Make them, with text encoders that go with this call."""
    open_reference(experiment, resolve_device(experiment.device)).store_embeddings(prompts)


def make_players(
    experiment: Experiment, roles: Roles, null: Conditions, wrap: Callable[[nn.Module], nn.Module]
) -> Players:
    """The roles with their optimizers, the reference with its guidance against the null prompt's conditions."""

    def adam(module: nn.Module, of: Any) -> torch.optim.Optimizer:
        options = {"lr": of.learning_rate, "betas": of.betas, "weight_decay": of.weight_decay}
        weights = list(module.parameters())
        return torch.optim.AdamW(weights, fused=weights[0].is_cuda or None, **options)  # one kernel, and no copies on the way

    return Players(
        generator=wrap(roles.generator),
        score_network=wrap(roles.score_network),
        reference=guided(roles.reference, null, experiment.reference.cfg_scale, experiment.reference.guidance),
        ema=roles.average,
        generator_optimizer=adam(roles.generator, experiment.generator),
        score_optimizer=adam(roles.score_network, experiment.score_network),
    )


def make_settings(experiment: Experiment, schedule: Schedule) -> Settings:
    """The configuration as the step wants it. Raises UserError for what does not fit the schedule or cannot be imported."""
    e = experiment.objective
    if e.t_max > len(schedule.alphas):
        raise UserError(f"objective.t_max: got {e.t_max}, the reference's schedule has {len(schedule.alphas)} steps")
    try:
        chosen = distance(e.distance, e.huber_c)
    except (Exception, SystemExit) as error:  # whatever somebody's module raises
        raise UserError(f"objective.distance: {e.distance!r} is no pair (d, d'): {' '.join(str(error).split())}") from None
    law_of_t = (
        uniform_t(e.t_min, e.t_max)
        if e.t_law == "uniform"
        else log_normal_t(schedule, e.t_log_mean, e.t_log_std, e.t_min, e.t_max)
    )
    return Settings(
        objective=objective(e.name, schedule=schedule, space=e.space, distance=chosen, sid_alpha=e.sid_alpha),
        regularization_weight=e.regularization_weight,
        reward_scale=e.reward_scale,
        score_updates=experiment.score_network.updates_per_step,
        reuse_sample=experiment.score_network.reuse_sample,
        score_space=experiment.score_network.space,
        law_of_t=law_of_t,
        generator_max_grad_norm=experiment.generator.max_grad_norm,
        score_max_grad_norm=experiment.score_network.max_grad_norm,
        ema_decay=experiment.generator.ema_decay,
        precision=experiment.precision,
        micro_batch_size=experiment.micro_batch_size,
    )


def training_prompts(experiment: Experiment) -> list[str]:
    found: list[str] = read_prompts(experiment.prompts.train, column=experiment.prompts.column)["prompt"].tolist()
    return found


def digest(prompts: Sequence[str]) -> str:
    """Of prompts in their order. The configuration has the file's name alone."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(prompt.encode(errors="surrogatepass") + b"\0")  # which is in none
    return found.hexdigest()


def newest(
    store: CheckpointStore, experiment: Experiment, worker: Worker, of_prompts: str
) -> tuple[int, dict[str, Any] | None]:
    """The rounds already done and the run's state, of the newest good checkpoint; (0, None) where there is none. Raises
    CheckpointError where workers see different ones, since their weights would differ from then on, and where there are some
    and none can be read: a disk that does not answer for a moment is no reason to begin anew over them; UserError for one of
    another configuration or other prompts."""
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
        raise UserError(f"prompts.train: the prompts of {source} have changed since step {step} of {store.folder}; {how}")
    return step, state


def _check_state(folder: Path, experiment: Experiment, written: object, of: object) -> None:
    """Raises UserError for a checkpoint that another configuration has written, or another version of this."""
    if written != STATE:
        raise UserError(f"{folder}: written by another version of diffinstruct (state {written}, this one has {STATE})")
    if of != experiment.derived_id:
        raise UserError(
            f"{folder}: belongs to another configuration ({of}, this one is {experiment.derived_id}); "
            "resume with the run's own experiment.yaml"
        )


def export_checkpoint(experiment: Experiment, folder: Path, which: str, out: Path) -> tuple[int, bool]:
    """Write the averaged generator of a checkpoint of `folder`, a run of `experiment`, as `export` does: of "last", the newest
    that can be read, of "best", by the watch, or of a step. Its step, and whether it is the best.

    Raises UserError where there is no such checkpoint, or of another configuration; CheckpointError for one that is damaged.
    """
    from diffinstruct.export import export

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
    average.load_state_dict({name: value.own if isinstance(value, Rows) else value for name, value in weights.items()})
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
    """Make `folder` a run of `experiment` that goes on from the newest checkpoint of another run, whose configuration may have
    other values for all that is not its players' shapes; the step that it goes on from. Raises CheckpointError where there is
    none."""
    found = CheckpointStore(donor / "checkpoints").latest()
    if found is None:
        raise CheckpointError(f"{donor}: no checkpoint whose weights could be taken over")
    step, state = found
    own = {"reward_scale": experiment.objective.reward_scale, "stopped": False}
    CheckpointStore(folder / "checkpoints").save(step, _made_one_of(experiment, state) | own)
    return step


def change(experiment: Experiment, folder: Path, keys: Collection[str]) -> int | None:
    """Make the newest checkpoint in `folder`, of a run with other values of these keys, one of `experiment`; its step, 0 where
    there is none, and None where it is one already. The reward scale stays what the watch has made of it, unless it is among
    the keys. Raises UserError for fewer steps than are done, CheckpointError where there are checkpoints and none can be read.
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
    if state.get("experiment") == experiment.derived_id and state.get("prompts") == digest(training_prompts(experiment)):
        keep_configuration(experiment, folder)
        return None
    own: dict[str, Any] = {"stopped": False}
    if "objective.reward_scale" in keys:
        own["reward_scale"] = experiment.objective.reward_scale
    if any(key.startswith("prompts.") for key in keys):  # looks are compared picture by picture
        own["watcher"] = {"watch": Watch().state_dict(), "divergences": []}
    if "rewards.micro_batch" in keys:
        own["jury"] = state["jury"] | {"micro_batch": experiment.rewards.micro_batch}
    store.save(step, _made_one_of(experiment, state) | own)
    keep_configuration(experiment, folder)
    return step


def keep_configuration(experiment: Experiment, folder: Path) -> None:
    """Write the run's experiment.yaml, whole or not at all."""
    passing = folder / "experiment.yaml.tmp"
    passing.write_text(experiment.public().to_yaml())
    flush(passing)  # or a power cut leaves an empty one
    passing.replace(folder / "experiment.yaml")


def _made_one_of(experiment: Experiment, state: dict[str, Any]) -> dict[str, Any]:
    """The state of another configuration's checkpoint, with this one's optimizers; what was the best there is not here."""
    state["watcher"]["watch"]["best"] = {}
    for optimizer, of in (("generator_optimizer", experiment.generator), ("score_optimizer", experiment.score_network)):
        for group in state["players"][optimizer]["param_groups"]:
            group |= {"lr": of.learning_rate, "betas": of.betas, "weight_decay": of.weight_decay}
    return state | {"experiment": experiment.derived_id, "prompts": digest(training_prompts(experiment))}


# ----------------------------------------------------------------------------------------------------- output
class Skips:
    """The steps that were left out because something in them was not finite."""

    def __init__(self) -> None:
        self.all = 0
        self.in_a_row = 0
        self.detours = 0  # how often the run has gone back; each time it goes on with other prompts and noise
        self.returned = False  # and has not come to another checkpoint since

    def add(self, error: NonFinite, causes: Sequence[str | None]) -> str:
        """Count one; why, from what all workers have found, by rank."""
        self.all += 1
        self.in_a_row += 1
        found = [(rank, cause) for rank, cause in enumerate(causes) if cause]
        said = [f"worker {rank}: {cause}" if len(causes) > 1 else cause for rank, cause in found]
        return "; ".join(said) or f"the {error.player}'s gradient, with all before it finite"

    def turn_back(self, count: int) -> None:
        """The state is that of an earlier step; what was counted since stays."""
        self.all, self.in_a_row, self.returned = count, 0, True
        self.detours += 1

    def given_up(self, step: int, player: str, why: str) -> NonFinite:
        again = "once more after going back" if self.returned else "with no checkpoint to go back to"
        return NonFinite(step, player, f"{why}; {self.in_a_row} steps in a row, {again}")

    def seed(self, seed: int) -> int:
        """What a run with this seed draws from."""
        return seed + 100_003 * self.detours

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Window:
    """Metrics since the last row of the journal, and the pace."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.rows: list[Metrics] = []
        self.shared = 0  # of them
        self.usual: Metrics = {}  # gradient norms, means of the window before
        self.since = time.perf_counter()

    def add(self, metrics: Metrics) -> list[str]:
        """A round's; what is unusual in it."""
        held_out = {f"reward/{name}": f"held_out/{name}" for name in self.experiment.rewards.held_out}
        self.rows.append({held_out.get(key, key): value for key, value in metrics.items()})
        return [
            f"{key} is {metrics[key]:.3g}, {metrics[key] / usual:.0f} times what is usual"
            for key, usual in self.usual.items()
            if metrics[key] > SPIKE * usual > 0
        ]

    def mean(self) -> Metrics:
        """The mean of each metric and images per second over the window, which starts anew."""
        now, rows = time.perf_counter(), self.rows
        self.rows, self.shared, began, self.since = [], 0, self.since, now
        if not rows:  # all of its steps were left out
            return {}
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        norms = [f"gradient_norm/{player}" for player in ("generator", "score_network")]
        self.usual = {key: mean[key] for key in norms if key in mean}
        mean |= {f"{key}_max": max(row[key] for row in rows) for key in self.usual}
        if mean["time/reward"]:
            mean["time/reward_hidden_fraction"] = 1 - min(1.0, mean["time/reward_exposed"] / mean["time/reward"])
        mean["throughput/images_per_second"] = len(rows) * self.experiment.global_batch_size / (now - began)
        return mean

    def share(self, average: Callable[[Metrics], Metrics]) -> None:
        """Make the rows those of all workers, so that whoever goes on with them, as whichever worker, has the same means. Each
        row once: a mean of means has other last bits, and a save between two rows of the journal would show."""
        self.rows[self.shared :] = [average(row) for row in self.rows[self.shared :]]
        self.shared = len(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "usual": self.usual}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.usual = list(state["rows"]), dict(state["usual"])
        self.shared = len(self.rows)


class Grid:
    """The pictures that show how a run goes. Rows are prompts; the first column is the starting generator, then the current one
    on the same and on more noise."""

    def __init__(self, experiment: Experiment, reference: Reference, start: nn.Module) -> None:
        table = read_prompts(experiment.prompts.grid, column=experiment.prompts.column)["prompt"].tolist()
        self.experiment, self.reference = experiment, reference
        self.prompts = table[: experiment.logging.grid_prompts]
        noise = torch.Generator().manual_seed(EVALUATION_SEED)
        self.noise = torch.randn(GRID_NOISES, len(self.prompts), *reference.latent_shape, generator=noise)
        self.start = self._latents(start, 0)

    def columns(self, generator: nn.Module) -> list[Tensor]:
        """Latents."""
        return [self.start, *(self._latents(generator, i) for i in range(GRID_NOISES))]

    def _latents(self, generator: nn.Module, noise: int) -> Tensor:
        own = self.noise[noise].to(self.reference.device)
        return sample(self.experiment, self.reference, generator, own, self.prompts)


class Output:
    """What rank 0 shows and keeps: the progress line, the journal, the picture grid, the exported model."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        reference: Reference,
        parent: Parent | None,
        where: str,
        done: int,
    ) -> None:
        self.experiment, self.folder, self.reference = experiment, folder, reference
        self.where = f"  {where}" if where else ""
        keep_configuration(experiment, folder)
        self.tracker = Tracker(
            experiment.tracking.uri,
            experiment.tracking.experiment,
            parent.child if parent else folder.name,
            folder,
            params=experiment.public().to_params(),
            tags={"diffinstruct.experiment_id": experiment.derived_id},
            parent_run_id=parent.run_id if parent else None,
        )
        self.started = time.perf_counter()
        self.first_step: int | None = None
        self.last: Metrics = {}
        at = f"  from step {done}{', its last' * (done == experiment.steps)}" if done else ""
        print(f"run {folder}{at}  tracking {self.tracker.url}{self.where}", flush=True)

    def metrics(self, step: int, metrics: Metrics) -> None:
        self.last = self.last | metrics  # of a window in which all steps were left out there is little
        self.tracker.metrics(step, metrics)
        now = time.perf_counter()
        self.first_step = step if self.first_step is None else self.first_step
        pace = (now - self.started) / max(1, step - self.first_step + self.experiment.logging.every)
        left, speed = pace * (self.experiment.steps - step), "throughput/images_per_second"
        line = (
            f"step {step}/{self.experiment.steps}"
            + "".join(f"  {key} {metrics[key]:.4g}" for key in metrics if key.startswith(("reward/", "held_out/")))
            + (f"  divergence {metrics['divergence']:.4g}" if "divergence" in metrics else "")
            + (f"  {metrics[speed]:.1f} images/s" if speed in metrics else "")
            + (f"  skipped {metrics['steps/skipped']:.0f}" if metrics["steps/skipped"] else "")
            + f"  ETA {int(left // 60)}:{int(left % 60):02d}"
        )
        live = sys.stdout.isatty() and step < self.experiment.steps
        print(f"\r\x1b[K{line}" if sys.stdout.isatty() else line, end="" if live else "\n", flush=True)

    def said(self, step: int, kind: str, text: str) -> None:
        """Something has happened: a line for whoever watches, an event for whoever comes later."""
        print(f"step {step}: {text}", flush=True)
        self.tracker.event(step, kind, text)

    def went_back(self, step: int, lost: int) -> None:
        """After SKIPS steps in a row that were left out."""
        text = f"{SKIPS} steps in a row were not finite: back to the checkpoint of step {step}, on with other prompts and noise"
        print(f"step {lost}: {text}", flush=True)
        self.tracker.back_to(step, lost, text)

    def looked(self, step: int, look: Callable[[], tuple[Metrics, Alarm | None]], watch: Watch) -> int:
        """Keep what a look has seen; what follows from it. Rewards that have no finite score for its pictures see nothing."""
        try:
            figures, alarm = look()
        except NotFinite as error:
            self.said(step, "blind", f"no look: {error}")
            return GO_ON
        self.tracker.metrics(step, figures)
        if watch.best.get("step") == step:
            gained = f"{watch.best['held_out']:.3g} spreads gained by the held-out rewards"
            self.tracker.event(step, "best", f"of the checkpoints so far: {gained}")
        if alarm is None:
            return GO_ON
        self.said(step, "hacking", f"reward hacking: {alarm.line}")
        return {"warn": GO_ON, "lower_scale": LOWER_SCALE, "stop": STOP}[self.experiment.watch.on_hacking]

    @torch.no_grad()
    def grid(self, step: int, columns: Sequence[Tensor]) -> None:
        """Show a Grid's columns."""
        self.tracker.image("grid", step, tile([self._decoded(latents) for latents in columns]))

    def _decoded(self, latents: Tensor) -> Tensor:
        """One at a time: a decoder takes more for a grid than a round does for its micro-batch."""
        return torch.cat([self.reference.decode(latent).cpu() for latent in latents.split(1)])

    def finished(self, step: int, average: OneStepGenerator, best: int) -> Result:
        """Export the averaged generator as a stock pipeline, hand model and last metrics to the tracker."""
        from diffinstruct.export import export

        folder = export(self.experiment.reference.model, average, self.folder / "export")
        table = self.folder / "metrics.json"
        table.write_text(json.dumps({"step": step, **self.last}, indent=2) + "\n")
        self.tracker.artifact(folder)
        self.tracker.artifact(table)
        self.tracker.finish("FINISHED")
        if best < step:
            how = f"diffinstruct export {shlex.quote(str(self.folder))} --step best -o FOLDER"
            print(f"the checkpoint that held-out rewards like best is that of step {best}: {how}")
        print(f"done: run {self.folder}  model {folder}  tracking {self.tracker.url}{self.where}", flush=True)
        return Result(self.folder, folder, self.last, self.tracker.url)

    def failed(self, error: BaseException) -> None:
        status = "KILLED" if isinstance(error, KeyboardInterrupt | orders.Paused) else "FAILED"
        self.tracker.finish(status, f"{type(error).__name__}: {error}", hurry=isinstance(error, KeyboardInterrupt))


def tile(columns: Sequence[Tensor]) -> Any:
    """Columns of pictures, each [rows, 3, H, W] in [0, 1] -> one uint8 array [rows * H, columns * W, 3]."""
    rows = torch.cat([torch.cat(list(column), dim=1) for column in columns], dim=2)
    return (rows.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
