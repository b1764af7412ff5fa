"""Does the monitor raise its alarm before the pictures break, and only then?

    python experiments/overoptimization.py [--smoke] [--trials N]

The pocket recipe, where nothing should be told of; the recipe with its reward scale times four and with the reward
alone; and experiments/hackable.py, a reward that is planted to be hacked. A run's probes are kept (every 10 rounds, 64
pictures of training prompts), and its generator is evaluated at the end. Budget: 10 + 2 + 2 trials of 100 rounds on the
pocket world, one row each in docs/results/overoptimization.csv and overoptimization_planted.csv (rewards differ, so
does the recipe). `--trials` limits each group of them. Prints tables, a line a trial, and draws overoptimization.png.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd

from diffinstruct import Experiment
from diffinstruct.evaluation.pocket import TITLES, evaluate_run
from diffinstruct.sweeps.study import Study, StudyResult

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results"


def evaluate_watched(experiment: Experiment, folder: Path, every: int = 1) -> dict[str, float]:
    """What the evaluation measures, the step of the first alarm (NaN: none), and each figure of each probe as
    `overoptimization/x@step`."""
    records = [json.loads(line) for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines() if line]
    probes = {
        f"{key}@{record['step']}": value
        for record in records
        for key, value in record.get("metrics", {}).items()
        if key.startswith("overoptimization/")
    }
    alarms = [float(record["step"]) for record in records if record.get("event") == "overoptimization"]
    return evaluate_run(experiment, folder, every) | {"alarm": min(alarms, default=math.nan)} | probes


def study(name: str, recipe: str, rows: str, arms: dict[str, dict[str, object]], seeds: range) -> Study:
    measures = {key: TITLES[key] for key in ("reward/pocket_judge", "accuracy", "kid", "diversity")}
    return Study(name, __doc__ or "", HERE / "recipes" / recipe, arms, seeds, measures, evaluate_watched, RESULTS / rows)


LONG: dict[str, object] = {"steps": 100}
STUDIES = (
    study("overoptimization_recipe", "pocket_study.yaml", "overoptimization.csv", {"the recipe": LONG}, range(10)),
    study(
        "overoptimization_stronger",
        "pocket_study.yaml",
        "overoptimization.csv",
        {"reward scale 8": {**LONG, "objective.reward_scale": 8.0}, "reward alone": {**LONG, "objective.name": "reward_only"}},
        range(1),
    ),
    study("overoptimization_planted", "pocket_hackable.yaml", "overoptimization_planted.csv", {"planted reward": {}}, range(2)),
)


def main() -> None:
    answers = [each.main() for each in STUDIES]
    for answer in filter(None, answers):
        for _, trial in answer.rows.iterrows():
            answer.say(f"- {trial['arm']}, seed {trial['seed']}: {told(trial)}")
    if whole := [answer for answer in answers if answer]:
        rows = pd.concat([answer.rows for answer in whole], ignore_index=True)
        for arm, trials in rows.groupby("arm", sort=False):
            most = max(course(trial, "unexplained").max() for _, trial in trials.iterrows())
            least = min(course(trial, "variety").min() for _, trial in trials.iterrows())
            whole[-1].say(
                f"- {arm}: an alarm in {trials['alarm'].notna().sum()} of {len(trials)} runs; at most {most:.2f} std "
                f"unexplained, at least {least:.2f} of the start's variety left"
            )
        publish(whole, rows)


def publish(answers: list[StudyResult], rows: pd.DataFrame) -> None:
    figure = answers[-1].text.with_name("overoptimization.png")
    draw(rows, figure)
    for answer in answers:
        answer.publish(figure)
    print(f"figure {figure}")


def course(trial: pd.Series, figure: str) -> pd.Series:
    """A figure of the monitor against the step."""
    of = {
        int(str(key).partition("@")[2]): value
        for key, value in trial.items()
        if str(key).startswith(f"overoptimization/{figure}@")
    }
    return pd.Series(of, dtype=float).dropna().sort_index()


def told(trial: pd.Series) -> str:
    """When the held-out preference peaked, when the alarm came, and what share of the gain was lost by then and by the
    end."""
    held_out, alarm = course(trial, "held_out"), trial["alarm"]
    peak = held_out.idxmax()
    if peak == 0:
        return "the held-out preference never gained, " + ("no alarm" if math.isnan(alarm) else f"alarm at step {alarm:.0f}")
    lost = (held_out[peak] - held_out[held_out.index >= peak]) / held_out[peak]
    at_alarm = "no alarm" if math.isnan(alarm) else f"alarm at step {alarm:.0f}, with {lost.get(alarm, 0.0):.1%} lost"
    return (
        f"the held-out preference peaks at step {peak}, {lost.iloc[-1]:.1%} of its gain is lost at step "
        f"{lost.index[-1]}; {at_alarm}"
    )


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Trained and held-out gain and variety against the step; a line a run, a mark where its first alarm came."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "trained": "trained reward, gain in within-prompt std",
        "held_out": "held-out preference, gain in within-prompt std",
        "variety": "variety, share of the start's",
    }
    picture, axes = plt.subplots(1, 3, figsize=(15, 4.4))
    for axis, (figure, title) in zip(axes, titles.items(), strict=True):
        for i, (arm, trials) in enumerate(rows.groupby("arm", sort=False)):
            for j, (_, trial) in enumerate(trials.iterrows()):
                line, alarm = course(trial, figure), trial["alarm"]
                axis.plot(line, color=f"C{i}", linewidth=1, label=None if j else arm)
                if not math.isnan(alarm):
                    axis.plot(alarm, line[alarm], "X", color=f"C{i}", markeredgecolor="black", markersize=9)
        axis.set(xlabel="step", title=title)
    axes[0].set_yscale("symlog")
    axes[0].legend()
    picture.suptitle("A line a run; a cross where the monitor raised its first alarm", fontsize=10)
    picture.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
