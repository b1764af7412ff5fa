"""A run as one value: what is trained, on what, against what, and where; frozen, typed, written and read as YAML.

`Experiment()` is the pocket recipe. `load` reads a file with overrides and reports every mistake at once, each with its
file and line. Each field says its unit and where its default comes from: a section of arXiv 2410.20898 or "ours".
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from reward_models import NAMES

POCKET_SPLITS = ("train", "eval", "open", "grid")
"""Of the built-in prompts: for training, held-out combinations, face-free ones, and those of the picture grid."""


TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
WHEREABOUTS: Mapping[str, set[str] | bool] = {
    "runs": True,
    "mirror": True,
    "tracking": True,
    "prompts": {"embeddings"},
    "cluster": {"worker_resources", "reward_resources"},
}
"""Sections and keys that say where a run is kept and on which machines it is placed: no part of what it computes."""
CHANGEABLE = frozenset(
    {
        *("steps", "global_batch_size", "micro_batch_size", "precision", "activation_checkpointing", "compile"),
        *("deterministic", "device"),
        *(f"generator.{key}" for key in ("learning_rate", "betas", "weight_decay", "max_grad_norm", "ema_decay")),
        *(f"score_network.{key}" for key in ("learning_rate", "betas", "weight_decay", "max_grad_norm", "updates_per_step")),
        *(f"objective.{key}" for key in ("regularization_weight", "reward_scale")),
        *("prompts.train", "prompts.grid", "prompts.column", "rewards.micro_batch", "watch.on_hacking"),
        *(f"logging.{key}" for key in ("every", "grid_every", "grid_prompts", "checkpoint_every")),
        *(f"cluster.{key}" for key in ("workers", "use_gpu", "cpus_per_worker", "reward_replicas")),
        *(f"cluster.{key}" for key in ("reward_cpus", "reward_gpus", "reward_deadline_s", "reward_place")),
        "cluster.reward_environments",
    }
)
"""Keys that may have another value from some step of a run on, where its user allows it. All others say what the run is: other
networks, another objective, other rewards are another run."""
IN_ENVIRONMENT = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or all of it in MLFLOW_TRACKING_URI"
NO_STORES = (
    *("blockcache", "cached", "data", "dir", "filecache", "generic", "http", "https", "libarchive", "local"),
    *("reference", "simplecache", "tar", "zip"),
)
"""What fsspec knows and nothing can be kept in, or only by way of another."""
RAYS_OWN = {
    "CPU": "cpus_per_worker and reward_cpus ask for CPUs",
    "GPU": "use_gpu and reward_gpus ask for GPUs",
    "memory": "memory is not counted",
    "object_store_memory": "memory is not counted",
}
"""Resources that every node has, whatever it declares."""
DISTANCES = ("pseudo_huber", "squared")


class UserError(Exception):
    """A mistake the user can mend: the command line prints it as it is, without a traceback, and exits with 2."""


class ConfigErrors(UserError):
    """Every mistake of a configuration; `errors` holds one line for each."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors

    def __reduce__(self) -> tuple[type[ConfigErrors], tuple[list[str]]]:
        return ConfigErrors, (self.errors,)


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Ends a message: `, did you mean 'x'?` where a known name is near to `word`, else nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.7)
    return f", did you mean {near[0]!r}?" if near else ""


def without_password(text: str) -> str:
    """A URI, or a message about it, with scheme, host, port and path alone: for eyes and files."""
    # A password may hold a /, an @ or a quote, and so may a query: where both may be meant, nothing is left of either.
    text = re.sub(r"(?<=://)(?![^\s/:?]*/)[^\s?]*\?\S*@\S*", "", text)
    text = re.sub(r"(?<=://)([^\s/:]*:\S*|[^\s/]+)@", "", text)
    text = re.sub(r"(://[^\s?]*)\?\S*?(?=['\"]?(\s|$))", r"\1", text)
    return re.sub(r"\?[^\s?=]+=\S*", "", text)  # of the part of a URI that a client of HTTP names


def spelled(uri: str) -> str:
    """A URI with its blanks as %20: those of a password would be taken for its end. An sqlite file's path is no such thing."""
    return uri if uri.startswith("sqlite:") else re.sub(r"\s", "%20", uri)


def keeps_nothing(uri: str) -> bool:
    """Whether it is an sqlite database in memory."""
    return re.fullmatch(r"sqlite:/*(:memory:)?", uri) is not None


