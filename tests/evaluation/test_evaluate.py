"""Intervals against closed forms and simulation; the evaluation of a generator whose every figure is known."""

import dataclasses
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from diffinstruct.evaluation.comparison import Comparison
from diffinstruct.evaluation.evaluate import compare, evaluate, image_features
from diffinstruct.evaluation.features import AttributeClassifier
from diffinstruct.method import transient
from diffinstruct.method.rewards import RewardError
from diffinstruct.metrics import METRICS, Metric, find_metric, kid, kid_replicates, mean_pairwise_distance
from diffinstruct.models.sampling import pictures_at_once
from diffinstruct.models.world import OpenAttribute
from diffinstruct.reports.frames import markdown, table
from diffinstruct.statistics import Estimate, bootstrap_mean, paired_difference, resamples, wilson, win_rate

COLOURS = ["dark", "grey", "bright"]
SMILING = Metric("smiling", "smiling, where open", interval="share")


# ------------------------------------------------------------------------------------------ figures of arrays
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)  # the last two: Newcombe 1998, Statistics in Medicine 17, table I
def test_wilson_against_published_values(successes, n, low, high):
    figure = wilson(successes, n)
    assert figure.value == successes / n
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=5e-5)


def test_bootstrap_is_the_normal_interval_of_a_large_sample():
    values = np.random.default_rng(0).normal(3, 2, 900)
    figure = bootstrap_mean(values, seed=1)
    error = values.std(ddof=1) / 30
    assert figure.value == pytest.approx(values.mean())
    assert figure.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert figure.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert (figure.n, figure.seed) == (900, 1)


def test_bootstrap_covers_the_true_mean_of_a_skewed_law(monkeypatch):
    monkeypatch.setattr("diffinstruct.statistics.RESAMPLES", 300)
    rng = np.random.default_rng(0)
    figures = [bootstrap_mean(rng.exponential(1.0, 150), seed) for seed in range(500)]
    covered = np.mean([f.low <= 1 <= f.high for f in figures])
    assert 0.915 <= covered <= 0.97  # 95 % give or take four standard errors of the simulation


def test_a_figure_repeats_with_its_seed_and_only_with_it():
    values = np.arange(40.0)
    assert bootstrap_mean(values, 3) == bootstrap_mean(values, 3)
    assert bootstrap_mean(values, 3).low != bootstrap_mean(values, 4).low
    assert (resamples(40, 3).sum(1) == 40).all()


def test_a_mean_of_what_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="2 of 3 values are not finite"):
        bootstrap_mean([1.0, np.nan, np.inf], 0)


def test_pairing_narrows_the_interval_of_correlated_scores():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 1, 400)
    a, b = (difficulty + shift + 0.2 * rng.normal(0, 1, 400) for shift in (0.1, 0.0))
    paired = paired_difference(a, b, 0)
    alone = bootstrap_mean(a, 0), bootstrap_mean(b, 1)
    unpaired_width = np.hypot(alone[0].high - alone[0].low, alone[1].high - alone[1].low)
    assert paired.value == pytest.approx(a.mean() - b.mean())
    assert paired.high - paired.low < 0.3 * unpaired_width  # sqrt(0.08 / 2.08) = 0.196 of it in the mean
    assert paired.low > 0  # the shift is seen; unpaired it is not
    assert unpaired_width / 2 > 0.1


def test_win_rate_counts_a_tie_as_half_a_win():
    assert win_rate([3, 2, 1, 0], [1, 1, 1, 1]) == wilson(2.5, 4)
    assert win_rate([1, 1], [0, 0]).value == 1


def features_of(n, shift=0.0, seed=0, dimensions=16):
    return np.random.default_rng(seed).normal(shift, 1, (n, dimensions))


def test_kid_is_the_sum_over_pairs():
    x, y = features_of(7, 0.3), features_of(9, seed=1)

    def mean_kernel(a, b):
        pairs = [(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if a is not b or i != j]
        return np.mean([(p @ q / 16 + 1) ** 3 for p, q in pairs])

    assert kid(x, y, 0).value == pytest.approx(mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y), rel=1e-9)


