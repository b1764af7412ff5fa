"""Every objective against exact gradients on Gaussians, by quadrature, in mean and scale; planted bugs that must be
caught.

Everything is one-dimensional and exact: generator x0 = mean + std z, score network = the posterior mean of that
Gaussian (its parameters constants), reference = the posterior mean of another. The oracles differentiate the
divergences themselves and
share no line with the objectives: the score-based one, E_{x_t ~ p_sg[theta]} d(m_t / k_t (s_theta(x_t) - s_ref(x_t)));
Fisher's, the same with the law of x_t moving too; KL's, from the formula for two Gaussians.
"""

import inspect
import re

import numpy as np
import pytest
import torch

import diffinstruct.method.distances
import diffinstruct.method.guidance
import diffinstruct.method.objectives
from diffinstruct.method.diffusion import WEIGHTINGS, Schedule, denoising_loss
from diffinstruct.method.distances import distance, pseudo_huber, squared
from diffinstruct.method.guidance import guided
from diffinstruct.method.objectives import objective

MEAN, STD, HUBER_C = 0.7, 0.6, 0.3
# (alpha, sigma): alpha 1, a lost alpha would show at 0.6; a variance-preserving pair; flow matching's alpha = 1 - t.
LEVELS = [(1.0, 0.8), (0.6, 0.8), (0.98, 0.2), (0.3, 0.95), (0.5, 0.5)]
NODES, WEIGHTS = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(200))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
PLAIN = {"mean": 0.0, "null": 0.0, "std": 1.0, "cfg": 0.0, "where": "in"}
GUIDED = PLAIN | {"mean": 0.4, "null": -0.2, "cfg": 1.5}  # both of width 1: guided, they are the score of a third Gaussian


def posterior_mean(mean, std, alpha, sigma):
    """The exact denoiser of N(mean, std^2) at one noise level."""
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return lambda xt, t, c: mean + gain * (xt - alpha * mean)


def conditional(std, alpha, sigma):
    """The same with the mean as its condition: what a prompt is to a network."""
    return lambda xt, t, c: posterior_mean(c["mean"].to(xt), std, alpha, sigma)(xt, t, c)


# ------------------------------------------------------------------------------------------------------ the oracles
def gaussians(level, reference, theta):
    """Nodes of x_t, and the scores of generator and reference there; theta [2] carries gradient wherever it is used."""
    alpha, sigma = level
    xt = alpha * theta[0] + (alpha**2 * theta[1] ** 2 + sigma**2).sqrt() * NODES
    mean = reference["mean"] + reference["cfg"] * (reference["mean"] - reference["null"]) * (reference["where"] == "in")

    def score(xt):
        return -(xt - alpha * theta[0]) / (alpha**2 * theta[1] ** 2 + sigma**2)

    def score_reference(xt):
        return -(xt - alpha * mean) / (alpha**2 * reference["std"] ** 2 + sigma**2)

    return xt, score, score_reference


def parameters():
    return torch.tensor([MEAN, STD], dtype=torch.float64, requires_grad=True)


def per_score(level, space):
    """m_t / k_t: what a difference of scores is in a space. Also the weight w_t of the objectives."""
    alpha, sigma = level
    return {"score": 1.0, "eps": sigma, "x0": sigma**2 / alpha, "v": sigma / alpha, "dmd2": (sigma / alpha) ** 2}[space]


def score_divergence(level, name, space, reference, law_moves=False):
    """(d/d mean, d/d std) of E d(y), the law of x_t held fixed or not."""
    theta = parameters()
    xt, score, score_reference = gaussians(level, reference, theta)
    xt = xt if law_moves else xt.detach()
    y = per_score(level, space) * (score(xt) - score_reference(xt))
    d = (y**2 + HUBER_C**2).sqrt() - HUBER_C if name == "pseudo_huber" else y**2
    return torch.autograd.grad((WEIGHTS * d).sum(), theta)[0]


