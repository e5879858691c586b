"""Every part of `mixmask bench` on a GPU. Skipped without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mixmask.launch.bench import benchmark
from mixmask.launch.bench.part import PARTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("name", [*PARTS.by_name()])
def test_a_part_measures_something(name: str, tmp_path: Path) -> None:
    benchmark.run_benchmark(tmp_path, "cuda", 1.0, [name], False, "mixmask bench")
    document = json.loads((tmp_path / "bench.json").read_text())
    rows, missing = document["rows"][name], document["left_out"][name]
    assert rows or all("cannot be imported" in one["why"] for one in missing), missing
    assert not [one for one in missing if one["what"] == "the rest of it"]
    for row in rows:
        assert row["value"] > 0
        assert row["share"] is None or 0 < row["share"] < 1.3, row
