"""Reward actors: the answers of one process and one graph, whatever befalls the process that gives them.

One Ray session for the module, one pair of reward actors for most of it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chaos.rewards import chaos, compare
from tiny import actors as tiny_actors
from tiny import pipelines

from diffinstruct.cluster.reward_call import Call
from diffinstruct.cluster.reward_pool import reward_pool
from diffinstruct.config.experiment import Experiment
from diffinstruct.errors import UserError
from diffinstruct.method.rewards import RewardError, RewardRequest
from diffinstruct.models.pipeline import load_reference
from diffinstruct.reward_service.client import LocalRewards, make_rewards

ROOT = Path(__file__).parents[2]
TRAINED = [{"name": "tiny.rewards:Red", "weight": 1.0}, {"name": "tiny.rewards:Broken", "weight": 0.5}]
WATCHED = ["Calm", "Sleepy", "Patient", "Deadly", "BlackBox", "Relative"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """experiment(rewards, cluster) on the tiny pipeline."""
    model = pipelines.build(tmp_path_factory.mktemp("world") / "tiny")

    def experiment(cluster=None, trained=TRAINED, held_out=WATCHED):
        return Experiment.model_validate(
            {
                "reference": {"model": str(model)},
                "generator": {"init_from": "reference"},
                "rewards": {"trained": trained, "held_out": [n if ":" in n else f"tiny.rewards:{n}" for n in held_out]},
                "cluster": cluster or {},
            }
        )

    return experiment


@pytest.fixture(scope="module")
def pool(session, world):
    with reward_pool(world({"rewards": {"replicas": 2}})) as pool:
        yield pool


@pytest.fixture(scope="module")
def decode(world):
    return load_reference(world().reference.model).decode


@pytest.fixture(scope="module")
def terms(world):
    return terms_of(world())


@pytest.fixture(scope="module")
def alone(world, decode):
    """The same rewards in this process."""
    return LocalRewards(make_rewards(world().rewards.names, decode, "cpu"))


@pytest.fixture
def warnings(caplog):
    """One line for each restart or kill that the caller has noticed."""
    caplog.set_level(logging.WARNING, logger="diffinstruct.cluster")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("diffinstruct.cluster")]


def terms_of(experiment):
    return RewardRequest(
        {reward.name: reward.weight for reward in experiment.rewards.trained}, experiment.rewards.micro_batch_size
    )


def latents(rows):
    return torch.randn(rows, *pipelines.LATENT, generator=torch.Generator().manual_seed(3))


def pid(actor):
    from diffinstruct.cluster.ray_private import state

    return state.actor_table(actor._actor_id.hex(), None, None)["Pid"]


def identical(answer, expected):
    """Bit for bit."""
    assert list(answer.scores) == list(expected.scores)
    for name, score in expected.scores.items():
        assert torch.equal(answer.scores[name], score), name
    assert torch.equal(answer.gradient, expected.gradient) and answer.gradient.abs().max() > 0
    assert answer.micro_batch == expected.micro_batch


# ------------------------------------------------------------------------------------------------------- answers
def test_actors_answer_what_one_process_and_one_graph_do(pool, alone, decode, terms):
    x0, prompts = latents(40), [f"a thing {i}" for i in range(40)]  # 16 + 16 + 8 rows over two actors
    answer = replace(pool, first=1).ask(x0, prompts, terms)()
    identical(answer, alone.ask(x0, prompts, terms)())
    assert answer.seconds > 0

    leaf = x0.clone().requires_grad_()
    models = alone.rewards.models
    total = sum(weight * models[name](decode(leaf), prompts).sum() for name, weight in terms.weights.items())
    exact = torch.autograd.grad(total, leaf)[0]
    assert (answer.gradient - exact).norm() <= 1e-5 * exact.norm()
    answer.gradient.add_(1)  # it is the caller's own


def test_questions_come_with_weights_and_micro_batch_of_their_own(pool, alone):
    x0, prompts = latents(6), ["a thing"] * 6
    for terms in (RewardRequest({"tiny.rewards:Calm": -2.0}, 2), RewardRequest({"tiny.rewards:Red": 1.0}, 16)):
        identical(pool.ask(x0, prompts, terms)(), alone.ask(x0, prompts, terms)())
    unweighted = pool.ask(x0, prompts, RewardRequest({}, 3))()
    assert unweighted.gradient.shape == x0.shape and not unweighted.gradient.any()


def test_a_black_box_can_be_held_out_and_not_trained_on(pool, decode, terms):
    x0 = latents(3)
    means = decode(x0).flatten(1).mean(1)
    torch.testing.assert_close(pool.ask(x0, ["a thing"] * 3, terms)().scores["tiny.rewards:BlackBox"], means)
    with pytest.raises(RewardError, match=r"^reward tiny.rewards:BlackBox: its scores carry no gradient [^\n]*$"):
        pool.ask(x0, ["a thing"] * 3, RewardRequest({"tiny.rewards:BlackBox": 1.0}, 16))()


def test_what_a_reward_says_reaches_the_caller_as_it_is(pool, terms, warnings):
    with pytest.raises(RewardError, match=r"^reward tiny.rewards:Broken: 1 of 2 scores are not finite$"):
        pool.ask(latents(2), ["a thing", "a broken thing"], terms)()
    with pytest.raises(RewardError, match=r"^reward tiny.rewards:Blue: asked for, but there are tiny.rewards:Red, "):
        pool.ask(latents(2), ["a thing"] * 2, RewardRequest({"tiny.rewards:Blue": 1.0}, 16))
    assert warnings() == []  # nothing that a second try would mend


def test_a_reward_that_cannot_be_loaded_is_the_users_error(session, world):
    with (
        pytest.raises(UserError, match=r"^rewards: cannot load 'tiny.rewards:Kalm': [^\n]*did you mean 'Calm'\?$"),
        reward_pool(world(held_out=["Kalm"])),
    ):
        pass


def test_without_rewards_there_are_no_actors_and_no_pull(world):
    experiment = world().model_copy(update={"rewards": world().rewards.model_copy(update={"trained": (), "held_out": ()})})
    with reward_pool(experiment) as pool:
        answer = pool.ask(latents(2), ["a thing"] * 2, RewardRequest({}, 16))()
    assert pool.actors() == () and answer.scores == {} and torch.equal(answer.gradient, torch.zeros(2, *pipelines.LATENT))


# -------------------------------------------------------------------------------------------------------- faults
def test_an_actor_that_dies_at_work_comes_back_with_the_same_answer(pool, alone, terms, tmp_path, warnings):
    x0, prompts = latents(4), [f"{tmp_path / 'died'}"] * 4
    died = pool.ask(x0, prompts, terms)()
    assert (tmp_path / "died").exists()
    identical(died, alone.ask(x0, prompts, terms)())
    (line,) = warnings()
    assert "\n" not in line and line.startswith("reward actor 0 (of 1 CPUs, 0 GPUs): ActorUnavailableError: ")
    assert "; asked again (2 of 5) to score 4 samples with tiny.rewards:Red, " in line


def test_an_actor_that_dies_between_calls_comes_back_with_the_same_answer(pool, alone, terms):
    x0, prompts, before = latents(4), ["a thing"] * 4, pid(pool.actors()[0])
    os.kill(before, signal.SIGKILL)
    identical(pool.ask(x0, prompts, terms)(), alone.ask(x0, prompts, terms)())
    assert pid(pool.actors()[0]) != before


def test_a_hung_call_is_ended_also_where_its_caller_is_gone(pool, alone, terms, tmp_path, warnings):
    x0, quick = latents(4), replace(pool, deadline=4.0)
    hung = [f"sleep {tmp_path / 'first'}"] * 4
    identical(quick.ask(x0, hung, terms)(), alone.ask(x0, hung, terms)())
    assert len(warnings()) == 1
    assert " s at work on it (cluster.rewards.deadline_s allows 4), so it was killed; asked again (2 of 5)" in warnings()[0]

    quick.ask(x0, [f"sleep {tmp_path / 'second'}"] * 4, terms)  # nobody collects
    identical(quick.ask(x0, hung, terms)(), alone.ask(x0, hung, terms)())
    assert (tmp_path / "second").exists() and "so it was killed" in warnings()[1]


def test_a_stopped_process_is_replaced(pool, alone, terms, warnings):
    x0, prompts, before = latents(4), ["a thing"] * 4, pid(pool.actors()[0])
    os.kill(before, signal.SIGSTOP)
    identical(replace(pool, deadline=4.0).ask(x0, prompts, terms)(), alone.ask(x0, prompts, terms)())
    assert pid(pool.actors()[0]) != before
    assert len(warnings()) == 1 and ": silent for 4 s, so it was killed; asked again" in warnings()[0]


def test_waiting_behind_another_caller_is_no_fault(pool, alone, terms, tmp_path, warnings, monkeypatch):
    """The deadline passes while the actor works for somebody else; when the caller has looked, that one is let go."""
    x0, before, looked, look = latents(4), pid(pool.actors()[0]), [], Call._look

    def seen(call):
        looked.append(look(call))
        (tmp_path / "go").touch()
        return looked[-1]

    monkeypatch.setattr(Call, "_look", seen)
    long = pool.ask(x0, [f"wait {tmp_path / 'go'}"] * 4, terms)
    identical(replace(pool, deadline=10.0).ask(x0, ["a thing"] * 4, terms)(), alone.ask(x0, ["a thing"] * 4, terms)())
    long()
    assert looked and warnings() == [] and pid(pool.actors()[0]) == before


def test_callers_that_lose_an_actor_together_all_get_their_answers(pool, alone, terms, tmp_path):
    """Three in one queue, and the first one's call kills the process."""
    x0, mark = latents(4), tmp_path / "died"
    questions = [[str(mark)] * 4, ["a thing"] * 4, ["a whole thing"] * 4]
    collects = [pool.ask(x0, prompts, terms) for prompts in questions]
    found: dict[int, object] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: collects[i]()})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for i, prompts in enumerate(questions):
        identical(found[i], alone.ask(x0, prompts, terms)())


