"""The paper's ablation in miniature: which divergence, how much guidance and where, how much reward, for how long.

    python experiments/paper_ablation.py [--smoke] [--trials N]

Budget: 14 arms x 3 seeds = 42 trials on the pocket world. A finished trial adds its row to docs/results/paper_ablation.csv and
is not run again: stop it whenever you like, type it again to go on, N trials at a time if you like. When every row is there, it
prints the table, over seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffinstruct.cluster.sweep import Point, changed, complete
from diffinstruct.evaluation import markdown
from diffinstruct.experiment import load
from diffinstruct.pocket_world import examine_run
from diffinstruct.results import Rows, by_seed, paired_by_seed

HERE = Path(__file__).parent
ROWS = HERE.parent / "docs" / "results" / "paper_ablation.csv"
SEEDS = (0, 1, 2)
OVER = "training seeds (Student's), the same 756 prompts and noise for all"
# Reward actors mostly wait: uncounted, they leave the CPUs to the trials.
BASE = {"name": "paper-ablation", "steps": 60, "cluster.reward_cpus": 0.0, "logging.every": 10, "logging.grid_every": 60}
SHORT = {"steps": 2, "global_batch_size": 8, "logging.every": 1, "logging.grid_prompts": 2}
# One reward scale is not one distance: those of a line lead about equally far from the reference (score_against_kl.py).
REWARD: dict[str, dict[str, Point]] = {
    "little": {"score": {"objective.reward_scale": 1.0}, "KL": {"objective.reward_scale": 4.0}},
    "much": {"score": {"objective.reward_scale": 4.0}, "KL": {"objective.reward_scale": 16.0}},
}
BY: dict[str, Point] = {"score": {"objective.name": "di_star"}, "KL": {"objective.name": "diff_instruct_pp"}}
PLAIN, OUT, LONGER = {"reference.cfg_scale": 0.0}, {"reference.guidance": "out"}, {"steps": 120}
NONE = {"objective.reward_scale": 0.0}
ARMS: dict[str, Point] = {}
for divergence, of in BY.items():
    little, much = ({**of, **REWARD[amount][divergence]} for amount in ("little", "much"))
    ARMS |= {
        f"{divergence}": {**of, **NONE, **PLAIN},
        f"{divergence}, guidance": {**of, **NONE},
        f"{divergence}, little reward": {**little, **PLAIN},
        f"{divergence}, guidance, little reward": little,
        f"{divergence}, guidance, much reward": much,
        f"{divergence}, guidance outside, much reward": {**much, **OUT},
        f"{divergence}, guidance, much reward, twice as long": {**much, **LONGER},
    }
MEASURES = {
    "reward/pocket_judge": "held-out preference",
    "reward/pocket_preference": "trained preference",
    "accuracy": "attributes right",
    "smiling": "smiling, where open",
    "kid": "KID to the reference",
    "diversity": "diversity",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two arms, one seed, two steps; rows in the run folder")
    parser.add_argument("--trials", type=int, metavar="N", help="run at most N of those that are missing")
    asked = parser.parse_args()
    base = changed(load(HERE / "recipes" / "pocket.yaml"), BASE | (SHORT if asked.smoke else {}))
    folder = Path(base.runs).absolute() / ("paper-ablation-smoke" if asked.smoke else "paper-ablation")
    arms = dict(list(ARMS.items())[1:8:6]) if asked.smoke else ARMS
    rows = Rows(folder / "rows.csv" if asked.smoke else ROWS)
    frame = complete(rows, base, arms, SEEDS[:1] if asked.smoke else SEEDS, folder, examine_run, asked.trials)
    if frame is None:
        print("trials are missing: the same command goes on")
        return
    table = by_seed(frame, "arm", [*MEASURES])
    print(markdown({arm: {MEASURES[key]: figure for key, figure in of.items()} for arm, of in table.items()}, OVER))
    for what in ("guidance, little reward", "guidance, much reward"):
        if {f"score, {what}", f"KL, {what}"} <= set(arms):
            difference = paired_by_seed(frame, "arm", f"score, {what}", f"KL, {what}", "reward/pocket_judge")
            print(f"{what}: score minus KL, paired over {difference.n} seeds: held-out preference {difference}")


if __name__ == "__main__":
    main()
