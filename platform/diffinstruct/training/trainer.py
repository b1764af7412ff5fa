"""One rank's part of a run: all that it is built of, and what the loop does with it, one method each.

Every rank calls the same methods in the same order, since many of them make collective calls. What only rank 0 does is
left to its run log, and to the other ranks' silent one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.prompts import read_prompt_set
from diffinstruct.method.diffusion import Conditions
from diffinstruct.method.noise import NoiseStreams
from diffinstruct.method.nonfinite import NonFiniteGradient
from diffinstruct.method.precision import use_deterministic_kernels, use_precision
from diffinstruct.method.rewards import NonFiniteScore, Send
from diffinstruct.method.step import Metrics
from diffinstruct.models.denoiser import OneStepGenerator
from diffinstruct.models.roles import make_roles, unsharded
from diffinstruct.models.sampling import EVALUATION_SEED, LatentSampler, probe_inputs
from diffinstruct.models.sharding import gathered, shard_ranks, sharded
from diffinstruct.ranks import SINGLE_PROCESS
from diffinstruct.reward_service.client import LocalRewards, RewardBackend, RewardClient, make_rewards
from diffinstruct.reward_service.monitor import NO_HELD_OUT, OveroptimizationMonitor, ProbeResult
from diffinstruct.reward_service.reward_validation import PICTURES, pictures_for
from diffinstruct.run_folder import signals
from diffinstruct.run_folder.checkpoint import CheckpointError, CheckpointStore
from diffinstruct.run_folder.signals import Signal
from diffinstruct.tracking.journal import Parent
from diffinstruct.tracking.records import read_json, replace_json
from diffinstruct.training.build import (
    check_reference,
    make_step_config,
    make_train_state,
    open_reference,
    prompts_remark,
    resolve_device,
    rounding_remark,
)
from diffinstruct.training.guards import MAX_SKIPS_IN_A_ROW, ON_ALARM, AlarmAction
from diffinstruct.training.loop_state import Identity, LoopState
from diffinstruct.training.metric_window import MetricWindow
from diffinstruct.training.resume import newest
from diffinstruct.training.run_log import Result, RunLog, SampleGrid, SilentRunLog
from diffinstruct.training.worker import Worker

PendingProbe = Callable[[], ProbeResult]  # collects a probe that the rewards score meanwhile
VALIDATED = "validated.json"
"""The file of the run's folder that names the rewards which were validated: {name: digest}."""
PROBE_SKIPPED = "overoptimization.probe_skipped"
"""The journal's event of a probe that the rewards have no finite score for."""
NO_HELD_OUT_EVENT = "overoptimization.no_held_out"
"""The journal's event of a run without held-out rewards."""