def kid_of_shift(shift, dimensions=16):
    """E k(x, y) for normal x, y of unit covariance, from many samples."""
    x, x2 = features_of(4000, shift, 10, dimensions), features_of(4000, shift, 11, dimensions)
    y, y2 = features_of(4000, 0.0, 12, dimensions), features_of(4000, 0.0, 13, dimensions)

    def mean_kernel(a, b):
        return ((a @ b.T / dimensions + 1) ** 3).mean()

    return mean_kernel(x, x2) + mean_kernel(y, y2) - mean_kernel(x, y2) - mean_kernel(x2, y)


def test_kid_is_zero_in_the_mean_for_one_law_and_positive_for_another(monkeypatch):
    monkeypatch.setattr("diffinstruct.statistics.RESAMPLES", 2)
    same = [kid(features_of(50, 0.0, s), features_of(70, 0.0, s + 1000), s).value for s in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0  # unbiased: not clipped at zero
    shifted = [kid(features_of(50, 0.5, s), features_of(70, 0.0, s + 1000), s).value for s in range(300)]
    assert np.mean(shifted) == pytest.approx(kid_of_shift(0.5), abs=4 * np.std(shifted) / np.sqrt(300) + 0.01)
    assert min(shifted) > 0


def test_kids_interval_covers_the_true_distance(monkeypatch):
    monkeypatch.setattr("diffinstruct.statistics.RESAMPLES", 300)
    truth = kid_of_shift(0.5)
    figures = [kid(features_of(80, 0.5, s), features_of(80, 0.0, s + 1000), s) for s in range(200)]
    covered = np.mean([f.low <= truth <= f.high for f in figures])
    assert 0.89 <= covered <= 1.0
    width = np.mean([f.high - f.low for f in figures])
    assert width == pytest.approx(2 * 1.96 * np.std([f.value for f in figures]), rel=0.2)


def test_kids_resamples_are_not_biased_by_drawing_a_picture_twice():
    """Features that share a large mean, as a network's do, have kernels of order 100 and a distance near 0."""
    x, y = features_of(60, 4.0), features_of(60, 4.0, seed=1)
    value, replicates = kid_replicates(x, y, 0)
    assert replicates.mean() == pytest.approx(value, abs=0.15 * replicates.std())


def test_spread_is_the_mean_distance_of_pairs():
    assert mean_pairwise_distance(np.array([[0.0, 0], [3, 4], [0, 8]])) == pytest.approx((5 + 5 + 8) / 3)


def test_a_figure_prints_two_digits_of_its_width():
    assert str(Estimate(21.5312, 21.334, 21.7277, 500)) == "21.53 [21.33, 21.73]"
    assert str(Estimate(0.432109, 0.40123, 0.46345, 500)) == "0.432 [0.401, 0.463]"
    assert str(Estimate(0.000312, 0.000201, 0.000414, 500)) == "0.00031 [0.00020, 0.00041]"
    assert str(Estimate(1.0, 1.0, 1.0, 500)) == "1.000 [1.000, 1.000]"


# ------------------------------------------------------------------------------------------ figures of a generator
class ByBrightness(AttributeClassifier):
    """A classifier that sees the mean of the red channel as colour and of the green one as mouth."""

    def __init__(self):
        super().__init__({"colour": COLOURS, "mouth": ["smiling", "serious"]})

    def forward(self, images):
        red, green = images[:, 0].mean((1, 2)), images[:, 1].mean((1, 2))
        colour = -(red[:, None] - torch.tensor([0.0, 0.5, 1.0])).abs()
        return images.mean((2, 3)), {"colour": colour, "mouth": torch.stack([green - 0.5, 0.5 - green], 1)}


class Red(nn.Module):
    def forward(self, images, prompts):
        return images[:, 0].mean((1, 2))


def paint(prompts, noise):
    """Paints red as the prompt says, green and blue by the sign of the noise."""
    red = torch.tensor([COLOURS.index(prompt.split()[1]) / 2 for prompt in prompts])
    green, blue = (noise[:, 0, 0, :2] > 0).float().unbind(1)
    return torch.stack([red, green, blue], 1)[:, :, None, None].expand(-1, -1, 4, 4)


def paint_bright(prompts, noise):
    return paint(["a bright pot"] * len(prompts), noise)


@pytest.fixture
def prompts():
    rows = [(f"a {c} pot", c, m) for c in COLOURS for m in ("smiling", "serious", "")] * 10
    frame = pd.DataFrame(rows, columns=["prompt", "colour", "mouth"], index=range(100, 190))
    frame.loc[frame.index % 10 == 0, "colour"] = np.nan
    return frame


def run(sample, prompts, batch_size=7, diversity_prompts=5, reward=None, **settings):
    reference = image_features(ByBrightness(), torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    settings |= {"noise_shape": (1, 1, 2), "batch_size": batch_size, "diversity_prompts": diversity_prompts}
    smiling = OpenAttribute(preferred="smiling", metric="smiling", title="smiling, where open")
    settings |= {"open_attributes": {"mouth": smiling}, "metrics": METRICS | {"smiling": SMILING}}
    return evaluate(sample, prompts, {"red": reward or Red()}, ByBrightness(), reference, **settings)


def test_every_figure_of_a_known_generator(prompts):
    result = run(paint_bright, prompts)
    summary = result.summary()
    noise = torch.randn(90, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    smiles = (noise[:, 0, 0, 0] > 0).numpy()
    open_face = (prompts.mouth == "").to_numpy()
    named_face = np.where(prompts.mouth == "smiling", smiles, ~smiles)[~open_face]
    named_colour = prompts.colour.dropna()

    assert summary["reward/red"].value == 1
    assert summary["accuracy/colour"] == wilson((named_colour == "bright").sum(), len(named_colour), 0)
    assert summary["accuracy/mouth"] == wilson(named_face.sum(), 60, 0)
    assert summary["smiling"] == wilson(smiles[open_face].sum(), 30, 0)
    assert summary["kid"] == kid(result.features, result.reference, 0)
    assert summary["diversity"].n == 5
    assert {f.n for name, f in summary.items() if name in ("reward/red", "kid")} == {90}
    row = result.table.iloc[1]  # prompt: dark, serious
    assert row["seen/colour"] == "bright"
    assert row["accuracy"] == (row["accuracy/colour"] + row["accuracy/mouth"]) / 2 == 0.5 * (not smiles[1])


def test_the_right_colours_are_all_right(prompts):
    assert run(paint, prompts).summary()["accuracy/colour"].value == 1


def test_batches_do_not_change_the_figures(prompts):
    small, whole = run(paint, prompts, batch_size=7), run(paint, prompts, batch_size=90)
    pd.testing.assert_frame_equal(small.table, whole.table)
    assert small.summary() == whole.summary()


class Gpu:
    """Memory for so many pictures: more at once, or while others are alive, are too many."""

    def __init__(self, room: int) -> None:
        self.room, self.asked, self.alive, self.most = room, list[int](), list[weakref.ref[torch.Tensor]](), 0

    def __call__(self, prompts: list[str], noise: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(prompts))
        self.alive = [picture for picture in self.alive if picture() is not None]
        pictures = paint(prompts, noise).clone()
        if len(prompts) > self.room:
            raise torch.OutOfMemoryError("as if")
        self.alive.append(weakref.ref(pictures))
        self.most = max(self.most, sum(len(picture()) for picture in self.alive))  # type: ignore[arg-type]
        return pictures


def test_pictures_are_as_few_as_memory_holds_and_none_outlives_its_score(prompts):
    gpu = Gpu(room=5)
    result = run(gpu, prompts, batch_size=None, diversity_prompts=12)
    assert gpu.asked[:4] == [32, 16, 8, 4] and set(gpu.asked[4:]) <= {4, 2}  # 90 and 12 pictures; no size is tried again
    assert gpu.most == 4
    whole = run(paint, prompts, batch_size=90, diversity_prompts=12)
    pd.testing.assert_frame_equal(result.table, whole.table)
    with pytest.raises(torch.OutOfMemoryError):
        run(Gpu(room=0), prompts)
    with pytest.raises(RuntimeError, match="another fault"):
        run(another_fault, prompts)


def another_fault(prompts, noise):
    raise RuntimeError("another fault")


@pytest.mark.parametrize(("pixels", "n"), [(64, 32), (512, 16), (1024, 4), (16384, 1)])
def test_larger_pictures_begin_with_fewer(pixels, n):
    assert pictures_at_once((4, pixels // 8, pixels // 8)) == n


def test_another_seed_draws_other_noise(prompts):
    assert (run(paint, prompts).features != run(paint, prompts, seed=1).features).any()


def test_diversity_is_over_noises_of_one_prompt(prompts):
    deterministic = run(lambda texts, noise: paint(texts, torch.ones_like(noise)), prompts)
    assert deterministic.summary()["diversity"].value == 0
    two = run(paint, prompts, diversity_prompts=90, diversity_noises=2).table["diversity"]
    distances = [0, 1, np.sqrt(2)]  # green and blue differ with probability one half each
    assert np.allclose([min(distances, key=lambda d: abs(d - x)) for x in two], two)
    assert two.mean() == pytest.approx(0.5 * 1 + 0.25 * np.sqrt(2), abs=4 * two.std() / np.sqrt(90))
    spaced = run(paint, prompts).table["diversity"]
    assert spaced.notna().to_numpy().nonzero()[0].tolist() == [0, 22, 44, 67, 89]


def test_noise_and_prompt_stay_together(prompts):
    """Red comes from the prompt: whatever the noise, it does not add to a prompt's diversity."""
    result = run(lambda texts, noise: paint(texts, torch.zeros_like(noise)), prompts)
    assert result.summary()["diversity"].value == 0


def test_a_table_without_attributes_has_no_accuracy(prompts):
    assert set(run(paint, prompts[["prompt"]]).summary()) == {"reward/red", "diversity", "kid"}


def test_an_unknown_attribute_value_is_named_before_anything_is_sampled(prompts):
    prompts.loc[100, "colour"] = "ochre"
    with pytest.raises(ValueError, match="colour: the classifier does not know 'ochre'"):
        run(None, prompts)


def test_a_score_that_is_not_finite_is_an_error(prompts):
    with pytest.raises(RewardError, match=r"reward red: \d+ of \d+ scores are not finite"):
        run(lambda texts, noise: paint(texts, noise) / 0, prompts)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda images, texts: images.mean(), r"reward red: 7 images got scores of shape \[\], expected \[7\]"),
        (lambda images, texts: texts["a"], "reward red: TypeError: "),
    ],
)
def test_a_reward_that_breaks_its_contract_is_named(prompts, reward, words):
    with pytest.raises(RewardError, match=words):
        run(paint, prompts, reward=reward)


def test_a_reward_whose_server_is_away_for_a_moment_is_asked_again(prompts, monkeypatch):
    monkeypatch.setattr(transient.time, "sleep", lambda seconds: None)
    failures = [ConnectionResetError(104, "reset by peer")]

    def reward(images, texts):
        if failures:
            raise failures.pop()
        return images.mean((1, 2, 3))

    assert "reward/red" in run(paint, prompts, reward=reward).summary()


def test_compare_pairs_everything(prompts):
    better, worse = run(paint, prompts), run(paint_bright, prompts)
    differences = compare(better, worse)
    a, b = better.table, worse.table
    assert differences["accuracy"] == paired_difference(a.accuracy.dropna(), b.accuracy.dropna(), 0)
    assert differences["accuracy/colour"].low > 0
    assert differences["accuracy/mouth"] == Estimate(0, 0, 0, 60, 0)  # the same noise, the same faces
    assert differences["wins/red"] == win_rate(a["reward/red"], b["reward/red"], 0)
    kids = [result.summary()["kid"] for result in (better, worse)]
    assert differences["kid"].value == pytest.approx(kids[0].value - kids[1].value)
    itself = compare(better, better)
    assert (itself["kid"].low, itself["kid"].high, itself["wins/red"].value) == (0, 0, 0.5)


def saturation(images):
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def test_a_new_metric_is_one_row(prompts, monkeypatch):
    """It is in the table, the summary, the paired differences, the Markdown and the page, under its title."""
    monkeypatch.setitem(METRICS, "saturation", Metric("saturation", "mean saturation", "down", function=saturation))
    one, other = run(paint_bright, prompts), run(paint, prompts)
    assert one.summary()["saturation"] == bootstrap_mean(one.table["saturation"], 0)
    difference = compare(other, one)["saturation"]
    assert difference == paired_difference(other.table["saturation"], one.table["saturation"], 0)
    picture = [Image.new("RGB", (4, 4))]
    comparison = Comparison({}, {"one": one, "other": other}, ["a pot"], {"one": picture, "other": picture})
    assert " saturation |" in comparison.text() and str(difference) in comparison.text()
    page = comparison.page()
    assert "mean saturation, less is better" in page and str(difference) in page
    assert "KID to the reference, less is better" in page and "colour right" in page


def test_metrics_are_found_by_column():
    assert find_metric("reward/a:B") == Metric("reward/a:B", "reward, a:B")
    assert find_metric("accuracy/mouth").interval == "share" and find_metric("accuracy").interval == "mean"
    assert find_metric("kid").direction == "down"
    assert [find_metric(column) for column in ("prompt", "seen/mouth", "reward/", "split")] == [None] * 4


def test_compare_refuses_what_is_not_paired(prompts):
    result = run(paint, prompts)
    with pytest.raises(ValueError, match="same prompts and the same seed"):
        compare(result, run(paint, prompts, seed=1))
    with pytest.raises(ValueError, match="same prompts and the same seed"):
        compare(result, run(paint, prompts[::-1]))
    with pytest.raises(ValueError, match="same reference pictures"):
        compare(result, dataclasses.replace(result, reference=result.reference + 1))


def test_tables():
    rows = {
        "start": {"reward/x": Estimate(1.0, 0.95, 1.05, 90, 0), "smiling": Estimate(0.5, 0.4, 0.6, 30, 0)},
        "trained": {"reward/x": Estimate(2.0, 1.94, 2.06, 90, 0)},
    }
    frame = table(rows)
    assert list(frame.index) == ["start", "trained"]
    assert frame.loc["start", "reward/x"] == "1.00 [0.95, 1.05]"
    assert frame.loc["trained", "smiling"] == ""
    assert markdown(rows).splitlines() == [
        "|  | reward/x | smiling |",
        "| --- | --: | --: |",
        "| n | 90 | 30 |",
        "| start | 1.00 [0.95, 1.05] | 0.50 [0.40, 0.60] |",
        "| trained | 2.00 [1.94, 2.06] |  |",
        "",
        "In brackets: 95 % intervals over prompts; seed 0.",
    ]


# ------------------------------------------------------------------------------------------ the classifier
def test_the_classifier_survives_its_folder(tmp_path):
    torch.manual_seed(0)
    classifier = AttributeClassifier({"colour": COLOURS, "mouth": ["smiling", "serious"]})
    images = torch.rand(2, 3, 64, 64)
    features, logits = classifier(images)
    classifier.save(tmp_path / "classifier")
    loaded = AttributeClassifier.load(tmp_path / "classifier")

    assert features.shape == (2, 256)
    assert {name: tuple(x.shape) for name, x in logits.items()} == {"colour": (2, 3), "mouth": (2, 2)}
    assert torch.equal(loaded(images)[0], features)
    assert torch.equal(loaded(images)[1]["mouth"], logits["mouth"])
    assert loaded.classes == classifier.classes
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_classifier_of_other_pictures(tmp_path):
    AttributeClassifier({"colour": COLOURS}, pixels=32).save(tmp_path)
    assert AttributeClassifier.load(tmp_path)(torch.rand(2, 3, 32, 32))[0].shape == (2, 256)


def test_the_features_know_where_something_is():
    classifier = AttributeClassifier({"mouth": ["a", "b"]})
    seen = classifier.trunk(torch.rand(1, 3, 64, 64))
    assert seen.shape == (1, 128, 8, 8)
    assert (classifier.features(seen) - classifier.features(seen.flip(3))).abs().max() > 1e-2
