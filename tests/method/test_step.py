"""One alternating round on tiny networks: against one graph, in slices, resumed, and where it has to stop. No Ray."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffinstruct.config.experiment import Experiment
from diffinstruct.errors import UserError
from diffinstruct.method.diffusion import Schedule, uniform_t
from diffinstruct.method.distances import pseudo_huber
from diffinstruct.method.guidance import guided
from diffinstruct.method.noise import NoiseStreams, Stream
from diffinstruct.method.nonfinite import NonFiniteGradient
from diffinstruct.method.objectives import objective
from diffinstruct.method.rewards import LatentRewards, RewardError, RewardRequest, Scores
from diffinstruct.method.step import TIMESTEP_PARTS, StepConfig, TrainState, alternating_round
from diffinstruct.reward_service.client import make_rewards
from diffinstruct.run_folder.checkpoint import CheckpointStore
from diffinstruct.training.build import make_step_config as configured_settings
from diffinstruct.training.metric_window import MetricWindow

BATCH, SHAPE = 8, (2, 4, 4)
ALPHAS = torch.linspace(0.999, 0.05, 1000)
SCHEDULE = Schedule(ALPHAS, (1 - ALPHAS**2).sqrt())
PROMPTS = [f"prompt {i}" for i in range(BATCH)]
NULL = {"prompt_embeds": torch.zeros(1, 3)}
LAW = uniform_t(20, 980)


def chosen(name):
    args = {"alpha": 1.2} if name == "sid" else {}
    return objective(name, schedule=SCHEDULE, weighting="x0", distance=pseudo_huber(0.1), args=args)


class Network(nn.Module):
    """Two convolutions that see the noise level and the condition; a Denoiser, and with t left out a generator."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.enter, self.leave = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
            self.condition = nn.Linear(3, 8)

    def forward(self, x, *rest):
        *t, c = rest
        level = t[0].float().view(-1, 1, 1, 1) / 1000 if t else 0
        hidden = self.enter(x) + self.condition(c["prompt_embeds"]).view(len(x), 8, 1, 1) + level
        return x + self.leave(torch.tanh(hidden))


def decode(latents):
    return torch.sigmoid(nn.functional.interpolate(latents.mean(1, keepdim=True).expand(-1, 3, -1, -1), scale_factor=2))


def contrast(images, prompts):
    weight = torch.tensor([1.0 + int(prompt.split()[-1]) for prompt in prompts])
    return weight * images.flatten(1).var(1)


def brightness(images, prompts):
    return images.flatten(1).mean(1)


def make_train_state(adam=True):
    generator, score_network = Network(1), Network(2)
    optimizer = torch.optim.AdamW if adam else torch.optim.SGD
    return TrainState(
        generator=generator,
        score_network=score_network,
        reference=guided(Network(3).requires_grad_(False), NULL, 1.5, "in"),
        ema=copy.deepcopy(generator).requires_grad_(False),
        generator_optimizer=optimizer(generator.parameters(), 1e-2 if adam else 0.0),
        score_optimizer=optimizer(score_network.parameters(), 1e-2 if adam else 0.0),
    )


def make_step_config(**changes):
    settings = {
        "objective": chosen("di_star"), "regularization_weight": 0.7, "reward_scale": 30.0, "score_updates": 1,
        "reuse_sample": True, "score_weighting": "eps", "timestep_distribution": LAW,
        "generator_max_grad_norm": 1e9, "score_max_grad_norm": 1e9,
        "ema_decay": 0.9, "precision": "fp32", "micro_batch_size": None,
    }  # fmt: skip
    return StepConfig(**settings | changes)


def condition(rows=slice(0, BATCH)):
    return {"prompt_embeds": torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(9))[rows]}


REWARDS = LatentRewards(decode, {"contrast": contrast, "brightness": brightness})
TERMS = RewardRequest({"contrast": 1.0, "brightness": -0.5}, micro_batch=3)


def sender(rewards, terms):
    def send(latents, prompts):
        answer = rewards(latents, prompts, terms)
        return lambda: answer

    return send


