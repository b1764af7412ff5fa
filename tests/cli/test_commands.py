"""The face: answers at once, says in one line what the user can mend, and hands the rest to the runners."""

import getpass
import io
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import pipelines
from tiny.commands import complaint, imported

from diffinstruct.cli.main import main
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.reading import load
from diffinstruct.errors import ClusterError, UserError
from diffinstruct.locks import COMMAND, LOCK, only_writer
from diffinstruct.method.rewards import RewardError
from diffinstruct.planning.footprint import Footprint
from diffinstruct.run_folder.location import folder_of_run

ROOT = Path(__file__).parents[2]

TINY = """\
name: tiny
global_batch_size: 4
reference: {{model: {model}, guidance_scale: 2.0}}
generator: {{init_from: reference}}
rewards: {{trained: [{{name: "torch.nn:Identity"}}], held_out: ["torch.nn:ReLU"]}}
prompts: {{train: {prompts}, grid: {prompts}}}
output_dir: {runs}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return pipelines.build(tmp_path_factory.mktemp("model"))


@pytest.fixture
def file(tmp_path, model) -> Path:
    """An experiment that needs nothing but the tiny reference."""
    (tmp_path / "prompts.txt").write_text("red cat\nred dog\n")
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(model=model, prompts=tmp_path / "prompts.txt", runs=tmp_path / "runs"))
    return path


@pytest.fixture
def runners(monkeypatch) -> dict[str, list]:
    """Stand-ins for both runners; what they were called with."""
    calls: dict[str, list] = {"local": [], "cluster": []}
    for name, module in {"local": "diffinstruct.training.local", "cluster": "diffinstruct.cluster.train"}.items():
        run = lambda *arguments, name=name: calls[name].append(arguments)  # noqa: E731
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(run=run))
    monkeypatch.setitem(sys.modules, "diffinstruct.cluster", SimpleNamespace())
    return calls


# ----------------------------------------------------------------------------------------------------- at once
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["rewards", "--help"]], ids=" ".join)
def test_help_answers_in_half_a_second(arguments):
    """In CPU time, which a busy machine does not change; nothing waits in it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "diffinstruct", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    code, packages = imported(*arguments)
    assert code == 0
    assert "typer" in packages
    assert packages.isdisjoint({"pydantic", "rich", "torch", "ray", "mlflow", "pandas"})


def test_mistakes_end_2_before_torch_or_ray_start(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("step: 1\n")
    code, packages = imported("train", path)
    assert code == 2
    assert "pydantic" in packages
    assert packages.isdisjoint({"torch", "ray", "mlflow", "pandas", "diffusers"})


# ------------------------------------------------------------------------------------------------------- train
def test_train_calls_the_runner_with_value_and_folder(file, tmp_path, runners):
    assert main(["train", str(file), "-s", "steps=3", "-s", "seed=4", "--local"]) == 0
    assert main(["train", str(file)]) == 0
    (local, folder), (cluster, other) = *runners["local"], *runners["cluster"]
    assert local == load(file, ["steps=3", "seed=4"])
    assert cluster == load(file)
    for f in (folder, other):
        assert f.parent == tmp_path / "runs"
        assert re.fullmatch(r"tiny-[0-9a-f]{12}", f.name)
    assert folder != other
    assert main(["train", str(file), "-s", "tracking.experiment=elsewhere"]) == 0
    assert runners["cluster"][1][1] == other  # the same command finds its run again


def test_a_run_that_somebody_is_at_work_on_is_left_alone(file, tmp_path, runners, capsys):
    folder = folder_of_run(load(file))
    folder.mkdir(parents=True)
    for name in (LOCK, COMMAND):
        with only_writer(folder, name=name):
            said = complaint(capsys, "train", file)
        who = rf"process {os.getpid()} on \S+"
        waits = rf"{folder}: waits up to 5 s for {who} to let go of this run\n"
        assert re.fullmatch(rf"({waits})?{folder}: {who} is at work on this run; it can have one at a time", said)
    assert main(["train", str(file)]) == 0
    assert len(runners["cluster"]) == 1


def test_run_folders_are_absolute(file, tmp_path, runners, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(file), "-s", "output_dir=here"]) == 0
    assert runners["cluster"][0][1].parent == tmp_path / "here"


