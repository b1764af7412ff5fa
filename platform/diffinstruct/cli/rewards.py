"""Commands for rewards without a run: which there are, whether one can be trusted, how pictures score."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer

from diffinstruct.cli.arguments import CommandGroup, check_output, check_rewards
from diffinstruct.errors import UserError

app = Typer(cls=CommandGroup, help="List rewards, validate one, score pictures.", rich_markup_mode=None)


@app.command("list")
def list_rewards() -> None:
    """List the built-in rewards: what they measure, their scores, papers, weights, licences."""
    from reward_models import NAMES

    width = max(map(len, NAMES)) + 2
    for name, entry in NAMES.items():
        paper = "no paper" if entry.paper == "-" else f"arXiv {entry.paper}"
        print(f"{name:<{width}}{entry.line}")
        for line in (f"scores {entry.range}", f"{paper}; licences: {entry.licences}", f"weights: {entry.weights}", entry.path):
            print(" " * width + line)


@app.command("validate")
def validate(
    reward: Annotated[str, Argument(metavar="NAME", help="a built-in reward, or your own as module:callable")],
    images: Annotated[
        Path | None,
        Option("--images", metavar="FOLDER", help="a folder of pictures; default: made by the pocket world's generator"),
    ] = None,
    prompts: Annotated[
        str | None, Option("--prompts", metavar="FILE", help="as for `rewards score`; default: the pocket world's")
    ] = None,
    held_out: Annotated[bool, Option("--held-out", help="only to be held out, not trained on: it needs no gradient")] = False,
) -> None:
    """Validate a reward, check by check, as every run does before its first step."""
    check_rewards([reward], "rewards validate")
    from diffinstruct.method.rewards import RewardError
    from diffinstruct.reward_service.reward_validation import raise_on_faults
    from diffinstruct.reward_service.score_folder import validate_on_folder
    from reward_models import NAMES

    report = validate_on_folder(reward, images, prompts, not held_out)
    if reward in NAMES:
        print(f"{'declared':<30}{NAMES[reward].range}")
    for check, outcome in [*report.checks.items(), *(("remark", remark) for remark in report.remarks)]:
        print(f"{check:<30}{outcome}")
    try:
        raise_on_faults([report])
    except RewardError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    print(f"reward {reward} can be {'held out' if held_out else 'trained on'}")


@app.command("test", hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def renamed() -> None:
    """Answer the old name of `rewards validate`."""
    raise UserError("rewards test: unknown command, it is now 'rewards validate'")


@app.command("score")
def score(
    images: Annotated[Path, Argument(metavar="IMAGES", help="a folder of .png, .jpg or .webp")],
    prompts: Annotated[
        str,
        Argument(
            metavar="PROMPTS", help="a .txt or .csv with one prompt a picture, in the order of names; or a .csv that names them"
        ),
    ],
    rewards: Annotated[list[str] | None, Option("--reward", metavar="NAME", help="may be repeated")] = None,
    out: Annotated[Path | None, Option("-o", metavar="scores.csv", help="a row a picture, a column a reward")] = None,
) -> None:
    """Score a folder of pictures, each with its prompt; `rewards validate` tells whether a reward can be trusted."""
    names = list(dict.fromkeys(rewards or []))
    check_rewards(names, "--reward")
    if out:
        check_output(out, ".csv")
        if out.exists() and Path(prompts).exists() and out.samefile(prompts):
            raise UserError(f"-o: {str(out)!r} is the prompts' own file, name another")
    from diffinstruct.method.rewards import RewardError
    from diffinstruct.reward_service.score_folder import pictures_with_prompts, save, score, summary

    table = pictures_with_prompts(images, prompts)
    print(f"scoring {len(table)} pictures", flush=True)
    try:
        table = score(images, table, names)
    except RewardError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    print(summary(table, names))
    if out:
        save(table, out)
        print(out)
