"""Prompt embeddings: runs that read them have the numbers of runs that encode, and no text encoder."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import pipelines

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.prompts import read_prompt_set
from diffinstruct.config.reading import load
from diffinstruct.errors import UserError
from diffinstruct.models import prompt_conditions
from diffinstruct.models.pipeline import Reference, load_reference
from diffinstruct.models.prompt_conditions import ENCODED_AT_ONCE
from diffinstruct.models.prompt_embeddings import MASK, NULL, SAMPLES, SOURCE, TEXT, WHOLE, Embeddings, digest
from diffinstruct.ranks import SINGLE_PROCESS
from diffinstruct.training import local
from diffinstruct.training.build import missing_embeddings, open_reference
from diffinstruct.training.trainer import Trainer

PROMPTS = ["a red hat", "a blue hat", "a hat, a red one"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def configured(folder: Path, family: str, *more: str) -> Experiment:
    pipelines.build(folder / "model", family=family)
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]))
    (folder / "recipe.yaml").write_text(f"""
steps: 2
global_batch_size: 2
reference: {{model: {folder}/model}}
generator: {{init_from: reference, timestep: {pipelines.FAMILIES[family].timestep}}}
rewards: {{trained: [{{name: "tiny.rewards:Red"}}], held_out: []}}
prompts: {{train: {folder}/prompts.txt, grid: {folder}/prompts.txt}}
overoptimization: {{every: 0}}
logging: {{every: 1, grid_every: 2, grid_prompts: 2, checkpoint_every: 2}}
""")
    return load(folder / "recipe.yaml", list(more))


def no_encoder(self: Reference) -> None:
    raise AssertionError("a text encoder was loaded")


@pytest.mark.parametrize(("family", "precision"), [("sdxl", "fp32"), ("pixart", "bf16")])
def test_a_run_reads_what_was_made_once(family: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = configured(tmp_path, family, f"precision={precision}")
    given = [f"precision={precision}", f"prompts.embeddings={tmp_path}/embeddings"]
    stored = load(tmp_path / "recipe.yaml", given)
    assert stored.config_hash == plain.config_hash  # where they are kept is no part of what is computed
    local.run(plain, tmp_path / "plain")

    encode, made = Reference._encode, []
    monkeypatch.setattr(Reference, "_encode", lambda self, prompts: (made.extend(prompts), encode(self, prompts))[1])
    local.run(stored, tmp_path / "stored")
    assert made == [NULL, *PROMPTS]  # each once, and the null prompt
    ends = [load_file(tmp_path / run / "checkpoints/step-00000002/tensors.safetensors") for run in ("plain", "stored")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

    monkeypatch.setattr(Reference, "texts", property(no_encoder))
    monkeypatch.setattr("diffinstruct.models.export.export", lambda model, average, folder, dtype: folder)  # it packs one, too
    local.run(load(tmp_path / "recipe.yaml", [*given, "seed=7"]), tmp_path / "again")
    assert len(made) == 4


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart", "sd3"])
def test_rounding_to_bf16_costs_a_run_in_bf16_nothing(family: str, tmp_path: Path) -> None:
    """Its networks round conditions themselves before they use them: forward and backward."""
    pipelines.build(tmp_path / "model", family=family)
    outputs = []
    for rounded in (None, torch.bfloat16):
        reference = load_reference(str(tmp_path / "model"), decoder_dtype=rounded)
        c, denoiser = reference.encode_prompts(PROMPTS), reference.denoiser()
        assert c[TEXT].dtype == rounded or torch.float32
        xt = torch.randn(3, *reference.latent_shape, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            x0 = denoiser(xt, torch.tensor([10, 500, 900]), c)
        x0.pow(2).sum().backward()
        outputs.append([x0, *(p.grad for p in denoiser.parameters() if p.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_disk_there_is_no_padding_and_the_precision_of_the_run(precision: str, tmp_path: Path) -> None:
    experiment = configured(tmp_path, "pixart", f"precision={precision}", f"prompts.embeddings={tmp_path}/embeddings")
    missing, line = missing_embeddings(experiment)
    reference = open_reference(experiment, torch.device("cpu"))
    stored = reference.embeddings
    assert stored is not None and str(stored.folder) in line and len(missing) == 4
    reference.store_embeddings(missing)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert stored.folder.name.endswith(f"-{str(kind)[6:]}")
    for prompt in PROMPTS:
        on_disk, read = load_file(stored._file(prompt)), stored.read(prompt)
        assert on_disk[TEXT].dtype == kind and on_disk[TEXT].shape[1] == on_disk[MASK].sum() < 20 < read[TEXT].shape[1] == 120
        made = load_reference(str(tmp_path / "model"), decoder_dtype=kind).encode_prompts([prompt])
        seen = made[MASK][..., None] == 1
        assert torch.equal(read[TEXT], made[TEXT] * seen) and torch.equal(read[MASK], made[MASK])
        assert (made[TEXT] * ~seen).abs().max() > 0  # the encoder has said something of the padding


@pytest.mark.parametrize("autocast", [False, True])
def test_what_the_mask_hides_changes_no_bit(autocast: bool, tmp_path: Path) -> None:
    """Neither of PixArt's prediction nor of a gradient, its weights' and its input's: so it need not be stored."""
    reference = load_reference(str(pipelines.build(tmp_path, family="pixart")))
    c = reference.encode_prompts(PROMPTS)
    hidden = c[MASK][..., None] == 0
    outputs = []
    for padding in (c[TEXT], torch.zeros_like(c[TEXT]), 50 * torch.randn_like(c[TEXT])):
        denoiser = reference.denoiser()
        xt = torch.randn(3, *reference.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            x0 = denoiser(xt, torch.tensor([10, 500, 900]), {**c, TEXT: torch.where(hidden, padding, c[TEXT])})
        x0.pow(2).sum().backward()
        outputs.append([x0, xt.grad, *(p.grad for p in denoiser.parameters() if p.grad is not None)])
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


# ---------------------------------------------------------------------------------------------------- in batches
@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart", "sd3"])
def test_neighbours_and_position_change_no_bit(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(pipelines.build(tmp_path, family=family))
    kind, shapes = load_reference(folder).family, []
    encode = kind.encode

    def counting(pipeline: Any, prompts: list[str], device: str) -> dict[str, torch.Tensor]:
        shapes.append(len(prompts))
        return encode(pipeline, prompts, device)

    monkeypatch.setattr(kind, "encode", staticmethod(counting))
    long = "far too many words for this text encoder, they are cut off " * 9
    others = [f"{'red ' * n}hat" for n in range(2 * ENCODED_AT_ONCE)]
    alone = {prompt: load_reference(folder).encode_prompts([prompt]) for prompt in (*PROMPTS, long)}
    for before in (0, 3, ENCODED_AT_ONCE - 1):
        for prompt, expected in alone.items():
            found = load_reference(folder).encode_prompts([*others[:before], prompt, *[long, *others][: 9 - before]])
            assert all(torch.equal(found[key][before : before + 1], value) for key, value in expected.items())
    assert set(shapes) == {ENCODED_AT_ONCE}


def test_what_is_kept_lies_in_main_memory_and_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_reference(str(pipelines.build(tmp_path)))
    size = reference.blank_conditions()[TEXT].nbytes
    monkeypatch.setattr(prompt_conditions, "CACHED_BYTES", 5 * size)
    first = reference.encode_prompts(PROMPTS)
    reference.encode_prompts(["a", "b", "c"])
    cache = reference._conditions._cache
    assert list(cache) == [*PROMPTS[1:], "a", "b", "c"]
    kept = {c[TEXT].untyped_storage().data_ptr(): c[TEXT].untyped_storage().nbytes() for c in cache.values()}
    assert sum(kept.values()) == 5 * size  # and not the batches that they came out of
    assert all(torch.equal(value, first[key]) for key, value in reference.encode_prompts(PROMPTS).items())
    many = [f"{'red ' * n}hat" for n in range(7)]
    assert len(reference.encode_prompts(many)[TEXT]) == 7 and len(cache) == 5  # more than it keeps


# -------------------------------------------------------------------------------------------------- their names
def hub_cache(folder: Path, pipeline: Path, commit: str = COMMIT) -> None:
    """A pipeline as the hub's client keeps it, known as owner/name."""
    repository = folder / "models--owner--name"
    shutil.copytree(pipeline, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def in_hub_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(folder), raising=False)
    for module in ("diffusers.configuration_utils", "diffusers.models.modeling_utils", "diffusers.utils.hub_utils"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(folder), raising=False)


def stored_by(model: str, folder: Path) -> Embeddings:
    stored = load_reference(model, embeddings=folder).embeddings
    assert stored is not None
    return stored


def test_of_a_hub_model_they_are_named_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else lies in a machine's cache; and weights are neither read nor downloaded."""
    pipeline = pipelines.build(tmp_path / "model")
    hub_cache(tmp_path / "one", pipeline)
    hub_cache(tmp_path / "other", pipeline)
    (tmp_path / "other/models--owner--name/snapshots" / COMMIT / "text_encoder/model.fp16.safetensors").touch()
    (tmp_path / "other/models--owner--name/snapshots" / COMMIT / "text_encoder/model.safetensors").unlink()
    names = set()
    for cache in ("one", "other"):
        in_hub_cache(monkeypatch, tmp_path / cache)
        for model in ("owner/name", f"owner/name@{COMMIT}", "owner/name@main"):
            names.add(stored_by(model, tmp_path / "embeddings").folder.name)
    assert names == {"StableDiffusion-owner--name@0123456789ab-float32"}
    hub_cache(tmp_path / "later", pipeline, commit="f" * 40)
    in_hub_cache(monkeypatch, tmp_path / "later")
    assert stored_by("owner/name", tmp_path).folder.name == f"StableDiffusion-owner--name@{'f' * 12}-float32"

    in_hub_cache(monkeypatch, tmp_path / "one")
    load_reference("owner/name", embeddings=tmp_path / "embeddings").store_embeddings([NULL, *PROMPTS])
    in_hub_cache(monkeypatch, tmp_path / "other")  # has no weights of a text encoder
    there = load_reference("owner/name", embeddings=tmp_path / "embeddings")
    assert there.embeddings is not None and there.embeddings.missing([NULL, *PROMPTS]) == []
    assert there.encode_prompts(PROMPTS)[TEXT].abs().max() > 0
    said = json.loads((there.embeddings.folder / SOURCE).read_text())
    assert said == {"reference": f"owner/name@{COMMIT}", "type": "float32"}


def test_of_a_folder_they_are_named_by_the_files_that_are_read(tmp_path: Path) -> None:
    one, other = pipelines.build(tmp_path / "one"), pipelines.build(tmp_path / "other")
    for stray in ("text_encoder/model.fp16.safetensors", "text_encoder/.DS_Store", "tokenizer/README.md"):
        (other / stray).write_text("stray")
    names = {stored_by(str(folder), tmp_path).folder.name for folder in (one, other)}
    assert len(names) == 1 and names.pop().startswith("StableDiffusion-")
    for spoilt in ("text_encoder/config.json", "tokenizer/tokenizer_config.json", "text_encoder/model.safetensors"):
        with (other / spoilt).open("a") as file:
            file.write(" ")
        assert len({stored_by(str(folder), tmp_path).folder for folder in (one, other)}) == 2
        shutil.copy(one / spoilt, other / spoilt)


def test_weights_in_several_files_are_in_the_name(tmp_path: Path) -> None:
    pipeline = pipelines.build(tmp_path / "model")
    reference = load_reference(str(pipeline))
    reference.texts["text_encoder"].save_pretrained(pipeline / "text_encoder", max_shard_size="1KB")
    (pipeline / "text_encoder/model.safetensors").unlink(missing_ok=True)
    before = stored_by(str(pipeline), tmp_path).folder
    shard = min((pipeline / "text_encoder").glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert stored_by(str(pipeline), tmp_path).folder != before
    (pipeline / "text_encoder/model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*index\.json"):
        stored_by(str(pipeline), tmp_path)


def test_large_files_are_told_apart_without_reading_them_whole(tmp_path: Path) -> None:
    size = WHOLE + 12345
    trained = [1 + i * size // SAMPLES for i in range(1, 9)]  # a training changes all of it; here every eighth block
    for name, at in {"a": [], "b": [], "first": [0], "last": [size - 1], "between": trained}.items():
        (tmp_path / name).mkdir()
        with (tmp_path / name / "weights").open("wb") as file:
            file.truncate(size)
            for place in at:
                file.seek(place)
                file.write(b"x" * (1 if place in (0, size - 1) else 2**20))
    digests = {name: digest([tmp_path / name / "weights"]) for name in ("a", "b", "first", "last", "between")}
    assert digests["a"] == digests["b"] and len(set(digests.values())) == 4


def test_folders_of_an_earlier_version_are_named(tmp_path: Path) -> None:
    experiment = configured(tmp_path, "sd15", f"prompts.embeddings={tmp_path}/embeddings")
    (tmp_path / "embeddings/StableDiffusion-0123456789ab/nu").mkdir(parents=True)
    local_name = stored_by(str(tmp_path / "model"), tmp_path / "embeddings").folder
    local_name.mkdir()
    missing, line = missing_embeddings(experiment)
    assert len(missing) == 4 and "\n" not in line
    assert line == (
        f"prompt embeddings: 4 to make in {local_name}"
        " (of an earlier version, not read, may be deleted: StableDiffusion-0123456789ab)"
    )


# ---------------------------------------------------------------------------------------- a folder as it may be
def test_one_that_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    blank = {TEXT: torch.zeros(1, 2, 3)}
    stored = Embeddings(tmp_path, "encoder", {}, blank)
    stored.add([("a hat", {TEXT: torch.ones(1, 2, 3)}), (NULL, blank)])
    assert stored.missing(["a hat", "a cat", NULL, "a cat"]) == ["a cat"]
    assert stored.read(NULL)[TEXT].abs().max() == 0
    files = sorted(path.suffix for path in tmp_path.rglob("*") if path.is_file())
    assert files == [".json", ".safetensors", ".safetensors"]
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    for prompt, said in (("a hat", "'a hat'"), ("a cat", "'a cat'"), (NULL, "the null prompt")):
        with pytest.raises(UserError, match=rf"^prompts.embeddings: .*cannot be read, for {said}: ") as refusal:
            stored.read(prompt)
        assert "\n" not in str(refusal.value)
        assert ("delete it, and the next start makes it again" in str(refusal.value)) == (prompt != "a cat")


@pytest.mark.parametrize(
    "foreign",
    [
        {TEXT: torch.zeros(1, 3, 3)},
        {TEXT: torch.zeros(1, 2, 3, dtype=torch.bfloat16)},
        {"weight": torch.zeros(2)},
        {TEXT: torch.zeros(1, 2, 3), MASK: torch.ones(1, 2, dtype=torch.long)},
    ],
)
def test_a_file_of_something_else_is_refused(foreign: dict[str, Any], tmp_path: Path) -> None:
    stored = Embeddings(tmp_path, "encoder", {}, {TEXT: torch.zeros(1, 2, 3)})
    stored.add([("a hat", {TEXT: torch.ones(1, 2, 3)})])
    save_file(foreign, stored._file("a hat"))
    said = r"^prompts\.embeddings: .*cannot be read, for 'a hat': it holds .*, not .*delete it"
    with pytest.raises(UserError, match=said) as refusal:
        stored.read("a hat")
    assert "\n" not in str(refusal.value)


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    stored = Embeddings(tmp_path / "file", "encoder", {}, {TEXT: torch.ones(1, 2, 3)})
    with pytest.raises(UserError, match=r"^prompts\.embeddings: .*cannot be written: "):
        stored.add([("a hat", {})])
    stored = Embeddings(tmp_path / ("long" * 99), "encoder", {}, {TEXT: torch.ones(1, 2, 3)})
    with pytest.raises(UserError, match=r"^prompts\.embeddings: .*cannot be read: ") as refusal:
        stored.missing(["a hat"])
    assert "\n" not in str(refusal.value)


# ------------------------------------------------------------------------------------------------- a round ahead
def test_the_next_rounds_prompts_are_read_by_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = configured(tmp_path, "sd15", f"prompts.embeddings={tmp_path}/embeddings")
    reference = open_reference(experiment, torch.device("cpu"))
    reference.store_embeddings([NULL, *PROMPTS])
    plain = reference.encode_prompts(PROMPTS)
    with ThreadPoolExecutor(1) as executor:
        reference.read_ahead(PROMPTS, executor)
    monkeypatch.setattr(Embeddings, "read", None)  # all of it has been read
    ahead = reference.encode_prompts(PROMPTS)
    assert all(torch.equal(ahead[key], value) for key, value in plain.items())
    with pytest.raises(TypeError):  # others are read when they are asked for
        reference.encode_prompts(PROMPTS[:1])


def test_a_run_on_a_gpu_reads_a_round_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = configured(tmp_path, "sd15", f"prompts.embeddings={tmp_path}/embeddings")
    trainer = object.__new__(Trainer)  # as far as drawing needs it
    trainer.experiment, trainer.ranks, trainer.next_noise = experiment, SINGLE_PROCESS, None
    trainer.reference = open_reference(experiment, torch.device("cpu"))
    trainer.reference.store_embeddings([NULL, *PROMPTS])
    trainer.prompts = read_prompt_set(experiment.prompts.train)
    trainer.state = SimpleNamespace(  # type: ignore[assignment]
        step=0, nonfinite_guard=SimpleNamespace(seed=lambda seed: seed), step_config=SimpleNamespace(normal_streams=[])
    )
    trainer.device = torch.device("cuda")
    with ThreadPoolExecutor(1) as trainer.ahead:
        trainer.draw_batch()
    monkeypatch.setattr(Embeddings, "read", None)  # the next round's have been read
    trainer.state.step, trainer.device = 1, torch.device("cpu")
    _, prompts, conditions = trainer.draw_batch()
    expected = load_reference(str(tmp_path / "model")).encode_prompts(prompts)
    assert all(torch.equal(conditions[key], value) for key, value in expected.items())


def test_what_has_to_be_encoded_is_not_encoded_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_reference(str(pipelines.build(tmp_path)))
    monkeypatch.setattr(Reference, "texts", property(no_encoder))
    with ThreadPoolExecutor(1) as executor:
        reference.read_ahead(PROMPTS, executor)
    assert reference._conditions._cache == {}


# ------------------------------------------------------------------------------------------------- on a cluster
def test_they_are_made_in_tasks_of_the_cluster(session, world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from diffinstruct.cluster.train import embed

    experiment = world[1](prompts__embeddings=str(tmp_path / "embeddings"), cluster__workers=2)
    monkeypatch.setattr("diffinstruct.cluster.train.PROMPTS_A_TASK", 2)
    embed(experiment)
    assert "prompt embeddings: 5 to make" in (said := capsys.readouterr().out) and "2 tasks" in said
    assert missing_embeddings(experiment)[0] == []
    embed(experiment)
    assert capsys.readouterr().out == ""
    whole = open_reference(world[1](), torch.device("cpu"))
    stored = open_reference(experiment, torch.device("cpu"))
    prompts = (world[0] / "prompts.txt").read_text().splitlines()
    assert torch.equal(stored.encode_prompts(prompts)[TEXT], whole.encode_prompts(prompts)[TEXT])
    (world[0] / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(UserError, match=r"latin.txt: is not UTF-8 text"):
        embed(world[1](prompts__embeddings=str(tmp_path), prompts__train=str(world[0] / "latin.txt")))


def test_workers_are_told_the_drivers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = configured(tmp_path, "sd15", "prompts.embeddings=embeddings/sd15")
    there = experiment.with_absolute_embeddings()
    assert there.prompts.embeddings == f"{tmp_path}/embeddings/sd15" and there.config_hash == experiment.config_hash
    assert load(tmp_path / "recipe.yaml", []).with_absolute_embeddings().prompts.embeddings is None
