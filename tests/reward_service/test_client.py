"""A run and its rewards: validation before the first round, requests that are the run's state, probes, and what an
alarm does.

Runs of the tiny pipeline in this process.
"""

from __future__ import annotations

import json
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np
import pytest
import torch
from tiny import pipelines

from diffinstruct.config.experiment import Experiment
from diffinstruct.method.rewards import LatentRewards, RewardError, RewardRequest, Scores
from diffinstruct.models.pipeline import load_reference
from diffinstruct.models.sampling import LatentSampler, probe_inputs
from diffinstruct.ranks import Ranks
from diffinstruct.reward_service import client, monitor
from diffinstruct.reward_service.client import MEASURED_ROUNDS, LocalRewards, RewardClient, make_rewards
from diffinstruct.reward_service.monitor import Alarm, OveroptimizationMonitor, variety
from diffinstruct.run_folder.checkpoint import CheckpointStore
from diffinstruct.training import local

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """experiment(**changes of dotted keys, "__" for ".") on the tiny pipeline."""
    folder = tmp_path_factory.mktemp("world")
    pipelines.build(folder / "tiny")
    (folder / "prompts.txt").write_text("".join(f"a {colour} thing\n" for colour in ("red", "blue", "pale", "dark")))

    def experiment(**changes):
        values = {
            "seed": 1, "steps": 6, "global_batch_size": 8, "reference.model": str(folder / "tiny"),
            "generator.init_from": "reference", "prompts.train": str(folder / "prompts.txt"),
            "prompts.grid": str(folder / "prompts.txt"), "objective.reward_scale": 10.0, "logging.every": 1,
            "logging.grid_every": 1000, "logging.grid_prompts": 2, "logging.checkpoint_every": 2,
            "overoptimization.every": 2,
            "rewards.trained": [{"name": "tiny.rewards:Red", "weight": 2.0}], "rewards.held_out": ["tiny.rewards:Calm"],
            "tracking.uri": f"sqlite:///{folder / 'mlflow.db'}",  # making a database takes longer than a run
        }  # fmt: skip
        content = Experiment().model_dump()
        for key, value in (values | {key.replace("__", "."): value for key, value in changes.items()}).items():
            *sections, last = key.split(".")
            reduce(getitem, sections, content)[last] = value
        return Experiment.model_validate(content)

    return experiment


def client_of(experiment, actors, in_process):
    return RewardClient(experiment.rewards, experiment.cluster.rewards, actors, in_process)


def records(folder, kind):
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, filter(None, lines)) if kind in record]


def metrics(folder):
    """Every number of the journal but the times, by step."""
    found: dict[int, dict] = {}
    for record in records(folder, "metrics"):
        kept = {key: value for key, value in record["metrics"].items() if not key.startswith(("time/", "throughput/"))}
        found.setdefault(record["step"], {}).update(kept)
    return found


def state(folder):
    return CheckpointStore(folder / "checkpoints").latest()[1]


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, rounds):
    """The run's own round, which ends it when it has been called so often."""
    from diffinstruct.training import loop

    real, left = loop.alternating_round, [rounds]

    def round_(*given):
        if not left[0]:
            raise Interrupted
        left[0] -= 1
        return real(*given)

    monkeypatch.setattr(loop, "alternating_round", round_)


# ------------------------------------------------------------------------------------------------- before the first
# round
def test_a_lying_reward_is_refused_before_the_first_round(world, tmp_path):
    experiment = world(rewards__trained=[{"name": "tiny.rewards:Drunk", "weight": 1.0}])
    with pytest.raises(RewardError, match=r"^reward tiny.rewards:Drunk: its scores are random"):
        local.run(experiment, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists() and not metrics(tmp_path / "run")
    assert records(tmp_path / "run", "finish")[-1]["finish"] == "FAILED"


def test_a_resumed_run_shakes_hands_again(world, tmp_path, monkeypatch):
    """Somebody may have mended a reward since, and not well."""
    from tiny import rewards as tiny_rewards

    experiment = world(steps=4, logging__checkpoint_every=2)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 3)
        local.run(experiment, tmp_path / "run")
    monkeypatch.setattr(tiny_rewards.Red, "forward", lambda self, images, prompts: torch.randn(len(prompts)))
    before = state(tmp_path / "run")["metrics"]
    with pytest.raises(RewardError, match=r"^reward tiny.rewards:Red: its scores are random"):
        local.run(experiment, tmp_path / "run")
    assert state(tmp_path / "run")["metrics"] == before


