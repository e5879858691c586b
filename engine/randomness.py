"""Random draws without hidden state.

Every generator is derived from the recipe's seed and from *what* is drawn and *when* (purpose, epoch, step, image). An
interrupted run therefore needs no saved generator states: the generator of step 1,234 is the same whether or not the
process that asks for it also ran step 1,233, and however many workers share the work.
"""

from __future__ import annotations

import hashlib
import random

from mixmask.engine.late import torch


def derived_seed(seed: int, *what: int | str) -> int:
    """A seed for one purpose.

    Args:
        seed: The recipe's seed.
        what: What is drawn and when, for example ``"crop", epoch, index``.

    Returns:
        An integer in [0, 2**63). Equal arguments give equal seeds. torch's CPU generator uses the low 32 bits, so two
        purposes among many may share a stream; that is harmless.
    """
    # A hash gives neighbouring arguments unrelated streams. Python's own hash() of a string differs between processes.
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *what: int | str) -> torch.Generator:
    """A CPU generator for one purpose; see `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, *what))


def python_generator(seed: int, *what: int | str) -> random.Random:
    """Like `generator`, for drawing single numbers in plain Python."""
    return random.Random(derived_seed(seed, *what))
