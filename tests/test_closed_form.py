"""The objective against exact gradients on Gaussians, by quadrature, in mean and scale; and planted bugs that must be caught.

Everything is one-dimensional and exact: generator x0 = mean + std z, score network = the posterior mean of that Gaussian
(its parameters constants), reference = the posterior mean of another. The oracle differentiates the divergence itself,
E_{x_t ~ p_sg[theta], t} d(m_t / k_t (s_theta(x_t) - s_ref(x_t))), and shares no line with the objective.
"""

import inspect
import textwrap

import numpy as np
import pytest
import torch

import diffinstruct.distances as distances
import diffinstruct.objectives as objectives
from diffinstruct.diffusion import Schedule, denoising_loss
from diffinstruct.distances import distance
from diffinstruct.guidance import guided

MEAN, STD, HUBER_C = 0.7, 0.6, 0.3
# (alpha, sigma): alpha 1, a lost alpha would show at 0.6; a variance-preserving pair; flow matching's alpha = 1 - t.
LEVELS = [(1.0, 0.8), (0.6, 0.8), (0.98, 0.2), (0.3, 0.95), (0.5, 0.5)]
NODES, WEIGHTS = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(200))
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def posterior_mean(mean, std, alpha, sigma):
    """The exact denoiser of N(mean, std^2) at one noise level."""
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return lambda xt, t, c: mean + gain * (xt - alpha * mean)


def exact(level, name, space, reference=(0.0, 1.0)):
    """(d/d mean, d/d std) of the divergence, the law of x_t held fixed."""
    alpha, sigma = level
    theta = torch.tensor([MEAN, STD], dtype=torch.float64, requires_grad=True)
    total_std = (alpha**2 * STD**2 + sigma**2) ** 0.5
    xt = alpha * MEAN + total_std * NODES
    score = -(xt - alpha * theta[0]) / (alpha**2 * theta[1] ** 2 + sigma**2)
    score_reference = -(xt - alpha * reference[0]) / (alpha**2 * reference[1] ** 2 + sigma**2)
    scale = {"score": 1.0, "eps": sigma, "x0": sigma**2 / alpha}[space]
    y = scale * (score - score_reference)
    d = (y**2 + HUBER_C**2).sqrt() - HUBER_C if name == "pseudo_huber" else y**2
    return torch.autograd.grad((WEIGHTS * d).sum(), theta)[0]


def by_objective(level, name, space, objective=None, reference=(0.0, 1.0)):
    """The same two numbers from the code under test, over all pairs of 200 z and 200 eps nodes."""
    alpha, sigma = level
    theta = torch.tensor([MEAN, STD], dtype=torch.float64, requires_grad=True)
    z, eps = (v.reshape(-1, 1) for v in torch.meshgrid(NODES, NODES, indexing="ij"))
    weights = torch.outer(WEIGHTS, WEIGHTS).flatten()
    loss, _ = (objective or objectives.diff_instruct_star)(
        theta[0] + theta[1] * z,
        torch.zeros(len(z), dtype=torch.long),
        eps,
        {},
        score_network=posterior_mean(MEAN, STD, alpha, sigma),
        reference=posterior_mean(*reference, alpha, sigma),
        schedule=Schedule(torch.tensor([alpha], dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64)),
        distance=distance(name, HUBER_C),
        space=space,
    )
    return torch.autograd.grad((weights * loss).sum(), theta)[0]


@pytest.mark.parametrize("space", ["x0", "eps", "score"])
@pytest.mark.parametrize("name", ["pseudo_huber", "squared"])
@pytest.mark.parametrize("level", LEVELS)
def test_gradient_is_that_of_the_divergence(level, name, space):
    wanted = exact(level, name, space)
    assert wanted.abs().min() > 1e-3  # a gradient of 0 would prove nothing
    torch.testing.assert_close(by_objective(level, name, space), wanted, rtol=1e-4, atol=1e-6)


def test_published_numbers_of_the_one_dimensional_example():
    """Worked out apart from this code: at alpha 1 the gradient is (0.596, -0.496), at alpha 0.6 it is (0.540, -0.174)."""
    for level, wanted in [((1.0, 0.8), (0.596, -0.496)), ((0.6, 0.8), (0.540, -0.174))]:
        got = by_objective(level, "pseudo_huber", "score")
        torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), atol=6e-4, rtol=0)


