"""Rewards against their authors' own code: originals.json holds what it answered on the same tiny weights and images.

What is compared is the arithmetic on the same float pixels. Where an original resizes with Pillow, which rounds to 8
bit, test_reward_models compares the resizing; hpsv2 resizes tensors, and its resizing and padding are compared here
too.
"""

import importlib
import inspect
import re
import shutil

import pytest
import torch
from tiny import clip as tiny_clip
from tiny.clip import ORIGINALS, SIZE, pictures
from transformers import CLIPModel

import reward_models
from reward_models.hps import open_clip_name, vit_h
from reward_models.image_reward import UNUSED, ImageReward, blip_large, blip_name
from reward_models.weights import at_commit, fill, read

PROMPTS = ORIGINALS["prompts"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return tiny_clip.build(tmp_path_factory.mktemp("rewards"))


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
@pytest.mark.parametrize(("size", "scores"), list(zip(ORIGINALS["sizes"], ORIGINALS["hpsv2"]["scores"], strict=True)))
def test_hps_equals_the_original(name, size, scores, settings):
    reward = reward_models.load(name, **settings[name])
    torch.testing.assert_close(reward(pictures(4, *size, seed=3), PROMPTS), torch.tensor(scores), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["aesthetic_v1", "aesthetic_v2", "image_reward"])
def test_scores_equal_the_original(name, settings):
    scores = torch.tensor(ORIGINALS[name]["scores"])
    reward = reward_models.load(name, **settings[name])
    torch.testing.assert_close(reward(pictures(4, SIZE, SIZE, seed=3), PROMPTS), scores, rtol=1e-5, atol=0)


def test_converters_leave_no_key_over(settings):
    """Both ways, against the names that the original modules give their tensors."""
    clip = CLIPModel(tiny_clip.clip_config())
    assert {open_clip_name(name) for name in clip.state_dict()} == set(ORIGINALS["clip"]["shapes"])
    theirs = set(ORIGINALS["image_reward"]["shapes"])
    ours = {blip_name(name) for name in ImageReward(tiny_clip.blip_config(), None).state_dict()}
    assert ours <= theirs
    assert all(re.fullmatch(UNUSED, name) for name in theirs - ours)
    assert len(theirs - ours) == 5


def test_full_size_models_are_the_originals():
    """What no checkpoint's shapes would tell beside what they do."""
    with torch.device("meta"):
        models = {"hpsv2": CLIPModel(vit_h()), "image_reward": ImageReward(blip_large(), None)}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert sizes == ORIGINALS["full_size_parameters"]
    clip, blip = models["hpsv2"].config, models["image_reward"]
    for part in (clip.text_config, clip.vision_config):
        assert (part.num_attention_heads, part.hidden_act, part.layer_norm_eps) == (16, "gelu", 1e-5)
    assert clip.text_config.eos_token_id == 49407
    for part, layout in ((blip.vision.config, (16, "gelu", 1e-6)), (blip.text.config, (12, "gelu", 1e-12))):
        assert (part.num_attention_heads, part.hidden_act, part.layer_norm_eps) == layout


def test_every_key_that_does_not_fit_is_named():
    shapes = {"weight": [1, 3], "bias": [1]}
    net, good = torch.nn.Linear(3, 1), tiny_clip.weights(shapes, 0)
    fill(net, good, lambda name: name)
    assert torch.equal(net.weight, good["weight"])
    bad = {"wieght": torch.zeros(1, 3), "bias": torch.zeros(2), "more": torch.zeros(1)}
    with pytest.raises(ValueError, match="do not fit Linear") as error:
        fill(net, bad, lambda name: name)
    for said in ("weight is missing", "wieght is left over", "more is left over", "bias has [2] where [1] is due"):
        assert said in str(error.value)


@pytest.mark.parametrize("name", ["hpsv2", "image_reward", "aesthetic_v1", "aesthetic_v2"])
def test_a_checkpoint_with_a_strange_key_is_refused(name, settings):
    file = "HPS_v2_compressed.pt" if name == "hpsv2" else ""
    state = dict(read(settings[name]["weights"], file))
    gone = next(key for key in sorted(state) if key.endswith("weight"))
    state["stranger.weight"] = state.pop(gone)
    with pytest.raises(ValueError, match=f"{re.escape(gone)} is missing, stranger.weight is left over"):
        reward_models.load(name, **settings[name] | {"weights": state})


class Payload:
    def __reduce__(self):
        return print, ("code from outside has run",)


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "extra": Payload()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt holds more than tensors and is not unpickled"):
        read(tmp_path / "w.pt")
    assert "has run" not in capsys.readouterr().out


def test_where_weights_are_read_from(tmp_path, monkeypatch):
    """A state dict, a file of either format, a folder, a hub repository at its revision, an address."""
    from safetensors.torch import save_file

    state = {"weight": torch.arange(3.0)}
    torch.save(state, tmp_path / "w.pt")
    save_file(state, tmp_path / "w.safetensors")
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: asked.append((a, k)) or tmp_path / "w.pt")
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda address, to: asked.append(address) or shutil.copy("w.pt", to))
    monkeypatch.setattr("torch.hub.get_dir", lambda: tmp_path / "kept")
    monkeypatch.chdir(tmp_path)

    for source in (state, tmp_path / "w.pt", "w.pt", str(tmp_path / "w.safetensors")):
        assert torch.equal(read(source)["weight"], state["weight"])
    assert torch.equal(read(tmp_path, "w.safetensors")["weight"], state["weight"])
    assert asked == []
    read("some/repository@0123abc", "w.pt")
    first, second = "https://example.org/commit-1/w.pth", "https://example.org/commit-2/w.pth"
    for address in (first, second, first):  # of one file name, each kept under its whole address
        assert torch.equal(read(address)["weight"], state["weight"])
    assert asked == [(("some/repository", "w.pt"), {"revision": "0123abc"}), first, second]


