"""Planted mistakes in somebody's own distance or objective: each is refused, with what was seen."""

from functools import partial

import pytest
import torch

from diffinstruct.method.diffusion import Schedule
from diffinstruct.method.distances import DISTANCES, Distance, distance, pseudo_huber, squared
from diffinstruct.method.objective_validation import validate_distance, validate_objective
from diffinstruct.method.objectives import OBJECTIVES, diff_instruct_star, objective

T = torch.linspace(0.01, 0.99, 100, dtype=torch.float64)
SCHEDULE = Schedule((1 - T**2).sqrt(), T)


def norm(y):
    return y.flatten(1).norm(dim=1)


def columns(values, y):
    return values.view(-1, *(1,) * (y.dim() - 1))


# ----------------------------------------------------------------------------------------------------- distances
@pytest.mark.parametrize("name", DISTANCES)
def test_built_in_distances_pass(name):
    validate_distance(distance(name, {}))


@pytest.mark.parametrize("c", [1e-3, 0.03, 10.0])
def test_any_width_of_the_pseudo_huber_distance_passes(c):
    validate_distance(pseudo_huber(c))


def test_other_rightful_distances_pass():
    cosh = Distance(lambda y: (y.cosh() - 1).flatten(1).sum(1), torch.sinh)
    huber = Distance(lambda y: torch.where(y.abs() < 1, y**2 / 2, y.abs() - 0.5).flatten(1).sum(1), lambda y: y.clamp(-1, 1))
    for pair in (cosh, huber):
        validate_distance(pair)
        validate_distance(Distance(lambda y, d=pair.value: d(y.float()), lambda y, d=pair.gradient: d(y.float())))


def softened(y):
    return columns((norm(y) ** 2 + 1).sqrt(), y)


DISTANCE_MISTAKES = {
    "d' with the wrong sign": (
        Distance(squared.value, lambda y: -2 * y),
        "d' is not the gradient of d: differences of d are -1 times what d' says",
    ),
    "d and d' both with the wrong sign": (
        Distance(lambda y: -squared.value(y), lambda y: -2 * y),
        r"d\(y\) is smaller at y of standard deviation 0.1 than at y = 0",
    ),
    "d' without its factor 2": (
        Distance(squared.value, lambda y: 1 * y),
        "d' is not the gradient of d: differences of d are 2 times what d' says",
    ),
    "d' of another distance": (Distance(squared.value, pseudo_huber(1.0).gradient), "d' is not the gradient of d"),
    "d' wrong for large y alone": (
        Distance(squared.value, lambda y: 2 * y.clamp(-4, 4)),
        "d' is not the gradient of d: differences of d are 1.*times",
    ),
    "L1, whose d' has no derivative": (
        Distance(lambda y: y.abs().flatten(1).sum(1), torch.sign),
        "d' has no derivative, it is 0 everywhere",
    ),
    "d' detached": (
        Distance(squared.value, lambda y: 2 * y.detach()),
        r"d'\(y\) carries no gradient to y \(is it detached\?\)",
    ),
    "the denominator of d' detached": (
        Distance(lambda y: (norm(y) ** 2 + 1).sqrt() - 1, lambda y: y / softened(y).detach()),
        "d' is not differentiable as torch sees it: differences of d' are",
    ),
    "the norm, without a gradient at 0": (
        Distance(norm, lambda y: y / columns(norm(y), y)),
        r"d'\(y\) is not finite at y = 0, in 1024 of 1024 places",
    ),
    "the norm, with too little against that": (
        Distance(norm, lambda y: y / columns(norm(y), y).clamp_min(1e-300)),
        r"d'\(y\) is not finite at y = 0",
    ),
    "infinite for large y": (
        Distance(lambda y: ((300 * y).cosh() - 1).flatten(1).sum(1), lambda y: 300 * (300 * y).sinh()),
        r"d\(y\) is not finite at y of standard deviation 1, in 4 of 4 places",
    ),
    "one value for the whole batch": (
        Distance(lambda y: y.pow(2).sum(), squared.gradient),
        r"d\(y\) has the shape \[\], expected \[4\]",
    ),
    "a value for each element": (
        Distance(lambda y: y.pow(2), squared.gradient),
        r"d\(y\) has the shape \[4, 4, 8, 8\], expected \[4\]",
    ),
    "d' summed": (
        Distance(squared.value, lambda y: 2 * y.flatten(1).sum(1)),
        r"d'\(y\) has the shape \[4\], expected \[4, 4, 8, 8\]",
    ),
    "a number": (
        Distance(lambda y: 1.0, squared.gradient),  # type: ignore[arg-type, return-value]
        r"d\(y\) is a float, expected a tensor \[4\]",
    ),
    "whole numbers": (
        Distance(lambda y: y.flatten(1).sum(1).long(), squared.gradient),
        r"d\(y\) is of torch.int64, expected floating point",
    ),
    "an error": (Distance(lambda y: y @ y.new_ones(3), squared.gradient), r"d\(y\) of a y \[4, 4, 8, 8\]: RuntimeError: "),
}