def test_resume_goes_on_in_the_folder_of_a_run_and_nowhere_else(file, tmp_path, runners, capsys, monkeypatch):
    run = tmp_path / "runs" / "tiny-1"
    run.mkdir(parents=True)
    (run / "experiment.yaml").write_text(load(file).to_yaml())
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(file), "--resume", "runs/tiny-1"]) == 0
    assert runners["cluster"][0][1] == run
    said = complaint(capsys, "train", file, "--resume", "runs/tiny-2")
    assert said == "runs/tiny-2: no run there (it has no experiment.yaml), did you mean 'runs/tiny-1'?"
    assert len(runners["cluster"]) == 1


def test_resume_under_another_configuration_names_the_keys(file, tmp_path, runners, capsys):
    run = tmp_path / "runs" / "tiny-1"
    run.mkdir(parents=True)
    (run / "experiment.yaml").write_text(load(file).to_yaml())
    changed = [
        "-s",
        "steps=7",
        "-s",
        "objective.distance_args.c=0.2",
        "-s",
        "tracking.experiment=other",
        "-s",
        "output_dir=elsewhere",
    ]
    assert complaint(capsys, "train", file, "--resume", run, *changed).splitlines() == [
        f"steps: 7, but the run in {run} has 100",
        f"objective.distance_args.c: 0.2, but the run in {run} has 0.1",
        f"--resume: goes on with {run}/experiment.yaml, unchanged; --allow steps goes on with what is new",
    ]
    assert runners["cluster"] == []


