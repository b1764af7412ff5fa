"""Which errors of a run on Ray end it."""

from __future__ import annotations

import pytest
import torch
from ray.train import WorkerGroupError

from diffinstruct.cluster.failures import NoSecondTry, final_error
from diffinstruct.errors import UserError


def test_memory_that_ends_is_no_reason_to_try_again() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(UserError, match=r"^out of memory in a training process: .*2 GiB; a smaller micro_batch_size"):
        NoSecondTry().after_exception(None, {0: error})
    assert isinstance(final_error(WorkerGroupError("", {1: error})), UserError)
    NoSecondTry().after_exception(None, {0: RuntimeError("a lost connection")})
