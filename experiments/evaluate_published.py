"""Do the published one-step generators score here what their authors report? And ours, under the same protocol?

    python experiments/evaluate_published.py PROMPTS [MODEL ...] [-o FOLDER] [--column NAME] [--seed N] [--batch N]
    python experiments/evaluate_published.py --smoke

MODEL is the name of a published generator, a finished run or an exported folder; without any, all published ones. Each
makes one picture a prompt, in one step, all from the same noise. Published are networks: as in their authors' notebook
one pipeline carries them all, here SDXL's own, at 1024 px and timestep 399. Prints every figure with its 95 % interval
over prompts and, in round brackets, the paper's (arXiv 2410.20898); writes FOLDER/table.csv. FOLDER/NAME.csv has a row
a prompt and
is kept: what is scored is not scored again.

The paper's figures are of the 1,632 Parti prompts, HPSv2.1 of its own benchmark's 3,200: give those for that column.
Which CLIP and which aesthetic predictor it has is not known here; ours are the rewards clip_score and aesthetic_v2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file

from diffinstruct.config.prompts import read_prompts
from diffinstruct.errors import UserError, did_you_mean
from diffinstruct.evaluation.evaluate import evaluate
from diffinstruct.evaluation.features import FeaturesOnly
from diffinstruct.models.denoiser import OneStepGenerator
from diffinstruct.models.export import export, load_export
from diffinstruct.models.pipeline import Reference, load_reference
from diffinstruct.models.prompt_embeddings import digest
from diffinstruct.models.world import POCKET
from diffinstruct.reports.frames import markdown
from diffinstruct.reward_service.client import load_reward
from diffinstruct.reward_service.score_folder import save
from diffinstruct.statistics import Estimate, bootstrap_mean
from reward_models.weights import at_commit, read

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DMD2 = "tianweiy/DMD2@be22767697a1f3ca656b73c776e15fa335c86c6c"  # of the others no commit is known here
UNET = "unet/diffusion_pytorch_model.fp16.safetensors"


@dataclass(frozen=True)
class Protocol:
    """base: the pipeline that carries published networks. rewards: by title, with what tables multiply them.
    published: by name a hub id or folder, the file of weights in it, and the paper's figures, one a reward."""

    base: str
    timestep: int
    rewards: Mapping[str, tuple[str, float]]
    published: Mapping[str, tuple[str, str, Sequence[float]]]


PAPER = Protocol(
    "stabilityai/stable-diffusion-xl-base-1.0@462165984030d82259a11f4367a4eed129e94a7b",
    399,
    {
        "ImageReward": ("image_reward", 1),
        "Aesthetic": ("aesthetic_v2", 1),
        "PickScore": ("pickscore", 0.01),
        "CLIP": ("clip_score", 1),
        "HPSv2.1": ("hpsv2.1", 100),
    },
    {
        "dmd2": (DMD2, "dmd2_sdxl_1step_unet_fp16.bin", (0.930, 5.51, 0.2249, 32.97, 27.97)),  # the others' start
        "diff_instruct_1step": ("XDG-XHS/diff_instruct_1step", UNET, (1.058, 5.60, 0.2253, 33.02, 29.70)),
        "sim_1step": ("XDG-XHS/sim_1step", UNET, (1.049, 5.66, 0.2273, 32.93, 30.16)),
        "dipp_1step": ("XDG-XHS/dipp_1step", UNET, (1.061, 5.58, 0.2260, 32.94, 29.72)),
        "distar_short_1step": ("XDG-XHS/distar_short_1step", UNET, (1.067, 5.74, 0.2304, 32.82, 30.22)),
        "distar_long_1step": ("XDG-XHS/distar_long_1step", UNET, (1.140, 5.83, 0.2331, 32.75, 31.19)),
    },
)
SMOKE = Protocol(  # its "paper" is the README, which has more prompts
    "pocket",
    625,
    {"preference": ("pocket_preference", 1), "judge": ("pocket_judge", 1)},
    {"distilled": (str(POCKET / "generator"), "diffusion_pytorch_model.safetensors", (3.57, 3.02))},
)


@dataclass(frozen=True)
class Beside(Estimate):
    """A figure of ours, with the paper's."""

    paper: float | None = None

    def __str__(self) -> str:
        return super().__str__() + (f" ({self.paper:g})" if self.paper is not None else "")


def called(model: str) -> str:
    """The name of its row."""
    path = Path(model).absolute()
    return path.parent.name if path.name == "export" else path.name


def exported(model: str) -> Path:
    """The folder of a run's export, or of one by itself. Raises UserError for what is neither."""
    folder = Path(model, "export") if Path(model, "experiment.yaml").is_file() else Path(model)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{model}: is no exported folder, nor a run that has finished")
    return folder


def weights_of(model: str, protocol: Protocol) -> str:
    """What tells them from others'."""
    if model in protocol.published:
        return "/".join(protocol.published[model][:2])
    return digest(exported(model).rglob("*.safetensors"))


