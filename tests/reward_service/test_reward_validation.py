"""Rewards that lie, each refused by the check that is there for it, and honest ones that pass."""

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import clip as tiny_clip
from tiny import rewards as tiny_rewards
from torch import nn

import reward_models
from diffinstruct.config.prompts import read_prompts
from diffinstruct.method.rewards import LatentRewards, RewardError
from diffinstruct.models.pipeline import load_reference
from diffinstruct.reward_service.client import load_reward
from diffinstruct.reward_service.reward_validation import FEW, Report, pictures_for, raise_on_faults, validate_reward

N = 64
PICTURES = F.interpolate(torch.rand(N, 3, 5, 5, generator=torch.Generator().manual_seed(0)), (20, 16), mode="bilinear")
PROMPTS = [f"{i:02d}" + " cat" * (i % 5) for i in range(N)]  # in alphabetical order, of five lengths


def honest(images, prompts):
    """Redder, for longer prompts more so: looks at both, bends, and has a gradient everywhere."""
    wanted = torch.tensor([1 + len(prompt) / 10 for prompt in prompts]).to(images)
    return wanted * (images[:, 0] ** 2 - images[:, 2]).flatten(1).mean(1) - (images[:, 1, ::2] ** 3).flatten(1).mean(1)


def lying_gradient(images, prompts, surrogate):
    """The honest score, and the gradient of another."""
    return honest(images, prompts).detach() + surrogate - surrogate.detach()


# ------------------------------------------------------------------------------------------------------- the lies
def column(images, prompts):
    return honest(images, prompts)[:, None]


def one_for_all(images, prompts):
    return honest(images, prompts).sum()


def too_few(images, prompts):
    return honest(images, prompts)[1:]


def whole_numbers(images, prompts):
    return (100 * honest(images, prompts)).long()


def an_array(images, prompts):
    return honest(images, prompts).detach().numpy()


def a_list(images, prompts):
    return honest(images, prompts).tolist()


def raises(images, prompts):
    raise KeyError("weights")


def wants_normalised(images, prompts):
    if images.min() >= 0:
        raise ValueError("expected images in [-1, 1]")
    return honest(images, prompts)


def nan_for_some(images, prompts):
    return honest(images, prompts).where(torch.tensor(["17" not in prompt for prompt in prompts]), torch.nan)


def infinite(images, prompts):
    return 1 / (honest(images, prompts) * 0)


def swallows_errors(images, prompts):
    try:
        return honest(images, [prompt["text"] for prompt in prompts])
    except TypeError:
        return images.sum((1, 2, 3)) * 0


def noise(images, prompts):
    return honest(images, prompts) + 0.01 * torch.randn(len(images))


def python_noise(images, prompts):
    return honest(images, prompts) + 0.01 * random.random()


def noise_of_its_own(images, prompts):
    return honest(images, prompts) + torch.from_numpy(np.random.default_rng().normal(size=len(images)) / 100)


class Drifts(nn.Module):
    calls = 0

    def forward(self, images, prompts):
        self.calls += 1
        return honest(images, prompts) + 1e-4 * self.calls


class Compares(nn.Module):
    """With the pictures before these."""

    def __init__(self):
        super().__init__()
        self.now = self.before = torch.zeros(())

    def forward(self, images, prompts):
        mean = images.detach().mean()
        if mean != self.now:
            self.before, self.now = self.now, mean
        return honest(images, prompts) - self.before


def normalises_in_place(images, prompts):
    return honest(images.sub_(0.5).div_(0.25), prompts)


def eats_its_prompts(images, prompts):
    scores = honest(images, prompts)
    prompts.reverse()
    return scores


class Tower(nn.Module):
    def features(self, images):
        return torch.cat([(images**2).mean((2, 3)), images.mean((2, 3))], 1)


