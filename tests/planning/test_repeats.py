"""Counting one block of each kind against counting all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers.models.attention import BasicTransformerBlock
from tiny import pipelines

from diffinstruct.config.experiment import Experiment
from diffinstruct.models.pipeline import load_reference
from diffinstruct.planning.footprint import Footprint, training_footprint
from diffinstruct.planning.repeats import Repeats

SETTINGS = {
    "full": {},
    "full-bf16-checkpointing": {"precision": "bf16", "activation_checkpointing": True, "micro_batch_size": 1},
    "adapters-bf16": {"precision": "bf16", "generator": {"lora_rank": 4}, "score_network": {"lora_rank": 2}},
    "adapters-checkpointing": {
        "activation_checkpointing": True, "micro_batch_size": 1,
        "generator": {"lora_rank": 4}, "score_network": {"lora_rank": 2},
    },
}  # fmt: skip


def footprint(folder: Path, family: str, settings: dict[str, Any]) -> Footprint:
    content = Experiment().model_dump() | {"global_batch_size": 2}
    timestep = pipelines.FAMILIES[family].timestep
    for name, value in ({"reference": {"model": str(folder)}} | settings).items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    content["generator"] |= {"init_from": "reference", "timestep": timestep}
    experiment = Experiment.model_validate(content)
    checkpointing = experiment.activation_checkpointing
    return training_footprint(experiment, load_reference(str(folder), activation_checkpointing=checkpointing))


@pytest.mark.parametrize(("family", "settings"), [
    ("sd15", "full"), ("sd15", "adapters-checkpointing"), ("sd3", "full-bf16-checkpointing"),
    *(pytest.param(family, settings, marks=pytest.mark.long) for family in pipelines.FAMILIES for settings in SETTINGS),
])  # fmt: skip
def test_blocks_that_repeat_are_counted_as_if_each_were(family: str, settings: str, tmp_path, monkeypatch) -> None:
    """What is held and what is done is the same; of the peak little."""
    folder = pipelines.build(tmp_path / "tiny", family=family)
    once = footprint(folder, family, SETTINGS[settings])
    with monkeypatch.context() as patch:
        patch.setattr(Repeats, "put_into", lambda self, network: None)
        every = footprint(folder, family, SETTINGS[settings])
    assert (once.held, once.passes, once.parameters) == (every.held, every.passes, every.parameters)
    assert once.flops == pytest.approx(every.flops, rel=0.005) and once.peak == pytest.approx(every.peak, rel=0.05)


def test_a_kind_of_block_is_run_as_often_in_a_deep_network_as_in_a_shallow_one(tmp_path, monkeypatch) -> None:
    calls, forward = [], BasicTransformerBlock.forward
    monkeypatch.setattr(
        BasicTransformerBlock, "forward", lambda self, *a, **more: calls.append(self) or forward(self, *a, **more)
    )
    counts, flops = [], []
    for layers in (2, 5):
        folder = pipelines.build(tmp_path / str(layers), family="pixart")
        config = folder / "transformer" / "config.json"
        config.write_text(config.read_text().replace('"num_layers": 2', f'"num_layers": {layers}'))
        flops.append(footprint(folder, "pixart", {}).flops)
        counts.append(len(calls))
        calls.clear()
    assert counts[0] == counts[1] > 0 and flops[1] > 1.5 * flops[0]
