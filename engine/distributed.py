"""Distributed training: rank and world size, and agreement between ranks (of tensors: `collectives`).

A run may be started by torchrun or by SLURM's srun, on one node or many; `session` reads their environment once. All
other code asks `world()`. With a single process, every function here works without communication.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from mixmask.engine.errors import ConfigError, Interrupted, RunFailure, UserError
from mixmask.engine.late import torch
from mixmask.engine.progress import quieten

T = TypeVar("T")

TIMEOUT = timedelta(hours=1)  # rank 0 checks files and evaluates while the others wait


@dataclass(frozen=True)
class World:
    """This process's rank, the world size, and its local rank on the node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files and speaks to the user; exactly one does."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """This rank's contiguous share of ``total`` rows, which must be a multiple of the world size."""
        assert total % self.size == 0
        each = total // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


_world = World()


def world() -> World:
    """This process's rank and the world size; rank 0 of 1 outside a `session`."""
    return _world


@dataclass(frozen=True)
class Rendezvous:
    """What the launcher's environment says: the world, and the address and port of rank 0."""

    world: World
    address: str
    port: int


def read_launch(environment: Mapping[str, str]) -> Rendezvous | None:
    """Read the rank, the world size and the rendezvous address from the launcher's environment.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun sets SLURM_PROCID, SLURM_LOCALID,
    SLURM_STEP_NUM_TASKS and the node list, from which the first node's name is taken. An sbatch script or an salloc shell
    that starts one process without srun counts as a single process.

    Returns:
        None for a single process.

    Raises:
        ConfigError: If a variable is missing or not a number, or the node list cannot be read.
    """
    if "WORLD_SIZE" in environment and _number(environment, "WORLD_SIZE") > 1:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        absent = [name for name in names if name not in environment]
        if absent:
            raise ConfigError(
                f"WORLD_SIZE is set, but not {', '.join(absent)}: start the processes with torchrun or srun"
            )
        rank, size, local, port = (_number(environment, names[i]) for i in (0, 1, 2, 4))
        return Rendezvous(World(rank, size, local), environment["MASTER_ADDR"], port)
    if "SLURM_STEP_ID" not in environment or _number(environment, "SLURM_STEP_NUM_TASKS") == 1:
        return None
    rank, size, local, job = (
        _number(environment, name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID")
    )
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    alone = environment.get("SLURM_STEP_NUM_NODES") == "1"
    address = environment.get("MASTER_ADDR") or ("127.0.0.1" if alone else _first_node(nodes))
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT")
    else:
        # All ranks must compute the same port, and steps of one job may run side by side: use job and step ids.
        port = 15000 + (97 * job + _number(environment, "SLURM_STEP_ID")) % 20000
    return Rendezvous(World(rank, size, local), address, port)


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        raise ConfigError(
            f"the environment variable {name} is {environment.get(name)!r}, a number was expected"
        ) from None


def _first_node(nodes: str) -> str:
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ConfigError(f"cannot read SLURM's node list {nodes!r} ({error}); set MASTER_ADDR") from None


@contextlib.contextmanager
def session() -> Iterator[World]:
    """Initialise the process group, if there are several processes, and destroy it at the end."""
    global _world
    launch = read_launch(os.environ)
    if launch is None:
        yield _world
        return
    try:
        socket.getaddrinfo(launch.address, launch.port)
    except OSError as error:  # otherwise the ranks would wait an hour for each other
        raise ConfigError(
            f"the first node's name {launch.address} means nothing on this machine ({error}); set MASTER_ADDR"
        ) from None
    cuda = torch.cuda.is_available()
    torch.distributed.init_process_group(
        # gloo for CPU tensors and Python objects, NCCL for tensors on GPUs.
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        # torchrun already runs a store at this address; env:// uses it instead of starting another one.
        init_method=f"tcp://{launch.address}:{launch.port}" if "TORCHELASTIC_RUN_ID" not in os.environ else "env://",
        rank=launch.world.rank,
        world_size=launch.world.size,
        timeout=TIMEOUT,
    )
    _world = launch.world
    quieten(not _world.is_writer)
    try:
        agreed(_take_device)
        yield _world
        torch.distributed.destroy_process_group()  # not after an error: other ranks may never get here
    except (RunFailure, Interrupted) as end:  # all ranks raise these at the same step
        stopped = isinstance(end, Interrupted)
        if _world.is_writer:
            print(f"{'interrupted' if stopped else 'failed'}: {end}", file=sys.stderr, flush=True)
        torch.distributed.barrier()
        raise SystemExit(128 + end.signal if isinstance(end, Interrupted) else 1) from None
    finally:
        _world = World()
        quieten(False)


def _take_device() -> None:
    """Select this rank's GPU, if there are any. A launcher may make only that one visible, which is then GPU 0."""
    count = torch.cuda.device_count()
    if count > 1 and _world.local_rank >= count:
        raise ConfigError(
            f"process {_world.local_rank} of its node has no GPU of its own: torch sees {count}. Start one process per GPU"
        )
    if count:
        torch.cuda.set_device(_world.local_rank if count > 1 else 0)


def agreed(call: Callable[[], T]) -> T:
    """Call on every rank, and continue only if all calls succeed.

    A single process raises as usual. With several, rank 0 prints the error of the first rank that failed, and all exit,
    with code 2 for a `UserError` and 1 for a failure. Otherwise a rank that stops alone would leave the others waiting
    for it, or the launcher would kill them before the message is printed.
    """
    if _world.size == 1:
        return call()
    problem: tuple[int, str] | None = None
    results: list[T] = []
    try:
        results.append(call())
    except (UserError, RunFailure) as error:
        problem = error.exit_code, error.told()
    except OSError as error:
        problem = RunFailure.exit_code, f"{RunFailure.prefix}: {error}"
    problems: list[tuple[int, str] | None] = [None] * _world.size
    torch.distributed.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            code, message = found
            if _world.is_writer:
                print(message if rank == 0 else f"process {rank}: {message}", file=sys.stderr, flush=True)
            # Exit only when the message is out: launchers kill the other ranks as soon as one has ended.
            torch.distributed.barrier()
            raise SystemExit(code)
    return results[0]


def require_same(value: object, what: str) -> None:
    """Require the same ``value`` on every rank, for example that all see the same files.

    Raises:
        ConfigError: If ``value`` differs between processes; ``what`` names it.
    """
    if _world.size > 1:
        values: list[object] = [None] * _world.size
        torch.distributed.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            raise ConfigError(
                f"{what}: not every process sees the same ({values}); the folder of runs must be one that all see"
            )


def on_rank0(call: Callable[[], object]) -> None:
    """Call on rank 0 while the other ranks wait; an error ends all of them (see `agreed`)."""
    agreed(lambda: call() if _world.is_writer else None)


def from_first(value: T) -> T:
    """Broadcast rank 0's value, any object that can be pickled, to all ranks."""
    if _world.size == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def gather_to_rank0(value: T) -> list[T]:
    """On rank 0 the values of all ranks, in rank order; an empty list on the others."""
    if _world.size == 1:
        return [value]
    values = [value] * _world.size if _world.is_writer else None
    torch.distributed.gather_object(value, values, dst=0)
    return values or []


def any_of(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank. A collective operation: every rank must call it."""
    if _world.size == 1:
        return flag
    # On the CPU, so that gloo reduces it without waiting for the GPU.
    flags = torch.tensor(int(flag))
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags)


def environment() -> dict[str, Any]:
    """World size and communication backend, for the record."""
    return {"world_size": _world.size, "backend": torch.distributed.get_backend() if _world.size > 1 else None}