def kullback_leibler(level, space, reference):
    """w_t times the gradient of KL(p_theta,t || p_ref,t), from the formula for two Gaussians."""
    alpha, sigma = level
    theta = parameters()
    mean = reference["mean"] + reference["cfg"] * (reference["mean"] - reference["null"])
    variance, wanted = alpha**2 * theta[1] ** 2 + sigma**2, alpha**2 * reference["std"] ** 2 + sigma**2
    kl = 0.5 * (variance / wanted + alpha**2 * (theta[0] - mean) ** 2 / wanted - (variance / wanted).log())
    return torch.autograd.grad(per_score(level, space) * kl, theta)[0]


def beside(level, space, reference):
    """The gradient of - cfg_scale w_t E < sg[s_ref(c) - s_ref(null)], x_t >: of two Gaussians of one width, a constant
    pull."""
    alpha, sigma = level
    pull = alpha * (reference["mean"] - reference["null"]) / (alpha**2 * reference["std"] ** 2 + sigma**2)
    return torch.tensor([-reference["cfg"] * per_score(level, space) * alpha * pull, 0.0], dtype=torch.float64)


ORACLES = {  # what each objective's gradient has to be, at (level, distance, space, reference)
    "di_star": lambda level, name, space, reference: (
        score_divergence(level, name, space, reference)
        + (beside(level, space, reference) if reference["where"] == "out" else 0)
    ),
    "diff_instruct": lambda level, name, space, reference: kullback_leibler(level, space, reference),
}


# ----------------------------------------------------------------------------------------------- the code under test
def schedule_of(level):
    return Schedule(*(torch.tensor([value], dtype=torch.float64) for value in level))


def by_code(level, space, reference, chosen, guide=guided, guide_score_network=False):
    """(d/d mean, d/d std) from an objective, over all pairs of 200 z and 200 eps nodes."""
    alpha, sigma = level
    theta = parameters()
    z, eps = (v.reshape(-1, 1) for v in torch.meshgrid(NODES, NODES, indexing="ij"))
    weights = torch.outer(WEIGHTS, WEIGHTS).flatten()
    null = {"mean": torch.tensor([[reference["null"]]], dtype=torch.float64)}
    c = {"mean": torch.full((len(z), 1), reference["mean"], dtype=torch.float64)}
    score_network = posterior_mean(MEAN, STD, alpha, sigma)
    if guide_score_network:  # it, too, would be another network without its prompt
        of_prompt = lambda xt, t, c: posterior_mean(MEAN + c["mean"] - reference["mean"], STD, alpha, sigma)(xt, t, c)  # noqa: E731
        whole = guide(of_prompt, null, 1 + reference["cfg"], "in")
        score_network = lambda xt, t, c: whole(xt, t, c)[0]  # noqa: E731
    loss, _ = chosen(
        theta[0] + theta[1] * z,
        torch.zeros(len(z), dtype=torch.long),
        eps,
        c,
        score_network=score_network,
        reference=guide(conditional(reference["std"], alpha, sigma), null, 1 + reference["cfg"], reference["where"]),
    )
    return torch.autograd.grad((weights * loss).sum(), theta)[0]


def configured(name, level, space, distance_name="pseudo_huber", **args):
    pair = distance(distance_name, {"c": HUBER_C} if distance_name == "pseudo_huber" else {})
    return objective(name, schedule=schedule_of(level), weighting=space, distance=pair, args=args)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def unnormalised(chosen):
    """SiD's or DMD's objective, its divisor taken back."""

    def whole(*args, **kwargs):
        loss, record = chosen(*args, **kwargs)
        return loss * record["reference_error"].detach(), record

    return whole


# ------------------------------------------------------------------------------------------------------- objectives
@pytest.mark.parametrize("space", WEIGHTINGS)
@pytest.mark.parametrize("distance_name", ["pseudo_huber", "squared"])
@pytest.mark.parametrize("level", LEVELS)
def test_di_star_has_the_gradient_of_the_score_divergence(level, distance_name, space):
    wanted = score_divergence(level, distance_name, space, PLAIN)
    assert wanted.abs().min() > 1e-3  # a gradient of 0 would prove nothing
    for name in ("di_star", "sim"):
        close(by_code(level, space, PLAIN, configured(name, level, space, distance_name)), wanted)