def test_another_questions_answer_is_refused_and_repeated_failure_an_error(session, world, decode, warnings, monkeypatch):
    """All names in one order, all rows, the very call: else it is asked again. Its process dies at each attempt: the
    run stops, with all of it in one line."""
    experiment = world(held_out=["Calm"])
    x0, terms = latents(3), terms_of(experiment)
    with reward_pool(experiment, tiny_actors.Strange) as pool:
        answer = pool.ask(x0, ["a thing"] * 3, terms)()
        identical(answer, LocalRewards(make_rewards(experiment.rewards.names, decode, "cpu")).ask(x0, ["a thing"] * 3, terms)())
        refused = warnings()
        assert len(refused) == 3
        assert ": answered another, asked " in refused[0]
        assert ": answered for other than 3 samples; asked again (3 of 5)" in refused[1]
        assert ": answered for tiny.rewards:Calm, tiny.rewards:Broken, tiny.rewards:Red; " in refused[2]

        monkeypatch.setattr("diffinstruct.cluster.reward_call.ATTEMPTS", 3)  # a restart takes seconds
        with pytest.raises(RewardError) as error:
            pool.ask(x0, ["die"] * 3, terms)()
        assert len(warnings()) == 3 + 2
    said = str(error.value)
    assert "\n" not in said and said.startswith(
        "reward actor 0 (of 1 CPUs, 0 GPUs) failed 3 times in a row, asked to score 3 samples with tiny.rewards:Red, "
        "tiny.rewards:Broken, tiny.rewards:Calm: ActorUnavailableError: "
    )
    assert said.endswith(" (the cluster has 8 CPUs, 0 GPUs)")


