"""Files that want to run something: none of them does, each is refused in one line.

What each would do is leave a mark. The first test shows that the marks come where a file is read carelessly.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from tiny import pipelines

from diffinstruct.cli.main import main
from diffinstruct.config.prompts import read_prompts
from diffinstruct.config.reading import load
from diffinstruct.errors import UserError
from diffinstruct.models.export import load_export
from diffinstruct.models.pipeline import load_reference
from diffinstruct.ranks import Ranks
from diffinstruct.run_folder.checkpoint import MANIFEST, CheckpointStore
from diffinstruct.tracking import mlflow as delivery
from diffinstruct.training.loop_state import STATE, Identity
from diffinstruct.training.resume import newest
from reward_models.clip import load_tokenizer
from reward_models.weights import read

MARK = "mark"


class Touch:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


class Exec(Touch):
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.mark)!r}, 'w')",)


class System(Touch):
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.mark}",)


def _plain(mark: Path) -> bytes:
    return pickle.dumps({"weight": torch.zeros(1), "x": Touch(mark)})


def _old_protocol(mark: Path) -> bytes:
    return pickle.dumps(Exec(mark), protocol=0)


def _torch(mark: Path, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(1), "x": System(mark)}, file, **how)
    return file.getvalue()


def _legacy(mark: Path) -> bytes:
    return _torch(mark, _use_new_zipfile_serialization=False)


def _numpy(mark: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Touch(mark)], dtype=object), allow_pickle=True)
    return file.getvalue()


def _zip(mark: Path) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Exec(mark)))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def _script(mark: Path) -> bytes:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Module()), file, _extra_files={"evil.py": f"open({str(mark)!r}, 'w')"})
    return file.getvalue()


PICKLES = (_plain, _old_protocol, _torch, _legacy, _numpy, _zip, _script)
COSTUMES = {of.__name__.strip("_"): of for of in PICKLES}


def test_read_carelessly_they_would_leave_their_mark(tmp_path: Path) -> None:
    """The one place that unpickles: bytes made by this file a line before, to show that the other tests' files are
    armed."""
    for name in ("plain", "old_protocol"):
        pickle.loads(COSTUMES[name](tmp_path / name))  # noqa: S301 - made here, nothing comes from outside
        assert (tmp_path / name).exists()
    for name in ("torch", "legacy"):
        torch.load(io.BytesIO(COSTUMES[name](tmp_path / name)), weights_only=False)  # made here, too
        assert (tmp_path / name).exists()
    np.load(io.BytesIO(_numpy(tmp_path / "numpy")), allow_pickle=True)
    yaml.unsafe_load(TAGS["object"].format(mark=tmp_path / "object"))
    assert (tmp_path / "numpy").exists() and (tmp_path / "object").exists()


def refused(mark: Path, call: Callable[[], object], *kinds: type[Exception]) -> str:
    """The one line with which it is refused; no mark is left."""
    with pytest.raises(kinds or (UserError,)) as caught:
        call()
    assert not mark.exists(), "it was run"
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.build(tmp_path_factory.mktemp("sound") / "tiny")


@pytest.fixture
def pipeline(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "pipeline"))


def opened(folder: Path) -> None:
    reference = load_reference(str(folder))
    reference.network("reference")
    reference.encode_prompts(["a red thing"])
    reference.decode(torch.zeros(1, *pipelines.LATENT))


# ------------------------------------------------------------------------------------------------------- pickles
@pytest.mark.parametrize("costume", COSTUMES)
def test_in_the_place_of_a_networks_weights(costume, pipeline, tmp_path) -> None:
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(COSTUMES[costume](tmp_path / MARK))
    assert "safetensors" in refused(tmp_path / MARK, lambda: opened(pipeline))


@pytest.mark.parametrize("costume", COSTUMES)
def test_under_the_name_of_safetensors(costume, pipeline, tmp_path) -> None:
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        weights = pipeline / part / f"{name}.safetensors"
        before = weights.read_bytes()
        weights.write_bytes(COSTUMES[costume](tmp_path / MARK))
        assert part in refused(tmp_path / MARK, lambda: opened(pipeline))
        weights.write_bytes(before)


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy", ".safetensors"])
def test_as_a_generators_start(ending, pipeline, tmp_path) -> None:
    file = tmp_path / f"start{ending}"
    file.write_bytes(_plain(tmp_path / MARK))
    said = refused(tmp_path / MARK, lambda: load_reference(str(pipeline)).network(str(file)))
    assert "generator.init_from" in said and str(file) in said
    assert "reference.model" in refused(tmp_path / MARK, lambda: load_reference(str(file)))


@pytest.mark.parametrize("costume", COSTUMES)
def test_as_a_rewards_weights(costume, tmp_path) -> None:
    for ending in (".pt", ".safetensors"):
        file = tmp_path / f"reward{ending}"
        file.write_bytes(COSTUMES[costume](tmp_path / MARK))
        refused(tmp_path / MARK, lambda file=file: read(file), Exception)  # type: ignore[misc]


def test_as_an_index_of_shards(pipeline, tmp_path) -> None:
    """An index of safetensors that sends its reader to a pickle, and out of its folder."""
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    for shard in ("shard.bin", "../../elsewhere.safetensors"):
        (pipeline / "unet" / shard).write_bytes(_plain(tmp_path / MARK))
        index = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": shard}}
        weights.with_suffix(".safetensors.index.json").write_text(json.dumps(index))
        refused(tmp_path / MARK, lambda: opened(pipeline))


# ---------------------------------------------------------------------------------------------------- checkpoints
def checkpoint(folder: Path) -> Path:
    return CheckpointStore(folder).save(1, {"x": torch.zeros(3)})


def forged(path: Path, name: str, content: bytes) -> None:
    """As somebody who can count digests would exchange a file."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (path / MANIFEST).write_bytes(json.dumps(manifest, indent=1).encode())