def opened(model: str, protocol: Protocol, folder: Path) -> tuple[Reference, OneStepGenerator]:
    """What carries a model, and its generator."""
    if model not in protocol.published:
        return load_export(exported(model), DEVICE)
    source, file, _ = protocol.published[model]
    name, commit = at_commit(source)
    start = Path(source, file) if Path(source).is_dir() else Path(hf_hub_download(name, file, revision=commit))
    if start.suffix == ".bin":  # pickled tensors: read as such and nothing else
        pickled, start = start, folder / f"{start.stem}.safetensors"
        save_file(dict(read(pickled)), start)
    base = load_reference(protocol.base, device=DEVICE)
    return base, base.generator(protocol.timestep, str(start), "unit")


def scores(
    models: Sequence[str], protocol: Protocol, prompts: pd.DataFrame, folder: Path, seed: int, batch: int
) -> dict[str, Any]:
    """By the name of each model its table, a row a prompt, a column a reward; what lies in `folder` is not made
    again."""
    judges: dict[str, Any] = {}
    found: dict[str, pd.DataFrame] = {}
    for model in models:
        if model not in protocol.published and not Path(model).is_dir():
            raise UserError(f"{model}: neither a folder nor published{did_you_mean(model, protocol.published)}")
        if (name := called(model)) in found:
            raise UserError(f"{model}: another one is called {name!r}; give the folder a name of its own")
        of, file = weights_of(model, protocol), folder / f"{name}.csv"
        if not file.exists():
            judges = judges or {reward: load_reward(reward, DEVICE) for reward, _ in protocol.rewards.values()}
            reference, generator = opened(model, protocol, folder)
            print(f"scoring {name}: {len(prompts)} prompts", flush=True)
            sees = FeaturesOnly(list(judges.values())[-1].features)  # for diversity
            sample, shape = reference.sampler(generator), reference.latent_shape
            made = evaluate(sample, prompts, judges, sees, None, noise_shape=shape, seed=seed, batch_size=batch)
            save(made.table.assign(seed=seed, weights=of), file)
        found[name] = pd.read_csv(file, keep_default_na=False, na_values={"diversity": [""]})
        kept = {key: set(found[name][key]) for key in ("seed", "weights")}
        if list(found[name]["prompt"]) != list(prompts["prompt"]) or kept != {"seed": {seed}, "weights": {of}}:
            raise UserError(f"{file}: is of other prompts, another seed or other weights; name another folder with -o")
    return found


def figures(name: str, table: pd.DataFrame, protocol: Protocol, seed: int) -> dict[str, Estimate]:
    ours = {
        title: bootstrap_mean(table[f"reward/{of}"] * factor, seed) for title, (of, factor) in protocol.rewards.items()
    }
    theirs = protocol.published[name][2] if name in protocol.published else [None] * len(ours)
    beside: dict[str, Estimate] = {
        t: Beside(**asdict(ours[t]), paper=paper) for t, paper in zip(ours, theirs, strict=True)
    }
    return beside | {"diversity": bootstrap_mean(table["diversity"].dropna(), seed)}


def exports(folder: Path) -> list[str]:
    """The pocket world's two starts, exported: in `--smoke` they stand for ours."""
    world, starts = load_reference("pocket"), {"export-raw": "reference", "export-distilled": "pocket-distilled"}
    return [
        str(export("pocket", world.generator(SMOKE.timestep, start), folder / name)) for name, start in starts.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="?", metavar="PROMPTS", help="a .csv with a column `prompt`, a .txt, ...")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"a folder, or one of {', '.join(PAPER.published)}")
    parser.add_argument("-o", dest="folder", type=Path, default=Path("runs/published"), metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=2_000_000, help="of the noise (default 2000000, as of `evaluate`)")
    parser.add_argument("--column", default="prompt", help="of the prompts in PROMPTS (default prompt)")
    parser.add_argument(
        "--batch", type=int, default=1, help="pictures made at once; the decoder takes gigabytes for each"
    )
    parser.add_argument("--smoke", action="store_true", help="the pocket world's generators on a few prompts")
    asked = parser.parse_args()
    protocol, folder = (SMOKE, Path("runs/published-smoke")) if asked.smoke else (PAPER, asked.folder)
    if not asked.smoke and not asked.prompts:
        parser.error("name the prompts")
    if asked.batch < 1:
        parser.error(f"--batch: should be at least 1, got {asked.batch}")
    if folder.exists() and not folder.is_dir():
        parser.error(f"-o: {folder} is no folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        prompts = (
            read_prompts("pocket:eval").iloc[::50] if asked.smoke else read_prompts(asked.prompts, column=asked.column)
        )
        models = [*protocol.published, *exports(folder)] if asked.smoke else asked.models or list(protocol.published)
        tables = scores(models, protocol, prompts, folder, asked.seed, asked.batch)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    rows = {name: figures(name, table, protocol, asked.seed) for name, table in tables.items()}
    print(markdown(rows))
    flat = [
        {"model": name, "measure": title} | asdict(figure)
        for name, row in rows.items()
        for title, figure in row.items()
    ]
    save(pd.DataFrame(flat), folder / "table.csv")
    print(folder / "table.csv")


if __name__ == "__main__":
    main()
