"""How often should the score network learn for one step of the generator? K_TA, at equal rounds.

    python experiments/k_ta.py [--smoke] [--trials N]

DI* at reward scale 2 with 1, 2, 4 and 8 score updates a round on the same sample; a round with 8 costs 2.75 times one
with 1 (33 forward passes worth against 12). Budget: 4 arms x 2 seeds on the pocket world, 60 rounds each, one row a
trial in docs/results/pocket_study.csv. Prints the table and each arm minus the recipe's, and draws the Pareto front.
"""

from __future__ import annotations

from pathlib import Path

from diffinstruct.evaluation.pocket import TITLES, evaluate_run
from diffinstruct.sweeps.study import Study

HERE = Path(__file__).parent
RECIPE = {"objective.name": "di_star", "objective.reward_scale": 2.0}
STUDY = Study(
    name="k_ta",
    question=__doc__,
    recipe=HERE / "recipes" / "pocket_study.yaml",
    arms={f"K_TA {k}": RECIPE | ({} if k == 1 else {"score_network.updates_per_step": k}) for k in (1, 2, 4, 8)},
    seeds=(0, 1),
    measures={key: TITLES[key] for key in ("reward/pocket_judge", "kid", "accuracy", "diversity")}
    | {"loss/score_network": "score network's loss"},
    evaluate=evaluate_run,
    rows=HERE.parent / "docs" / "results" / "pocket_study.csv",
)


def main() -> None:
    if answer := STUDY.main():
        answer.differences("K_TA 1", {key: TITLES[key] for key in ("reward/pocket_judge", "kid", "diversity")})
        answer.draw()


if __name__ == "__main__":
    main()
