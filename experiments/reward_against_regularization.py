"""How much reward for how much distance: regularization weight against reward scale, on the pocket recipe.

    python experiments/reward_against_regularization.py [--smoke]

Under Adam mostly the ratio of the two matters. Held-out reward and divergence stand beside the
trained reward: that one rises anyway.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffinstruct.cli import new_run_folder
from diffinstruct.cluster.sweep import changed, grid, sweep
from diffinstruct.experiment import load

RECIPE = Path(__file__).parent / "recipes" / "pocket.yaml"
# Ratios come twice, as a canary: trials of one ratio should end alike.
FULL = {"objective.regularization_weight": [0.5, 1.0, 2.0], "objective.reward_scale": [0.0, 1.0, 2.0, 4.0, 8.0]}
SMOKE = {"objective.regularization_weight": [0.5, 1.0], "objective.reward_scale": [1.0, 2.0]}
SHORT = {"steps": 4, "global_batch_size": 8, "logging.every": 2, "logging.grid_prompts": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="2 x 2 trials of a few steps")
    smoke = parser.parse_args().smoke
    base = changed(load(RECIPE), {"name": "reward-against-regularization"} | (SHORT if smoke else {}))
    table = sweep(base, grid(SMOKE if smoke else FULL), new_run_folder(base))
    shown = [key for key in table if "." in key or key.startswith(("reward/", "held_out/", "divergence"))]
    print(table[shown].to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main()