def test_what_validation_saw_is_in_the_journal(world, tmp_path):
    local.run(world(steps=1), tmp_path / "run")
    told = {record["event"]: record for record in records(tmp_path / "run", "event")}
    seen = {kind: record for kind, record in told.items() if kind.startswith("reward.")}
    assert seen.keys() == {"reward.tiny.rewards:Red", "reward.tiny.rewards:Calm"}
    assert all(record["step"] == 0 and "scores" in record["text"] for record in seen.values())


def test_normalised_rewards_pull_as_strongly_whatever_their_units(world, tmp_path):
    """A reward in units a thousand times smaller, and a run that is all but the same."""
    normalized = {"steps": 3, "rewards__normalize": "std"}
    local.run(world(**normalized), tmp_path / "one")
    tiny_units = [{"name": "tiny.rewards:RedInThousandths", "weight": 2.0}]
    local.run(world(**normalized, rewards__trained=tiny_units), tmp_path / "other")
    one, other = (state(tmp_path / name)["rewards"]["scales"] for name in ("one", "other"))
    assert other["tiny.rewards:RedInThousandths"] == pytest.approx(one["tiny.rewards:Red"] * 1e-3, rel=1e-4)
    pulls = [metrics(tmp_path / name)[3]["gradient_norm/sample_reward"] for name in ("one", "other")]
    assert pulls[0] == pytest.approx(pulls[1], rel=1e-3) and pulls[0] > 0
    with pytest.raises(RewardError, match=r"^reward flat: the same score for 4 pictures, nothing to normalize by$"):
        flat = LocalRewards(LatentRewards(lambda x: x, {"flat": lambda images, prompts: torch.ones(len(prompts))}))
        experiment = world(rewards__normalize="std")
        judge = client_of(experiment, None, lambda: flat)
        judge.scales = {"flat": 1.0}
        judge.measure_scales(torch.zeros(4, 3), ["a"] * 4)


# ------------------------------------------------------------------------------------------------- terms are state
def test_the_micro_batch_that_memory_holds_is_kept_and_asked_for_again(world, tmp_path, monkeypatch):
    greedy = {"rewards__trained": [{"name": "tiny.rewards:Greedy", "weight": 1.0}], "steps": 4}
    local.run(world(**greedy), tmp_path / "whole")
    assert state(tmp_path / "whole")["rewards"]["micro_batch_size"] == 4  # 8 in half

    interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        local.run(world(**greedy), tmp_path / "run")
    monkeypatch.undo()
    asked, ask = [], LocalRewards.ask

    def noted(self, latents, prompts, request):
        asked.append(request.micro_batch)
        return ask(self, latents, prompts, request)

    monkeypatch.setattr(LocalRewards, "ask", noted)
    local.run(world(**greedy), tmp_path / "run")
    assert set(asked) == {4}
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


