"""The base class of transfer protocols: a typed recipe whose methods carry it out.

A protocol is a class derived from `TransferRecipe`, in a file of its own in ``transfer/protocols/``. Its fields are the
keys of its configs, ``protocol: Literal["…"]`` is its name in configs, and its methods do the work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import Field

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.config import Recipe, added, operational
from mixmask.engine.data import open_split
from mixmask.engine.datasets import OpenImages
from mixmask.engine.errors import ConfigError
from mixmask.engine.expected import Expectations
from mixmask.engine.flops import forward_flops
from mixmask.engine.late import torch
from mixmask.engine.normalization import Normalization
from mixmask.engine.precision import DeviceName, Precision
from mixmask.engine.records import Label, Method
from mixmask.engine.storage import RunDirectory
from mixmask.engine.workload import Workload
from mixmask.transfer.checkpoints.source import Source

LABELS = ("framework", "method", "pretrain_epochs", "pretrain_data")  # keys that label a foreign checkpoint


class Split(Protocol):
    """One split of a data set, as the transfer stage sees it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label ``i`` means ``classes[i]``."""

    def __len__(self) -> int: ...

    def summary(self) -> dict[str, str | int]:
        """Counts, and under ``listing`` a digest that identifies the data (two data sets may share a name)."""

    def check(self) -> None:
        """Look for damaged files before training starts.

        Raises:
            DataError: If there are any; the message names them.
        """


S = TypeVar("S", bound=Split)


@dataclass(frozen=True)
class Setting(Generic[S]):
    """Everything that `TransferRecipe.measure` is given.

    Attributes:
        run: The run directory; it exists and belongs to this run.
        fingerprint: Identity of the recipe and the backbone.
        data: Digests that identify the data, under ``train`` and ``test``.
        device: The device of this rank.
        source: The backbone: its weights and its metadata.
        train: The training images, as `TransferRecipe.open` gave them.
        test: The test images.
        normalization: The data set whose mean and standard deviation normalise the images.
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
    """The keys that all transfer protocols share, and the methods that each implements.

    ``backbone`` is a file: this project's ``backbone.safetensors`` or a checkpoint of a known layout. ``framework``,
    ``method``, ``pretrain_epochs`` and ``pretrain_data`` label the result if the file does not (a foreign checkpoint);
    tables show them as given. ``normalization`` names the data set whose mean and standard deviation the trunk was
    trained with; null takes the file's, or ImageNet's if the file does not say.
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
    deterministic: bool = operational(False, description="on a GPU, the same numbers to the bit; slower")
    expected: Expectations = operational(())
    log_every: int = operational(10, ge=1)
    checkpoint_every: int = operational(500, ge=1)

    data: Any  # a recipe with a ``name`` and a ``root``

    # --- labels --------------------------------------------------------------------------------------------------

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
        """The headline metrics, the most important first, and the column heading of each in tables."""

    takes_any_channels: ClassVar[bool] = False  # whether it can measure backbones for other images than RGB
    depends_on_seed: ClassVar[bool] = True  # False: every seed gives the same number
    task: ClassVar[str] = "image-classification"  # its name on hubs

    @property
    def num_seeds(self) -> int:
        """How many runs, each with its own seed, a result should average."""
        return 1

    @property
    def variation(self) -> str:
        """Why `num_seeds` runs are needed: how much single runs differ, in words. Empty if one is enough."""
        return ""

    @abstractmethod
    def settings(self, train: Any) -> dict[str, Any]:
        """The settings that a reader needs to interpret the number. The stage adds ``precision``.

        Args:
            train: The training images.
        """

    def remarks(self) -> list[str]:
        """Warnings about the recipe that are not errors, one sentence each."""
        return []

    def one_task_per_node(self) -> bool:
        """Whether a cluster job has one task per node, which starts the ranks of its node itself."""
        return False

    # --- what it does ------------------------------------------------------------------------------------------------

    def check(self, source: Source, device: torch.device) -> None:
        """Refuse a backbone or a device that this recipe does not support.

        Raises:
            ConfigError: The message names the key to change.
        """

    def check_processes(self, processes: int) -> None:
        """Refuse a world size that cannot share the work.

        Raises:
            ConfigError: The message says what would be valid.
        """

    @abstractmethod
    def open(self, open_images: OpenImages = open_split) -> tuple[Any, Any]:
        """Open the training and the test split, and check that the recipe's sizes fit them.

        Args:
            open_images: Lists a split of labelled images; the default reads the folders.

        Raises:
            UserError: If the data are missing or damaged, or a size does not fit them.
        """

    def workload(self, backbone: BackboneRecipe, train: Any, test: Any) -> Workload:
        """What the protocol computes, for estimates; by default every image passes the trunk once, at 224 pixels."""
        num = len(train) + len(test)
        return Workload(forward=num * forward_flops(backbone, 224), loaded=num, half=self.precision != "fp32")

    def num_labelled(self, num_train: int) -> int:
        """How many of so many training images it uses."""
        return num_train

    @abstractmethod
    def measure(self, setting: Setting[Any]) -> dict[str, float]:
        """Run the protocol, resuming from its checkpoint if there is one. Every rank calls this.

        Returns:
            Flat metrics; accuracies and average precisions in percent. ``seconds`` and ``images_per_second`` of
            training may be among them.
        """


def beyond_end(milestones: Sequence[int], length: float, unit: str) -> list[str]:
    """A warning if milestones of a schedule lie at or after its end; empty if none do."""
    late = [milestone for milestone in milestones if milestone >= length]
    if not late:
        return []
    return [
        f"milestones {', '.join(map(str, late))} are not reached in {length:g} {unit}: the learning rate is not reduced "
        f"there"
    ]


def require_shares(batch_size: int, processes: int) -> None:
    """Refuse a batch that so many processes cannot share equally.

    Raises:
        ConfigError: The message says what would be valid.
    """
    if batch_size % processes:
        raise ConfigError(
            f"batch_size {batch_size} cannot be shared by {processes} processes: choose a multiple of {processes}"
        )


def require_imagenet_statistics(recipe: TransferRecipe, source: Source, what: str) -> None:
    """Refuse a trunk that was trained with the mean and deviation of another data set than ImageNet.

    Args:
        recipe: Its ``normalization`` comes before the file's.
        source: The backbone.
        what: What takes ImageNet's only, for the message.

    Raises:
        ConfigError: If it is another one.
    """
    normalization = recipe.normalization or source.info.normalization
    if normalization != "imagenet":
        raise ConfigError(
            f"normalization: this trunk was trained with the mean and deviation of {normalization}; {what} takes "
            f"ImageNet's only"
        )