def test_keys_that_may_change_do_so_one_by_one(file, tmp_path, runners, capsys):
    run = tmp_path / "runs" / "tiny-1"
    run.mkdir(parents=True)
    (run / "experiment.yaml").write_text(load(file).to_yaml())
    asked = ["train", file, "--resume", run, "-s", "steps=7", "-s", "generator.learning_rate=2e-4"]
    assert complaint(capsys, *asked, "--allow", "steps").splitlines() == [
        f"generator.learning_rate: 0.0002, but the run in {run} has 0.0001",
        f"--resume: goes on with {run}/experiment.yaml, unchanged; --allow generator.learning_rate goes on with what is new",
    ]
    assert complaint(capsys, *asked, "--allow", "stepps") == "--allow: stepps: unknown key, did you mean 'steps'?"
    never = complaint(capsys, "train", file, "--resume", run, "-s", "reference.model=other", "--allow", "reference.model")
    assert never == "--allow: reference.model: cannot change in a run that has begun"
    assert complaint(capsys, "train", file, "--allow", "steps") == "--allow: goes with --resume RUN"
    assert runners["cluster"] == []
    assert main([*map(str, asked), "--allow", "steps", "--allow", "generator.learning_rate"]) == 0
    assert (runners["cluster"][0][0].steps, runners["cluster"][0][1]) == (7, run)
    assert "from step 0 on it has what is new" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RewardError("reward x: 1 of 4 scores are not finite"), 1, "reward x: 1 of 4 scores are not finite\n"),
        (ClusterError("a process of the run was lost: ..."), 1, "a process of the run was lost: ...\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_a_run_that_stops_says_why_and_how_it_goes_on(file, tmp_path, runners, monkeypatch, capsys, error, code, said):
    begun = False

    def run(experiment, folder):
        if begun:
            (folder / "experiment.yaml").write_text(experiment.to_yaml())
            (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
        raise error

    monkeypatch.setitem(sys.modules, "diffinstruct.training.local", SimpleNamespace(run=run))
    for begun in (False, True):
        with pytest.raises(SystemExit) as stopped:
            main(["train", str(file), "--local"])
        assert stopped.value.code == code
        folders = list((tmp_path / "runs").iterdir())
        assert len(folders) == begun  # where nothing has begun, nothing stays
        err = capsys.readouterr().err
        assert err.startswith(said)
        how = "".join(f"diffinstruct train {run}/experiment.yaml --resume {run} --local\n" for run in folders)
        assert err.endswith(how or said)


def test_a_terminal_that_lacks_a_character_is_no_failure(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    page = tmp_path / "\N{CAT FACE}.html"
    assert main(["report", f"{ROOT}/docs/results/pocket_study.csv", "-o", str(page)]) == 0 and page.is_file()
    terminal.flush()
    assert terminal.buffer.getvalue().decode() == f"{tmp_path}/\\U0001f431.html\n"


def test_a_user_whom_the_system_does_not_know_has_a_home_and_a_name(monkeypatch):
    """As in a container that runs under a number."""
    for variable in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(variable, "x")  # so that what is set here is unset afterwards
        monkeypatch.delenv(variable)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert main(["--nothing"]) == 2
    assert Path.home() == Path("/") and getpass.getuser() == f"uid{os.getuid()}"


def test_a_folder_that_cannot_be_made_is_said(file, tmp_path, runners, capsys):
    (tmp_path / "taken").write_text("a file")
    said = complaint(capsys, "train", file, "-s", f"output_dir={tmp_path}/taken")
    assert re.fullmatch(rf"output_dir: cannot make {tmp_path}/taken/tiny-\S+: Not a directory", said)
    (tmp_path / "link").symlink_to("nowhere")
    said = complaint(capsys, "train", file, "-s", f"output_dir={tmp_path}/link")
    assert re.fullmatch(rf"output_dir: cannot make \S+: {tmp_path}/link is a link to nowhere, which is not there", said)
    said = complaint(capsys, "train", file, "-s", "output_dir=~nobody-of-this-name/runs")
    where = "output_dir: the home directory does not exist on this machine"
    assert said == f"-s: {where}, got '~nobody-of-this-name/runs'"


def test_a_refused_resume_leaves_the_run_as_it_was(file, tmp_path):
    from diffinstruct.training import local

    experiment = load(file, ["steps=1", "rewards.trained=[{name: 'tiny.rewards:Red'}]", "rewards.held_out=[]"])
    folder = tmp_path / "runs" / "one"
    local.run(experiment, folder)
    before = (folder / "journal.jsonl").read_bytes()
    with pytest.raises(UserError, match="belongs to another configuration"):
        local.run(experiment.model_copy(update={"steps": 2}), folder)
    assert (folder / "journal.jsonl").read_bytes() == before
    assert load(folder / "experiment.yaml") == experiment


def test_prompts_are_read_before_a_runner_starts(file, tmp_path, runners, capsys):
    said = complaint(capsys, "train", file, "-s", f"prompts.grid={tmp_path}/promtps.txt")
    assert said == f"prompts.grid: {tmp_path}/promtps.txt: no such file, did you mean '{tmp_path}/prompts.txt'?"
    assert runners == {"local": [], "cluster": []}


@pytest.mark.parametrize("module", ["nosuch", "nosuch.rewards", "torch.nm.functional"])
def test_a_reward_whose_module_is_not_there_is_told_of_before_a_runner_starts(module, file, runners, monkeypatch, capsys):
    trained = f"rewards.trained=[{{name: '{module}:Red'}}]"
    said = complaint(capsys, "train", file, "-s", trained)
    assert said == f"rewards: '{module}:Red': there is no module '{module}', neither in this folder nor installed"
    assert runners == {"local": [], "cluster": []}
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")  # which may have it
    main(["train", str(file), "-s", trained])
    assert len(runners["cluster"]) == 1


def test_a_bug_is_no_user_error(file, runners, monkeypatch):
    def run(*arguments):
        raise ValueError("a bug")

    monkeypatch.setitem(sys.modules, "diffinstruct.training.local", SimpleNamespace(run=run))
    with pytest.raises(ValueError, match="a bug"):
        main(["train", str(file), "--local"])


# ------------------------------------------------------------------------------------------------------- check
def rows(text: str) -> dict[str, list[str]]:
    return {line[:24].strip(): line[24:].split() for line in text.splitlines()}


def test_check_counts_what_a_run_takes(file, model, capsys, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert main(["check", str(file)]) == 0
    out = capsys.readouterr().out
    assert load(file).to_yaml() in out
    unet = sum(t.numel() for t in load_file(model / "unet" / "diffusion_pytorch_model.safetensors").values())
    size, adam = f"{unet * 4 / 2**20:.2f}", f"{unet * 8 / 2**20:.2f}"
    table = rows(out)
    million = f"{unet / 1e6:.2f}"
    assert table["generator"] == [million, size, "MiB", size, "MiB", adam, "MiB", size, "MiB", "1", "1"]
    assert table["score network"] == [million, size, "MiB", size, "MiB", adam, "MiB", "-", "2", "2"]
    assert table["reference"] == [million, size, "MiB", "-", "-", "-", "2", "2"]
    text = sum(t.numel() for t in load_file(model / "text_encoder" / "model.safetensors").values())
    decoder = sum(t.numel() for t in load_file(model / "vae" / "diffusion_pytorch_model.safetensors").values())
    total = 4 * ((5 + 4 + 1) * unet + text + decoder) / 2**20  # weights, gradients, two Adam states, average
    assert f"each of 1 training processes, {total:.2f} MiB" in out
    assert table["torch.nn:Identity"] == ["0.00", "-", "-", "-", "-", "1", "1"]
    assert table["torch.nn:ReLU"] == ["0.00", "-", "-", "-", "-", "1", "-"]
    assert "work       12 forwards' worth of one network per sample and step, 4 samples a step; in all " in out  # 9 F + 3 F
    assert f"payload    {4 * 4 * 8 * 8 * 4 / 2**20:.2f} MiB" in out
    assert "1 x 1 + 1 x 1 = 2 CPUs and 0 GPUs; this machine has 2 and" in out


@pytest.fixture
def no_rounds(monkeypatch):
    """What a round takes beside is test_check.py's."""
    for name in ("training_footprint", "rewards_footprint"):
        monkeypatch.setattr(f"diffinstruct.planning.footprint.{name}", lambda *_: Footprint(0, 0, 0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_check_counts_adapters(file, model, capsys, precision):
    """As the roles are, to the byte: one base, frozen in the arithmetic's precision, and what is trained beside it."""
    from diffinstruct.models.pipeline import load_reference
    from diffinstruct.models.roles import make_roles

    asked = [f"precision={precision}", "generator.lora_rank=4", "score_network.lora_rank=2", "prompts.embeddings=there"]
    main(["check", str(file), *(f"-s{override}" for override in asked)])
    table, out = rows(capsys.readouterr().out), load(file, asked)
    roles = make_roles(out, load_reference(str(model)))
    sizes = {name: sum(p.numel() for p in getattr(roles, name).parameters()) for name in ("generator", "score_network")}
    base = [p for name, p in roles.reference.network.base.network.named_parameters() if ".lora_" not in name]
    assert table["generator's adapter"][0] == f"{sizes['generator'] / 1e6:.2f}"
    assert table["generator's adapter"][1] == f"{4 * sizes['generator'] / 2**20:.2f}"
    assert table["score network's adapter"][1] == f"{4 * sizes['score_network'] / 2**20:.2f}"
    assert table["reference"][1] == f"{sum(p.numel() * p.element_size() for p in base) / 2**20:.2f}"
    assert "text encoder" not in table
    weights = sum(p.numel() for p in base)
    for rank, name, size in (
        (0, "generator's base", weights * base[0].element_size()),
        (4, "start's adapter", 4 * sizes["generator"]),
    ):
        more = [f"generator.init_from={model}", f"generator.init_rank={rank}"]
        main(["check", str(file), *(f"-s{override}" for override in (*asked, *more))])
        assert rows(capsys.readouterr().out)[name][1] == f"{size / 2**20:.2f}"


@pytest.mark.usefixtures("no_rounds")
def test_check_counts_rewards_that_the_training_process_has_itself(file, capsys):
    def held(*overrides):
        main(["check", str(file), *(f"-s{override}" for override in overrides)])
        out = capsys.readouterr().out
        return out, sum(float(line.split()[-2]) for line in out.splitlines() if line.startswith("each of "))

    (apart, of_both), (together, of_process) = held(), held("cluster.rewards.placement=process")
    decoder = float(rows(together)["decoder"][1])  # the training process has it in any case: it shows pictures
    assert of_process + decoder == pytest.approx(of_both, abs=0.02) and decoder > 0.04
    assert "reward actors, " in apart and "reward actors, " not in together
    assert "payload    0.00 MiB" in together


@pytest.mark.usefixtures("no_rounds")
def test_check_counts_what_it_can_and_says_what_not(file, tmp_path, capsys, monkeypatch):
    """Weights that are out of reach cost a row, not the table; what is no reward is refused all the same."""
    (tmp_path / "afar.py").write_text("def reward():\n    raise OSError('there is no\\nnetwork here')\n\nodd = 1\n")
    (tmp_path / "broken.py").write_text("raise OSError('libodd.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert main(["check", str(file), "-s", "rewards.held_out=[afar:reward]"]) == 0
    assert "afar:reward             not counted: there is no network here\n" in capsys.readouterr().out
    for wrong, why in (("broken:reward", "libodd.so"), ("afar:rewards", "did you mean 'reward'?"), ("afar:odd", "wanted")):
        assert why in complaint(capsys, "check", file, "-s", f"rewards.held_out=[{wrong}]")


@pytest.mark.usefixtures("no_rounds")
def test_check_says_what_nodes_have_to_declare(file, capsys, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    asked = ["cluster.workers=4", "cluster.worker_resources={trainer: 2}", "cluster.rewards.resources={reward: 0.5}"]
    assert main(["check", str(file), *(f"-s{override}" for override in asked)]) == 0
    out = capsys.readouterr().out
    assert "  4 x 2 = 8 trainer, which nodes have to declare\n" in out
    assert "  1 x 0.5 = 0.5 reward, which nodes have to declare\n" in out


def test_names_that_no_file_can_have_are_one_line(file, capsys):
    for key in ("generator.init_from", "reference.model"):
        assert main(["check", str(file), "-s", f"{key}={'a' * 300}"]) == 2
        said = capsys.readouterr().err
        assert said.endswith(f"{'a' * 300}: File name too long\n") and said.count("\n") == 1


@pytest.mark.usefixtures("no_rounds")
def test_check_says_in_one_line_what_does_not_fit(file, capsys, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["check", str(file), "-s", "cluster.workers=2", "-s", "cluster.rewards.cpus=2"]) == 0
    said = complaint(capsys, "check", file, "-s", "cluster.workers=4")
    assert said == "cluster: asks for 5 CPUs and 0 GPUs, this machine has 4 and 0"
    said = complaint(capsys, "check", file, "-s", "cluster.rewards.gpus=0.5")
    assert said == "cluster: asks for 2 CPUs and 0.5 GPUs, this machine has 4 and 0"
    said = complaint(capsys, "check", file, "-s", "device=cuda")
    assert said == "device: 'cuda' asked for, but torch sees no GPU here"
    said = complaint(capsys, "check", file, "-s", "objective.t_max=5000")
    assert said == "objective.t_max: got 5000, the reference's schedule has 1000 steps"
    assert main(["check", str(file), "-s", "generator.init_from=/nowhere.safetensors"]) == 2
    said = capsys.readouterr()
    assert said.err == "generator.init_from: no such file or folder: /nowhere.safetensors\n" and "memory     " in said.out
    assert "/nowhere" in complaint(capsys, "check", file, "-s", "generator.init_from=/nowhere")
    said = complaint(capsys, "check", file, "-s", "generator.timestep=1000")
    assert said == "generator.timestep: got 1000, the schedule has 0 to 999"
    said = complaint(capsys, "check", file, "-s", "reference.model=/nowhere")
    assert "/nowhere" in said
    assert "\n" not in said


# ---------------------------------------------------------------------------------------------------- generate
@pytest.fixture
def run(file, model, tmp_path) -> Path:
    """The folder of a finished run, as far as `generate` looks at it."""
    from diffinstruct.models.export import export
    from diffinstruct.models.pipeline import load_reference

    folder = tmp_path / "runs" / "tiny-1"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(load(file).to_yaml())
    export(str(model), load_reference(str(model)).generator(625), folder / "export")
    return folder


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_generate_makes_the_picture_of_the_stock_pipeline(run, tmp_path, capsys):
    from diffusers import DiffusionPipeline

    out = tmp_path / "out.png"
    assert main(["generate", str(run), "red cat", "-o", str(out), "--seed", "3", "--n", "2"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    pair = picture(out)
    assert pair.shape == (32, 64, 3)
    pipe = DiffusionPipeline.from_pretrained(run / "export")
    pipe.set_progress_bar_config(disable=True)
    for i, half in enumerate((pair[:, :32], pair[:, 32:])):
        noise = torch.Generator().manual_seed(3 + i)
        stock = pipe("red cat", num_inference_steps=1, guidance_scale=0.0, generator=noise, output_type="np").images[0]
        assert np.abs(half - (stock * 255).round()).max() <= 1
        assert half.std() > 5  # a picture, and not the same flat grey on both sides
    assert np.abs(pair[:, :32] - pair[:, 32:]).max() > 20


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}-x", "a", "-o", "x.png"], r"\S*tiny-1-x: no run there .*, did you mean '\S*tiny-1'\?"),
        (["{run}", "a", "-o", "x.pgn"], r"-o: should be a .png, .jpg or .webp file, got 'x.pgn'"),
        (["{run}", "a", "-o", "/nowhere/x.png"], "/nowhere/x.png: No such file or directory"),
        (["{run}", "a", "-o", "x.png", "--n", "0"], "--n: should be at least 1, got 0"),
        (["{run}", "a", "-o", "x.png", "--seed", str(2**63)], rf"--seed: should be between 0 and 2\*\*63, got {2**63}"),
        (["{run}", "a", "-o", "x.png", "--seed", "-1"], r"--seed: should be between 0 and 2\*\*63, got -1"),
        (["{run}", "\udcff", "-o", "x.png"], r"prompt: not UTF-8 text: '\\udcff'"),
    ],
)
def test_generate_says_what_is_wrong(run, capsys, arguments, expected):
    assert re.fullmatch(expected, complaint(capsys, "generate", *(a.format(run=run) for a in arguments)))


def test_generate_wants_a_finished_run(run, capsys):
    (run / "export").rename(run / "elsewhere")
    assert "the run has not finished" in complaint(capsys, "generate", run, "a", "-o", "x.png")


# ---------------------------------------------------------------------------------------------------- evaluate
@pytest.fixture
def judged(run):
    """The same run with rewards that give a score a picture, and its exported model alone, in a folder of its own."""
    text = (run / "experiment.yaml").read_text()
    text = text.replace("torch.nn:Identity", "tiny.rewards:Seeing").replace("torch.nn:ReLU", "tiny.rewards:Calm")
    (run / "experiment.yaml").write_text(text)
    shutil.copytree(run / "export", run.parent / "alone")
    return run


def test_evaluate_measures_runs_and_exports_side_by_side(judged, tmp_path, capsys, monkeypatch):
    (tmp_path / "few.csv").write_text("prompt,colour\n" + "red cat,red\nred dog,\n" * 10)
    asked = ["evaluate", str(judged), str(judged.parent / "alone"), "--prompts", str(tmp_path / "few.csv")]
    asked += ["-o", str(tmp_path / "o")]
    assert main([*asked, "--reference-pictures", "16"]) == 0
    out = capsys.readouterr().out
    head = next(line for line in out.splitlines() if line.startswith("|  |"))
    assert head == "|  | reward/tiny.rewards:Seeing | reward/tiny.rewards:Calm | diversity | kid |"
    assert "| n | 20 | 20 | 20 | 20 |" in out
    one, other = (next(line for line in out.splitlines() if line.startswith(f"| {name} |")) for name in ("tiny-1", "alone"))
    assert one.split("|")[2:] == other.split("|")[2:]  # the same generator, the same noise
    assert "Minus tiny-1, paired:" in out
    assert (tmp_path / "o" / "table.md").read_text() in out
    lines = (tmp_path / "o" / "alone.csv").read_text().splitlines()
    assert lines[0].startswith("prompt,colour,reward/tiny.rewards:Seeing,reward/tiny.rewards:Calm,diversity")
    assert len(lines) == 21

    page = (Path(__file__).parents[2] / "docs" / "how-to" / "compare.md").read_text()  # a metric of one's own, as it shows one
    (tmp_path / "my_metric.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["--reward", "tiny.rewards:Seeing", "--metric", "my_metric:SATURATION"]
    assert main([*asked[:2], *asked[3:5], "--reference-pictures", "0", *own]) == 0
    assert "|  | reward/tiny.rewards:Seeing | saturation | diversity |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}-x"], r"\S*tiny-1-x: is neither a run nor an exported pipeline"),
        (["{model}"], r"\S*: is no run that names rewards; name some with --reward"),
        (["{run}", "{run}-x"], r"\S*tiny-1-x: is neither a run nor an exported pipeline"),
        (["{run}", "{run}"], r"evaluate: the same folder is named twice"),
        (["{run}", "--reward", "pikscore"], r"rewards: cannot load 'pikscore': ValueError: .*, did you mean 'pickscore'\?.*"),
        (["{run}", "--reward", "tiny.rewards:Calm"], r"--reward: none of tiny.rewards:Calm has image features .*"),
        (["{run}", "--metric", "nowhere:X"], r"--metric: cannot import 'nowhere:X': No module named 'nowhere'"),
        (["{run}", "--metric", "tiny.rewards:Clam"], r"--metric: .* has no 'Clam', did you mean 'Calm'\?"),
        (["{run}", "--metric", "tiny.rewards:Calm"], r"--metric: 'tiny.rewards:Calm' should be a \S*Metric with .*"),
        (["{run}", "--reference-pictures", "1"], r"--reference-pictures: should be 0 or at least 2, got 1"),
        (["{model}", "--reward", "tiny.rewards:Seeing"], r"\S*: its scheduler \(DDIMScheduler\) holds no one-step .*"),
    ],
)
def test_evaluate_says_what_is_wrong(judged, model, file, capsys, arguments, expected):
    prompts = ["--prompts", load(file).prompts.train]
    said = complaint(capsys, "evaluate", *(a.format(run=judged, model=model) for a in arguments), *prompts)
    assert re.fullmatch(expected, said)


def test_evaluate_knows_the_pocket_worlds_truth(tmp_path, capsys):
    """The shipped start as a run's export; its colours are right, and a table that names an unknown one is refused."""
    from diffinstruct.models.export import export
    from diffinstruct.models.pipeline import load_reference

    folder = tmp_path / "start"
    folder.mkdir()
    (folder / "experiment.yaml").write_text(Experiment().to_yaml())
    export("pocket", load_reference("pocket").generator(625, "pocket-distilled"), folder / "export")
    rows = "a tulip in a yellow pot on a blue background,yellow,blue\n"
    rows += "a pink round critter on a dark background,pink,dark\n"
    (tmp_path / "few.csv").write_text("prompt,colour,background\n" + 4 * rows)
    asked = ["evaluate", str(folder), "--prompts", str(tmp_path / "few.csv"), "--reference-pictures", "0"]
    assert main([*asked, "-o", str(tmp_path / "o")]) == 0
    assert "accuracy/colour" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "o" / "start.csv")
    assert table["accuracy/background"].mean() == 1 and table["accuracy/colour"].mean() >= 0.75
    (tmp_path / "few.csv").write_text("prompt,colour\na tulip,ochre\n")
    assert re.fullmatch(r"\S*: colour: the classifier does not know 'ochre'", complaint(capsys, *asked))


# ----------------------------------------------------------------------------------------------------- compare
@pytest.fixture
def pair(judged) -> tuple[Path, Path]:
    """Two runs that differ in one key and in their generators."""
    from safetensors.torch import load_file, save_file

    other = judged.parent / "tiny-2"
    shutil.copytree(judged, other)
    text = (other / "experiment.yaml").read_text()
    (other / "experiment.yaml").write_text(text.replace("reward_scale: 2.0", "reward_scale: 3.5"))
    weights = other / "export" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value * 0.9 for key, value in load_file(weights).items()}, weights)
    return judged, other


def test_compare_names_the_keys_and_pairs_the_figures(pair, tmp_path, capsys):
    from diffinstruct.evaluation.comparison import compare_runs
    from diffinstruct.reward_service.client import load_reward
    from diffinstruct.statistics import paired_difference

    (tmp_path / "few.txt").write_text("red cat\nred dog\n<i>cat\n" * 7)
    asked = ["compare", *map(str, pair), "--prompts", str(tmp_path / "few.txt"), "--reference-pictures", "0"]
    assert main([*asked, "-o", str(tmp_path / "o.html")]) == 0
    out, text = capsys.readouterr().out, (tmp_path / "o.html").read_text()
    assert "| objective.reward_scale | 2.0 | 3.5 |" in out and "objective.weighting" not in out + text
    assert text.count("<img") == 2 * 8 and "<i>cat" not in text and "&lt;i&gt;cat" in text
    assert main([*asked, "-o", str(tmp_path / "o")]) == 0
    assert sorted(file.name for file in (tmp_path / "o").iterdir()) == ["pictures.png", "table.md", "tiny-1.csv", "tiny-2.csv"]
    one, other = (pd.read_csv(tmp_path / "o" / f"tiny-{i}.csv")["reward/tiny.rewards:Seeing"] for i in (1, 2))
    expected = str(paired_difference(other, one, 2_000_000))
    assert not np.allclose(one, other)
    assert f"<b>{expected}</b>" in text or f">{expected}</td>" in text
    assert expected in (tmp_path / "o" / "table.md").read_text()

    compared = compare_runs(pair, str(tmp_path / "few.txt"), [], 0, 2_000_000)  # its pictures are those that were scored
    made = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in compared.pictures["tiny-2"]])
    scores = load_reward("tiny.rewards:Seeing", "cpu")(made, list(compared.prompts))
    assert scores.tolist() == pytest.approx([other[i] for i in (0, 3, 6, 9, 11, 14, 17, 20)], abs=5e-3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{one}", "{one}-x"], r"\S*tiny-1-x: no run there .*, did you mean '\S*tiny-1'\?"),
        (["{one}", "{other}"], r"--prompts: name some; \S*tiny-1 is of '\S*', which has none built in"),
        (["{one}", "{one}", "--prompts", "{prompts}"], r"evaluate: the same folder is named twice"),
        (["{one}", "{other}", "-o", "x.pdf"], r"-o: should be a .html file, got 'x.pdf'"),
        (["{one}", "{other}", "--reference-pictures", "1"], r"--reference-pictures: should be 0 or at least 2, got 1"),
    ],
)
def test_compare_says_what_is_wrong(pair, file, capsys, arguments, expected):
    one, other = pair
    said = complaint(capsys, "compare", *(a.format(one=one, other=other, prompts=load(file).prompts.train) for a in arguments))
    assert re.fullmatch(expected, said)