def test_published_numbers_of_the_one_dimensional_example():
    """Worked out apart from this code: at alpha 1 the gradient is (0.596, -0.496), at alpha 0.6 it is (0.540,
    -0.174)."""
    for level, wanted in [((1.0, 0.8), (0.596, -0.496)), ((0.6, 0.8), (0.540, -0.174))]:
        got = by_code(level, "score", PLAIN, configured("di_star", level, "score"))
        torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), atol=6e-4, rtol=0)


@pytest.mark.parametrize("space", WEIGHTINGS)
@pytest.mark.parametrize("level", LEVELS)
def test_diff_instruct_has_the_gradient_of_kl(level, space):
    wanted = kullback_leibler(level, space, PLAIN)
    assert wanted.abs().min() > 1e-3
    for name in ("diff_instruct", "diff_instruct_pp"):  # the reward is not in here: with scale 0 they are one
        close(by_code(level, space, PLAIN, configured(name, level, space)), wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_sid_is_the_squared_distance_at_alpha_1_and_fisher_at_one_half(level):
    for alpha, law_moves in [(1.0, False), (0.5, True)]:
        wanted = score_divergence(level, "squared", "score", PLAIN, law_moves)
        assert wanted.abs().min() > 1e-3
        close(2 * by_code(level, "score", PLAIN, unnormalised(configured("sid", level, "score", alpha=alpha))), wanted)
    k = level[0] / level[1] ** 2
    in_x0 = by_code(level, "x0", PLAIN, unnormalised(configured("sid", level, "x0", alpha=0.5)))
    close(2 * k**2 * in_x0, wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_dmd_without_its_normaliser_is_diff_instruct(level):
    got = by_code(level, "x0", PLAIN, unnormalised(configured("dmd", level, "x0")))
    close(got, kullback_leibler(level, "x0", PLAIN))


@pytest.mark.parametrize(("space", "factor"), [("x0", lambda alpha: alpha), ("dmd2", lambda alpha: 1.0)])
@pytest.mark.parametrize("level", LEVELS)
def test_dmd_has_the_size_of_the_published_gradient(level, space, factor):
    """DMD2's loss: half the squared distance to the sample moved by (f - r) / mean|x0 - r|, mean over all numbers. The
    paper of DMD has alpha_t besides."""
    batch, dimensions = 3, 20
    x0, eps = torch.randn(2, batch, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0.requires_grad_()
    score_network, plain = posterior_mean(0.3, 0.9, *level), posterior_mean(0.0, 1.0, *level)
    t = torch.zeros(batch, dtype=torch.long)
    xt = level[0] * x0 + level[1] * eps
    with torch.no_grad():
        to_fake, to_real = x0 - score_network(xt, t, {}), x0 - plain(xt, t, {})
        moved = x0 - (to_real - to_fake) / to_real.abs().mean(1, keepdim=True)
    theirs = torch.autograd.grad(0.5 * torch.nn.functional.mse_loss(x0, moved), x0)[0]

    chosen = configured("dmd", level, space)
    loss, _ = chosen(x0, t, eps, {}, score_network=score_network, reference=lambda *of: (plain(*of), None))
    ours = torch.autograd.grad(loss.mean() / dimensions, x0)[0]
    torch.testing.assert_close(ours, factor(level[0]) * theirs, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["sid", "dmd"])
def test_the_normaliser_divides_each_sample_by_its_own_error_and_is_a_constant(name):
    level, samples = (0.6, 0.8), 3
    x0 = torch.randn(samples, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    eps = torch.randn(samples, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = {
        "score_network": posterior_mean(0.3, 0.9, *level),
        "reference": lambda xt, t, c: (posterior_mean(0.0, 1.0, *level)(xt, t, c), None),
    }
    t = torch.zeros(samples, dtype=torch.long)
    normalised, _ = configured(name, level, "x0")(x0, t, eps, {}, **given)
    xt = level[0] * x0 + level[1] * eps
    f, r = given["score_network"](xt, t, {}), given["reference"](xt, t, {})[0]
    plain = ((r - f) * (f - x0)).sum((1, 2)) if name == "sid" else ((f - r).detach() * xt).sum((1, 2))
    error = (x0 - r).abs().mean((1, 2)).detach()
    assert error.max() > 1.1 * error.min()
    got, wanted = (torch.autograd.grad(loss.sum(), x0)[0] for loss in (normalised, plain))
    torch.testing.assert_close(got, wanted / error.view(-1, 1, 1))


# --------------------------------------------------------------------------------------------------------- guidance
@pytest.mark.parametrize("where", ["in", "out"])
@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("level", LEVELS)
def test_guidance_inside_and_outside(level, name, where):
    """Inside: the divergence to the guided Gaussian. Outside: that to the plain one, and a pull. For KL they are
    one."""
    reference = GUIDED | {"where": where}
    got = by_code(level, "x0", reference, configured(name, level, "x0"))
    close(got, ORACLES[name](level, "pseudo_huber", "x0", reference))
    unguided = ORACLES[name](level, "pseudo_huber", "x0", reference | {"cfg": 0.0})
    assert (got - unguided).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["diff_instruct", "diff_instruct_pp"])
def test_for_kl_guidance_inside_equals_outside(name):
    for level in LEVELS:
        one, other = (by_code(level, "eps", GUIDED | {"where": w}, configured(name, level, "eps")) for w in ("in", "out"))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_guidance_scale_is_diffusers_and_1_asks_once():
    asked = []

    def denoiser(xt, t, c):
        asked.append(len(xt))
        return c["mean"].to(xt).expand_as(xt)

    xt, t = torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)
    c, null = {"mean": torch.full((2, 1), 3.0)}, {"mean": torch.full((1, 1), 1.0)}
    guidance_scale = 2.5
    r, g = guided(denoiser, null, guidance_scale, "in")(xt, t, c)
    torch.testing.assert_close(r, torch.full((2, 1), 1.0 + guidance_scale * (3.0 - 1.0)))
    assert g is None and asked == [4]  # both prompts in one forward
    assert guided(denoiser, null, 1.0, "out")(xt, t, c)[1] is None and asked == [4, 2]


# --------------------------------------------------------------------------------------------------- planted bugs
DI_STAR, DI, FISHER = ("di_star", "pseudo_huber"), ("diff_instruct", ""), ("sid", "")
BUGS = {  # what it tests: (objective, source, planted); each must move its objective's gradient visibly
    "d' detached": (DI_STAR, "distance.gradient(y)", "distance.gradient(y).detach()"),
    "score network detached": (DI_STAR, "score_network(xt, t, c), reference", "score_network(xt, t, c).detach(), reference"),
    "reference detached": (DI_STAR, "    y = m * (f - r)", "    y = m * (f - r.detach())"),
    "x_t detached": (DI_STAR, "xt, m = schedule.diffuse(x0, t, eps)", "xt, m = schedule.diffuse(x0, t, eps).detach()"),
    "x0 of the right factor detached": (DI_STAR, "* m * (f - x0))", "* m * (f - x0.detach()))"),
    "sign flipped": (DI_STAR, "-per_sample_sum(distance", "per_sample_sum(distance"),
    "distance's denominator detached": (DI_STAR, "y / norm(y)", "y / norm(y).detach()"),
    "c dropped": (DI_STAR, "flat.pow(2).sum(1) + c * c * flat.shape[1]", "flat.pow(2).sum(1)"),
    "f and r exchanged": (DI_STAR, "    y = m * (f - r)", "    y = m * (r - f)"),
    "weight missing on the right factor": (DI_STAR, "* m * (f - x0))", "* (f - x0))"),
    "score-based: guidance's weight missing": (DI_STAR, "per_sample_sum(m * g * xt)", "per_sample_sum(g * xt)"),
    "guidance with the wrong sign": (DI_STAR, "else -per_sample_sum(m * g", "else per_sample_sum(m * g"),
    "guidance OUT not a constant": (DI_STAR, "g.detach()", "g * xt"),
    "guidance IN as well as OUT": (DI_STAR, "else (conditional, g", "else (conditional + g, g"),
    "guidance scale off by one": (DI_STAR, "g = (guidance_scale - 1) *", "g = guidance_scale *"),
    "KL: the networks not constants": (DI, "    with torch.no_grad():\n", "    if True:\n"),
    "KL: sign flipped": (DI, "return per_sample_sum(m * (f - r) * xt)", "return -per_sample_sum(m * (f - r) * xt)"),
    "KL: alpha of dx_t lost": (DI, "return per_sample_sum(m * (f - r) * xt)", "return per_sample_sum(m * (f - r) * x0)"),
    "KL: weight missing": (DI, "return per_sample_sum(m * (f - r) * xt)", "return per_sample_sum((f - r) * xt)"),
    "SiD: alpha on the wrong term": (FISHER, "((r - x0) - alpha * (r - f))", "(alpha * (r - x0) - (r - f))"),
    "SiD: x0 for f in the right factor": (FISHER, "- alpha * (r - f))", "- alpha * (r - x0))"),
    "SiD: score network detached": (FISHER, "- alpha * (r - f))", "- alpha * (r - f.detach()))"),
    "SiD: the normaliser not a constant": (FISHER, "(x0 - r).detach().abs()", "(x0 - r).abs()"),
    "SiD: sign flipped": (FISHER, "per_sample_sum(m * (r - f) * m", "-per_sample_sum(m * (r - f) * m"),
}


def function_of(objective_name):
    return {"di_star": "diff_instruct_star", "diff_instruct": "diff_instruct", "sid": "sid"}[objective_name]


def rebuilt(original="", planted="", only_in=""):
    """The page of the paper, its distances and its guidance as one namespace, with one piece of the source changed.
    Where it stands in several functions, the one named `only_in` is meant."""
    parts = [
        inspect.getsource(m)
        for m in (diffinstruct.method.distances, diffinstruct.method.guidance, diffinstruct.method.objectives)
    ]
    late = "from __future__ import annotations\n"
    source = late + "\n".join(parts).replace(late, "")
    if original:
        pieces = re.split(r"(?m)^(?=def )", source)
        holding = [i for i, piece in enumerate(pieces) if original in piece]
        if len(holding) > 1:
            holding = [i for i in holding if pieces[i].startswith(f"def {only_in}(")]
        assert len(holding) == 1 and pieces[holding[0]].count(original) == 1, f"the source changed: {original!r}"
        pieces[holding[0]] = pieces[holding[0]].replace(original, planted)
        source = "".join(pieces)
    namespace: dict = {}
    exec(compile(source, planted or "unchanged", "exec"), namespace)
    return namespace


def gradients(namespace, kind):
    """By the code of a namespace and by the oracle, guided outside, inside and not at all, where an alpha shows."""
    level, (name, distance_name) = (0.6, 0.8), kind
    settings: dict = {"alpha": 0.5} if name == "sid" else {}
    settings |= {"distance": namespace["distance"](distance_name, {"c": HUBER_C})} if name == "di_star" else {}
    settings |= {"schedule": schedule_of(level), "weighting": "score" if name == "sid" else "eps"}

    def chosen(*args, **kwargs):
        return namespace[function_of(name)](*args, **kwargs, **settings)

    if name == "sid":
        got = 2 * by_code(level, "score", PLAIN, unnormalised(chosen), namespace["guided"])
        yield got, score_divergence(level, "squared", "score", PLAIN, law_moves=True)
        return
    for reference in (PLAIN, GUIDED, GUIDED | {"where": "out"}):
        wanted = ORACLES[name](level, distance_name, "eps", reference)
        yield by_code(level, "eps", reference, chosen, namespace["guided"]), wanted


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    kind, original, planted = BUGS[bug]
    try:
        off = [(got - wanted).abs().max() for got, wanted in gradients(rebuilt(original, planted, function_of(kind[0])), kind)]
    except RuntimeError as error:  # autograd has nothing left to differentiate
        assert "does not require grad" in str(error)
        return
    assert max(off) > 1e-2


@pytest.mark.parametrize("kind", [DI_STAR, DI, FISHER])
def test_the_unchanged_source_passes_the_harness_of_the_planted_bugs(kind):
    for got, wanted in gradients(rebuilt(), kind):
        close(got, wanted)


def test_a_guided_score_network_is_caught():
    level = (0.6, 0.8)
    for name in ORACLES:
        wanted = ORACLES[name](level, "pseudo_huber", "x0", GUIDED)
        got = by_code(level, "x0", GUIDED, configured(name, level, "x0"), guide_score_network=True)
        assert (got - wanted).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------------- distances
@pytest.mark.parametrize("pair", [pseudo_huber(0.3), squared], ids=["pseudo_huber", "squared"])
def test_a_distance_is_0_at_0_and_its_gradient_is_its_values(pair):
    y = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert pair.value(y).shape == (3,) and pair.value(torch.zeros_like(y)).abs().max() < 1e-12
    torch.testing.assert_close(pair.gradient(y), torch.autograd.grad(pair.value(y).sum(), y)[0])


def test_norm_runs_over_the_whole_sample_and_c_is_per_root_dimension():
    y = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    for row, got in zip(y, pseudo_huber(0.3).gradient(y), strict=True):
        torch.testing.assert_close(got, row / (row.square().sum() + 0.3**2 * 20) ** 0.5)


def test_pseudo_huber_tends_to_squared_for_large_c():
    y, c = torch.randn(3, 7, dtype=torch.float64), 1e4
    for of in (0, 1):  # value, gradient
        torch.testing.assert_close(2 * c * 7**0.5 * pseudo_huber(c)[of](y), squared[of](y), rtol=1e-6, atol=1e-6)


def test_ones_own_pair_is_named_by_its_import_path():
    pair = distance("tiny.rewards:cosh_distance", {})
    y = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(pair.gradient(y), torch.sinh(y))
    torch.testing.assert_close(pair.value(y), (torch.cosh(y) - 1).sum(1))


# --------------------------------------------------------------------------------------------------- score network
@pytest.mark.parametrize("space", ["x0", "eps", "v"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_denoising_loss_has_its_value_and_is_least_at_the_posterior_mean(prediction, space):
    """For affine denoisers xt -> gain xt + shift the expected loss is known; its gradient is 0 at the posterior mean
    alone."""
    alpha, sigma = level = (0.6, 0.4) if prediction == "flow_prediction" else (0.6, 0.8)
    schedule = schedule_of(level)
    z, eps = (v.reshape(-1, 1) for v in torch.meshgrid(NODES, NODES, indexing="ij"))
    weights = torch.outer(WEIGHTS, WEIGHTS).flatten()
    t = torch.zeros(len(z), dtype=torch.long)
    best = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    weight = {"x0": 1.0, "eps": (alpha / sigma) ** 2, "v": 1 / sigma**2}[space]

    def loss_and_gradient(offset):
        gain, shift = parameters = torch.tensor([best + offset, MEAN - best * alpha * MEAN + offset], dtype=torch.float64)
        gain, shift = parameters.requires_grad_()

        def network_output(xt):  # what a network of this parametrisation would put out
            x0_hat = gain * xt + shift
            return {
                "epsilon": (xt - alpha * x0_hat) / sigma,
                "v_prediction": (alpha * xt - x0_hat) / sigma,
                "sample": x0_hat,
                "flow_prediction": (xt - alpha * x0_hat) / sigma - x0_hat,
            }[prediction]

        def denoiser(xt, t, c):
            return schedule.x0_from(prediction, network_output(xt), xt, t)

        loss = (weights * denoising_loss(denoiser, schedule, MEAN + STD * z, t, eps, {}, space)).sum()
        exact = (gain * alpha - 1) ** 2 * STD**2 + (gain * sigma) ** 2 + ((gain * alpha - 1) * MEAN + shift) ** 2
        torch.testing.assert_close(loss, weight * exact, rtol=1e-9, atol=1e-12)
        return torch.autograd.grad(loss, parameters)[0].abs().max()

    assert loss_and_gradient(0.0) < 1e-8 and loss_and_gradient(0.1) > 1e-2
