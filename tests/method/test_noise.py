"""The randomness of a round: whose it is, that nobody shares it, and that it is the law it says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from diffinstruct.method.diffusion import uniform_t
from diffinstruct.method.noise import NoiseStreams, Stream

SHAPE, CPU = (4, 8, 8), torch.device("cpu")


def noise(seed: int = 0, step: int = 0, rows: slice = slice(0, 4)) -> NoiseStreams:
    return NoiseStreams(seed, step, SHAPE, rows, CPU)


@pytest.mark.parametrize(
    ("one", "other"), [((2**22, 0), (0, 0)), ((734, 5000), (0, 4002)), ((0, 1), (0, 0)), ((1, 0), (0, 0)), ((2**32, 0), (0, 0))]
)
def test_no_two_seeds_and_steps_share_a_sample(one: tuple[int, int], other: tuple[int, int]) -> None:
    """The first two pairs were equal to the bit where a 32-bit seed was made of all of it."""
    streams = [Stream.GENERATOR_Z, Stream.REGULARIZER_EPS, Stream.SCORE_EPS]
    samples = [x for place in (one, other) for stream in streams for x in noise(*place).normal(stream)]
    first = {x.flatten()[0].item() for x in samples}
    assert len(first) == 2 * len(streams) * 4
    assert noise(*one).prompts(10**9) != noise(*other).prompts(10**9)


def test_a_worker_draws_its_own_samples_alone() -> None:
    """Of 64 workers each makes a 64th of the random numbers, and the same ones as one worker makes for them."""
    whole = noise(rows=slice(0, 64)).normal(Stream.GENERATOR_Z)
    own = noise(rows=slice(17, 18))
    assert torch.equal(own.normal(Stream.GENERATOR_Z), whole[17:18])
    assert len(list(own._generators(Stream.GENERATOR_Z))) == 1


def test_what_is_drawn_ahead_is_what_would_be_drawn() -> None:
    with ThreadPoolExecutor(1) as executor:
        ahead = noise(step=5).next_round([Stream.GENERATOR_Z, Stream.SCORE_EPS], executor)
        assert ahead.step == 6 and ahead.ahead.keys() == {Stream.GENERATOR_Z, Stream.SCORE_EPS}
        for stream in (Stream.GENERATOR_Z, Stream.SCORE_EPS, Stream.REGULARIZER_EPS):
            assert torch.equal(ahead.normal(stream), noise(step=6).normal(stream))


def test_the_laws_are_the_ones_they_are_called() -> None:
    """Bounds at five standard errors of n independent numbers."""
    many = noise(rows=slice(0, 2000))
    x = many.normal(Stream.GENERATOR_Z).flatten(1)
    n = x.numel()
    assert x.dtype == torch.float32 and abs(x.mean()) < 5 / n**0.5 and abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x[:, 0] * x[:, 1]).mean()) < 5 / 2000**0.5 and abs((x[:-1, 0] * x[1:, 0]).mean()) < 5 / 2000**0.5
    t = many.t(Stream.REGULARIZER_T, uniform_t(20, 980)).double()
    assert t.min() >= 20 and t.max() < 980 and abs(t.mean() - 499.5) < 5 * 960 / (12 * 2000) ** 0.5
    counts = np.bincount(many.prompts(10), minlength=10)
    assert abs(counts - 200).max() < 5 * (2000 * 0.1 * 0.9) ** 0.5
