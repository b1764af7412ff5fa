"""The memory of a process's whole life: what comes before and after the rounds is part of it."""

from __future__ import annotations

from typing import Any

import pytest

from diffinstruct.config.experiment import Experiment
from diffinstruct.planning.footprint import Footprint
from diffinstruct.planning.life import CUDA_CONTEXT, FRAGMENTATION, Life, ModelMemory

NETWORK, ADAPTER, DECODER = 1000, 10, 100  # parameters
ROUND, VALIDATION = Footprint(0, 500, 0), Footprint(0, 700, 0)


def life(lora: int = 4, precision: str = "fp32", dtype: str = "fp32", workers: int = 1, **cluster: Any) -> Life:
    content = Experiment().model_dump() | {"precision": precision, "export": {"dtype": dtype}}
    content["generator"]["lora_rank"] = content["score_network"]["lora_rank"] = lora
    content["cluster"] |= {"workers": workers, **cluster}
    own, frozen = ADAPTER if lora else NETWORK, NETWORK * (2 if precision == "bf16" else 4)
    models = [
        ModelMemory("generator", own, 4 * own, trained=True, averaged=True),
        ModelMemory("score network", own, 4 * own, trained=True),
        ModelMemory("reference", NETWORK, frozen),
        ModelMemory("decoder", DECODER, 4 * DECODER),
    ]
    return Life(Experiment.model_validate(content), models, NETWORK, 50, DECODER, 0, ROUND, VALIDATION)


def test_in_main_memory_the_export_is_part_of_it() -> None:
    one = life()
    held, copy = 4 * (9 * ADAPTER + NETWORK + DECODER), 4 * 7 * ADAPTER
    assert (one.held, one.checkpoint) == (held, copy)
    weights = 4 * (3 * ADAPTER + NETWORK + DECODER)
    assert one.parts == {
        "loading": weights + 4 * NETWORK,  # beside the largest file
        "validation": weights + 4 * 4 * ADAPTER + 700,
        "rounds": held + 500 + copy,
        "export": held + copy + 4 * NETWORK,  # an adapter is merged into a network of its own
    }
    assert one.most == one.in_ram == one.parts["export"]


@pytest.mark.parametrize(
    ("settings", "bytes_a_parameter"),
    [
        ({"lora": 0}, 0),  # the average is written as it is held
        ({"lora": 0, "dtype": "fp16"}, 2),
        ({"lora": 4, "dtype": "bf16"}, 2),
        ({"lora": 4, "precision": "bf16"}, 4 + 4),  # the file is read again, since the base is rounded
        ({"lora": 0, "use_gpu": True}, 4),
    ],
)
def test_what_the_export_takes(settings: dict[str, Any], bytes_a_parameter: int) -> None:
    size = {"fp32": 4}.get(settings.get("dtype", "fp32"), 2)
    assert life(**settings).exporting == max(bytes_a_parameter * NETWORK, (4 + size) * DECODER)


def test_on_a_gpu_there_is_more_than_tensors_and_no_export() -> None:
    one = life(lora=0, use_gpu=True, workers=2)
    assert "export" not in one.parts and one.parts["rounds"] == one.held + 500
    assert one.most == one.parts["rounds"] * (1 + FRAGMENTATION) + CUDA_CONTEXT
    # Files pass through main memory in each process; the first one also copies checkpoints and exports
    assert one.in_ram == one.checkpoint + 4 * NETWORK + 4 * NETWORK


def test_of_several_processes_the_first_one_takes_more() -> None:
    one, two = life(lora=0), life(lora=0, workers=2)
    assert two.in_ram == one.in_ram + one.parts["rounds"] - one.checkpoint
