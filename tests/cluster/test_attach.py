"""A cluster that is up already: told from one of our own, asked for its token, and sent jobs as the README says.

One token-protected cluster for the module, started as docs/how-to/cluster.md says but for its ports and folders.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import BUSY
from tiny.runs import journal

ROOT = Path(__file__).parents[2]
WHERE = "from diffinstruct.cluster.train import attached\nwith attached() as where: print(where)"
HIDES = shutil.which("unshare") and subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode == 0
SLOW_TO_SAVE = """\
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*signal):
    time.sleep(6)  # twice what Ray waits by default
    (folder / "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / "up").touch()
time.sleep(600)
"""

SMALL = (
    "-s global_batch_size=2 -s overoptimization.every=0 -s rewards.held_out=[] -s logging.every=1 "
    "-s logging.grid_prompts=1 -s cluster.rewards.placement=process"
)


@pytest.fixture(scope="module")
def cluster():
    """The variables of a shell that knows it."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        port, dashboard, agent = (of.getsockname()[1] for of in sockets)
    home = Path(tempfile.mkdtemp(prefix="di"))  # short: sockets lie in it
    shell = os.environ | {
        "HOME": str(home),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "platform", ROOT))),
        "RAY_AUTH_MODE": "token",
        # where `ray job` looks; by default that is port 8265
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_worker_niceness": "0",
        "HF_TOKEN": "hf_of_the_machine",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        **BUSY,
    }
    subprocess.run(["ray", "get-auth-token", "--generate"], env=shell, check=True, capture_output=True)
    start = "ray start --head --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1"
    ours = (
        f"--block --port={port} --dashboard-port={dashboard} --dashboard-agent-listen-port={agent} "
        f"--temp-dir={home}/ray --num-cpus=3 --object-store-memory={10**8} --disable-usage-stats"
    )
    with (home / "said").open("w") as said:
        # It dies with this process: `ray stop` would end everybody's clusters.
        head = subprocess.Popen(
            [*shlex.split(start), *shlex.split(ours)],
            env=shell | {"RAY_JOB_STOP_WAIT_TIME_S": "300"}, stdout=said, stderr=said,
        )  # fmt: skip
    try:
        until(lambda: "Ray runtime started" in (home / "said").read_text() or head.poll() is not None)
        assert head.poll() is None and ray(shell, "job", "list").returncode == 0, (home / "said").read_text()
        yield shell | {"CLUSTER": f"127.0.0.1:{port}"}
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(home, ignore_errors=True)


def ray(shell, *arguments):
    return subprocess.run(["ray", *arguments], env=shell, capture_output=True, text=True)


def described(cluster):
    """What a run says of it, as a pattern: Ray calls a machine by its name in the network, also where it was told
    127.0.0.1."""
    return rf"\S+:{cluster['CLUSTER'].partition(':')[2]}  dashboard {cluster['RAY_API_SERVER_ADDRESS']}"


def until(happened):
    end = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.5)


@pytest.mark.long
def test_two_live_clusters_are_told_apart_by_their_address_and_dashboard(cluster):
    def where(**variables):
        return subprocess.run([sys.executable, "-c", WHERE], env=cluster | variables, capture_output=True, text=True)

    other, own = where(RAY_ADDRESS=cluster["CLUSTER"]), where()
    assert re.fullmatch(rf"ray {described(cluster)}  code {ROOT}/platform/diffinstruct\n", other.stdout), other.stderr
    address, dashboard = re.fullmatch(r"ray (\S+)  dashboard (http://\S+)\n", own.stdout).groups()
    assert not re.match(described(cluster), f"{address}  dashboard {cluster['RAY_API_SERVER_ADDRESS']}")
    assert dashboard != cluster["RAY_API_SERVER_ADDRESS"]


