"""Puts a bad line between runs and a real MLflow server: all that a run has measured must be there in the end, each
value once.

    python tests/chaos/tracker.py [--schedules 200] [--seed 0]

Each schedule, drawn by the seed, is a sequence of times in which requests pass, are refused, are slow, are answered
with 500 before MLflow has seen them, or after it has done what they asked, or lose their answer on the way. A run
measures meanwhile and ends; what it could not deliver `diffinstruct sync` does, on a line that is good again. The
server's whole history of every key, the run's parameters, tags, state and picture are compared with what was measured.
Exit status 1 if they differ.
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
FATES = ("pass", "refuse", "slow", "500 before", "500 after", "lost answer")
ROWS, KEYS = 40, 3


class Line(ThreadingHTTPServer):
    """A proxy whose `fate` befalls every request."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.port, self.fate, self.met = port, "pass", Counter[str]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Line

    def pass_on(self) -> None:
        fate = self.server.fate
        self.server.met[fate] += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.close_connection = True
        if fate == "refuse":
            return
        if fate == "slow":
            time.sleep(0.2)
        status, answer, headers = 500, b"{}", list[tuple[str, str]]()
        if fate != "500 before":
            there = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
            there.request(self.command, self.path, body, {key: value for key, value in self.headers.items() if key != "Host"})
            response = there.getresponse()
            answer, headers = response.read(), response.getheaders()
            status = 500 if fate == "500 after" else response.status
            there.close()
        if fate == "lost answer":
            return
        self.send_response(status)
        for key, value in headers:
            if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = pass_on

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def bad_weather(line: Line, plan: random.Random) -> Iterator[None]:
    ended = threading.Event()

    def go() -> None:
        while not ended.is_set():
            line.fate = plan.choice(FATES)
            ended.wait(plan.uniform(0.05, 0.5))

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        line.fate = "pass"


def one(folder: Path, line: Line, direct: str, number: int) -> list[str]:
    """A run under one schedule; what is not as it was measured."""
    import numpy as np
    from mlflow import MlflowClient

    from diffinstruct.tracking.journal import Journal, deliver

    plan, name = random.Random(number), f"run-{number}"
    params = {"seed": number, "a.key": "a value"}
    with bad_weather(line, plan):
        tracker = Journal(line.uri, "chaos", name, folder / name, params, {"kind": "chaos"})
        wanted: dict[str, list[tuple[int, float]]] = {f"key/{k}": [] for k in range(KEYS)}
        for step in range(ROWS):
            values = {key: plan.random() for key in wanted}
            tracker.metrics(step, values)
            for key, value in values.items():
                wanted[key].append((step, value))
            time.sleep(0.02)
        tracker.image("grid", 7, np.zeros((8, 8, 3), np.uint8))
        tracker.event(9, "spike", "a word")
        tracker.finish()
    until = time.monotonic() + 120
    (thread,) = tracker._threads
    while not thread.complete:
        try:
            deliver(folder / name, line.uri)
            break
        except Exception:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
    thread.join()  # it may be at it, too
    client = MlflowClient(direct)
    runs = client.search_runs(
        [client.get_experiment_by_name("chaos").experiment_id], f"attributes.run_name = '{name}'"
    )  # fmt: skip
    if len(runs) != 1:
        return [f"{name}: {len(runs)} runs"]
    (run,) = runs
    found = {
        key: sorted((value.step, value.value) for value in client.get_metric_history(run.info.run_id, key)) for key in wanted
    }
    faults = [f"{name} {key}: {len(found[key])} values of {ROWS}" for key in wanted if found[key] != wanted[key]]
    if run.data.params != {key: str(value) for key, value in params.items()}:
        faults.append(f"{name}: parameters {run.data.params}")
    if (run.info.status, run.data.tags.get("event.spike")) != ("FINISHED", "step 9: a word"):
        faults.append(f"{name}: {run.info.status}, {run.data.tags}")
    pictures = [Path(file.path).suffix for file in client.list_artifacts(run.info.run_id, "images")]
    if Counter(pictures)[".png"] < 1:
        faults.append(f"{name}: pictures {pictures}")
    shutil.rmtree(folder / name)
    return faults


def chaos(folder: Path, schedules: int, seed: int = 0) -> tuple[str, bool]:
    """All of it, in `folder`. Returns the line that says it all, and whether all is well."""
    import logging

    from mlflow import MlflowClient
    from tiny.server import Server

    from diffinstruct.tracking import delivery, journal, mlflow

    logging.getLogger("diffinstruct.tracking").setLevel(logging.ERROR)
    delivery.INTERVAL, delivery.LONGEST_PAUSE, journal.DELIVERY_WAIT_S, mlflow.POSTPONED_AGAIN = 0.05, 0.3, 2.0, 0.3
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "10"
    server, began = Server(folder), time.monotonic()
    server.start()
    try:
        for _ in range(600):
            try:
                MlflowClient(server.uri).search_experiments()
                break
            except Exception:
                time.sleep(0.2)
        line, faults = Line(server.port), list[str]()
        for number in range(seed * 10_000, seed * 10_000 + schedules):
            faults += one(folder, line, server.uri, number)
    finally:
        server.kill()
    of = ", ".join(f"{n} {fate}" for fate, n in sorted(line.met.items()))
    return (
        f"{schedules} schedules, {sum(line.met.values())} requests ({of}), {time.monotonic() - began:.0f} s: "
        + (f"{len(faults)} FAULTS: {'; '.join(faults[:5])}" if faults else "every value there exactly once")
    ), not faults


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        text, good = chaos(Path(temporary), asked.schedules, asked.seed)
    print(text)
    sys.exit(not good)
