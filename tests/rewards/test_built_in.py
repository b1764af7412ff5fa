"""Rewards: published formulas against transformers' own path, gradients, purity of the scores, sharing, names."""

import copy
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import clip as tiny_clip
from tiny.clip import pictures

import reward_models
from reward_models.clip import OPENAI_MEAN, TEXTS_AT_ONCE, bicubic, clip_pixels, load_tower, shared_tower
from reward_models.hps import fit_pixels
from reward_models.pickscore import PickScore, pickscore

ROOT = Path(__file__).parents[2]
NAMES = [name for name in reward_models.NAMES if not name.startswith("pocket")]  # those are PickScore's form
PROMPTS = ["a red pot", "a smiling cactus in a red pot", "blue"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return tiny_clip.build(tmp_path_factory.mktemp("rewards"))


@pytest.fixture(scope="module")
def folder(settings):
    """A random CLIP that sees 32 px, with a letter tokenizer, saved as a hub repository is."""
    return settings["clip_score"]["model"]


@pytest.mark.parametrize("size", [(9, 14), (40, 32), (24, 50)])
def test_deterministic_kernels_resize_alike(size):
    """Also where a network's arithmetic around it is bf16."""
    seen = []
    for deterministic in (False, True):
        images = pictures(2, 24, 32).requires_grad_()
        torch.use_deterministic_algorithms(deterministic)
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=deterministic):
                resized = bicubic(images, size)
            assert ("Upsample" in resized.grad_fn.name()) != deterministic
            (resized**2).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        seen.append((resized.detach(), images.grad))
    assert seen[0][0].shape == (2, 3, *size)
    for plain, ordered in zip(*seen, strict=True):
        torch.testing.assert_close(ordered, plain, atol=1e-5, rtol=1e-5)


def fresh(name, settings):
    """A reward that shares nothing with another."""
    return copy.deepcopy(reward_models.load(name, **settings[name]))


def as_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


@pytest.mark.parametrize("name", ["pickscore", "clip_score"])
def test_scores_equal_transformers_own_path(name, settings, folder):
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images, prompts = pictures(3, 32, 40), ["a red pot", "a smiling cactus", "blue"]
    model = CLIPModel.from_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokens = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, **processor([as_pil(image) for image in images], return_tensors="pt"))
    theirs = {
        "pickscore": model.logit_scale.exp() * (output.text_embeds * output.image_embeds).sum(1),
        "clip_score": 100 * (output.text_embeds * output.image_embeds).sum(1),
    }[name]

    assert theirs.std() > 0.03 * theirs.abs().max()  # the comparison below says something
    scores = reward_models.load(name, **settings[name])(images, prompts)
    torch.testing.assert_close(scores, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("height", "width", "size"), [(96, 64, 24), (64, 96, 24), (64, 64, 56), (20, 16, 32)])
def test_pixels_are_those_of_pillow(height, width, size):
    image = (pictures(1, height, width) > 0.5).float()  # hard edges: the bicubic overshoots
    short = min(height, width)
    resized = as_pil(image[0]).resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    theirs = np.asarray(resized.crop((left, top, left + size, top + size)), np.float32)
    ours = clip_pixels(image, size)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(ours - theirs).max() <= 1.5


def test_pixels_of_the_right_size_are_left_alone():
    image = pictures(1, 32, 32)
    assert torch.equal(clip_pixels(image, 32), image)
    assert torch.equal(fit_pixels(image, 32), image)


def test_hps_pads_what_is_not_square():
    fitted = fit_pixels(pictures(1, 32, 20) + 1, 32)
    assert (fitted[..., 6:26] > 0).all()
    assert fitted[..., :6].count_nonzero() == fitted[..., 26:].count_nonzero() == 0


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_pixels_and_no_parameter(name, settings):
    reward = reward_models.load(name, **settings[name])
    images = (pictures(2, 40, 40) * 0.9 + 0.05).requires_grad_()
    prompts = ["a red pot", "blue"]
    (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)

    step = 0.002 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step, prompts).sum() for sign in (1, -1))
    assert gradient.abs().amax((1, 2, 3)).min() > 0  # both pictures get one
    torch.testing.assert_close(2 * (gradient * step).sum(), ahead - behind, rtol=5e-3, atol=0)
    assert not any(p.requires_grad for p in reward.parameters())
    assert torch.equal(reward.train()(images, prompts), reward.eval()(images, prompts))  # no dropout wakes up