def round_(train_state, settings=None, step=0, rows=slice(0, BATCH), send=sender(REWARDS, TERMS)):  # noqa: B008
    draws = NoiseStreams(0, step, SHAPE, rows, torch.device("cpu"))
    return alternating_round(train_state, settings or make_step_config(), SCHEDULE, draws, PROMPTS[rows], condition(rows), send)


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["di_star", "diff_instruct_pp", "sid", "dmd"])
def test_the_generators_gradient_is_that_of_one_graph(name):
    """Decoder, rewards, score network, reference and generator in one graph, against the leaves of the round."""
    train_state, settings = make_train_state(), make_step_config(score_updates=2, objective=chosen(name))
    generator = copy.deepcopy(train_state.generator)
    round_(train_state, settings)

    draws, c = NoiseStreams(0, 0, SHAPE, slice(0, BATCH), torch.device("cpu")), condition()
    x0 = generator(draws.normal(Stream.GENERATOR_Z), c)
    t, eps = draws.t(Stream.REGULARIZER_T, LAW), draws.normal(Stream.REGULARIZER_EPS)
    loss, _ = settings.objective(x0, t, eps, c, score_network=train_state.score_network, reference=train_state.reference)
    images = decode(x0)
    reward = contrast(images, PROMPTS) - 0.5 * brightness(images, PROMPTS)
    (0.7 * loss - 30.0 * reward).mean().backward()

    for ours, exact in zip(train_state.generator.parameters(), generator.parameters(), strict=True):
        assert (ours.grad - exact.grad).norm() <= 1e-5 * exact.grad.norm()
        assert exact.grad.norm() > 0