@pytest.mark.parametrize("costume", COSTUMES)
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_in_a_checkpoint_with_a_forged_manifest(costume, name, tmp_path, caplog) -> None:
    path = checkpoint(tmp_path / "checkpoints")
    forged(path, name, COSTUMES[costume](tmp_path / MARK))
    assert CheckpointStore(tmp_path / "checkpoints").latest() is None
    assert not (tmp_path / MARK).exists()
    (said,) = [record.getMessage() for record in caplog.records]
    assert str(path) in said and "\n" not in said


def test_a_checkpoint_names_no_files_but_its_own(tmp_path) -> None:
    secret = tmp_path / "secret.safetensors"
    path = checkpoint(tmp_path / "checkpoints")
    shutil.copy(path / "tensors.safetensors", secret)
    document = json.loads((path / "state.json").read_text())
    document["state"] = {"x": {"$tensor": "../../secret"}, "y": {"$dict": [["k", {"$tensor": str(secret)}]]}}
    forged(path, "state.json", json.dumps(document).encode())
    assert CheckpointStore(tmp_path / "checkpoints").latest() is None
    store = CheckpointStore(tmp_path / "checkpoints")
    for said in ({"experiment": "../../etc"}, {"experiment": "../../etc", "format": STATE}, {"format": STATE}):
        document["state"] = {"x": {"$tensor": "x"}} | said
        forged(path, "state.json", json.dumps(document).encode())
        refused(tmp_path / MARK, lambda: newest(store, Ranks(), Identity("own", ""), ""), UserError)


@pytest.mark.parametrize(
    "odd",
    [
        {"state": {"x": {"$rows": "x", "shape": []}}},
        {"state": {"x": {"$rows": "x", "shape": [10**30]}}},
        {"state": [{"$tensor": "x"}]},
        {"state": {"$tensor": "x"}},
        *({"files": files} for files in (0, -1, 2, 10**8)),
    ],
    ids=str,
)
def test_a_checkpoint_that_no_run_wrote_is_named_and_passed_over(odd, tmp_path, caplog) -> None:
    """Its digests are right; and what it says of itself takes no memory."""
    checkpoint(tmp_path)
    path = CheckpointStore(tmp_path).save(2, {"x": torch.zeros(3)})
    forged(path, "state.json", json.dumps(json.loads((path / "state.json").read_text()) | odd).encode())
    tracemalloc.start()
    found = CheckpointStore(tmp_path).latest()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found and found[0] == 1 and most < 10e6
    (said,) = [record.getMessage() for record in caplog.records]
    assert str(path) in said and "\n" not in said


# -------------------------------------------------------------------------------------------------------- recipes
TAGS = {
    "name": "!!python/name:os.system",
    "apply": "!!python/object/apply:os.system ['touch {mark}']",
    "object": "!!python/object/apply:builtins.open ['{mark}', 'w']",
    "new": "!!python/object/new:pathlib.Path ['{mark}']",
    "module": "!!python/module:antigravity",
    "custom": "!touch '{mark}'",
    "binary": "!!binary Z2FyYmFnZQ==",
}


