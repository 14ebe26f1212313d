"""Scalars that depend on the step and that several optimizers share, in float64."""

from __future__ import annotations

import math

__all__: list[str] = []


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