class Trainer:
    """One rank's part of a run of an Experiment: its parts, its state, and the verbs of its loop."""

    def __init__(
        self, experiment: Experiment, folder: Path, pool: RewardBackend | None, worker: Worker, parent: Parent | None
    ) -> None:
        use_precision(experiment.precision)
        if experiment.deterministic:
            use_deterministic_kernels()
        self.experiment, self.folder, self.parent = experiment, folder, parent
        self.worker, self.ranks, self.mesh = worker, worker.ranks, worker.mesh
        self.device = resolve_device(experiment.device)
        self.reference = open_reference(experiment, self.device)
        check_reference(experiment, self.reference)
        self.sample = LatentSampler(self.reference, experiment.precision, experiment.rewards.micro_batch_size)
        self.state = self._build_state(pool)
        grid = read_prompt_set(experiment.prompts.grid, experiment.prompts.column)[: experiment.logging.grid_prompts]
        self.grid = SampleGrid(grid, self.sample, self.state.train_state.ema)
        ranks, writes = shard_ranks(self.mesh, self.ranks) if self.mesh else (SINGLE_PROCESS, True)
        self.store = CheckpointStore(folder / "checkpoints", ranks=ranks, writes=writes)
        self.run_log: RunLog | SilentRunLog = SilentRunLog()
        self.preempted = self.pausing = False
        self.next_noise: NoiseStreams | None = None
        self.ahead = ThreadPoolExecutor(1, "next-round")

    def _build_state(self, pool: RewardBackend | None) -> LoopState:
        experiment, reference = self.experiment, self.reference
        materialize = partial(sharded, mesh=self.mesh, precision=experiment.precision) if self.mesh else unsharded
        roles = make_roles(experiment, reference, materialize)
        self.start_error = roles.start_error
        train_state = make_train_state(experiment, roles, reference.null_conditions(), self.worker.wrap)
        step_config = make_step_config(experiment, reference.schedule)
        self.prompts = read_prompt_set(experiment.prompts.train, experiment.prompts.column)
        self.identity = Identity(experiment.config_hash, self.prompts.digest)
        config, held_out = experiment.rewards, experiment.rewards.held_out
        in_process = partial(make_rewards, config.names, reference.decode, self.device)
        rewards = RewardClient(config, experiment.cluster.rewards, pool, lambda: LocalRewards(in_process()))
        monitor = OveroptimizationMonitor(held_out, self.sample, self.prompts, rewards, self.ranks)
        window = MetricWindow(held_out, experiment.global_batch_size)
        return LoopState(train_state, step_config, rewards, monitor, window)

    @property
    def done(self) -> bool:
        return self.state.stopped or self.state.step >= self.experiment.steps

    def _newest(self) -> tuple[int, dict[str, Any]] | None:
        return newest(self.store, self.ranks, self.identity, self.experiment.prompts.train)

    # -------------------------------------------------------------------------------------------- before the rounds
    def restore(self) -> None:
        """Go on from the newest checkpoint, if there is one. Nothing is written before: a run of another configuration
        stays as it is."""
        if found := self._newest():
            self.state.restore(*found, self.mesh, self.store.folder)
        else:
            self.state.rewards.open()
        if self.ranks.first:
            self.run_log = RunLog(self.experiment, self.folder, self.reference, self.parent, self.worker.where, self.state.step)
        self.state.metric_window.since = time.perf_counter()  # the pace counts from here

    def validate_rewards(self) -> None:
        """Validate the rewards on the generator's samples before the first round from here; those that have changed
        since a run broke off in full, others shortly. A new run also shows its start and measures the rewards' scales."""
        state, experiment = self.state, self.experiment
        if self.done:
            return
        if is_new := state.step == 0:
            self._show_start()
        scaled = is_new and experiment.rewards.normalize == "std"  # a standard deviation takes all of the pictures
        count = PICTURES if scaled else pictures_for(experiment.global_batch_size)
        prompts, noise = probe_inputs(self.reference, self.prompts, count, EVALUATION_SEED + 2)
        latents = self.sample(state.train_state.ema, noise, prompts)
        if self.ranks.first:
            self._validate(latents, prompts)
        if experiment.overoptimization.every and not experiment.rewards.held_out:
            self.run_log.event(state.step, NO_HELD_OUT_EVENT, NO_HELD_OUT)
        if is_new:
            state.rewards.measure_scales(latents, prompts)

    def _validate(self, latents: Tensor, prompts: Sequence[str]) -> None:
        known = read_json(self.folder / VALIDATED)
        reports = self.state.rewards.validate(latents, prompts, known.values())
        replace_json(self.folder / VALIDATED, {report.name: report.digest for report in reports if report.digest})
        for report in reports:
            self.run_log.event(self.state.step, f"reward.{report.name}", str(report))

    def _show_start(self) -> None:
        if (lost := self.start_error) is not None:
            text = f"the low-rank start keeps all but {lost:.1%} of its difference from the reference"
            self.run_log.event(0, "start", f"generator.init_rank: {text}")
        if self.ranks.first:  # 100,000 prompts take seconds
            self.run_log.event(0, "prompts", prompts_remark(self.prompts, self.reference))
        if remark := rounding_remark(self.experiment, self.reference):
            self.run_log.event(0, "precision", remark)
        self.run_log.grid(0, self.grid.columns(self.state.train_state.ema))

    # --------------------------------------------------------------------------------------------------- one round
    def start_probe(self) -> PendingProbe | None:
        """Send samples of the generator's EMA to the rewards, every so many rounds; they are scored meanwhile."""
        step, every = self.state.step, self.experiment.overoptimization.every
        if every == 0 or step % every != 0:
            return None
        has_checkpoint = step > 0 and self._checkpoint_due
        return self.state.monitor.probe(step, self.state.train_state.ema, has_checkpoint)

    def draw_batch(self) -> tuple[NoiseStreams, list[str], Conditions]:
        """Draw this rank's part of the round's global batch: noise, prompts and their conditions."""
        batch, rank = self.experiment.global_batch_size, self.ranks.rank
        rows = slice(rank * batch // self.ranks.world, (rank + 1) * batch // self.ranks.world)
        seed = self.state.nonfinite_guard.seed(self.experiment.seed)
        noise = NoiseStreams(seed, self.state.step, self.reference.latent_shape, rows, self.device)
        if self.next_noise and (self.next_noise.seed, self.next_noise.step) == (seed, self.state.step):
            noise = self.next_noise
        prompts = self._chosen(noise)
        conditions = self.reference.encode_prompts(prompts)
        if self.device.type == "cuda":  # where a core has time for it during the round
            self.next_noise = noise.next_round(self.state.step_config.normal_streams, self.ahead)
            self.reference.read_ahead(self._chosen(self.next_noise), self.ahead)
        return noise, prompts, conditions

    def _chosen(self, noise: NoiseStreams) -> list[str]:
        return [self.prompts[i] for i in noise.prompts(len(self.prompts))]

    @property
    def send(self) -> Send | None:
        """Where the round's sample is sent. At reward_scale 0 the rewards score the samples of one round in each row of
        the journal, without a gradient: nothing else would come of decoding them."""
        state = self.state
        if state.step_config.reward_scale:
            return state.rewards.send
        last_in_row = (state.step + 1) % self.experiment.logging.every == 0 or state.step + 1 == self.experiment.steps
        return state.rewards.send_for_scores if last_in_row else None

    def count_done(self, metrics: Metrics) -> None:
        """Count a round whose update was made, and keep its metrics."""
        state = self.state
        state.step += 1
        state.nonfinite_guard.consecutive = 0
        for spike in state.metric_window.add(metrics):
            self.run_log.event(state.step, "spike", spike)
        state.monitor.add_round(metrics)

    def count_skipped(self, error: NonFiniteGradient) -> str:
        """Count a round whose update was left out; returns the reason."""
        state, guard = self.state, self.state.nonfinite_guard
        state.step += 1
        reason = guard.add(error, self.ranks.gather(error.cause))
        self.run_log.event(state.step, "skipped", f"left out, {guard.consecutive} in a row: {reason}")
        return reason

    @property
    def skipped_too_many(self) -> bool:
        return self.state.nonfinite_guard.consecutive == min(MAX_SKIPS_IN_A_ROW, self.experiment.steps)

    def refuse_mostly_skipped(self) -> None:
        """Raises NonFiniteGradient where more of the run's steps were left out than were made: nobody asked for that."""
        step, skipped = self.state.step, self.state.nonfinite_guard.skipped
        if 2 * skipped > step:
            raise NonFiniteGradient(step, "generator", f"in {skipped} of the run's {step} steps, which were left out")

    def roll_back(self, error: NonFiniteGradient, reason: str) -> None:
        """Go on from the last checkpoint with other prompts and noise. Raises NonFiniteGradient the second time."""
        state, guard = self.state, self.state.nonfinite_guard
        found = None if guard.rolled_back else self._newest()
        if found is None:
            raise guard.give_up(state.step, error, reason) from None
        failed_step, skipped = state.step, guard.skipped
        state.restore(*found, self.mesh, self.store.folder)
        guard.roll_back(skipped)
        self.run_log.rolled_back(state.step, failed_step)
        self._save()  # a run that is resumed from there draws the other noise, too

    # ------------------------------------------------------------------------------------------- alarms and signals
    def collect_probe(self, probe: PendingProbe | None) -> int:
        """Keep the result of a probe that was sent before this round; returns the AlarmAction of all ranks."""
        if probe is None:
            return AlarmAction.CONTINUE
        return self.ranks.min(self._keep_result(probe, self.state.step - 1))  # it is of the generator before this round

    def apply_alarm(self, action: int) -> None:
        """Do on all ranks what `overoptimization.on_alarm` says where the probe has raised an alarm."""
        if action == AlarmAction.CONTINUE:
            return
        state, text = self.state, "the run ends here, as if it were finished"
        if action == AlarmAction.LOWER_SCALE:
            state.set_reward_scale(state.step_config.reward_scale / 2)
            text = f"reward_scale is {state.step_config.reward_scale:g} from here on"
        state.stopped |= action == AlarmAction.STOP
        self.run_log.event(state.step, "on_alarm", f"overoptimization.on_alarm: {text}")

    def _keep_result(self, probe: PendingProbe, step: int) -> int:
        """Keep a probe's result, unless the rewards have no finite score for it; returns its AlarmAction."""
        try:
            metrics, alarm = probe()
        except NonFiniteScore as error:
            self.run_log.event(step, PROBE_SKIPPED, f"no probe: {error}")
            return AlarmAction.CONTINUE
        self.run_log.probe(step, metrics, self.state.monitor.history.best)
        if alarm is None:
            return AlarmAction.CONTINUE
        self.run_log.event(step, "overoptimization", f"reward over-optimization: {alarm.line}")
        return ON_ALARM[self.experiment.overoptimization.on_alarm]

    def choose_placement(self) -> None:
        if line := self.state.rewards.choose_placement(self.ranks):
            self.run_log.event(self.state.step, "rewards", line)

    def obey_signals(self) -> None:
        """Do what the run is told from outside: save every step, pause, or stop."""
        step = self.state.step
        if not self.preempted and self.worker.preempted():
            self.preempted = True
            self.run_log.event(step, "preemption", "a machine of this run is about to go: every step is saved from here on")
        signal = self.ranks.min(signals.requested(self.folder) if self.ranks.first else Signal.NONE)
        self.pausing = signal == Signal.PAUSE
        if signal == Signal.STOP:
            self.state.stopped = True
            self.run_log.event(step, "stopped", "the run ends here: it was told to stop")

    # ------------------------------------------------------------------------------------------------ what is kept
    def probe_last_step(self) -> None:
        if self.done and self.experiment.overoptimization.every:
            step = self.state.step
            self._keep_result(self.state.monitor.probe(step, self.state.train_state.ema, has_checkpoint=True), step)

    def log(self) -> None:
        """Keep the means over the window and all ranks, every so many steps."""
        state = self.state
        if state.step % self.experiment.logging.every == 0 or self.done:
            state.metric_window.share(self.ranks)
            metrics = state.metric_window.mean() | {"steps/skipped": state.nonfinite_guard.skipped}
            state.last_metrics |= metrics  # of a window whose rounds were all skipped there is little
            self.run_log.metrics(state.step, metrics)

    def show_samples(self) -> None:
        """Show the sample grid, every so many steps."""
        if self.state.step % self.experiment.logging.grid_every == 0 or self.done:
            self.run_log.grid(self.state.step, self.grid.columns(self.state.train_state.ema))

    @property
    def _checkpoint_due(self) -> bool:
        """Whether `logging.checkpoint_every` asks for a checkpoint of this step. Never while rounds are being skipped: a
        rollback would land inside the failing stretch."""
        every = self.experiment.logging.checkpoint_every
        return self.state.step % every == 0 and not self.state.nonfinite_guard.consecutive

    def checkpoint(self) -> None:
        """Begin a checkpoint where one is due, and make one of what was begun before. Raises Paused once a run that is
        to pause is saved."""
        guard, at_once = self.state.nonfinite_guard, self.done or self.pausing or self.preempted
        if at_once or self._checkpoint_due:
            guard.rolled_back = guard.rolled_back and guard.consecutive > 0
            self._save()
        self.store.finish_save(wait=at_once)
        if self.pausing and not self.done:
            raise signals.Paused(f"paused at step {self.state.step}, all of it saved in {self.store.folder}")

    def _save(self) -> None:
        self.state.agree(self.ranks)
        if self.ranks.first or self.mesh:  # of sharded networks each rank writes its shards
            state = self.identity.stamp(self.state.state_dict())
            self.store.start_save(self.state.step, state, self.state.monitor.history.best_step)

    @contextmanager
    def closing_on_error(self) -> Iterator[None]:
        """In the block, whatever ends the run early is kept in its log, once the checkpoint that was begun is there."""
        try:
            yield
        except BaseException as error:
            if not self.mesh and not isinstance(error, KeyboardInterrupt):  # which is to end at once
                try:
                    self.store.finish_save(wait=True)
                except CheckpointError as lost:  # the run ends for another reason, which is raised
                    print(lost, flush=True)
            self.run_log.fail(error)
            raise

    def finish(self) -> Result | None:
        """Export the generator's EMA; returns the result on rank 0."""
        ema = self.state.train_state.ema
        assert isinstance(ema, OneStepGenerator)
        if self.mesh:
            network = gathered(ema.denoiser.network, self.reference.network(device="meta"))
            ema = self.reference.one_step(network, ema.timestep, ema.input_scale)
        step, best_step = self.state.step, self.state.monitor.history.best_step
        return self.run_log.finish(step, ema, step if best_step is None else best_step, self.state.last_metrics)
