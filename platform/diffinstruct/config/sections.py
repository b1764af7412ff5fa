"""The sections of a configuration; each field says its unit and where its default comes from."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from diffinstruct.config.addresses import IN_ENVIRONMENT, quote_uri, redact, tracking_fault
from diffinstruct.config.fields import (
    POCKET,
    POCKET_DISTILLED,
    Argument,
    Beta,
    Count,
    DistanceName,
    LearningRate,
    Location,
    NotNegative,
    ObjectiveName,
    Positive,
    PromptSource,
    Rank,
    RewardName,
    Samples,
    Section,
    Text,
    WeightDecay,
    broken_rule,
    key,
    mistake_at,
    name_in,
    no_repeats,
)
from diffinstruct.errors import did_you_mean
from diffinstruct.method.arguments import ArgumentError
from diffinstruct.method.distances import DISTANCES, distance, distance_arguments
from diffinstruct.method.objectives import OBJECTIVES, OWN, facts, objective_arguments

RAYS_OWN = {
    "CPU": "cpus_per_worker and rewards.cpus ask for CPUs",
    "GPU": "use_gpu and rewards.gpus ask for GPUs",
    "memory": "memory is not counted",
    "object_store_memory": "memory is not counted",
}
"""Resources that every node has, whatever it declares."""


class ReferenceConfig(Section):
    """The frozen diffusion model that the generator is held close to."""

    model: Location = key(POCKET, f"diffusers folder, hub id or hub id@commit, or '{POCKET}', the built-in world (ours)")
    guidance_scale: float = key(
        3.0,
        "classifier-free guidance of the reference, as diffusers': 1 is none; the paper's scale is this "
        "less 1 (the paper; ours)",
        ge=1,
    )
    guidance: Literal["in", "out"] = key(
        "in", "where guidance enters: inside the divergence, or beside it as one more reward (the paper; in)"
    )


class OptimizerConfig(Section):
    """How one of the two trained networks is optimised (Adam)."""

    learning_rate: LearningRate = key(..., "of Adam, per step", resume=True)
    betas: tuple[Beta, Beta] = key((0.0, 0.99), "of Adam (neighbours' choice; ours)", strict=False, resume=True)
    weight_decay: WeightDecay = key(0.0, "of AdamW, per step and learning rate (ours)", resume=True)
    max_grad_norm: Positive = key(10.0, "the gradient's L2 norm is clipped to this (ours)", resume=True)
    lora_rank: Rank = key(
        0, "0: all weights are trained; else an adapter of this rank over a frozen network that roles share (ours)"
    )


class GeneratorConfig(OptimizerConfig):
    """The one-step network z -> x0."""

    init_from: Location = key(
        POCKET_DISTILLED,
        f"initial weights: '{POCKET_DISTILLED}', 'reference', a diffusers folder, hub id or hub id@commit, "
        "a .safetensors file, or a LoRA's folder (ours)",
    )
    init_rank: Rank = key(
        0,
        "with lora_rank, of a start that is not the reference: 0 keeps it as a second frozen network, "
        "else its difference from the reference is kept at this rank, and what that loses is said (ours)",
    )
    timestep: int = key(625, "the t it is fed, index into the reference's schedule (v1 of the paper: 625)", ge=0)
    input_scale: Literal["unit", "sigma"] = key(
        "unit", "what it is fed: z ~ N(0, I) as it is (DMD2's way), or sigma_T z (SiD's)"
    )
    learning_rate: LearningRate = key(
        1e-4, "of Adam, per step (left open; ours, kept by open_choices: neither half nor twice is better)", resume=True
    )
    ema_decay: float = key(
        0.99, "per step, of the EMA of the weights that is shown and exported (ours)", ge=0, lt=1, resume=True
    )


class ScoreNetworkConfig(OptimizerConfig):
    """The network that follows the generator's own distribution (the paper's TA)."""

    learning_rate: LearningRate = key(
        2e-4, "of Adam, per update (left open; ours, kept by open_choices: neither half nor twice is better)", resume=True
    )
    updates_per_step: Count = key(
        1,
        "denoising updates before each generator update (K_TA; left open; ours, kept by open_choices: 2 "
        "and 4 are not better and cost more)",
        resume=True,
    )
    reuse_sample: bool = key(True, "the generator's update goes on with the sample of the score phase (ours)")
    loss_weighting: Literal["x0", "eps", "v"] = key(
        "eps",
        "whose squared error it learns from: lambda(t) (left open; neighbours' choice, kept by "
        "open_choices: x0 and v are not better)",
    )


ARGUMENTS = {"objective.name": "args", "objective.distance": "distance_args"}
"""Where the arguments of an objective and of a distance are: the key in `objective`."""


def drop_arguments(content: dict[str, Any], key: str, value: object) -> None:
    """Before another objective or distance is put into `content`, drop the arguments of the one before."""
    objective = content.get("objective")
    if key in ARGUMENTS and isinstance(objective, dict) and objective.get(key.partition(".")[2]) != value:
        objective[ARGUMENTS[key]] = {}


def _complete(name: str, args: dict[str, Any], complete: Callable[[str, dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Arguments with the defaults of what they leave out; those of your own are known when it is imported, with torch."""
    try:
        return complete(name, args)
    except ArgumentError as error:
        raise mistake_at(error.name, args.get(error.name), error.reason, did_you_mean(error.name, error.known)) from None


