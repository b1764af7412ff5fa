"""The built-in world's examination: its prompts, its ground truth, its judges, and the reference's own stored result.

756 prompts: 500 of held-out combinations with the face named, 256 with the face left open. Every generator gets the
same noise. Distances are measured to 378 pictures that the reference made of every second prompt, 50 guided steps,
other noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffinstruct.evaluation.evaluate import Evaluation, Sampler, evaluate
from diffinstruct.evaluation.features import AttributeClassifier

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from diffinstruct.config.experiment import Experiment


POCKET = Path(__file__).parents[1] / "pocket"
REWARDS = ("pocket_preference", "pocket_judge")
SEED = 2_000_000
MEASURES = {  # a figure of `examine` -> what tables call it
    "reward/pocket_preference": "trained preference",
    "reward/pocket_judge": "held-out preference",
    "accuracy": "attributes right",
    "accuracy/subject": "subject right",
    "accuracy/colour": "colour right",
    "accuracy/background": "background right",
    "accuracy/mouth": "mouth right, where named",
    "smiling": "smiling, where open",
    "kid": "KID to the reference",
    "diversity": "diversity",
}


def examination_prompts() -> pd.DataFrame:
    import pandas as pd

    from diffinstruct.config.prompts import read_prompts

    return pd.concat([read_prompts("pocket:eval"), read_prompts("pocket:open")], ignore_index=True)


def examine(sample: Sampler, reference_features: np.ndarray | None = None, every: int = 1) -> Evaluation:
    """Every figure of one generator. `reference_features` [m, F] replaces the stored ones, for who makes them anew.
    `every`: on every n-th prompt only, to see that it works."""
    from reward_models import load

    if reference_features is None:
        reference_features = reference_examination().reference
    return evaluate(
        sample,
        examination_prompts().iloc[::every].reset_index(drop=True),
        {name: load(name) for name in REWARDS},
        AttributeClassifier.load(POCKET / "classifier"),
        reference_features,
        noise_shape=(4, 16, 16),
        seed=SEED,
    )


def examine_run(experiment: Experiment, folder: Path, every: int = 1) -> dict[str, float]:
    """Every figure of a finished run's generator, as columns of its row in a sweep's table; `every` as in `examine`."""
    from diffinstruct.models.export import load_export
    from diffinstruct.reports.frames import flat

    reference, generator = load_export(folder / "export")
    return flat(examine(reference.sampler(generator), every=every).summary())


def reference_examination() -> Evaluation:
    """The stored examination of the reference at 50 guided steps (made by experiments/build_pocket_world.py)."""
    import pandas as pd
    from safetensors.numpy import load_file

    stored = load_file(POCKET / "examination" / "features.safetensors")
    arrays = {name: array.astype("float32") for name, array in stored.items()}
    table = pd.read_csv(POCKET / "examination" / "table.csv", keep_default_na=False, na_values=["nan"])
    return Evaluation(table, arrays["features"], arrays["reference"], SEED)


def store_reference_examination(evaluation: Evaluation) -> None:
    """Write what `reference_examination` reads."""
    import numpy as np
    from safetensors.numpy import save_file

    folder = POCKET / "examination"
    folder.mkdir(parents=True, exist_ok=True)
    evaluation.table.to_csv(folder / "table.csv", index=False, na_rep="nan")
    arrays = {"features": evaluation.features, "reference": evaluation.reference}
    save_file({k: np.ascontiguousarray(v, np.float16) for k, v in arrays.items()}, folder / "features.safetensors")
