"""A round on a GPU that is not there: every tensor is where it should be, and the waits for it are counted.

A wait lets the GPU run dry: while the program waits it hands out no work. A round has to wait where it decides (whether
its sample goes to the rewards, whether an update is made) and once for its metrics.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import pipelines
from tiny.absent_gpu import GPU, AbsentGpu, WrongDevice, absent_gpu
from tiny.rewards import Calm, Red

from diffinstruct.config.experiment import Experiment
from diffinstruct.method.diffusion import Schedule
from diffinstruct.method.precision import frozen_dtype
from diffinstruct.method.rewards import Scores
from diffinstruct.models.pipeline import load_reference
from diffinstruct.planning.footprint import roles_without_content, round_without_content, scoring
from diffinstruct.training.build import make_step_config

SAMPLES, RED, CALM = 4, "tiny.rewards:Red", "tiny.rewards:Calm"


@dataclass(frozen=True)
class Bound:
    """What a round of some settings may take. `rewards_here`: in the training process, else in actors."""

    waits: int
    copies: int
    rewards_here: bool = False
    sections: dict[str, Any] = field(default_factory=dict)


def settings(**objective: Any) -> dict[str, Any]:
    return {"objective": objective}


ADAPTERS = {"generator": {"lora_rank": 2}, "score_network": {"lora_rank": 2}}
TWICE = {"score_network": {"updates_per_step": 2, "reuse_sample": False}}
PIECES = {"micro_batch_size": 2, "activation_checkpointing": True, "precision": "bf16"}
DI_STAR = Bound(5, 6)
EVERYWHERE = {
    "full copies, rewards in actors": DI_STAR,
    "adapters, rewards here": Bound(5, 5, True, ADAPTERS | {"precision": "bf16"}),
    "micro-batches, checkpointing, two fresh updates": Bound(6, 9, True, TWICE | PIECES),
    "rewards alone": Bound(4, 1, True, settings(name="reward_only")),
}
"""For each family. Waits: whether the sample is finite, the gradient norm of each update, the means; rewards here are
looked at once; actors get a copy of the sample. Copies: z, and t and eps of each update and of the regularizer, and a z
of each fresh update; the gradient that comes from actors."""
ONCE = {
    **{f"{name}, guidance in": Bound(5, 5, True, settings(name=name)) for name in ("sid", "dmd", "diff_instruct_pp")},
    "diff_instruct_pp, guidance out": Bound(
        5, 5, True, settings(name="diff_instruct_pp") | {"reference": {"guidance": "out", "guidance_scale": 3.0}}
    ),
    "squared distance, no guidance": Bound(
        5, 5, True, settings(distance="squared", distance_args={}) | {"reference": {"guidance_scale": 1.0}}
    ),
    "adapters in pieces": Bound(
        6, 9, True, ADAPTERS | PIECES | {"score_network": ADAPTERS["score_network"] | TWICE["score_network"]}
    ),
    "rewards in micro-batches": Bound(5, 5, True, {"rewards": {"micro_batch_size": 1}}),
    "rewards alone in pieces": Bound(4, 1, True, settings(name="reward_only") | PIECES),
}
"""For one family."""


def from_actors(latents: torch.Tensor, prompts: Any) -> Any:
    """What `cluster/reward_pool.py` does with tensors."""
    rows = latents.detach().cpu()
    return lambda: Scores({RED: torch.empty(len(rows))}, torch.empty(rows.shape), 0.1, 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny pipeline of each family."""
    return {name: pipelines.build(tmp_path_factory.mktemp(name), family=name) for name in pipelines.FAMILIES}


def one_round(folder: Path, timestep: int, bound: Bound, rewards: Any = None) -> AbsentGpu:
    """A round on the pipeline in `folder`, once the schedule's tables are on the GPU."""
    content = Experiment().model_dump()
    content["reference"]["model"], content["generator"]["timestep"] = str(folder), timestep
    content["generator"]["init_from"] = "reference"
    content["rewards"] |= {"trained": [{"name": RED}], "held_out": [CALM]}
    for section, values in bound.sections.items():
        content[section] = content[section] | values if isinstance(values, dict) else values
    experiment = Experiment.model_validate(content)
    reference = load_reference(
        str(folder),
        activation_checkpointing=experiment.activation_checkpointing,
        decoder_dtype=frozen_dtype(experiment.precision),
    )
    config, roles = make_step_config(experiment, reference.schedule), roles_without_content(experiment, reference)
    decoder = reference.empty("vae")
    with absent_gpu() as gpu:
        _, a_round = round_without_content(experiment, reference, roles, config, SAMPLES, GPU)
        with torch.device(GPU):
            here = scoring(experiment.rewards, reference, decoder, rewards or {RED: Red(), CALM: Calm()})
            reference.schedule.fed(torch.zeros(1, dtype=torch.long))
        gpu.waits.clear()
        a_round(here if bound.rewards_here else from_actors)
    return gpu


