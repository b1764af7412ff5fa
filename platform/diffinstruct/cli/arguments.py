"""Arguments that several commands share, and mistakes in them that are refused before the work begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option
from typer.core import TyperGroup

from diffinstruct.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from diffinstruct.config.experiment import Experiment


def _repeatable(flag: str, metavar: str, help: str) -> Any:
    return Option(flag, metavar=metavar, default_factory=list, show_default=False, help=help)


Recipe = Annotated[Path, Argument(metavar="FILE", help="an experiment in YAML, see experiments/recipes")]
Overrides = Annotated[list[str], _repeatable("-s", "key=value", "change one key, e.g. -s steps=10")]
Run = Annotated[Path, Argument(metavar="RUN", help="a run's folder")]
RewardNames = Annotated[list[str], _repeatable("--reward", "NAME", "may be repeated; default: the rewards of the first run")]
MetricNames = Annotated[
    list[str], _repeatable("--metric", "MODULE:ATTRIBUTE", "a metric of your own, beside the others; may be repeated")
]
ReferencePictures = Annotated[
    int, Option("--reference-pictures", metavar="N", help="pictures that distances are measured to; 0: no distances")
]
EvaluationSeed = Annotated[int, Option("--seed", help="seed of the noise, by default far from training's")]


class CommandGroup(TyperGroup):
    """A group that reads its own options only where no command comes first: typer loads pydantic for them, which would
    take half of the time in which `--help` has to answer."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-"):
            self.params, self.add_help_option = [], False
        return super().parse_args(ctx, args)


def read_experiment(file: Path, overrides: Sequence[str]) -> Experiment:
    """The configuration, checked as far as can be without torch, so that mistakes show before anything starts."""
    from diffinstruct.config.reading import load

    experiment = load(file, overrides)
    from diffinstruct.config.inputs import check_inputs

    check_inputs(experiment)
    return experiment


def existing_run(folder: Path) -> Path:
    """`folder`, absolute, if a run has begun in it."""
    if not (folder / "experiment.yaml").is_file():
        siblings = [str(path.parent) for path in folder.parent.glob("*/experiment.yaml")]
        if inside := sorted(str(path.parent) for path in folder.glob("*/experiment.yaml")):
            raise UserError(f"{folder}: is no run, but holds {', '.join(inside)}")
        raise UserError(f"{folder}: no run there (it has no experiment.yaml){did_you_mean(folder, siblings)}")
    return folder.absolute()


def check_rewards(names: Sequence[str], option: str) -> None:
    """Refuse a name that is neither built in nor an import path, before torch starts; and no names at all."""
    from reward_models import NAMES

    known = f"there are {', '.join(NAMES)}, and your own as module:callable"
    if not names:
        raise UserError(f"{option}: name at least one; {known}")
    if unknown := next((name for name in names if name not in NAMES and ":" not in name), None):
        raise UserError(f"{option}: no reward is named {unknown!r}{did_you_mean(unknown, NAMES) or f'; {known}'}")


def check_reference_pictures(n: int) -> None:
    """Refuse a number of reference pictures that no distance can be measured to."""
    if n < 0 or n == 1:
        raise UserError(f"--reference-pictures: should be 0 or at least 2, got {n}")


def check_output(out: Path, suffix: str) -> None:
    """Refuse an unusable `-o` before the work for it begins."""
    if out.suffix != suffix:
        raise UserError(f"-o: should be a {suffix} file, got {str(out)!r}")
    check_parent(out)


def check_parent(out: Path) -> None:
    """Refuse an `-o` in a folder that does not exist."""
    if not out.absolute().parent.is_dir():
        raise UserError(f"-o: no folder {str(out.parent)!r}")
