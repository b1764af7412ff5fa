"""Build the pocket world from scratch: pictures, tokenizer, diffusion model, preference models, judges of truth,
prompts.

    python experiments/build_pocket_world.py --work runs/pocket_world            every stage, in order
    python experiments/build_pocket_world.py --work runs/pocket_world unet       one stage

Stages: render, vae, unet, classifier, preference, judge, prompts, package, reference, distill. Each is seeded, writes
into the work folder when it is done, goes on from its last checkpoint when interrupted, and is skipped once finished.
Rendering needs `dicebear-core dicebear-styles resvg-py` (the `world` extra). The result replaces the folder
`platform/diffinstruct/pocket/`.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import math
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE = 64
TOKENS = 16
GUIDANCE_SCALE = 3.0  # diffusers' convention: 1 + cfg_scale
POCKET = Path(__file__).resolve().parents[1] / "platform" / "diffinstruct" / "pocket"
N_RENDERS, N_HELD_OUT_RENDERS = 24_000, 2_000

# ------------------------------------------------------------------------------------------------ the world
# word in the caption -> DiceBear's value. Colours are named by hand; neighbours that one would confuse are left out.
PLANTS = {
    "cactus": "cactus",
    "bush": "bush",
    "flower": "flower",
    "tulip": "tulip",
    "palm": "palm",
    "agave": "succulent",
    "sprout": "sprout",
    "bud": "buds",
}
BODIES = {"round": "dome", "square": "block", "slim": "tower", "wide": "squat", "bell-shaped": "bell", "stepped": "steps"}
COLOURS = {
    "blue": "#7dd3fc",
    "lavender": "#c4b5fd",
    "pink": "#fda4af",
    "orange": "#fdba74",
    "yellow": "#fcd34d",
    "lime": "#bef264",
    "mint": "#5eead4",
    "white": "#e2e8f0",
}
BACKGROUNDS = {
    "blue": "#1d4ed8",
    "purple": "#6d28d9",
    "magenta": "#a21caf",
    "red": "#be123c",
    "orange": "#c2410c",
    "green": "#047857",
    "dark": "#1e293b",
}
MOUTHS = {  # the first style's variants, the second's
    "smiling": (["smile", "grin"], ["smile", "grin"]),
    "frowning": (["frown"], ["frown"]),
    "surprised": (["open"], ["open"]),
    "serious": (["line"], ["line"]),
    "puzzled": (["wavy"], ["wavy"]),
}
SUBJECTS = [("sprout", p) for p in PLANTS] + [("critter", b) for b in BODIES]
ATTRIBUTES = ("subject", "colour", "background", "mouth")


def caption(kind: str, subject: str | None, colour: str | None, background: str | None, mouth: str | None) -> str:
    """A true caption; None leaves the attribute open. Sprouts carry their face on the pot, critters on the body."""
    face = [word for word in (mouth, colour) if word]
    if kind == "sprout":
        text = f"{_a(subject or 'plant')} in {_a(' '.join([*face, 'pot']))}"
    else:
        text = _a(" ".join([*face, *([subject] if subject else []), "critter"]))
    return text + (f" on {_a(background)} background" if background else "")


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def held_out(kind: str, subject: str, colour: str, background: str) -> bool:
    """One combination of (subject, colour, background) in eight is never rendered for training."""
    i = SUBJECTS.index((kind, subject)), list(COLOURS).index(colour), list(BACKGROUNDS).index(background)
    return (3 * i[0] + 5 * i[1] + 7 * i[2]) % 8 == 0


def render(kind: str, subject: str, colour: str, background: str, mouth: str, rng: random.Random) -> np.ndarray:
    """One uint8 [64, 64, 3] picture; what the caption does not name (eyes, cheeks, pot shape, horns) is drawn by
    `rng`."""
    import resvg_py
    from dicebear import Avatar
    from PIL import Image

    options = {
        "seed": str(rng.random()),
        "animationVariant": "none",
        "patternProbability": 0,
        "cheeksProbability": 25,
        "cheeksVariant": ["blush"],
        "eyesVariant": [rng.choice(["round", "dots", "bigPupils", "wide"])],
        "backgroundColor": [BACKGROUNDS[background]],
        "mouthVariant": [rng.choice(MOUTHS[mouth][kind == "critter"])],
    }
    if kind == "sprout":
        options |= {
            "plantVariant": [PLANTS[subject]],
            "potColor": [COLOURS[colour]],
            "potVariant": [rng.choice(["taper", "cylinder", "tub", "round"])],
        }
    else:
        options |= {
            "bodyVariant": [BODIES[subject]],
            "bodyColor": [COLOURS[colour]],
            "topProbability": 75,
            "topVariant": [rng.choice(["horns", "antennae", "earsPointy"])],
        }
    svg = Avatar(_style(kind + "s"), options).to_string()
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


_STYLES: dict[str, object] = {}


def _style(name: str) -> object:
    if name not in _STYLES:
        import dicebear
        from dicebear import Style

        path = Path(dicebear.__file__).parent.parent / "dicebear_styles" / f"{name}.json"
        _STYLES[name] = Style(json.loads(path.read_text(encoding="utf-8")))
    return _STYLES[name]


# ------------------------------------------------------------------------------------------------ stages
def stage_render(work: Path) -> None:
    """renders.npy uint8 [N, 64, 64, 3] and renders.csv; the first N_HELD_OUT_RENDERS show only held-out
    combinations."""
    rng = random.Random(0)
    combos = list(itertools.product(SUBJECTS, COLOURS, BACKGROUNDS))
    train = [c for c in combos if not held_out(*c[0], *c[1:])]
    test = [c for c in combos if held_out(*c[0], *c[1:])]
    rows, pictures = [], np.empty((N_HELD_OUT_RENDERS + N_RENDERS, SIZE, SIZE, 3), np.uint8)
    for i in range(len(pictures)):
        (kind, subject), colour, background = rng.choice(test if i < N_HELD_OUT_RENDERS else train)
        mouth = rng.choice(list(MOUTHS))
        pictures[i] = render(kind, subject, colour, background, mouth, rng)
        rows.append((kind, subject, colour, background, mouth, "held_out" if i < N_HELD_OUT_RENDERS else "train"))
    np.save(work / "renders.npy", pictures)
    pd.DataFrame(rows, columns=["kind", *ATTRIBUTES, "split"]).to_csv(work / "renders.csv", index=False)


def pictures(work: Path, split: str) -> tuple[Tensor, pd.DataFrame]:
    """uint8 [N, 3, 64, 64] and their table of attributes."""
    table = pd.read_csv(work / "renders.csv")
    rows = (table.split == split).to_numpy()
    return torch.from_numpy(np.load(work / "renders.npy")[rows]).permute(0, 3, 1, 2), table[rows].reset_index(drop=True)


def in_unit_range(x: Tensor) -> Tensor:
    return x.float() / 255


class Resumable:
    """A training loop's state on disk: modules and optimizer in one safetensors-and-json pair, replaced atomically."""

    def __init__(
        self, folder: Path, steps: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, every: int = 200
    ) -> None:
        self.path, self.steps, self.modules, self.optimizer, self.every = folder, steps, modules, optimizer, every
        self.start = 0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.pt").exists():
            state = torch.load(folder / "state.pt", weights_only=True)
            self.start = state["step"]
            for name, module in modules.items():
                module.load_state_dict(state[name])
            optimizer.load_state_dict(state["optimizer"])

    def __iter__(self) -> Iterator[tuple[int, float]]:
        for step in range(self.start, self.steps):
            torch.manual_seed(step)
            progress = step / self.steps
            yield step, progress
            if (step + 1) % self.every == 0 or step + 1 == self.steps:
                state: dict[str, Any] = {name: module.state_dict() for name, module in self.modules.items()}
                state |= {"optimizer": self.optimizer.state_dict(), "step": step + 1}
                torch.save(state, self.path / "state.tmp")
                (self.path / "state.tmp").replace(self.path / "state.pt")


