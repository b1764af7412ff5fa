"""The first day with a real model, rehearsed: an SD1.5-shaped pipeline with random weights, through every command.

    python benchmarks/rehearse.py [--folder FOLDER] [--tiny] [--pixels 512] [--again STAGE ...]

The pipeline is written to disk as a hub repository lies in the cache, as its fp16 variant, and as one file in the
authors' layout. Then it is counted (`check`), trained with adapters (fp32 with a cheap reward, bf16 with a
PickScore-shaped one on small pictures), killed, resumed, exported, drawn from, and opened by stock diffusers in a
process that does not know this package. Nothing is downloaded.

Each stage is a process of its own; a table says its seconds, its peak memory and, for training, `check`'s figure.
What is done is kept in the folder and not done again, unless `--again` names it. The status is 1 where a stage failed
or took more than a tenth beyond `check`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NAME = "stable-diffusion-v1-5/stable-diffusion-v1-5"
LARGE, SMALL = "1" * 40, "2" * 40  # commits: of the pipeline, and of the same at SMALL_PIXELS
SMALL_PIXELS = 64
PICKSCORE, PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
ALLOWED = 1.10  # peak memory over what `check` says
PROMPTS = ["a red hat", "a blue cup", "an old boat", "a field of tulips"]
VIT_H = {
    "projection_dim": 1024,
    "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    | {"patch_size": 14},
}
"""PickScore's CLIP, as far as it is not CLIP's default."""
TINY_CLIP = {
    "projection_dim": 8,
    "text_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"patch_size": 14},
}
VOCABULARY = {"bos_token_id": 56, "eos_token_id": 57, "pad_token_id": 57}  # of the tokenizer that layouts.py writes

STRANGER = """
import sys
sys.modules["diffinstruct"] = None
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
picture = pipe("a red hat", num_inference_steps=1, guidance_scale=0.0, output_type="np").images[0]
assert picture.std() > 0.001, picture.std()
print(type(pipe).__name__, picture.shape)
"""
OPEN = """
import sys, torch
from diffinstruct.models.pipeline import load_reference

pictures = []
for model in sys.argv[1:]:
    reference = load_reference(model)
    z = torch.randn(1, *reference.latent_shape, generator=torch.Generator().manual_seed(0))
    pictures.append(reference.sampler(reference.generator(625))(["a red hat"], z))