def nearest_file(path: Path, pattern: str) -> str:
    """Ends a message on a file that is not there: the one beside it with the nearest name, if there is one."""
    names = {sibling.stem: str(sibling) for sibling in path.parent.glob(pattern)}
    near = difflib.get_close_matches(path.stem, names, n=1)
    return f", did you mean {names[near[0]]!r}?" if near else ""


def _wrong(what: str, hint: str = "") -> PydanticCustomError:
    """A mistake found by our own rules; the hint ends up after "got ...". Braces would be read as a template."""
    return PydanticCustomError("rule", "{what}", {"what": what, "hint": hint})


def _at(key: str | int, value: object, error: PydanticCustomError) -> ValidationError:
    """The same, said of one key or item of what is under validation."""
    return ValidationError.from_exception_data("section", [InitErrorDetails(type=error, loc=(key,), input=value)])


def _no_repeats(names: Iterable[str], taken: Iterable[str]) -> None:
    seen = set(taken)
    for i, name in enumerate(names):
        if name in seen:
            raise _at(i, name, _wrong("is named twice: a reward is either trained on or held out, and once"))
        seen.add(name)


def _known_reward(name: str) -> str:
    if name not in NAMES and ":" not in name:
        raise _wrong("should be a reward's short name or 'module:callable'", did_you_mean(name, NAMES))
    return name


def _known_distance(name: str) -> str:
    if name not in DISTANCES and ":" not in name:
        raise _wrong(f"should be {' or '.join(map(repr, DISTANCES))} or 'module:attribute'", did_you_mean(name, DISTANCES))
    return name


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise _wrong("should hold no NUL byte: no file system takes it")
    return text


