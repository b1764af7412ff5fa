"""A run and what goes wrong in it: values that are not finite, another writer, changed keys, a tracker that was away.

Runs of the tiny pipeline in this process.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from chaos import nonfinite
from mlflow import MlflowClient
from tiny import rewards as tiny_rewards
from tiny.runs import agree, journal

from diffinstruct.cli.main import main
from diffinstruct.cluster.reward_actor import RewardActor
from diffinstruct.errors import UserError
from diffinstruct.locks import LOCK, Busy, locked, only_writer
from diffinstruct.method.nonfinite import NonFiniteGradient
from diffinstruct.method.rewards import NonFiniteScore
from diffinstruct.method.step import alternating_round
from diffinstruct.ranks import Ranks
from diffinstruct.reward_service.monitor import ProbeHistory
from diffinstruct.run_folder.checkpoint import CheckpointError, CheckpointStore, full_disk_as_error
from diffinstruct.run_folder.location import folder_of_run
from diffinstruct.run_folder.signals import Paused, Signal
from diffinstruct.tracking.journal import Journal
from diffinstruct.training import local
from diffinstruct.training.metric_window import MetricWindow
from diffinstruct.training.resume import change


@pytest.fixture(scope="module")
def experiment(world, tmp_path_factory):
    """experiment(**changes), tracked in one database."""
    database = tmp_path_factory.mktemp("tracking") / "mlflow.db"
    plain = {"tracking__uri": f"sqlite:///{database}", "overoptimization__every": 0, "logging__checkpoint_every": 3, "steps": 9}
    one_reward = {"rewards__trained": [{"name": "tiny.rewards:Red", "weight": 1.0}]}
    return lambda **changes: world[1](**plain | one_reward | changes)


def events(folder, kind):
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [(of["step"], of["text"]) for of in map(json.loads, filter(None, lines)) if of.get("event") == kind]


def spoil(monkeypatch, steps, seen=None):
    """The rewards' gradient is NaN in these rounds (counted from 0); the noise of each round goes into `seen`."""

    def spoiled(train_state, settings, schedule, draws, prompts, c, send):
        if seen is not None:
            seen.append((draws.step, draws.normal(0)))

        def nan(latents, prompts):
            def collect():
                raise NonFiniteScore("reward red: 8 of 8 scores are not finite")

            return collect if steps(draws.step) else send(latents, prompts)

        return alternating_round(train_state, settings, schedule, draws, prompts, c, nan)

    monkeypatch.setattr("diffinstruct.training.loop.alternating_round", spoiled)


def test_a_step_that_is_not_finite_is_left_out_and_counted(experiment, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {4, 5, 8}.__contains__)
    local.run(experiment(), tmp_path / "run")
    rows, ends = journal(tmp_path / "run")
    assert ends == ["FINISHED"] and [rows[step]["steps/skipped"] for step in rows] == [0, 0, 0, 0, 1, 2, 2, 2, 3]
    assert "x0_gap" not in rows[5] and "x0_gap" in rows[7]
    why = "reward red: 8 of 8 scores are not finite"
    told = [(5, f"left out, 1 in a row: {why}"), (6, f"left out, 2 in a row: {why}"), (9, f"left out, 1 in a row: {why}")]
    assert events(tmp_path / "run", "skipped") == told
    assert "step 5: left out, 1 in a row: " in (shown := capsys.readouterr().out) and "skipped 2" in shown
    # What follows one that was left out has not been touched by it: no checkpoint at step 6, all of it finite at step 9
    assert CheckpointStore(tmp_path / "run/checkpoints").latest()[0] == 9
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000003", "step-00000009"]


def test_a_run_of_which_most_was_left_out_is_no_finished_run(experiment, tmp_path, monkeypatch):
    """Never five in a row; the same call ends the same way, and its checkpoint is there."""
    spoil(monkeypatch, lambda step: step % 3 != 2)
    for _ in range(2):
        with pytest.raises(NonFiniteGradient, match=r"not finite \(in 6 of the run's 9 steps, which were left out\)"):
            local.run(experiment(), tmp_path / "run")
    assert journal(tmp_path / "run")[1][-1] == "FAILED" and not (tmp_path / "run/export").exists()
    assert CheckpointStore(tmp_path / "run/checkpoints").latest()[0] == 9


