"""What all estimators of the Hessian's diagonal have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from oput_dist.engine.hyper import nonnegative_integer

from .context import Context, Outputs

__all__ = ["Estimator", "first_output"]


class Estimator(ABC):
    """An estimate of the diagonal of the Hessian of the mean loss over the global batch.

    Attributes:
        seed: of the random numbers. They depend on it, on how many estimates were made, and on global positions alone:
            the same under every layout and number of ranks.
        spatial: whether an estimate is replaced by its mean absolute value over the kernel of a convolution, that is
            over all axes of a parameter but the first two.
    """

    seed: int = 0
    spatial: bool = False

    def __init__(self, seed: int = 0) -> None:
        if (allowed := nonnegative_integer(seed)) is not None:
            raise ValueError(f"{type(self).__name__}: seed={seed!r} is not allowed: must be {allowed}")
        self.seed = seed

    @abstractmethod
    def estimate(self, context: Context, outputs: Outputs) -> dict[int, torch.Tensor]:
        """This rank's pieces of the estimate, flat, by number of the slot; none for parameters that took no part.

        Every rank must call it, with as many micro-batches. Gradients are None when it is called, and may be anything
        afterwards.
        """


def first_output(value: object, asked: str, call: str) -> torch.Tensor:
    """A model's output, checked to be a floating-point tensor with a graph.

    Raises:
        TypeError: for anything but a tensor of real numbers.
        RuntimeError: for one without a graph.
    """
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        kind = f"a tensor of dtype {value.dtype}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise TypeError(f"the function must return {asked}, but returned {kind}: {call}")
    if not value.requires_grad:
        raise RuntimeError(
            f"the function returned {asked} without a graph: call the model inside of it, not under torch.no_grad() "
            f"or torch.inference_mode(), and do not detach: {call}"
        )
    return value