@pytest.mark.parametrize("name", NAMES)
def test_a_score_does_not_depend_on_company_or_history(name, settings):
    images, together = pictures(3), fresh(name, settings)
    together(images[:1], PROMPTS[1:2])
    scores = together(images, PROMPTS)
    assert torch.equal(scores, fresh(name, settings)(images, PROMPTS))
    alone = [fresh(name, settings)(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(scores, torch.cat(alone), rtol=1e-4, atol=1e-6)  # sums of another batch size round differently
    assert scores.std() > 1e-3 * scores.abs().max()


def test_a_prompt_is_encoded_once_in_batches_of_one_shape(settings, monkeypatch):
    reward = fresh("pickscore", settings)
    encode, shapes = reward.tower.clip.get_text_features, []
    spied = lambda input_ids: (shapes.append(tuple(input_ids.shape)), encode(input_ids=input_ids))[1]  # noqa: E731
    monkeypatch.setattr(reward.tower.clip, "get_text_features", spied)
    prompts = [*PROMPTS, *("red " * n + "pot" for n in range(TEXTS_AT_ONCE))]
    features = reward.tower._text_features(prompts)
    assert shapes == [(TEXTS_AT_ONCE, 20)] * 2
    for prompt, kept in zip(prompts, features, strict=True):  # alone, and elsewhere in a batch
        assert torch.equal(kept, fresh("pickscore", settings).tower._text_features([prompt])[0])
    scores = reward(pictures(3), PROMPTS)
    monkeypatch.setattr(reward.tower.clip, "get_text_features", None)  # known prompts are not encoded again
    assert torch.equal(reward(pictures(3), PROMPTS), scores)


def test_forgotten_prompts_are_encoded_again(settings, monkeypatch):
    monkeypatch.setattr("reward_models.clip.TEXTS_KEPT", 2)
    reward = fresh("pickscore", settings)
    scores = reward(pictures(3), ["a", "red", "pot"])
    assert list(reward.tower._texts) == ["red", "pot"]
    assert torch.equal(reward(pictures(3), ["a", "red", "pot"]), scores)


def test_a_moved_tower_encodes_its_prompts_again(settings):
    moved, other = fresh("pickscore", settings), fresh("pickscore", settings)
    moved(pictures(3), PROMPTS)
    assert torch.equal(moved.double()(pictures(3), PROMPTS), other.double()(pictures(3), PROMPTS))


@pytest.mark.parametrize("name", NAMES)
def test_prompts_longer_than_the_model_reads_are_cut(name, settings):
    reward, longest = reward_models.load(name, **settings[name]), "a red pot " * 20
    scores = [reward(pictures(1), [longest + end]) for end in ("", "a smiling cactus")]
    assert scores[0].isfinite().all()
    assert torch.equal(*scores)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("height", "width"), [(40, 64), (64, 40), (20, 16), (12, 32)])
def test_images_of_any_shape_are_scored(name, height, width, settings):
    images = pictures(2, height, width).requires_grad_()
    scores = reward_models.load(name, **settings[name])(images, PROMPTS[:2])
    assert scores.shape == (2,)
    assert scores.isfinite().all()
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_one_prompt_an_image(name, settings):
    with pytest.raises(ValueError, match="2 images for 1 prompts"):
        reward_models.load(name, **settings[name])(pictures(2), ["a"])


def test_normalisation_comes_from_the_folder(folder, tmp_path):
    assert load_tower(folder).mean.flatten().tolist() == pytest.approx(OPENAI_MEAN)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    tower = load_tower(tmp_path)
    assert tower.mean.flatten().tolist() == [0.5] * 3
    assert tower.std.flatten().tolist() == [0.25] * 3


def test_rewards_of_one_tower_share_it(settings, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    rewards = [reward_models.load(name, **settings[name]) for name in ("aesthetic_v1", "aesthetic_v2", "clip_score")]
    again = reward_models.load("clip_score", model=folder.name)  # the same folder by another name
    assert all(reward.tower is again.tower for reward in rewards)
    assert shared_tower(load_tower, folder, folder) is not again.tower
    assert reward_models.load("hpsv2", **settings["hpsv2"]).tower is not again.tower

    features = again.tower.features(pictures(3))
    for reward in rewards:
        assert torch.equal(reward.head(features, PROMPTS), reward(pictures(3), PROMPTS))


def test_a_tower_is_given_up_with_its_last_reward(folder):
    reward = pickscore(folder, folder)
    tower = weakref.ref(reward.tower)
    other = pickscore(folder, folder)
    del reward
    gc.collect()
    assert tower() is other.tower
    del other
    gc.collect()
    assert tower() is None


def test_load_by_import_path(folder):
    assert isinstance(reward_models.load("reward_models.pickscore:pickscore", model=folder, processor=folder), PickScore)


def test_every_short_name_leads_to_something_callable():
    for entry in reward_models.NAMES.values():
        module, attribute = entry.path.split(":")
        assert callable(getattr(__import__(module, fromlist=[attribute]), attribute))


@pytest.mark.parametrize("name", ["pocket_preference", "pocket_judge"])
def test_pocket_names_lead_into_the_trainers_package(name, folder, tmp_path, monkeypatch):
    package = tmp_path / "diffinstruct"
    home = package / "pocket" / name.removeprefix("pocket_")
    home.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a reward imported the trainer')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k.split(".")[0] != "diffinstruct"})
    for file in folder.iterdir():
        (home / file.name).write_bytes(file.read_bytes())
    assert isinstance(reward_models.load(name), PickScore)


def test_a_pocket_that_was_not_built_says_how(tmp_path, monkeypatch):
    (tmp_path / "diffinstruct").mkdir()
    (tmp_path / "diffinstruct" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k.split(".")[0] != "diffinstruct"})
    with pytest.raises(FileNotFoundError, match=r"experiments/build_pocket_world\.py builds it"):
        reward_models.load("pocket_judge")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pickscor", "did you mean 'pickscore'"),
        ("hpsv2.2", r"did you mean 'hpsv2\.1'"),
        ("nonsense", "there are aesthetic_v1, .*, pocket_judge"),
        ("reward_models.pickscore:PickScor", "did you mean 'PickScore'"),
    ],
)
def test_unknown_names_get_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        reward_models.load(name)