def cosine(optimizer: torch.optim.Optimizer, peak: float, progress: float, warmup: float = 0.02) -> None:
    scale = min(1.0, (progress + 1e-4) / warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = peak * (scale + 0.01)


def trapezoid(optimizer: torch.optim.Optimizer, peak: float, progress: float) -> None:
    """Warm up, hold, and come down over the last quarter."""
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, (progress + 1e-4) / 0.02, (1 - progress) / 0.25 + 0.005)


def make_vae() -> AutoencoderTiny:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(0, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=4,
        scaling_factor=1.0,
        force_upcast=False,
    )


def stage_vae(work: Path, steps: int = 1800, batch: int = 24) -> None:
    """Autoencoder, 64 px -> [4, 16, 16]. Noise on the latents while training makes the decoder snap to crisp shapes."""
    x, _ = pictures(work, "train")
    torch.manual_seed(0)
    vae = make_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    for step, progress in Resumable(work / "vae", steps, {"vae": vae}, optimizer):
        cosine(optimizer, 2e-3, progress)
        batch_ = in_unit_range(x[torch.randint(len(x), (batch,))]) * 2 - 1
        z = vae.encode(batch_).latents
        noise = torch.randn_like(z) * 0.3 * torch.rand(batch, 1, 1, 1)
        y = vae.decode(z + noise).sample
        edges = sum((torch.diff(y, dim=d) - torch.diff(batch_, dim=d)).abs().mean() for d in (2, 3))
        shape = z.mean((0, 2, 3)).pow(2).sum() + (z.std((0, 2, 3)) - 1).pow(2).sum()
        loss = F.l1_loss(y, batch_) + F.mse_loss(y, batch_) + edges + 0.05 * shape
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"vae {step}/{steps} loss {loss:.4f} mse {F.mse_loss(y, batch_):.5f} std {z.std():.3f}", flush=True)
    vae.save_pretrained(work / "pipeline" / "vae")


