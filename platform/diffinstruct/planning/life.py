"""The memory of a training process's whole life: what it takes is the most that any part of it does.

A run loads its networks, may go on from a checkpoint, validates rewards, trains, and writes the export. Sizes are in
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from diffinstruct.config.experiment import Experiment
from diffinstruct.method.precision import DTYPES
from diffinstruct.planning.footprint import Footprint, Passes

SHARDED = ("generator", "score network", "reference")
CUDA_CONTEXT = 2**29
"""What a process takes on a GPU beside its tensors: the context and the kernels' code, 0.3 to 0.5 GiB by card and
driver, and the libraries' workspaces. From NVIDIA's tools, not measured here."""
FRAGMENTATION = 0.05
"""The share of a GPU's memory in use that the allocator holds and cannot use. With expandable segments, which every
process of ours asks for, it is small; this much is assumed, not measured."""


@dataclass(frozen=True)
class ModelMemory:
    """One model of a training process or of a reward actor: parameters, bytes, and passes per sample and step."""

    name: str
    parameters: int
    weights: int
    trained: bool = False  # then it has gradients and two Adam states beside its weights
    averaged: bool = False
    passes: Passes = field(default_factory=Passes)

    @property
    def memory(self) -> int:
        return self.weights * (1 + 3 * self.trained + self.averaged)


@dataclass(frozen=True)
class Life:
    """The life of a training process.

    models: what it holds, the networks of the roles under the names of SHARDED.
    network: parameters of one network; block: of its largest block, which a sharded network gathers.
    others: parameters of the largest other part of the pipeline.
    conditions: bytes of prompts' conditions, in main memory.
    training, validation: what comes and goes in a round, and in the validation of rewards, where it is done here.
    """

    experiment: Experiment
    models: Sequence[ModelMemory]
    network: int
    block: int
    others: int
    conditions: int
    training: Footprint
    validation: Footprint | None

    @property
    def shares(self) -> int:
        cluster = self.experiment.cluster
        return (cluster.shard_degree or cluster.workers) if cluster.fully_shard else 1

    def _own(self, copies: int, averages: int, trained: int) -> float:
        """Bytes of so many copies of all weights, averaged ones and trained ones; networks of the roles are sharded."""
        sizes = {m.name: m.weights * (copies + averages * m.averaged + trained * m.trained) for m in self.models}
        return sum(size / (self.shares if name in SHARDED else 1) for name, size in sizes.items())

    @property
    def held(self) -> float:
        """Weights, gradients, Adam states and average."""
        return self._own(1, 1, 3)

    @property
    def checkpoint(self) -> float:
        """This process's part of one: trained weights, Adam states and average."""
        return self._own(0, 1, 3)

    @property
    def gathered(self) -> int:
        """Of the largest block: its weights, the next one's, its gradient, in the arithmetic's precision and in fp32."""
        return self.block * (10 if self.experiment.precision == "bf16" else 16) * (self.shares > 1)

    @property
    def file(self) -> int:
        """The largest file of weights, in fp32: it is in memory while a part is made of it."""
        return 4 * max(self.network, *(model.parameters for model in self.models))

    @property
    def exporting(self) -> int:
        """What the export takes beside: the network as it is stored, or another part and its file. fp32 weights that are
        in main memory are not copied; adapters are merged with what the network's file says."""
        experiment = self.experiment
        size, lora = DTYPES[experiment.export.dtype].itemsize, experiment.generator.lora_rank > 0
        copied = lora or size < 4 or experiment.cluster.use_gpu or self.shares > 1
        read = 4 * self.network * (lora and experiment.precision == "bf16")
        return max(size * self.network * copied + read, (4 + size) * self.others)

    @property
    def parts(self) -> dict[str, float]:
        """What each part takes where the networks are: on a GPU, or in main memory, where checkpoints are copied and the
        export is made, too."""
        in_ram = not self.experiment.cluster.use_gpu
        validation = self.validation.passing if self.validation else 0
        parts = {
            "loading": self._own(1, 1, 0) + max(self.file, self.checkpoint) * in_ram,
            "validation": self._own(1, 1, 2) + validation,
            "rounds": self.held + self.gathered + self.training.passing + self.checkpoint * in_ram,
        }
        return parts | ({"export": self.held + self.checkpoint + self.exporting} if in_ram else {})

    @property
    def most(self) -> float:
        """The most that the process takes where its networks are."""
        return on_gpu(max(self.parts.values())) if self.experiment.cluster.use_gpu else max(self.parts.values())

    @property
    def in_ram(self) -> float:
        """Main memory of all training processes, without their libraries: the first one also copies checkpoints and
        exports; where networks are sharded, each copies its part."""
        workers, copies = self.experiment.cluster.workers, self.checkpoint * (self.shares > 1)
        if self.experiment.cluster.use_gpu:
            first = self.checkpoint + max(self.file, self.exporting)
            return first + (workers - 1) * (copies + self.file * (self.shares == 1)) + workers * self.conditions
        without = {name: size for name, size in self.parts.items() if name != "export"}
        others = max(without.values()) - self.checkpoint + copies
        return max(self.parts.values()) + (workers - 1) * others + workers * self.conditions


def on_gpu(size: float) -> float:
    """What a process takes of a GPU for so many bytes of tensors."""
    return size * (1 + FRAGMENTATION) + CUDA_CONTEXT
