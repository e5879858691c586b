"""The draws of data splits are torch's."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixmask.engine.permutations import Permutations


@given(seed=st.integers(0, 2**63 - 1), sizes=st.lists(st.integers(0, 400), max_size=6))
def test_permutations_are_torchs(seed: int, sizes: list[int]) -> None:
    drawn, generator = Permutations(seed), torch.Generator().manual_seed(seed)
    for size in sizes:
        assert np.array_equal(drawn.next(size), torch.randperm(size, generator=generator).numpy())


def test_many_images_are_permuted_as_torch_does() -> None:
    assert np.array_equal(
        Permutations(7).next(50_000), torch.randperm(50_000, generator=torch.Generator().manual_seed(7)).numpy()
    )