@pytest.mark.parametrize("tag", TAGS)
def test_a_recipes_tags_make_nothing(tag, tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"name: {TAGS[tag].format(mark=tmp_path / MARK)}\n")
    said = refused(tmp_path / MARK, lambda: load(file))
    assert said.startswith(f"{file}:1: ")
    refused(tmp_path / MARK, lambda: load(tmp_path / "empty", [f"name={TAGS[tag].format(mark=tmp_path / MARK)}"]))


@pytest.mark.parametrize("name", ["../up", "/etc/run", "a/b", "..", ".hidden", "a\x00b", "-rf", "a b", "~root"])
def test_a_runs_name_cannot_leave_its_folder(name, tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"name": name}))
    assert "name: " in refused(tmp_path / MARK, lambda: load(file))


# ------------------------------------------------------------------------------------------------------ pipelines
def test_code_that_a_pipeline_brings_is_not_run(pipeline, tmp_path) -> None:
    """auto_map, custom pipelines and modules: ways in which hub repositories ask to be run."""
    code = f"open({str(tmp_path / MARK)!r}, 'w')\nclass Evil: pass\n"
    for place in ("pipeline.py", "unet/evil.py", "text_encoder/modeling_evil.py", "tokenizer/evil.py", "scheduler/evil.py"):
        (pipeline / place).write_text(code)
    for part in ("text_encoder", "tokenizer"):
        file = pipeline / part / ("config.json" if part == "text_encoder" else "tokenizer_config.json")
        config = json.loads(file.read_text()) if file.exists() else {}
        evil = "modeling_evil.Evil" if part == "text_encoder" else "evil.Evil"
        config["auto_map"] = {"AutoModel": evil, "AutoConfig": evil, "AutoTokenizer": [evil, evil]}
        file.write_text(json.dumps(config))
    opened(pipeline)  # what asks is not listened to, and the rest is sound
    assert not (tmp_path / MARK).exists()
    index = json.loads((pipeline / "model_index.json").read_text())
    for part, kind in (("unet", ["evil", "Evil"]), ("vae", ["os", "system"]), ("text_encoder", ["builtins", "exec"])):
        (pipeline / "model_index.json").write_text(json.dumps(index | {part: kind}))
        assert part in refused(tmp_path / MARK, lambda: load_reference(str(pipeline)))
    for pipeline_class in ("pipeline.Evil", ["pipeline", "Evil"], "../evil"):
        (pipeline / "model_index.json").write_text(json.dumps(index | {"_class_name": pipeline_class}))
        refused(tmp_path / MARK, lambda: load_reference(str(pipeline)))


def test_code_that_a_tokenizer_brings_is_not_run_whatever_is_answered(tmp_path, monkeypatch) -> None:
    """transformers asks whether to run it, and takes a y from whatever stdin is."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "words").mkdir()
    (tmp_path / "words/evil.py").write_text(f"open({str(tmp_path / MARK)!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "words/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(tmp_path / "words")
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize(
    "odd",
    [
        {"trained_betas": "__import__('os').system('true')"},
        {"num_train_timesteps": 10**400},
        {"num_train_timesteps": -1},
        {"beta_schedule": "__import__"},
        {"_class_name": None, "beta_schedule": []},
    ],
    ids=str,
)
def test_a_configuration_that_no_tool_wrote(odd, pipeline, tmp_path) -> None:
    file = pipeline / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    refused(tmp_path / MARK, lambda: load_reference(str(pipeline)))


def test_an_export_is_opened_like_any_pipeline(pipeline, tmp_path) -> None:
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(_plain(tmp_path / MARK))
    refused(tmp_path / MARK, lambda: load_export(pipeline, "cpu"))


# -------------------------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize("ending", [".pkl", ".npy", ".pt", ".py", ".xlsx", ".feather"])
def test_prompts_are_text(ending, tmp_path) -> None:
    file = tmp_path / f"prompts{ending}"
    file.write_bytes(_plain(tmp_path / MARK))
    refused(tmp_path / MARK, lambda: read_prompts(file))


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet", ".txt"])
def test_pickles_are_no_prompts(ending, tmp_path) -> None:
    file = tmp_path / f"prompts{ending}"
    file.write_bytes(_plain(tmp_path / MARK))
    refused(tmp_path / MARK, lambda: read_prompts(file))


def test_a_dataset_that_is_a_script_is_not_run(tmp_path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / MARK)!r}, 'w')\n")
    refused(tmp_path / MARK, lambda: read_prompts(f"datasets:{folder}:train"))


def test_what_comes_with_a_run_is_not_run_by_its_readers(tmp_path, capsys) -> None:
    """A run's folder from somebody else: its report, its delivery, its pictures."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "experiment.yaml").write_text(f"name: {TAGS['object'].format(mark=tmp_path / MARK)}\n")
    (run / "journal.jsonl").write_bytes(_plain(tmp_path / MARK))
    for command in (["report", str(run), "-o", str(tmp_path / "page.html")], ["generate", str(run), "a", "-o", "a.png"]):
        assert main(command) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / MARK).exists()