# ---------------------------------------------------------------------------------------------------- the fields
Text = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Samples = Annotated[int, Field(ge=1, le=10**6)]
Rank = Annotated[int, Field(ge=0, le=2**14)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
# What an optimizer makes of these has to be a 32-bit number. Adam's steps have about the rate's size: more is nonsense.
LearningRate = Annotated[float, Field(gt=0, le=1)]
WeightDecay = Annotated[float, Field(ge=0, le=1000)]
Beta = Annotated[float, Field(ge=0, lt=1)]
RewardName = Annotated[str, AfterValidator(_known_reward)]
DistanceName = Annotated[str, AfterValidator(_known_distance)]


class Section(BaseModel):
    # Strict: `steps: yes` or `steps: 1.5` is a mistake, never a 1. Tuples alone are read from YAML's lists.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class Reference(Section):
    """The frozen diffusion model that the generator is held close to."""

    model: Text = Field(
        "pocket", description="diffusers folder, hub id or hub id@commit, or 'pocket', the built-in world (ours)"
    )
    cfg_scale: NotNegative = Field(
        2.0,
        description="guidance of the reference; 0 is none, diffusers' guidance_scale is 1 + this (the paper; ours)",
    )
    guidance: Literal["in", "out"] = Field(
        "in", description="where guidance enters: inside the divergence, or beside it as one more reward (the paper; in)"
    )


class Player(Section):
    """How one of the two trained networks is optimised (Adam)."""

    learning_rate: LearningRate = Field(description="of Adam, per step")
    betas: tuple[Beta, Beta] = Field((0.0, 0.99), strict=False, description="of Adam (neighbours' choice; ours)")
    weight_decay: WeightDecay = Field(0.0, description="of AdamW, per step and learning rate (ours)")
    max_grad_norm: Positive = Field(10.0, description="the gradient's L2 norm is clipped to this (ours)")
    lora_rank: Rank = Field(
        0,
        description="0: all weights are trained; else an adapter of this rank over a frozen network that roles share (ours)",
    )


class Generator(Player):
    """The one-step network z -> x0."""

    start: Text = Field(
        "pocket-distilled",
        description="initial weights: 'pocket-distilled', 'reference', a diffusers folder, hub id or hub id@commit, or a "
        ".safetensors file (ours)",
    )
    start_rank: Rank = Field(
        0,
        description="with lora_rank, of a start that is not the reference: 0 keeps it as a second frozen network, else its "
        "difference from the reference is kept at this rank, and what that loses is said (ours)",
    )
    timestep: int = Field(625, ge=0, description="the t it is fed, index into the reference's schedule (v1 of the paper: 625)")
    input_scale: Literal["unit", "sigma"] = Field(
        "unit", description="what it is fed: z ~ N(0, I) as it is (DMD2's way), or sigma_T z (SiD's)"
    )
    learning_rate: LearningRate = Field(
        1e-4, description="of Adam, per step (left open; ours, kept by open_choices: neither half nor twice is better)"
    )
    ema_decay: float = Field(
        0.99, ge=0, lt=1, description="per step, of the averaged weights that are shown and exported (ours)"
    )


class ScoreNetwork(Player):
    """The network that follows the generator's own distribution (the paper's TA)."""

    learning_rate: LearningRate = Field(
        2e-4, description="of Adam, per update (left open; ours, kept by open_choices: neither half nor twice is better)"
    )
    updates_per_step: Count = Field(
        1,
        description="denoising updates before each generator update (K_TA; left open; ours, kept by open_choices: 2 and 4 are "
        "not better and cost more)",
    )
    reuse_sample: bool = Field(True, description="the generator's update goes on with the sample of the score phase (ours)")
    space: Literal["x0", "eps", "v"] = Field(
        "eps",
        description="whose squared error it learns from: lambda(t) (left open; neighbours' choice, kept by open_choices: x0 "
        "and v are not better)",
    )


class Objective(Section):
    """What the generator minimises: -reward_scale * reward + regularization_weight * divergence."""

    name: Literal["di_star", "sim", "diff_instruct", "diff_instruct_pp", "sid", "dmd", "reward_only"] = Field(
        "di_star",
        description="DI* (the paper), SIM (DI* at reward_scale 0), Diff-Instruct (KL, reward_scale 0), Diff-Instruct++ (KL and "
        "reward), SiD, DMD without GAN, or the reward term alone",
    )
    distance: DistanceName = Field(
        "pseudo_huber",
        description="between two scores, of di_star and sim: 'pseudo_huber', 'squared', or your own pair (d, d') as "
        "'module:attribute' (the paper)",
    )
    huber_c: Positive = Field(
        0.1,
        le=1e6,
        description="pseudo-Huber's c per square root of a dimension, in the units of `space` (left open; ours, kept by "
        "open_choices: neither 0.03 nor 0.3 is better)",
    )
    sid_alpha: float = Field(1.0, description="SiD's alpha, of sid (SiD: 1 to 1.2)")
    space: Literal["x0", "eps", "v", "score"] = Field(
        "x0",
        description="in which differences of predictions are measured: w(t) (left open; ours, kept by open_choices: eps and v "
        "are not better)",
    )
    regularization_weight: NotNegative = Field(
        1.0, description="of the divergence: sum over a sample's dimensions, mean over the batch (ours)"
    )
    reward_scale: NotNegative = Field(
        2.0,
        description="of the weighted sum of rewards, mean over the batch; it is read against the reward's own range and the "
        "divergence's sum over dimensions: the paper's 100 is for a range of about 0.2, the pocket preference spans about "
        "3 (ours)",
    )
    t_law: Literal["uniform", "log_normal"] = Field(
        "uniform",
        description="of t, for both players: uniform on [t_min, t_max) (left open; neighbours' choice, kept by open_choices: "
        "the other costs diversity), or ln(sigma_t / alpha_t) normal and cut to it (Karras et al. 2022)",
    )
    t_log_mean: float = Field(
        -0.5, ge=-20, le=20, description="mean of the log-normal law (Karras et al. 2022, for data of unit variance)"
    )
    t_log_std: float = Field(1.2, ge=1e-3, le=1e3, description="standard deviation of the log-normal law (Karras et al. 2022)")
    t_min: int = Field(20, ge=0, description="lowest t drawn, index into the schedule (neighbours' choice; ours)")
    t_max: int = Field(980, description="t is drawn below this (neighbours' choice; ours)")

    @field_validator("reward_scale")
    @classmethod
    def _zero_without_reward(cls, value: float, info: ValidationInfo) -> float:
        with_reward = {"sim": "di_star", "diff_instruct": "diff_instruct_pp"}.get(info.data.get("name", ""))
        if value and with_reward:
            raise _wrong(f"should be 0 for {info.data['name']} (with a reward it is {with_reward!r})")
        return value

    @field_validator("t_max")
    @classmethod
    def _after_t_min(cls, value: int, info: ValidationInfo) -> int:
        t_min = info.data.get("t_min", 0)
        if value <= t_min:
            raise _wrong(f"should be greater than t_min ({t_min})")
        return value


class TrainedReward(Section):
    """A reward that the generator climbs."""

    name: RewardName = Field(description="a short name of `reward_models.NAMES`, or your own 'module:callable'")
    weight: float = Field(1.0, description="multiplies its score and its gradient, before reward_scale (ours)")


class Rewards(Section):
    """What is climbed and what only watches."""

    trained: tuple[TrainedReward, ...] = Field(
        (TrainedReward(name="pocket_preference"),),
        strict=False,
        description="rewards with gradient; may be empty at reward_scale 0 (ours)",
    )
    held_out: tuple[RewardName, ...] = Field(
        ("pocket_judge",), strict=False, description="rewards that are measured and never trained on (ours)"
    )
    normalize: Literal["none", "std"] = Field(
        "none",
        description="std: each trained reward is divided by its standard deviation over 64 pictures of the starting generator "
        "(ours)",
    )
    micro_batch: Samples = Field(
        16, description="samples that go through decoder and rewards at once; halved where memory does not hold them (ours)"
    )

    @field_validator("trained")
    @classmethod
    def _distinct(cls, value: tuple[TrainedReward, ...]) -> tuple[TrainedReward, ...]:
        _no_repeats([reward.name for reward in value], ())
        return value

    @field_validator("held_out")
    @classmethod
    def _not_trained(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        _no_repeats(value, [reward.name for reward in info.data.get("trained", ())])
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """Trained ones, then held-out ones."""
        return (*(reward.name for reward in self.trained), *self.held_out)


class Prompts(Section):
    """Where the captions come from; the only data."""

    train: Text = Field(
        "pocket:train",
        description="'pocket:<split>', a .csv, .jsonl, .parquet or .txt file, or 'datasets:<hub id or folder>:<split>' (ours)",
    )
    grid: Text = Field("pocket:grid", description="the prompts of the picture grid, in the same form (ours)")
    column: Text = Field("prompt", description="of both, which holds the prompts; a .txt and the pocket world have one (ours)")
    embeddings: Text | None = Field(
        None,
        description="folder of prompt embeddings, which all machines see: what is missing there is made before the training, "
        "which then holds no text encoder; none: prompts are encoded as they come (ours)",
    )

    @field_validator("train", "grid")
    @classmethod
    def _known_split(cls, value: str) -> str:
        name, _, split = value.partition(":")
        if name == "pocket" and split not in POCKET_SPLITS:
            raise _wrong("unknown split", hint=did_you_mean(value, [f"pocket:{known}" for known in POCKET_SPLITS]))
        return value


class Watch(Section):
    """Whether the reward is being hacked: it rises, and what it stands for does not."""

    every: int = Field(10, ge=0, description="steps between two looks at 64 pictures of the averaged generator; 0: none (ours)")
    on_hacking: Literal["warn", "stop", "lower_scale"] = Field(
        "warn",
        description="what an alarm does beside being written down: nothing, end the run there as if it were finished, or halve "
        "objective.reward_scale from there on (ours)",
    )


class Logging(Section):
    """How often something is written down, in steps."""

    every: Count = Field(5, description="steps between two rows of metrics (ours)")
    grid_every: Count = Field(50, description="steps between two picture grids (ours)")
    grid_prompts: Count = Field(8, description="rows of the grid: this many first prompts of prompts.grid (ours)")
    checkpoint_every: Count = Field(50, description="steps between two checkpoints (ours)")


class RewardEnvironment(Section):
    """Rewards whose packages do not go together with the others': they get actors in an environment of their own."""

    rewards: tuple[RewardName, ...] = Field(strict=False, min_length=1, description="names among trained and held_out")
    runtime_env: Text = Field(description="a Ray runtime environment, a YAML file as of `ray job submit --runtime-env`")


class Cluster(Section):
    """What the Ray runner asks for; `--local` ignores it."""

    workers: Count = Field(1, description="training processes; each takes global_batch_size / workers samples (ours)")
    use_gpu: bool = Field(False, description="one GPU per training process (ours)")
    fully_shard: bool = Field(
        False,
        description="FSDP2: weights, gradients, Adam states and average are spread over the training processes, for full "
        "fine-tuning of what one GPU does not hold (ours)",
    )
    cpus_per_worker: Count = Field(1, description="CPUs per training process (ours)")
    reward_replicas: Count = Field(1, description="reward actors, each with its own decoder and reward models (ours)")
    reward_cpus: NotNegative = Field(1.0, description="CPUs per reward actor, fractions allowed; 0 leaves it uncounted (ours)")
    reward_gpus: NotNegative = Field(0.0, description="GPUs per reward actor, fractions allowed (ours)")
    reward_deadline_s: Positive = Field(300.0, description="seconds after which a silent reward actor is replaced (ours)")
    reward_place: Literal["auto", "actor", "process"] = Field(
        "auto",
        description="where rewards are computed: in reward actors, in the training process, or where the first rounds show "
        "that they hold them up less (ours)",
    )
    reward_environments: tuple[RewardEnvironment, ...] = Field(
        (), strict=False, description="rewards in actors with a runtime environment of their own: {rewards, runtime_env} (ours)"
    )
    worker_resources: dict[Text, Positive] = Field(
        {}, description="per training process, of resources that nodes declare: name -> amount (ours)"
    )
    reward_resources: dict[Text, Positive] = Field(
        {}, description="per reward actor, of resources that nodes declare: name -> amount, fractions allowed (ours)"
    )

    @field_validator("worker_resources", "reward_resources")
    @classmethod
    def _declared_by_nodes(cls, value: dict[str, float]) -> dict[str, float]:
        for name, amount in value.items():
            if name in RAYS_OWN:
                raise _at(name, amount, _wrong(f"should be a resource that nodes declare ({RAYS_OWN[name]})"))
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]*", name):
                raise _at(name, amount, _wrong("should be named in letters, digits, '.', '_', ':' and '-'"))
            if amount > 1 and amount % 1:
                raise _at(name, amount, _wrong("should be a whole number where it is above 1"))
        return value

    @property
    def per_worker(self) -> dict[str, float]:
        """What one training process asks Ray for: resource -> amount."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": 1} if self.use_gpu else {}) | self.worker_resources

    @property
    def per_reward_actor(self) -> dict[str, float]:
        """What one reward actor asks Ray for: resource -> amount."""
        return {"CPU": self.reward_cpus, "GPU": self.reward_gpus} | self.reward_resources


class Tracking(Section):
    """Where MLflow keeps the run."""

    uri: Text | None = Field(
        None,
        description="of the tracking server; none is MLFLOW_TRACKING_URI, else sqlite in the folder of runs (ours)",
    )
    experiment: Text = Field("diffinstruct", description="MLflow's name for the group of runs (ours)")

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, value: str | None) -> str | None:
        if value is not None and value.partition("://")[0] not in TRACKING_SCHEMES:
            raise _wrong(f"should begin with one of {', '.join(f'{scheme}://' for scheme in TRACKING_SCHEMES)}")
        if value is not None and keeps_nothing(value):
            raise _wrong("should name a file: sqlite:///PATH")
        if value is not None and without_password(spelled(value)) != spelled(value):
            raise _wrong(f"should hold no user and password, nor a query, since recipes are shown and kept ({IN_ENVIRONMENT})")
        return value


class Experiment(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        "pocket", description="of the run, part of its folder's name (ours)"
    )
    seed: int = Field(0, ge=0, le=10**9, description="z, t, eps and prompts are functions of (seed, step, sample index) (ours)")
    steps: Count = Field(100, description="alternating rounds (ours)")
    global_batch_size: Samples = Field(32, description="samples per round over all workers (ours)")
    micro_batch_size: Samples | None = Field(
        None,
        description="samples of one training process that go through the networks at once; the gradients of a round's "
        "micro-batches add up, and the generator goes forward twice; none: all of them at once (ours)",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the networks' and the decoder's arithmetic; trained weights stay fp32 (ours)"
    )
    activation_checkpointing: bool = Field(
        False,
        description="networks and decoder keep their blocks' inputs alone and compute the rest again in the backward pass: "
        "less memory, and of di_star's 12 forward passes' worth of work 5 more (ours)",
    )
    compile: bool = Field(
        False, description="torch.compile of generator, score network and reference: minutes at the start, faster rounds (ours)"
    )
    deterministic: bool = Field(
        False,
        description="of a GPU those kernels alone that give the same bits each time, as a CPU's do: slower; what has no such "
        "kernel ends the run by its name (ours)",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one (ours)")
    reference: Reference = Reference()
    generator: Generator = Generator()
    score_network: ScoreNetwork = ScoreNetwork()
    objective: Objective = Objective()
    rewards: Rewards = Rewards()
    prompts: Prompts = Prompts()
    watch: Watch = Watch()
    logging: Logging = Logging()
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()
    runs: Text = Field("runs", description="folder of run folders, relative to where the command is typed (ours)")
    mirror: Text | None = Field(
        None,
        description="URL in an object store, such as s3://bucket/runs, that gets a copy of each checkpoint and of the rest of "
        "a run's folder; where that is lost or behind, the run goes on from there (ours)",
    )

    @field_validator("mirror")
    @classmethod
    def _known_store(cls, value: str | None) -> str | None:
        if value is None:
            return None
        from fsspec import available_protocols

        kind, separator, place = value.partition("://")
        known = [name for name in available_protocols() if name not in NO_STORES]
        if not separator or kind not in known:
            raise _wrong("should begin with s3://, gs://, az:// or what else fsspec knows", did_you_mean(kind, known))
        if "::" in value or not place.strip("/"):
            raise _wrong("should name one bucket or folder")
        shown = re.sub(r"^abfs://[^/@:]+@", "abfs://", spelled(value))  # container@account is how Azure says it
        if "?" in value or without_password(shown) != shown:
            raise _wrong("should hold no keys, since recipes are shown and kept (the environment has them)")
        if kind == "file" and (not place.startswith("/") or ".." in place.split("/")):
            raise _wrong("should be an absolute path without '..'")
        return value

    @field_validator("compile")
    @classmethod
    def _keeps_activations(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("activation_checkpointing"):
            raise _wrong("should be false with activation_checkpointing: torch.compile knows no role that is played again")
        return value

    @field_validator("generator")
    @classmethod
    def _same_world(cls, value: Generator, info: ValidationInfo) -> Generator:
        reference = info.data.get("reference", Reference())
        if value.start == "pocket-distilled" and reference.model != "pocket":
            raise _at("start", value.start, _wrong(f"belongs to the pocket world, but reference.model is {reference.model!r}"))
        return value

    @field_validator("generator")
    @classmethod
    def _start_of_an_adapter(cls, value: Generator) -> Generator:
        if value.start_rank and (not value.lora_rank or value.start == "reference"):
            why = "start is the reference" if value.lora_rank else "lora_rank is 0"
            raise _at("start_rank", value.start_rank, _wrong(f"should be 0 where {why}"))
        return value

    @field_validator("rewards")
    @classmethod
    def _something_to_climb(cls, value: Rewards, info: ValidationInfo) -> Rewards:
        objective = info.data.get("objective", Objective(reward_scale=0.0))
        if not value.trained and (objective.reward_scale or objective.name == "reward_only"):
            raise _at("trained", [], _wrong("should name a reward (only objective.reward_scale 0 goes without)"))
        return value

    @field_validator("cluster")
    @classmethod
    def _fits_the_batch(cls, value: Cluster, info: ValidationInfo) -> Cluster:
        batch = info.data.get("global_batch_size", 0)
        if batch % value.workers:
            raise _at("workers", value.workers, _wrong(f"should divide global_batch_size ({batch})"))
        if value.use_gpu and info.data.get("device") == "cpu":
            raise _at("use_gpu", value.use_gpu, _wrong("should be false where device is 'cpu'"))
        return value

    @field_validator("cluster")
    @classmethod
    def _whole_networks(cls, value: Cluster, info: ValidationInfo) -> Cluster:
        adapted = [key for key in ("generator", "score_network") if key in info.data and info.data[key].lora_rank]
        if value.fully_shard and value.workers == 1:
            raise _at("fully_shard", True, _wrong("should be false with one worker: there is nobody to share with"))
        if value.fully_shard and adapted:
            raise _at("fully_shard", True, _wrong(f"should be false with {adapted[0]}.lora_rank: adapters fit every GPU"))
        return value

    @field_validator("cluster")
    @classmethod
    def _environments_of_rewards(cls, value: Cluster, info: ValidationInfo) -> Cluster:
        known = info.data["rewards"].names if "rewards" in info.data else ()
        placed: set[str] = set()
        for i, environment in enumerate(value.reward_environments):
            for name in environment.rewards:
                if known and name not in known:
                    hint = did_you_mean(name, known)
                    raise _at("reward_environments", name, _wrong(f"item {i} names no reward of this run", hint))
                if name in placed:
                    raise _at("reward_environments", name, _wrong("a reward has one environment, this one is named twice"))
                placed.add(name)
        if placed and value.reward_place == "process":
            raise _at("reward_place", "process", _wrong("should be 'actor' where cluster.reward_environments names rewards"))
        return value

    @property
    def reward_actors(self) -> int:
        """How many the Ray runner starts: replicas of a group for each environment, and of one for all other rewards."""
        apart = [name for environment in self.cluster.reward_environments for name in environment.rewards]
        groups = len(self.cluster.reward_environments) + (len(self.rewards.names) > len(apart))
        return 0 if self.cluster.reward_place == "process" else self.cluster.reward_replicas * groups

    @property
    def derived_id(self) -> str:
        """12 hex digits that name the configuration; where runs are kept, tracked and placed is no part of it."""
        content = self.model_dump(mode="json", exclude=WHEREABOUTS)
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]

    def changes(self, before: Experiment) -> dict[str, tuple[Any, Any]]:
        """Keys that differ from `before`, with (before, now); what `derived_id` passes over is passed over here."""
        then, now = (dict(_flat(Experiment, e.model_dump(mode="json", exclude=WHEREABOUTS))) for e in (before, self))
        return {k: (then[k], now[k]) for k in now if then[k] != now[k]}

    def public(self) -> Experiment:
        """The same without a tracking server's address that holds a password or a query, which came from the environment."""
        uri = self.tracking.uri
        return self if uri is None or without_password(uri) == uri else self.tracked_at(None)

    def tracked_at(self, uri: str | None) -> Experiment:
        """The same with another tracking.uri, also one from the environment."""
        return self.model_copy(update={"tracking": self.tracking.model_copy(update={"uri": uri})})

    def to_params(self) -> dict[str, str | int | float | bool | None]:
        """The whole configuration as one flat dictionary, "objective.t_min" -> 20; lists and mappings as JSON text."""
        return dict(_flat(Experiment, self.model_dump(mode="json")))

    def to_yaml(self) -> str:
        """The whole configuration, defaults included; `load` reads it back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _flat(kind: type[Section], content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        part = kind.model_fields[key].annotation
        if isinstance(part, type) and issubclass(part, Section):
            yield from _flat(part, value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value) if isinstance(value, list | dict) else value


# ------------------------------------------------------------------------------------------------------- reading
Loc = tuple[str | int, ...]
"""The keys and indices that lead to a value: ("rewards", "trained", 0, "weight")."""


def load(path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
    """The experiment of a YAML file with `a.b=value` overrides, whose values are YAML too.

    Raises ConfigErrors with every mistake, one line each: `file:line: key: what, got ..., did you mean ...`. The file of
    an override is `-s`.
    """
    source = _Source()
    source.read_file(Path(path))
    for override in overrides:
        source.override(override)
    try:
        experiment = Experiment.model_validate(source.values)
    except ValidationError as error:
        for mistake in error.errors(include_url=False):
            source.mistake(mistake["loc"], _describe(mistake["type"], mistake))
    else:
        if not source.mistakes:
            return experiment
    raise ConfigErrors([line for _, line in sorted(source.mistakes, key=lambda mistake: mistake[0])])


MOST_VALUES = 100_000
"""In one configuration."""
LARGEST = 4 << 20
"""Bytes of one configuration."""


class _Loader(yaml.SafeLoader):
    """YAML whose `1e-4` is a number, as in YAML 1.2 and everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)

