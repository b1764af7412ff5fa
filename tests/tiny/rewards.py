"""Rewards of a user, named by import path in an experiment on the tiny pipeline."""

import json
import os
import time
from pathlib import Path

import torch
from torch import nn


class Red(nn.Module):
    """How much redder than blue, with a curve, so that its gradient depends on the picture."""

    def forward(self, images, prompts):
        return (images[:, 0] ** 2 - images[:, 2]).flatten(1).mean(1)


class Seeing(Red):
    """A reward with an image tower."""

    def features(self, images):
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


class RedInThousandths(Red):
    def forward(self, images, prompts):
        return 1e-3 * super().forward(images, prompts)


class Drunk(Red):
    """Random, so no validation of it passes."""

    def forward(self, images, prompts):
        return super().forward(images, prompts) + torch.randn(len(prompts))


class Greedy(Red):
    """Four pictures at once fit into its memory."""

    def forward(self, images, prompts):
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(images, prompts)


class Slow(Red):
    """Takes its time without taking the machine's."""

    def forward(self, images, prompts):
        time.sleep(0.05)
        return super().forward(images, prompts)


class Calm(nn.Module):
    def forward(self, images, prompts):
        return -images.flatten(1).var(1)


class Broken(Red):
    """Not finite for the prompts that say so."""

    def forward(self, images, prompts):
        return super().forward(images, prompts) + torch.tensor([float("nan") if "broken" in p else 0.0 for p in prompts])


class Sleepy(Red):
    """Silent until the file $SLEEPY is there, which it makes itself when it is first asked."""

    def forward(self, images, prompts):
        if any("sleep" in p for p in prompts) and not Path(prompts[0].split()[-1]).exists():
            Path(prompts[0].split()[-1]).touch()
            time.sleep(60)
        return super().forward(images, prompts)


class Patient(Red):
    """Waits for the file that a prompt names after "wait"."""

    def forward(self, images, prompts):
        word, _, path = prompts[0].partition(" ")
        while word == "wait" and not Path(path).exists():
            time.sleep(0.05)
        return super().forward(images, prompts)


class Relative(Red):
    """Judges each picture against those beside it, so it matters which they are."""

    def forward(self, images, prompts):
        return super().forward(images, prompts) - super().forward(images, prompts).mean()


class BlackBox:
    """Looks at the pictures' numbers, not at tensors: no gradient."""

    def __call__(self, images, prompts):
        return torch.tensor([float(image.mean()) for image in images.detach().numpy()])


class Deadly(Red):
    """Kills its process the first time it sees a prompt that names a file that is not there yet."""

    def forward(self, images, prompts):
        mark = Path(prompts[0].split()[-1])
        if mark.is_absolute() and not mark.exists():
            mark.touch()
            os._exit(1)
        return super().forward(images, prompts)


# A distance of somebody's own: d(y) = sum cosh(y) - 1.
cosh_distance = (lambda y: (torch.cosh(y) - 1).flatten(1).sum(1), torch.sinh)


def steps_done(experiment, folder):
    """What a sweep may ask of each finished run."""
    return {"examined": json.loads((folder / "metrics.json").read_text())["step"]}
