"""Scalars that depend on the step and that several optimizers share, in float64."""

from __future__ import annotations

import math
from typing import Any

from oput_dist.engine import Group

__all__: list[str] = []

WHY_NOT_CAUTIOUS = "its lookahead moves parameters back to slow weights, which is no update that could agree"
"""Of optimizers with lookahead; see :attr:`oput_dist.engine.Optimizer.why_not_cautious`."""

WHY_NO_ACCUMULATION = "its lookahead comes every so many steps, and might fall on one that moves no parameter"
"""Likewise; see :attr:`oput_dist.engine.Optimizer.why_no_accumulation`."""


def adam_scalars(group: Group, step: int) -> dict[str, Any]:
    """What Adam's rule takes.

    ``lr`` over the first moment's bias correction; ``weight1`` and ``weight2``, of the new value in the moments;
    ``root``, one over the square root of the second moment's bias correction; ``eps``.
    """
    beta1, beta2 = group["betas"]
    return {
        "lr": group["lr"] / (1 - beta1**step),
        "weight1": 1 - beta1,
        "weight2": 1 - beta2,
        "root": 1 / math.sqrt(1 - beta2**step),
        "eps": group["eps"],
    }


def rectification(beta2: float, step: int, threshold: float = 5.0) -> float | None:
    """RAdam's factor of the adaptive step; None while the variance of the second moment has no usable bound.

    Args:
        beta2: decay rate of the second moment.
        step: 1, 2, ...
        threshold: length of the approximated moving average above which it is usable.

    Paper: Liu et al., https://arxiv.org/abs/1908.03265.
    """
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if length <= threshold:
        return None
    return math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))


def lookahead_scalars(step: int, k: int, alpha: float) -> tuple[float, float]:
    """``first`` and ``pull`` of :func:`oput_dist.kernels.math.lookahead` at a step: every ``k`` steps ``alpha``."""
    return float(step == 1), alpha if step % k == 0 else 0.0