def make_tokenizer(work: Path) -> CLIPTokenizer:
    """Byte-pair merges learned on the world's own words, in CLIP's format: every word of the world is one token."""
    from transformers import CLIPTokenizer

    folder = work / "pipeline" / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for text in every_caption() for word in text.replace("-", " - ").split()})
    merges = learned_merges(words)
    letters = "abcdefghijklmnopqrstuvwxyz-,.0123456789"  # any text stays encodable, letter by letter
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=TOKENS,
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def learned_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one piece, the most frequent pair first, ties by the alphabet. (The
    `tokenizers`
    package breaks ties by chance: a build that was interrupted would go on with other token numbers.)"""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while counts := Counter(pair for pieces in split.values() for pair in itertools.pairwise(pieces)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for pieces in split.values():
            for i in range(len(pieces) - 1, 0, -1):
                if tuple(pieces[i - 1 : i + 1]) == best:
                    pieces[i - 1 : i + 1] = ["".join(best)]
    return merges


def every_caption() -> list[str]:
    out = set()
    for (kind, subject), colour, background, mouth in itertools.product(
        [*SUBJECTS, ("sprout", None), ("critter", None)], [*COLOURS, None], [*BACKGROUNDS, None], [*MOUTHS, None]
    ):
        out.add(caption(kind, subject, colour, background, mouth))
    return sorted(out)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_unet() -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 96, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def random_caption(row: Any, rng: np.random.Generator, open_mouth: float, open_other: float, null: float = 0.0) -> str:
    """The caption of one picture with some attributes left open, so that partial prompts are at home in the model."""
    if rng.random() < null:
        return ""
    shares = {"subject": open_other, "colour": open_other, "background": open_other, "mouth": open_mouth}
    return caption(row.kind, *(getattr(row, a) if rng.random() >= share else None for a, share in shares.items()))


def latents(work: Path) -> Tensor:
    """Training pictures in the autoencoder's space, [N, 4, 16, 16], cached."""
    from diffusers import AutoencoderTiny

    path = work / "latents.npy"
    if not path.exists():
        vae = AutoencoderTiny.from_pretrained(work / "pipeline" / "vae").eval()
        x, _ = pictures(work, "train")
        with torch.no_grad():
            z = torch.cat([vae.encode(in_unit_range(b) * 2 - 1).latents for b in x.split(256)])
        np.save(path, z.numpy())
    return torch.from_numpy(np.load(path))


