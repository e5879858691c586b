"""Load a transfer config; its ``protocol`` decides which other keys are valid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixmask.engine.config import load_recipe, read_key
from mixmask.transfer.protocol import TransferRecipe
from mixmask.transfer.protocols import PROTOCOLS


def protocol_of(path: Path | str, overrides: Sequence[str] = ()) -> type[TransferRecipe]:
    """The recipe class of the protocol that a config names.

    Raises:
        ConfigError: If the file cannot be read, or its ``protocol`` is missing or unknown.
    """
    return PROTOCOLS.get(read_key(path, overrides, "protocol"), f"{path}: the key 'protocol'")


def load_transfer_recipe(
    path: Path | str, overrides: Sequence[str] = (), origin: str = "command line"
) -> TransferRecipe:
    """Read a transfer config.

    Raises:
        ConfigError: As `load_recipe`; also when the protocol is missing or unknown.
    """
    return load_recipe(protocol_of(path, overrides), path, overrides, origin)
