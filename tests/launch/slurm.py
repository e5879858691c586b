"""A real SLURM on this machine: munged, slurmctld and several slurmd on free ports of 127.0.0.1, in a temporary folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NEEDED_FOR_ACCOUNTING = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb-install-db")
NODES = ("n1", "n2")

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n.spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
KillWait=10
MinJobAge={min_job_age}
SlurmdTimeout={slurmd_timeout}
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType={storage}
NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs=8 RealMemory=64000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""

ACCOUNTING = """\
AuthType=auth/munge
AuthInfo={root}/munge/socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
LogFile={root}/slurmdbd.log
PidFile={root}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""


def missing(accounting: bool = False) -> list[str]:
    """The programs that are needed and not installed."""
    return [name for name in NEEDED + NEEDED_FOR_ACCOUNTING * accounting if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Ask again until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.1)


@dataclass
class Slurm:
    """A running cluster. Commands take their configuration from ``environment``."""

    root: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self.root / f"{command[0]}.out").open("ab")
        process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.started.append(process)
        return process

    def kill_node(self, name: str) -> None:
        """SIGKILL a node's daemon; the jobs' processes there live on, as on a node that has lost the network."""
        process = next(one for one in self.started if "slurmd" in str(one.args) and name in list(one.args))
        process.kill()
        process.wait()

    def empty(self) -> None:
        """Cancel every job and wait until they are gone."""
        self.run("scancel", "--user", getpass.getuser(), "--full")
        self.run("scancel", "--user", getpass.getuser())
        wait_for(lambda: not self.run("squeue", "-h"), "the queue is empty")

    @contextlib.contextmanager
    def used(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Let this process talk to it, and leave it empty."""
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            monkeypatch.delenv(name)
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, self.environment[name])
        try:
            yield
        finally:
            self.empty()

    def stop(self) -> None:
        """End exactly what was started, last first."""
        with contextlib.suppress(RuntimeError, TimeoutError, subprocess.TimeoutExpired):
            self.empty()
        for process in reversed(self.started):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def running_slurm(
    root: Path, accounting: bool = False, min_job_age: int = 300, slurmd_timeout: int = 300
) -> Iterator[Slurm]:
    """Start a cluster and stop it at the end.

    Args:
        root: An empty folder; its path must be short enough for a socket's name.
        accounting: Keep finished jobs in a database, which `sacct` asks.
        min_job_age: Seconds for which `squeue` still knows a finished job.
        slurmd_timeout: Seconds after which a node that does not answer is down.
    """
    host = socket.gethostname()
    user = getpass.getuser()
    controller, dbd, database, *ports = free_ports(3 + len(NODES))
    (root / "munge").mkdir(parents=True, mode=0o711)
    (root / "state").mkdir()
    names = ",".join(NODES)
    values = {"root": root, "host": host, "user": user, "controller": controller, "min_job_age": min_job_age}
    values["slurmd_timeout"] = slurmd_timeout
    config = root / "slurm.conf"
    storage = f"accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\nAccountingStoragePort={dbd}\n" + (
        f"AccountingStoragePass={root}/munge/socket"
    )
    config.write_text(
        CONFIG.format(
            **values,
            names=names,
            ports=",".join(map(str, ports)),
            storage=storage if accounting else "accounting_storage/none",
        )
    )
    environment = {**os.environ, "SLURM_CONF": str(config), "PATH": _path()}
    for name in [name for name in environment if name.startswith("SLURM_") and name != "SLURM_CONF"]:
        del environment[name]
    cluster = Slurm(root, environment)
    try:
        _start_munge(cluster)
        if accounting:
            _start_accounting(cluster, dbd, database, host, user)
        cluster.start("slurmctld", "-D", "-f", str(config))
        for name in NODES:
            (root / f"{name}.spool").mkdir()
            cluster.start("slurmd", "-D", "-N", name, "-f", str(config))
        idle = f"{len(NODES)}"
        wait_for(
            lambda: cluster.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D", check=False).strip() == idle,
            f"{idle} idle nodes (see {root}/*.log)",
        )
        yield cluster
    finally:
        cluster.stop()


def _start_munge(cluster: Slurm) -> None:
    folder = cluster.root / "munge"
    key = folder / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    cluster.start(
        "munged",
        "--foreground",
        "--force",
        f"--key-file={key}",
        f"--socket={folder}/socket",
        f"--pid-file={folder}/pid",
        f"--log-file={folder}/log",
        f"--seed-file={folder}/seed",
    )
    wait_for((folder / "socket").exists, f"munged's socket (see {folder}/log)")


def _start_accounting(cluster: Slurm, port: int, database_port: int, host: str, user: str) -> None:
    data = cluster.root / "mysql"
    cluster.run("mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={user}", "--skip-test-db")
    (cluster.root / "init.sql").write_text(
        "CREATE DATABASE slurm;\n"  # the server reads a statement from each line
        "CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';\n"
        "GRANT ALL ON slurm.* TO 'slurm'@'127.0.0.1';\n"
    )
    cluster.start(
        "mariadbd",
        "--no-defaults",
        f"--datadir={data}",
        f"--user={user}",
        f"--port={database_port}",
        "--bind-address=127.0.0.1",
        "--skip-name-resolve",
        f"--socket={data}/socket",
        f"--pid-file={data}/pid",
        f"--init-file={cluster.root}/init.sql",
        "--innodb-buffer-pool-size=64M",
    )
    config = cluster.root / "slurmdbd.conf"
    config.write_text(
        ACCOUNTING.format(root=cluster.root, host=host, port=port, database_port=database_port, user=user)
    )
    config.chmod(0o600)

    def listening(number: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", number)) == 0

    wait_for(lambda: listening(database_port), "the database listens")
    cluster.start("slurmdbd", "-D")
    wait_for(lambda: listening(port), f"slurmdbd listens (see {cluster.root}/slurmdbd.log)")
    cluster.run("sacctmgr", "-i", "add", "cluster", "test")
