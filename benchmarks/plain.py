"""DI* as one would write it in an afternoon: loops over torch and diffusers, for the pocket recipe's settings alone.

`plain` does what `diffinstruct.step` does, with the same draws in the same order: equal losses are meant. `textbook` is
Algorithm 1 of arXiv 2410.20898 typed in as it stands there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.prompts import read_prompts
from diffinstruct.models.world import POCKET
from reward_models import load


class Parts:
    """The networks, optimizers, prompts and draws that a loop needs, and the rounds that it has finished."""

    def __init__(self, e: Experiment) -> None:
        assert (e.objective.name, e.objective.distance, e.objective.weighting) == ("di_star", "pseudo_huber", "x0")
        assert e.score_network.updates_per_step == 1 and e.score_network.reuse_sample and e.precision == "fp32"
        self.e, self.step, self.rounds = e, 0, list[dict[str, float]]()
        root = POCKET / "pipeline" if e.reference.model == "pocket" else Path(e.reference.model)
        start = {"reference": root / "unet", "pocket-distilled": POCKET / "generator"}[e.generator.init_from]
        self.generator, self.ema = (UNet2DConditionModel.from_pretrained(start).float().eval() for _ in range(2))
        networks = (UNet2DConditionModel.from_pretrained(root / "unet").float().eval() for _ in range(2))
        self.score_network, self.reference = networks
        self.reference.requires_grad_(False)
        self.vae = AutoencoderTiny.from_pretrained(root / "vae").float().requires_grad_(False)
        self.text_encoder = CLIPTextModel.from_pretrained(root / "text_encoder").float().eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer")
        self.prompts = read_prompts(e.prompts.train)["prompt"].tolist()
        self.trained = {r.name: (load(r.name), r.weight) for r in e.rewards.trained}
        self.held_out = {name: load(name) for name in e.rewards.held_out}
        scheduler = DDIMScheduler.from_pretrained(root, subfolder="scheduler")
        assert scheduler.config.prediction_type == "v_prediction"
        self.alphas, self.sigmas = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
        self.generator_adam, self.score_adam = (
            torch.optim.AdamW(network.parameters(), of.learning_rate, betas=of.betas, weight_decay=of.weight_decay)
            for network, of in ((self.generator, e.generator), (self.score_network, e.score_network))
        )
        self.batch = e.global_batch_size
        self.shape = (self.generator.config.in_channels, *[self.generator.config.sample_size] * 2)
        self.texts: dict[str, Tensor] = {}

    def embedded(self, prompt: str) -> Tensor:
        if prompt not in self.texts:
            ids = self.tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
            with torch.no_grad():
                self.texts[prompt] = self.text_encoder(ids).last_hidden_state[0]
        return self.texts[prompt]

    def seeded(self, place: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.e.seed * 1_000_003 + self.step) * 1_024 + place)

    def chosen(self) -> tuple[list[str], Tensor, Tensor]:
        """This round's prompts, their embeddings, and the null prompt's."""
        draws = torch.randint(len(self.prompts), (self.batch,), generator=self.seeded(4)).tolist()
        prompts = [self.prompts[i] for i in draws]
        c = torch.stack([self.embedded(prompt) for prompt in prompts])
        return prompts, c, self.embedded("").expand_as(c)

    def z(self, place: int) -> Tensor:
        return torch.randn(self.batch, *self.shape, generator=self.seeded(place))

    def noise_and_t(self, place: int) -> tuple[Tensor, Tensor]:
        u = torch.rand(self.batch, generator=self.seeded(place))
        t = (self.e.objective.t_min + u * (self.e.objective.t_max - self.e.objective.t_min)).floor().long()
        return torch.randn(self.batch, *self.shape, generator=self.seeded(place + 1)), t

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def x0_hat(self, unet: Any, xt: Tensor, t: Tensor, c: Tensor) -> Tensor:
        v = unet(xt, t, c, return_dict=False)[0]
        alpha, sigma = self.at(t)
        return alpha * xt - sigma * v

    def generated(self, z: Tensor, c: Tensor) -> Tensor:
        return self.x0_hat(self.generator, z, torch.full((self.batch,), self.e.generator.timestep), c)

    def decoded(self, latents: Tensor) -> Tensor:
        return (self.vae.decode(latents / self.vae.config.scaling_factor).sample * 0.5 + 0.5).clamp(0, 1)

    def learn(self, sample: Tensor, c: Tensor) -> dict[str, float]:
        """The score network follows the generator."""
        eps, t = self.noise_and_t(8)
        alpha, sigma = self.at(t)
        error = (alpha / sigma) * (self.x0_hat(self.score_network, alpha * sample + sigma * eps, t, c) - sample)
        loss = error.pow(2).flatten(1).mean(1).mean()
        self.score_adam.zero_grad()
        loss.backward()
        of = self.e.score_network
        norm = torch.nn.utils.clip_grad_norm_(self.score_network.parameters(), of.max_grad_norm).item()
        self.score_adam.step()
        return {"loss/score_network": loss.item(), "gradient_norm/score_network": norm}

    def divergence(self, f: Tensor, guided: Tensor, x0: Tensor) -> Tensor:
        """DI*'s loss [B]."""
        y = f - guided
        norm = (y.flatten(1).pow(2).sum(1) + self.e.objective.distance_args["c"] ** 2 * y[0].numel()).sqrt()
        return -((y / norm.view(-1, 1, 1, 1)) * (f - x0)).flatten(1).sum(1)

    def finish(self, losses: dict[str, float]) -> None:
        """The generator's step, its average, the round's record."""
        of = self.e.generator
        norm = torch.nn.utils.clip_grad_norm_(self.generator.parameters(), of.max_grad_norm).item()
        self.generator_adam.step()
        decay = min(of.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), self.generator.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
        self.rounds.append(losses | {"gradient_norm/generator": norm})