def test_reading_the_names_imports_no_torch():
    code = "import sys, reward_models; assert reward_models.NAMES; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_built_in_reward_is_one_file(tmp_path):
    """Its entry, its name and its maker: nothing else has to be told of it."""
    shutil.copytree(ROOT / "reward_models", tmp_path / "reward_models", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "reward_models" / "brightness.py").write_text(
        '''"""How bright a picture is."""

ENTRIES = {
    "brightness_v1.5": {
        "line": "how bright the image is", "range": "0 to 1", "paper": "-", "weights": "none", "licences": "Apache-2.0",
    },
}


def brightness_v1_5():
    return lambda images, prompts: images.flatten(1).mean(1)
'''
    )
    code = """
import torch, reward_models
assert reward_models.NAMES["brightness_v1.5"].path == "reward_models.brightness:brightness_v1_5"
assert reward_models.load("brightness_v1.5")(torch.ones(2, 3, 4, 4), ["a", "b"]).tolist() == [1, 1]
from diffinstruct.config.sections import RewardsConfig
RewardsConfig(held_out=("brightness_v1.5",))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "platform")])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_the_documented_reward_of_your_own_keeps_the_contract(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "how-to" / "own-reward.md").read_text()
    (code,) = re.findall(r"```python\n(import torch.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) <= 20
    (tmp_path / "my_reward.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    reward = reward_models.load("my_reward:Warmth")
    images = pictures(3).requires_grad_()
    scores = reward(images, PROMPTS)
    assert scores.shape == (3,)
    assert (torch.autograd.grad(scores.sum(), images)[0] != 0).any()
    assert not any(p.requires_grad for p in reward.parameters())


# ------------------------------------------------------------------------------------------ folders that are not whole
@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "clip"))


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tower_whose_weights_do_not_fit_is_refused_by_name(copied):
    def spoil(state):
        state["stranger"] = torch.zeros(1)
        state["logit_scale"] = torch.zeros(2)
        del state["visual_projection.weight"]

    rewrite(copied, spoil)
    with pytest.raises(ValueError, match=re.escape(f"{copied}: weights do not fit CLIPModel")) as error:
        load_tower(copied)
    for said in ("visual_projection.weight is missing", "stranger is left over", "logit_scale has [2] where [] is due"):
        assert said in str(error.value)

    rewrite(copied, lambda state: [state.pop(name) for name in list(state) if name.startswith("text_model")])
    with pytest.raises(ValueError, match=r"layers\.0\.layer_norm1\.bias is missing, .*, and \d+ more$"):
        load_tower(copied)


def test_position_ids_of_old_checkpoints_are_passed_over(copied, folder):
    names = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
    rewrite(copied, lambda state: state.update({name: torch.arange(17)[None] + 0 for name in names}))
    images = pictures(2)
    torch.testing.assert_close(load_tower(copied).features(images), load_tower(folder).features(images))


def test_a_model_of_another_kind_is_refused_by_name(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(ValueError, match=re.escape(f"{copied}: model_type in its config.json is 'siglip', not 'clip'")):
        load_tower(copied)


def test_a_folder_without_its_tokenizer_or_preprocessor_is_refused(copied, folder, settings, tmp_path):
    (copied / "preprocessor_config.json").rename(tmp_path / "away.json")
    with pytest.raises(ValueError, match=re.escape(f"{copied}: no preprocessor_config.json in it")):
        load_tower(copied)
    (tmp_path / "away.json").rename(copied / "preprocessor_config.json")
    (copied / "tokenizer.json").unlink()
    said = f"{copied}: no tokenizer in it, there should be tokenizer.json or vocab.json and merges.txt; processor= or"
    with pytest.raises(ValueError, match=re.escape(said)):
        load_tower(copied)
    bert = Path(shutil.copytree(settings["image_reward"]["tokenizer"], tmp_path / "bert"))
    (bert / "tokenizer.json").unlink()
    for name, empty, parts in (("hpsv2", copied, "vocab.json and merges.txt"), ("image_reward", bert, "vocab.txt")):
        with pytest.raises(ValueError, match=f"no tokenizer in it, there should be tokenizer.json or {parts};"):
            reward_models.load(name, **settings[name] | {"tokenizer": empty})

    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (copied / "vocab.json").write_text(json.dumps(words))
    (copied / "merges.txt").write_text("#version: 0.2\n")
    texts = [load_tower(tower)._text_features(["a red pot"]) for tower in (copied, folder)]
    torch.testing.assert_close(*texts)


def test_what_is_the_reward_itself_makes_none(tmp_path, monkeypatch):
    code = "import torch\n\ndef red(images, prompts):\n    return images[:, 0].flatten(1).mean(1)\n\n"
    code += "class Red(torch.nn.Module):\n    def forward(self, images, prompts):\n        return red(images, prompts)\n\n"
    (tmp_path / "reds.py").write_text(code + "made = Red()\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("red", "made", "number"):
        with pytest.raises(ValueError, match=f"reward 'reds:{name}': a class or a function without arguments is wanted"):
            reward_models.load(f"reds:{name}")
    assert reward_models.load("reds:Red")(pictures(2), ["a", "b"]).shape == (2,)
