"""What a run says while its cluster has not got what it asks for; without a cluster and without a clock."""

from __future__ import annotations

from diffinstruct.cluster.waiting import SAID_AFTER_S, Wait
from diffinstruct.config.sections import ClusterConfig

NEEDED = {"CPU": 32.0, "GPU": 8.0}


def said(wait, *looks):
    """The lines for looks of (machines, begun, seconds), where a machine has 16 CPUs and 4 GPUs."""
    every = [
        wait.line({"CPU": 16.0 * machines, "GPU": 4.0 * machines, "memory": 1e9}, {"CPU": 1.0}, begun, now)
        for machines, begun, now in looks
    ]
    return [line for line in every if line]


def test_a_wait_for_machines_is_said_once_and_so_is_its_end():
    late = 10 + SAID_AFTER_S
    looks = [
        (0, False, 10.0),
        (0, False, late - 1),
        (0, False, late),
        (1, False, late + 60),
        (2, False, late + 67),
        (2, True, 999),
    ]
    assert said(Wait(NEEDED, busy=False), *looks) == [
        "waiting for machines: asks for 32 CPU, 8 GPU; Ray has 0 CPU, 0 GPU, free 1 CPU, 0 GPU",
        "the machines are there, after 1:22",
    ]


def test_a_short_wait_is_not_worth_a_line_and_a_machine_that_is_lost_later_is():
    looks = [(1, False, 0.0), (2, False, SAID_AFTER_S), (2, True, 100), (1, True, 200), (1, True, 230), (2, True, 300)]
    lines = said(Wait(NEEDED, busy=False), *looks)
    assert lines == [
        "waiting for machines: asks for 32 CPU, 8 GPU; Ray has 16 CPU, 4 GPU, free 1 CPU, 0 GPU",
        "the machines are there, after 1:40",
    ]


def test_machines_that_others_use_are_waited_for_until_a_training_process_runs():
    looks = [(2, False, 0.0), (2, False, 40.0), (2, False, 50.0), (2, True, 60.0), (2, True, 600.0)]
    assert said(Wait(NEEDED, busy=True), *looks) == [
        "waiting for machines: asks for 32 CPU, 8 GPU; Ray has 32 CPU, 8 GPU, free 1 CPU, 0 GPU",
        "the machines are there, after 1:00",
    ]
    assert said(Wait(NEEDED, busy=False), *looks) == []


def test_a_run_looks_at_the_cluster_and_prints(monkeypatch, capsys):
    import threading

    from diffinstruct.cluster import waiting

    over = threading.Event()
    machines = iter([{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 9.0}])

    def has():
        found = next(machines, None)
        if found is None:
            over.set()
        return found or {"CPU": 9.0}

    monkeypatch.setattr(waiting, "SAID_AFTER_S", 0.0)
    monkeypatch.setattr(waiting, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr("ray.available_resources", dict)
    monkeypatch.setattr("ray.cluster_resources", has)
    with waiting.waits_said(ClusterConfig(workers=4), 1) as begun:
        begun()
        assert over.wait(60)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "waiting for machines: asks for 5 CPU; Ray has 1 CPU, free 0 CPU" and last.startswith("the machines are")
