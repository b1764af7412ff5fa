"""A name for a reward as it was validated: who meets the same one again need not validate all of it."""

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from diffinstruct.method.rewards import RewardModel

SAMPLES = 1024
"""So many values of each weight say which weights they are: two trainings differ everywhere."""


def reward_digest(reward: RewardModel, trained: bool, shape: Sequence[int]) -> str | None:
    """A name for a reward as it was validated: its code, samples of its weights, the pictures' shape, and torch's
    version; None where its code cannot be read."""
    sha256 = hashlib.sha256(f"{trained} {tuple(shape)} {torch.__version__}".encode())
    parts = list(reward.modules()) if isinstance(reward, nn.Module) else [reward]
    kinds = {kind for part in parts for kind in (type(part).__mro__ if isinstance(part, nn.Module) else [part])}
    try:
        files = {file for kind in kinds - {object} if (file := inspect.getsourcefile(kind))}
        for file in sorted(files):
            sha256.update(Path(file).read_bytes())
    except (OSError, TypeError):
        return None
    for kind in sorted(kinds, key=lambda kind: kind.__module__ + kind.__qualname__):  # a method may be another than the file's
        for name, method in sorted(vars(kind).items()):
            if code := getattr(method, "__code__", None):
                sha256.update(name.encode() + code.co_code)
    sha256.update(repr([part.training for part in parts if isinstance(part, nn.Module)]).encode())
    for name, weight in reward.state_dict().items() if isinstance(reward, nn.Module) else ():
        flat = weight.detach().flatten()
        sampled = flat[:: max(1, len(flat) // SAMPLES)].float().cpu()
        sha256.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + sampled.numpy().tobytes())
    return sha256.hexdigest()[:16]
