"""The page of the paper: what the generator minimises, each objective one function from a sample to its loss.

    min_theta  E[-reward_scale r(x0, c)] + regularization_weight D(p_theta, p_ref)          (arXiv 2410.20898)

Legend. x0 [B, ...] the generator's sample, carrying gradient; t [B]; eps [B, ...]; f = score network's x0 prediction,
r = the (guided) reference's; both networks' *parameters* are constants, their *inputs* are not: gradient flows through
x_t into f and r, and through the distance's denominator. Cutting it there silently gives a KL method.

Reduction: sum over a sample's dimensions; the caller takes the mean over the global batch. The reward scale is to be read
against that sum.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffinstruct.diffusion import Conditions, Denoiser, Schedule, per_sample_sum
from diffinstruct.distances import Distance

SPACES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x0": lambda alpha, sigma: alpha.new_ones(()),
    "eps": lambda alpha, sigma: alpha / sigma,
    "score": lambda alpha, sigma: alpha / sigma**2,
}
"""Where the distance measures: m_t turns a difference of x0 predictions into one of x0, eps (up to sign) or scores."""


def diff_instruct_star(
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    c: Conditions,
    *,
    score_network: Denoiser,
    reference: Denoiser,
    schedule: Schedule,
    distance: Distance,
    space: str,
) -> tuple[Tensor, Tensor]:
    """DI*'s loss [B], whose gradient in theta is that of the score-based divergence,
    and the divergence [B] for the record: ||m_t (f - r)||^2 per dimension.

        L = - w_t < d'(y), s_psi(x_t) - grad log q(x_t | x0) >,     y = s_psi(x_t) - s_ref(x_t)

    Scores differ by k_t = alpha_t / sigma_t^2 times the x0 predictions: y = k_t (f - r), and the right factor is
    k_t (f - x0). Measured in a space m_t (see SPACES), d_t(y) = d(m_t y / k_t) and w_t = 1:

        L = - < d'(m_t (f - r)), m_t (f - x0) >

    `space` "x0" with the pseudo-Huber distance is the published form with c_t = c k_t and w_t = 1 / k_t.
    """
    xt = schedule.diffuse(x0, t, eps)
    alpha, sigma = schedule.at(t, x0)
    m = SPACES[space](alpha, sigma)
    f, r = score_network(xt, t, c), reference(xt, t, c)
    y = m * (f - r)
    return -per_sample_sum(distance(y) * (m * (f - x0))), y.detach().pow(2).flatten(1).mean(1)
