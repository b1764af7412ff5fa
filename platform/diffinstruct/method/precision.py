"""The arithmetic of networks: autocast, TF32, the type of frozen weights, deterministic kernels."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

BF16_ERROR = 0.0042
"""Rms error of the output, of size 1, that a transformer of PixArt's width and depth computes in bf16 (LOG.md)."""
MAX_BF16_ERROR = 0.1
"""From here on bf16's error, where an objective measures differences of size 1, is worth a remark."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def use_deterministic_kernels() -> None:
    """Compute the same bits on a GPU, too; an operation that cannot raises RuntimeError. To be called before the first
    matrix product, when cuBLAS takes its workspace."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def use_precision(precision: str) -> None:
    """Set what this process's GPU takes for float32 arithmetic. "fp32" is float32 in every product; "bf16", whose
    networks round more anyway, takes TF32 for what stays in float32. torch by itself takes TF32 in convolutions alone."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "bf16"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The autocast of the networks' forward passes; `precision` is "fp32" or "bf16"."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def frozen_dtype(precision: str) -> torch.dtype:
    """The type in which a run holds the networks and the decoder that it does not train."""
    return DTYPES[precision]