@pytest.mark.parametrize("mistake", DISTANCE_MISTAKES)
def test_a_planted_mistake_of_a_distance_is_refused(mistake):
    pair, said = DISTANCE_MISTAKES[mistake]
    with pytest.raises(ValueError, match=said) as caught:
        validate_distance(pair)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- objectives
def validate(loss, **more):
    validate_objective(loss, 0, len(T), **more)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("weighting", ["x0", "eps", "v", "score"])
@pytest.mark.parametrize("name", [name for name, facts in OBJECTIVES.items() if facts.divergence])
def test_built_in_objectives_pass(name, weighting, beside):
    for pair in (pseudo_huber(), squared):
        built = objective(name, schedule=SCHEDULE, weighting=weighting, distance=pair, args={})
        assert built
        validate(built, guidance_beside=beside)


DI_STAR = partial(diff_instruct_star, schedule=SCHEDULE, weighting="x0", distance=squared)


def changed(change):
    """DI*, with its loss and record put through `change`."""

    def loss(x0, t, eps, c, **networks):
        return change(*DI_STAR(x0, t, eps, c, **networks))

    return loss


def without_x0(x0, t, eps, c, *, score_network, reference):
    f, (r, _) = score_network(eps, t, c), reference(eps, t, c)
    return (f - r).requires_grad_().flatten(1).pow(2).sum(1), {}


def of_some_samples(x0, t, eps, c, *, score_network, reference):
    return (x0 * (t > 50).view(-1, 1, 1, 1)).pow(2).flatten(1).sum(1), {}


def by_its_neighbours(x0, t, eps, c, *, score_network, reference):
    return (x0 - x0.mean(0)).pow(2).flatten(1).sum(1), {}


def divided_by_the_difference(x0, t, eps, c, *, score_network, reference):
    xt = SCHEDULE.diffuse(x0, t, eps)
    difference = score_network(xt, t, c) - reference(xt, t, c)[0]
    return difference.flatten(1).sum(1) / difference.flatten(1).norm(dim=1), {}


def without_guidance(x0, t, eps, c, *, score_network, reference):
    return DI_STAR(x0, t, eps, c, score_network=score_network, reference=lambda *given: (reference(*given)[0], None))


OBJECTIVE_MISTAKES = {
    "a detached loss": (
        changed(lambda loss, record: (loss.detach(), record)),
        r"its loss carries no gradient \(is it detached\?\), so none reaches x0",
    ),
    "a loss that does not depend on x0": (without_x0, "no gradient of its loss reaches x0"),
    "a loss that does not use x0 for small t": (of_some_samples, "no gradient of its loss reaches x0, for 2 of 4 sam"),
    "a gradient of 0": (
        changed(lambda loss, record: (0 * loss, record)),
        "no gradient of its loss reaches x0, for 4 of 4 samples",
    ),
    "a sample's loss with a gradient at others": (by_its_neighbours, "the loss of one sample has a gradient at others"),
    "the mean over the batch": (
        changed(lambda loss, record: (loss.mean(), record)),
        r"its loss has the shape \[\], expected \[4\]",
    ),
    "a loss that is not finite": (changed(lambda loss, record: (loss / 0, record)), "its loss is not finite, in 4 of 4 places"),
    "a gradient that is not finite": (
        changed(lambda loss, record: ((loss - loss.detach()).abs().sqrt(), record)),
        "its gradient at x0 is not finite",
    ),
    "no value where the networks agree": (divided_by_the_difference, "its loss is not finite"),
    "a record's value for the batch": (
        changed(lambda loss, record: (loss, {"gap": loss.detach().mean()})),
        r"'gap' of its record has the shape \[\], expected \[4\]",
    ),
    "a record that is not finite": (
        changed(lambda loss, record: (loss, {"gap": loss.detach() * float("nan")})),
        "'gap' of its record is not finite, in 4 of 4 places",
    ),
    "no record": (changed(lambda loss, record: loss), "returned a Tensor, expected the loss .* and its record"),
    "an error": (changed(lambda loss, record: record["nothing"]), "KeyError: 'nothing'"),
    "unknown parameters": (lambda x0, t: x0, "TypeError: .*unexpected keyword argument"),
}


@pytest.mark.parametrize("mistake", OBJECTIVE_MISTAKES)
def test_a_planted_mistake_of_an_objective_is_refused(mistake):
    loss, said = OBJECTIVE_MISTAKES[mistake]
    with pytest.raises(ValueError, match=said) as caught:
        validate(loss)
    assert "\n" not in str(caught.value)


def test_an_objective_that_leaves_guidance_out_is_refused_where_there_is_some():
    validate(without_guidance)
    with pytest.raises(ValueError, match="makes no difference"):
        validate(without_guidance, guidance_beside=True)


def test_no_random_number_of_the_run_is_used():
    before = torch.get_rng_state()
    validate_distance(squared)
    validate(DI_STAR)
    assert torch.equal(before, torch.get_rng_state())
