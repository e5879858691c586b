"""The augmentation's GPU kernels against the operators: in Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton comes with torch's builds for GPUs")

from mixmask.engine.augment import AugmentRecipe, PhotometricDraws, apply_photometric, draw_photometric
from mixmask.engine.normalization import as_float, normalize, statistics_of

CASES = {
    "mocov2": {},
    "everything at once": {"jitter_probability": 1, "blur_probability": 1, "solarize_probability": 1, "hue": 0.5},
    "no blur": {"blur_probability": 0, "grayscale_probability": 0.5, "solarize_probability": 0.5},
    "wide blur": {"jitter_probability": 0, "blur_probability": 1, "blur_sigma": (8.0, 9.0)},  # up to the border
    "nothing": {"jitter_probability": 0, "blur_probability": 0, "grayscale_probability": 0},
    "strong": {"brightness": 1.0, "contrast": 3.0, "saturation": 2.0, "jitter_probability": 1},
}
SHAPES = ((3, 3, 7, 5), (2, 3, 33, 40), (1, 3, 9, 16))


def inputs(case: str) -> list[tuple[torch.Tensor, PhotometricDraws, AugmentRecipe]]:
    recipe = AugmentRecipe.model_validate({"crop": 8, **CASES[case]})
    found = []
    for number, shape in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(number)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        images[0, :, 0] = 128  # grey, and at the threshold of solarisation
        images[0, :, -1] = images[0, :1, -1]
        draws = draw_photometric(recipe, shape[0], generator)
        found.append((images, draws, recipe))
        found.append((images.contiguous(memory_format=torch.channels_last), draws, recipe))
        found.append((as_float(images), draws, recipe))
    return found


def reference(images: torch.Tensor, draws: PhotometricDraws, recipe: AugmentRecipe) -> torch.Tensor:
    return normalize(apply_photometric(as_float(images), draws), recipe.normalization)


def compare(case: str) -> None:
    """Called in a process of its own, whose environment turns the interpreter on before Triton is imported."""
    from mixmask.engine.photometric_kernels import run_kernels

    for images, draws, recipe in inputs(case):
        mean, std = statistics_of(recipe.normalization)
        result = run_kernels(images, draws.table(), list(mean), list(std), recipe.blur_probability > 0)
        assert result.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(result, reference(images, draws, recipe), atol=2e-5, rtol=0)


@pytest.mark.slow
def test_kernels_do_what_the_operators_do() -> None:
    program = f"from {__name__} import CASES, compare\nfor case in CASES:\n    compare(case)\n    print(case)\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [*CASES]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("architecture", [70, 90], ids=["V100", "H100"])
def test_kernels_compile_for_gpus_that_are_not_here(architecture: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mixmask.engine import photometric_kernels as kernels

    pointers = {"draws", "means", "blurred", "halfway", "out"}
    for kernel in (kernels.contrast_means, kernels.colours, kernels.blur_columns, kernels.blur_rows):
        for kind in ("*u8", "*fp32") if "images" in kernel.arg_names else ("",):
            fixed = {"BLOCK": kernels.BLOCK} | ({"BYTES": kind == "*u8"} if kind else {})
            types = {
                name: "constexpr"
                if name in fixed
                else kind
                if name == "images"
                else "*fp32"
                if name in pointers
                else "fp32"
                if name[:-1] in ("mean", "factor")
                else "i32"
                for name in kernel.arg_names
            }
            compiled = triton.compile(
                ASTSource(kernel, signature=types, constexprs=fixed), target=GPUTarget("cuda", architecture, 32)
            )
            assert compiled.asm["cubin"]
