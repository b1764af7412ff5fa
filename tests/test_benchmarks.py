"""benchmarks/gpu.py as far as a CPU goes: its rows, its count of the work, and that the loop beside ours does the
same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu

ROOT = Path(__file__).parents[1]
BARE = "import runpy, sys; sys.modules.update(ray=None, mlflow=None); runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
CPU = torch.device("cpu")


def run(*arguments):
    """The rows of its table, cell by cell, and all that it printed; where neither ray nor mlflow can be imported."""
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    command = [sys.executable, "-c", BARE, "--smoke", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line[:2] == "| "]
    return [cells for cells in table if cells[0] in gpu.MODELS], done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return gpu.shrunk(gpu.SHAPES / gpu.MODELS["SD1.5"][0], tmp_path_factory.mktemp("shapes"))


@pytest.mark.long
def test_every_row_has_its_figures():
    """All of them: one core takes a minute and a half."""
    rows, said = run("--minutes", "9")
    assert {tuple(cells[:5]) for cells in rows} >= {
        (of.model, "LoRA" if of.lora else "full", *("yes" if on else "no" for on in (of.checkpointing, of.compiled)), of.loop)
        for of in gpu.PLAN
        if of.loop != "plain"
    }
    for cells in rows:
        if cells[6] == gpu.OUT_OF_MEMORY:  # which a CPU is taken to be at the second batch
            assert int(cells[5]) == 2 * gpu.SMOKE_BATCH
            continue
        assert float(cells[6]) > 0 and float(cells[7]) > 0
        assert sum(float(share.rstrip("%")) for share in cells[10:]) == pytest.approx(100, abs=0.3)
        assert all(float(share.rstrip("%")) > 0 for share in cells[10:])
    assert said.count("not judged here") == 3


def test_what_there_is_no_time_for_is_said():
    rows, _ = run("--minutes", "0")
    assert len(rows) == len(gpu.PLAN) and {cells[6] for cells in rows} == {"not reached"}


def test_the_plain_loop_does_the_same(folder):
    """Three rounds each, from the same start."""
    worlds = [gpu.World(gpu.Setting("SD1.5"), folder, CPU) for _ in range(2)]
    for world in worlds:
        torch.manual_seed(1)
        world.reference.encode_prompts(["prompt 0", "prompt 1"])
    for step in range(3):
        clocks = [gpu.Clock(CPU), gpu.Clock(CPU)]
        of_ours, of_plain = (
            loop(world, 2, step, clock) for loop, world, clock in zip((gpu.ours, gpu.plain), worlds, clocks, strict=True)
        )
        assert {key: of_ours[key] for key in of_plain} == pytest.approx(of_plain, rel=1e-5)
        assert all(min(clock.seconds().values()) > 0 for clock in clocks)


def test_work_is_counted_as_it_is_done(folder):
    setting = gpu.Setting("SD1.5", lora=True)
    world = gpu.World(setting, folder, CPU, precision="fp32")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's own has no formula
        gpu.ours(world, 2, 0, gpu.Clock(CPU))
    assert gpu.flops(setting, folder) == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)


@pytest.mark.long
def test_the_rehearsal_goes_through_all_stages(tmp_path):
    """At a tiny size, where libraries take most memory; each stage is a process that imports them."""
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    command = [sys.executable, "benchmarks/rehearse.py", "--tiny", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "stages.json").read_text())
    assert [row["stage"] for row in rows][-3:] == ["export", "generate", "stock diffusers"]
    again = subprocess.run(command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True)
    assert again.stdout == done.stdout  # nothing was done twice
