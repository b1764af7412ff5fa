"""Rewards: PickScore's formula against transformers' own path, gradients, purity of the scores, names."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import reward_models
from reward_models.clip_preference import OPENAI_MEAN, ClipPreference, clip_pixels

WORDS = ["a", "red", "blue", "pot", "smiling", "cactus", "<|startoftext|>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random CLIP that sees 32 px, with a word tokenizer, saved as a hub folder is."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(set("".join(WORDS[:6])))
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *WORDS[6:]]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]).save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shape | {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 20,
        "bos_token_id": len(vocabulary) - 2,
        "eos_token_id": len(vocabulary) - 1,
    }
    vision = shape | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    for parameter in model.parameters():  # larger than the default initialisation: scores that differ visibly
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def pictures(n: int, height: int = 64, width: int = 64) -> torch.Tensor:
    """Random smooth uint8-valued images in [0, 1]."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


def as_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def test_scores_equal_transformers_own_path(folder):
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images, prompts = pictures(3, 32, 40), ["a red pot", "a smiling cactus", "blue"]
    model = CLIPModel.from_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokens = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, **processor([as_pil(image) for image in images], return_tensors="pt")).logits_per_image

    scores = ClipPreference(folder)(images, prompts)

    assert logits.std() > 0.3  # the comparison below says something
    torch.testing.assert_close(scores, logits.diag(), atol=1e-4, rtol=1e-4)


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


def test_gradient_reaches_the_pixels_and_no_parameter(folder):
    reward = ClipPreference(folder)
    images = (pictures(2, 40, 40) * 0.9 + 0.05).requires_grad_()
    prompts = ["a red pot", "blue"]
    (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)

    step = 0.05 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step, prompts).sum() for sign in (1, -1))
    assert gradient.abs().amax((1, 2, 3)).min() > 0  # both pictures get one
    torch.testing.assert_close(2 * (gradient * step).sum(), ahead - behind, rtol=1e-2, atol=0)
    assert not any(p.requires_grad for p in reward.parameters())


def test_a_score_does_not_depend_on_company_or_history(folder, monkeypatch):
    images, prompts = pictures(3), ["a red pot", "a smiling cactus in a red pot", "blue"]
    together = ClipPreference(folder)
    together(images[:1], prompts[1:2])
    fresh = ClipPreference(folder)
    assert torch.equal(together(images, prompts), fresh(images, prompts))
    assert all(torch.equal(together._texts[p], ClipPreference(folder)._text(p)) for p in prompts)

    monkeypatch.setattr(fresh.clip, "get_text_features", None)  # known prompts are not encoded again
    fresh(images, prompts)


def test_forgotten_prompts_are_encoded_again(folder, monkeypatch):
    monkeypatch.setattr("reward_models.clip_preference.TEXTS_KEPT", 2)
    reward = ClipPreference(folder)
    scores = reward(pictures(3), ["a", "red", "pot"])
    assert list(reward._texts) == ["red", "pot"]
    assert torch.equal(reward(pictures(3), ["a", "red", "pot"]), scores)


def test_prompts_longer_than_the_model_reads_are_cut(folder):
    assert ClipPreference(folder)(pictures(1), ["a red pot " * 20]).isfinite().all()


def test_one_prompt_an_image(folder):
    with pytest.raises(ValueError, match="2 images for 1 prompts"):
        ClipPreference(folder)(pictures(2), ["a"])


def test_normalisation_comes_from_the_folder(folder, tmp_path):
    assert ClipPreference(folder).mean.flatten().tolist() == pytest.approx(OPENAI_MEAN)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    reward = ClipPreference(tmp_path)
    assert reward.mean.flatten().tolist() == [0.5] * 3
    assert reward.std.flatten().tolist() == [0.25] * 3


def test_load_by_import_path(folder):
    assert isinstance(reward_models.load("reward_models.clip_preference:ClipPreference", model=folder), ClipPreference)


def test_every_short_name_leads_to_something_callable():
    for path in reward_models.NAMES.values():
        module, attribute = path.split(":")
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
    assert isinstance(reward_models.load(name), ClipPreference)


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
        ("nonsense", "there are pickscore, pocket_judge, pocket_preference"),
        ("reward_models.clip_preference:ClipPreferenc", "did you mean 'ClipPreference'"),
    ],
)
def test_unknown_names_get_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        reward_models.load(name)


def test_reading_the_names_imports_no_torch():
    code = "import sys, reward_models; assert reward_models.NAMES; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
