"""Build the pocket world from scratch: pictures, tokenizer, diffusion model, preference models, judges of truth, prompts.

    python experiments/build_pocket_world.py --work runs/pocket_world            every stage, in order
    python experiments/build_pocket_world.py --work runs/pocket_world unet       one stage

Stages: render, vae, classifier, unet, preference, judge, distill, package, measure. Each is seeded, writes into the work
folder when it is done, goes on from its last checkpoint when interrupted, and is skipped once finished. Rendering needs
`dicebear-core dicebear-styles resvg-py` (the `world` extra). The result replaces `platform/diffinstruct/pocket/`.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import random
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIZE = 64
TOKENS = 16
N_RENDERS, N_HELD_OUT_RENDERS = 24_000, 2_000

# ------------------------------------------------------------------------------------------------ the world
# word in the caption -> DiceBear's value. Colours are named by hand; neighbours that one would confuse are left out.
PLANTS = {"cactus": "cactus", "bush": "bush", "flower": "flower", "tulip": "tulip", "palm": "palm", "agave": "succulent",
          "sprout": "sprout", "bud": "buds"}
BODIES = {"round": "dome", "square": "block", "slim": "tower", "wide": "squat", "bell-shaped": "bell", "stepped": "steps"}
COLOURS = {"blue": "#7dd3fc", "lavender": "#c4b5fd", "pink": "#fda4af", "orange": "#fdba74", "yellow": "#fcd34d",
           "lime": "#bef264", "mint": "#5eead4", "white": "#e2e8f0"}
BACKGROUNDS = {"blue": "#1d4ed8", "purple": "#6d28d9", "magenta": "#a21caf", "red": "#be123c", "orange": "#c2410c",
               "green": "#047857", "dark": "#1e293b"}
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
    colour_ = f"{colour} " if colour else ""
    mouth_ = f"{mouth} " if mouth else ""
    if kind == "sprout":
        text = f"a {subject or 'plant'} in a {mouth_}{colour_}pot"
    else:
        text = f"a {mouth_}{colour_}{subject + ' ' if subject else ''}critter"
    return text + (f" on a {background} background" if background else "")


def held_out(kind: str, subject: str, colour: str, background: str) -> bool:
    """One combination of (subject, colour, background) in eight is never rendered for training."""
    i = SUBJECTS.index((kind, subject)), list(COLOURS).index(colour), list(BACKGROUNDS).index(background)
    return (3 * i[0] + 5 * i[1] + 7 * i[2]) % 8 == 0


def render(kind: str, subject: str, colour: str, background: str, mouth: str, rng: random.Random) -> np.ndarray:
    """One uint8 [64, 64, 3] picture; what the caption does not name (eyes, cheeks, pot shape, horns) is drawn by `rng`."""
    import resvg_py
    from dicebear import Avatar
    from PIL import Image

    options = {
        "seed": str(rng.random()), "animationVariant": "none", "patternProbability": 0, "cheeksProbability": 25,
        "cheeksVariant": ["blush"], "eyesVariant": [rng.choice(["round", "dots", "bigPupils", "wide"])],
        "backgroundColor": [BACKGROUNDS[background]], "mouthVariant": [rng.choice(MOUTHS[mouth][kind == "critter"])],
    }
    if kind == "sprout":
        options |= {"plantVariant": [PLANTS[subject]], "potColor": [COLOURS[colour]],
                    "potVariant": [rng.choice(["taper", "cylinder", "tub", "round"])]}
    else:
        options |= {"bodyVariant": [BODIES[subject]], "bodyColor": [COLOURS[colour]], "topProbability": 75,
                    "topVariant": [rng.choice(["horns", "antennae", "earsPointy"])]}
    svg = Avatar(_style(kind + "s"), options).to_string()
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


_STYLES: dict[str, object] = {}


def _style(name: str) -> object:
    if name not in _STYLES:
        import dicebear
        from dicebear import Style

        path = Path(dicebear.__file__).parent.parent / "dicebear_styles" / f"{name}.json"
        _STYLES[name] = Style(json.loads(path.read_text()))
    return _STYLES[name]


# ------------------------------------------------------------------------------------------------ stages
def stage_render(work: Path) -> None:
    """renders.npy uint8 [N, 64, 64, 3] and renders.csv; the first N_HELD_OUT_RENDERS show only held-out combinations."""
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

    def __init__(self, folder: Path, steps: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer,
                 every: int = 200) -> None:
        self.path, self.steps, self.modules, self.optimizer, self.every = folder, steps, modules, optimizer, every
        self.start = 0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.pt").exists():
            state = torch.load(folder / "state.pt", weights_only=True)
            self.start = state["step"]
            for name, module in modules.items():
                module.load_state_dict(state[name])
            optimizer.load_state_dict(state["optimizer"])

    def __iter__(self):
        for step in range(self.start, self.steps):
            torch.manual_seed(step)
            progress = step / self.steps
            yield step, progress
            if (step + 1) % self.every == 0 or step + 1 == self.steps:
                state = {name: module.state_dict() for name, module in self.modules.items()}
                state |= {"optimizer": self.optimizer.state_dict(), "step": step + 1}
                torch.save(state, self.path / "state.tmp")
                (self.path / "state.tmp").replace(self.path / "state.pt")


def cosine(optimizer: torch.optim.Optimizer, peak: float, progress: float, warmup: float = 0.02) -> None:
    scale = min(1.0, (progress + 1e-4) / warmup) * (0.5 + 0.5 * np.cos(np.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = peak * (scale + 0.01)


def trapezoid(optimizer: torch.optim.Optimizer, peak: float, progress: float) -> None:
    """Warm up, hold, and come down over the last quarter."""
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, (progress + 1e-4) / 0.02, (1 - progress) / 0.25 + 0.005)


def make_vae():
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32), decoder_block_out_channels=(32, 32, 32), num_encoder_blocks=(0, 2, 2),
        num_decoder_blocks=(2, 2, 1), latent_channels=4, scaling_factor=1.0, force_upcast=False)


def stage_vae(work: Path, steps: int = 2400, batch: int = 24) -> None:
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


def make_tokenizer(work: Path):
    """Byte-pair merges learned on the world's own captions, in CLIP's format: every word of the world is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = {w for t in every_caption() for w in t.replace("-", " - ").split()}
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz"), special_tokens=["<|startoftext|>", "<|endoftext|>"])
    bpe.train_from_iterator([" ".join(sorted(words))] * 10, trainer)
    folder = work / "pipeline" / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"]
    for letter in "abcdefghijklmnopqrstuvwxyz-,.0123456789":  # any text stays encodable, letter by letter
        for token in (letter, letter + "</w>"):
            vocab.setdefault(token, len(vocab))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENS,
        pad_token="<|endoftext|>", unk_token="<|endoftext|>", bos_token="<|startoftext|>", eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def every_caption() -> list[str]:
    out = set()
    for (kind, subject), colour, background, mouth in itertools.product(
        [*SUBJECTS, ("sprout", None), ("critter", None)], [*COLOURS, None], [*BACKGROUNDS, None], [*MOUTHS, None]
    ):
        out.add(caption(kind, subject, colour, background, mouth))
    return sorted(out)


