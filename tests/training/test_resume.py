"""What a run goes on from: a saved state under other keys, and the checkpoints of version 0.1."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny.runs import same

from diffinstruct.cli.main import main
from diffinstruct.errors import UserError
from diffinstruct.models.pipeline import Reference
from diffinstruct.run_folder import checkpoint
from diffinstruct.run_folder.checkpoint import CheckpointStore
from diffinstruct.training import local, trainer
from diffinstruct.training.loop_state import STATE_OF_0_1, Identity, moved
from diffinstruct.training.resume import change, export_checkpoint, identity_of, newest, take_over
from diffinstruct.training.worker import Worker

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
OLD_SPELLING = {"guidance_scale: 3.0": "cfg_scale: 2.0", "overoptimization:": "watch:", "on_alarm:": "on_hacking:"}


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """(experiment, folder) of a run of two rounds."""
    folder = tmp_path_factory.mktemp("run")
    experiment = world[1](
        tracking__uri=f"sqlite:///{folder / 'mlflow.db'}",
        rewards__trained=[{"name": "tiny.rewards:Red", "weight": 1.0}],
        overoptimization__every=1,
    )
    local.run(experiment, folder / "run")
    return experiment, folder / "run"


@pytest.fixture
def old_run(run, tmp_path):
    """(experiment, folder) of the same run as version 0.1 would have left it: its state's and its configuration's keys
    have other names, and its configuration another hash."""
    experiment, folder = run
    step, state = CheckpointStore(folder / "checkpoints").latest()
    history = state["overoptimization"]["history"] | {"best": {"step": step, "held_out": 1.0}}
    old = {
        "format": STATE_OF_0_1, "experiment": "0123456789ab", "prompts": state["prompts"], "stopped": False,
        "reward_scale": state["reward_scale"], "metrics": state["metrics"], "players": state["train_state"],
        "jury": {"micro_batch": 16, "scales": {}, "place": "process"},
        "watcher": {"watch": history, "divergences": []}, "window": state["metric_window"],
        "skips": {"all": 0, "in_a_row": 0, "detours": 0, "returned": False},
    }  # fmt: skip
    CheckpointStore(tmp_path / "old/checkpoints").save(step, old)
    text = (folder / "experiment.yaml").read_text()
    for new, spelling in OLD_SPELLING.items():
        assert new in text
        text = text.replace(new, spelling)
    (tmp_path / "old/experiment.yaml").write_text(text)
    return experiment, tmp_path / "old"


def test_the_model_of_a_run_of_version_0_1_is_exported(run, old_run, tmp_path, capsys):
    _, folder = old_run
    for which in ("best", "last", "2"):
        assert main(["export", str(folder), "--step", which, "-o", str(tmp_path / which)]) == 0
        assert capsys.readouterr().out == f"{tmp_path / which}  step 2, the best\n"
        assert (tmp_path / which / WEIGHTS).read_bytes() == (run[1] / "export" / WEIGHTS).read_bytes()


def test_a_run_of_version_0_1_says_what_to_do(old_run, tmp_path):
    experiment, folder = old_run
    before = sorted(folder.rglob("*"))
    line = rf"^{folder}/checkpoints: written by diffinstruct 0.1, .*`diffinstruct export {folder} -o FOLDER`$"
    for go_on in (
        lambda: local.run(experiment, folder),
        lambda: change(experiment, folder, {"steps"}),
        lambda: take_over(experiment, tmp_path / "new", folder),
    ):
        with pytest.raises(UserError, match=line):
            go_on()
    assert sorted({*folder.rglob("*")} - {folder / "lock"}) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("version", [None, 2, 99, [], "4"])
def test_a_state_of_another_version_is_named(run, tmp_path, version):
    experiment, folder = run
    step, state = CheckpointStore(folder / "checkpoints").latest()
    CheckpointStore(tmp_path / "checkpoints").save(step, state | {"format": version})
    for go_on in (
        lambda: change(experiment, tmp_path, {"steps"}),
        lambda: export_checkpoint(experiment, tmp_path, "last", tmp_path / "out"),
    ):
        with pytest.raises(UserError, match="written by another version of diffinstruct"):
            go_on()


def test_the_best_checkpoint_of_another_configuration_is_not_exported(run, tmp_path):
    experiment, folder = run
    other = experiment.model_copy(update={"seed": 5})
    with pytest.raises(UserError, match="belongs to another configuration"):
        export_checkpoint(other, folder, "last", tmp_path / "out")


def test_the_export_of_a_checkpoint_reads_no_network_but_the_generators(run, tmp_path, monkeypatch):
    experiment, folder = run
    made, network = [], Reference.network
    monkeypatch.setattr(Reference, "network", lambda self, *a, **more: made.append((a, more)) or network(self, *a, **more))
    export_checkpoint(experiment, folder, "last", tmp_path / "out")
    assert made == [((), {"device": "meta"})]  # whose weights are the checkpoint's
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (folder / "export" / WEIGHTS).read_bytes()


def test_a_saved_state_moves_to_another_configuration(run):
    """Its optimizers' settings, its best checkpoint and its end are not the other one's; all else stays."""
    experiment, folder = run
    changed = experiment.model_copy(
        update={
            "generator": experiment.generator.model_copy(update={"learning_rate": 0.25}),
            "score_network": experiment.score_network.model_copy(update={"weight_decay": 0.5}),
            "objective": experiment.objective.model_copy(update={"reward_scale": 7.0}),
            "rewards": experiment.rewards.model_copy(update={"micro_batch_size": 3}),
        }
    )
    _, state = CheckpointStore(folder / "checkpoints").latest()
    scales = dict(state["rewards"]["scales"])
    assert Identity.of(state) == identity_of(experiment) != identity_of(changed)
    state["reward_scale"] = 0.5  # as an alarm has left it
    new = moved(state | {"stopped": True}, Identity("new", "prompts"), changed, {"rewards.micro_batch_size"})
    assert Identity.of(new) == Identity("new", "prompts") and new["stopped"] is False and new["reward_scale"] == 0.5
    assert new["rewards"] == {"micro_batch_size": 3, "scales": scales, "placement": "process"}
    groups = {name: new["train_state"][name]["param_groups"][0] for name in ("generator_optimizer", "score_optimizer")}
    assert groups["generator_optimizer"]["lr"] == 0.25 and groups["score_optimizer"]["weight_decay"] == 0.5
    history = new["overoptimization"]["history"]
    assert history["best"] == {} and history["start"]["trained"]
    new = moved(new, Identity("new", "others"), changed, {"objective.reward_scale", "prompts.train"})
    assert new["overoptimization"]["history"]["start"] == {} and new["reward_scale"] == 7.0


def test_a_run_is_changed_and_taken_over_without_its_tensors(run, tmp_path, monkeypatch):
    """Other values for some keys of an SDXL run, whose state has 70 GB, take no tensor into memory."""
    experiment, folder = run
    shutil.copytree(folder, tmp_path / "run")
    changed = experiment.model_copy(update={"seed": 5})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "safe_open", None)
        patch.setattr(checkpoint, "save_file", None)
        assert take_over(changed, tmp_path / "heir", tmp_path / "run") == 2
        assert change(changed, tmp_path / "run", {"seed"}) == 2 and change(changed, tmp_path / "run", {"seed"}) is None
    before = CheckpointStore(folder / "checkpoints").latest()[1]
    for other in ("run", "heir"):
        state = CheckpointStore(tmp_path / other / "checkpoints").latest()[1]
        assert Identity.of(state) == identity_of(changed)
        weights = [found["train_state"] | {"generator_optimizer": None, "score_optimizer": None} for found in (state, before)]
        assert same(*weights)
        assert same(*(found["train_state"]["score_optimizer"]["state"] for found in (state, before)))


def test_mlflow_gets_the_model_where_that_is_asked_for(run, tmp_path):
    from mlflow import MlflowClient

    experiment, folder = run
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    client = MlflowClient(experiment.tracking.uri)
    assert {file.path for file in client.list_artifacts(run_id)} == {"images", "metrics.json"}
    tracking = experiment.tracking.model_copy(update={"log_model": True})
    local.run(experiment.model_copy(update={"tracking": tracking}), folder)
    assert {file.path for file in client.list_artifacts(run_id, "export")} >= {"export/model_index.json", "export/unet"}


def test_the_driver_delivers_what_its_workers_had_no_time_for(run, tmp_path, monkeypatch):
    """A worker's process ends when it waited a while for the tracker."""
    from mlflow import MlflowClient

    from diffinstruct.cluster import train

    class Trainer:
        def __init__(self, *_, **__): ...

        def fit(self):
            shutil.copytree(folder, tmp_path / "run", dirs_exist_ok=True)
            for name in ("journal.ack", "mlflow.json"):
                (tmp_path / "run" / name).unlink()
            return SimpleNamespace(return_value=SimpleNamespace(export=tmp_path / "run/export"))

    experiment, folder = run
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    tracking = experiment.tracking.model_copy(update={"log_model": True, "uri": uri})
    monkeypatch.setattr(train, "TorchTrainer", Trainer)
    monkeypatch.setattr(train.signals, "clear", lambda _: None)
    train.fit(experiment.model_copy(update={"tracking": tracking}), tmp_path / "run", None, "")
    client = MlflowClient(uri)
    run_id = json.loads((tmp_path / "run/mlflow.json").read_text())["run_id"]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert "export/unet" in {file.path for file in client.list_artifacts(run_id, "export")}


