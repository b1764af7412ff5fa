"""What the paper leaves open, one choice at a time around the recipe, for DI* and Diff-Instruct++ with the same effort.

    python experiments/open_choices.py [--smoke] [--trials N]

Varied: c, the space of the distance (w), the law of t, lambda, K_TA and both learning rates (so also how far the score
network lags behind). Budget: 14 arms of DI* and 12 of Diff-Instruct++ (it has no c), 1 seed, 26 trials on the pocket
world, one row each in docs/results/pocket_study.csv. Prints the table, and each arm minus the recipe; how much of a
difference training seeds make is known from the trials of score_against_kl.py and paper_ablation.py that have several,
so those come first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from diffinstruct import UserError, load
from diffinstruct.evaluation.pocket import TITLES, evaluate_run
from diffinstruct.reports.frames import TrialRows
from diffinstruct.statistics import paired_by_seed, seed_noise
from diffinstruct.sweeps.points import Point
from diffinstruct.sweeps.study import Study

HERE = Path(__file__).parent
WEIGHT = "objective.regularization_weight"
OBJECTIVES: dict[str, Point] = {  # scales at which reward and regulariser have about the same ratio of norms at the start
    "DI*": {"objective.name": "di_star", "objective.reward_scale": 2.0},
    "Diff-Instruct++": {"objective.name": "diff_instruct_pp", "objective.reward_scale": 8.0},
}
CHOICES: dict[str, Point] = {
    "the recipe": {},
    "c 0.03": {"objective.distance_args.c": 0.03},
    "c 0.3": {"objective.distance_args.c": 0.3},
    "space eps": {"objective.weighting": "eps"},
    "space v": {"objective.weighting": "v"},
    "t log-normal": {"objective.t_law": "log_normal"},
    "lambda x0": {"score_network.loss_weighting": "x0"},
    "lambda v": {"score_network.loss_weighting": "v"},
    "K_TA 2": {"score_network.updates_per_step": 2},
    "K_TA 4": {"score_network.updates_per_step": 4},
    "learning rate / 2": {"generator.learning_rate": 5e-5},
    "learning rate x 2": {"generator.learning_rate": 2e-4},
    "score learning rate / 2": {"score_network.learning_rate": 1e-4},
    "score learning rate x 2": {"score_network.learning_rate": 4e-4},
}
STUDY = Study(
    name="open_choices",
    question=__doc__,
    recipe=HERE / "recipes" / "pocket_study.yaml",
    arms={
        f"{objective}, {choice}": {**of, **what}
        for objective, of in OBJECTIVES.items()
        for choice, what in CHOICES.items()
        if objective == "DI*" or "objective.distance_args.c" not in what
    },
    seeds=(0,),
    measures={key: TITLES[key] for key in ("reward/pocket_judge", "kid", "reward/pocket_preference", "accuracy", "diversity")},
    evaluate=evaluate_run,
    rows=HERE.parent / "docs" / "results" / "pocket_study.csv",
)


def main() -> None:
    try:  # before hours of trials that could not be compared
        noise = noise_at_these_scales(("reward/pocket_judge", "kid", "diversity"))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    if (answer := STUDY.main()) is None:
        return
    answer.say(
        "- noise of training seeds, standard deviation: "
        + ", ".join(f"{TITLES[key]} {sigma:.3g}" for key, (sigma, _) in noise.items())
        + f" ({min(freedom for _, freedom in noise.values())} degrees of freedom)"
    )
    for arm in answer.table:
        recipe = f"{arm.split(', ')[0]}, the recipe"
        if arm != recipe and recipe in answer.table:
            judge, kid, diversity = (paired_by_seed(answer.rows, "arm", arm, recipe, key, of) for key, of in noise.items())
            answer.say(f"- {arm}, minus the recipe: held-out preference {judge}, KID {kid}, diversity {diversity}")
    answer.publish()


def noise_at_these_scales(measures: Sequence[str]) -> dict[str, tuple[float, int]]:
    """How far seeds scatter in the recipe's kept trials with these objectives and scales that have three, in whatever
    study. (With less reward they scatter more; longer ones share their first rounds with the others, so they do not
    count.)"""
    trials = TrialRows(STUDY.rows).read()
    if trials.empty:
        raise UserError(f"{STUDY.rows}: no trials to know the noise of seeds from; run score_against_kl.py first")
    recipe = load(STUDY.recipe)
    as_the_recipe = trials.get(WEIGHT, pd.Series(np.nan, trials.index)).fillna(recipe.objective.regularization_weight)
    trials = trials[(trials["step"] == recipe.steps) & (as_the_recipe == recipe.objective.regularization_weight)].copy()
    trials["arm"] = trials["trial"].str.replace(r"\bseed=\d+", "", regex=True)
    alike = [(trials[list(of)] == pd.Series(of)).all(axis=1) for of in OBJECTIVES.values()]
    of_three = trials.groupby("arm")["seed"].transform("nunique") >= 3
    try:
        return {key: seed_noise(trials[pd.concat(alike, axis=1).any(axis=1) & of_three], "arm", key) for key in measures}
    except ValueError as error:
        raise UserError(f"{STUDY.rows}: {error}; run score_against_kl.py first") from None


if __name__ == "__main__":
    main()