class Towered(nn.Module):
    """Tower and head, and itself their composition."""

    def __init__(self):
        super().__init__()
        self.tower = Tower()

    def head(self, features, prompts):
        return features[:, 0] - features[:, 5] + features[:, 1] * torch.tensor([len(prompt) / 10 for prompt in prompts])

    def forward(self, images, prompts):
        return self.head(self.tower.features(images), prompts)


class TwoFaced(Towered):
    def forward(self, images, prompts):
        return 1 - super().forward(images, prompts)


class RandomHead(Towered):
    """In a run, which asks tower and head apart; asked as a whole it is steady."""

    def head(self, features, prompts):
        return super().head(features, prompts) + 0.1 * torch.randn(len(features))

    def forward(self, images, prompts):
        return super().head(self.tower.features(images), prompts)


def minus_the_batch(images, prompts):
    scores = honest(images, prompts)
    return scores - scores.mean() / 2


def first_prompt_for_all(images, prompts):
    return honest(images, prompts[:1] * len(prompts))


def backwards(images, prompts):
    return honest(images, prompts).flip(0)


def a_share_of_the_batch(images, prompts):
    return honest(images, prompts) / len(images)


def squeezes(images, prompts):
    return honest(images, prompts)[:, None].squeeze()


def groups_by_prompt(images, prompts):
    return honest(images, prompts)[sorted(range(len(prompts)), key=prompts.__getitem__)]


class KeepsByPrompt(nn.Module):
    def __init__(self):
        super().__init__()
        self.kept = {}

    def forward(self, images, prompts):
        for prompt, score in zip(prompts, honest(images, prompts), strict=True):
            self.kept.setdefault(prompt, score.detach())
        return torch.stack([self.kept[prompt] for prompt in prompts])


def blind(images, prompts):
    return torch.tensor([float(len(prompt)) for prompt in prompts])


def detached(images, prompts):
    return honest(images.detach(), prompts)


class DetachedButTrainable(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images, prompts):
        return self.scale * honest(images.detach(), prompts)


def zero_gradient(images, prompts):
    return lying_gradient(images, prompts, 0 * honest(images, prompts))


def nan_gradient(images, prompts):
    return honest(images, prompts) + (images[:, 0, 0, 0] * 0).sqrt() * 0


def leaks(images, prompts):
    scores = honest(images, prompts)
    return lying_gradient(images, prompts, scores + scores.mean())


class _OfUnitNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        return images.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def normalises_its_gradient(images, prompts):
    return honest(_OfUnitNorm.apply(images), prompts)


class _NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        return images.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("no\nkernel")


def no_way_back(images, prompts):
    return honest(_NoWayBack.apply(images), prompts)


def nan_gradient_on_black(images, prompts):
    return honest(images, prompts) + images[:, 0].flatten(1).var(1).sqrt()


def endless_on_white(images, prompts):
    return honest(images, prompts) + (1 - images.flatten(1).mean(1)).log()


def wrong_sign(images, prompts):
    return lying_gradient(images, prompts, -honest(images, prompts))


def twice_the_gradient(images, prompts):
    return lying_gradient(images, prompts, 2 * honest(images, prompts))


def upside_down_gradient(images, prompts):
    """As if the picture had been flipped back for the score only."""
    return lying_gradient(images, prompts, honest(images.roll(1, 1), prompts))


def half_a_gradient(images, prompts):
    """A term computed without gradient, as under no_grad or in numpy."""
    return honest(images, prompts) + images.detach()[:, 2, :10].flatten(1).mean(1) ** 2


def only_every_other(images, prompts):
    rows = [image if i % 2 == 0 else image.detach() for i, image in enumerate(images)]
    return honest(torch.stack(rows), prompts)


def other_with_gradient(images, prompts):
    return honest(images, prompts) + 5 * torch.is_grad_enabled()


def nowhere(images, prompts):
    return torch.empty(len(prompts), device="meta")


def a_script(images, prompts):
    raise SystemExit(0)


