"""Does the score-based divergence regularise better than KL? Held-out preference against distance as the reward scale
grows.

    python experiments/score_against_kl.py [--smoke] [--trials N]

Equal coefficients mean nothing across objectives, equal distance from the reference does: DI* and Diff-Instruct++ each
walk along their own reward scales, and the two paths are drawn in one plane. Budget: 2 objectives x 6 scales x 3 seeds,
36 trials on the pocket world, one row each in docs/results/pocket_study.csv. Prints the table and draws
score_against_kl.png beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from diffinstruct.evaluation.pocket import TITLES, evaluate_run, reference_evaluation
from diffinstruct.statistics import at_distance, over_seeds, paired_by_seed
from diffinstruct.sweeps.study import Study

if TYPE_CHECKING:
    from diffinstruct.statistics import Summary

HERE = Path(__file__).parent
SCALES = (0.125, 0.25, 0.5, 1.0, 2.0, 8.0)
# KL's pull at the sample has 3 to 4 times the norm (gradient_norm/sample_regularizer), so its scales are larger
PATHS = {"DI*": ("di_star", SCALES), "Diff-Instruct++": ("diff_instruct_pp", tuple(4 * scale for scale in SCALES))}
STUDY = Study(
    name="score_against_kl",
    question=__doc__,
    recipe=HERE / "recipes" / "pocket_study.yaml",
    arms={
        f"{path}, scale {scale:g}": {"objective.name": name, "objective.reward_scale": scale}
        for path, (name, scales) in PATHS.items()
        for scale in scales
    },
    seeds=(0, 1, 2),
    measures={key: TITLES[key] for key in ("reward/pocket_judge", "kid", "reward/pocket_preference", "accuracy", "diversity")},
    evaluate=evaluate_run,
    rows=HERE.parent / "docs" / "results" / "pocket_study.csv",
)


KIDS = np.linspace(1.25, 2.25, 11)
"""Distances to the reference that both paths pass with every seed, with trials near on either side; the difference
between the paths is averaged over them."""
MINUS = f"{' minus '.join(PATHS)}, paired over seeds"


def main() -> None:
    if answer := STUDY.main():
        of_one, of_other = (set(scales) for _, scales in PATHS.values())
        for scale in sorted(of_one & of_other):
            one, other = (f"{path}, scale {scale:g}" for path in PATHS)
            if {one, other} <= answer.table.keys():
                gains = (paired_by_seed(answer.rows, "arm", one, other, key) for key in ("reward/pocket_judge", "kid"))
                answer.say("- at scale {:g}, {}: held-out preference {}, KID {}".format(scale, MINUS, *gains))
        ours, theirs = (at_these_distances(answer.rows, path) for path in PATHS)
        paired = (ours - theirs).dropna()
        if len(paired):
            said = ", ".join(f"{STUDY.measures[str(key)]} {over_seeds(gain)}" for key, gain in paired.items())
            answer.say(f"- at equal KID, mean from {KIDS[0]:g} to {KIDS[-1]:g}, {MINUS}, n {len(paired)}: {said}")
        figure = answer.text.with_suffix(".png")
        draw(answer.table, figure)
        answer.publish(figure)
        print(f"figure {figure}")


def at_these_distances(rows: pd.DataFrame, path: str) -> pd.DataFrame:
    """Each measure's mean over KIDS along a path; a row a seed."""
    measures = [key for key in STUDY.measures if key != "kid"]
    by_seed = rows[rows["arm"].str.startswith(f"{path}, ")].groupby("seed")
    return pd.DataFrame({seed: at_distance(trials, "kid", KIDS, measures) for seed, trials in by_seed}).T


def draw(table: dict[str, Summary], path: Path) -> None:
    """Held-out preference, right attributes and diversity against KID; a point an arm, its intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(1, 3, figsize=(15, 4.4))
    for axis, measure in zip(axes, ("reward/pocket_judge", "accuracy", "diversity"), strict=True):
        for path_name, (colour, offset) in zip(PATHS, {"tab:blue": (5, -11), "tab:orange": (-11, 6)}.items(), strict=True):
            points = [(arm.split()[-1], of) for arm, of in table.items() if arm.startswith(f"{path_name}, ")]
            x, y = ([of[key] for _, of in points] for key in ("kid", measure))
            several = y[0].n > 1  # one seed has no interval
            axis.errorbar(
                [f.value for f in x],
                [f.value for f in y],
                xerr=[f.high - f.value for f in x] if several else None,
                yerr=[f.high - f.value for f in y] if several else None,
                marker="o", markersize=4, capsize=2, linewidth=1, elinewidth=0.6, label=path_name, color=colour,
            )  # fmt: skip
            for (scale, _), fx, fy in zip(points, x, y, strict=True):
                at = {"textcoords": "offset points", "xytext": offset, "fontsize": 8, "color": colour}
                axis.annotate(scale, (fx.value, fy.value), **at)
        start = reference_evaluation().summary()[measure].value
        axis.axhline(start, color="grey", linewidth=0.8, linestyle=":", label="reference, 50 steps")
        axis.set(xlabel="KID to the reference", ylabel=TITLES[measure])
    axes[0].legend()
    picture.suptitle("The reward scale grows along each path (numbers); bars: 95 % intervals over training seeds", fontsize=10)
    picture.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
