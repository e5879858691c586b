"""One task on a node that starts the node's processes itself, as Detectron2's launcher does."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


def run_on_node(work: Callable[[], None], count: int) -> None:
    """Do ``work`` in ``count`` processes on this node, in one process group with those of the other nodes.

    Signals that ask a run to stop are forwarded to the processes, which write a checkpoint and end.

    Args:
        work: Can be pickled; calls `engine.distributed.session`.
        count: Processes on every node.

    Raises:
        SystemExit: With the exit code that the processes agreed on.
        RunFailure: If one was killed.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    from mixmask.engine.errors import RunFailure

    common, node = _rendezvous(count)
    context = start_processes(
        _process, args=(work, common, node * count), nprocs=count, join=False, start_method="spawn"
    )  # type: ignore[no-untyped-call]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in context.processes:
            if process.is_alive():
                # Ctrl-C in a terminal reaches them, too, and a second SIGINT would end them at once: send SIGTERM.
                os.kill(process.pid, signal.SIGTERM if number == signal.SIGINT else number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        while not context.join():
            pass
    except ProcessExitedException as error:
        if error.exit_code < 0:
            if -error.exit_code in STOP_SIGNALS:  # the signal came outside the training loop
                raise SystemExit(128 - error.exit_code) from None
            name = signal.Signals(-error.exit_code).name
            raise RunFailure(f"process {node * count + error.error_index} was killed by {name}") from None
        raise SystemExit(error.exit_code) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rendezvous(count: int) -> tuple[dict[str, str], int]:
    """torchrun's environment variables except the ranks, and the index of this node."""
    from mixmask.engine.distributed import read_launch

    launch = read_launch(os.environ)
    if launch is not None:  # one task on each of several nodes
        nodes, node, address, port = launch.world.size, launch.world.rank, launch.address, launch.port
    else:
        nodes, node, address = 1, 0, "127.0.0.1"
        with socket.socket() as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
    return {"WORLD_SIZE": str(nodes * count), "MASTER_ADDR": address, "MASTER_PORT": str(port)}, node


def _process(index: int, work: Callable[[], None], common: dict[str, str], first: int) -> None:
    from mixmask.engine.errors import RunFailure, UserError

    os.environ.update({**common, "RANK": str(first + index), "LOCAL_RANK": str(index)})
    try:
        work()
    except (UserError, RunFailure) as error:
        _end(error.told(), error.exit_code)


def _end(message: str, code: int) -> Any:
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(code)
