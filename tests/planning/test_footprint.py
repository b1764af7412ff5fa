"""The cost of a round, counted by torch on the pocket world's U-Net, in forward passes of it (F).

Generator: forward and backward 3. Score network: 3 an update, on a reused sample. Regularizer, guided: three forwards,
and, where gradient flows through the networks to their inputs, three backwards of that alone: 6, or 3 for KL.
"""

from functools import partial

import pytest
import torch
from tiny import pipelines
from torch.utils.flop_counter import FlopCounterMode

from diffinstruct.config.experiment import Experiment
from diffinstruct.method.noise import NoiseStreams
from diffinstruct.method.nonfinite import FiniteCheck
from diffinstruct.method.rewards import Scores
from diffinstruct.method.step import Round, alternating_round, unwrapped
from diffinstruct.models.denoiser import NetworkDenoiser
from diffinstruct.models.pipeline import load_reference
from diffinstruct.models.roles import make_roles
from diffinstruct.planning.footprint import Passes, training_footprint
from diffinstruct.training.build import make_step_config, make_train_state

BATCH = 2
PROMPTS = ["a tulip in a yellow pot", "a pink round critter"]


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def nobody(latents, prompts):
    return lambda: Scores({}, torch.zeros_like(latents), 0.0, 16)


@pytest.fixture(scope="module")
def reference():
    return load_reference("pocket")


SLOW = [("di_star", 3.0, "out", 9), ("sid", 3.0, "in", 9), ("diff_instruct_pp", 3.0, "in", 6), ("dmd", 3.0, "in", 6)]
CASES = [
    ("di_star", 3.0, "in", 9),
    ("reward_only", 3.0, "in", 3),
    ("diff_instruct_pp", 3.0, "out", 6),
    ("di_star", 1.0, "in", 7),
    *(pytest.param(*case, marks=pytest.mark.long) for case in SLOW),
]


@pytest.mark.parametrize(("name", "guidance_scale", "where", "forwards"), CASES)
def test_a_round_costs_what_the_arithmetic_says(reference, monkeypatch, name, guidance_scale, where, forwards):
    content = Experiment().model_dump()
    content["objective"]["name"] = name
    content["reference"] |= {"guidance_scale": guidance_scale, "guidance": where}
    experiment = Experiment.model_validate(content)
    train_state = make_train_state(
        experiment, make_roles(experiment, reference), reference.null_conditions(), lambda module: module
    )
    settings = make_step_config(experiment, reference.schedule)
    draws = NoiseStreams(0, 0, reference.latent_shape, slice(0, BATCH), torch.device("cpu"))
    c = reference.encode_prompts(PROMPTS)
    sample = draws.normal(0)
    with torch.no_grad():
        one = counted(lambda: unwrapped(train_state.generator).denoiser(sample, torch.tensor([5, 500]), c))
    this = Round(train_state, settings, reference.schedule, draws, c, FiniteCheck(PROMPTS))
    update = partial(this.update_score_network, sample, 0)
    score = counted(update) if settings.objective else 0
    rows: list[int] = []
    forward = NetworkDenoiser.forward
    monkeypatch.setattr(NetworkDenoiser, "forward", lambda self, xt, *rest: (rows.append(len(xt)), forward(self, xt, *rest))[1])
    whole = counted(lambda: alternating_round(train_state, settings, reference.schedule, draws, PROMPTS, c, nobody))
    if settings.objective:
        assert 2.9 * one <= score <= 3 * 1.03 * one
        both = BATCH * (1 + (guidance_scale > 1))
        assert rows == [BATCH, BATCH, BATCH, both]  # generator, score update, score network, reference: both prompts at once
    assert 0.97 * forwards * one <= whole - score <= 1.03 * forwards * one


