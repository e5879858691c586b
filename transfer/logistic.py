"""Multinomial logistic regression by L-BFGS, on the device that holds the features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixmask.engine.late import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

HISTORY = 10  # pairs of steps that approximate the Hessian, as SciPy's L-BFGS-B keeps by default
TOLERANCE = 1e-6  # largest entry of the gradient at the minimum; scikit-learn's 1e-4 is met at once by a warm start


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    head: nn.Linear,
    *,
    weight_decay: float,
    iterations: int,
    weights: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Fit a linear classifier in place: mean cross-entropy + weight_decay / 2 · |W|². The bias is not regularised.

    With three classes or more, scikit-learn's ``LogisticRegression(C=C)`` minimises the same for C = 1 / (N · weight_decay).
    (With two classes it has one weight vector instead of two, which equals half this weight decay.)

    Args:
        features: (N, D).
        labels: (N,) int64 classes, or (N, C) of zeros and ones: then C independent binary problems, and the mean is over
            the images, the sum over the classes.
        head: Where to start from, with C outputs.
        weight_decay: At least 0.
        iterations: Largest number of iterations.
        weights: (N, C) of multi-label images, zero where a label is not known.
        tolerance: Largest entry of the gradient at the minimum.
    """
    optimizer = torch.optim.LBFGS(
        head.parameters(),
        max_iter=iterations,
        max_eval=iterations * 2,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = head(features)
        if labels.ndim == 1:
            loss = torch.nn.functional.cross_entropy(logits, labels)
        else:
            each = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, labels.to(logits.dtype), weights, reduction="none"
            )
            loss = each.sum() / len(features)
        loss = loss + weight_decay / 2 * head.weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