# ------------------------------------------------------------------------------------------------------ report
def test_a_run_as_it_leaves_the_trainer_has_a_report(file, tmp_path):
    from diffinstruct.training import local

    overrides = ["steps=2", "logging.every=1", "logging.grid_every=1", "overoptimization.every=1"]
    overrides += ["rewards.trained=[{name: 'tiny.rewards:Red'}]", "rewards.held_out=['tiny.rewards:Calm']"]
    local.run(load(file, overrides), tmp_path / "runs" / "real")
    assert main(["report", str(tmp_path / "runs" / "real"), "-o", str(tmp_path / "o.html")]) == 0
    text = (tmp_path / "o.html").read_text()
    assert "finished, 2 of 2 steps" in text and "step 1</th><th>step 2</th>" in text
    assert "reward.tiny.rewards:Red" in text and "held_out/tiny.rewards:Calm" in text
    assert text.count("<img") == 1 + 2 * 5  # curves; two prompts at the start, steps 1 and 2, and two more noises
    assert main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "o.html")]) == 0
    assert "A sweep of 1 trial" in (tmp_path / "o.html").read_text()


# ------------------------------------------------------------------------------------------------------- usage
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "diffinstruct: Missing command."),
        (["trian"], "diffinstruct: No such command 'trian'. Did you mean 'train'?"),
        (["train"], "diffinstruct train: Missing argument 'FILE'."),
        (["train", "x.yaml", "--lokal"], "diffinstruct train: No such option: --lokal (Possible options: --local)"),
        (["evaluate", "x"], "diffinstruct evaluate: Missing option '--prompts'."),
        (["compare", "a"], "diffinstruct: Argument 'runs' takes 2 values."),
        (["compare", "a", "b", "c"], "diffinstruct compare: Got unexpected extra argument(s) (c)"),
        (["export", "x", "-o"], "diffinstruct: Option '-o' requires an argument."),
        (["rewards", "score", "x"], "diffinstruct rewards score: Missing argument 'PROMPTS'."),
        (["rewards", "test", "x", "--held-out"], "rewards test: unknown command, it is now 'rewards validate'"),
    ],
)
def test_a_mistake_in_the_usage_is_one_line(capsys, arguments, expected):
    assert complaint(capsys, *arguments) == expected


def test_a_number_that_is_none_is_one_line(capsys):
    said = complaint(capsys, "generate", "run", "a prompt", "-o", "x.png", "--n", "few")
    assert said.startswith("diffinstruct generate: Invalid value for '--n': ") and "\n" not in said


@pytest.mark.parametrize(
    ("typed", "candidates"),
    [("diffinstruct ev", ["evaluate"]), ("diffinstruct rewards va", ["validate"]), ("diffinstruct train --re", ["--resume"])],
)
def test_a_shell_can_complete_commands_and_options(typed, candidates):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_DIFFINSTRUCT_COMPLETE": "complete_bash"}
    command = [sys.executable, "-m", "diffinstruct"]
    done = subprocess.run(command, env={**os.environ, **words}, capture_output=True, text=True)
    assert (done.stdout.split(), done.returncode) == (candidates, 0), done.stderr
