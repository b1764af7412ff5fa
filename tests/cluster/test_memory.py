"""How a GPU's memory is handed out in the processes that we start."""

from __future__ import annotations

import socket

import pytest

from diffinstruct.cluster import attach
from diffinstruct.method.memory import allocator_settings

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
GROWING = {NAMES[0]: "expandable_segments:True"}


@pytest.mark.parametrize("chosen", [None, *NAMES])
def test_what_the_user_has_set_stays(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(chosen, "max_split_size_mb:64")
    assert allocator_settings() == ({chosen: "max_split_size_mb:64"} if chosen else GROWING)


def test_workers_of_a_cluster_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, dict[str, dict[str, str]]] = {}
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(attach.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(attach.ray, "init", lambda **options: asked.update(options))
    monkeypatch.setattr(attach.ray, "shutdown", lambda: None)
    monkeypatch.setattr(attach, "described", lambda: "")
    monkeypatch.setattr(attach.os, "environ", attach.os.environ.copy())
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setitem(attach.os.environ, "RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with attach.attached():
            pass
    assert asked["runtime_env"]["env_vars"].items() >= GROWING.items()