# ------------------------------------------------------------------------------------------------------- journals
START = {"journal": "a token", "experiment": "test", "name": "a run", "params": {}, "tags": {}, "parent": None}


def journaled(run: Path, uri: str, *records: dict[str, Any]) -> None:
    run.mkdir(exist_ok=True)
    lines = [{"time": 1, **record} for record in ({"start": {**START, "uri": uri}}, *records)]
    (run / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_delivery_reads_nothing_outside_of_the_run(tmp_path, monkeypatch, caplog) -> None:
    from PIL import Image

    run, key = tmp_path / "run", tmp_path / "key.png"
    Image.new("RGB", (8, 8)).save(key)
    (run / "export").mkdir(parents=True)
    for link in (run / "link", run / "export/link"):
        link.symlink_to(key)
    (run / "linked").symlink_to(tmp_path)
    (run / "own.csv").write_text("a,b")
    names = (str(key), "../key.png", "link", "export", "linked", "linked/key.png", "..")
    files = [{"artifact": name} for name in (*names, "own.csv")]
    pictures = [{"image": name, "key": "grid", "step": 1} for name in names]
    journaled(run, "sqlite:///x.db", *files, *pictures, {"metrics": {"x": 1.0}, "step": 1})
    client = MagicMock()
    client.search_runs.return_value[0].info.run_id = client.search_runs.return_value[0].info.experiment_id = "1"
    monkeypatch.setattr(delivery, "_open", lambda *_: (client, "1"))
    assert main(["sync", str(run)]) == 0
    client.log_artifact.assert_called_once_with("1", str(run / "own.csv"))
    assert not client.log_artifacts.called and not client.log_image.called
    assert client.log_batch.call_args.args[1][0].key == "x"  # the rest is not held up
    said = [record.message for record in caplog.records]
    assert len(said) == 2 * len(names) and all("outside of the run's folder" in line for line in said)


@pytest.mark.parametrize(
    ("named", "environment", "recipe", "expected"),
    [
        ("https://evil.example", None, None, None),
        ("https://evil.example", "https://me:word@mine.example", "https://ours.example", None),
        ("mysql://evil.example/db", "sqlite:///mine.db", None, None),
        (
            "https://mine.example/x",
            "https://me:word@mine.example/x?token=word",
            None,
            "https://me:word@mine.example/x?token=word",
        ),
        ("mysql://h/db?passwd=...", "mysql://h/db?passwd=word", None, "mysql://h/db?passwd=word"),  # as journals once had it
        ("https://ours.example", "https://me:word@mine.example", "https://ours.example", "https://ours.example"),
        ("sqlite:////runs/mlflow.db", "https://me:word@mine.example", None, "sqlite:////runs/mlflow.db"),
    ],
)
def test_no_server_is_asked_that_the_journal_alone_names(
    named, environment, recipe, expected, tmp_path, monkeypatch, capsys
) -> None:
    asked: list[str] = []

    here = threading.get_ident()

    def opened(uri: str, _: str) -> None:
        if threading.get_ident() == here:  # another test's tracker may still be asking
            asked.append(uri)
        raise ConnectionError("away")

    monkeypatch.setattr(delivery, "_open", opened)
    if environment:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
    run = tmp_path / "run"
    journaled(run, named)
    if recipe:
        (run / "experiment.yaml").write_text(f"tracking: {{uri: '{recipe}'}}\n")
    with pytest.raises(SystemExit) as ended:
        main(["sync", str(run)])
    (line,) = capsys.readouterr().err.splitlines()
    assert (ended.value.code, asked) == ((1, [expected]) if expected else (2, [])) and "word" not in line
    if not expected:
        there = recipe or (environment or "mlflow.db").rpartition("/")[2]
        assert line.startswith(f"{run}/journal.jsonl: uri: {named!r} is not where the run would be tracked, ")
        assert line.endswith(f"{there}': --uri decides")
        with pytest.raises(SystemExit):
            main(["sync", str(run), "--uri", named])
        assert asked == [named]