def test_two_halves_average_to_the_whole():
    """Noise, t and prompts belong to a sample's index in the global batch; networks that stand still keep the halves
    equal."""
    whole, left, right = (make_train_state(adam=False) for _ in range(3))
    settings = make_step_config(reuse_sample=False, score_updates=2)
    metrics = [
        round_(train_state, settings, rows=rows)
        for train_state, rows in [(whole, slice(0, 8)), (left, slice(0, 4)), (right, slice(4, 8))]
    ]
    for network in ("generator", "score_network"):
        parameters = (getattr(train_state, network).parameters() for train_state in (whole, left, right))
        for all_, first, second in zip(*parameters, strict=True):
            assert (all_.grad - (first.grad + second.grad) / 2).norm() <= 1e-5 * all_.grad.norm()
    for key in ("loss/regularizer", "loss/score_network", "x0_gap", "reward/contrast"):
        assert metrics[0][key] == pytest.approx((metrics[1][key] + metrics[2][key]) / 2, rel=1e-5)
    draws = NoiseStreams(3, 5, SHAPE, slice(0, BATCH), torch.device("cpu"))
    half = NoiseStreams(3, 5, SHAPE, slice(4, 8), torch.device("cpu"))
    assert draws.prompts(1000)[4:] == half.prompts(1000)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_add_up_to_the_whole(size, reuse):
    """Of 3 the last one is smaller; every number and both gradients are those of all samples at once."""
    whole, parts = make_train_state(adam=False), make_train_state(adam=False)
    sizes = {"generator": [], "score_network": []}
    for name, seen in sizes.items():
        getattr(parts, name).register_forward_pre_hook(lambda module, arguments, seen=seen: seen.append(len(arguments[0])))
    settings = make_step_config(reuse_sample=reuse, score_updates=2)
    of_whole, of_parts = round_(whole, settings), round_(parts, replace(settings, micro_batch_size=size))
    for network, seen in sizes.items():
        assert set(seen) == ({1} if size == 1 else {3, 2})
        for one, other in zip(getattr(whole, network).parameters(), getattr(parts, network).parameters(), strict=True):
            assert (one.grad - other.grad).norm() <= 1e-5 * one.grad.norm()
            assert one.grad.norm() > 0
    assert len(sizes["generator"]) == (2 if reuse else 4) * -(-BATCH // size)
    assert of_parts.keys() == of_whole.keys()
    assert of_parts == pytest.approx(of_whole | {key: of_parts[key] for key in of_parts if key.startswith("time/")}, rel=1e-4)


def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path):
    """Six rounds in one go against three, a checkpoint on disk, other networks, and three more."""
    straight, before, after = make_train_state(), make_train_state(), make_train_state()
    losses = [round_(straight, step=step)["loss/regularizer"] for step in range(6)]
    for step in range(3):
        round_(before, step=step)
    store = CheckpointStore(tmp_path)
    store.save(3, before.state_dict())
    step, state = CheckpointStore(tmp_path).latest()
    assert step == 3
    round_(after, step=0)  # whatever the process did before is forgotten
    after.load_state_dict(state)
    assert [round_(after, step=step)["loss/regularizer"] for step in range(3, 6)] == losses[3:]
    for role in ("generator", "score_network", "ema"):
        assert equal(weights(getattr(straight, role)), weights(getattr(after, role)))
    for optimizer in ("generator_optimizer", "score_optimizer"):
        ours, theirs = (getattr(train_state, optimizer).state_dict()["state"] for train_state in (straight, after))
        assert len(ours) == 6
        assert all(torch.equal(ours[i][key], theirs[i][key]) for i in ours for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize(("updates", "reuse"), [(1, True), (3, True), (3, False)])
def test_the_score_network_is_updated_k_times_on_the_same_or_on_fresh_samples(updates, reuse):
    train_state, updated, noises, sent = make_train_state(), [], [], []
    train_state.score_optimizer.register_step_post_hook(lambda *_: updated.append(1))
    train_state.generator.register_forward_pre_hook(lambda module, arguments: noises.append(arguments[0]))
    train_state.score_network.register_forward_pre_hook(lambda module, arguments: sent.append(arguments[:2]))
    round_(train_state, make_step_config(score_updates=updates, reuse_sample=reuse))
    assert len(updated) == updates
    assert len(noises) == (1 if reuse else 1 + updates)
    assert all(not torch.equal(noises[i], noises[j]) for i in range(len(noises)) for j in range(i))
    assert len(sent) == updates + 1  # and once more, in the objective
    assert all(not torch.equal(sent[i][1], sent[j][1]) for i in range(len(sent)) for j in range(i))  # t of its own


def test_rewards_alone_train_without_score_network_and_reference():
    train_state, alone = make_train_state(), make_train_state()
    alone.score_network = alone.score_optimizer = alone.reference = None
    before = weights(train_state.score_network)
    metrics = round_(train_state, make_step_config(objective=None))
    assert equal(before, weights(train_state.score_network))
    assert "x0_gap" not in metrics and metrics["gradient_norm/generator"] > 0
    round_(alone, make_step_config(objective=None))
    assert equal(weights(train_state.generator), weights(alone.generator))
    assert set(alone.state_dict()) == {"generator", "ema", "generator_optimizer"}


def test_a_round_without_rewards_is_one_whose_rewards_have_no_gradient():
    def no_pull(latents, prompts):
        return lambda: Scores({}, torch.zeros_like(latents), 0.0, len(latents))

    states = [make_train_state() for _ in range(2)]
    silent, asked = (round_(state, send=send) for state, send in zip(states, (None, no_pull), strict=True))
    assert equal(weights(states[0].generator), weights(states[1].generator))
    assert silent["gradient_norm/sample_reward"] == 0 and "time/reward" not in silent and "time/reward" in asked


def test_the_gap_is_told_apart_by_timestep():
    """Of two rounds with unequal numbers of samples in each part: the mean over all samples that fell into it."""
    window, parts = MetricWindow([], BATCH), dict[str, list[float]]()
    for step in range(2):
        gaps: list[tuple[torch.Tensor, torch.Tensor]] = []
        config = make_step_config(micro_batch_size=3)
        inner = config.objective

        def noted(x0, t, eps, c, *, inner=inner, gaps=gaps, **networks):
            loss, record = inner(x0, t, eps, c, **networks)
            gaps.append((t, record["x0_gap"]))
            return loss, record

        window.add(round_(make_train_state(), replace(config, objective=noted), step=step))
        for t, gap in ((t, gap) for ts, values in gaps for t, gap in zip(ts.tolist(), values.tolist(), strict=True)):
            parts.setdefault(TIMESTEP_PARTS[4 * t // 1000], []).append(gap)
    mean = window.mean()
    assert len({len(values) for values in parts.values()}) > 1
    said = {key.removeprefix("x0_gap_by_t/"): value for key, value in mean.items() if key.startswith("x0_gap_by_t/")}
    assert said == pytest.approx({part: sum(values) / len(values) for part, values in parts.items()})
    assert not any(key.startswith("timestep_share/") for key in mean)


def test_a_part_of_the_schedule_without_samples_has_no_gap():
    window = MetricWindow([], BATCH)
    window.add(round_(make_train_state(), make_step_config(timestep_distribution=uniform_t(260, 500))))
    assert {key for key in window.mean() if key.startswith("x0_gap_by_t/")} == {"x0_gap_by_t/t_low"}


def test_a_gradient_that_is_not_finite_stops_the_round_before_the_update():
    def spoiled(latents, prompts):
        scores = REWARDS(latents, prompts, TERMS)
        gradient = scores.gradient.clone()
        gradient[2, 0, 1, 1] = float("nan")
        return lambda: replace(scores, gradient=gradient)

    train_state = make_train_state()
    before, averaged = weights(train_state.generator), weights(train_state.ema)
    with pytest.raises(NonFiniteGradient, match=r"step 4: the generator's gradient is not finite"):
        round_(train_state, step=4, send=spoiled)
    assert equal(before, weights(train_state.generator)) and equal(averaged, weights(train_state.ema))
    assert not train_state.generator_optimizer.state

    train_state = make_train_state()
    with torch.no_grad():
        train_state.score_network.leave.weight.mul_(1e30)
    before, start = weights(train_state.score_network), weights(train_state.generator)
    with pytest.raises(NonFiniteGradient, match="score network"):
        round_(train_state)
    assert equal(before, weights(train_state.score_network)) and equal(start, weights(train_state.generator))


def test_a_held_out_reward_is_measured_and_never_pulls():
    seen = []

    def judge(images, prompts):
        seen.append(images.requires_grad)
        return 1000 * images.flatten(1).mean(1)

    terms = RewardRequest({"contrast": 1.0}, 16)
    alone, judged = make_train_state(), make_train_state()
    round_(alone, send=sender(LatentRewards(decode, {"contrast": contrast}), terms))
    metrics = round_(judged, send=sender(LatentRewards(decode, {"judge": judge, "contrast": contrast}), terms))
    assert equal(weights(alone.generator), weights(judged.generator))
    assert metrics["reward/judge"] > 0 and seen == [False]


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (5, 6 / 15), (1000, 0.9)])
def test_the_average_follows_its_formula(step, decay):
    """ema <- d ema + (1 - d) generator, with d warmed up as min(decay, (1 + step) / (10 + step))."""
    train_state = make_train_state()
    before = weights(train_state.ema)
    round_(train_state, step=step)
    for name, now in train_state.generator.state_dict().items():
        torch.testing.assert_close(train_state.ema.state_dict()[name], decay * before[name] + (1 - decay) * now)
        assert not torch.equal(before[name], now)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"t_max": 1001}, r"objective.t_max: got 1001, the reference's schedule has 1000 steps"),
        ({"distance": "nowhere:pair"}, r"objective.distance: 'nowhere:pair' is no pair \(d, d'\): No module named 'nowhere'"),
        ({"distance": "tiny.rewards:pear"}, r"objective.distance: 'tiny.rewards:pear' is no pair .* has no attribute 'pear'"),
        ({"distance": "tiny.rewards:Red"}, r"objective.distance: 'tiny.rewards:Red' is no pair .*"),
        ({"distance": ":pair"}, r"objective.distance: ':pair' is no pair \(d, d'\): Empty module name"),
        ({"distance": "broken:pair"}, r"objective.distance: 'broken:pair' is no pair \(d, d'\): not now"),
    ],
)
def test_settings_refuse_what_only_the_schedule_and_the_import_can_tell(objective, said, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise RuntimeError('not\\nnow')\n")
    monkeypatch.syspath_prepend(tmp_path)
    content = Experiment().model_dump()
    content["objective"] |= {"distance_args": {}} | objective
    with pytest.raises(UserError, match=f"^{said}$"):
        configured_settings(Experiment.model_validate(content), SCHEDULE)


def test_what_a_reward_writes_into_its_images_no_other_sees():
    def vandal(images, prompts):
        images[0] = 0
        return images.flatten(1).mean(1)

    x0 = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))
    models = {"vandal": vandal, "contrast": contrast, "late": vandal, "brightness": brightness}
    beside = LatentRewards(decode, models)(x0, PROMPTS, RewardRequest({"vandal": 0.0, "contrast": 1.0}, 16))
    honest = {name: models[name] for name in ("contrast", "brightness")}
    alone = LatentRewards(decode, honest)(x0, PROMPTS, RewardRequest({"contrast": 1.0}, 16))
    assert torch.equal(alone.gradient, beside.gradient)
    assert all(torch.equal(alone.scores[name], beside.scores[name]) for name in alone.scores)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda images, prompts: images.detach().flatten(1).mean(1), "its scores carry no gradient to the images, so"),
        (lambda images, prompts: [0.0] * len(prompts), r"returned a list, expected a tensor \[8\]"),
        (lambda images, prompts: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda images, prompts: images.mean(), r"8 images got scores of shape \[\], expected \[8\]"),
    ],
)
def test_a_reward_that_errs_is_named(reward, said):
    rewards = LatentRewards(decode, {"mine": reward})
    with pytest.raises(RewardError, match=f"^reward mine: {said}"):
        rewards(torch.zeros(BATCH, *SHAPE), PROMPTS, RewardRequest({"mine": 1.0}, 16))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tiny.rewards:steps_done", r"cannot load 'tiny.rewards:steps_done': ValueError: .* a class or a function without"),
        ("nowhere:Reward", "cannot load 'nowhere:Reward': ModuleNotFoundError: No module named 'nowhere'"),
        ("os:getcwd", "'os:getcwd' makes a str, which is not callable"),
    ],
)
def test_a_reward_that_cannot_be_made_is_said_before_the_first_step(name, said):
    with pytest.raises(UserError, match=f"^rewards: {said}"):
        make_rewards([name], decode, "cpu")


