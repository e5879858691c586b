"""How much a run computes and reads, for estimates of its time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """The arithmetic and the data of a run.

    Attributes:
        trained: Floating-point operations of the forward passes that are followed by a backward pass, which takes twice
            as many.
        forward: Floating-point operations of all other forward passes.
        side: Side of the images that the network sees, in pixels.
        loaded: Images that the loader decodes.
        views: Random views that the loader cuts out of each.
        steps: Optimizer steps; each exchanges the gradients of all processes.
        parameters: Numbers in such a gradient.
        kind: What is compared with measured runs: a framework, ``frozen``, ``finetune``, or a detector.
        mixture: The mixture of pretraining, else ``none``.
        half: Whether it computes in bf16 or fp16.
    """

    trained: float = 0.0
    forward: float = 0.0
    side: int = 224
    loaded: float = 0.0
    views: float = 1.0
    steps: int = 0
    parameters: int = 0
    kind: str = "frozen"
    mixture: str = "none"
    half: bool = False

    @property
    def operations(self) -> float:
        """All floating-point operations, those of backward passes included."""
        return 3 * self.trained + self.forward
