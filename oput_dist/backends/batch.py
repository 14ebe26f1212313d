"""What a backend is given: local tensors, flat, and the scalars of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch

from oput_dist.kernels.codes import Format
from oput_dist.kernels.stage import Prologue, Stage

from .transfer import send

__all__ = ["Backend", "Batch", "Codes", "Scalars", "Stack", "compute_dtype"]

Row = tuple[Any, ...]
"""``(decay, *h)``: Python floats, or 0-d tensors on the device for what only the device knows."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that rules compute in for parameters of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Scalars:
    """The scalars of each tensor of a batch: few distinct rows, since one row serves a group at one step count."""

    kind: type
    """The NamedTuple class of ``h``."""
    rows: Sequence[Row]
    """The distinct rows."""
    which: Sequence[int]
    """For each tensor, the index of its row."""
    device: torch.device

    @cached_property
    def distinct(self) -> torch.Tensor:
        """The distinct rows, float64, on the device; sent without waiting for it."""
        floats = [[0.0 if isinstance(x, torch.Tensor) else float(x) for x in row] for row in self.rows]
        table = send(torch.tensor(floats, dtype=torch.float64, device="cpu"), self.device)
        for i, row in enumerate(self.rows):
            for j, value in enumerate(row):
                if isinstance(value, torch.Tensor):
                    table[i, j] = value
        return table

    @cached_property
    def index(self) -> torch.Tensor:
        """:attr:`which` on the device."""
        return send(torch.tensor(self.which, dtype=torch.int64, device="cpu"), self.device)

    @cached_property
    def table(self) -> torch.Tensor:
        """One float64 row per tensor, on the device."""
        return self.distinct if list(self.which) == list(range(len(self.rows))) else self.distinct[self.index]

    def of(self, indices: Iterable[int]) -> Scalars:
        """The scalars of some of the tensors."""
        return Scalars(self.kind, self.rows, [self.which[i] for i in indices], self.device)


@dataclass(frozen=True)
class Codes:
    """State as codes, from the first element of a block on: for backends that take it so."""

    code: Format
    codes: torch.Tensor
    """uint8, ``[blocks, code.width]``, dense."""
    scales: torch.Tensor
    """float32, ``[blocks]``, dense."""


@dataclass
class Batch:
    """Tensors that one launch can serve: the same stage, dtypes and device. Every tensor is 1-d, dense, not empty."""

    p: list[torch.Tensor]
    g: list[torch.Tensor]
    state: list[tuple[torch.Tensor, ...]]
    """Of a backend whose :meth:`Backend.takes_codes` says so also :class:`Codes`."""
    scalars: Scalars
    prologue: Prologue
    scale: torch.Tensor | None = None
    """Multiplies every gradient: one float64 on the device, or None."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """For what a backend keeps from step to step as long as the same tensors are batched."""
    lasting: bool = True
    """Whether that may be large: not where batches are many."""

    def columns(self) -> list[list[torch.Tensor]]:
        """The parameters, the gradients, and each state."""
        return [self.p, self.g, *(list(column) for column in zip(*self.state, strict=True))]


@dataclass
class Stack:
    """Boxes of one shape and one order of memory, for a stage that sees axes: run together, along a leading axis."""

    shape: tuple[int, ...]
    """Of each box."""
    strides: tuple[int, ...]
    """Of each box in its flat memory."""
    tensors: list[list[torch.Tensor]]
    """The boxes of the parameters, of the gradients, and of each state: flat tensors."""
    which: list[int]
    """For each box, the index of its tensor in the batch."""
    factors: tuple[torch.Tensor, ...]
    """What the stage is given: tensors that broadcast against ``[boxes, *shape]``."""

    def part(self, start: int, stop: int) -> Stack:
        """Some of the boxes."""
        if start == 0 and stop >= len(self.which):
            return self
        factors = tuple(factor[start:stop] if len(factor) > 1 else factor for factor in self.factors)
        tensors = [column[start:stop] for column in self.tensors]
        return Stack(self.shape, self.strides, tensors, self.which[start:stop], factors)


class Backend(Protocol):
    """Runs stages on local tensors."""

    name: str

    def run(self, stage: Stage, batch: Batch, sums: torch.Tensor | None) -> torch.Tensor | None:
        """Run a stage in place.

        Args:
            stage: the stage.
            batch: the tensors.
            sums: for an Apply: float64, a row per tensor: the global sum of each measured term, then the number of
                elements that they were taken over.

        Returns:
            for a Measure: float64, a row per tensor, the sum of each term over the local piece.
        """
        ...

    def run_stacks(self, stage: Stage, batch: Batch, stacks: Sequence[Stack]) -> list[tuple[torch.Tensor, ...]]:
        """Run a stage in place that sums over some axes only, or is given vectors.

        Returns:
            for a Measure: for each stack the sum of each term, float64, ``[boxes, *axes]``, of size one along the axes
            that were summed; else nothing.
        """
        ...

    def takes_codes(self, stage: Stage, batch: Batch, state: Sequence[torch.Tensor | Codes]) -> bool:
        """Whether :meth:`run` takes codes in place of numbers, and writes them.

        Args:
            stage: the stage.
            batch: what it would run on, but for its state.
            state: of the first tensor, as it would be.
        """
        ...
