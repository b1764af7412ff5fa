"""The seam where weights come from: without files of weights, with random ones, with none."""

from __future__ import annotations

import logging
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import torch
from diffusers import ConfigMixin
from tiny import pipelines

from benchmarks.layouts import write_half_variant
from diffinstruct.errors import UserError
from diffinstruct.models.pipeline import load_reference
from diffinstruct.models.sources import NoWeights, RandomWeights, WeightSource


@pytest.fixture(scope="module", params=["sd15", "sdxl", "pixart"])
def bare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's configurations alone."""
    whole = pipelines.build(tmp_path_factory.mktemp("whole"), family=request.param)
    return Path(copytree(whole, tmp_path_factory.mktemp("bare") / "p", ignore=ignore_patterns("*.safetensors", "tok*")))


def test_a_pipeline_without_weights_is_refused(bare: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        load_reference(str(bare)).network()


def test_a_pipeline_may_lie_here_in_its_fp16_variant_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []  # diffusers calls each name that is tried in vain an error, though the next one is there
    library = logging.getLogger("diffusers.models.modeling_utils")
    monkeypatch.setattr(library, "callHandlers", lambda record: told.append(record.getMessage()))
    whole = pipelines.build(tmp_path / "whole", family="sdxl")
    write_half_variant(whole, tmp_path / "half")
    one, other = (load_reference(str(folder)) for folder in (whole, tmp_path / "half"))
    for name, weight in one.network().state_dict().items():
        assert torch.equal(other.network().state_dict()[name], weight.half().float())
    assert one.encode_prompts(["a red hat"]).keys() == other.encode_prompts(["a red hat"]).keys()
    assert not [line for line in told if "error" in line]


def test_random_weights_are_the_same_at_every_call(bare: Path) -> None:
    reference = load_reference(str(bare), weights=RandomWeights())
    one, other = (reference.network().state_dict() for _ in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    c = reference.encode_prompts(["a red hat", "a blue hat"])
    blank = reference.blank_conditions()
    of_each = [{key: (value.shape[1:], value.dtype) for key, value in each.items()} for each in (c, blank)]
    assert of_each[0] == of_each[1]  # a mask stays one
    images = reference.sampler(reference.generator(399))(["a red hat"], torch.zeros(1, *reference.latent_shape))
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()


def test_no_weights_take_no_memory(bare: Path) -> None:
    reference = load_reference(str(bare), decoder_dtype=torch.bfloat16, weights=NoWeights())
    parts = [reference.network(), reference.vae, reference.empty("text_encoder")]
    assert all(weight.is_meta for part in parts for weight in part.parameters())
    assert {weight.dtype for weight in reference.vae.parameters()} == {torch.bfloat16}
    assert reference.null_conditions().keys() == reference.blank_conditions().keys()


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_pipeline_of_which_only_a_variant_was_downloaded(tmp_path: Path, variant: str) -> None:
    """Whatever is asked of it: the network, the decoder and the text encoder, in the type that is asked for."""
    whole, folder = (pipelines.build(tmp_path / name) for name in ("whole", "half"))
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(f".{variant}.safetensors"))
    reference = load_reference(str(folder))
    ours, plain = reference.network(), load_reference(str(whole)).network()
    assert all(
        torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(ours.parameters(), plain.parameters(), strict=True)
    )
    assert reference.encode_prompts(["a red hat"])["prompt_embeds"].shape[0] == 1
    assert reference.decode(torch.zeros(1, *reference.latent_shape)).shape == (1, 3, 32, 32)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    class Kind(ConfigMixin):
        @staticmethod
        def load_config(source: str, **options: object) -> dict[str, object]:
            return {}

        @staticmethod
        def from_pretrained(source: str, variant: str | None, **options: object) -> None:
            asked.append(variant)
            raise OSError("We couldn't connect to the hub")

    with pytest.raises(UserError, match="couldn't connect"):
        WeightSource().load(Kind, "owner/model", "unet", torch.float32, "cpu")
    assert asked == [None]
