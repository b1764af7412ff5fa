"""What a run shows: picture grids of bounded size."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffinstruct.training.run_log import GRID_PIXELS, RunLog, tile


def drawn(columns, decode):
    """The array that a run log gives its journal for a grid of these latents."""
    log, kept = RunLog.__new__(RunLog), []
    log.reference = SimpleNamespace(decode=decode)
    log.tracker = SimpleNamespace(image=lambda key, step, pixels: kept.append(pixels))
    log.grid(1, columns)
    return kept[0]


def test_a_grid_of_full_size_is_bounded_and_decoded_one_picture_at_a_time():
    alive = weakref.WeakSet()

    def decode(latent):
        assert len(alive) <= 1 and len(latent) == 1
        picture = latent.mean().expand(1, 3, 1024, 1024).clone()
        alive.add(picture)
        return picture

    columns = [torch.full((8, 4, 1, 1), 0.25 * column) for column in range(4)]
    pixels = drawn(columns, decode)
    assert pixels.dtype == np.uint8 and pixels.shape == (8 * 341, 4 * 341, 3)
    assert [int(pixels[5, column * 341 + 5, 0]) for column in range(4)] == [0, 64, 128, 191]


@pytest.mark.parametrize(("rows", "edge"), [(2, 32), (1, 100), (3000, 32), (3, 2048)])
def test_a_grid_is_never_larger_than_its_bound_and_small_ones_are_as_they_were(rows, edge):
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, edge, edge, generator=generator) * 1.2 - 0.1 for _ in range(4)]
    cells = [pictures[column] for column in range(4) for _ in range(rows)]
    pixels = tile(iter(cells), rows, 4)
    assert pixels.shape[0] * pixels.shape[1] <= GRID_PIXELS and pixels.shape[0] == rows * pixels.shape[1] // 4
    if 4 * rows * edge**2 <= GRID_PIXELS:
        whole = torch.cat([torch.cat(cells[column * rows : (column + 1) * rows], dim=1) for column in range(4)], dim=2)
        assert np.array_equal(pixels, (whole.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
