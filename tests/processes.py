"""Real processes with gloo on this machine, started with the environment that torchrun gives them."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from tests import zygote
from tests.zygote import ROOT, Started

__all__ = ["ROOT", "finish", "processes", "python"]


def processes(count: int, *arguments: str, program: Sequence[str] = ("-m", "mixmask")) -> list[Started]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    return [
        zygote.start([*program, *arguments], {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def finish(started: list[Started]) -> list[tuple[int, str, str]]:
    try:
        texts = [process.communicate(timeout=150) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, texts)]


def python(count: int, script: Path, *arguments: str) -> list[tuple[int, str, str]]:
    return finish(processes(count, *arguments, program=[str(script)]))
