"""Blocks that repeat are counted once: a network's other blocks of the same kind play the first one's figures back.

A kind is a block's structure with the shapes that it is given, in one role and one grad mode. The first call of a kind
runs the block by itself, forward and backward, and records what that takes. Every call, the first one too, then makes
tensors of the recorded sizes alone: its outputs, what its graph keeps, its gradients. Autograd, checkpointing and
autocast around the blocks are the round's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from diffinstruct.planning.footprint import Count


@dataclass(frozen=True)
class Cost:
    """What an action takes: bytes, the most at once, beyond those that are there when it begins; and FLOPs."""

    peak: int = 0
    flops: int = 0


@dataclass(frozen=True)
class _Like:
    """A tensor as to its shape."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Like:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)

    @property
    def nbytes(self) -> int:
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize * (0 not in self.shape)


@dataclass(frozen=True)
class _Record:
    """What one call of a kind takes.

    outputs: of its tensors; `answer` makes of them what the block returns.
    saved: bytes that its graph keeps, beside the inputs and outputs that it keeps (`kept`) and the `casts`, copies of
        its weights that autocast makes and keeps until it ends.
    recomputation: the forward pass up to the last tensor that is saved, where a checkpoint breaks off.
    to_inputs, to_weights: its backward pass that ends at the inputs, and one that reaches the weights of which
        `trained` says that they get a gradient.
    """

    outputs: list[_Like]
    answer: Callable[[Sequence[Tensor]], Any]
    forward: Cost
    recomputation: Cost
    casts: int
    saved: int = 0
    kept: tuple[bool, ...] = ()
    to_inputs: Cost = Cost()
    to_weights: Cost = Cost()
    trained: tuple[bool, ...] = ()

    @property
    def differentiable(self) -> bool:
        return any(output.requires_grad for output in self.outputs)


@dataclass(frozen=True)
class _Block:
    """A block, by its kind, its own forward function, its weights, and the list of adapters that it adds."""

    kind: int
    forward: Callable[..., Any]
    weights: list[Tensor]
    adapters: list[str]


