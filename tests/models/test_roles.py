"""One frozen base in several roles, against full copies with the same adapters merged by hand."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import pipelines
from torch import nn

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.reading import load
from diffinstruct.method.noise import NoiseStreams
from diffinstruct.method.rewards import Scores
from diffinstruct.method.step import TrainState, alternating_round
from diffinstruct.models.export import export
from diffinstruct.models.lora import Role
from diffinstruct.models.pipeline import Reference, load_reference
from diffinstruct.models.roles import Roles, make_roles
from diffinstruct.training.build import make_step_config, make_train_state

PROMPTS = ["a red hat", "something else"]
RANKS = ["generator.lora_rank=4", "score_network.lora_rank=2"]


def configured(folder: Path, family: str, *more: str) -> Experiment:
    (folder / "empty.yaml").write_text("{}")
    start = [] if any(key.startswith("generator.init_from=") for key in more) else ["generator.init_from=reference"]
    own = [
        f"reference.model={folder}",
        f"generator.timestep={pipelines.FAMILIES[family].timestep}",
        "global_batch_size=2",
        *start,
    ]
    return load(folder / "empty.yaml", [*own, *more])


def moved(roles: Roles) -> Roles:
    """With adapters (or weights) that training has moved."""
    torch.manual_seed(3)
    for module in (roles.generator, roles.score_network):
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return roles


def reward(latents: torch.Tensor, prompts: Any) -> Any:
    """Pulls every latent towards 1."""
    gradient = 1 - latents
    answer = Scores({"one": -(gradient**2).flatten(1).sum(1) / 2}, gradient, 0.0, len(latents))
    return lambda: answer


def rounds(experiment: Experiment, reference: Reference, train_state: TrainState, n: int) -> list[dict[str, float]]:
    settings, c = make_step_config(experiment, reference.schedule), reference.encode_prompts(PROMPTS)
    return [
        alternating_round(
            train_state,
            settings,
            reference.schedule,
            NoiseStreams(0, step, reference.latent_shape, slice(0, 2), torch.device("cpu")),
            PROMPTS,
            c,
            reward,
        )
        for step in range(n)
    ]


def by_hand(roles: Roles, reference: Reference) -> Roles:
    """The same roles as full copies: every adapter merged into a network of its own."""

    def own(module: Any) -> nn.Module:
        network = module.denoiser.network if hasattr(module, "denoiser") else module.network
        whole: Any = reference.network()
        if isinstance(network, Role) and network.adapter:
            whole.load_state_dict(dict(network.merged()))
        return whole

    at = roles.generator.timestep
    return Roles(
        generator=reference.one_step(own(roles.generator), at),
        score_network=reference.denoiser(own(roles.score_network)),
        reference=reference.denoiser(reference.network()),
        ema=reference.one_step(own(roles.ema), at),
    )


@pytest.mark.parametrize("checkpointing", ["true"])
def test_adapters_equal_their_merge(folder: Path, family: str, checkpointing: str) -> None:
    """Values, and what a round computes: the gradient at the sample goes through score network and reference, that of
    the generator through the third role, and with checkpointing all three are computed again while another role is
    played."""
    free = ["generator.max_grad_norm=1e9", "score_network.max_grad_norm=1e9"]
    experiment = configured(folder, family, *RANKS, *free, f"activation_checkpointing={checkpointing}")
    reference = load_reference(str(folder), activation_checkpointing=checkpointing == "true")
    roles = moved(make_roles(experiment, reference))
    merged = by_hand(roles, load_reference(str(folder)))
    z, c = torch.randn(2, *reference.latent_shape), reference.encode_prompts(PROMPTS)
    t = torch.tensor([200, 800])
    with torch.no_grad():
        for ours, theirs in ((roles.generator(z, c), merged.generator(z, c)), *(
            (getattr(roles, name)(z, t, c), getattr(merged, name)(z, t, c)) for name in ("score_network", "reference")
        )):  # fmt: skip
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    said = []
    for each, of in ((roles, reference), (merged, load_reference(str(folder)))):
        still = experiment.model_copy(update={"generator": experiment.generator.model_copy(update={"learning_rate": 1e-12})})
        still = still.model_copy(update={"score_network": still.score_network.model_copy(update={"learning_rate": 1e-12})})
        (metrics,) = rounds(still, of, make_train_state(still, each, of.null_conditions(), lambda module: module), 1)
        said.append({key: value for key, value in metrics.items() if not key.startswith("time/")})
    weights = ("gradient_norm/generator", "gradient_norm/score_network")  # of other parameters
    assert {k: v for k, v in said[0].items() if k not in weights} == pytest.approx(
        {k: v for k, v in said[1].items() if k not in weights}, rel=1e-3
    )
    adapters = [p.grad for p in roles.generator.parameters()]
    assert all(grad is not None for grad in adapters)
    # d/dB of W + BA is (d/dW) A^T: the adapters' gradients are those of the merged weights, as the chain rule has it
    network, full = roles.generator.denoiser.network, dict(merged.generator.denoiser.network.named_parameters())
    compared = 0
    for name, layer in network.base.layers.items():
        gradient = full[f"{name}.weight"].grad.flatten(1)
        a, b = layer.lora_A["generator"].weight, layer.lora_B["generator"].weight
        torch.testing.assert_close(b.grad.flatten(1), gradient @ a.flatten(1).T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.grad.flatten(1), b.flatten(1).T @ gradient, rtol=1e-3, atol=1e-4)
        compared += gradient.abs().max() > 1e-6
    assert compared > 5


def test_a_merge_is_on_the_files_own_weights(folder: Path, family: str) -> None:
    """Also where the base is held in bf16, so that the adapter does to the published model what it does to the
    export."""
    reference = load_reference(str(folder))
    network: Any = make_roles(configured(folder, family, *RANKS, "precision=bf16"), reference).generator.denoiser.network
    assert network.dtype == torch.bfloat16
    merged = dict(network.merged())  # its adapter adds nothing yet
    assert all(torch.equal(merged[name], value) for name, value in reference.network().state_dict().items())


def test_a_merge_makes_no_second_network(folder: Path, family: str) -> None:
    network: Any = make_roles(configured(folder, family, *RANKS), load_reference(str(folder))).generator.denoiser.network
    base = {name.replace(".base_layer.", "."): weight for name, weight in network.base.network.named_parameters()}
    adapted = {f"{name}.weight" for name in network.base.layers}
    for name, weight in ((name, weight) for name, weight in network.merged() if name in base):  # buffers are nobody's
        assert (weight.data_ptr() == base[name].data_ptr()) == (name not in adapted)


def test_training_leaves_the_base_alone_and_moves_every_adapter(folder: Path, family: str) -> None:
    experiment, reference = configured(folder, family, *RANKS), load_reference(str(folder))
    roles = make_roles(experiment, reference)
    base = roles.generator.denoiser.network.base
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    start = roles.generator(torch.ones(2, *reference.latent_shape), reference.encode_prompts(PROMPTS)).detach()
    train_state = make_train_state(experiment, roles, reference.null_conditions(), lambda module: module)
    metrics = rounds(experiment, reference, train_state, 3)
    after = base.network.state_dict()
    for name, value in before.items():
        idle = "transformer_blocks.1.attn.add_q_proj" in name  # SD3's last block asks for its text and does not use it
        assert torch.equal(after[name], value) == (".lora_" not in name or idle), name
    assert base.active_adapters == []
    now = roles.generator(torch.ones(2, *reference.latent_shape), reference.encode_prompts(PROMPTS)).detach()
    assert (now - start).abs().max() > 0 and all(metrics[-1][key] > 0 for key in metrics[-1] if key.startswith("gradient_norm"))
    shared = {name for name, _ in roles.generator.named_parameters()} & {n for n, _ in roles.score_network.named_parameters()}
    assert not shared & {"denoiser.network"} and all("weights" in name for name, _ in roles.generator.named_parameters())


@pytest.mark.parametrize("ranks", [["generator.lora_rank=4"], ["score_network.lora_rank=2"], []], ids=str)
def test_full_and_adapted_roles_mix(folder: Path, family: str, ranks: list[str]) -> None:
    experiment, reference = configured(folder, family, *ranks), load_reference(str(folder))
    roles = make_roles(experiment, reference)
    train_state = make_train_state(experiment, roles, reference.null_conditions(), lambda module: module)
    frozen = {name: value.clone() for name, value in roles.reference.network.base.network.state_dict().items()}
    rounds(experiment, reference, train_state, 2)
    after = roles.reference.network.base.network.state_dict()
    assert all(torch.equal(frozen[name], value) for name, value in after.items() if ".lora_" not in name)
    state = copy.deepcopy(train_state.state_dict())
    full = sum(p.numel() for p in reference.network().parameters())
    sizes = {name: sum(v.numel() for v in state[name].values()) for name in ("generator", "score_network", "ema")}
    for name, rank in (("generator", experiment.generator.lora_rank), ("score_network", experiment.score_network.lora_rank)):
        assert (sizes[name] < full) == (rank > 0)
    again = make_train_state(experiment, make_roles(experiment, reference), reference.null_conditions(), lambda module: module)
    again.load_state_dict(state)
    one, other = (rounds(experiment, reference, p, 1)[0] for p in (train_state, again))
    assert all(one[key] == other[key] for key in one if not key.startswith("time/"))


@pytest.fixture
def started(folder: Path, family: str, tmp_path: Path) -> Path:
    """A start that differs from the reference in all its weights."""
    network = load_reference(str(folder)).network()
    torch.manual_seed(5)
    weights = {name: value + 0.05 * torch.randn_like(value) for name, value in network.state_dict().items()}
    save_file(weights, tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def test_another_start_is_a_second_base_or_a_low_rank_difference(folder: Path, family: str, started: Path) -> None:
    reference, start = load_reference(str(folder)), f"generator.init_from={started}"
    z, c = torch.randn(2, *reference.latent_shape), reference.encode_prompts(PROMPTS)
    whole = reference.generator(pipelines.FAMILIES[family].timestep, str(started))
    second = make_roles(configured(folder, family, *RANKS, start), reference)
    with torch.no_grad():
        torch.testing.assert_close(second.generator(z, c), whole(z, c), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second.ema(z, c), whole(z, c), rtol=1e-5, atol=1e-5)
    assert second.start_error is None
    assert second.generator.denoiser.network.base is not second.reference.network.base

    errors = []
    for rank in (1, 4, 512):
        roles = make_roles(configured(folder, family, *RANKS, start, f"generator.init_rank={rank}"), reference)
        assert roles.generator.denoiser.network.base is roles.reference.network.base
        base, target = dict(roles.generator.denoiser.network.merged()), whole.denoiser.network.state_dict()
        own = dict(reference.network().named_parameters())
        lost = sum((target[name] - value).square().sum() for name, value in base.items() if name in own).item()
        of = sum((target[name] - value).square().sum() for name, value in own.items()).item()
        assert roles.start_error == pytest.approx((lost / of) ** 0.5, abs=1e-3)
        errors.append(roles.start_error)
        with torch.no_grad():  # the reference is the reference still
            t = torch.tensor([200, 800])
            torch.testing.assert_close(roles.reference(z, t, c), reference.denoiser()(z, t, c), rtol=1e-5, atol=1e-5)
    assert 1 > errors[0] > errors[1] > errors[2] > 0  # norms and biases are in no adapter


STRANGER = """
import sys
sys.modules["diffinstruct"] = None
import numpy as np, torch
from diffusers import DiffusionPipeline

