"""Cluster profiles: what jobs request from a lab's cluster, and how. All of it is in YAML files, nothing in code."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mixmask.engine.config import Recipe, load_recipe


class Resources(Recipe):
    """Resources of a job; a missing key is taken from the suite's stage, then from the cluster's profile.

    There is one process per GPU, or ``tasks_per_node`` processes on nodes without GPUs. Each is a SLURM task of its
    own, unless ``one_task_per_node`` is set.
    """

    nodes: int | None = Field(None, ge=1, le=10**7)
    gpus_per_node: int | None = Field(None, ge=0, le=10**4)
    tasks_per_node: int | None = Field(None, ge=1, le=10**7, description="without GPUs; with them it is their number")
    cpus_per_task: int | None = Field(None, ge=1, le=10**7)
    mem_gb: float | None = Field(
        None, gt=0, le=1e6, allow_inf_nan=False, description="per node; null asks for the cluster's default"
    )
    time_min: int | None = Field(None, ge=1, le=10**7, description="minutes until the job is stopped and queued again")
    partition: str | None = Field(None, description="instead of the profile's, as are qos and constraint")
    qos: str | None = None
    constraint: str | None = None
    one_task_per_node: bool | None = Field(
        None, description="a task starts its node's processes itself; the default for Detectron2's engine"
    )

    def over(self, other: Resources) -> Resources:
        """These resources, with missing keys taken from ``other``."""
        return Resources(**{**other.model_dump(exclude_none=True), **self.model_dump(exclude_none=True)})

    @property
    def num_nodes(self) -> int:
        """Nodes of a job."""
        return self.nodes or 1

    @property
    def tasks(self) -> int:
        """Processes per node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def processes(self) -> int:
        """World size: the processes of a job on all nodes."""
        return self.num_nodes * self.tasks

    @property
    def gpus(self) -> int:
        """GPUs of a job."""
        return self.num_nodes * (self.gpus_per_node or 0)

    @property
    def cpus(self) -> int:
        """CPUs of a job."""
        return self.processes * (self.cpus_per_task or 1)

    @property
    def minutes(self) -> int:
        """Time limit in minutes."""
        return self.time_min or DEFAULTS.time_min or 60

    def describe(self) -> str:
        """In words, for a dry run."""
        nodes = f"{self.num_nodes} node" + "s" * (self.num_nodes > 1)
        devices = f"{self.gpus_per_node} GPU" + "s" * (self.gpus_per_node != 1) if self.gpus_per_node else "no GPU"
        memory = f", {self.mem_gb:g} GB" if self.mem_gb else ""
        processes = f"{self.tasks} process{'es' * (self.tasks > 1)} × {self.cpus_per_task or 1} CPUs"
        return f"{nodes} × ({devices}, {processes}{memory}), {self.minutes // 60} h {self.minutes % 60:02d} min"


VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
SETUP_FAILED = 'echo "error: a setup line of the profile failed: $BASH_COMMAND (setup_may_fail: true ignores that)" >&2'

DEFAULTS = Resources(nodes=1, gpus_per_node=0, cpus_per_task=1, time_min=60)


