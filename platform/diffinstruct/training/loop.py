"""The training loop: one rank's part of a run.

`local.py` calls `train` once in this process, `cluster/train.py` once in each worker of Ray Train. All that differs
between them is handed in (where rewards are computed, how modules are wrapped, the collective calls), so both give the
same numbers, up to the rounding of sums over ranks.
"""

from pathlib import Path

from diffinstruct.config.experiment import Experiment
from diffinstruct.locks import OUTLIVES_S, only_writer
from diffinstruct.method.nonfinite import NonFiniteGradient
from diffinstruct.method.step import alternating_round
from diffinstruct.reward_service.client import RewardBackend
from diffinstruct.run_folder.checkpoint import full_disk_as_error
from diffinstruct.run_folder.mirror import mirrored
from diffinstruct.tracking.journal import Parent
from diffinstruct.training.run_log import Result
from diffinstruct.training.trainer import Trainer
from diffinstruct.training.worker import Worker

FOLDER_LOCK_TIMEOUT_S = OUTLIVES_S
"""Seconds that a run waits for a process that holds its folder: the lock of a worker that was lost may outlive it."""


def train(
    experiment: Experiment,
    folder: Path,
    pool: RewardBackend | None = None,
    worker: Worker | None = None,
    parent: Parent | None = None,
) -> Result | None:
    """Run or resume `experiment` in `folder`; returns the result on rank 0, None elsewhere. Without a `pool` the
    rewards are computed in this process.

    A round with something in it that is not finite is skipped and counted. After MAX_SKIPS_IN_A_ROW the run rolls back
    to its last checkpoint and goes on from there with other prompts and noise, once; if that comes to the same it raises
    NonFiniteGradient.

    Raises NonFiniteGradient, RewardError or, where the disk is full, CheckpointError with the run resumable: weights on disk
    are from the last checkpoint; UserError where another process is at work on the folder.
    """
    worker = worker or Worker()
    folder.mkdir(parents=True, exist_ok=True)
    with full_disk_as_error(folder):
        if not worker.ranks.first:
            return run_rounds(Trainer(experiment, folder, pool, worker, parent))
        with only_writer(folder, FOLDER_LOCK_TIMEOUT_S), mirrored(experiment.mirror, folder):
            return run_rounds(Trainer(experiment, folder, pool, worker, parent))


def run_rounds(trainer: Trainer) -> Result | None:
    """Train from the newest checkpoint, or from the start, to the end. Every rank makes the same calls."""
    trainer.restore()
    with trainer.closing_on_error():
        trainer.validate_rewards()
        while not trainer.done:
            probe = trainer.start_probe()
            noise, prompts, conditions = trainer.draw_batch()
            state, schedule = trainer.state, trainer.reference.schedule
            try:
                metrics = alternating_round(
                    state.train_state, state.step_config, schedule, noise, prompts, conditions, trainer.send
                )
            except NonFiniteGradient as error:
                reason = trainer.count_skipped(error)
                if trainer.skipped_too_many:
                    trainer.roll_back(error, reason)
                    continue
            else:
                trainer.count_done(metrics)
            trainer.apply_alarm(trainer.collect_probe(probe))
            trainer.choose_placement()
            trainer.obey_signals()
            trainer.probe_last_step()
            trainer.log()
            trainer.show_samples()
            trainer.checkpoint()
        trainer.refuse_mostly_skipped()
    return trainer.finish()