def opinion_of_few(images, prompts):
    """Has something to say of nearly white pictures alone."""
    return (images.flatten(1).mean(1) > 0.97).float()


OF_ANY = [  # lie, the check that refuses it, its line
    (column, "answers", r"4 images got scores of shape \[4, 1\], expected \[4\]"),
    (one_for_all, "answers", r"4 images got scores of shape \[\], expected \[4\]"),
    (too_few, "answers", r"4 images got scores of shape \[3\], expected \[4\]"),
    (whole_numbers, "answers", r"scores of torch.int64, expected floating point"),
    (an_array, "answers", r"returned a ndarray, expected a tensor \[4\]"),
    (a_list, "answers", r"returned a list, expected a tensor \[4\]"),
    (raises, "answers", r"KeyError: 'weights'"),
    (wants_normalised, "answers", r"ValueError: expected images in \[-1, 1\]"),
    (a_script, "answers", r"SystemExit: 0"),
    (nowhere, "answers", r"its scores are on the meta device, they have no values"),
    (infinite, "answers", r"4 of 4 scores are not finite"),
    (nan_for_some, "score_range", r"1 of 16 scores are not finite"),
    (swallows_errors, "score_range", r"the same score 0 for 64 different pictures: it tells nothing apart"),
    (noise, "repetition", r"its scores are random: asked twice, they differ by 0.0\d+ \(is it in eval mode\?\)"),
    (python_noise, "repetition", r"its scores are random: .*"),
    (RandomHead(), "repetition", r"its scores are random: .*"),
    (noise_of_its_own, "repetition", r"asked twice, it gave scores that differ .*: it remembers, or draws random numbers .*"),
    (Drifts(), "repetition", r"asked twice, it gave scores that differ by 0.0001: it remembers, or draws .*"),
    (Compares(), "repetition", r"asked about other pictures in between, it gave scores that differ by .*: it remembers"),
    (normalises_in_place, "inputs_unchanged", r"it writes into the pictures that it is given"),
    (eats_its_prompts, "inputs_unchanged", r"it changes the list of prompts that it is given"),
    (TwoFaced(), "inputs_unchanged", r"its head on its tower's features gives scores that differ by .* from its own"),
    (minus_the_batch, "neighbours", r"a picture's score depends on its neighbours' pictures in the batch, by 0.\d+"),
    (first_prompt_for_all, "neighbours", r"a picture's score depends on its neighbours' prompts in the batch, by 0.\d+"),
    (backwards, "neighbours", r"its answers are not in the order of the pictures"),
    (a_share_of_the_batch, "neighbours", r"a picture alone gets another score than in a batch, by 0.\d+"),
    (squeezes, "neighbours", r"1 images got scores of shape \[\], expected \[1\]"),
    (groups_by_prompt, "order", r"in another order, the same pictures and prompts get scores that differ by 0.\d+"),
    (
        KeepsByPrompt(),
        "depends_on_picture",
        r"it does not look at the pictures: others under the same prompts get the same scores",
    ),
    (blind, "depends_on_picture", r"it does not look at the pictures: .*"),
    (endless_on_white, "saturation", r"1 of 4 scores are not finite \(on black, white or fully saturated pictures\)"),
]
OF_TRAINED = [
    (detached, "gradient_per_picture", r"its scores carry no gradient to the pictures, so it can only be held out"),
    (
        DetachedButTrainable(),
        "gradient_per_picture",
        r"its scores carry no gradient to the pictures, so it can only be held out",
    ),
    (other_with_gradient, "gradient_per_picture", r"asked for a gradient, it gives scores that differ by 5 from those without"),
    (zero_gradient, "gradient_per_picture", r"its gradient is zero for all pictures"),
    (nan_gradient, "gradient_per_picture", r"its gradient is not finite for 4 of 4 pictures"),
    (leaks, "gradient_per_picture", r"the gradient of one picture's score reaches the other pictures of the batch"),
    (normalises_its_gradient, "gradient_per_picture", r"its gradient is not linear in the scores' weights, it is off by \d+%"),
    (no_way_back, "gradient_per_picture", r"its gradient: NotImplementedError: no kernel"),
    (nan_gradient_on_black, "saturation", r"its gradient is not finite for 2 of 4 pictures \(on black, white or .*\)"),
    (
        wrong_sign,
        "gradient_matches_differences",
        r"its gradient is not that of its scores: .* changes by -1 times what the gradient predicts",
    ),
    (
        twice_the_gradient,
        "gradient_matches_differences",
        r"its gradient is not that of its scores: .* changes by 0.5 times what the gradient predicts",
    ),
    (upside_down_gradient, "gradient_matches_differences", r"its gradient is not that of its scores: .*"),
    (half_a_gradient, "gradient_matches_differences", r"its gradient is not that of its scores: .*"),
    (
        only_every_other,
        "gradient_matches_differences",
        r"no gradient reaches 2 of 4 pictures, though their scores change with them",
    ),
]


