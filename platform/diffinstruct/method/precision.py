"""The arithmetic of networks: autocast, the type of frozen weights, deterministic kernels."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch


def use_deterministic_kernels() -> None:
    """From here on this process computes the same bits from the same numbers on a GPU, too, and an operation that
    cannot raises RuntimeError. Before its first matrix product: cuBLAS asks for its workspace then."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Of the networks' forward passes, by `Experiment.precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def frozen_dtype(precision: str) -> torch.dtype:
    """In which the networks and the decoder that a run does not train are held, by `Experiment.precision`."""
    return torch.bfloat16 if precision == "bf16" else torch.float32