_OLD_NUMBER = re.compile(r"[-+]?0[\d_]+$|.*:", re.DOTALL)
"""What YAML 1.1 reads in base 8 or 60: 010 as eight, 1:30 as ninety."""


class _Source:
    """Values as they were written, and where: what a mistake in them is reported with."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.places: dict[Loc, tuple[int, str]] = {}  # (line, "file:line"); overrides come after every line
        self.mistakes: list[tuple[int, str]] = []
        self._values_read = 0

    def read_file(self, path: Path) -> None:
        """Raises ConfigErrors where there is no file or no YAML in it: nothing more can be said then."""
        self.places[()] = (1, f"{path}:1")
        try:
            with path.open("rb") as file:
                content = file.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise ConfigErrors([f"{path}: larger than {LARGEST >> 20} MiB, which no recipe is"])
            text = content.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            near = nearest_file(path, "*.y*ml") if isinstance(error, FileNotFoundError) else ""
            raise ConfigErrors([f"{path}: {what}{near}"]) from None
        values = self._parse(text, (), lambda line: (line, f"{path}:{line}"))
        if isinstance(values, dict):
            self.values = values
        elif values is not None:
            raise ConfigErrors([f"{path}:1: should hold `key: value` lines, got {_short(values)}"])

    def override(self, override: str) -> None:
        key, equals, text = override.partition("=")
        *parents, last = key.split(".")
        if not (equals and last and all(parents)):
            self.mistakes.append((_LAST, f"-s: {override}: should be key=value"))
            return
        section: Any = self.values
        for depth, parent in enumerate(parents, start=1):
            section = section.setdefault(parent, {})
            self.places.setdefault(tuple(parents[:depth]), (_LAST, "-s"))
            if not isinstance(section, dict):
                self.mistakes.append((_LAST, f"-s: {key}: {_dotted(parents[:depth])!r} is no section"))
                return
        loc = (*parents, last)
        try:
            value = self._parse(text, loc, lambda line: (_LAST, "-s"))
        except ConfigErrors as error:
            self.mistakes += [(_LAST, line) for line in error.errors]
            return
        self.places = {place: where for place, where in self.places.items() if place[: len(loc)] != loc}
        self.places[loc] = (_LAST, "-s")
        section[last] = value

    def mistake(self, loc: Loc, what: str) -> None:
        """Note a mistake at the line of its key or, where that was not written, of the section around it."""
        written = next(loc[:n] for n in range(len(loc), -1, -1) if loc[:n] in self.places)
        line, place = self.places[written]
        self.mistakes.append((line, f"{place}: {_dotted(loc)}: {what}"))

    def _parse(self, text: str, loc: Loc, place: Callable[[int], tuple[int, str]]) -> Any:
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return None if node is None else self._construct(loader, node, loc, place)
        except RecursionError:
            raise ConfigErrors([f"{place(1)[1]}: nested too deeply, or into itself"]) from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = place(mark.line + 1 if mark else 1)[1]
            key = f"{_dotted(loc)}: " if loc else ""
            what = " ".join(str(getattr(error, "problem", None) or error).split())
            raise ConfigErrors([f"{where}: {key}not YAML: {what}"]) from None

    def _construct(self, loader: _Loader, node: yaml.Node, loc: Loc, place: Callable[[int], tuple[int, str]]) -> Any:
        self._values_read += 1
        if self._values_read > MOST_VALUES:  # ten aliases of ten aliases of ... are few lines
            raise yaml.MarkedYAMLError(problem=f"more than {MOST_VALUES} values, with aliases", problem_mark=node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.places[*loc, i] = place(item.start_mark.line + 1)
            return [self._construct(loader, item, (*loc, i), place) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            try:
                if _OLD_NUMBER.match(node.value) and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
                    return node.value
                value = loader.construct_object(node)
                repr(value)  # more digits than Python prints are a ValueError here, if they are hexadecimal ones
                return value
            except (ValueError, LookupError, AttributeError):  # it looks like a date and is none, or says that it is one
                what = f"{_short(node.value)} is no {node.tag.rpartition(':')[2]}"
                raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark) from None
        values = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key should be a word", problem_mark=key_node.start_mark)
            key = str(key_node.value)
            line, where = place(key_node.start_mark.line + 1)
            if key in values:
                self.mistakes.append((line, f"{where}: {_dotted((*loc, key))}: written twice"))
                continue
            self.places[*loc, key] = (line, where)
            values[key] = self._construct(loader, value_node, (*loc, key), place)
        return values


_LAST = sys.maxsize


def _dotted(loc: Iterable[str | int]) -> str:
    """In one line, whatever somebody has written as a key."""
    return ".".join(map(_printable, loc))


def _printable(part: object) -> str:
    text = str(part)
    return text if text.isprintable() else repr(text)


def _short(value: object) -> str:
    text = without_password(repr(spelled(value) if isinstance(value, str) and "://" in value else value))
    return text if len(text) <= 80 else text[:77] + "..."


def _known(loc: Loc) -> Any:
    """The type at `loc`: a section, a Literal, ..."""
    kind: Any = Experiment
    for key in loc:
        kind = get_args(kind)[0] if isinstance(key, int) else kind.model_fields[key].annotation
    return kind


def _keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields below a section."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _describe(kind: str, mistake: Any) -> str:
    """What is wrong in words, what was got, and the nearest name that would be right."""
    loc, got, context = mistake["loc"], f", got {_short(mistake['input'])}", mistake.get("ctx", {})
    match kind:
        case "extra_forbidden":
            here = did_you_mean(loc[-1], _known(loc[:-1]).model_fields)
            elsewhere = [key for key in _keys(Experiment) if key.rpartition(".")[2] == loc[-1]]
            there = f", did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else ""
            return f"unknown key{here or there}"
        case "missing":
            return "is missing"
        case "literal_error":
            return f"should be {context['expected']}{got}{did_you_mean(mistake['input'], get_args(_known(loc)))}"
        case "model_type":
            return f"should be a section with keys of its own{got}"
        case "string_pattern_mismatch":
            return f"should be letters, digits, '.', '_' and '-' only{got}"
        case "rule":
            return f"{context['what']}{got}{context['hint']}"
    what = mistake["msg"][mistake["msg"].find("should") :]  # "Input should be greater than 0"
    return what.replace("valid integer", "whole number").replace("valid ", "").replace("tuple", "list") + got