@pytest.mark.long
def test_a_run_does_not_notice_what_befalls_its_actor(session, tmp_path):
    """The script's check, with few disturbances; and it does see a difference."""
    line, good = chaos(tmp_path, kills=1, stops=1)
    assert good, line
    journal = tmp_path / "wild" / "journal.jsonl"
    lines = journal.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"x0_gap"' in line)
    lines[at] = lines[at].replace('"x0_gap": ', '"x0_gap": 1')
    journal.write_text("\n".join(lines) + "\n")
    assert [place.split(" of ")[0] for place in compare(tmp_path / "calm", tmp_path / "wild")] == ["metrics"]


# -------------------------------------------------------------------------------------------- groups, validations
ODD = """
import os
from tiny.rewards import Red

class Odd(Red):
    def forward(self, images, prompts):
        return super().forward(images, prompts) * float(os.environ["FACTOR"])

class Pid(Red):
    def forward(self, images, prompts):
        return super().forward(images, prompts) * 0 + os.getpid()
"""


@pytest.fixture(scope="module")
def apart(session, world, tmp_path_factory):
    """(pool, its experiment): two rewards in an environment of their own, whose module nobody else can import."""
    folder = tmp_path_factory.mktemp("apart")
    (folder / "odd_rewards").mkdir()
    (folder / "odd_rewards" / "__init__.py").write_text(ODD)
    (folder / "odd.yaml").write_text("py_modules: [odd_rewards]\nenv_vars: {FACTOR: '3'}\n")
    odd = ("odd_rewards:Odd", "odd_rewards:Pid")
    experiment = world(
        {"rewards": {"environments": [{"rewards": odd[::-1], "runtime_env": "odd.yaml"}]}},
        [*TRAINED[:1], {"name": odd[0], "weight": 0.5}],
        ["Calm", odd[1]],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with reward_pool(experiment, tiny_actors.Polite) as pool:
            yield pool, experiment


def test_rewards_with_an_environment_of_their_own_have_their_own_process(apart, decode):
    pool, experiment = apart
    x0, prompts = latents(20), ["a thing"] * 20
    assert [group.rewards for group in pool.groups] == [
        ("tiny.rewards:Red", "tiny.rewards:Calm"), ("odd_rewards:Odd", "odd_rewards:Pid")
    ]  # fmt: skip
    answer = pool.ask(x0, prompts, terms_of(experiment))()
    assert tuple(answer.scores) == experiment.rewards.names
    torch.testing.assert_close(answer.scores["odd_rewards:Odd"], 3 * answer.scores["tiny.rewards:Red"])
    assert answer.scores["odd_rewards:Pid"].tolist() == [pid(pool.actors()[1])] * 20
    assert pid(pool.actors()[1]) != pid(pool.actors()[0])
    red = LocalRewards(make_rewards(["tiny.rewards:Red"], decode, "cpu")).ask(
        x0, prompts, RewardRequest({"tiny.rewards:Red": 2.5}, 16)
    )()
    torch.testing.assert_close(answer.gradient, red.gradient)  # 1 + 0.5 x 3

    alone = pool.ask(x0, prompts, RewardRequest({"odd_rewards:Odd": 1.0}, 5))()
    torch.testing.assert_close(alone.gradient, red.gradient * 3 / 2.5)
    assert alone.micro_batch == 5


def test_validations_are_made_once_and_reported_in_the_order_of_the_names(apart):
    pool, experiment = apart
    trained = [reward.name for reward in experiment.rewards.trained]
    reports = pool.validate(latents(4), ["a thing"] * 4, trained)
    assert [report.name for report in reports] == list(experiment.rewards.names)
    assert [report.faults[0] for report in reports] == [
        f"validation {i}, 4 images, trained {of}" for i, of in ((1, True), (1, True), (2, False), (2, False))
    ]
    assert pool.validate(latents(2), ["a thing"] * 2, trained) == reports


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"\[Errno 2\] No such file or directory: '[^']*mine.yaml', did you mean '[^']*mind.yaml'\?"),
        ("- pip", "should be a mapping, got list"),
        ("pip: [a", "while parsing a flow sequence .*"),
        ("env_var: {A: '1'}", "'env_var' is no field of a runtime environment, did you mean 'env_vars'\\?"),
        ("env_vars: {A: 1}", ".*env_vars.*"),
        ("pip: missing.txt", ".*missing.txt.*"),
        ("py_modules: [missing]", ".*missing.*"),
        ("conda: an-environment-that-nobody-has", "cannot be set up: .*conda.*"),
    ],
)  # fmt: skip
def test_a_bad_environment_is_said_in_one_line(session, world, tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mind.yaml").touch()
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    experiment = world({"rewards": {"environments": [{"rewards": ["tiny.rewards:Calm"], "runtime_env": str(file)}]}})
    with pytest.raises(UserError, match=rf"^cluster\.rewards\.environments: {file}: {said}$") as error, reward_pool(experiment):
        pass
    assert "\n" not in str(error.value)