def test_after_five_in_a_row_the_run_goes_back_and_another_way(experiment, tmp_path, monkeypatch, capsys):
    seen: list[tuple[int, torch.Tensor]] = []
    gone_by: list[int] = []

    def once(step):
        gone_by.append(step)
        return step >= 4 and gone_by.count(step) == 1 and step < 9

    spoil(monkeypatch, once, seen)
    local.run(experiment(steps=12), tmp_path / "run")
    back = "5 steps in a row were not finite: back to the checkpoint of step 3, on with other prompts and noise"
    assert events(tmp_path / "run", "back_to") == [(9, back)] and f"step 9: {back}" in capsys.readouterr().out
    assert [step for step, _ in seen] == [*range(9), *range(3, 12)]
    assert not torch.equal(seen[3][1], seen[9][1])  # the same step by, another noise
    rows, ends = journal(tmp_path / "run")
    assert ends == ["FINISHED"] and sorted(rows) == [*range(1, 13)] and rows[12]["steps/skipped"] == 5

    # Interrupted after it has gone back, the run goes on on its new way
    gone_by.clear()

    def paused(step):
        if step == 7 and gone_by.count(7) == 1:
            raise KeyboardInterrupt
        return once(step)

    spoil(monkeypatch, paused)
    with pytest.raises(KeyboardInterrupt):
        local.run(experiment(steps=12), tmp_path / "cut")
    spoil(monkeypatch, lambda step: False)
    local.run(experiment(steps=12), tmp_path / "cut")
    agree(tmp_path / "run", tmp_path / "cut", rel=0)


def test_what_cannot_be_got_around_ends_the_run_resumable(experiment, tmp_path, monkeypatch):
    spoil(monkeypatch, lambda step: step >= 4)
    why = "reward red: 8 of 8 scores are not finite; 5 steps in a row, once more after going back"
    for _ in range(2):  # the same call ends the same way
        with pytest.raises(NonFiniteGradient, match=why):
            local.run(experiment(steps=20), tmp_path / "run")
    assert journal(tmp_path / "run")[1] == ["FAILED", "FAILED"]
    assert CheckpointStore(tmp_path / "run/checkpoints").latest()[0] == 3
    spoil(monkeypatch, lambda step: False)
    local.run(experiment(steps=20), tmp_path / "run")
    assert journal(tmp_path / "run")[1][-1] == "FINISHED"

    spoil(monkeypatch, lambda step: True)
    with pytest.raises(NonFiniteGradient, match="5 steps in a row, with no checkpoint to go back to"):
        local.run(experiment(), tmp_path / "other")


def test_a_look_without_finite_scores_is_no_look(experiment, tmp_path, monkeypatch):
    rounds: list[tuple[int, torch.Tensor]] = []
    spoil(monkeypatch, lambda step: False, rounds)
    sound = tiny_rewards.Calm.forward

    def blind_in_round_4(self, images, prompts):
        look = len(images) > 8  # a round has as many
        return sound(self, images, prompts) * (float("nan") if look and len(rounds) == 4 else 1.0)

    monkeypatch.setattr(tiny_rewards.Calm, "forward", blind_in_round_4)
    local.run(experiment(overoptimization__every=2), tmp_path / "run")
    told = [(4, "no probe: reward tiny.rewards:Calm: 64 of 64 scores are not finite")]
    assert events(tmp_path / "run", "overoptimization.probe_skipped") == told and events(tmp_path / "run", "skipped") == []
    rows, ends = journal(tmp_path / "run")
    assert ends == ["FINISHED"] and [step for step in rows if "overoptimization/held_out" in rows[step]] == [0, 2, 6, 8, 9]


