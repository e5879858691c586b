"""Cluster profiles: what a lab's cluster wants to be asked for, and how; nothing about anyone's cluster is in code."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mixmask.engine.config import Recipe, load_recipe


class Resources(Recipe):
    """What a job asks for; a key that is left out is taken from the suite's stage, then from the cluster's profile.

    There is one process per GPU, or ``tasks_per_node`` of them where there are no GPUs, and each is a task of SLURM's
    unless ``one_task_per_node`` is set.
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
        """These, and where they say nothing the other's."""
        return Resources(**{**other.model_dump(exclude_none=True), **self.model_dump(exclude_none=True)})

    @property
    def num_nodes(self) -> int:
        """Nodes of a job."""
        return self.nodes or 1

    @property
    def tasks(self) -> int:
        """Processes on a node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def processes(self) -> int:
        """Processes of a job."""
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
        """Time limit."""
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

    ``data`` says where data sets lie, by their ``data.name``. ``setup`` lines run in the batch script before Python; a job
    in which one of them fails ends there, unless ``setup_may_fail``;
    ``container`` stands before Python (``apptainer exec --nv image.sif``); ``local_cache`` is a folder on the node for
    temporary and compiled files, in which ``$VARIABLES`` are replaced on the node. ``sbatch`` holds any other flag.
    ``max_timeouts`` and ``max_requeues`` bound how often a job is queued again after its time limit and in all.
    ``shared_check_s`` is how long `mixmask launch` waits for a job's proof that the nodes see the folder of runs.
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

    def resolve(self, resources: Resources) -> Resources:
        """A job's resources with this cluster's defaults."""
        return resources.over(self.resources).over(DEFAULTS)

    def command(self, python: str) -> str:
        """Python as a shell starts it on a node."""
        interpreter = shlex.quote(self.python or python)
        return f"{self.container} {interpreter}" if self.container else interpreter

    def setup_lines(self, snapshot: Path, batch_script: bool = True) -> list[str]:
        """Shell lines before Python: the profile's, its environment, and the frozen code first on the path.

        Args:
            snapshot: The folder of the frozen code.
            batch_script: For bash, one line after another; else for ``--cluster local``, which joins them by ``&&``.
        """
        setup = list(self.setup)
        if self.setup_may_fail and not batch_script:
            setup = [f"{{ {line}; true; }}" for line in setup]
        elif setup and not self.setup_may_fail and batch_script:
            setup = ["set -e", f"trap {shlex.quote(SETUP_FAILED)} ERR", *setup, "trap - ERR", "set +e"]
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return [*setup, *exports, f"export PYTHONPATH={shlex.quote(str(snapshot))}${{PYTHONPATH:+:$PYTHONPATH}}"]

    def sbatch_parameters(self, resources: Resources, snapshot: Path, dependency: str | None) -> dict[str, Any]:
        """What submitit is told of a job.

        Args:
            resources: After `resolve`.
            snapshot: The folder of the frozen code, where the job starts.
            dependency: As sbatch writes it, such as ``aftercorr:12``.
        """
        cpus = (resources.cpus_per_task or 1) * (resources.tasks if resources.one_task_per_node else 1)
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
            # A killed process takes the others with it, which would wait for it. Since SLURM 22.05 srun must be told the
            # CPUs again, or each process is bound to one.
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}"],
            "additional_parameters": {key: value for key, value in extra.items() if value is not False},
            **{key: value for key, value in named.items() if value is not None},
        }


def load_profile(path: Path | None) -> Profile:
    """Read a profile; None is a cluster that wants nothing special.

    Raises:
        ConfigError: As `load_recipe`.
    """
    return Profile() if path is None else load_recipe(Profile, path)
