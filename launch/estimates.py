"""Estimates of curvature in training, for the optimizers that divide by one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oput_dist as oput
from launch.errors import UsageError

PART = 8
"""An estimate takes one of so many sequences of the batch: it is an average over many steps."""


def curved(optimizer: torch.optim.Optimizer) -> oput.Curved | None:
    """The optimizer that divides by curvature, inside of whatever wraps it; None if it is of another kind."""
    inner = optimizer.origin if isinstance(optimizer, oput.Wrapper) else optimizer
    return inner if isinstance(inner, oput.Curved) else None


def refresh(
    optimizer: oput.Curved,
    logits: Callable[[nn.Module, Tensor], Tensor],
    module: nn.Module,
    batch: tuple[Tensor, Tensor],
) -> bool:
    """Make an estimate from part of this rank's sequences, if one is due; whether one was made.

    Raises:
        UsageError: if the model cannot be differentiated as the estimator needs it.
    """
    inputs, targets = (one[: max(1, len(one) // PART)] for one in batch)

    def output() -> Any:
        made = logits(module, inputs).float().flatten(0, 1)
        if isinstance(optimizer.estimator, oput.GaussNewtonBartlett):
            return made
        reduction = "none" if isinstance(optimizer.estimator, oput.EmpiricalFisher) else "mean"
        return F.cross_entropy(made, targets.flatten(), reduction=reduction)

    try:
        return optimizer.refresh(output)
    except oput.CurvatureError as e:
        raise UsageError(f"{e} (--opt product=difference, or --optimizer sophiag)") from e
