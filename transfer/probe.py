"""What tells the classifiers of a linear probe apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """One combination of hyperparameters."""

    lr: float
    weight_decay: float
    batch_norm: bool

    def __str__(self) -> str:
        return f"lr={self.lr:g},weight_decay={self.weight_decay:g},batch_norm={str(self.batch_norm).lower()}"
