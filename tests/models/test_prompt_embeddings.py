"""Prompt embeddings on disk: runs with them have the numbers of runs without, and no text encoder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import pipelines

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.reading import load
from diffinstruct.errors import UserError
from diffinstruct.models.pipeline import Reference, load_reference
from diffinstruct.models.prompt_embeddings import NULL, SAMPLES, WHOLE, Embeddings, digest
from diffinstruct.training import local

PROMPTS = ["a red hat", "a blue hat", "a hat, a red one"]


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


@pytest.mark.parametrize("family", ["sdxl", "pixart"])  # zeros for no prompt; a mask
def test_a_run_reads_what_was_made_once(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = configured(tmp_path, family)
    stored = load(tmp_path / "recipe.yaml", [f"prompts.embeddings={tmp_path}/embeddings"])
    assert stored.config_hash == plain.config_hash  # where they are kept is no part of what is computed
    local.run(plain, tmp_path / "plain")

    embed, made = Reference._embed, []
    monkeypatch.setattr(Reference, "_embed", lambda self, prompt: (made.append(prompt), embed(self, prompt))[1])
    local.run(stored, tmp_path / "stored")
    assert made == [NULL, *PROMPTS]  # each once, and the null prompt
    ends = [load_file(tmp_path / run / "checkpoints/step-00000002/tensors.safetensors") for run in ("plain", "stored")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

    def no_encoder(self: Reference) -> None:
        raise AssertionError("a text encoder was loaded beside the training")

    monkeypatch.setattr(Reference, "texts", property(no_encoder))
    monkeypatch.setattr("diffinstruct.models.export.export", lambda model, average, folder: folder)  # it packs one, too
    local.run(load(tmp_path / "recipe.yaml", [f"prompts.embeddings={tmp_path}/embeddings", "seed=7"]), tmp_path / "again")
    assert len(made) == 4


def test_what_makes_them_is_in_their_name(tmp_path: Path) -> None:
    one, other = pipelines.build(tmp_path / "one"), pipelines.build(tmp_path / "other")
    names = {load_reference(str(folder), embeddings=tmp_path).embeddings.folder.name for folder in (one, other)}
    assert len(names) == 1 and names.pop().startswith("StableDiffusion-")
    for spoilt, text in (("text_encoder/config.json", " "), ("tokenizer/tokenizer_config.json", " ")):
        with (other / spoilt).open("a") as file:
            file.write(text)
        assert len({load_reference(str(folder), embeddings=tmp_path).embeddings.folder for folder in (one, other)}) == 2
        shutil.copy(one / spoilt, other / spoilt)


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


def test_one_that_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    stored = Embeddings(tmp_path, "encoder")
    stored.add("a hat", {"prompt_embeds": torch.ones(1, 2, 3)})
    stored.add(NULL, {"prompt_embeds": torch.zeros(1, 2, 3)})
    assert stored.missing(["a hat", "a cat", NULL, "a cat"]) == ["a cat"]
    assert stored.read(NULL)["prompt_embeds"].abs().max() == 0
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"] * 2
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    for prompt, said in (("a hat", "'a hat'"), ("a cat", "'a cat'"), (NULL, "the null prompt")):
        with pytest.raises(UserError, match=rf"^prompts.embeddings: .*cannot be read, for {said}: ") as refusal:
            stored.read(prompt)
        assert "\n" not in str(refusal.value)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^prompts.embeddings: .*cannot be written"):
        Embeddings(tmp_path / "file", "encoder").add("a hat", {})


def test_they_are_made_in_tasks_of_the_cluster(session, world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from diffinstruct.cluster.train import embed
    from diffinstruct.training.build import missing_embeddings, open_reference

    experiment = world[1](prompts__embeddings=str(tmp_path / "embeddings"), cluster__workers=2)
    monkeypatch.setattr("diffinstruct.cluster.train.PROMPTS_A_TASK", 2)
    embed(experiment)
    assert "prompt embeddings: 5 to make" in (said := capsys.readouterr().out) and "2 tasks" in said
    assert missing_embeddings(experiment) == []
    embed(experiment)
    assert capsys.readouterr().out == ""
    whole = open_reference(world[1](), torch.device("cpu"))
    stored = open_reference(experiment, torch.device("cpu"))
    prompts = (world[0] / "prompts.txt").read_text().splitlines()
    assert torch.equal(stored.encode_prompts(prompts)["prompt_embeds"], whole.encode_prompts(prompts)["prompt_embeds"])
    (world[0] / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(UserError, match=r"latin.txt: .*can't decode"):
        embed(world[1](prompts__embeddings=str(tmp_path), prompts__train=str(world[0] / "latin.txt")))
