"""What may be written where a checkpoint is wanted: a file, ``zoo:NAME``, or ``hf:OWNER/NAME``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mixmask.engine.errors import CheckpointError, UserError
from mixmask.transfer.checkpoints.tensor_report import BY_KEYS, Reading
from mixmask.transfer.protocol import TransferRecipe
from mixmask.transfer.zoo.catalogue import ZooEntry, known_checkpoint
from mixmask.transfer.zoo.download import Digests, fetch_file

ZOO, HUB = "zoo:", "hf:"
FOLDER = "MIXMASK_ZOO"  # environment variable that names the folder of downloaded checkpoints


@dataclass(frozen=True)
class Located:
    """A checkpoint on this machine.

    Attributes:
        path: The file.
        entry: What the zoo knows of it; None for other files.
    """

    path: Path
    entry: ZooEntry | None = None

    @property
    def reading(self) -> Reading:
        """How to read it, where its tensors do not tell: the zoo knows a ConvNet of timm, or another prefix."""
        if self.entry is None:
            return BY_KEYS
        timm = self.entry.arch.startswith("timm/")
        return Reading(prefix=self.entry.prefix, arch=self.entry.arch if timm else None)

    def read_as(self, layout: str | None, prefix: str | None, arch: str | None) -> Reading:
        """How to read it, with the user's own choices first."""
        if layout is None and prefix is None and arch is None:
            return self.reading
        return Reading(layout, prefix, arch or self.reading.arch)

    def known(self, recipe: TransferRecipe) -> TransferRecipe:
        """The recipe with the labels and published numbers of a checkpoint of the zoo."""
        return recipe if self.entry is None else self.entry.labelled(recipe)


def is_reference(text: str) -> bool:
    """Whether it names a checkpoint that may have to be downloaded."""
    return text.startswith((ZOO, HUB))


def locate_checkpoint(reference: str, download: bool = True) -> Located:
    """The file that is meant, downloaded if it is not here yet.

    Args:
        reference: A path, ``zoo:NAME`` (`mixmask zoo` lists the names), or ``hf:OWNER/NAME`` with an optional
            ``@REVISION``: ``backbone.safetensors`` or ``model.safetensors`` of a model on the Hugging Face Hub.
        download: Whether it may be downloaded.

    Raises:
        UserError: If the name is unknown, the file may not or cannot be downloaded, or is not the published one.
        RunFailure: If the network or the disk fails.
    """
    if reference.startswith(ZOO):
        entry = known_checkpoint(reference.removeprefix(ZOO))
        return Located(zoo_file(entry, download), entry)
    if reference.startswith(HUB):
        from mixmask.transfer.zoo.hub import hub_file  # huggingface_hub takes a second to import

        return Located(hub_file(reference.removeprefix(HUB), download))
    return Located(Path(reference).expanduser())


def zoo_folder() -> Path:
    """Where downloaded checkpoints lie: ``$MIXMASK_ZOO``, else ``~/.cache/mixmask/zoo``."""
    given = os.environ.get(FOLDER)
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(given).expanduser() if given else Path(cache or Path.home() / ".cache") / "mixmask" / "zoo"


def zoo_path(entry: ZooEntry) -> Path:
    """Where a checkpoint of the zoo is kept; several have the same file name, so each has a folder."""
    return zoo_folder() / entry.name / entry.file_name


def zoo_file(entry: ZooEntry, download: bool = True) -> Path:
    """The file of a checkpoint of the zoo.

    Raises:
        UserError: If it is not there and may not be downloaded, or has to be got by hand.
        RunFailure: If the network or the disk fails.
    """
    path = zoo_path(entry)
    if path.is_file():
        return path
    if entry.by_hand:
        raise CheckpointError(
            f"zoo:{entry.name}: not here, and published in a place that needs a browser ({entry.by_hand}): {entry.url}",
            f"download it and save it as {path}",
        )
    if not download:
        raise UserError(
            f"zoo:{entry.name}: not downloaded yet: `mixmask zoo {entry.name} --fetch` does that; or save {entry.url} "
            f"as {path}"
        )
    return fetch_file(entry.url, path, Digests(entry.sha256, entry.md5))