gaps = [(picture - pictures[0]).abs().max().item() for picture in pictures]
assert max(gaps) < 0.1 and pictures[0].std() > 0.001, gaps
print("pictures differ by at most", max(gaps))
"""


def red() -> Any:
    """A reward that costs nothing: how much redder than blue a picture is."""
    return lambda images, prompts: (images[:, 0] ** 2 - images[:, 2]).flatten(1).mean(1)


@dataclass(frozen=True)
class Done:
    """What was seen of a stage: seconds, peak memory, what `check` says of it, the last line that it printed."""

    stage: str
    status: int
    seconds: float
    peak: int
    said: str
    checked: float | None = None

    @property
    def failed(self) -> bool:
        return self.status != 0 or (self.checked is not None and self.peak > ALLOWED * self.checked)

    @property
    def row(self) -> str:
        checked = f"{self.checked / 2**30:7.2f} {self.peak / self.checked:6.2f}" if self.checked else f"{'-':>7} {'-':>6}"
        said = f"{'FAILED ' * self.failed}{self.said[:60]}"
        return f"{self.stage:<22}{self.seconds:9.1f} {self.peak / 2**30:8.2f} {checked}  {said}"


class Rehearsal:
    """The stages in their order, in one folder."""

    def __init__(self, folder: Path, tiny: bool, pixels: int) -> None:
        self.folder, self.tiny, self.pixels = folder.absolute(), tiny, pixels
        self.cache = self.folder / "hub"
        paths = [str(ROOT / "platform"), str(ROOT), str(ROOT / "benchmarks")]
        self.environment = os.environ | {
            "HF_HUB_CACHE": str(self.cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths),
        }  # fmt: skip
        self.stages: dict[str, Callable[[], Done]] = {"write": self.write, "layouts": self.layouts}
        for precision in ("fp32", "bf16"):
            self.stages |= {
                f"{precision} check": partial(self.check, precision),
                f"{precision} train, killed": partial(self.train, precision, kill=True),
                f"{precision} resume": partial(self.train, precision, kill=False),
            }
        exported, picture = self.folder / "exported", self.folder / "picture.png"
        self.stages |= {
            "export": lambda: self.command("export", "export", self.run("fp32"), "-o", exported),
            "generate": lambda: self.command("generate", "generate", exported, PROMPTS[0], "-o", picture),
            "stock diffusers": lambda: self.measured("stock diffusers", self.python("-I", "-c", STRANGER, exported)),
        }

    def run(self, precision: str) -> Path:
        """The only run of that precision."""
        (folder,) = (self.folder / "runs" / precision).glob("*/experiment.yaml")
        return folder.parent

    def python(self, *arguments: object) -> list[object]:
        return [sys.executable, *arguments]

    def command(self, stage: str, *arguments: object) -> Done:
        return self.measured(stage, self.python("-m", "diffinstruct", *arguments))

    def measured(self, stage: str, command: list[Any], until: str = "", checked: float | None = None) -> Done:
        """Run a process to its end, or kill it when there is something of the pattern `until` in the folder."""
        began, killed = time.perf_counter(), False
        log = self.folder / f"{stage.replace(' ', '_').replace(',', '')}.log"
        with log.open("w") as output:
            words = list(map(str, command))
            process = subprocess.Popen(words, env=self.environment, cwd=self.folder, stdout=output, stderr=output)
            while not (ended := os.wait4(process.pid, os.WNOHANG if until and not killed else 0))[0]:
                if killed := any(self.folder.glob(until)):
                    process.send_signal(signal.SIGKILL)
                time.sleep(0.1)
        process.returncode = ended[1]  # it is waited for
        lines = log.read_text(errors="replace").strip().splitlines() or [""]
        failed = ended[1] != (signal.SIGKILL if until else 0)
        return Done(stage, int(failed), time.perf_counter() - began, ended[2].ru_maxrss * 1024, lines[-1], checked)

    # ------------------------------------------------------------------------------------------------- stages
    def write(self) -> Done:
        shutil.rmtree(self.cache, ignore_errors=True)
        arguments = ["--write"] + ["--tiny"] * self.tiny
        return self.measured("write", self.python(__file__, "--folder", self.folder, "--pixels", self.pixels, *arguments))

    def layouts(self) -> Done:
        """The same picture from all layouts."""
        models = [f"{NAME}@{LARGE}", self.folder / "fp16", self.folder / "original.safetensors"]
        return self.measured("layouts", self.python("-c", OPEN, *models))

    def check(self, precision: str) -> Done:
        done = self.command(f"{precision} check", "check", self.recipe(precision))
        sizes = {"MiB": 2**20, "GiB": 2**30}
        log = (self.folder / f"{precision}_check.log").read_text()
        if found := re.search(r"in main memory ([\d.]+) (MiB|GiB)", log):
            (self.folder / f"{precision}.checked").write_text(str(float(found[1]) * sizes[found[2]]))
        return done

    def train(self, precision: str, kill: bool) -> Done:
        checked = float((self.folder / f"{precision}.checked").read_text())
        command = self.python("-m", "diffinstruct", "train", self.recipe(precision), "--local")
        if not kill:  # the same command goes on
            return self.measured(f"{precision} resume", command, "", checked)
        shutil.rmtree(self.folder / "runs" / precision, ignore_errors=True)
        until = f"runs/{precision}/*/checkpoints/step-00000001"
        return self.measured(f"{precision} train, killed", command, until, checked)

    def recipe(self, precision: str) -> Path:
        """Adapters of rank 16 on every layer, two rounds."""
        large = precision == "fp32"
        reward = "benchmarks.rehearse:red" if large else "pickscore"
        model = f"{NAME}@{LARGE}"
        if self.tiny or not large or self.pixels != 512:  # by that name it would be counted as published
            model = str(self.cache / f"models--{NAME.replace('/', '--')}" / "snapshots" / (LARGE if large else SMALL))
        (self.folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        content = {
            "name": precision, "steps": 2, "global_batch_size": 1, "precision": precision, "device": "cpu",
            "activation_checkpointing": True,
            "reference": {"model": model},
            "generator": {"init_from": "reference", "lora_rank": 16},
            "score_network": {"lora_rank": 16},
            "rewards": {"trained": [{"name": reward}], "held_out": [], "micro_batch_size": 1},
            "prompts": {"train": str(self.folder / "prompts.txt"), "grid": str(self.folder / "prompts.txt")},
            "overoptimization": {"every": 0},
            "logging": {"every": 1, "grid_every": 1000, "grid_prompts": 1, "checkpoint_every": 1},
            "cluster": {"rewards": {"placement": "process"}},
            "tracking": {"uri": f"sqlite:///{self.folder / 'mlflow.db'}"},
            "output_dir": str(self.folder / "runs" / precision),
        }  # fmt: skip
        file = self.folder / f"{precision}.yaml"
        file.write_text(json.dumps(content, indent=1))  # which is YAML, too
        return file

    def play(self, again: list[str]) -> bool:
        """Do what is not done yet; whether all went well."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file, rows = self.folder / "stages.json", {}
        if file.is_file():
            rows = {row["stage"]: Done(**row) for row in json.loads(file.read_text())}
        print(f"{'stage':<22}{'seconds':>9} {'peak/GiB':>8} {'check':>7} {'ratio':>6}", flush=True)
        for stage, do in self.stages.items():
            if stage not in rows or rows[stage].failed or stage in again:
                rows[stage] = do()
                file.write_text(json.dumps([vars(row) for row in rows.values()], indent=1))
            print(rows[stage].row, flush=True)
            if rows[stage].status:
                print(f"{stage}: failed; its output is in {self.folder}", file=sys.stderr)
                return False
        return not any(row.failed for row in rows.values())