class Profile(Recipe):
    """A cluster.

    ``data`` maps the ``data.name`` of a data set to its folder. ``setup`` lines run in the batch script before Python;
    if one fails, the job ends, unless ``setup_may_fail`` is set. ``container`` is put before the Python command
    (``apptainer exec --nv image.sif``). ``local_cache`` is a folder on the node for temporary and compiled files;
    ``$VARIABLES`` in it are expanded on the node. ``sbatch`` holds any other flag. ``max_timeouts`` limits the requeues
    after a time limit, ``max_requeues`` all requeues. ``shared_check_s`` is how many seconds `mixmask launch` waits for
    a test job that shows that the nodes see the folder of runs.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    array_parallelism: int = Field(256, ge=1)
    resources: Resources = Resources()
    signal_delay_s: int = Field(120, ge=1, description="seconds before the time limit at which a job is told to stop")
    max_timeouts: int = Field(20, ge=0)
    max_requeues: int = Field(50, ge=0)
    setup: tuple[str, ...] = ()
    setup_may_fail: bool = False
    container: str | None = None
    python: str | None = Field(None, description="the nodes' Python; by default the one that launches")
    environment: dict[VariableName, str] = Field({})
    local_cache: str | None = None
    data: dict[str, str] = Field({})
    sbatch: dict[str, str | int | bool] = Field({})
    shared_check_s: int = Field(60, ge=0, description="0 leaves the check out")
    gpu: str | None = Field(None, description="the kind of GPU, such as a100, for `mixmask estimate`")
    bench: str | None = Field(None, description="a bench.json measured on one of its nodes, for `mixmask estimate`")

    def resolve(self, resources: Resources) -> Resources:
        """A job's resources with this cluster's defaults."""
        return resources.over(self.resources).over(DEFAULTS)

    def command(self, python: str) -> str:
        """The shell command that starts Python on a node, inside the container if there is one."""
        interpreter = shlex.quote(self.python or python)
        return f"{self.container} {interpreter}" if self.container else interpreter

    def setup_lines(self, snapshot: Path, batch_script: bool = True) -> list[str]:
        """Shell lines to run before Python: setup, environment variables, and the code snapshot first on PYTHONPATH.

        Args:
            snapshot: The folder of the code snapshot.
            batch_script: True for a bash script; False for ``--cluster local``, which joins the lines with ``&&``.
        """
        setup = list(self.setup)
        # With &&, a failing line would stop the chain; in a script, set -e ends the job and the trap names the line.
        if self.setup_may_fail and not batch_script:
            setup = [f"{{ {line}; true; }}" for line in setup]
        elif setup and not self.setup_may_fail and batch_script:
            setup = ["set -e", f"trap {shlex.quote(SETUP_FAILED)} ERR", *setup, "trap - ERR", "set +e"]
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return [*setup, *exports, f"export PYTHONPATH={shlex.quote(str(snapshot))}${{PYTHONPATH:+:$PYTHONPATH}}"]

    def sbatch_parameters(self, resources: Resources, snapshot: Path, dependency: str | None) -> dict[str, Any]:
        """submitit's parameters for a job.

        Args:
            resources: After `resolve`.
            snapshot: The folder of the code snapshot, where the job starts.
            dependency: In sbatch's syntax, such as ``aftercorr:12``.
        """
        # A single task needs the CPUs of all processes that it starts.
        cpus = (resources.cpus_per_task or 1) * (resources.tasks if resources.one_task_per_node else 1)
        # Without kill-on-invalid-dep, a job whose parent has failed would stay in the queue for ever.
        extra: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes", "chdir": str(snapshot), **self.sbatch}
        named = {
            "partition": resources.partition or self.partition,
            "account": self.account,
            "qos": resources.qos or self.qos,
            "constraint": resources.constraint or self.constraint,
            "exclude": self.exclude,
            "cpus_per_task": cpus,
            "gpus_per_node": resources.gpus_per_node or None,
            "mem": f"{round(resources.mem_gb * 1024)}MB" if resources.mem_gb else None,
            "dependency": dependency,
        }
        return {
            "time": resources.minutes,
            "nodes": resources.num_nodes,
            "ntasks_per_node": 1 if resources.one_task_per_node else resources.tasks,
            "array_parallelism": self.array_parallelism,
            "signal_delay_s": self.signal_delay_s,
            "stderr_to_stdout": True,
            "setup": self.setup_lines(snapshot),
            # If one process is killed, the others would wait for it, so they are killed, too. Since SLURM 22.05 srun
            # does not take over the number of CPUs from sbatch; without it, each process is bound to one CPU.
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}"],
            "additional_parameters": {key: value for key, value in extra.items() if value is not False},
            **{key: value for key, value in named.items() if value is not None},
        }


def load_profile(path: Path | None) -> Profile:
    """Read a profile; None gives the defaults.

    Raises:
        ConfigError: As `load_recipe`.
    """
    return Profile() if path is None else load_recipe(Profile, path)
