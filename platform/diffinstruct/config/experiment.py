"""A run as one value: what is trained, on what, against what, and where; frozen and typed.

`Experiment()` is the pocket recipe. Each field says its unit and where its default comes from, a section of arXiv
2410.20898 or "ours", whether it may change in a run that has begun, and whether it is part of what the run computes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationInfo, field_validator

from diffinstruct.config.addresses import NO_STORES, quote_uri, redact
from diffinstruct.config.fields import (
    POCKET,
    POCKET_DISTILLED,
    Count,
    Location,
    Samples,
    Section,
    broken_rule,
    key,
    keys_with,
    mistake_at,
)
from diffinstruct.config.sections import (
    ClusterConfig,
    ExportConfig,
    GeneratorConfig,
    LoggingConfig,
    ObjectiveConfig,
    OveroptimizationConfig,
    PromptsConfig,
    ReferenceConfig,
    RewardsConfig,
    ScoreNetworkConfig,
    TrackingConfig,
)
from diffinstruct.errors import did_you_mean
from diffinstruct.method.objectives import facts


class Experiment(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = key(
        "pocket", "of the run, part of its folder's name (ours)", identity=False
    )
    seed: int = key(0, "z, t, eps and prompts are functions of (seed, step, sample index) (ours)", ge=0, le=10**9)
    steps: Count = key(100, "alternating rounds (ours)", resume=True)
    global_batch_size: Samples = key(32, "samples per round over all workers (ours)", resume=True)
    micro_batch_size: Samples | None = key(
        None,
        "samples of one training process that go through the networks at once; the gradients of a round's "
        "micro-batches add up, and the generator goes forward twice; none: all of them at once (ours)",
        resume=True,
    )
    precision: Literal["fp32", "bf16"] = key(
        "fp32",
        "of the networks' and the decoder's arithmetic; fp32: float32 all through, on a GPU without TF32; bf16: what is "
        "frozen is held and what is computed is rounded to it, the rest of the arithmetic is TF32 on a GPU; trained weights "
        "stay fp32 (ours)",
        resume=True,
    )
    activation_checkpointing: bool = key(
        False,
        "networks and decoder keep their blocks' inputs alone and compute the rest again in the backward "
        "pass: less memory, and of di_star's 12 forward passes' worth of work 5 more (ours)",
        resume=True,
    )
    compile: bool = key(
        False,
        "torch.compile of generator, score network and reference: minutes at the start, faster rounds (ours)",
        resume=True,
    )
    deterministic: bool = key(
        False,
        "of a GPU those kernels alone that give the same bits each time, as a CPU's do: slower; what has "
        "no such kernel ends the run by its name (ours)",
        resume=True,
    )
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: a GPU where there is one (ours)", resume=True)
    reference: ReferenceConfig = ReferenceConfig()
    generator: GeneratorConfig = GeneratorConfig()
    score_network: ScoreNetworkConfig = ScoreNetworkConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    rewards: RewardsConfig = RewardsConfig()
    prompts: PromptsConfig = PromptsConfig()
    overoptimization: OveroptimizationConfig = OveroptimizationConfig()
    logging: LoggingConfig = LoggingConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    export: ExportConfig = ExportConfig()
    output_dir: Location = key("runs", "folder of run folders, relative to where the command is typed (ours)", identity=False)
    mirror: Location | None = key(
        None,
        "URL in an object store, such as s3://bucket/runs, that gets a copy of each checkpoint and of the "
        "rest of a run's folder; where that is lost or behind, the run goes on from there (ours)",
        identity=False,
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
            raise broken_rule("should begin with s3://, gs://, az:// or what else fsspec knows", did_you_mean(kind, known))
        if "::" in value or not place.strip("/"):
            raise broken_rule("should name one bucket or folder")
        shown = re.sub(r"^abfs://[^/@:]+@", "abfs://", quote_uri(value))  # container@account is how Azure says it
        if "?" in value or redact(shown) != shown:
            raise broken_rule("should hold no keys, since recipes are shown and kept (the environment has them)")
        if kind == "file" and (not place.startswith("/") or ".." in place.split("/")):
            raise broken_rule("should be an absolute path without '..'")
        return value

    @field_validator("compile")
    @classmethod
    def _keeps_activations(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("activation_checkpointing"):
            raise broken_rule("should be false with activation_checkpointing: torch.compile knows no role that is played again")
        return value

    @field_validator("generator")
    @classmethod
    def _starts_from_what_is_there(cls, value: GeneratorConfig, info: ValidationInfo) -> GeneratorConfig:
        model = info.data.get("reference", ReferenceConfig()).model
        if value.init_from == POCKET_DISTILLED and model != POCKET:
            raise mistake_at("init_from", value.init_from, f"belongs to the pocket world, but reference.model is {model!r}")
        if value.init_rank and (not value.lora_rank or value.init_from == "reference"):
            why = "init_from is the reference" if value.lora_rank else "lora_rank is 0"
            raise mistake_at("init_rank", value.init_rank, f"should be 0 where {why}")
        return value

    @field_validator("rewards")
    @classmethod
    def _something_to_climb(cls, value: RewardsConfig, info: ValidationInfo) -> RewardsConfig:
        objective = info.data.get("objective", ObjectiveConfig(reward_scale=0.0))
        if not value.trained and (objective.reward_scale or not facts(objective.name).divergence):
            raise mistake_at("trained", [], "should name a reward (only objective.reward_scale 0 goes without)")
        return value

    @field_validator("cluster")
    @classmethod
    def _workers_fit_the_run(cls, value: ClusterConfig, info: ValidationInfo) -> ClusterConfig:
        batch = info.data.get("global_batch_size", 0)
        if batch % value.workers:
            raise mistake_at("workers", value.workers, f"should divide global_batch_size ({batch})")
        if value.use_gpu and info.data.get("device") == "cpu":
            raise mistake_at("use_gpu", value.use_gpu, "should be false where device is 'cpu'")
        adapted = [name for name in ("generator", "score_network") if name in info.data and info.data[name].lora_rank]
        if value.fully_shard and value.workers == 1:
            raise mistake_at("fully_shard", True, "should be false with one worker: there is nobody to share with")
        if value.shard_degree and not value.fully_shard:
            raise mistake_at("shard_degree", value.shard_degree, "should be none where fully_shard is false")
        if value.shard_degree and value.workers % value.shard_degree:
            raise mistake_at("shard_degree", value.shard_degree, f"should divide cluster.workers ({value.workers})")
        if value.fully_shard and adapted:
            raise mistake_at("fully_shard", True, f"should be false with {adapted[0]}.lora_rank: adapters fit every GPU")
        return value

    @field_validator("cluster")
    @classmethod
    def _environments_of_rewards(cls, value: ClusterConfig, info: ValidationInfo) -> ClusterConfig:
        known = info.data["rewards"].names if "rewards" in info.data else ()
        environments, placed = ("rewards", "environments"), set[str]()
        for i, name in ((i, name) for i, each in enumerate(value.rewards.environments) for name in each.rewards):
            if known and name not in known:
                raise mistake_at(environments, name, f"item {i} names no reward of this run", did_you_mean(name, known))
            if name in placed:
                raise mistake_at(environments, name, "a reward has one environment, this one is named twice")
            placed.add(name)
        if placed and value.rewards.placement == "process":
            what = "should be 'actor' where cluster.rewards.environments names rewards"
            raise mistake_at(("rewards", "placement"), "process", what)
        return value

    @property
    def reward_actors(self) -> int:
        """How many the Ray runner starts: `replicas` for each environment, and for all other rewards."""
        asked = self.cluster.rewards
        groups = len(asked.environments) + (len(self.rewards.names) > len(asked.apart))
        return 0 if asked.placement == "process" else asked.replicas * groups

    @property
    def identity(self) -> dict[str, Any]:
        """What the run computes: the flat configuration without its name, where it is kept and how it is placed."""
        aside = keys_with(Experiment, "identity", False)
        return {name: value for name, value in self.to_params().items() if name not in aside}

    @property
    def config_hash(self) -> str:
        """12 hex digits that name the run's identity."""
        content = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def changes(self, before: Experiment) -> dict[str, tuple[Any, Any]]:
        """Keys of the identity that differ from `before`, with (before, now)."""
        then, now = before.identity, self.identity
        return {name: (then.get(name), now.get(name)) for name in {**now, **then} if then.get(name) != now.get(name)}

    def without_secrets(self) -> Experiment:
        """The same without a tracking server's address that holds a password or a query, as the environment's may."""
        uri = self.tracking.uri
        return self if uri is None or redact(uri) == uri else self.tracked_at(None)

    def tracked_at(self, uri: str | None) -> Experiment:
        """The same with another tracking.uri, also one from the environment."""
        return self.model_copy(update={"tracking": self.tracking.model_copy(update={"uri": uri})})

    def with_absolute_embeddings(self) -> Experiment:
        """The same with an absolute `prompts.embeddings`: processes of a cluster may stand in folders of their own."""
        if self.prompts.embeddings is None:
            return self
        absolute = {"embeddings": os.path.abspath(self.prompts.embeddings)}
        return self.model_copy(update={"prompts": self.prompts.model_copy(update=absolute)})

    def to_params(self) -> dict[str, str | int | float | bool | None]:
        """The whole configuration as one flat dictionary, "objective.t_min" -> 20; lists and mappings as JSON text, but for
        the arguments of objective and distance, which are keys of their own: "objective.distance_args.c"."""
        return dict(_flat(Experiment, self.model_dump(mode="json")))

    def to_yaml(self) -> str:
        """The whole configuration, defaults included; `load` reads it back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _flat(kind: type[Section], content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        part = kind.model_fields[name].annotation
        if isinstance(part, type) and issubclass(part, Section):
            yield from _flat(part, value, f"{prefix}{name}.")
        elif name in ("args", "distance_args"):  # sweeps vary them one by one, and pages name them
            for argument, setting in value.items():
                yield f"{prefix}{name}.{argument}", json.dumps(setting) if isinstance(setting, list) else setting
        else:
            yield prefix + name, json.dumps(value) if isinstance(value, list | dict) else value
