"""Division by the root of an average of squares: Adam's scaling, of the step that Shampoo grafts and of SOAP's own."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from oput_dist.kernels.cpp import CppLanguage, Symbol, Trace, built
from oput_dist.kernels.language import as_torch, in_language
from oput_dist.kernels.loops import Column, loop_source, run_loop
from oput_dist.kernels.math import over_root

__all__ = ["Scales", "scaled", "scaled_with_norms"]

_FROM = 2**14
"""Elements of a matrix from which on a CPU takes one pass by a library, which takes a second to build and to load."""


class Weights(NamedTuple):
    """What each matrix is given, as the rule names it."""

    kept: torch.Tensor
    """Of the old average of squares."""
    fresh: torch.Tensor
    """Of the new square."""
    eps: torch.Tensor
    """Added to the root."""
    size: torch.Tensor
    """Of the result."""


class Scales:
    """:class:`Weights` of some matrices: of a moving average, or of a sum if ``decay`` is 1.

    Args:
        decay: of the average of squares.
        eps: added to the root, ``[n]``, or ``[1]`` where it is the same of all; float64.
        size: of the result, likewise.
        counting: ``[n]`` bool; where it says that a matrix does not count, the average stays. None: all count.
    """

    def __init__(
        self, decay: float, eps: torch.Tensor, size: torch.Tensor, counting: torch.Tensor | None = None
    ) -> None:
        ones = torch.ones_like(size)
        kept, fresh = decay * ones, (1 - decay if decay != 1 else 1.0) * ones
        if counting is not None:
            kept, fresh = torch.where(counting, kept, ones), fresh * counting
        self.weights = Weights(kept, fresh, eps, size)

    @functools.cached_property
    def table(self) -> torch.Tensor:
        """``[n, 4]`` or ``[1, 4]``, float32."""
        return torch.stack(self.weights, 1).float()


def scaled(x: torch.Tensor, g: torch.Tensor, squares: torch.Tensor, h: Scales, out: torch.Tensor) -> torch.Tensor:
    """``size * x / (sqrt(squares) + eps)``, after ``squares`` became ``kept * squares + fresh * g * g``.

    Args:
        x: ``[n, *shape]``, as all that follow; it may be ``g``.
        g: the gradients.
        squares: changed in place.
        h: see :class:`Scales`.
        out: gets the result; none of the others.
    """
    if not _in_one_pass(x, g, squares, out):
        return _in_torch(x, g, squares, h, out)
    _run(0, x, g, squares, h, out)
    return out


def scaled_with_norms(
    x: torch.Tensor, g: torch.Tensor, squares: torch.Tensor, h: Scales, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`scaled` gives, and the norm of each, ``[n]``, float64."""
    if not _in_one_pass(x, g, squares, out):
        made = _in_torch(x, g, squares, h, out)
        return made, torch.linalg.vector_norm(made.flatten(1), dim=1).double()
    sums = _run(1, x, g, squares, h, out)
    assert sums is not None
    return out, sums[:, 0].sqrt()


def _in_torch(x: torch.Tensor, g: torch.Tensor, squares: torch.Tensor, h: Scales, out: torch.Tensor) -> torch.Tensor:
    each = Weights(*(one.to(x).view(-1, *[1] * (x.dim() - 1)) for one in h.weights))
    new, made = as_torch(over_root)(x, g, squares, each)
    squares.copy_(new)
    return out.copy_(made)


def _in_one_pass(*stacks: torch.Tensor) -> bool:
    """Whether a pass in C++ takes them; of matrices of one shape the same wherever they are worked on."""
    first = stacks[0]
    fits = first.device.type == "cpu" and first.dtype == torch.float32 and first.numel() >= _FROM * len(first)
    return fits and all(each.is_contiguous() for each in stacks) and _library(0) is not None


def _run(
    terms: int, x: torch.Tensor, g: torch.Tensor, squares: torch.Tensor, h: Scales, out: torch.Tensor
) -> torch.Tensor | None:
    n, size = len(x), x.numel() // len(x)
    rows = range(n) if len(h.table) == n else [0] * n
    addresses = [[each.data_ptr() + i * size * each.element_size() for i in range(n)] for each in (x, g, squares, out)]
    return run_loop(_library(terms), [size] * n, rows, addresses, h.table, terms)


@functools.cache
def _library(terms: int) -> Any:
    """The loop, with that many sums of squares; None where it cannot be built."""
    trace = Trace()
    x, g, squares = (Symbol(trace, torch.float32, f"x{i}") for i in range(3))
    h = Weights(*(Symbol(trace, torch.float32, f"h.h{i}") for i in range(4)))  # type: ignore[arg-type]
    new, made = in_language(over_root, CppLanguage())(x, g, squares, h)
    written = [None, None, new.text, made.text]
    columns = [Column(torch.float32, i < 3, variable) for i, variable in enumerate(written)]
    square = made * made
    return built(loop_source(trace.lines, columns, len(h), 0, [square.text] if terms else []))