# Each changes one piece of the source of the objective or of its distance; each must move the gradient visibly.
BUGS = {
    "d' detached": ("distance(y)", "distance(y).detach()"),
    "score network detached": (
        "score_network(xt, t, c), reference(xt, t, c)", "score_network(xt, t, c).detach(), reference(xt, t, c)"),
    "reference detached": ("reference(xt, t, c)\n", "reference(xt, t, c).detach()\n"),
    "x_t detached": ("schedule.diffuse(x0, t, eps)", "schedule.diffuse(x0, t, eps).detach()"),
    "x0 of the right factor detached": ("(m * (f - x0))", "(m * (f - x0.detach()))"),
    "sign flipped": ("return -per_sample_sum", "return per_sample_sum"),
    "distance's denominator detached": (
        "norm = (flat.pow(2).sum(1) + c * c * flat.shape[1]).sqrt()",
        "norm = (flat.pow(2).sum(1) + c * c * flat.shape[1]).sqrt().detach()"),
    "c dropped": ("+ c * c * flat.shape[1]", ""),
    "f and r exchanged": ("m * (f - r)", "m * (r - f)"),
    "scale of the space lost on one factor": ("(m * (f - x0))", "(f - x0)"),
    "alpha lost in the forward process's scale": ("alpha / sigma**2", "1 / sigma**2"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    original, planted = BUGS[bug]
    source = inspect.getsource(objectives) + "\n" + textwrap.dedent(inspect.getsource(distances.pseudo_huber))
    assert source.count(original) == 1, f"the source changed: {original!r} stands {source.count(original)} times"
    namespace: dict = {"partial": distances.partial}
    exec(
        compile(source.replace(original, planted).replace("from __future__ import annotations", ""), bug, "exec"),
        namespace,
    )
    level, huber = (0.6, 0.8), namespace["pseudo_huber"]

    def mutant(*args, distance, **kwargs):
        return namespace["diff_instruct_star"](*args, distance=lambda y: huber(y, HUBER_C), **kwargs)

    try:
        got = by_objective(level, "pseudo_huber", "score", mutant)
    except RuntimeError as error:  # autograd has nothing left to differentiate
        assert "does not require grad" in str(error)
        return
    assert (got - exact(level, "pseudo_huber", "score")).abs().max() > 1e-2


def test_the_unmutated_source_passes_the_harness_of_the_planted_bugs():
    got = by_objective((0.6, 0.8), "pseudo_huber", "score")
    assert (got - exact((0.6, 0.8), "pseudo_huber", "score")).abs().max() < 1e-4


def test_norm_runs_over_the_whole_sample_and_c_is_per_root_dimension():
    y = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    for row, got in zip(y, distance("pseudo_huber", 0.3)(y), strict=True):
        torch.testing.assert_close(got, row / (row.square().sum() + 0.3**2 * 20) ** 0.5)


def test_pseudo_huber_tends_to_squared_for_large_c():
    y = torch.randn(3, 7, dtype=torch.float64)
    torch.testing.assert_close(
        2e4 * 7**0.5 * distance("pseudo_huber", 1e4)(y), distance("squared", 0)(y), rtol=1e-6, atol=1e-6
    )


def test_guidance_in_is_the_gradient_against_the_guided_score():
    """Guided Gaussian scores of equal width are the score of a shifted Gaussian: mean m + cfg (m - m_null)."""
    alpha, sigma, cfg = 0.6, 0.8, 1.5
    means = {"c": 0.4, "null": -0.2}

    def conditional(xt, t, c):
        mean = c["m"].to(xt)
        return mean + alpha / (alpha**2 + sigma**2) * (xt - alpha * mean)

    shifted = posterior_mean(means["c"] + cfg * (means["c"] - means["null"]), 1.0, alpha, sigma)
    xt, t = torch.randn(5, 1, dtype=torch.float64), torch.zeros(5, dtype=torch.long)
    c, null = {"m": torch.full((5, 1), means["c"])}, {"m": torch.full((1, 1), means["null"])}
    torch.testing.assert_close(guided(conditional, null, cfg)(xt, t, c), shifted(xt, t, c), rtol=1e-6, atol=1e-6)
    assert guided(conditional, null, 0.0) is conditional


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_denoising_loss_is_least_at_the_posterior_mean(prediction):
    """Over affine denoisers xt -> gain xt + shift the loss's gradient vanishes at the posterior mean, and only there."""
    alpha, sigma = 0.6, 0.8
    schedule = Schedule(torch.tensor([alpha], dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64))
    z, eps = (v.reshape(-1, 1) for v in torch.meshgrid(NODES, NODES, indexing="ij"))
    weights = torch.outer(WEIGHTS, WEIGHTS).flatten()
    t = torch.zeros(len(z), dtype=torch.long)
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    shift = MEAN - gain * alpha * MEAN

    def gradient(offset):
        parameters = torch.tensor([gain + offset, shift + offset], dtype=torch.float64, requires_grad=True)

        def network_output(xt):  # what a network of this parametrisation would put out
            x0_hat = parameters[0] * xt + parameters[1]
            return {
                "epsilon": (xt - alpha * x0_hat) / sigma,
                "v_prediction": (alpha * xt - x0_hat) / sigma,
                "sample": x0_hat,
            }[prediction]

        def denoiser(xt, t, c):
            return schedule.x0_from(prediction, network_output(xt), xt, t)

        loss = denoising_loss(denoiser, schedule, MEAN + STD * z, t, eps, {})
        return torch.autograd.grad((weights * loss).sum(), parameters)[0].abs().max()

    assert gradient(0.0) < 1e-8 and gradient(0.1) > 1e-2