def test_spikes_are_recorded(experiment, tmp_path, monkeypatch):
    def spiky(train_state, settings, schedule, draws, *rest):
        metrics = alternating_round(train_state, settings, schedule, draws, *rest)
        key = "gradient_norm/generator"
        return metrics | {key: 1000 * metrics[key]} if draws.step == 5 else metrics

    monkeypatch.setattr("diffinstruct.training.loop.alternating_round", spiky)
    local.run(experiment(logging__every=3), tmp_path / "run")
    (spike,) = events(tmp_path / "run", "spike")
    assert spike[0] == 6 and "gradient_norm/generator is " in spike[1] and "times what is usual" in spike[1]
    rows, _ = journal(tmp_path / "run")
    assert rows[6]["gradient_norm/generator_max"] > 2.9 * rows[6]["gradient_norm/generator"]
    assert rows[3]["gradient_norm/generator_max"] < 2.9 * rows[3]["gradient_norm/generator"]


@pytest.mark.long
def test_no_injected_value_leaks_on_two_processes(tmp_path):
    """One at each place; tests/chaos/nonfinite.py does a thousand, and the same to sharded networks."""
    code = "from chaos.nonfinite import chaos; from pathlib import Path; print(*chaos(Path(sys.argv[1]), 8))"
    paths = os.pathsep.join([str(nonfinite.TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}", str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths}, check=True,
    )  # fmt: skip
    assert done.stdout.rstrip().endswith("True"), done.stdout


# ------------------------------------------------------------------------------------------------ the run's folder
def test_a_run_has_one_writer(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("diffinstruct.training.loop.FOLDER_LOCK_TIMEOUT_S", 0.1)
    (tmp_path / "run").mkdir()
    at_work = rf"process {os.getpid()} on \S+ is at work on this run"
    with only_writer(tmp_path / "run"), pytest.raises(UserError, match=at_work):
        local.run(experiment(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_run_goes_on_under_changed_keys_that_are_allowed(experiment, tmp_path, capsys):
    base = experiment(steps=4, output_dir=str(tmp_path))
    local.run(base, folder_of_run(base))
    file = str(folder_of_run(base) / "experiment.yaml")
    asked = ["train", file, "--resume", str(folder_of_run(base)), "--local"]
    assert main([*asked, "-s", "steps=3", "--allow", "steps"]) == 2
    assert capsys.readouterr().err.strip().endswith("steps: should be at least the 4 that are done, got 3")
    asked += ["-s", "steps=6", "-s", "generator.learning_rate=1e-5"]
    assert main([*asked, "--allow", "steps", "--allow", "generator.learning_rate"]) == 0
    shown = capsys.readouterr().out
    assert "from step 4 on it has what is new, and its older checkpoints are gone" in shown
    assert f"run {folder_of_run(base)}  from step 4  tracking" in shown
    step, state = CheckpointStore(folder_of_run(base) / "checkpoints").latest()
    assert step == 6 and state["train_state"]["generator_optimizer"]["param_groups"][0]["lr"] == 1e-5
    rows, ends = journal(folder_of_run(base))
    assert sorted(rows) == [*range(1, 7)] and ends == ["FINISHED", "FINISHED"]
    assert main(asked) == 0  # which is now its own configuration


def test_the_best_checkpoint_is_kept_told_of_and_exported(experiment, tmp_path, monkeypatch, capsys):
    """Held-out scores are planted, since these pictures are nobody's best."""
    gains = {0: 0.0, 3: 0.2, 6: 0.5, 9: 0.4, 12: 0.3, 15: 0.1}

    class Planted(ProbeHistory):
        def _compare(self, probe):
            return super()._compare(probe) | {"held_out": gains[probe.step], "unexplained": 0.0}

    monkeypatch.setattr("diffinstruct.reward_service.monitor.ProbeHistory", Planted)
    run = tmp_path / "run"
    local.run(experiment(steps=15, overoptimization__every=3), run)
    assert "the checkpoint with the best held-out rewards is that of step 6: " in (shown := capsys.readouterr().out)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{at:08d}" for at in (6, 12, 15)]
    assert [step for step, _ in events(run, "best")] == [3, 6] and f"diffinstruct export {run} --step best" in shown

    assert main(["export", str(run), "--step", "best", "-o", str(tmp_path / "best")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'best'}  step 6, the best\n"
    local.run(experiment(steps=6), tmp_path / "shorter")
    name = "unet/diffusion_pytorch_model.safetensors"
    best, last, six = ((of / name).read_bytes() for of in (tmp_path / "best", run / "export", tmp_path / "shorter/export"))
    assert best == six != last
    assert main(["export", str(run), "-o", str(tmp_path / "last")]) == 0
    assert (tmp_path / "last" / name).read_bytes() == last
    assert main(["generate", str(tmp_path / "last"), "a red thing", "-o", str(tmp_path / "picture.png")]) == 0
    capsys.readouterr()

    (tmp_path / "mine").mkdir()
    assert main(["export", str(run), "-o", str(tmp_path / "mine")]) == 2
    assert main(["export", str(run), "--step", "9", "-o", str(tmp_path / "new")]) == 2
    assert main(["export", str(tmp_path / "shorter"), "--step", "best", "-o", str(tmp_path / "new")]) == 2
    there, nine, none = capsys.readouterr().err.splitlines()
    assert there == f"-o: {str(tmp_path / 'mine')!r} is there already" and nine.endswith("there are 15, 12, 6, last, best")
    assert none.endswith("there are 6, 3, last, and the monitor knows of no best one")
    harmed = run / "checkpoints/step-00000015/state.json"
    harmed.write_bytes(harmed.read_bytes()[:-1])
    with pytest.raises(SystemExit):
        main(["export", str(run), "--step", "15", "-o", str(tmp_path / "new")])
    assert "step-00000015 cannot be used: state.json" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert main(["export", str(run), "-o", str(tmp_path / "new")]) == 0  # the last that can be read
    assert capsys.readouterr().out == f"{tmp_path / 'new'}  step 12\n"


# -------------------------------------------------------------------------------------------------------- tracker
def test_sync_delivers_what_a_dead_server_missed(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("diffinstruct.tracking.journal.DELIVERY_WAIT_S", 0.1)
    local.run(experiment(tracking__uri="http://127.0.0.1:9", steps=4), tmp_path / "run")
    assert journal(tmp_path / "run")[1] == ["FINISHED"]
    with pytest.raises(SystemExit) as failed:
        main(["sync", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert failed.value.code == 1 and said.startswith(f"{tmp_path / 'run'}: ") and said.count("\n") == 1

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for told in (r"bytes of the journal delivered", "all of it is there"):
        assert main(["sync", str(tmp_path), "--uri", uri]) == 0  # a folder of runs
        assert told in capsys.readouterr().out
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("diffinstruct").experiment_id])
    history = client.get_metric_history(run.info.run_id, "x0_gap")
    assert run.info.status == "FINISHED" and sorted(value.step for value in history) == [1, 2, 3, 4]
    assert main(["sync", str(tmp_path / "nowhere")]) == 2


def test_a_pause_waits_for_the_checkpoint(experiment, tmp_path, monkeypatch):
    """What is written by a thread is there when the process ends."""
    from diffinstruct.run_folder import signals

    def paused(train_state, settings, schedule, draws, *rest):
        if draws.step == 4:
            signals.request(tmp_path / "run", Signal.PAUSE)
        return alternating_round(train_state, settings, schedule, draws, *rest)

    monkeypatch.setattr("diffinstruct.training.loop.alternating_round", paused)
    with pytest.raises(Paused):
        local.run(experiment(), tmp_path / "run")
    assert CheckpointStore(Path(tmp_path / "run/checkpoints")).latest()[0] == 5


# ------------------------------------------------------------------------------------------------- what has changed
def test_prompts_that_have_changed_under_their_name_are_refused(experiment, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red thing\na blue thing\n")
    base = experiment(steps=4, output_dir=str(tmp_path), prompts__train=str(prompts))
    local.run(base, folder_of_run(base))
    prompts.write_text("a red thing\na pale thing\n")
    asked = ["train", str(folder_of_run(base) / "experiment.yaml"), "--resume", str(folder_of_run(base)), "--local"]
    assert main(asked) == 2
    assert f"prompts.train: the prompts of {prompts} have changed since step 4 of " in capsys.readouterr().err
    assert main([*asked, "--allow", "prompts.train"]) == 0
    assert main(asked) == 0  # they are its own now
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in folder_of_run(base).glob("checkpoints/*/*")}
    assert main([*asked, "--allow", "prompts.train"]) == 0  # as a script that restarts it may go on to say
    assert "has what is new" not in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder_of_run(base).glob("checkpoints/*/*")}


def test_a_checkpoint_that_says_it_is_the_runs_and_is_not(experiment, tmp_path, capsys):
    """Its digests are right."""
    base = experiment(steps=2, output_dir=str(tmp_path))
    local.run(base, folder_of_run(base))
    store = CheckpointStore(folder_of_run(base) / "checkpoints")
    step, state = store.latest()
    for odd in ({"train_state": {}}, {"train_state": state["train_state"] | {"ema": {}}}, {"rewards": []}):
        store.save(step, state | odd)
        with pytest.raises(SystemExit) as failed:
            main(["train", str(folder_of_run(base) / "experiment.yaml"), "--local"])
        *_, said, how = capsys.readouterr().err.splitlines()
        assert failed.value.code == 1 and how.startswith("from its last checkpoint the run goes on")
        assert f"{store.folder}: the run cannot go on from its newest checkpoint (" in said


def test_a_run_whose_checkpoints_cannot_be_read_does_not_begin_anew(experiment, tmp_path):
    base = experiment(steps=6)
    local.run(base, tmp_path / "run")
    files = [*(tmp_path / "run/checkpoints").glob("*/state.json")]
    for file in files:
        file.rename(file.with_suffix(".away"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="checkpoints: no checkpoint in it can be read; without it the run begins anew"):
        local.run(base, tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(CheckpointError, match="checkpoints: no checkpoint in it can be read; nothing is changed"):
        change(base, tmp_path / "run", {"generator.learning_rate"})
    for file in files:
        file.with_suffix(".away").rename(file)
    assert local.run(base, tmp_path / "run").metrics


def test_an_empty_recipe_in_a_run_is_damage(experiment, tmp_path, capsys):
    base = experiment(steps=2, output_dir=str(tmp_path))
    local.run(base, folder_of_run(base))
    own = folder_of_run(base) / "experiment.yaml"
    (tmp_path / "recipe.yaml").write_text(own.read_text())
    own.write_text("")
    assert main(["train", str(tmp_path / "recipe.yaml"), "--local"]) == 2
    assert f"{own}: is empty, as a power cut may leave it" in capsys.readouterr().err


def test_one_recipe_that_cannot_be_read_holds_up_no_other_run(experiment, tmp_path, monkeypatch, capsys):
    for name in "ab":
        local.run(experiment(steps=2), tmp_path / name)
    (tmp_path / "a/experiment.yaml").write_text("stepps: 3")
    (tmp_path / "a/journal.ack").write_text("[]")
    with pytest.raises(SystemExit):
        main(["sync", str(tmp_path)])
    said = capsys.readouterr()
    assert "stepps" in said.err and f"{tmp_path / 'b'}: all of it is there" in said.out


# ------------------------------------------------------------------------------------------------------ same bits
@pytest.mark.parametrize("asked", [False, True])
def test_deterministic_kernels_are_there_where_asked_for(asked, experiment, tmp_path, monkeypatch):
    """In the training process and in a reward actor; what they are good for only a GPU can show."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    base = experiment(steps=2, deterministic=asked)
    found = []
    for begin in (lambda: local.run(base, tmp_path / "run"), lambda: RewardActor(base, (), str(tmp_path))):
        try:
            begin()
            found.append((torch.are_deterministic_algorithms_enabled(), "CUBLAS_WORKSPACE_CONFIG" in os.environ))
        finally:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.deterministic = False
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert found == [(asked, asked)] * 2


# ------------------------------------------------------------------------------------------------------- full disks
def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_picture_that_finds_no_room_is_missed_and_no_more(experiment, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("PIL.Image.Image.save", full)
    local.run(experiment(steps=2), tmp_path / "run")
    assert "images/grid-00000000.png is not drawn ([Errno 28] No space left on device); training goes on" in caplog.text


def test_an_export_that_finds_no_room_ends_the_run_resumable(experiment, tmp_path, monkeypatch, capsys):
    base = experiment(steps=2, output_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("diffinstruct.models.export.export", full)
        with pytest.raises(CheckpointError, match=r"No space left on device, [\d.]+ MiB are free"):
            local.run(base, folder_of_run(base))
    assert local.run(base, folder_of_run(base)).metrics


def test_a_lock_that_finds_no_room_is_one_line(experiment, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(experiment(output_dir=str(tmp_path / "runs")).to_yaml())
    monkeypatch.setattr("diffinstruct.locks.locked", full)
    assert main(["train", str(tmp_path / "recipe.yaml"), "--local"]) == 1
    assert capsys.readouterr().err.strip().endswith("No space left on device")
    monkeypatch.undo()
    monkeypatch.setattr(os, "write", full)  # into a file that is open, which does not tell its name
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/lock'"), only_writer(tmp_path):
        pass


def test_a_full_disk_is_said_in_one_line_whoever_finds_out(tmp_path):
    from safetensors import SafetensorError

    told = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (told, OSError(errno.ENOSPC, "No space left on device")):
        line = rf"^{tmp_path}: No space left on device, [\d.]+ MiB are free$"
        with pytest.raises(CheckpointError, match=line), full_disk_as_error(tmp_path):
            raise error
    with pytest.raises(SafetensorError, match="header"), full_disk_as_error(tmp_path):
        raise SafetensorError("header too large")


def test_a_folder_that_is_taken_away_while_one_waits_for_it(tmp_path):
    """By a command that had begun nothing in it."""
    folder = tmp_path / "run"
    folder.mkdir()
    held = (folder / LOCK).open("a")
    assert locked(held)
    ending = threading.Timer(1.0, lambda: (shutil.rmtree(folder), held.close()))
    ending.start()
    with pytest.raises(Busy, match="has ended; the same command again begins it"), only_writer(folder, 30):
        pass
    ending.join()


# ------------------------------------------------------------------------------------------------------- at once
def test_a_run_that_is_to_end_at_once_waits_for_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr("diffinstruct.tracking.journal.DELIVERY_WAIT_S", 10_000.0)
    tracker = Journal("http://127.0.0.1:9", "x", "run", tmp_path, {}, {})
    ending = threading.Thread(target=lambda: tracker.finish("KILLED", "KeyboardInterrupt: ", hurry=True), daemon=True)
    ending.start()
    ending.join(60)
    assert not ending.is_alive()


def test_rows_are_the_same_whenever_a_checkpoint_shares_them():
    """Of three workers, whose means of means would not be."""

    def average(row):
        return {key: (value + 2 * value / 3 + value / 7) / 3 for key, value in row.items()}

    ranks, means = Ranks(mean=average), []
    for early in (False, True):
        window = MetricWindow([], 8)
        for i in range(5):
            window.add({"a": 0.1 + i / 7, "time/reward": 0.0})
            if early and i in (1, 2):
                window.share(ranks)
                state, window = window.state_dict(), MetricWindow([], 8)
                window.load_state_dict(state)
        window.share(ranks)
        means.append(window.mean()["a"])
    assert means[0] == means[1]
