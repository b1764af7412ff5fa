"""DI* as one would write it in an afternoon: a loop over torch and diffusers, for the pocket recipe's settings alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from diffinstruct.experiment import Experiment
from diffinstruct.pretrained import POCKET
from diffinstruct.prompts import read_prompts
from reward_models import load


def plain(e: Experiment, rounds: list[dict[str, float]]) -> Iterator[None]:
    """Goes round for ever: yields when a round has its sample, appends a finished round's losses to `rounds`.

    The same draws in the same order as `diffinstruct.step`, the rewards in the same micro-batches: equal losses are meant.
    """
    root = POCKET / "pipeline" if e.reference.model == "pocket" else Path(e.reference.model)
    start = {"reference": root / "unet", "pocket-distilled": POCKET / "generator"}[e.generator.start]
    generator, ema = (UNet2DConditionModel.from_pretrained(start).float().eval() for _ in range(2))
    score_network, reference = (UNet2DConditionModel.from_pretrained(root / "unet").float().eval() for _ in range(2))
    vae = AutoencoderTiny.from_pretrained(root / "vae").float().requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(root / "text_encoder").float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer")
    prompts = read_prompts(e.prompts.train)["prompt"].tolist()
    trained = {r.name: (load(r.name), r.weight) for r in e.rewards.trained}
    held_out = {name: load(name) for name in e.rewards.held_out}
    scheduler = DDIMScheduler.from_pretrained(root, subfolder="scheduler")
    alphas, sigmas = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    assert scheduler.config.prediction_type == "v_prediction"
    assert (e.objective.name, e.objective.distance, e.objective.space) == ("di_star", "pseudo_huber", "x0")
    assert e.score_network.updates_per_step == 1 and e.score_network.reuse_sample and e.precision == "fp32"
    reference.requires_grad_(False)
    generator_adam, score_adam = (
        torch.optim.AdamW(network.parameters(), of.learning_rate, betas=of.betas, weight_decay=of.weight_decay)
        for network, of in ((generator, e.generator), (score_network, e.score_network))
    )
    batch, shape = e.global_batch_size, (generator.config.in_channels, *[generator.config.sample_size] * 2)
    texts: dict[str, Tensor] = {}

    def embedded(prompt: str) -> Tensor:
        if prompt not in texts:
            ids = tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
            with torch.no_grad():
                texts[prompt] = text_encoder(ids).last_hidden_state[0]
        return texts[prompt]

    def seeded(place: int) -> torch.Generator:
        return torch.Generator().manual_seed((e.seed * 1_000_003 + step) * 1_024 + place)

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        return alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)

    def x0_hat(unet: Any, xt: Tensor, t: Tensor, c: Tensor) -> Tensor:
        v = unet(xt, t, c, return_dict=False)[0]
        alpha, sigma = at(t)
        return alpha * xt - sigma * v

    def noise_and_t(place: int) -> tuple[Tensor, Tensor]:
        u = torch.rand(batch, generator=seeded(place))
        t = (e.objective.t_min + u * (e.objective.t_max - e.objective.t_min)).floor().long()
        return torch.randn(batch, *shape, generator=seeded(place + 1)), t

    for step in itertools.count():
        chosen = [prompts[i] for i in torch.randint(len(prompts), (batch,), generator=seeded(4)).tolist()]
        c = torch.stack([embedded(prompt) for prompt in chosen])
        z = torch.randn(batch, *shape, generator=seeded(0))
        x0 = x0_hat(generator, z, torch.full((batch,), e.generator.timestep), c)
        sample = x0.detach()
        yield

        pushes, scores = [], dict.fromkeys([*trained, *held_out], 0.0)  # rewards, in the same micro-batches of 16
        for rows in (slice(i, i + 16) for i in range(0, batch, 16)):
            leaf = sample[rows].clone().requires_grad_()
            images = (vae.decode(leaf / vae.config.scaling_factor).sample * 0.5 + 0.5).clamp(0, 1)
            total = torch.zeros(())
            for name, (model, weight) in trained.items():
                score = model(images, chosen[rows]).sum()
                total = total + weight * score
                scores[name] += score.item() / batch
            pushes.append(torch.autograd.grad(total, leaf)[0])
            with torch.no_grad():
                for name, model in held_out.items():
                    scores[name] += model(images, chosen[rows]).sum().item() / batch
        push = e.objective.reward_scale * torch.cat(pushes)

        eps, t = noise_and_t(8)  # the score network follows the generator
        alpha, sigma = at(t)
        error = (alpha / sigma) * (x0_hat(score_network, alpha * sample + sigma * eps, t, c) - sample)
        score_loss = error.pow(2).flatten(1).mean(1).mean()
        score_adam.zero_grad()
        score_loss.backward()
        score_norm = torch.nn.utils.clip_grad_norm_(score_network.parameters(), e.score_network.max_grad_norm).item()
        score_adam.step()

        leaf = sample.clone().requires_grad_()  # the divergence's gradient at the sample
        eps, t = noise_and_t(1)
        alpha, sigma = at(t)
        xt = alpha * leaf + sigma * eps
        f = x0_hat(score_network, xt, t, c)
        null = embedded("").expand_as(c)
        with_c, without = x0_hat(reference, torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([c, null])).chunk(2)
        y = f - (with_c + e.reference.cfg_scale * (with_c - without))
        norm = (y.flatten(1).pow(2).sum(1) + e.objective.huber_c**2 * y[0].numel()).sqrt()
        loss = -((y / norm.view(-1, 1, 1, 1)) * (f - leaf)).flatten(1).sum(1)
        pull = e.objective.regularization_weight * torch.autograd.grad(loss.sum(), leaf)[0]

        generator_adam.zero_grad()
        x0.backward((pull - push) / batch)
        generator_norm = torch.nn.utils.clip_grad_norm_(generator.parameters(), e.generator.max_grad_norm).item()
        generator_adam.step()
        decay = min(e.generator.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), generator.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
        losses = {"loss/score_network": score_loss.item(), "loss/regularizer": loss.mean().item()}
        norms = {"gradient_norm/score_network": score_norm, "gradient_norm/generator": generator_norm}
        rounds.append(losses | norms | {f"{'held_out' if n in held_out else 'reward'}/{n}": s for n, s in scores.items()})
