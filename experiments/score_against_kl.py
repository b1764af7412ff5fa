"""Does the score-based divergence regularise better than KL? Held-out preference against distance as the reward scale grows.

    python experiments/score_against_kl.py [--smoke] [--trials N]

Equal coefficients mean nothing across objectives, equal distance from the reference does: DI* and Diff-Instruct++ each walk
along their own reward scales, and the two paths are drawn in one plane. Budget: 2 objectives x 6 scales x 3 seeds = 36 trials
on the pocket world. A finished trial adds its row to docs/results/score_against_kl.csv and is not run again. When every row
is there: the table, over seeds, and docs/results/score_against_kl.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from diffinstruct.cluster.sweep import changed, complete
from diffinstruct.evaluation import markdown
from diffinstruct.experiment import load
from diffinstruct.pocket_world import examine_run, reference_examination
from diffinstruct.results import Rows, by_seed

if TYPE_CHECKING:
    from diffinstruct.evaluation import Summary

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results"
SEEDS = (0, 1, 2)
OVER = "training seeds (Student's), the same 756 prompts and noise for all"
# Reward actors mostly wait: uncounted, they leave the CPUs to the trials.
BASE = {"name": "score-against-kl", "steps": 60, "cluster.reward_cpus": 0.0, "logging.every": 10, "logging.grid_every": 60}
SHORT = {"steps": 2, "global_batch_size": 8, "logging.every": 1, "logging.grid_prompts": 2}
PATHS = {  # KL pulls about ten times as strongly at the sample, so its scales are other ones
    "DI*": ("di_star", (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)),
    "Diff-Instruct++": ("diff_instruct_pp", (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)),
}
ARMS = {
    f"{path}, scale {scale:g}": {"objective.name": name, "objective.reward_scale": scale}
    for path, (name, scales) in PATHS.items()
    for scale in scales
}
MEASURES = {
    "reward/pocket_judge": "held-out preference",
    "kid": "KID to the reference",
    "reward/pocket_preference": "trained preference",
    "accuracy": "attributes right",
    "diversity": "diversity",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one scale of each, one seed, two steps; all in the run folder")
    parser.add_argument("--trials", type=int, metavar="N", help="run at most N of those that are missing")
    asked = parser.parse_args()
    base = changed(load(HERE / "recipes" / "pocket.yaml"), BASE | (SHORT if asked.smoke else {}))
    folder = Path(base.runs).absolute() / ("score-against-kl-smoke" if asked.smoke else "score-against-kl")
    results = folder if asked.smoke else RESULTS
    arms = dict(list(ARMS.items())[2:9:6]) if asked.smoke else ARMS
    seeds = SEEDS[:1] if asked.smoke else SEEDS
    frame = complete(Rows(results / "score_against_kl.csv"), base, arms, seeds, folder, examine_run, asked.trials)
    if frame is None:
        print("trials are missing: the same command goes on")
        return
    table = by_seed(frame, "arm", [*MEASURES])
    print(markdown({arm: {MEASURES[key]: figure for key, figure in of.items()} for arm, of in table.items()}, OVER))
    draw(table, results / "score_against_kl.png")
    print(f"figure {results / 'score_against_kl.png'}")


def draw(table: dict[str, Summary], path: Path) -> None:
    """Two planes, held-out preference and right attributes against KID; a point an arm, its intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
    for axis, measure in zip(axes, ("reward/pocket_judge", "accuracy"), strict=True):
        for path_name in PATHS:
            points = [(arm.split()[-1], of) for arm, of in table.items() if arm.startswith(f"{path_name}, ")]
            x, y = ([of[key] for _, of in points] for key in ("kid", measure))
            finite = len(points) > 0 and y[0].n > 1
            axis.errorbar(
                [f.value for f in x],
                [f.value for f in y],
                xerr=[f.high - f.value for f in x] if finite else None,
                yerr=[f.high - f.value for f in y] if finite else None,
                marker="o", capsize=2, linewidth=1, label=path_name,
            )  # fmt: skip
            for (scale, _), fx, fy in zip(points, x, y, strict=True):
                axis.annotate(scale, (fx.value, fy.value), textcoords="offset points", xytext=(5, 5), fontsize=8)
        start = reference_examination().summary()[measure].value
        axis.axhline(start, color="grey", linewidth=0.8, linestyle=":", label="reference, 50 steps")
        axis.set(xlabel="KID to the reference", ylabel=MEASURES[measure])
    axes[0].legend()
    figure.suptitle("The reward scale grows along each path (numbers); bars: 95 % intervals over training seeds", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