class ObjectiveConfig(Section):
    """What the generator minimises: -reward_scale * reward + regularization_weight * divergence."""

    name: ObjectiveName = key(
        "di_star", "; ".join(f"'{name}': {facts.title}" for name, facts in OBJECTIVES.items()) + f"; or {OWN.title}"
    )
    args: dict[Text, Argument] = key(
        {}, "parameters that the objective has of its own, name -> value; of sid 'alpha', by default 1.0 (SiD: 1 to 1.2)"
    )
    distance: DistanceName = key(
        "pseudo_huber",
        "between two scores, of di_star and sim: 'pseudo_huber', 'squared', or your own pair (d, d') as "
        "'module:attribute' (the paper)",
    )
    distance_args: dict[Text, Argument] = key(
        {},
        "parameters of the distance, name -> value; of pseudo_huber 'c', per square root of a dimension, "
        "in the units of `weighting` (left open; ours, kept by open_choices: neither 0.03 nor 0.3 is better)",
    )
    weighting: Literal["x0", "eps", "v", "score", "dmd2"] = key(
        "x0",
        "in which differences of predictions are measured: w(t); 'dmd2' is for dmd, as its authors' programs have it "
        "(left open; ours, kept by open_choices: eps and v are not better)",
    )
    regularization_weight: NotNegative = key(
        1.0, "of the divergence: sum over a sample's dimensions, mean over the batch (ours)", resume=True
    )
    reward_scale: NotNegative = key(
        2.0,
        "of the weighted sum of rewards, mean over the batch; it is read against the reward's own range "
        "and the divergence's sum over dimensions: the paper's 100 is for a range of about 0.2, the pocket preference "
        "spans about 3 (ours)",
        resume=True,
    )
    t_law: Literal["uniform", "log_normal"] = key(
        "uniform",
        "of t, in the generator's and the score network's updates: uniform on [t_min, t_max) (left open; neighbours' "
        "choice, kept by open_choices: the other costs diversity), "
        "or ln(sigma_t / alpha_t) normal and cut to it (Karras et al. 2022)",
    )
    t_log_mean: float = key(-0.5, "mean of the log-normal law (Karras et al. 2022, for data of unit variance)", ge=-20, le=20)
    t_log_std: float = key(1.2, "standard deviation of the log-normal law (Karras et al. 2022)", ge=1e-3, le=1e3)
    t_min: int = key(20, "lowest t drawn, index into the schedule (neighbours' choice; ours)", ge=0)
    t_max: int = key(980, "t is drawn below this (neighbours' choice; ours)")

    @field_validator("args")
    @classmethod
    def _arguments(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("name", "")
        return _complete(name, value, objective_arguments) if name in OBJECTIVES else value

    @field_validator("distance_args")
    @classmethod
    def _distance_arguments(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("distance", "")
        if name not in DISTANCES:
            return value
        complete = _complete(name, value, distance_arguments)
        try:
            distance(name, complete)
        except ValueError as error:  # a value that this distance does not take
            raise broken_rule(str(error)) from None
        return complete

    @field_validator("reward_scale")
    @classmethod
    def _zero_without_reward(cls, value: float, info: ValidationInfo) -> float:
        with_reward = facts(info.data.get("name", "")).with_reward
        if value and with_reward:
            raise broken_rule(f"should be 0 for {info.data['name']} (with a reward it is {with_reward!r})")
        return value

    @field_validator("t_max")
    @classmethod
    def _after_t_min(cls, value: int, info: ValidationInfo) -> int:
        t_min = info.data.get("t_min", 0)
        if value <= t_min:
            raise broken_rule(f"should be greater than t_min ({t_min})")
        return value


class TrainedRewardConfig(Section):
    """A reward that the generator climbs."""

    name: RewardName = Field(description="a short name of `reward_models.NAMES`, or your own 'module:callable'")
    weight: float = Field(1.0, description="multiplies its score and its gradient, before reward_scale (ours)")


class RewardsConfig(Section):
    """What is climbed and what only watches."""

    trained: tuple[TrainedRewardConfig, ...] = key(
        (TrainedRewardConfig(name="pocket_preference"),),
        "rewards with gradient; may be empty at reward_scale 0 (ours)",
        strict=False,
    )
    held_out: tuple[RewardName, ...] = key(
        ("pocket_judge",), "rewards that are measured and never trained on (ours)", strict=False
    )
    normalize: Literal["none", "std"] = key(
        "none",
        "std: each trained reward is divided by its standard deviation over 64 pictures of the starting generator (ours)",
    )
    micro_batch_size: Samples = key(
        16, "samples that go through decoder and rewards at once; halved where memory does not hold them (ours)", resume=True
    )

    @field_validator("trained")
    @classmethod
    def _distinct(cls, value: tuple[TrainedRewardConfig, ...]) -> tuple[TrainedRewardConfig, ...]:
        no_repeats([reward.name for reward in value], ())
        return value

    @field_validator("held_out")
    @classmethod
    def _not_trained(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        no_repeats(value, [reward.name for reward in info.data.get("trained", ())])
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """Trained ones, then held-out ones."""
        return (*(reward.name for reward in self.trained), *self.held_out)


class PromptsConfig(Section):
    """Where the captions come from; the only data."""

    train: PromptSource = key(
        f"{POCKET}:train",
        f"'{POCKET}:<split>', a .csv, .jsonl, .parquet or .txt file, or 'datasets:<hub id or folder>:<split>' (ours)",
        resume=True,
    )
    grid: PromptSource = key(f"{POCKET}:grid", "the prompts of the picture grid, in the same form (ours)", resume=True)
    column: Text = key("prompt", "of both, which holds the prompts; a .txt and the pocket world have one (ours)", resume=True)
    embeddings: Location | None = key(
        None,
        "folder of prompt embeddings, which all machines see: what is missing there is made before the "
        "training, which then holds no text encoder; none: prompts are encoded as they come (ours)",
        identity=False,
    )


class OveroptimizationConfig(Section):
    """Whether the reward is being hacked: it rises, and what it stands for does not."""

    every: int = key(10, "steps between two looks at 64 pictures of the generator's EMA; 0: none (ours)", ge=0)
    on_alarm: Literal["warn", "stop", "lower_scale"] = key(
        "warn",
        "what an alarm does beside being written down: nothing, end the run there as if it were finished, "
        "or halve objective.reward_scale from there on (ours)",
        resume=True,
    )


class LoggingConfig(Section):
    """How often something is written down, in steps."""

    every: Count = key(5, "steps between two rows of metrics (ours)", resume=True)
    grid_every: Count = key(50, "steps between two picture grids (ours)", resume=True)
    grid_prompts: Count = key(8, "rows of the grid: this many first prompts of prompts.grid (ours)", resume=True)
    checkpoint_every: Count = key(50, "steps between two checkpoints (ours)", resume=True)


class RewardEnvironmentConfig(Section):
    """Rewards whose packages do not go together with the others': they get actors in an environment of their own."""

    rewards: tuple[RewardName, ...] = Field(strict=False, min_length=1, description="names among trained and held_out")
    runtime_env: Location = Field(description="a Ray runtime environment, a YAML file as of `ray job submit --runtime-env`")


def _declared_by_nodes(value: dict[str, float]) -> dict[str, float]:
    for name, amount in value.items():
        if name in RAYS_OWN:
            raise mistake_at(name, amount, f"should be a resource that nodes declare ({RAYS_OWN[name]})")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]*", name):
            raise mistake_at(name, amount, "should be named in letters, digits, '.', '_', ':' and '-'")
        if amount > 1 and amount % 1:
            raise mistake_at(name, amount, "should be a whole number where it is above 1")
    return value


Resources = Annotated[dict[Text, Positive], AfterValidator(_declared_by_nodes)]
"""Amounts of resources that nodes declare, none of Ray's own: name -> amount."""


class RewardActorsConfig(Section):
    """Where rewards are computed on Ray, and what one reward actor asks for."""

    replicas: Count = key(1, "reward actors, each with its own decoder and reward models (ours)", resume=True)
    cpus: NotNegative = key(1.0, "CPUs per reward actor, fractions allowed; 0 leaves it uncounted (ours)", resume=True)
    gpus: NotNegative = key(0.0, "GPUs per reward actor, fractions allowed (ours)", resume=True)
    deadline_s: Positive = key(300.0, "seconds after which a silent reward actor is replaced (ours)", resume=True)
    placement: Literal["auto", "actor", "process"] = key(
        "auto",
        "where rewards are computed: in reward actors, in the training process, or where the first rounds "
        "show that they hold them up less (ours)",
        resume=True,
    )
    environments: tuple[RewardEnvironmentConfig, ...] = key(
        (),
        "rewards in actors with a runtime environment of their own: {rewards, runtime_env} (ours)",
        strict=False,
        resume=True,
    )
    resources: Resources = key(
        {}, "per reward actor, of resources that nodes declare: name -> amount, fractions allowed (ours)", identity=False
    )

    @property
    def apart(self) -> tuple[str, ...]:
        """The rewards with an environment of their own."""
        return tuple(name for environment in self.environments for name in environment.rewards)


class ClusterConfig(Section):
    """What the Ray runner asks for; `--local` ignores it."""

    workers: Count = key(1, "training processes; each takes global_batch_size / workers samples (ours)", resume=True)
    use_gpu: bool = key(False, "one GPU per training process (ours)", resume=True)
    fully_shard: bool = key(
        False,
        "FSDP2: weights, gradients, Adam states and average are spread over the training processes, for "
        "full fine-tuning of what one GPU does not hold (ours)",
    )
    shard_degree: Annotated[int, Field(ge=2)] | None = key(
        None,
        "with fully_shard: each so many training processes hold all of it together (HSDP), as many as a machine has GPUs, "
        "so that weights do not travel between machines; none: all processes together (ours)",
        identity=False,
    )
    cpus_per_worker: Count = key(1, "CPUs per training process (ours)", resume=True)
    rewards: RewardActorsConfig = RewardActorsConfig()
    worker_resources: Resources = key(
        {}, "per training process, of resources that nodes declare: name -> amount (ours)", identity=False
    )

    @property
    def per_worker(self) -> dict[str, float]:
        """What one training process asks Ray for: resource -> amount."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": 1} if self.use_gpu else {}) | self.worker_resources

    @property
    def per_reward_actor(self) -> dict[str, float]:
        """What one reward actor asks Ray for: resource -> amount."""
        return {"CPU": self.rewards.cpus, "GPU": self.rewards.gpus} | self.rewards.resources


class ExportConfig(Section):
    """The stock pipeline that a run ends with."""

    dtype: Literal["fp32", "fp16", "bf16"] = key(
        "fp32",
        "in which all weights are stored; half as large, fp16 and bf16 round them, and stock diffusers opens all three "
        "without arguments (ours)",
        identity=False,
    )


TRACKERS = {"tensorboard": "diffinstruct.tracking.tensorboard:TensorBoardDelivery"}
"""Short names of trackers besides MLflow -> `module:attribute`."""


class TrackingConfig(Section):
    """Where the run is tracked: MLflow keeps it, and other trackers may have it, too."""

    uri: Location | None = key(
        None, "of the tracking server; none is MLFLOW_TRACKING_URI, else sqlite in the folder of runs (ours)", identity=False
    )
    experiment: Text = key("diffinstruct", "MLflow's name for the group of runs (ours)", identity=False)
    also: tuple[Annotated[str, name_in(TRACKERS)], ...] = key(
        (),
        "trackers besides MLflow: `tensorboard` (files in the run's folder), or `module:attribute` of your "
        "own `Delivery` (ours)",
        strict=False,
        identity=False,
    )
    log_model: bool = key(
        False, description="whether MLflow gets the exported pipeline, too: 14 GB for SDXL (ours)", identity=False
    )

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, value: str | None) -> str | None:
        if value is not None and redact(quote_uri(value)) != quote_uri(value):
            raise broken_rule(
                f"should hold no user and password, nor a query, since recipes are shown and kept ({IN_ENVIRONMENT})"
            )
        if value is not None and (fault := tracking_fault(value)):
            raise broken_rule(*fault)
        return value