# ------------------------------------------------------------------------------------------------- terms and memory
class Tower:
    """Sees the mean colour, and counts how often it looks; takes no more than `room` pictures at once."""

    def __init__(self, room=100):
        self.room, self.looks = room, 0

    def features(self, images):
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.looks += 1
        return images.mean((2, 3))


class Headed:
    def __init__(self, tower, channel):
        self.tower, self.channel = tower, channel

    def head(self, features, prompts):
        return features[:, self.channel].exp()

    def __call__(self, images, prompts):
        return self.head(self.tower.features(images), prompts)


def test_a_tower_is_looked_through_once_and_changes_no_bit():
    x0 = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))
    tower, terms = Tower(), RewardRequest({"a": 1.0, "b": -2.0}, 3)
    shared = LatentRewards(decode, {name: Headed(tower, i) for i, name in enumerate("abc")})(x0, PROMPTS, terms)
    assert tower.looks == 3  # micro-batches of 3, 3 and 2
    apart = LatentRewards(decode, {name: Headed(Tower(), i) for i, name in enumerate("abc")})(x0, PROMPTS, terms)
    assert all(torch.equal(shared.scores[name], apart.scores[name]) for name in "abc")
    torch.testing.assert_close(shared.gradient, apart.gradient)
    assert shared.gradient.norm() > 0


