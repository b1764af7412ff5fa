"""The loop of a run: its size, and the run logs of all ranks, which it calls alike."""

from __future__ import annotations

import ast
import inspect

import torch

from diffinstruct.method.nonfinite import NonFiniteGradient
from diffinstruct.ranks import Ranks
from diffinstruct.training import loop, trainer
from diffinstruct.training.guards import NonFiniteGuard
from diffinstruct.training.run_log import RunLog, SilentRunLog
from diffinstruct.training.worker import Worker

LINES_OF_THE_LOOP, LINES_OF_A_VERB = 90, 20


def test_the_loop_can_be_read_at_a_glance():
    assert len(inspect.getsource(loop).splitlines()) <= LINES_OF_THE_LOOP
    (run,) = (node for node in ast.parse(inspect.getsource(trainer)).body if isinstance(node, ast.ClassDef))
    verbs = [node for node in run.body if isinstance(node, ast.FunctionDef)]
    long = {
        verb.name: lines
        for verb in verbs
        if verb.name not in ("__init__", "_build_state") and (lines := verb.end_lineno - verb.lineno + 1) > LINES_OF_A_VERB
    }
    assert not long, long


def test_a_silent_run_log_has_what_a_run_log_has():
    """The loop never asks which of them it has."""
    loud, silent = (
        {name: list(inspect.signature(call).parameters) for name, call in vars(kind).items() if name[0] != "_"}
        for kind in (RunLog, SilentRunLog)
    )
    assert loud == silent
    log = SilentRunLog()
    assert log.event(1, "kind", "text") is None and log.grid(1, [torch.zeros(1)]) is None
    assert not vars(log)


def test_one_process_is_its_own_answer_to_collective_calls():
    ranks = Worker().ranks
    assert ranks == Ranks() and ranks.first and (ranks.rank, ranks.world) == (0, 1)
    assert (ranks.min(3), ranks.mean({"a": 0.1}), ranks.gather("x")) == (3, {"a": 0.1}, ["x"])
    assert not Ranks(1, 2).first


def test_a_guard_goes_on_from_its_state():
    """Rollbacks and what was skipped are counted on; each rollback draws from another seed."""
    guard = NonFiniteGuard()
    error = NonFiniteGradient(4, "generator", None)
    assert guard.add(error, [None, "a loss"]) == "worker 1: a loss"
    assert guard.add(error, [None]) == "the generator's gradient, with all before it finite"
    assert (guard.skipped, guard.consecutive, guard.seed(7)) == (2, 2, 7)
    guard.roll_back(guard.skipped)
    again = NonFiniteGuard()
    again.load_state_dict(guard.state_dict())
    assert (again.skipped, again.consecutive, again.rolled_back) == (2, 0, True) and again.seed(7) != 7
    assert "once more after going back" in str(again.give_up(9, error, "a loss"))