def check(gpu: AbsentGpu, bound: Bound) -> None:
    assert (gpu.waits.total(), gpu.copies.total()) == (bound.waits, bound.copies), f"\n{gpu}"


@pytest.mark.parametrize("name", pipelines.FAMILIES)
def test_a_round_of_each_family_waits_where_it_decides_and_nowhere_else(folders: dict[str, Path], name: str) -> None:
    check(one_round(folders[name], pipelines.FAMILIES[name].timestep, DI_STAR), DI_STAR)


@pytest.mark.long
@pytest.mark.parametrize("setting", EVERYWHERE)
@pytest.mark.parametrize("name", pipelines.FAMILIES)
def test_no_setting_adds_a_wait_to_any_family(folders: dict[str, Path], name: str, setting: str) -> None:
    check(one_round(folders[name], pipelines.FAMILIES[name].timestep, EVERYWHERE[setting]), EVERYWHERE[setting])


@pytest.mark.long
@pytest.mark.parametrize("setting", ONCE)
def test_no_setting_of_method_or_rewards_adds_a_wait(folders: dict[str, Path], setting: str) -> None:
    check(one_round(folders["sd15"], 625, ONCE[setting]), ONCE[setting])


# ---------------------------------------------------------------------------------------------- what the count catches
ALONE = EVERYWHERE["rewards alone"]
PLANTED = (
    (lambda x: x.sum().item(), "a number is read"),
    (lambda x: bool(x.sum() > 0), "a number is read"),
    (lambda x: x[0, 0, 0, :1].tolist(), "a number is read"),
    (lambda x: x.new_tensor([0.5]), "copy to the GPU from pageable memory"),
    (lambda x: torch.tensor([0.5]).to(x.device, non_blocking=True), "copy to the GPU from pageable memory"),
    (lambda x: x.new_zeros(1).copy_(torch.tensor([0.5])), "copy to the GPU from pageable memory"),
    (lambda x: x.cpu(), "copy to the CPU"),
    (lambda x: x[torch.tensor([0])], "copy of an index to the GPU"),
)
"""What a reward may do with its pictures, and what it is then said to wait for."""


def test_planted_waits_are_counted_with_their_place(folders: dict[str, Path]) -> None:
    class Planted(Red):
        def forward(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
            for plant, _ in PLANTED:
                plant(images)
            return super().forward(images, prompts)

    gpu = one_round(folders["sd15"], 625, ALONE, {RED: Planted(), CALM: Calm()})
    of_reward = {line.partition("  ")[0]: count for line, count in gpu.waits.items() if "method/rewards.py:_unchecked" in line}
    assert of_reward == Counter(said for _, said in PLANTED), f"\n{gpu}"
    with pytest.raises(AssertionError):
        check(gpu, ALONE)


@pytest.mark.parametrize(
    "plant",
    [lambda x: x * torch.full((1,), 0.5), lambda x: torch.ones(9)[x[0, 0, 0].long()], lambda x: x[x > 0]],
    ids=["a product", "a table on the CPU", "a mask"],
)
def test_an_operation_on_two_devices_is_refused(plant: Any) -> None:
    with absent_gpu(), pytest.raises((WrongDevice, RuntimeError)):
        plant(torch.empty(2, 3, 4, 4, device=GPU))


def test_a_schedule_that_stays_on_the_cpu_ends_the_round(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Schedule, "_on", lambda self, device: (self.alphas, self.sigmas, self.timesteps))
    with pytest.raises(WrongDevice, match=r"method/diffusion.py:Schedule.at: a tensor on the CPU is indexed by one on the GPU"):
        one_round(folders["sd15"], 625, ALONE)