def stage_unet(work: Path, steps: int = 4_400, batch: int = 32) -> None:
    """The reference: text encoder and U-Net together, v-prediction, min-SNR-5 weights, EMA."""
    from transformers import CLIPTextModel

    z, (_, table) = latents(work), pictures(work, "train")
    scale = 1 / z.std().item()
    z = z * scale
    rows = list(table.itertuples())
    tokenizer = make_tokenizer(work)
    torch.manual_seed(0)
    unet, text = make_unet(), CLIPTextModel(text_config(tokenizer, 128, 2))
    ema_unet, ema_text = copy.deepcopy(unet), copy.deepcopy(text)
    parameters = [*unet.parameters(), *text.parameters()]
    averages = [*ema_unet.parameters(), *ema_text.parameters()]
    optimizer = torch.optim.AdamW(parameters, 8e-4, betas=(0.9, 0.99), weight_decay=0.01)
    acp = make_scheduler().alphas_cumprod
    # Faces are a tenth of the latents and carry all of the mouth: in the last third they count six times. Not before:
    # under
    # such weights from the start the model never learned to read backgrounds and bodies. (Each element's own optimum,
    # the
    # posterior mean, is the same under any weights.)
    face = torch.ones(16, 16)
    face[9:16, 5:11] = 6
    face = face / face.mean()
    evenly = torch.ones(16, 16)
    modules = {"unet": unet, "text": text, "ema_unet": ema_unet, "ema_text": ema_text}
    for step, progress in Resumable(work / "unet", steps, modules, optimizer):
        trapezoid(optimizer, 8e-4, progress)
        rng = np.random.default_rng(step)
        index = rng.integers(len(rows), size=batch)
        tokens = tokenize(tokenizer, [random_caption(rows[i], rng, 0.25, 0.08, 0.1) for i in index])
        t = torch.randint(0, 1000, (batch,))
        a, s = (v[t].sqrt().view(-1, 1, 1, 1) for v in (acp, 1 - acp))
        x0 = z[index]
        eps = torch.randn_like(x0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            v = unet(a * x0 + s * eps, t, encoder_hidden_states=text(tokens).last_hidden_state).sample
        snr = (a / s) ** 2
        weight = snr.clamp(max=5) / (snr + 1)
        loss = (weight * (face if progress > 2 / 3 else evenly) * (v.float() - (a * eps - s * x0)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(0.999, (1 + step) / (10 + step)))
        if step % 50 == 0:
            print(f"unet {step}/{steps} loss {loss:.4f}", time.strftime("%H:%M:%S"), flush=True)
    save_pipeline(work, ema_unet, ema_text, tokenizer, scale)


def save_pipeline(work: Path, unet: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer, scale: float) -> None:
    """A stock StableDiffusionPipeline folder in fp16; the latents' unit variance is the autoencoder's scaling
    factor."""
    from diffusers import AutoencoderTiny, StableDiffusionPipeline

    from diffinstruct.models.export import tidy_configs

    vae = AutoencoderTiny.from_pretrained(work / "pipeline" / "vae")
    vae.register_to_config(scaling_factor=scale)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(work / "pipeline")
    tidy_configs(work / "pipeline")


def blurred(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def decoded(work: Path, count: int = 4000) -> Tensor:
    """uint8 [count, 3, 64, 64]: the first training pictures through the autoencoder with noisy latents, as samples
    look."""
    from diffusers import AutoencoderTiny

    path = work / "decoded.npy"
    if not path.exists():
        vae = AutoencoderTiny.from_pretrained(work / "pipeline" / "vae").eval()
        torch.manual_seed(1)
        x, _ = pictures(work, "train")
        out = []
        with torch.no_grad():
            for batch in x[:count].split(100):
                z = vae.encode(in_unit_range(batch) * 2 - 1).latents
                y = vae.decode(z + 0.25 * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)).sample
                out.append(((y * 0.5 + 0.5).clamp(0, 1) * 255).round().byte())
        np.save(path, torch.cat(out).numpy())
    return torch.from_numpy(np.load(path))


def stage_classifier(work: Path, steps: int = 700, batch: int = 64) -> None:
    """The judge of truth: which attributes a picture shows. At least 98 % right on held-out renders, each attribute."""
    from diffinstruct.evaluation.features import AttributeClassifier

    x, table = pictures(work, "train")
    x = torch.cat([x, decoded(work)])
    table = pd.concat([table, table[: len(x) - len(table)]])
    classes = {
        "kind": ["sprout", "critter"],
        "subject": [*PLANTS, *BODIES],
        "colour": list(COLOURS),
        "background": list(BACKGROUNDS),
        "mouth": list(MOUTHS),
    }
    truth = {a: torch.tensor([names.index(v) for v in table[a]]) for a, names in classes.items()}
    torch.manual_seed(0)
    model = AttributeClassifier(classes)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    n_renders = len(x) - len(decoded(work))
    for step, progress in Resumable(work / "classifier_training", steps, {"model": model}, optimizer, every=100):
        cosine(optimizer, 1e-3, progress)
        index = torch.cat([torch.randint(n_renders, (batch // 2,)), torch.randint(n_renders, len(x), (batch // 2,))])
        images = in_unit_range(x[index])
        images[::4] = blurred(images[::4])
        images = (images + 0.08 * torch.rand(batch, 1, 1, 1) * torch.randn_like(images)).clamp(0, 1)
        _, logits = model(images)
        losses = [F.cross_entropy(logits[a], truth[a][index], label_smoothing=0.02) for a in classes]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"classifier {step}/{steps} loss {loss:.4f}", flush=True)
    x, table = pictures(work, "held_out")
    with torch.no_grad():
        logits = [model(in_unit_range(b))[1] for b in x.split(200)]
    scores = {}
    for a, names in classes.items():
        predicted = torch.cat([part[a] for part in logits]).argmax(1)
        scores[a] = float((predicted == torch.tensor([names.index(v) for v in table[a]])).float().mean())
    print("classifier on held-out renders", scores, flush=True)
    (work / "classifier.json").write_text(
        json.dumps({"held_out_renders": len(x), "accuracy": scores}, indent=2), encoding="utf-8"
    )
    if min(scores.values()) < 0.98:
        raise SystemExit(f"the classifier is no judge of truth yet: {scores}")
    model.save(work / "classifier")


def utility(wants: list[dict[str, Any]], shows: pd.DataFrame, damage: Tensor) -> Tensor:
    """[P, N]: what the simulated annotator likes. A point for each attribute as asked, one for a smile where the prompt
    leaves the face open, and a loss of up to two for a damaged picture."""
    columns = {a: shows[a].to_numpy() for a in ("kind", *ATTRIBUTES)}
    rows = []
    for want in wants:
        right = sum((columns[a] == v).astype(np.float32) for a, v in want.items() if v is not None)
        rows.append(right + (columns["mouth"] == "smiling") * (want["mouth"] is None))
    return torch.from_numpy(np.stack(rows).astype(np.float32)) - 2 * damage


def damaged(images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A third of the pictures noisy, smeared over one another or blurred; (images, severity in [0, 1])."""
    severity = torch.zeros(len(images))
    out = images.clone()
    for i in rng.choice(len(images), len(images) // 3, replace=False):
        severity[i] = strength = 0.3 + 0.7 * float(rng.random())
        kind = rng.integers(4)
        if kind == 0:
            out[i] = (images[i] + 0.3 * strength * torch.randn_like(images[i])).clamp(0, 1)
        elif kind == 1:
            for _ in range(1 + int(5 * strength)):
                out[i] = blurred(out[i : i + 1])[0]
        elif kind == 2:
            out[i] = torch.lerp(images[i], images[int(rng.integers(len(images)))], 0.5 * strength)
        else:  # colours shifted and contrast gone
            out[i] = (0.5 + (images[i] - 0.5) * (1 - 0.7 * strength) + 0.25 * strength * torch.randn(3, 1, 1)).clamp(0, 1)
    return out, severity


def train_preference(
    work: Path, name: str, seed: int, width: int, layers: int, sharpness: float, half: int, steps: int
) -> None:
    """A CLIPModel on noisy choices with the Bradley-Terry loss; `half` says which renders it sees, even or odd."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig

    x, table = pictures(work, "train")
    extra = decoded(work)
    x, table = torch.cat([x, extra])[half::2], pd.concat([table, table[: len(extra)]])[half::2].reset_index(drop=True)
    rows = list(table.itertuples())
    tokenizer = CLIPTokenizer.from_pretrained(work / "pipeline" / "tokenizer")
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        projection_dim=128,
        hidden_act="gelu",
    )
    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config=text_config(tokenizer, 128, 2).to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=128,
        logit_scale_init_value=2.7,
    )
    classes = {"subject": [*PLANTS, *BODIES], "colour": list(COLOURS), "background": list(BACKGROUNDS), "mouth": list(MOUTHS)}
    # Choices alone teach the towers colours long before mouths: while they learn, each also names what it sees and
    # reads.
    model = CLIPModel(config)
    sees = nn.ModuleDict({a: nn.Linear(128, len(names)) for a, names in classes.items()})
    reads = nn.ModuleDict({a: nn.Linear(128, len(names) + 1) for a, names in classes.items()})
    parameters = [*model.parameters(), *sees.parameters(), *reads.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, betas=(0.9, 0.98), weight_decay=0.02)
    alike = table.groupby(["kind", "subject"]).indices
    prompts_, batch = 32, 96
    modules = {"model": model, "sees": sees, "reads": reads}
    for step, progress in Resumable(work / f"{name}_training", steps, modules, optimizer, every=100):
        cosine(optimizer, 1e-3, progress, warmup=0.05)
        rng = np.random.default_rng([seed, step])
        anchors = rng.integers(len(rows), size=prompts_)
        neighbours = [rng.choice(alike[(rows[i].kind, rows[i].subject)]) for i in anchors]
        index = np.concatenate([anchors, neighbours, rng.integers(len(rows), size=batch - 2 * prompts_)])
        wants: list[dict[str, Any]] = []
        for i in anchors:
            want = {a: getattr(rows[i], a) for a in ("kind", *ATTRIBUTES)}
            for a, share in (("subject", 0.15), ("colour", 0.15), ("background", 0.15), ("mouth", 0.45)):
                want[a] = None if rng.random() < share else want[a]
            wants.append(want)
        texts = [caption(w["kind"], w["subject"], w["colour"], w["background"], w["mouth"]) for w in wants]
        images = in_unit_range(x[torch.from_numpy(index)])
        shift = rng.integers(-1, 2, size=2)
        images = torch.roll(F.pad(images, (1, 1, 1, 1), mode="replicate"), tuple(shift), (2, 3))[..., 1:-1, 1:-1]
        images, severity = damaged(images, rng)
        images = (images + 0.04 * torch.rand(batch, 1, 1, 1) * torch.randn_like(images)).clamp(0, 1)
        liked = utility(wants, table.iloc[index], severity)
        out = model(input_ids=tokenize(tokenizer, texts), pixel_values=(images - 0.5) / 0.25)
        scores = out.logits_per_text  # [prompts, images], logit_scale * cos
        one, other = (torch.from_numpy(rng.integers(batch, size=(prompts_, 96))) for _ in range(2))
        one[:, :24] = torch.arange(prompts_)[:, None]  # the picture the prompt describes, against
        other[:, :12] = prompts_ + torch.arange(prompts_)[:, None]  # one of the same subject, and against others
        chosen = torch.from_numpy(rng.random((prompts_, 96)).astype(np.float32)) < torch.sigmoid(
            sharpness * (liked.gather(1, one) - liked.gather(1, other))
        )
        loss = choices = F.binary_cross_entropy_with_logits(scores.gather(1, one) - scores.gather(1, other), chosen.float())
        shown, good = table.iloc[index], severity == 0
        named = {}
        for attribute, names in classes.items():
            target = torch.tensor([names.index(v) for v in shown[attribute]])
            logits = sees[attribute](out.vision_model_output.pooler_output)
            named[attribute] = (logits.argmax(1) == target)[good].float().mean()
            wanted = torch.tensor([names.index(w[attribute]) if w[attribute] else len(names) for w in wants])
            read = reads[attribute](out.text_model_output.pooler_output)
            loss = loss + (1 - progress) * (F.cross_entropy(logits[good], target[good]) + F.cross_entropy(read, wanted))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            clear = (liked.gather(1, one) - liked.gather(1, other)).abs() > 0.5
            agree = ((scores.gather(1, one) > scores.gather(1, other)) == (liked.gather(1, one) > liked.gather(1, other)))[
                clear
            ]
            print(
                f"{name} {step}/{steps} choices {choices:.4f} agrees {agree.float().mean():.3f} "
                + " ".join(f"{k} {v:.2f}" for k, v in named.items()),
                flush=True,
            )
    model.save_pretrained(work / name)
    tokenizer.save_pretrained(work / name)
    (work / name / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"shortest_edge": SIZE}}), encoding="utf-8"
    )


def stage_preference(work: Path, steps: int = 1000) -> None:
    """The reward to train on."""
    train_preference(work, "preference", seed=1, width=128, layers=3, sharpness=2.0, half=0, steps=steps)


def stage_judge(work: Path, steps: int = 1000) -> None:
    """The held-out judge: other pictures, other width and depth, other seed, choices of another sharpness."""
    train_preference(work, "judge", seed=2, width=96, layers=4, sharpness=1.5, half=1, steps=steps)


def stage_prompts(work: Path) -> None:
    """prompts.csv. train: combinations seen in training, with and without a face; eval: held-out combinations with
    their face; open: face-free, held-out combinations first, then two attributes only; grid: eight to look at."""
    rng = random.Random(3)
    rows = []

    def row(split: str, kind: str, *attributes: str | None) -> None:
        rows.append((split, caption(kind, *attributes), kind, *(value or "" for value in attributes)))

    combos = list(itertools.product(SUBJECTS, COLOURS, BACKGROUNDS))
    for (kind, subject), colour, background in [c for c in combos if not held_out(*c[0], *c[1:])]:
        row("train", kind, subject, colour, background, None)
        row("train", kind, subject, colour, background, rng.choice(list(MOUTHS)))
    unseen = [c for c in combos if held_out(*c[0], *c[1:])]
    named = list(itertools.product(unseen, MOUTHS))
    rng.shuffle(named)
    for ((kind, subject), colour, background), mouth in itertools.islice(itertools.cycle(named), 500):
        row("eval", kind, subject, colour, background, mouth)  # 490 there are: the last ten come again, with other noise
    open_ = [(s, c, b) for s in SUBJECTS for c, b in [*((c, None) for c in COLOURS), *((None, b) for b in BACKGROUNDS)]]
    for pair, some_colour, some_background in [*unseen, *rng.sample(open_, 256 - len(unseen))]:
        row("open", *pair, some_colour, some_background, None)
    for i, ((kind, subject), colour, background) in enumerate(rng.sample(unseen, 8)):
        row("grid", kind, subject, colour, background, None if i % 2 else list(MOUTHS)[i // 2 + 1])
    pd.DataFrame(rows, columns=["split", "prompt", "kind", *ATTRIBUTES]).to_csv(work / "prompts.csv", index=False)


def stage_package(work: Path) -> None:
    """What was trained, but the one-step start, into the package: all weights in fp16, to be loaded as fp32."""
    from safetensors.torch import load_file, save_file

    for name in ("pipeline", "preference", "judge", "classifier"):
        shutil.rmtree(POCKET / name, ignore_errors=True)
        shutil.copytree(work / name, POCKET / name)
        for path in (POCKET / name).rglob("*.safetensors"):
            save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}, path, {"format": "pt"})
    shutil.copy(work / "prompts.csv", POCKET / "prompts.csv")


def stage_reference(work: Path) -> None:
    """The reference at 50 guided steps: what distances are measured to, its own evaluation, the quality of the
    world."""
    from diffinstruct.evaluation.evaluate import image_features
    from diffinstruct.evaluation.features import AttributeClassifier
    from diffinstruct.evaluation.world import evaluate_in, store_evaluation, world_prompts
    from diffinstruct.models.pipeline import load_reference
    from diffinstruct.models.world import read_world

    world = read_world(POCKET)
    reference = load_reference("pocket")

    @torch.no_grad()
    def sample(prompts: list[str], noise: Tensor) -> Tensor:
        print(f"reference, 50 steps: {len(prompts)} pictures", flush=True)
        return reference.decode(reference.sample(prompts, noise, 50, GUIDANCE_SCALE))

    others = world_prompts(world)["prompt"][::2].tolist()
    noise = torch.randn(len(others), *reference.latent_shape, generator=torch.Generator().manual_seed(3_000_000))
    pictures_ = torch.cat([sample(others[i : i + 54], noise[i : i + 54]) for i in range(0, len(others), 54)])
    features = image_features(AttributeClassifier.load(world.classifier), pictures_)
    evaluation = evaluate_in(world, sample, features)
    store_evaluation(world, evaluation)
    named = evaluation.table[evaluation.table["mouth"] != ""]
    right = named.groupby("kind")[[f"accuracy/{a}" for a in ATTRIBUTES]].mean()
    print(f"reference, 50 steps, {len(named)} held-out prompts\n{right}", flush=True)
    (work / "reference.json").write_text(
        json.dumps({"prompts": len(named), "guidance_scale": GUIDANCE_SCALE, "accuracy": right.to_dict()}, indent=2),
        encoding="utf-8",
    )


def stage_distill(work: Path, steps: int = 240) -> None:
    """The one-step start: the reference distilled by DI* with reward scale 0 (SIM), by the project's own trainer."""
    from diffinstruct import Experiment, train

    base = Experiment().model_dump(mode="json")
    base |= {"name": "distill", "steps": steps, "global_batch_size": 24, "precision": "bf16"}
    base |= {"rewards": {"trained": [], "held_out": []}}
    base["generator"] |= {"init_from": "reference", "learning_rate": 2e-4, "ema_decay": 0.98}
    base["score_network"] |= {"learning_rate": 4e-4, "updates_per_step": 2}
    # Under the reference's own 3 what a prompt leaves open falls onto one choice
    base["reference"] |= {"guidance_scale": 2.0}
    base["objective"] |= {"reward_scale": 0.0}
    base["logging"] |= {"every": 20, "checkpoint_every": 40, "grid_every": 40}
    result = train(Experiment.model_validate(base), work / "distill", local=True)
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(result.export / "unet")
    unet.to(torch.float16).save_pretrained(POCKET / "generator")
    config = POCKET / "generator" / "config.json"
    kept = {
        k: v for k, v in json.loads(config.read_text(encoding="utf-8")).items() if k != "_name_or_path"
    }  # a path of this machine
    config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


STAGES = {
    "render": stage_render,
    "vae": stage_vae,
    "unet": stage_unet,
    "classifier": stage_classifier,
    "preference": stage_preference,
    "judge": stage_judge,
    "prompts": stage_prompts,
    "package": stage_package,
    "reference": stage_reference,
    "distill": stage_distill,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help="default: all")
    parser.add_argument("--work", type=Path, default=Path("runs/pocket_world"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    unknown = set(arguments.stages) - set(STAGES)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; stages are {', '.join(STAGES)}")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name in arguments.stages or STAGES:
        done = arguments.work / f"{name}.done"
        if not done.exists():
            print(f"stage {name}", flush=True)
            STAGES[name](arguments.work)
            done.touch()


if __name__ == "__main__":
    main()