class Repeats:
    """The blocks of the networks of a round, counted once a kind."""

    def __init__(self, count: Count) -> None:
        self.count = count
        self._kinds: dict[Any, int] = {}
        self._records: dict[Any, _Record] = {}
        self._casts: dict[Any, Tensor] = {}  # by block and adapters, until autocast ends

    @contextmanager
    def counted(self) -> Iterator[None]:
        """In the block, autocast that ends lets go of the casts that its cache is taken to hold."""
        clear = torch.clear_autocast_cache

        def cleared() -> None:
            self._casts.clear()
            clear()

        with mock.patch.object(torch, "clear_autocast_cache", cleared):
            yield

    def put_into(self, network: Any) -> None:
        """Count the blocks of this network once a kind; it has its weights by now."""
        names = {*(network._no_split_modules or ())}
        for block in [module for module in network.modules() if type(module).__name__ in names]:
            if any(type(inner).__name__ in names for inner in block.modules() if inner is not block):
                continue  # it is the inner ones that repeat
            if not isinstance(block.forward, partial):  # roles over one base share its network
                kind = self._kinds.setdefault(_structure(block), len(self._kinds))
                adapters = next((inner._active_adapter for inner in block.modules() if hasattr(inner, "_active_adapter")), [])
                block.forward = partial(self._call, _Block(kind, block.forward, [*block.parameters()], adapters))

    def _call(self, block: _Block, *arguments: Any, **more: Any) -> Any:
        leaves, spec = tree_flatten((arguments, more))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *block.weights))
        seen = tuple(_Like.of(leaf) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
        key = (block.kind, tuple(block.adapters), graph, torch.is_autocast_enabled("cpu"), str(spec), seen)
        if key not in self._records:
            self._records[key] = self._recorded(block, leaves, spec, graph)
        record = self._records[key]
        recomputed = torch._C._current_graph_task_id() != -1  # a checkpointed block, within a backward pass
        self.count.spend(record.recomputation if recomputed else record.forward)
        casts = self._cast(block, record)
        if record.differentiable:
            outputs = _Replay.apply(self.count, record, casts, block.weights, len(inputs), *inputs, *block.weights)
        else:
            outputs = [output.empty() for output in record.outputs]
        return record.answer(outputs)

    def _cast(self, block: _Block, record: _Record) -> Tensor | None:
        if not record.casts:
            return None
        place = (id(block), *block.adapters)
        if place not in self._casts:
            self._casts[place] = torch.empty(record.casts, dtype=torch.uint8)
        return self._casts[place]

    def _recorded(self, block: _Block, leaves: list[Any], spec: Any, graph: bool) -> _Record:
        with _apart(graph):
            first = _Trial(self.count, block, leaves, spec)
            if not first.record.differentiable:
                return first.record
            kept = first.kept()
            to_inputs, trained = first.backward(weights=False)
            record = replace(first.record, kept=kept, to_inputs=to_inputs, trained=trained)
            if not any(weight.requires_grad for weight in block.weights):
                return record
            to_weights, trained = _Trial(self.count, block, leaves, spec).backward(weights=True)
        return replace(record, to_weights=to_weights, trained=trained)


class _Trial:
    """One call of a block by itself, on tensors like those that it is given."""

    def __init__(self, count: Count, block: _Block, leaves: list[Any], spec: Any) -> None:
        self.count, self.block = count, block
        # The clones are no leaves, which a graph holds in any case
        self.roots = [_Like.of(leaf).empty() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.inputs = list(self.roots)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad and torch.is_grad_enabled():
                self.inputs[i] = self.roots[i].requires_grad_().clone()
        before, count.casts = count.live, 0
        count.cast_from = {id(weight) for weight in block.weights}
        saves = [Cost()]

        def save(tensor: Tensor) -> Tensor:
            saves.append(Cost(count.peak - before, count.flops))
            return tensor.detach()  # the tensor itself may be what its own graph has made, which would keep it for ever

        with saved_tensors_hooks(save, lambda tensor: tensor):
            (outputs, answer), forward = count.measured(partial(self._forward, spec))
        count.cast_from = set()
        likes, casts = [_Like.of(output) for output in outputs], count.casts
        saved = count.live - before - sum(like.nbytes for like in likes)
        self.record = _Record(likes, answer, forward, saves[-1], casts, max(0, saved - casts))
        self.outputs = outputs
        self.source = (
            _Source.apply(*(output for output in outputs if output.requires_grad)) if torch.is_grad_enabled() else None
        )

    def _forward(self, spec: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
        arguments, more = tree_unflatten(self.inputs, spec)
        leaves, spec_out = tree_flatten(self.block.forward(*arguments, **more))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        outputs = [leaves[i] for i in places]
        rest = [None if i in places else leaf for i, leaf in enumerate(leaves)]

        def answer(tensors: Sequence[Tensor]) -> Any:
            filled = list(rest)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            return tree_unflatten(filled, spec_out)

        return outputs, answer

    def backward(self, weights: bool) -> tuple[Cost, tuple[bool, ...]]:
        """What the backward pass takes, to the inputs or to inputs and weights, and which weights get a gradient."""
        roots = [root for root in self.roots if isinstance(root, Tensor) and root.requires_grad]
        trainable = [weight for weight in self.block.weights if weight.requires_grad] if weights else []
        self.outputs, self.inputs = [], []
        if not [*roots, *trainable]:
            return Cost(), (False,) * len(self.block.weights)
        run = partial(torch.autograd.grad, self.source, [*roots, *trainable], allow_unused=True)
        gradients, cost = self.count.measured(run)
        # The outputs' gradients are there when a block's backward pass begins
        arrived = sum(like.nbytes for like in self.record.outputs if like.requires_grad)
        got = iter(gradients[len(roots) :])
        reached = tuple(weights and weight.requires_grad and next(got) is not None for weight in self.block.weights)
        return Cost(max(0, cost.peak - arrived), cost.flops), reached

    def kept(self) -> tuple[bool, ...]:
        """Which of its inputs and outputs the graph keeps."""
        kept = []
        for i in range(len(self.inputs)):
            if isinstance(self.inputs[i], Tensor):
                before = self.count.live
                if self.roots[i] is self.inputs[i]:
                    self.roots[i] = None
                self.inputs[i] = None
                kept.append(self.count.live == before)
        while self.outputs:
            before = self.count.live
            del self.outputs[0]
            kept.append(self.count.live == before)
        return tuple(kept)


class _Replay(Function):
    """A call of a block whose kind is recorded."""

    @staticmethod
    def forward(
        ctx: Any, count: Count, record: _Record, casts: Tensor | None, weights: list[Tensor], n: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = [output.empty() for output in record.outputs]
        saved = [torch.empty(record.saved, dtype=torch.uint8)] + ([] if casts is None else [casts])
        kept = [tensor for tensor, is_kept in zip((*tensors[:n], *outputs), record.kept, strict=True) if is_kept]
        ctx.save_for_backward(*saved, *kept)
        ctx.mark_non_differentiable(*(o for o, like in zip(outputs, record.outputs, strict=True) if not like.requires_grad))
        ctx.set_materialize_grads(False)
        ctx.count, ctx.record, ctx.weights = count, record, weights
        ctx.inputs = [_Like.of(tensor) for tensor in tensors[:n]]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018  where a block is checkpointed, this computes it again
        record = ctx.record
        first = next((weight for weight, reached in zip(ctx.weights, record.trained, strict=False) if reached), None)
        to_weights = first is not None and torch._C._will_engine_execute_node(get_gradient_edge(first).node)
        ctx.count.spend(record.to_weights if to_weights else record.to_inputs)
        with ctx.count.paused():  # that they come while what was saved goes is recorded
            reached = record.trained if to_weights else (False,) * len(ctx.weights)
            to_inputs = [like.empty() if like.requires_grad else None for like in ctx.inputs]
            weights = [torch.empty_like(w) if is_reached else None for w, is_reached in zip(ctx.weights, reached, strict=True)]
        return (None, None, None, None, None, *to_inputs, *weights)


class _Source(Function):
    """The backward pass from here begins with gradients that nobody else holds."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.outputs = [_Like.of(output) for output in outputs]
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.empty() for output in ctx.outputs)


@contextmanager
def _apart(graph: bool) -> Iterator[None]:
    """In the block, what is computed is no part of the graph around it, nor of its checkpoints and autocast's cache."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.set_grad_enabled(graph):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _structure(block: nn.Module) -> Any:
    """What two blocks of one kind have in common."""
    modules = [
        (name, type(module).__name__, *(item for item in vars(module).items() if isinstance(item[1], bool | int | float | str)))
        for name, module in block.named_modules()
    ]
    weights = [(name, tuple(w.shape), w.dtype, w.requires_grad) for name, w in block.named_parameters()]
    return tuple(modules), tuple(weights)
