"""How much guidance should the reference have, and does the reward care? guidance_scale against held-out preference and
distance.

    python experiments/guidance.py [--smoke] [--trials N]

Guidance inside the divergence, DI* at reward scale 2, guidance_scale from 1 (plain conditional) to 7. Budget: 5 arms x
2 seeds on the pocket world, 60 rounds each, one row a trial in docs/results/pocket_study.csv. Prints the table and each
arm minus the recipe's, and draws the Pareto front.
"""

from __future__ import annotations

from pathlib import Path

from diffinstruct.evaluation.pocket import TITLES, evaluate_run
from diffinstruct.sweeps.study import Study

HERE = Path(__file__).parent
RECIPE = {"objective.name": "di_star", "objective.reward_scale": 2.0}  # its guidance_scale is 3
STUDY = Study(
    name="guidance",
    question=__doc__,
    recipe=HERE / "recipes" / "pocket_study.yaml",
    arms={
        f"guidance_scale {s:g}": RECIPE | ({} if s == 3 else {"reference.guidance_scale": s}) for s in (1.0, 2.0, 3.0, 5.0, 7.0)
    },
    seeds=(0, 1),
    measures={key: TITLES[key] for key in ("reward/pocket_judge", "kid", "smiling", "accuracy", "diversity")},
    evaluate=evaluate_run,
    rows=HERE.parent / "docs" / "results" / "pocket_study.csv",
)


def main() -> None:
    if answer := STUDY.main():
        answer.differences("guidance_scale 3", {key: TITLES[key] for key in ("reward/pocket_judge", "kid", "diversity")})
        answer.draw()


if __name__ == "__main__":
    main()
