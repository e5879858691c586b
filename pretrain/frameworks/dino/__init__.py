"""DINO for ConvNets (arXiv:2104.14294)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.pretrain.framework import MAX_WIDTH
from mixmask.pretrain.multi_crop import MultiCropRecipe

if TYPE_CHECKING:
    from mixmask.pretrain.network import Framework


class DINORecipe(MultiCropRecipe):
    """A student predicts the output distribution of its moving average, which is centred and sharpened.

    The head has ``projector_layers`` layers down to ``dim``, then ``outputs`` prototypes of unit length (section 3).
    The teacher's temperature rises linearly from ``warmup_teacher_temperature`` to ``teacher_temperature`` over the share
    ``teacher_warmup`` of the run (50 epochs of 800 are 0.0625); the published code does it epoch by epoch. The prototypes
    stay as they are for the share ``freeze_prototypes``. ``momentum`` of the teacher rises to 1 along half a cosine.
    """

    kind: Literal["dino"] = "dino"
    dim: int = Field(256, ge=1, le=MAX_WIDTH)
    projector_layers: int = Field(3, ge=1, le=10)
    projector_width: int = Field(2048, ge=1, le=MAX_WIDTH)
    projector_norm: bool = True
    outputs: int = Field(65536, ge=2, le=MAX_WIDTH)
    momentum: float = Field(0.996, ge=0, lt=1)
    temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.07, gt=0)
    warmup_teacher_temperature: float = Field(0.04, gt=0)
    teacher_warmup: float = Field(0.0625, ge=0, le=1)
    center_momentum: float = Field(0.9, ge=0, lt=1)
    freeze_prototypes: float = Field(0.00125, ge=0, le=1)

    @override
    def full_passes(self, hidden: bool) -> tuple[int, int]:
        return 2, 2

    @model_validator(mode="after")
    def _sharper(self) -> DINORecipe:
        if max(self.teacher_temperature, self.warmup_teacher_temperature) >= self.temperature:
            raise ValueError(
                f"the teacher must be sharper than the student: teacher_temperature {self.teacher_temperature} and "
                f"warmup_teacher_temperature {self.warmup_teacher_temperature} must be below temperature {self.temperature}"
            )
        return self

    @override
    def build(self, backbone: BackboneRecipe) -> Framework:
        from mixmask.pretrain.frameworks.dino.network import DINO

        return DINO(self, backbone)