def test_a_resumed_run_lets_go_of_the_state_that_it_was_loaded_from(run, tmp_path, monkeypatch):
    """At once, not when Python next looks for cycles. On the CPU torch's optimizers go on with the tensors themselves."""
    experiment, folder = run
    loaded = []

    def kept(*args):
        found = newest(*args)
        loaded.extend(map(weakref.ref, tensors(found[1]["train_state"])))
        return found

    monkeypatch.setattr(trainer, "newest", kept)
    gc.collect()
    gc.disable()
    try:
        one = trainer.Trainer(experiment, folder, None, Worker(), None)
        one.restore()
        optimizers = [one.state.train_state.generator_optimizer, one.state.train_state.score_optimizer]
        used = {id(tensor) for optimizer in optimizers for tensor in tensors(optimizer.state_dict())}
        alive = [tensor() for tensor in loaded if tensor() is not None and id(tensor()) not in used]
    finally:
        gc.enable()
    one.run_log.fail(KeyboardInterrupt())
    assert len(loaded) > 20 and not alive


def tensors(state):
    """All tensors in a state."""
    if isinstance(state, torch.Tensor):
        return [state]
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for child in children for tensor in tensors(child)]


def test_a_resumed_run_validates_again_what_has_changed_alone(run, tmp_path, capsys, monkeypatch):
    experiment, folder = run
    shutil.copytree(folder, tmp_path / "run")
    longer = experiment.model_copy(update={"steps": 3})
    change(longer, tmp_path / "run", {"steps"})
    known = json.loads((tmp_path / "run/validated.json").read_text())
    assert known.keys() == {"tiny.rewards:Red", "tiny.rewards:Calm"}
    (tmp_path / "run/validated.json").write_text(json.dumps(known | {"tiny.rewards:Calm": "of another"}))
    capsys.readouterr()
    local.run(longer, tmp_path / "run")
    lines = {line.split()[3]: line for line in capsys.readouterr().out.splitlines() if line.startswith("step 2: reward ")}
    assert "as it was validated before; a short check on 4 pictures" in lines["tiny.rewards:Red:"]
    assert "on 16 pictures" in lines["tiny.rewards:Calm:"]
    assert json.loads((tmp_path / "run/validated.json").read_text()) == known