# ------------------------------------------------------------------------------------------ passes
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(an experiment on the tiny pipeline, its reference)"""
    experiment = pipelines.experiment(tmp_path_factory.mktemp("tiny"))
    return experiment, load_reference(experiment.reference.model)


def passes_of(tiny, name, guidance_scale=3.0, where="in", **more):
    content = tiny[0].model_dump() | {"global_batch_size": BATCH}
    content["objective"]["name"] = name
    content["reference"] |= {"guidance_scale": guidance_scale, "guidance": where}
    content["score_network"] |= more
    return training_footprint(Experiment.model_validate(content), tiny[1]).passes


@pytest.mark.parametrize(
    ("name", "guidance_scale", "where", "forwards", "more"),
    [
        ("di_star", 3.0, "in", 9, {}),
        ("diff_instruct_pp", 3.0, "out", 6, {}),
        ("di_star", 1.0, "in", 7, {}),
        ("reward_only", 3.0, "in", 3, {}),
        ("di_star", 3.0, "in", 9, {"updates_per_step": 3, "reuse_sample": False}),
        *(pytest.param(*case, {}, marks=pytest.mark.long) for case in SLOW),
    ],
)
def test_passes_are_counted_as_the_arithmetic_says(tiny, name, guidance_scale, where, forwards, more):
    """The table of `check`, derived by hand. Gradient through the networks' inputs: not for the KL family."""
    updates = more.get("updates_per_step", 1) if name != "reward_only" else 0
    prompts = (1 + (guidance_scale != 1)) * (updates > 0)  # conditional and null
    through = int(name in ("di_star", "sid"))
    fresh = updates if more else 0
    passes = passes_of(tiny, name, guidance_scale, where, **more)
    assert passes["generator"] == Passes(1 + fresh, 1, 1)
    assert passes.get("score network", Passes()) == Passes(updates + (updates > 0), updates + through, updates)
    assert passes.get("reference", Passes()) == Passes(prompts, prompts * through, 0)
    assert sum(each.work for each in passes.values()) == forwards + 3 * updates + fresh


OWN = """
import torch

def gap(x0, t, eps, c, *, score_network, reference, schedule):
    xt = schedule.diffuse(x0, t, eps)
    f, (r, _) = score_network(xt, t, c), reference(xt, t, c)
    return ((f - r) ** 2).flatten(1).sum(1), {"x0_gap": (f - r).detach().pow(2).flatten(1).mean(1)}

def constant(x0, t, eps, c, *, score_network, reference, schedule):
    with torch.no_grad():
        loss, record = gap(x0, t, eps, c, score_network=score_network, reference=reference, schedule=schedule)
    return loss + (x0 ** 2).flatten(1).sum(1), record
"""


@pytest.mark.parametrize(("name", "through"), [("gap", 1), ("constant", 0)])
def test_gradient_through_the_networks_is_counted_for_an_own_objective_too(tiny, tmp_path, monkeypatch, name, through):
    module = f"own_{name}"  # each test imports its own
    (tmp_path / f"{module}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    passes = passes_of(tiny, f"{module}:{name}")
    assert passes["score network"] == Passes(2, 1 + through, 1)
    assert passes["reference"] == Passes(2, 2 * through, 0)


def test_a_micro_batch_sends_the_generator_forward_again(tiny):
    experiment = tiny[0].model_copy(update={"micro_batch_size": 1})
    assert training_footprint(experiment, tiny[1]).passes["generator"] == Passes(2, 1, 1)


def test_later_updates_of_the_score_network_cost_what_the_second_does(tiny):
    """Two are counted, whatever the number; each has a sample of its own here."""

    def of_updates(number):
        content = tiny[0].model_dump()
        content["score_network"] |= {"updates_per_step": number, "reuse_sample": False}
        return training_footprint(Experiment.model_validate(content), tiny[1])

    one, two, five = (of_updates(number) for number in (1, 2, 5))
    assert two.flops - one.flops == (five.flops - one.flops) / 4 > 0
    assert one.peak + 8 == two.peak == five.peak  # the first one's loss is kept until the second one's is there