class Fake:
    """A service that answers when it is told to have taken `seconds`."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.asked = clock, seconds, 0

    def ask(self, latents, prompts, request):
        self.asked += 1

        def collect():
            self.clock[0] += self.seconds
            return Scores({}, torch.zeros_like(latents), self.seconds, request.micro_batch)

        return collect

    validate = None


def fake(clock, seconds) -> Any:
    """A Fake wherever a backend is wanted."""
    return Fake(clock, seconds)


@pytest.mark.parametrize(("actors", "here", "place"), [(0.5, 0.2, "process"), (0.1, 0.2, "actor"), (0.5, None, "actor")])
def test_the_first_rounds_show_where_rewards_hold_a_run_up_less(world, monkeypatch, actors, here, place):
    clock = [0.0]
    monkeypatch.setattr(client.time, "perf_counter", lambda: clock[0])

    def in_process():
        if here is None:
            raise ImportError("no module named 'theirs'")
        return fake(clock, here)

    reward_client = client_of(world(), fake(clock, actors), in_process)
    line = None
    for _ in range(MEASURED_ROUNDS):
        assert line is None and reward_client.placement == "auto"
        reward_client.send(torch.zeros(8, 4), ["a"] * 8)()
        line = reward_client.choose_placement(Ranks())
    where = {"process": "the training process", "actor": "the reward actors"}[place]
    assert line.startswith(f"rewards are computed in {where}: actors hold a round up by {actors:.3f} s")
    assert line.endswith("cannot: ImportError: no module named 'theirs'" if here is None else f"would by {here:.3f} s")
    assert reward_client.placement == place and (reward_client.backend is reward_client.pool) == (place == "actor")
    assert reward_client.choose_placement(Ranks()) is None

    resumed = client_of(world(), fake(clock, actors), lambda: fake(clock, 0.0))
    resumed.load_state_dict(reward_client.state_dict())
    assert (resumed.backend is resumed.pool) == (place == "actor")


def test_one_worker_that_is_better_off_with_actors_decides_for_all(world, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(client.time, "perf_counter", lambda: clock[0])
    reward_client = client_of(world(), fake(clock, 0.5), lambda: fake(clock, 0.2))
    for _ in range(MEASURED_ROUNDS):
        reward_client.send(torch.zeros(8, 4), ["a"] * 8)()
    # The other rank has seen as many rounds, and is for actors
    assert reward_client.choose_placement(Ranks(min=lambda value: value if value > 1 else 0))
    assert reward_client.placement == "actor" and reward_client.backend is reward_client.pool


def test_rewards_with_an_environment_of_their_own_stay_there(world):
    environment = {"rewards": ["tiny.rewards:Red"], "runtime_env": "theirs.yaml"}
    experiment = world(cluster__rewards__environments=[environment])
    reward_client = client_of(experiment, fake([0.0], 9.0), lambda: fake([0.0], 0.0))
    assert reward_client.placement == "actor" and reward_client.backend is reward_client.pool


def test_a_run_without_held_out_rewards_is_told_what_the_monitor_cannot_see(world, tmp_path, capsys):
    local.run(world(steps=1, rewards__held_out=[]), tmp_path / "run")
    assert "step 0: no held-out reward: the monitor sees variety and distance" in capsys.readouterr().out
    local.run(world(steps=1), tmp_path / "judged")
    assert "no held-out reward" not in capsys.readouterr().out


def test_rewards_in_the_process_hide_nothing(world, tmp_path):
    local.run(world(steps=2), tmp_path / "run")
    rows = [record["metrics"] for record in records(tmp_path / "run", "metrics") if "time/reward" in record["metrics"]]
    assert rows and all(row["time/reward_hidden_fraction"] < 0.05 for row in rows)
    assert all(row["time/reward_exposed"] >= row["time/reward"] > 0 for row in rows)


# ------------------------------------------------------------------------------------------------- probes
def test_a_probe_sees_the_same_prompts_and_noise_with_the_runs_weights(world, monkeypatch):
    experiment = world()
    reference = load_reference(experiment.reference.model)
    prompts = ["a red thing", "a blue thing"]
    seen = []

    class Spy(monitor.ProbeHistory):
        def observe(self, probe, has_checkpoint=False):
            seen.append((probe, has_checkpoint))
            return super().observe(probe, has_checkpoint)

    monkeypatch.setattr(monitor, "ProbeHistory", Spy)
    rewards = make_rewards(experiment.rewards.names, reference.decode, CPU)
    reward_client = client_of(experiment, None, lambda: LocalRewards(rewards))
    reward_client.scales = {"tiny.rewards:Red": 0.5}
    sample = LatentSampler(reference, experiment.precision, experiment.rewards.micro_batch_size)
    observer = OveroptimizationMonitor(experiment.rewards.held_out, sample, prompts, reward_client)
    generator = reference.generator(600)
    figures, alarm = observer.probe(0, generator, has_checkpoint=False)()
    observer.add_round({"x0_gap": 2.0})
    observer.add_round({"x0_gap": 4.0})
    observer.add_round({})  # of a run without an objective
    observer.probe(10, generator, has_checkpoint=True)()
    (first, start_kept), (second, second_kept) = seen
    assert (start_kept, second_kept) == (False, True)
    assert alarm is None and figures["overoptimization/trained"] == 0.0
    assert (first.step, second.step) == (0, 10) and np.isnan(first.distance) and second.distance == 3.0
    assert np.array_equal(first.trained, second.trained) and first.variety == second.variety > 0

    assert len(observer.prompts) == 64 and len(set(observer.prompts[:4])) == 1
    latents = sample(generator, observer.noise, observer.prompts)
    scores = rewards(latents, observer.prompts, RewardRequest({}, 16)).scores
    np.testing.assert_allclose(first.trained, 4.0 * scores["tiny.rewards:Red"].double().numpy(), rtol=1e-6)
    np.testing.assert_allclose(first.held_out["tiny.rewards:Calm"], scores["tiny.rewards:Calm"].numpy(), rtol=1e-6)


def test_variety_is_the_mean_distance_between_pictures_of_one_prompt():
    latents = torch.zeros(8, 1, 2, 2)
    latents[3] = 3.0  # of the first prompt: 3 of 6 pairs are 3 apart in each of 4 dimensions
    assert variety(latents) == pytest.approx((3 * 3.0 / 6 + 0) / 2)


def test_few_prompts_are_met_again_and_none_is_left_out(world):
    reference = load_reference(world().reference.model)
    few, noise = probe_inputs(reference, ["a", "b", "c"], 7, seed=5)
    assert len(few) == 7 and set(few[:3]) == set(few[3:6]) == {"a", "b", "c"} and noise.shape == (7, *pipelines.LATENT)


class Alarming(monitor.ProbeHistory):
    """Raises an alarm at one probe."""

    at = 2

    def observe(self, probe, has_checkpoint=False):
        super().observe(probe, has_checkpoint)
        if probe.step != self.at:
            return None
        return Alarm(probe.step, "unexplained", f"at step {probe.step} something is odd")


@pytest.mark.parametrize("on_alarm", ["warn", "stop", "lower_scale"])
def test_what_follows_an_alarm(world, tmp_path, monkeypatch, capsys, on_alarm):
    experiment = world(overoptimization__on_alarm=on_alarm)
    local.run(experiment, tmp_path / "calm")
    monkeypatch.setattr(monitor, "ProbeHistory", Alarming)
    result = local.run(experiment, tmp_path / "run")
    assert "step 2: reward over-optimization: at step 2 something is odd" in capsys.readouterr().out
    events = {record["event"]: (record["step"], record["text"]) for record in records(tmp_path / "run", "event")}
    assert events["overoptimization"] == (2, "reward over-optimization: at step 2 something is odd")
    calm, run = metrics(tmp_path / "calm"), metrics(tmp_path / "run")
    assert {step: run[step] for step in (1, 2)} == {step: calm[step] for step in (1, 2)}
    last = json.loads((result.folder / "metrics.json").read_text())["step"]
    if on_alarm == "warn":
        assert last == 6 and run == calm
    elif on_alarm == "stop":  # the probe of the generator after round 2 is collected after round 3
        assert last == 3 and max(run) == 3 and (result.export / "model_index.json").exists()
        assert records(result.folder, "finish")[-1]["finish"] == "FINISHED"
        again = local.run(experiment, tmp_path / "run")
        assert json.loads((again.folder / "metrics.json").read_text())["step"] == 3 and max(metrics(tmp_path / "run")) == 3
    else:
        assert last == 6 and state(tmp_path / "run")["reward_scale"] == 5.0 and "5 from here on" in events["on_alarm"][1]
        pull = "gradient_norm/sample_reward"
        assert run[3][pull] == calm[3][pull] and run[4][pull] == pytest.approx(calm[4][pull] / 2, rel=1e-4)


def test_a_resumed_run_probes_and_lowers_as_the_unbroken_one(world, tmp_path, monkeypatch):
    experiment = world(
        overoptimization__on_alarm="lower_scale", steps=7, overoptimization__every=3, logging__checkpoint_every=2
    )
    monkeypatch.setattr(Alarming, "at", 3)
    monkeypatch.setattr(monitor, "ProbeHistory", Alarming)
    local.run(experiment, tmp_path / "whole")
    for rounds in (3, 2):  # after the checkpoint of round 2, and after that of round 4: the scale has been lowered in between
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            interrupt_after(patch, rounds)
            local.run(experiment, tmp_path / "run")
    local.run(experiment, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert "overoptimization/trained" in metrics(tmp_path / "run")[7]
    assert state(tmp_path / "run")["reward_scale"] == 5.0


def test_no_probes_where_none_are_wanted(world, tmp_path):
    local.run(world(steps=2, overoptimization__every=0), tmp_path / "run")
    assert not [key for row in metrics(tmp_path / "run").values() for key in row if key.startswith("overoptimization/")]