@pytest.mark.parametrize("weights", ["/not/there.pt", "not/there.pt", "there.safetensors", "./not/there"])
def test_weights_that_are_not_there(weights):
    with pytest.raises(FileNotFoundError, match="there is no"):
        read(weights)


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"step": 3}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="is no state dict"):
        read(tmp_path / "w.pt")


def test_names_of_the_hub_are_passed_on_with_their_revisions(settings, monkeypatch):
    from transformers import AutoTokenizer, CLIPConfig

    asked = []
    fits = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    model, tokenizer = (CLIPModel(tiny_clip.clip_config()), AutoTokenizer.from_pretrained(settings["clip_score"]["model"]))
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda s, **k: asked.append((s, k["revision"])) or (model, fits))
    monkeypatch.setattr(CLIPConfig, "get_config_dict", lambda s, **k: asked.append((s, k["revision"])) or ({}, {}))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda s, **k: asked.append((s, k["revision"])) or tokenizer)
    monkeypatch.setattr("reward_models.clip._mean_and_std", lambda s: asked.append(at_commit(s)) or ((0.5,) * 3, (0.5,) * 3))

    reward_models.load("pickscore", model="mine/scores@a1", processor="mine/words")
    assert asked == [("mine/scores", "a1")] * 2 + [("mine/words", "main")] * 2
    asked.clear()
    reward_models.load("clip_score", model="mine/clip@c3")
    assert asked == [("mine/clip", "c3")] * 4


@pytest.mark.parametrize("name", [name for name in reward_models.NAMES if not name.startswith("pocket")])
def test_what_a_built_in_reward_reads_from_the_hub_is_pinned(name):
    module, _, attribute = reward_models.NAMES[name].path.partition(":")
    defaults = [p.default for p in inspect.signature(getattr(importlib.import_module(module), attribute)).parameters.values()]
    sources = [str(default) for default in defaults if "/" in str(default)]
    assert sources
    for source in sources:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}|https://github\.com/[\w.-]+/[\w.-]+/raw/[0-9a-f]{40}/\S+", source)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("aesthetic_v1", "sa_0_4_vit_l_14_linear.pth"),
        ("aesthetic_v2", "sac+logos+ava1-l14-linearMSE.pth"),
        ("image_reward", "ImageReward.pt"),
    ],
)
def test_weights_lie_in_a_folder_under_their_original_name(name, file, settings, tmp_path):
    (tmp_path / file).write_bytes(settings[name]["weights"].read_bytes())
    images, ask = pictures(2), settings[name] | {"weights": tmp_path}
    assert torch.equal(
        reward_models.load(name, **ask)(images, PROMPTS[:2]), reward_models.load(name, **settings[name])(images, PROMPTS[:2])
    )


@pytest.mark.parametrize("name", ["hpsv2", "image_reward", "aesthetic_v1", "aesthetic_v2"])
def test_weights_that_are_not_there_are_missed_before_a_model_is_built(name, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "__init__", None)
    with pytest.raises(FileNotFoundError, match=rf"there is no {tmp_path}/"):
        reward_models.load(name, **settings[name] | {"weights": tmp_path})
