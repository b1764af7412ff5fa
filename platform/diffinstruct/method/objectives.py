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

A new objective is one function here and one row of `OBJECTIVES`; or the same function in a file of your own, named
`module:attribute` in the recipe. It takes x0, t, eps, c, score_network and reference, those of schedule, weighting and
distance that its signature names, and parameters of its own, which come from `objective.args`:

    def half_distance(x0, t, eps, c, *, score_network, reference, schedule, weighting, distance, factor=0.5): ...

`objective_validation.validate_objective` tries your own before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from diffinstruct.method.arguments import complete_arguments, import_attribute, parameters

if TYPE_CHECKING:  # the configuration reads OBJECTIVES before torch is there, and answers in half a second
    from torch import Tensor

    from diffinstruct.method.diffusion import Conditions, Denoiser, GuidedReference, Schedule
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
    import torch

    xt, m = schedule.diffuse(x0, t, eps), schedule.scale(weighting, t, x0)
    with torch.no_grad():
        f, (r, g) = score_network(xt, t, c), reference(xt, t, c)
    return per_sample_sum(m * (f - r) * xt) + _beside(g, m, xt), _record(f, r, x0)


def dmd(
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
    """DMD without its GAN and regression losses (arXiv 2311.18828): Diff-Instruct, divided by a sample's mean|x0 - r|.

    With "x0" its gradient at the sample is the paper's, w_t alpha_t (s_psi - s_ref) for w_t = sigma_t^2 / alpha_t over
    mean|x0 - r|: that is alpha_t (f - r) / mean|x0 - r|. The program of DMD2 (arXiv 2405.14867) has no alpha_t there:
    that is "dmd2". It takes the mean over dimensions, where all objectives here take the sum.
    """
    loss, record = diff_instruct(
        x0, t, eps, c, score_network=score_network, reference=reference, schedule=schedule, weighting=weighting
    )
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
    alpha: float = 1.0,
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


def per_sample_sum(x: Tensor) -> Tensor:
    """[B, ...] -> [B]: the sum over a sample's dimensions, the reduction of every objective here."""
    return x.flatten(1).sum(1)


def _beside(g: Tensor | None, m: Tensor, xt: Tensor) -> Tensor | float:
    """Guidance OUT (arXiv 2410.20898): -(guidance_scale - 1) w_t < sg[s_ref(c) - s_ref(null)], x_t >, w_t = m_t / k_t."""
    return 0.0 if g is None else -per_sample_sum(m * g * xt)


def _record(f: Tensor, r: Tensor, x0: Tensor) -> dict[str, Tensor]:
    """Constants [B]. "reference_error", the sample's distance from the reference's prediction, divides DMD and SiD."""
    return {
        "x0_gap": (f - r).detach().pow(2).flatten(1).mean(1),
        "reference_error": (x0 - r).detach().abs().flatten(1).mean(1).clamp(min=1e-5),
    }


# ----------------------------------------------------------------------------------------------------- the table
@dataclass(frozen=True)
class ObjectiveFacts:
    """What the rest of the platform has to know of an objective."""

    title: str
    function: Callable[..., Loss] | None = None
    divergence: bool = True  # False: the reward alone, so no score network is trained
    with_reward: str | None = None  # reward_scale has to be 0; the same objective with a reward has this name


OBJECTIVES: dict[str, ObjectiveFacts] = {
    "di_star": ObjectiveFacts("DI* (the paper)", diff_instruct_star),
    "sim": ObjectiveFacts("SIM (DI* at reward_scale 0)", diff_instruct_star, with_reward="di_star"),
    "diff_instruct": ObjectiveFacts("Diff-Instruct (KL, reward_scale 0)", diff_instruct, with_reward="diff_instruct_pp"),
    "diff_instruct_pp": ObjectiveFacts("Diff-Instruct++ (KL and reward)", diff_instruct),
    "sid": ObjectiveFacts("SiD", sid),
    "dmd": ObjectiveFacts("DMD without GAN", dmd),
    "reward_only": ObjectiveFacts("the reward term alone (ReFL and DRaFT-1 on a one-step model)", divergence=False),
}
"""The built-in objectives by their name in a recipe."""

OWN = ObjectiveFacts("your own as 'module:attribute'")
"""Of an objective that is no row above. What it costs, `diffinstruct check` counts by running it."""

GIVEN = ("x0", "t", "eps", "c", "score_network", "reference", "schedule", "weighting", "distance")
"""Parameters of an objective that the platform fills in; all others are its own."""


def facts(name: str) -> ObjectiveFacts:
    """The facts of a configuration's `objective.name`."""
    return OBJECTIVES.get(name, OWN)


def objective_arguments(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """`objective.args` with defaults filled in. Raises ArgumentError; what a module of yours raises."""
    function = _function(name)
    return complete_arguments(name, parameters(function, without=GIVEN) if function else {}, args)


def objective(
    name: str, *, schedule: Schedule, weighting: str, distance: Distance, args: Mapping[str, Any]
) -> Objective | None:
    """The objective of a configuration. None trains on the reward alone."""
    function = _function(name)
    if function is None:
        return None
    of_the_run = {"schedule": schedule, "weighting": weighting, "distance": distance}
    named = {key: of_the_run[key] for key in parameters(function) if key in of_the_run}
    return partial(function, **named, **objective_arguments(name, args))


def _function(name: str) -> Callable[..., Loss] | None:
    function = OBJECTIVES[name].function if name in OBJECTIVES else import_attribute(name)
    if name not in OBJECTIVES and not callable(function):
        raise TypeError(f"it is of type {type(function).__name__}, expected a function")
    return function
