"""Objectives and distances of the user's own are tried before the first step, as rewards are.

A distance has a right answer: d' is compared with differences of d, and the gradient of d' with differences of d',
which is what DI* trains with. The right gradient of an objective is not known here: checked are shapes, that all is
finite at both ends of the run's t and where both networks agree, and that each sample's gradient is its own.

A mistake is a ValueError of one line, with what was seen and what was expected.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from diffinstruct.method.diffusion import Conditions
from diffinstruct.method.distances import Distance
from diffinstruct.method.objectives import Objective, per_sample_sum

SHAPE = (4, 4, 8, 8)  # of the samples that are tried: [B, channels, height, width]
SCALES = (0.1, 1.0, 3.0)  # standard deviations of the differences y that a distance is tried at
STEPS = (1e-2, 1e-3, 1e-5)
"""Lengths of a finite difference, in units of the scale; the best of them counts, since d may bend within a step."""
DIRECTIONS = 3
WRONG = 0.01  # relative error of a derivative that is taken for another's
REFERENCE_GAIN = 0.6


# ----------------------------------------------------------------------------------------------------- distances
def validate_distance(distance: Distance) -> None:
    """Raises ValueError where d' is not the gradient of d, has none itself, or anything is not finite."""
    zero = torch.zeros(SHAPE, device="cpu")  # in the arithmetic of a round: it starts where both networks agree
    at_zero = _value(distance, zero, "at y = 0")
    _derivative(distance, zero, torch.ones_like(zero), "at y = 0")
    draws = torch.Generator().manual_seed(0)
    curved = [_derivatives_agree(distance, scale, at_zero, draws) for scale in SCALES]
    if not any(curved):
        raise ValueError("d' has no derivative, it is 0 everywhere: no gradient would flow through the distance")


def _derivatives_agree(distance: Distance, scale: float, at_zero: Tensor, draws: torch.Generator) -> bool:
    """Whether d' has a derivative at this scale. Raises ValueError where one is not as differences say."""
    y, *directions = torch.randn(1 + 2 * DIRECTIONS, *SHAPE, generator=draws, dtype=torch.float64, device="cpu")
    y, steps, where = scale * y, [step * scale for step in STEPS], f"at y of standard deviation {scale:g}"
    curved = False
    if (_value(distance, y, where) < at_zero).any():
        raise ValueError(f"d(y) is smaller {where} than at y = 0, where a distance is smallest")
    for v, w in zip(directions[::2], directions[1::2], strict=True):
        slope = partial(_slope, distance, v, where)
        differences = [_difference(partial(_value, distance, where=where), y, v, step) for step in steps]
        if (factor := _disagreement(slope(y), differences)) is not None:
            raise ValueError(f"d' is not the gradient of d: differences of d are {factor:.3g} times what d' says")
        second = per_sample_sum(_derivative(distance, y, v, where) * w)
        differences = [_difference(slope, y, w, step) for step in steps]
        if (factor := _disagreement(second, differences)) is not None:
            raise ValueError(
                f"d' is not differentiable as torch sees it: differences of d' are {factor:.3g} times its gradient "
                "(is a part of it detached?)"
            )
        curved = curved or bool(second.any())
    return curved


def _value(distance: Distance, y: Tensor, where: str) -> Tensor:
    with torch.no_grad():
        return _called("d", distance.value, y, (len(y),), where).double()


def _slope(distance: Distance, v: Tensor, where: str, y: Tensor) -> Tensor:
    """[B]: <d'(y), v>."""
    with torch.no_grad():
        return per_sample_sum(_called("d'", distance.gradient, y, y.shape, where).double() * v)


def _derivative(distance: Distance, y: Tensor, v: Tensor, where: str) -> Tensor:
    """The gradient of <d'(y), v> at y: the second derivative of d, times v."""
    leaf = y.clone().requires_grad_()
    with torch.enable_grad():
        derivative = _grad((_called("d'", distance.gradient, leaf, y.shape, where) * v).sum(), leaf)
    if derivative is None:
        raise ValueError("d'(y) carries no gradient to y (is it detached?), and di_star differentiates it")
    _expect("the gradient of d'(y)", derivative, y.shape, where)
    return derivative.double()


def _called(title: str, function: Callable[[Tensor], Tensor], y: Tensor, shape: tuple[int, ...], where: str) -> Tensor:
    try:
        value = function(y.clone())
    except (Exception, SystemExit) as error:
        raise ValueError(f"{title}(y) of a y {list(y.shape)}: {_one_line(error)}") from error
    _expect(f"{title}(y)", value, shape, where)
    return value


def _difference(function: Callable[[Tensor], Tensor], y: Tensor, v: Tensor, step: float) -> Tensor:
    """[B]: the central difference of a function [B, ...] -> [B] along v."""
    return (function(y + step * v) - function(y - step * v)) / (2 * step)


