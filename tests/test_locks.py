"""Locks: exclusive and shared ones, between threads and between processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from diffinstruct import locks
from diffinstruct.locks import LOCK, Busy, exclusive, locked, only_writer

HOLDER = """
import sys
from pathlib import Path
from diffinstruct.locks import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_readers_share_what_a_writer_has_alone(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text("content")
    with path.open("rb") as reader, path.open("rb") as other:
        assert locked(reader, shared=True) and locked(other, shared=True)
        with path.open("r+b") as writer:
            assert not locked(writer)
    with path.open("r+b") as writer, path.open("rb") as reader:
        assert locked(writer) and not locked(reader, shared=True)
    assert path.read_text() == "content"


def test_an_exclusive_lock_is_waited_for_and_ends_with_its_process(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(locks.__file__).parents[1])}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        entered = threading.Event()

        def enter() -> None:
            with exclusive(tmp_path / "lock"):
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.3)
        holder.kill()
        thread.join(60)
    assert entered.is_set()


def test_a_disk_without_locks_is_named_and_nothing_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", without)
    with exclusive(tmp_path / "lock"):
        pass
    (record,) = caplog.records
    assert record.message.startswith(f"{tmp_path}/lock cannot be locked (Function not implemented)")


def test_the_lock_of_a_machine_that_is_gone_is_waited_for_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network disk's server keeps it for a lease of 90 s; time goes fast here."""
    from diffinstruct.training.loop import FOLDER_LOCK_TIMEOUT_S

    now = [0.0]
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(locks, "locked", lambda file: now[0] >= 95)
    for patience, holder in ((FOLDER_LOCK_TIMEOUT_S, "here"), (5.0, "gone-1")):
        now[0] = 0.0
        host = locks.socket.gethostname() if holder == "here" else holder
        (tmp_path / LOCK).write_text(f"process 7 on {host}")
        with only_writer(tmp_path, patience):
            assert now[0] == 95
        line = f"{tmp_path}: waits up to 150 s for process 7 on {host} to let go of this run\n"
        assert capsys.readouterr().err == line
    for patience, holder in ((5.0, locks.socket.gethostname()), (0.0, "gone-1")):
        now[0] = 0.0
        (tmp_path / LOCK).write_text(f"process 7 on {holder}")
        with pytest.raises(Busy, match=f"process 7 on {holder} is at work"), only_writer(tmp_path, patience):
            pass
        assert now[0] == patience