latents, model, exported = torch.from_numpy(np.load(sys.argv[1])), sys.argv[2], sys.argv[3]
pictures = []
whole = DiffusionPipeline.from_pretrained(exported)
adapted = DiffusionPipeline.from_pretrained(model)
adapted.scheduler = type(whole.scheduler).from_config(whole.scheduler.config)
adapted.load_lora_weights(exported + "/lora")
for pipe in (whole, adapted):
    how = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "np"}
    alone = [pipe("a red hat", latents=z[None], **how).images for z in latents]
    pictures.append(np.concatenate(alone))
np.save(exported + ".npy", np.stack(pictures))
"""


def test_an_exported_adapter_opens_in_stock_diffusers(folder: Path, family: str, tmp_path: Path) -> None:
    experiment, reference = configured(folder, family, *RANKS), load_reference(str(folder))
    roles = moved(make_roles(experiment, reference))
    place = export(str(folder), roles.generator, tmp_path / "export")
    z = torch.randn(2, *reference.latent_shape, generator=torch.Generator().manual_seed(0))
    ours = torch.cat([reference.sampler(roles.generator)(["a red hat"], one[None]) for one in z]).permute(0, 2, 3, 1).numpy()
    if family == "pixart":  # whose stock pipeline has no load_lora_weights
        assert not (place / "lora").exists()
        return
    np.save(tmp_path / "z.npy", z.numpy())
    command = [sys.executable, "-I", "-c", STRANGER, str(tmp_path / "z.npy"), str(folder), str(place)]
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert answer.returncode == 0, answer.stderr
    whole, adapted = np.load(f"{place}.npy")
    untrained = (
        reference.sampler(reference.generator(pipelines.FAMILIES[family].timestep))(["a red hat"] * 2, z)
        .permute(0, 2, 3, 1)
        .numpy()
    )
    assert np.abs(ours - untrained).max() > 0.01
    assert np.abs(whole - ours).max() < 1e-5 and np.abs(adapted - ours).max() < 1e-5


def test_bf16_holds_the_frozen_base_in_bf16_and_what_is_trained_in_fp32(folder: Path, family: str) -> None:
    experiment, reference = configured(folder, family, *RANKS, "precision=bf16"), load_reference(str(folder))
    roles = make_roles(experiment, reference)
    own = {".lora_" in name: set() for name, _ in roles.reference.network.base.network.named_parameters()}
    for name, parameter in roles.reference.network.base.network.named_parameters():
        own[".lora_" in name].add(parameter.dtype)
    assert own == {True: {torch.float32}, False: {torch.bfloat16}}
    train_state = make_train_state(experiment, roles, reference.null_conditions(), lambda module: module)
    metrics = rounds(experiment, reference, train_state, 2)[-1]
    assert all(np.isfinite(value) for value in metrics.values()) and metrics["gradient_norm/generator"] > 0


@pytest.mark.long
def test_compiled_networks_play_the_same_roles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile takes for constant changes with the role, and it makes a version for each without giving up.
    (Its backend here runs what it has traced as it is.)"""
    monkeypatch.setattr("torch._dynamo.config.fail_on_recompile_limit_hit", True)
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_(module, backend="eager"))
    sd15 = pipelines.build(tmp_path / "sd15")
    reference, said = load_reference(str(sd15)), {}
    for compiled in ("false", "true"):
        experiment = configured(sd15, "sd15", *RANKS, f"compile={compiled}")
        roles = moved(make_roles(experiment, reference))
        train_state = make_train_state(experiment, roles, reference.null_conditions(), lambda module: module)
        said[compiled] = rounds(experiment, reference, train_state, 1)
        with torch.no_grad():  # as a picture of the average
            train_state.ema(torch.ones(1, *reference.latent_shape), reference.encode_prompts(PROMPTS[:1]))
    times = {key for key in said["true"][0] if key.startswith("time/")}
    for ours, theirs in zip(said["true"], said["false"], strict=True):
        assert {k: v for k, v in ours.items() if k not in times} == pytest.approx(
            {k: v for k, v in theirs.items() if k not in times}, rel=1e-4
        )