def test_a_weight_of_nothing_asks_for_scores_alone():
    x0 = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))
    scores, both = REWARDS(x0, PROMPTS, RewardRequest({}, 3)), REWARDS(x0, PROMPTS, TERMS)
    assert not scores.gradient.any() and both.gradient.any()
    assert all(torch.equal(scores.scores[name], both.scores[name]) for name in both.scores)
    with pytest.raises(RewardError, match=r"^reward glare: asked for, but there are contrast, brightness$"):
        REWARDS(x0, PROMPTS, RewardRequest({"glare": 1.0}, 3))


def test_where_memory_ends_the_micro_batch_is_halved_and_said():
    x0 = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))
    narrow = LatentRewards(decode, {"a": Headed(Tower(room=2), 0)})(x0, PROMPTS, RewardRequest({"a": 1.0}, 16))
    wide = LatentRewards(decode, {"a": Headed(Tower(), 0)})(x0, PROMPTS, RewardRequest({"a": 1.0}, 2))
    assert (narrow.micro_batch, wide.micro_batch) == (2, 2)
    assert torch.equal(narrow.gradient, wide.gradient) and torch.equal(narrow.scores["a"], wide.scores["a"])
    with pytest.raises(RewardError, match=r"^rewards a: out of memory with one sample$"):
        LatentRewards(decode, {"a": Headed(Tower(room=0), 0)})(x0, PROMPTS, RewardRequest({"a": 1.0}, 16))


@pytest.mark.parametrize("more", [{}, {"reuse_sample": False, "score_updates": 2}, {"objective": None}], ids=str)
def test_the_streams_that_are_drawn_ahead_are_those_that_a_round_draws(more, monkeypatch):
    drawn, normal = [], NoiseStreams.normal
    monkeypatch.setattr(NoiseStreams, "normal", lambda self, stream: (drawn.append(stream), normal(self, stream))[1])
    settings = make_step_config(**more)
    round_(make_train_state(), settings)
    assert sorted(drawn) == sorted(settings.normal_streams)
