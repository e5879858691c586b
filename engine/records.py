"""``record.json``: what a finished run says about itself, and the only thing that `evaluate` reads."""

from __future__ import annotations

import math
import platform
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from engine import distributed
from engine.errors import RunDirectoryError
from engine.provenance import code
from engine.storage import RunDirectory, write_text

SCHEMA = 1

Method = Literal["vanilla", "mixmask", "unmix", "mixmask+unmix", "mscn", "random", "unknown"]


class Record(BaseModel):
    """A finished run.

    ``metrics`` is flat; accuracies and average precisions are in percent (``knn/top1``, ``bbox/AP50``). ``lineage`` and
    ``protocol_fingerprint`` say which runs may share a cell: the pretraining and the transfer recipe without their seeds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: int = Field(SCHEMA, alias="schema")
    stage: Literal["pretrain", "transfer"]
    protocol: str
    name: str
    dataset: str
    framework: str
    method: Method
    arch: str
    seed: int
    fingerprint: str
    parent: str | None = None
    pretrain_dataset: str | None = None
    pretrain_epochs: float | None = None
    pretrain_seed: int | None = None
    lineage: str = ""
    protocol_fingerprint: str = ""
    settings: dict[str, Any] = {}
    metrics: dict[str, float]
    expected: dict[str, Any] | None = None
    data: dict[str, Any] = {}
    environment: dict[str, Any]
    seconds: float

    @field_validator("metrics")
    @classmethod
    def _finite(cls, metrics: dict[str, float]) -> dict[str, float]:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"metrics that are not finite numbers: {', '.join(bad)}")
        return metrics

    def write(self, path: Path) -> None:
        """Write the record whole or not at all."""
        write_text(path, self.model_dump_json(indent=2, by_alias=True) + "\n")

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a record.

        Raises:
            ValueError: If the file is truncated or is not a record.
        """
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


def finished_record(directory: RunDirectory) -> Record:
    """The record of a finished run directory.

    Raises:
        RunDirectoryError: If the file is damaged.
    """
    try:
        return Record.read(directory.record_file)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise RunDirectoryError(f"{directory.record_file}: damaged ({reason}); delete it to run again") from None


def environment() -> dict[str, Any]:
    """Versions, device, number of processes and code version of this run."""
    return {**_machine(), **distributed.environment()}


@cache
def _machine() -> dict[str, Any]:
    import torch
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_threads": torch.get_num_threads(),
        "git_commit": code().commit,
    }