def named(reward):
    return getattr(reward, "__name__", type(reward).__name__)


def validated(reward, trained=True, images=PICTURES, prompts=PROMPTS) -> Report:
    return validate_reward(named(reward), reward, images, prompts, trained)


def refused(report: Report) -> list[str]:
    """The checks that refused it."""
    return [check for check, seen in report.checks.items() if seen.startswith("refused: ")]


def is_refused(reward, trained, check, line):
    report = validated(reward, trained)
    with pytest.raises(RewardError) as error:
        raise_on_faults([report])
    assert refused(report)[0] == check
    assert re.fullmatch(f"reward {named(reward)}: {line}", str(error.value).splitlines()[0])


class Reads(nn.Module):
    """A reward that reads prompts by words, the first three of them."""

    longest = 3

    def tokenizer(self, text):
        return SimpleNamespace(input_ids=text.split())

    def forward(self, images, prompts):
        return honest(images, prompts)


def test_prompts_that_a_reward_cuts_are_a_remark():
    prompts = ["a red hat", "one two three four five", *["a red hat"] * (len(PICTURES) - 2)]
    (remark,) = (remark for remark in validated(Reads(), prompts=prompts).remarks if "cut" in remark)
    assert remark == "1 of 2 prompts are cut after 3 tokens, such as 'one two three four five'"
    assert not any("cut" in remark for remark in validated(Reads(), prompts=["a hat"] * len(PICTURES)).remarks)


@pytest.mark.parametrize(("reward", "check", "line"), OF_ANY, ids=lambda value: named(value) if callable(value) else "")
def test_a_lie_is_refused_by_name_even_held_out(reward, check, line):
    is_refused(reward, False, check, line)


@pytest.mark.parametrize(("reward", "check", "line"), OF_TRAINED, ids=lambda value: named(value) if callable(value) else "")
def test_a_lying_gradient_is_refused_and_may_be_held_out(reward, check, line):
    is_refused(reward, True, check, line)
    assert validated(reward, trained=False).faults == ()


@pytest.mark.parametrize("reward", [noise, normalises_in_place, first_prompt_for_all, groups_by_prompt], ids=named)
def test_what_is_refused_held_out_is_refused_when_trained(reward):
    assert validated(reward).faults


def test_every_fault_of_every_reward_is_a_line():
    def wrong_in_two(images, prompts):
        return lying_gradient(images.sub_(0), prompts, -honest(images.mul_(1.5), prompts))

    with pytest.raises(RewardError) as error:
        raise_on_faults([validated(raises), validated(honest), validated(wrong_in_two)])
    lines = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["reward raises", "reward wrong_in_two", "reward wrong_in_two"]
    assert "writes into the pictures" in lines[1] and "not that of its scores" in lines[2]
    raise_on_faults([validated(honest)])


