"""benchmarks/gpu.py as far as a CPU goes: its rows, its count of the work, what a second call does, and that the loop
beside ours does the same."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffinstruct.planning.footprint import FORMULAS

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # as a script has it
gpu, gpu_results = importlib.import_module("gpu"), importlib.import_module("gpu_results")
BARE = (
    "import runpy, sys; sys.modules.update(ray=None, mlflow=None); sys.path.insert(0, 'benchmarks'); "
    "runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
)
CPU = torch.device("cpu")
SETTINGS = gpu_results.SETTINGS


def run(results, *arguments):
    """The rows of its table, cell by cell, and all that it printed; where neither ray nor mlflow can be imported."""
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    command = [sys.executable, "-c", BARE, "--smoke", "--results", str(results), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line[:2] == "| "]
    return [cells for cells in table if cells[0] in gpu.MODELS], done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return gpu.shrunk(gpu.SHAPES / gpu.MODELS["SD1.5"][0], tmp_path_factory.mktemp("shapes"))


@pytest.mark.long
def test_every_row_has_its_figures_and_a_second_call_adds_nothing(tmp_path):
    """All of them: one core takes a minute and a half."""
    rows, said = run(tmp_path / "gpu.json")
    assert {tuple(cells[:4]) for cells in rows} == {tuple(of.cells) for of in SETTINGS}
    assert {cells[4] for cells in rows} == {"DI*", "KL", "ours", "plain"}
    for cells in rows:
        if cells[6] == gpu_results.OUT_OF_MEMORY:  # which a CPU is taken to be at the second batch
            assert int(cells[5]) == 2
            continue
        is_counted = cells[:2] == ["SD1.5", "full"] and cells[4] != "KL"
        assert float(cells[6]) > 0 and (float(cells[7]) > 0 if is_counted else cells[7] == "-")
        shares = [float(share.rstrip("%")) for share in cells[-len(gpu_results.PHASES) :]]
        assert sum(shares) == pytest.approx(100, abs=0.3) and all(share > 0 for share in shares)
    assert said.count("not judged here") == 3 and "metrics equal: True" in said
    content = json.loads((tmp_path / "gpu.json").read_text())
    resumed = content["rows"][gpu_results.RESUME]
    assert resumed["tensors"] == resumed["equal"] > 100
    assert all(row["devices"].keys() == {"cpu"} for row in content["rows"].values() if "devices" in row)
    assert run(tmp_path / "gpu.json", "--minutes", "0") == (rows, said)


def test_what_there_is_no_time_for_is_said(tmp_path):
    rows, _ = run(tmp_path / "gpu.json", "--minutes", "0")
    assert len(rows) == len(SETTINGS) and {cells[6] for cells in rows} == {"not reached"}


def row(batch, seconds, loop="DI*"):
    return {"loop": loop, "batch": batch, "memory": 0, "taken": [dict.fromkeys(gpu_results.PHASES, seconds / 5)]}


def test_a_second_call_goes_on_with_the_next_batch_until_the_rate_stands_still(tmp_path):
    full, compiled = gpu_results.Setting("SD1.5"), gpu_results.Setting("SD1.5", compiled=True)
    results = gpu_results.Results(tmp_path / "gpu.json", "a GPU")
    seen = []
    for seconds in (1.0, 1.1, 2.19):
        seen.append(results.next_batch(full))
        results.add(results.rows, f"{full}, DI* {seen[-1]}", row(seen[-1], seconds))
        results = gpu_results.Results(results.path, "a GPU")
    assert seen == [1, 2, 4] and results.next_batch(full) is None
    assert results.next_batch(compiled) == 4
    results.add(results.rows, f"{compiled}, DI* 4", {"loop": "DI*", "batch": 4, "said": gpu_results.OUT_OF_MEMORY})
    assert results.next_batch(compiled) is None
    with pytest.raises(SystemExit, match=r"^--results: .*gpu.json is of a GPU, this is another; name another file$"):
        gpu_results.Results(results.path, "another")


def test_the_plain_loop_does_the_same(folder):
    """Three rounds each, from the same start."""
    worlds = [gpu.World(gpu_results.Setting("SD1.5"), folder, CPU) for _ in range(2)]
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
    setting = gpu_results.Setting("SD1.5")
    world = gpu.World(setting, folder, CPU, precision="fp32")
    with FlopCounterMode(display=False) as counter:
        counter.flop_registry.update(FORMULAS)
        gpu.ours(world, 2, 0, gpu.Clock(CPU))
    assert gpu.counted(setting, folder)["flops"] == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)


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