def plain(parts: Parts) -> Iterator[None]:
    """Goes round for ever; yields when a round has its sample."""
    e, batch = parts.e, parts.batch
    for parts.step in itertools.count():
        chosen, c, null = parts.chosen()
        x0 = parts.generated(parts.z(0), c)
        sample = x0.detach()
        yield

        pushes, scores = [], dict.fromkeys([*parts.trained, *parts.held_out], 0.0)  # rewards, in micro-batches of 16
        for rows in (slice(i, i + 16) for i in range(0, batch, 16)):
            leaf = sample[rows].clone().requires_grad_()
            images = parts.decoded(leaf)
            total = torch.zeros(())
            for name, (model, weight) in parts.trained.items():
                score = model(images, chosen[rows]).sum()
                total = total + weight * score
                scores[name] += score.item() / batch
            pushes.append(torch.autograd.grad(total, leaf)[0])
            with torch.no_grad():
                for name, model in parts.held_out.items():
                    scores[name] += model(images, chosen[rows]).sum().item() / batch
        push = e.objective.reward_scale * torch.cat(pushes)

        losses = parts.learn(sample, c)

        leaf = sample.clone().requires_grad_()  # the divergence's gradient at the sample
        eps, t = parts.noise_and_t(1)
        alpha, sigma = parts.at(t)
        xt = alpha * leaf + sigma * eps
        f = parts.x0_hat(parts.score_network, xt, t, c)
        both = parts.x0_hat(parts.reference, torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([c, null]))
        with_c, without = both.chunk(2)
        loss = parts.divergence(f, with_c + (e.reference.guidance_scale - 1) * (with_c - without), leaf)
        pull = e.objective.regularization_weight * torch.autograd.grad(loss.sum(), leaf)[0]

        parts.generator_adam.zero_grad()
        x0.backward((pull - push) / batch)
        named = {f"{'held_out' if n in parts.held_out else 'reward'}/{n}": s for n, s in scores.items()}
        parts.finish(losses | {"loss/regularizer": loss.mean().item()} | named)


def textbook(parts: Parts) -> Iterator[None]:
    """The same, but: a fresh sample for each phase, the reference asked twice, decoder and reward in the generator's
    graph."""
    e = parts.e
    for parts.step in itertools.count():
        chosen, c, null = parts.chosen()
        yield
        with torch.no_grad():
            sample = parts.generated(parts.z(10), c)
        losses = parts.learn(sample, c)

        parts.score_network.requires_grad_(False)
        x0 = parts.generated(parts.z(0), c)
        eps, t = parts.noise_and_t(1)
        alpha, sigma = parts.at(t)
        xt = alpha * x0 + sigma * eps
        f = parts.x0_hat(parts.score_network, xt, t, c)
        with_c, without = parts.x0_hat(parts.reference, xt, t, c), parts.x0_hat(parts.reference, xt, t, null)
        loss = parts.divergence(f, with_c + (e.reference.guidance_scale - 1) * (with_c - without), x0).mean()
        images = parts.decoded(x0)
        scores = {name: model(images, chosen) for name, (model, _) in parts.trained.items()}
        reward = sum(weight * scores[name].mean() for name, (_, weight) in parts.trained.items())
        parts.generator_adam.zero_grad()
        (e.objective.regularization_weight * loss - e.objective.reward_scale * reward).backward()
        parts.score_network.requires_grad_(True)
        with torch.no_grad():
            judged = {f"held_out/{name}": model(images, chosen).mean().item() for name, model in parts.held_out.items()}
        losses |= {f"reward/{name}": score.mean().item() for name, score in scores.items()} | judged
        parts.finish(losses | {"loss/regularizer": loss.item()})