# --------------------------------------------------------------------------------------------------- the honest
class Network(nn.Module):
    """Kinks, and a pooling as image towers have them."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(3, 16, 4, 2),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(64, 1),
            )
        self.requires_grad_(False)

    def forward(self, images, prompts):
        return self.layers(images.to(self.layers[0].weight.dtype))[:, 0]


class Half(Network):
    def __init__(self):
        super().__init__()
        self.bfloat16()


def tiny_units(images, prompts):
    return 1e-7 * honest(images, prompts)


def huge_units(images, prompts):
    return 1e7 * honest(images, prompts)


def far_from_zero(images, prompts):
    """As PickScore near 22, where single precision leaves five digits."""
    return 22 + 0.05 * honest(images, prompts)


def double(images, prompts):
    return honest(images.double(), prompts)


def clamps(images, prompts):
    return honest((2 * images - 0.5).clamp(0, 1), prompts)


@pytest.mark.parametrize(
    "reward",
    [
        honest, tiny_units, huge_units, far_from_zero, double, clamps, Network(), Half(), Towered(),
        tiny_rewards.Red(), tiny_rewards.Seeing(), tiny_rewards.Calm(), tiny_rewards.Broken(),
    ],
    ids=named,
)  # fmt: skip
@pytest.mark.parametrize("trained", [True, False])
def test_an_honest_reward_passes(reward, trained):
    report = validated(reward, trained)
    assert report.faults == () and refused(report) == []
    assert ("gradient_matches_differences" in report.checks) == trained


def by_numpy(images, prompts):
    return torch.from_numpy(
        np.array([image.std() + len(prompt) for image, prompt in zip(images.numpy(), prompts, strict=True)])
    )


def counts(images, prompts):
    return (images[:, 0] > images[:, 1]).flatten(1).sum(1).float().div(40).round()


@pytest.mark.parametrize("reward", [by_numpy, counts, detached], ids=named)
def test_a_black_box_may_judge(reward):
    assert validated(reward, trained=False).faults == ()


@pytest.mark.parametrize("name", ["pocket_preference", "pocket_judge"])
def test_the_pocket_rewards_pass_on_pictures_of_the_start(name):
    reference, prompts = load_reference("pocket"), read_prompts("pocket:eval")["prompt"].tolist()[:16]
    noise = torch.randn(16, *reference.latent_shape, generator=torch.Generator().manual_seed(0))
    images = reference.sampler(reference.generator(625, "pocket-distilled"))(prompts, noise)
    report = validated(load_reward(name), images=images, prompts=prompts)
    assert report.faults == report.remarks == ()
    assert report.figures["gradient_error"] < 0.1


def test_the_built_in_rewards_pass_with_tiny_weights(tmp_path):
    prompts = ["a red pot", "a blue cactus", "a smiling cactus", "a pot"] * 4
    for name, settings in tiny_clip.build(tmp_path).items():
        report = validated(reward_models.load(name, **settings), images=tiny_clip.pictures(16, 48, 80), prompts=prompts)
        assert report.faults == (), name
        assert (report.remarks == ("other prompts made no difference to its scores",)) == name.startswith("aesthetic"), name


# ------------------------------------------------------------------------------------------- figures and remarks
def test_the_report_says_in_a_line_what_was_seen():
    report = validated(honest)
    scores = honest(PICTURES, PROMPTS).double()
    for figure, value in {"low": scores.min(), "high": scores.max(), "mean": scores.mean(), "std": scores.std()}.items():
        assert report.figures[figure] == pytest.approx(value.item())
    assert report.figures["pictures_per_second"] > 0 <= report.figures["memory"]
    assert report.figures["gradient_error"] < 0.01
    assert re.fullmatch(
        rf"reward honest: scores {scores.min():.4g} to {scores.max():.4g} \(mean .*, std .*\) on 64 pictures, "
        r".* pictures/s; the gradient misses at most 0.\d% of a change, in 12 directions; its peak grew by \d+ MiB",
        str(report),
    )
    assert str(validated(column)) == "reward column: 4 images got scores of shape [4, 1], expected [4]"


def test_an_opinion_of_few_pictures_is_one():
    images = PICTURES.clone()
    images[40:50] = 0.99
    assert validated(opinion_of_few, trained=False, images=images).faults == ()


def test_what_is_unusual_is_remarked():
    assert validated(tiny_rewards.Red()).remarks == ("other prompts made no difference to its scores",)
    assert "64 pictures got exactly the same score" in validated(counts, trained=False).remarks[0]
    assert validated(honest, images=PICTURES[:1].expand(N, -1, -1, -1), prompts=["a"] * N).remarks == (
        "all pictures are the same, so its range is not known",
    )
    deaf = validated(lambda images, prompts: 1e6 + honest(images, prompts).half().float())
    assert deaf.faults == () and "drowns in the scores' rounding" in deaf.remarks[-1]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_few_pictures_will_do(n):
    assert validated(honest, images=PICTURES[:n], prompts=PROMPTS[:n]).faults == ()
    assert refused(validated(wrong_sign, images=PICTURES[:n], prompts=PROMPTS[:n])) == ["gradient_matches_differences"]
    assert refused(validated(minus_the_batch, images=PICTURES[:n], prompts=PROMPTS[:n]))[0] == "neighbours"


@pytest.mark.parametrize("fits", [16, 5, 2, 1])
def test_where_memory_ends_smaller_batches_do(fits):
    def big(images, prompts):
        if len(images) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(images, prompts)

    report = validated(big)
    assert report.faults == (() if fits > 1 else ("reward big: out of memory with two pictures",))
    if fits > 1:
        assert report.figures["mean"] == pytest.approx(honest(PICTURES, PROMPTS).mean().item())


def test_random_numbers_and_pictures_stay_as_they_were():
    torch.manual_seed(3)
    random.seed(3)
    images, prompts, before = PICTURES.clone(), list(PROMPTS), (torch.get_rng_state(), random.getstate())
    for reward in (noise, python_noise, normalises_in_place, eats_its_prompts, honest):
        validated(reward, images=images, prompts=prompts)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert torch.equal(images, PICTURES) and prompts == PROMPTS


# ---------------------------------------------------------------------------------------------------- its cost
class Counting(tiny_rewards.Red):
    """Counts the pictures that it is shown."""

    shown = 0

    def forward(self, images, prompts):
        Counting.shown += len(images)
        return super().forward(images, prompts)


def test_validation_costs_what_a_round_does_and_little_when_the_reward_is_known():
    from diffinstruct.reward_service.client import LocalRewards

    assert [pictures_for(batch) for batch in (2, 16, 24, 64, 1024)] == [16, 16, 24, 64, 64]
    decoded: list[int] = []
    counting = Counting()
    rewards = LocalRewards(LatentRewards(lambda latent: decoded.append(1) or latent, {"counting": counting}))
    Counting.shown = 0
    (first,) = rewards.validate(PICTURES[:16], PROMPTS[:16], ["counting"])
    assert first.faults == () and len(decoded) == 16 and Counting.shown > 40
    decoded.clear()
    Counting.shown = 0
    (again,) = rewards.validate(PICTURES[:16], PROMPTS[:16], ["counting"], [str(first.digest)])
    assert again.faults == () and len(decoded) == FEW and Counting.shown == 2 * FEW
    assert str(again) == "reward counting: as it was validated before; a short check on 4 pictures has passed"
    counting.register_buffer("weight", torch.ones(3))
    Counting.shown = 0
    (other,) = rewards.validate(PICTURES[:16], PROMPTS[:16], ["counting"], [str(first.digest)])
    assert other.digest != first.digest and Counting.shown > 40


def test_a_known_reward_that_fails_here_is_refused():
    def nan(images, prompts):
        return honest(images, prompts) * float("nan")

    report = validate_reward("nan", nan, PICTURES, PROMPTS, True, known=True)
    assert "not finite" in report.faults[0]
