"""The arithmetic of ResNets against what torch counts in the network itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmask.engine.backbones import RESNETS, BackboneRecipe
from mixmask.engine.flops import count, forward_flops, num_parameters


@pytest.mark.slow
@settings(max_examples=15)
@given(
    arch=st.sampled_from(RESNETS),
    stem=st.sampled_from(["standard", "cifar"]),
    channels=st.integers(1, 5),
    height=st.integers(32, 100),
    width=st.integers(32, 100),
)
def test_operations_and_parameters_of_resnets(arch: str, stem: str, channels: int, height: int, width: int) -> None:
    backbone = BackboneRecipe.model_validate({"arch": arch, "stem": stem, "in_channels": channels})
    assert (forward_flops(backbone, height, width), num_parameters(backbone)) == count(backbone, height, width)