def write_all(folder: Path, tiny: bool, pixels: int) -> None:
    """The files of stage `write`."""
    from gpu import shrunk
    from layouts import in_hub_cache, write_half_variant, write_one_file, write_pickscore, write_pipeline

    from diffinstruct.planning.check import SHAPES
    from reward_models.clip import CLIP_H
    from reward_models.pickscore import pickscore

    cache, made = folder / "hub", folder / "made"
    shutil.rmtree(made, ignore_errors=True)
    shapes = SHAPES / NAME.replace("/", "--")
    if tiny:
        shapes = shrunk(shapes, folder / "shapes")
        text_encoder = shapes / "text_encoder" / "config.json"
        text_encoder.write_text(json.dumps(json.loads(text_encoder.read_text()) | TINY_CLIP["text_config"]))
    write_pipeline(shapes, made)
    for commit, edge in ((SMALL, SMALL_PIXELS), (LARGE, pixels)):
        config = made / "unet" / "config.json"
        content = json.loads(config.read_text()) | {"sample_size": edge // 8}
        config.unlink()  # of the other commit's it would be the same file
        config.write_text(json.dumps(content))
        copy = folder / commit
        shutil.copytree(made, copy, copy_function=os.link)
        in_hub_cache(cache, NAME, commit, copy)
    write_half_variant(made, folder / "fp16")
    write_one_file(made, folder / "original.safetensors")
    shutil.rmtree(made)
    clip: dict[str, Any] = TINY_CLIP if tiny else VIT_H
    clip["text_config"] |= VOCABULARY
    defaults = pickscore.__defaults__ or ()
    commits = [str(name).partition("@")[2] for name in (defaults[0], CLIP_H)]
    write_pickscore(clip, folder / "pickscore", folder / "processor")
    for name, commit in zip(("pickscore", "processor"), commits, strict=True):
        in_hub_cache(cache, PICKSCORE if name == "pickscore" else PROCESSOR, commit, folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "rehearsal")
    parser.add_argument("--tiny", action="store_true", help="the same with networks that a CPU runs in no time")
    parser.add_argument("--pixels", type=int, default=512, help="edge of the fp32 run's pictures")
    parser.add_argument("--again", nargs="+", default=[], metavar="STAGE", help="stages to do once more")
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.write:
        write_all(asked.folder.absolute(), asked.tiny, asked.pixels)
        return 0
    pixels = SMALL_PIXELS if asked.tiny else asked.pixels
    return 0 if Rehearsal(asked.folder, asked.tiny, pixels).play(asked.again) else 1


if __name__ == "__main__":
    sys.exit(main())