def _disagreement(derivative: Tensor, differences: Sequence[Tensor]) -> float | None:
    """None where a sample's derivative agrees with one of its differences; else their mean ratio, by least squares."""
    error = torch.stack([(difference - derivative).abs() for difference in differences])
    size = torch.stack([difference.abs() for difference in differences]).amax(0).maximum(derivative.abs())
    wrong = error.amin(0) > WRONG * size.mean()
    if not wrong.any():
        return None
    nearest = differences[-1]
    return ((nearest * derivative).sum() / (derivative * derivative).sum()).item()


# ---------------------------------------------------------------------------------------------------- objectives
def validate_objective(objective: Objective, t_min: int, t_max: int, guidance_beside: bool = False) -> None:
    """Raises ValueError where the loss has no finite gradient at x0, or is not a loss for each sample; and where it takes
    no notice of the guidance that the run's reference gives beside its prediction (`guidance_beside`)."""
    draws = torch.Generator().manual_seed(0)
    x0, eps, guidance = (torch.randn(SHAPE, generator=draws, device="cpu") for _ in range(3))
    t = torch.linspace(t_min, t_max - 1, SHAPE[0], device="cpu").long()
    c = {"prompt_embeds": torch.randn(SHAPE[0], 3, 5, generator=draws, device="cpu")}
    beside = guidance if guidance_beside else None

    def loss_at(leaf: Tensor, score_gain: float = 0.8, beside: Tensor | None = beside) -> Tensor:
        return _loss(objective, leaf, t, eps, c, score_gain, beside)

    _own_gradients(loss_at, x0)
    equal = x0.clone().requires_grad_()
    _gradient_at(loss_at(equal, score_gain=REFERENCE_GAIN), equal, "where both networks predict the same")
    if guidance_beside:
        gradients = []
        for strength in (0.0, 1.0):
            leaf = x0.clone().requires_grad_()
            gradients.append(_gradient_at(loss_at(leaf, beside=strength * guidance), leaf))
        if torch.equal(*gradients):
            raise ValueError("the guidance that the reference gives beside its prediction (r, g) makes no difference")


def _loss(
    objective: Objective, x0: Tensor, t: Tensor, eps: Tensor, c: Conditions, score_gain: float, beside: Tensor | None
) -> Tensor:
    """The loss [B] against two smooth networks; shapes and figures are checked, those of the record as well."""

    def network(gain: float) -> Callable[[Tensor, Tensor, Conditions], Tensor]:
        return lambda xt, t, c: gain * xt + 0.1 * torch.tanh(xt)

    def reference(xt: Tensor, t: Tensor, c: Conditions) -> tuple[Tensor, Tensor | None]:
        return network(REFERENCE_GAIN)(xt, t, c), beside

    try:
        with torch.enable_grad():
            answer = objective(x0, t, eps, c, score_network=network(score_gain), reference=reference)
    except (Exception, SystemExit) as error:
        raise ValueError(_one_line(error)) from error
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)):
        raise ValueError(f"returned a {type(answer).__name__}, expected the loss [B] and its record, a dictionary")
    loss, record = answer
    _expect("its loss", loss, (len(x0),))
    for key, values in record.items():
        _expect(f"{key!r} of its record", values, (len(x0),))
    return loss


def _own_gradients(loss_at: Callable[[Tensor], Tensor], x0: Tensor) -> None:
    """Each sample's loss has a gradient at this sample, and at no other."""
    leaf = x0.clone().requires_grad_()
    gradient = _gradient_at(loss_at(leaf), leaf)
    if without := int((~gradient.flatten(1).any(1)).sum()):
        raise ValueError(f"no gradient of its loss reaches x0, for {without} of {len(x0)} samples")
    alone = _gradient_at(loss_at(leaf)[:1], leaf)
    if alone[1:].any():
        raise ValueError("the loss of one sample has a gradient at others: micro-batches would change it")


def _gradient_at(loss: Tensor, leaf: Tensor, where: str = "") -> Tensor:
    gradient = _grad(loss.sum(), leaf)
    if gradient is None:
        detached = "its loss carries no gradient (is it detached?), so none reaches x0"
        raise ValueError("no gradient of its loss reaches x0" if loss.requires_grad else detached)
    _expect("its gradient at x0", gradient, leaf.shape, where)
    return gradient


def _grad(total: Tensor, leaf: Tensor) -> Tensor | None:
    """None where `total` does not depend on the leaf."""
    return torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None


def _expect(title: str, tensor: object, shape: tuple[int, ...], where: str = "") -> None:
    """Raises ValueError for what is no finite tensor of this shape."""
    where = f" {where}" if where else ""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{title} is a {type(tensor).__name__}, expected a tensor {list(shape)}")
    if tensor.shape != shape:
        raise ValueError(f"{title} has the shape {list(tensor.shape)}, expected {list(shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{title} is of {tensor.dtype}, expected floating point")
    if unfit := int((~tensor.isfinite()).sum()):
        raise ValueError(f"{title} is not finite{where}, in {unfit} of {tensor.numel()} places")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
