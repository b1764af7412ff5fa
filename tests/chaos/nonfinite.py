"""Puts NaN and infinities into a run of two processes, one at a time: none may ever reach a weight, an average, an
optimizer.

    python tests/chaos/nonfinite.py [--injections 1000] [--sharded] [--seed 0]

One run on the tiny pipeline, two processes that average their gradients (DDP on gloo; with --sharded FSDP2). In every
other
round one of the two, as drawn by the seed, gets a value that is not finite, somewhere on its way: prompt embeddings,
sample, prediction of score network or reference, a weight's gradient, a reward's score, a reward's gradient. After each
round both look at all that they hold. Both have to leave out each of these rounds and no other, and call its cause.
Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TESTS = Path(__file__).parents[1]
WORLD = 2
VALUES = (math.nan, math.inf, -math.inf)
PLACES = {  # where: what the run has to call it
    "embeddings": "prompt embeddings",
    "sample": "the generator's sample",
    "score network": "the score network's loss",
    "reference": "loss/regularizer",
    "generator's gradient": "the generator's gradient, with all before it finite",
    "score network's gradient": "the score network's gradient, with all before it finite",
    "reward": "scores are not finite",
    "reward's gradient": "reward_scale times the rewards' gradient",
}


class Injection:
    """What is to go wrong in the coming round, on one process."""

    def __init__(self, place: str, rank: int, value: float, at: float) -> None:
        self.place, self.rank, self.value, self.at = place, rank, value, at

    def spoil(self, values: Any) -> Any:
        """A copy with one element replaced."""
        import torch

        spoiled = values.clone(memory_format=torch.contiguous_format)
        spoiled.view(-1)[int(self.at * values.numel())] = self.value
        return spoiled

    def now(self, train_state: Any, c: Any, send: Any) -> tuple[Any, Any, list[Any]]:
        """Spoil it; the round's conditions and rewards, and the hooks to remove after it."""
        import torch
        from tiny import rewards as tiny_rewards

        from diffinstruct.method.step import unwrapped

        network = {
            "generator's": train_state.generator,
            "score": train_state.score_network,
            "score network's": train_state.score_network,
        }
        match self.place:
            case "embeddings":
                return c | {"prompt_embeds": self.spoil(c["prompt_embeds"])}, send, []
            case "sample":
                return (c, send, [unwrapped(train_state.generator).register_forward_hook(lambda m, i, out: self.spoil(out))])
            case "score network":
                return (
                    c,
                    send,
                    [unwrapped(train_state.score_network).register_forward_hook(lambda m, i, out: self.spoil(out))],
                )
            case "reference":
                whole = train_state.reference

                def reference(*inputs: Any) -> Any:
                    prediction, guidance = whole(*inputs)
                    return self.spoil(prediction), guidance

                train_state.reference = reference
                return c, send, []
            case "generator's gradient" | "score network's gradient":
                module = network[self.place.removesuffix(" gradient")]
                layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
                layer = layers[int(self.at * len(layers))]
                return (c, send, [layer.register_full_backward_pre_hook(lambda m, gradients: (self.spoil(gradients[0]),))])

            case "reward":
                sound = tiny_rewards.Red.forward
                tiny_rewards.Red.forward = lambda *inputs: self.spoil(sound(*inputs))
                return c, send, [SimpleNamespace(remove=lambda: setattr(tiny_rewards.Red, "forward", sound))]

        def spoiled(latents: Any, prompts: Any) -> Any:
            scores = send(latents, prompts)()
            return lambda: replace(scores, gradient=self.spoil(scores.gradient))

        return c, spoiled, []


def plan(injections: int, seed: int) -> dict[int, Injection]:
    """Step -> injection; every other round, so that no row of them makes the run go back."""
    drawn, places = random.Random(seed), list(PLACES)
    found = {}
    for i in range(injections):
        place, rank = places[i % len(places)], drawn.randrange(WORLD)
        found[2 * i + 1] = Injection(place, rank, drawn.choice(VALUES), drawn.random())
    return found


