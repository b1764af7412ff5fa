"""How much reward for how much distance: the regularization weight against the reward scale, on the pocket world.

    python experiments/reward_against_regularization.py [--smoke] [--trials N]

Where on the plane does the held-out preference peak, and where does it break? Under Adam mostly the ratio of the two
matters: the grid has three ratios more than once, a canary for everything else. Budget: 3 x 3 points x 2 seeds, 18
trials of 60 rounds, one row each in docs/results/pocket_study.csv. Prints the table, and draws heat maps and the Pareto
front.
"""

from __future__ import annotations

from pathlib import Path

from diffinstruct.evaluation.pocket import TITLES, evaluate_run
from diffinstruct.statistics import by_seed
from diffinstruct.sweeps.points import Point
from diffinstruct.sweeps.study import Study

HERE = Path(__file__).parent
WEIGHT, SCALE = "objective.regularization_weight", "objective.reward_scale"
WEIGHTS, SCALES = (0.25, 1.0, 4.0), (0.5, 2.0, 8.0)


def point(weight: float, scale: float) -> Point:
    """The recipe's weight is 1 and goes unsaid, so that other studies' trials count here, too."""
    return {"objective.name": "di_star", SCALE: scale} | ({} if weight == 1 else {WEIGHT: weight})


STUDY = Study(
    name="reward_against_regularization",
    question=__doc__,
    recipe=HERE / "recipes" / "pocket_study.yaml",
    arms={f"weight {weight:g}, scale {scale:g}": point(weight, scale) for weight in WEIGHTS for scale in SCALES},
    seeds=(0, 1),
    measures={key: TITLES[key] for key in ("reward/pocket_judge", "kid", "reward/pocket_preference", "accuracy", "diversity")},
    evaluate=evaluate_run,
    rows=HERE.parent / "docs" / "results" / "pocket_study.csv",
)


def main() -> None:
    if answer := STUDY.main():
        answer.differences("weight 1, scale 2", {key: TITLES[key] for key in ("reward/pocket_judge", "kid", "diversity")})
        rows = answer.rows.assign(ratio=answer.rows[SCALE] / answer.rows[WEIGHT])
        for ratio, same in rows.groupby("ratio"):
            if same["arm"].nunique() > 1:
                found = by_seed(same, "arm", ["reward/pocket_judge"])
                said = ", ".join(f"{arm}: {of['reward/pocket_judge']}" for arm, of in found.items())
                answer.say(f"- held-out preference at the ratio {ratio:g}: {said}")
        answer.draw(x=SCALE, y=WEIGHT)


if __name__ == "__main__":
    main()
