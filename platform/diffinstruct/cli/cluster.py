"""The command that hands a run to a cluster."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from diffinstruct.cli.arguments import Overrides, Recipe


def rayjob(
    file: Recipe,
    overrides: Overrides,
    image: Annotated[str, Option("--image", help="a container image with this project and its Ray in it")],
    claim: Annotated[str, Option("--claim", help="the PersistentVolumeClaim that the runs lie in")] = "diffinstruct-runs",
    resume: Annotated[
        str | None, Option("--resume", metavar="RUN", help="go on with the run in this folder of the claim")
    ] = None,
    workers_per_pod: Annotated[
        int | None,
        Option(
            "--workers-per-pod",
            metavar="N",
            help="training processes of one pod, each with its GPU; default: equal pods of at most 8, or cluster.shard_degree",
        ),
    ] = None,
) -> None:
    """Print a run as a manifest for KubeRay, for `kubectl apply -f -`."""
    from diffinstruct.cluster.kuberay import manifest
    from diffinstruct.config.reading import load

    # Files that the recipe names lie in the claim or in the image: they are not looked for here.
    experiment = load(file, overrides)
    print(manifest(experiment, image, claim, resume, workers_per_pod), end="")