def process(rank: int, experiment: Any, folder: Path, planned: dict[int, Injection], spread: bool) -> None:
    """One of the two."""
    sys.path.insert(0, str(TESTS))
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.parallel import DistributedDataParallel

    from diffinstruct.cluster.collectives import distributed_ranks
    from diffinstruct.method.nonfinite import NonFiniteGradient
    from diffinstruct.method.step import alternating_round
    from diffinstruct.training import loop
    from diffinstruct.training.worker import Worker

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder / 'meeting'}", timedelta(minutes=5), rank=rank, world_size=WORLD
    )
    found: dict[str, Any] = {"leaks": [], "passed": [], "raised": []}

    def finite(state: Any, place: str) -> None:
        if isinstance(state, torch.Tensor):
            local = state.to_local() if hasattr(state, "to_local") else state
            if not local.isfinite().all():
                found["leaks"].append(place)
        elif isinstance(state, dict | list | tuple):
            for key, value in state.items() if isinstance(state, dict) else enumerate(state):
                finite(value, f"{place}/{key}")

    def watched(train_state: Any, settings: Any, schedule: Any, draws: Any, prompts: Any, c: Any, send: Any) -> Any:
        injection, hooks, reference = planned.get(draws.step), [], train_state.reference
        if injection and injection.rank == rank:
            c, send, hooks = injection.now(train_state, c, send)
        try:
            metrics = alternating_round(train_state, settings, schedule, draws, prompts, c, send)
            if injection:
                found["passed"].append((draws.step, injection.place))
            return metrics
        except NonFiniteGradient:
            found["raised"].append(draws.step)
            raise
        finally:
            train_state.reference = reference
            for hook in hooks:
                hook.remove()
            finite(train_state.state_dict(), f"step {draws.step}")

    loop.alternating_round = watched
    worker = Worker(distributed_ranks(rank, WORLD))
    more: dict[str, Any] = {"mesh": init_device_mesh("cpu", (WORLD,))} if spread else {"wrap": DistributedDataParallel}
    with (folder / f"output-{rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        loop.train(experiment, folder / "run", None, replace(worker, **more))
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def chaos(folder: Path, injections: int, seed: int = 0, spread: bool = False) -> tuple[str, bool]:
    """All of it, in `folder`. Returns the line that says it all, and whether all is well."""
    import torch
    from tiny import pipelines

    from diffinstruct.run_folder.checkpoint import CheckpointStore
    from diffinstruct.tracking.records import read_journal

    experiment = pipelines.experiment(
        folder,
        steps=2 * injections,
        global_batch_size=4,
        rewards={"trained": [{"name": "tiny.rewards:Red"}], "held_out": []},
        overoptimization={"every": 0},
        logging={"every": 10, "grid_every": 10**6, "grid_prompts": 2, "checkpoint_every": 10**6},
        cluster={"workers": WORLD, "fully_shard": spread},
    )
    planned, began = plan(injections, seed), time.monotonic()
    torch.multiprocessing.spawn(process, (experiment, folder, planned, spread), WORLD)
    both = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(WORLD)]
    faults = [f"rank {rank}: {leak}" for rank, found in enumerate(both) for leak in found["leaks"]]
    faults += [f"rank {rank}: not noticed: {passed}" for rank, found in enumerate(both) for passed in found["passed"]]
    faults += [f"rank {rank} left out other steps" for rank, found in enumerate(both) if found["raised"] != [*planned]]
    records = read_journal(folder / "run")
    told = {record["step"]: record["text"] for record in records if record.get("event") == "skipped"}
    for step, injection in planned.items():
        text = told.get(step + 1, "nothing")
        whose = "" if "with all before it finite" in PLACES[injection.place] else f"worker {injection.rank}: "
        if whose not in text or PLACES[injection.place] not in text or "1 in a row" not in text:
            faults.append(f"step {step + 1}: {injection.value} in {injection.place} is called: {text}")
    counted = [record["metrics"]["steps/skipped"] for record in records if "steps/skipped" in record.get("metrics", {})]
    unequal = [record["step"] for record in records for value in record.get("metrics", {}).values() if not math.isfinite(value)]
    if counted[-1:] != [injections] or unequal:
        faults.append(f"counted {counted[-1:]}, rows of metrics that are not finite: {unequal}")
    assert spread or CheckpointStore(folder / "run/checkpoints").latest()
    of = ", ".join(f"{n} in {place}" for place, n in Counter(each.place for each in planned.values()).items())
    return (
        f"{injections} values that are not finite in {2 * injections} rounds of "
        f"two {'sharded ' * spread}processes ({of}), "
        f"{time.monotonic() - began:.0f} s: "
        + (f"{len(faults)} FAULTS: {'; '.join(faults[:5])}" if faults else "no leak, each left out by both and rightly called")
    ), not faults


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(TESTS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--injections", type=int, default=1000)
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        line, good = chaos(Path(temporary), asked.injections, asked.seed, asked.sharded)
    print(line)
    sys.exit(not good)