def test_without_the_token_a_run_is_turned_away_in_one_line(cluster, tmp_path):
    asked = [sys.executable, "-m", "diffinstruct", "train", str(ROOT / "experiments/recipes/pocket.yaml")]
    shell = cluster | {"RAY_ADDRESS": cluster["CLUSTER"], "RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run([*asked, "-s", f"output_dir={tmp_path}"], env=shell, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.search(rf"^RAY_ADDRESS: no Ray at {cluster['CLUSTER']}: .*; if it asks for a token, ", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr and not any(tmp_path.iterdir())


def test_another_ray_on_the_cluster_is_said_in_one_line_with_both_versions(cluster):
    other = f"import ray\nray.__version__ = '2.59.1'\n{WHERE}"
    shell = cluster | {"RAY_ADDRESS": cluster["CLUSTER"]}
    done = subprocess.run([sys.executable, "-c", other], env=shell, capture_output=True, text=True)
    *_, line = done.stderr.splitlines()
    python = re.escape(sys.version.split()[0])
    assert re.fullmatch(
        rf"\S*UserError: RAY_ADDRESS: the cluster at {cluster['CLUSTER']} has Ray {version('ray')} and Python {python}, "
        rf"here are Ray 2.59.1 and Python {python}; both have to be the same",
        line,
    ), done.stderr
    assert "RuntimeError" not in done.stderr


@pytest.mark.skipif(not HIDES, reason="a folder can be hidden from a process in a mount namespace, which this user cannot make")
@pytest.mark.long
def test_a_machine_that_does_not_see_the_folder_is_named_before_anything_begins(cluster, tmp_path):
    """A second node, for which another disk lies over the folder."""
    runs = tmp_path / "runs"
    runs.mkdir()
    join = f"ray start --block --address={cluster['CLUSTER']} --num-cpus=1 --object-store-memory={10**8} --disable-usage-stats"
    hidden = ["unshare", "-Urm", "sh", "-c", f"mount -t tmpfs none {shlex.quote(str(tmp_path))} && exec {join}"]
    shell = cluster | {"RAY_ADDRESS": cluster["CLUSTER"]}
    node = subprocess.Popen(hidden, env=cluster, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: ray(shell, "status").stdout.count("1 node_") > 1 or node.poll() is not None)
        assert node.poll() is None
        asked = [sys.executable, "-m", "diffinstruct", "train", str(ROOT / "experiments/recipes/pocket.yaml")]
        done = subprocess.run([*asked, "-s", f"output_dir={runs}"], env=shell, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        *_, line = done.stderr.splitlines()
        assert re.match(rf"output_dir: {runs}/\S+ is not seen by \d+\.\S+( \(\S+\))?, where training processes may run; ", line)
        assert "Traceback" not in done.stderr and not any(runs.iterdir())
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(60)


@pytest.mark.long
def test_a_job_from_the_working_directory_works_as_the_readme_says(cluster, tmp_path):
    readme = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"^ +(ray job submit .*\\\n.* -s output_dir=)\$PWD/runs", readme, re.MULTILINE)
    typed = f"{command}{tmp_path}/runs -s steps=1 {SMALL}"
    done = subprocess.run(typed, shell=True, cwd=ROOT, env=cluster, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").glob("pocket-*")
    assert (run / "export" / "model_index.json").exists()
    first = next(line for line in done.stdout.splitlines() if line.startswith(f"run {run} "))
    # The job's copy of the code, not this checkout.
    assert re.search(rf"  ray {described(cluster)}  code \S*/working_dir_files/\S*/platform/diffinstruct$", first), first


def test_a_job_has_the_hubs_folder_of_its_runtime_environment_and_its_machines_token(cluster, tmp_path):
    text = (ROOT / "runtime_env.yaml").read_text()
    (tmp_path / "env.yaml").write_text(re.sub(r"^  # (?=HF_HOME)", "  ", text, flags=re.MULTILINE))
    ask = "import os; print('has', os.environ['HF_HOME'], os.environ['HF_TOKEN'])"
    shell = {**cluster, "HF_TOKEN": "hf_of_the_shell"}
    done = ray(shell, "job", "submit", "--runtime-env", str(tmp_path / "env.yaml"), "--", "python", "-c", ask)
    assert "has /mnt/shared/huggingface hf_of_the_machine" in done.stdout, done.stdout + done.stderr


def test_a_stopped_job_is_given_the_time_to_save(cluster, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_TO_SAVE)
    entrypoint = ["python", str(tmp_path / "slow.py"), str(tmp_path)]
    assert ray(cluster, "job", "submit", "--no-wait", "--submission-id", "slow", "--", *entrypoint).returncode == 0
    until((tmp_path / "up").exists)
    stopped = ray(cluster, "job", "stop", "slow")
    assert stopped.returncode == 0, stopped.stderr  # it waits until the job has ended
    assert (tmp_path / "saved").exists()
    assert "STOPPED" in ray(cluster, "job", "list").stdout


@pytest.mark.long
def test_a_stopped_run_is_saved_and_another_job_goes_on_with_it(cluster, tmp_path):
    def train(rest):
        typed = f"ray job submit --working-dir . --runtime-env runtime_env.yaml {rest}"
        return subprocess.run(typed, shell=True, cwd=ROOT, env=cluster, capture_output=True, text=True)

    recipe = f"experiments/recipes/pocket.yaml -s output_dir={tmp_path}/runs -s steps=40 {SMALL}"
    train(f"--no-wait --submission-id stopped -- python -m diffinstruct train {recipe}")
    until(lambda: any(max(journal(of.parent)[0], default=0) > 2 for of in (tmp_path / "runs").glob("pocket-*/journal.jsonl")))
    assert ray(cluster, "job", "stop", "stopped").returncode == 0
    (run,) = (tmp_path / "runs").glob("pocket-*")
    metrics, ends = journal(run)
    assert {*ends} == {"KILLED"} and (run / "checkpoints" / f"step-{max(metrics):08d}").is_dir() and max(metrics) < 40

    done = train(f"-- python -m diffinstruct train {run}/experiment.yaml --resume {run}")
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines() if line]
    assert [record["step"] for record in records if "loss/score_network" in record.get("metrics", {})] == list(range(1, 41))
    assert journal(run)[1][-1] == "FINISHED"
