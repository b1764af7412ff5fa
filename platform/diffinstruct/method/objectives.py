"""The page of the paper: what the generator minimises, each objective one function from a sample to its loss.

    min_theta  E[-reward_scale r(x0, c)] + regularization_weight D(p_theta, p_ref)          (arXiv 2410.20898)

Legend. x0 [B, ...] the generator's sample, carrying gradient; t [B]; eps [B, ...]; f = score network's x0 prediction,
r = the reference's, guided if guidance is inside; g = the guidance that stays beside it, or None; e = f - r.
k_t = alpha_t / sigma_t^2, so y = s_psi - s_ref = k_t e. m_t is the scale of the space where differences are measured
(`diffusion.WEIGHTINGS`): choosing the weighting is choosing w(t). Both networks' *parameters* are constants here.

Reduction, the same for all: sum over a sample's dimensions; the caller takes the mean over the global batch. Reward
scale and regularization weight are to be read against that sum. Equal coefficients mean nothing across objectives: each
pulls with its own strength, so compare them at equal distance to the reference.

Each returns the loss [B] and its record, per sample: "x0_gap", the mean of e^2 over dimensions (of x0 predictions in
all objectives, so that one plot compares them), "reference_error", mean|x0 - r|, and what else it has to tell.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from diffinstruct.method.diffusion import Conditions, Denoiser, GuidedReference, Schedule, per_sample_sum
from diffinstruct.method.distances import Distance

Loss = tuple[Tensor, dict[str, Tensor]]


class Objective(Protocol):
    def __call__(
        self, x0: Tensor, t: Tensor, eps: Tensor, c: Conditions, *, score_network: Denoiser, reference: GuidedReference
    ) -> Loss: ...


def diff_instruct_star(
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    c: Conditions,
    *,
    score_network: Denoiser,
    reference: GuidedReference,
    schedule: Schedule,
    weighting: str,
    distance: Distance,
) -> Loss:
    """DI* (arXiv 2410.20898); with reward scale 0 SIM (arXiv 2410.16794). Its gradient in theta is that of the
    score-based divergence, the law of x_t held fixed:

        L = - w_t < d'(y), s_psi(x_t) - grad log q(x_t | x0) >

    Gradient flows through x_t into f *and* r, and through the distance's denominator; cutting it there silently gives a
    KL method. The right factor is k_t (f - x0). Measured in a space, with d_t(y) = d(m_t y / k_t) and w_t = 1:

        L = - < d'(m_t e), m_t (f - x0) >

    "x0" with the pseudo-Huber distance is the published form with c_t = c k_t and w_t = 1 / k_t.
    """
    xt, m = schedule.diffuse(x0, t, eps), schedule.scale(weighting, t, x0)
    f, (r, g) = score_network(xt, t, c), reference(xt, t, c)
    y = m * (f - r)
    loss = -per_sample_sum(distance.gradient(y) * m * (f - x0))
    return loss + _beside(g, m, xt), _record(f, r, x0) | {"distance": distance.value(y.detach())}


def diff_instruct(
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    c: Conditions,
    *,
    score_network: Denoiser,
    reference: GuidedReference,
    schedule: Schedule,
    weighting: str,
) -> Loss:
    """Diff-Instruct (arXiv 2305.18455), the integral KL divergence; with a reward Diff-Instruct++ (arXiv 2410.18881).

        L = w_t < sg[y], x_t >,   w_t = m_t / k_t

    No gradient flows through the networks: that is the method. "x0" is w_t = sigma_t^2 / alpha_t, DMD's.
    """
    xt, m = schedule.diffuse(x0, t, eps), schedule.scale(weighting, t, x0)
    with torch.no_grad():
        f, (r, g) = score_network(xt, t, c), reference(xt, t, c)
    return per_sample_sum(m * (f - r) * xt) + _beside(g, m, xt), _record(f, r, x0)


def dmd(x0: Tensor, t: Tensor, eps: Tensor, c: Conditions, **given: Any) -> Loss:
    """DMD without its GAN and regression losses (arXiv 2311.18828): Diff-Instruct, divided for each sample
    by mean|x0 - r|. Takes what `diff_instruct` takes."""
    loss, record = diff_instruct(x0, t, eps, c, **given)
    return loss / record["reference_error"], record


def sid(
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    c: Conditions,
    *,
    score_network: Denoiser,
    reference: GuidedReference,
    schedule: Schedule,
    weighting: str,
    alpha: float,
) -> Loss:
    """SiD, score identity distillation (arXiv 2404.04057).

        L = < m_t (r - f), m_t [(r - x0) - alpha (r - f)] > / mean|x0 - r|

    Gradient flows through both networks, not through the normaliser. Without that, 2 L measured in scores has the
    gradient of E||y||^2 with the law of x_t held fixed at alpha 1 (SIM with the squared distance), of the whole Fisher
    divergence at 0.5.
    """
    xt, m = schedule.diffuse(x0, t, eps), schedule.scale(weighting, t, x0)
    f, (r, g) = score_network(xt, t, c), reference(xt, t, c)
    loss = per_sample_sum(m * (r - f) * m * ((r - x0) - alpha * (r - f))) + _beside(g, m, xt)
    record = _record(f, r, x0)
    return loss / record["reference_error"], record


def _beside(g: Tensor | None, m: Tensor, xt: Tensor) -> Tensor | float:
    """Guidance OUT (arXiv 2410.20898): - (guidance_scale - 1) w_t < sg[s_ref(c) - s_ref(null)], x_t >, w_t = m_t /
    k_t."""
    return 0.0 if g is None else -per_sample_sum(m * g * xt)


def _record(f: Tensor, r: Tensor, x0: Tensor) -> dict[str, Tensor]:
    """Constants [B]. "reference_error", how far the sample is from what the reference makes of it, divides DMD and
    SiD."""
    return {
        "x0_gap": (f - r).detach().pow(2).flatten(1).mean(1),
        "reference_error": (x0 - r).detach().abs().flatten(1).mean(1).clamp(min=1e-5),
    }


def objective(
    name: str, *, schedule: Schedule, weighting: str, distance: Distance, sid_alpha: float
) -> Objective | None:
    """The objective of a configuration. None trains on the reward alone (ReFL and DRaFT-1 on a one-step model)."""
    known: dict[str, Callable[..., Loss] | None] = {
        "di_star": partial(diff_instruct_star, distance=distance),
        "sim": partial(diff_instruct_star, distance=distance),  # with reward scale 0
        "diff_instruct": diff_instruct,  # with reward scale 0
        "diff_instruct_pp": diff_instruct,
        "dmd": dmd,
        "sid": partial(sid, alpha=sid_alpha),
        "reward_only": None,
    }
    chosen = known[name]
    return partial(chosen, schedule=schedule, weighting=weighting) if chosen else None
