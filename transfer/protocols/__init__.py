"""The transfer protocols, one module each: a file that is put here is found, and its ``protocol`` can be used in configs."""

from __future__ import annotations

from mixmask.engine.registry import Registry, literal_of
from mixmask.transfer.protocol import TransferRecipe

PROTOCOLS: Registry[TransferRecipe] = Registry(
    TransferRecipe, __name__, "mixmask.protocols", "protocol", literal_of("protocol")
)
