"""What a transfer protocol is to the transfer stage: a recipe that says what it does.

A protocol is a class derived from `TransferRecipe`, in a file of its own in ``transfer/protocols/``. Its fields are the keys
of its configs, ``protocol: Literal["…"]`` is its name there, and its methods do the work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from pydantic import Field

from mixmask.engine.config import Recipe, added, operational
from mixmask.engine.data import open_split
from mixmask.engine.datasets import OpenImages
from mixmask.engine.expected import Expectations
from mixmask.engine.normalization import Normalization
from mixmask.engine.precision import DeviceName, Precision
from mixmask.engine.records import Label, Method
from mixmask.engine.storage import RunDirectory
from mixmask.transfer.checkpoints.source import Source

LABELS = ("framework", "method", "pretrain_epochs", "pretrain_data")  # what a user may say of a foreign checkpoint


class Split(Protocol):
    """The images of one part of a data set, as the stage sees them."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""

    def __len__(self) -> int: ...

    def summary(self) -> dict[str, str | int]:
        """Counts, and under ``listing`` a digest that tells two data sets of one name apart."""

    def check(self) -> None:
        """Find damaged files before long work starts.

        Raises:
            DataError: With their names.
        """


S = TypeVar("S", bound=Split)


@dataclass(frozen=True)
class Setting(Generic[S]):
    """What a protocol is given to measure with.

    Attributes:
        run: The run directory; it exists and is owned.
        fingerprint: Identity of the recipe and the backbone.
        data: Identity of the data: a digest for ``train`` and ``test``.
        device: This process's device.
        source: The backbone: its weights and what is known of it.
        train: The training images, as `TransferRecipe.open` gave them.
        test: The test images.
        normalization: Whose mean and deviation the images are normalised with.
    """

    run: RunDirectory
    fingerprint: str
    data: dict[str, Any]
    device: torch.device
    source: Source
    train: S
    test: S
    normalization: Normalization


class TransferRecipe(Recipe, ABC):
    """A transfer protocol and what it is told.

    ``backbone`` is a file: this project's ``backbone.safetensors`` or a checkpoint of a known layout. ``framework``,
    ``method``, ``pretrain_epochs`` and ``pretrain_data`` label the result when the file cannot say (a foreign checkpoint):
    any names, shown in tables as they are given. ``normalization`` names the data set whose
    mean and deviation the trunk was trained with; null takes what the file says, and ImageNet's where it does not.
    """

    protocol: str
    name: str = operational(..., pattern=r"^[A-Za-z0-9_.+-]+$")
    seed: int = Field(0, ge=0)
    backbone: str = operational(..., min_length=1)
    framework: Label | None = operational(None)
    method: Method | None = operational(None)
    pretrain_epochs: float | None = operational(None, gt=0, le=1e9, allow_inf_nan=False)
    pretrain_data: Label | None = operational(None)
    normalization: Normalization | None = added(None)
    precision: Precision = "fp32"
    device: DeviceName = operational("auto")
    expected: Expectations = operational(())
    log_every: int = operational(10, ge=1)
    checkpoint_every: int = operational(500, ge=1)

    data: Any  # a recipe with a ``name`` and a ``root``

    # --- what it says ------------------------------------------------------------------------------------------------

    @property
    def record_name(self) -> str:
        """The protocol's name in records and tables; by default that of the config."""
        return self.protocol

    @property
    @abstractmethod
    def title(self) -> str:
        """What it is called in tables: ``kNN``, ``1 % of labels``."""

    @property
    @abstractmethod
    def headlines(self) -> Mapping[str, str]:
        """The metrics for which it is run, the most important first, and what a table's column calls each."""

    depends_on_seed: ClassVar[bool] = True  # else several seeds give one number, and no deviation
    task: ClassVar[str] = "image-classification"  # its name on hubs

    @property
    def num_seeds(self) -> int:
        """Runs, with other seeds, that make a result."""
        return 1

    @property
    def variation(self) -> str:
        """Why so many: by how much such runs differ, in words."""
        return ""

    @abstractmethod
    def settings(self, train: Any) -> dict[str, Any]:
        """What must be printed with the number for it to mean something. ``precision`` is added to it.

        Args:
            train: The training images.
        """

    def remarks(self) -> list[str]:
        """What is odd about the recipe and no error, one sentence each."""
        return []

    def one_task_per_node(self) -> bool:
        """Whether a cluster starts one task per node, which starts that node's processes itself."""
        return False

    # --- what it does ------------------------------------------------------------------------------------------------

    def check(self, source: Source, device: torch.device) -> None:
        """Refuse a backbone or a device that the recipe cannot be carried out with.

        Raises:
            ConfigError: With the key to change.
        """

    def check_processes(self, processes: int) -> None:
        """Refuse a number of processes that cannot share the work.

        Raises:
            ConfigError: With what would be valid.
        """

    @abstractmethod
    def open(self, open_images: OpenImages = open_split) -> tuple[Any, Any]:
        """The training and the test images, and that the recipe's sizes fit them.

        Args:
            open_images: Lists a split of labelled images; the default reads the folders.

        Raises:
            UserError: If the data are missing or damaged, or a size does not fit them.
        """

    @abstractmethod
    def measure(self, setting: Setting[Any]) -> dict[str, float]:
        """Carry out the protocol, from its checkpoint if there is one; every process calls this.

        Returns:
            Flat metrics, accuracies and average precisions in percent. ``seconds`` of training may be among them.
        """


def beyond_end(milestones: Sequence[int], length: float, unit: str) -> list[str]:
    """A sentence if milestones of a schedule lie at or after its end."""
    late = [milestone for milestone in milestones if milestone >= length]
    if not late:
        return []
    return [
        f"milestones {', '.join(map(str, late))} are not reached in {length:g} {unit}: the learning rate is not reduced "
        f"there"
    ]
