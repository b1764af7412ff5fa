"""The paper's ablation in miniature: which divergence, how much guidance and where, how much reward, for how long.

    python experiments/paper_ablation.py [--smoke] [--trials N]

Budget: 14 arms x 3 seeds, 42 trials on the pocket world, one row each in docs/results/pocket_study.csv. Prints the
table, what each lever does by itself, and what the score-based divergence gains over KL, paired over seeds.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from diffinstruct.evaluation.pocket import TITLES, evaluate_run
from diffinstruct.reports.frames import TrialRows
from diffinstruct.statistics import at_distance, over_seeds, paired_by_seed
from diffinstruct.sweeps.points import Point
from diffinstruct.sweeps.study import Study

HERE = Path(__file__).parent
# A column's scales give the two divergences the same ratio of reward to regulariser at the sample, with guidance about
# 1/4 and
# 1. Whether that is one distance from the reference only score_against_kl.py can say: read rows beside their KID.
SCALES = {"score": ("di_star", {"little": 0.5, "much": 2.0}), "KL": ("diff_instruct_pp", {"little": 2.0, "much": 8.0})}


def arms() -> dict[str, Point]:
    rows: dict[str, Point] = {}
    for divergence, (name, scales) in SCALES.items():
        none, little, much = (
            {"objective.name": name, "objective.reward_scale": scale} for scale in (0.0, scales["little"], scales["much"])
        )
        rows |= {
            f"{divergence}": {**none, "reference.guidance_scale": 1.0},
            f"{divergence}, guidance": none,
            f"{divergence}, little reward": {**little, "reference.guidance_scale": 1.0},
            f"{divergence}, guidance, little reward": little,
            f"{divergence}, guidance, much reward": much,
            f"{divergence}, guidance outside, much reward": {**much, "reference.guidance": "out"},
            f"{divergence}, guidance, much reward, twice as long": {**much, "steps": 120},
        }
    return rows


STUDY = Study(
    name="paper_ablation",
    question=__doc__,
    recipe=HERE / "recipes" / "pocket_study.yaml",
    arms=arms(),
    seeds=(0, 1, 2),
    measures={
        key: TITLES[key]
        for key in ("reward/pocket_judge", "reward/pocket_preference", "accuracy", "smiling", "kid", "diversity")
    },
    evaluate=evaluate_run,
    rows=HERE.parent / "docs" / "results" / "pocket_study.csv",
)
LEVERS = [  # what each does by itself: (with it, without)
    (f"{divergence}{with_it}", f"{divergence}{without}")
    for with_it, without in (
        (", guidance", ""),
        (", guidance, little reward", ", little reward"),
        (", guidance, little reward", ", guidance"),
        (", guidance, much reward", ", guidance, little reward"),
        (", guidance outside, much reward", ", guidance, much reward"),
        (", guidance, much reward, twice as long", ", guidance, much reward"),
    )
    for divergence in SCALES
]
GAINS = [(", little reward", ""), (", guidance, little reward", ", guidance"), (", guidance, much reward", ", guidance")]


def main() -> None:
    if (answer := STUDY.main()) is None:
        return
    for arm, other in LEVERS + [(arm, arm.replace("score", "KL")) for arm in answer.table if arm.startswith("score")]:
        if arm in answer.table and other in answer.table:
            judge, kid = (paired_by_seed(answer.rows, "arm", arm, other, key) for key in ("reward/pocket_judge", "kid"))
            answer.say(f"- {arm}, minus {other}: held-out preference {judge}, KID {kid}")
    for with_it, without in GAINS:
        if len(gained := gains(answer.rows, with_it, without)):
            more = f"KL's gain from {with_it.strip(', ')} minus the score divergence's"
            answer.say(f"- {more}: held-out preference {over_seeds(gained)}")
    for divergence in SCALES:
        if len(paired := outside_minus_inside(answer.rows, divergence)):
            judge, diversity = (over_seeds(gain) for _, gain in paired.items())
            which = f"{divergence}, guidance outside, minus inside at equal KID"
            answer.say(f"- {which}: held-out preference {judge}, diversity {diversity}")
    answer.publish()


def gains(rows: pd.DataFrame, with_it: str, without: str) -> pd.Series:
    """KL's gain in held-out preference minus the score divergence's, a value a seed."""
    wide = rows.pivot(index="seed", columns="arm", values="reward/pocket_judge")
    wanted = [f"{divergence}{arm}" for divergence in ("KL", "score") for arm in (with_it, without)]
    if not set(wanted) <= set(wide):
        return pd.Series(dtype=float)
    kl_with, kl_without, score_with, score_without = (wide[arm] for arm in wanted)
    return ((kl_with - kl_without) - (score_with - score_without)).dropna()


def outside_minus_inside(rows: pd.DataFrame, divergence: str) -> pd.DataFrame:
    """Guidance outside minus inside at the former's KID, a row a seed. Inside is the path of all kept trials that vary
    nothing but the reward scale."""
    (name, _), measures = SCALES[divergence], ("reward/pocket_judge", "diversity")
    kept, gained = TrialRows(STUDY.rows).read(), {}
    for _, outside in rows[rows["arm"] == f"{divergence}, guidance outside, much reward"].iterrows():
        alike = rf"objective.name={name} objective.reward_scale=\S+ seed={outside['seed']}"
        inside = at_distance(kept[kept["trial"].str.fullmatch(alike)], "kid", outside["kid"], measures)
        gained[outside["seed"]] = {key: outside[key] - value for key, value in inside.items()}
    return pd.DataFrame(gained).T.dropna()


if __name__ == "__main__":
    main()