def tokenize(tokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def text_config(tokenizer, width: int, layers: int):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=TOKENS, projection_dim=width, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def make_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(48, 96, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16)


def make_scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                         prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def random_caption(row, rng: np.random.Generator, open_mouth: float, open_other: float, null: float = 0.0) -> str:
    """The caption of one picture with some attributes left open, so that partial prompts are at home in the model."""
    if rng.random() < null:
        return ""
    keep = [v if rng.random() >= open_other else None for v in (row.subject, row.colour, row.background)]
    return caption(row.kind, *keep, row.mouth if rng.random() >= open_mouth else None)


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


def stage_unet(work: Path, steps: int = 9_000, batch: int = 48) -> None:
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
        loss = (weight * (v.float() - (a * eps - s * x0)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(0.999, (1 + step) / (10 + step)))
        if step % 50 == 0:
            print(f"unet {step}/{steps} loss {loss:.4f}", time.strftime("%H:%M:%S"), flush=True)
    save_pipeline(work, ema_unet, ema_text, tokenizer, scale)


def save_pipeline(work: Path, unet, text, tokenizer, scale: float) -> None:
    """A stock StableDiffusionPipeline folder in fp16; the latents' unit variance is the autoencoder's scaling factor."""
    from diffusers import AutoencoderTiny, StableDiffusionPipeline

    vae = AutoencoderTiny.from_pretrained(work / "pipeline" / "vae")
    vae.register_to_config(scaling_factor=scale)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=make_scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipeline.to(torch.float16).save_pretrained(work / "pipeline")


STAGES = {"render": stage_render, "vae": stage_vae, "unet": stage_unet}


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
