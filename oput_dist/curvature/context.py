"""Where an estimate is made: the parameters, the ranks that hold different data, and what keys its random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from oput_dist.engine.agree import gathered
from oput_dist.engine.plan import Plan
from oput_dist.engine.slot import Slot
from oput_dist.engine.statistics import hold_statistics, release_statistics
from oput_dist.layout import (
    LayoutError,
    data_groups_of_fsdp1,
    data_groups_of_fsdp2,
    managed_by_fsdp2,
    unreduced_by_fsdp1,
    unreduced_by_fsdp2,
)
from oput_dist.layout.plain import Plain

__all__ = ["Context", "CurvatureError", "Outputs", "check_averaged", "data_groups", "undisturbed"]

Outputs = Sequence[Callable[[], torch.Tensor]]
"""Functions that run the model on one micro-batch each, and return what an estimator asks for."""


class CurvatureError(RuntimeError):
    """An estimate cannot be made in this way; the message names the way out."""


@dataclass(frozen=True)
class Context:
    """What an estimator is told."""

    plan: Plan
    """Of whole parameters or the pieces that wrappers left, never of pieces of replicated ones (ZeRO-1)."""
    names: Sequence[str]
    """Of each slot: the same under every layout."""
    groups: tuple[dist.ProcessGroup, ...]
    """Over which ranks hold different data, and wrappers average gradients."""
    number: int
    """Of estimates made before."""
    module: nn.Module | None
    """The module, where it is known."""
    reshard: Callable[[], None]
    """To be called after parameters were changed, so that FSDP gathers them anew."""
    backends: tuple[str, ...]

    @property
    def readers(self) -> int:
        """How many ranks hold different data."""
        count = 1
        for group in self.groups:
            count *= dist.get_world_size(group)
        return count

    def counts(self, own: int) -> tuple[int, int]:
        """``(before, total)``: what the ranks with lower numbers hold together, and all: of rows, say."""
        if not self.groups:
            return 0, own
        rank = dist.get_rank()

        def merged(values: Sequence[dict[int, int]]) -> dict[int, int]:
            return {r: n for value in values for r, n in value.items()}

        each = gathered({rank: own}, merged, self.groups)
        return sum(n for r, n in each.items() if r < rank), sum(each.values())

    def gradients(self) -> dict[int, torch.Tensor]:
        """This rank's pieces of the gradients, flat, by number of the slot. Partial sums are added up.

        Raises:
            CurvatureError: on all ranks, if replicas have different ones: nothing has averaged them.
        """
        self.plan.settle_gradients()
        found = {
            slot.index: gradient
            for slot in self.plan.slots
            if slot.numel and (gradient := slot.flat_gradient()) is not None
        }
        if self.groups and all(isinstance(slot.layout, Plain) for slot in self.plan.slots):
            norms = [float(gradient.double().square().sum()) for gradient in found.values()]
            if not gathered((norms, True), _alike, self.groups)[1]:
                raise CurvatureError(_NOT_AVERAGED)
        return found

    @property
    def parameters(self) -> list[torch.Tensor]:
        """All of them."""
        return [slot.parameter for slot in self.plan.owners]


_NOT_AVERAGED = (
    "gradients of the estimate were not averaged over the ranks: call refresh outside of no_sync() and with "
    "set_requires_gradient_sync(True), and in the function the wrapped model (DDP's), not the one inside"
)


def _alike(values: Sequence[tuple[list[float], bool]]) -> tuple[list[float], bool]:
    """Whether all ranks have the same numbers; NaN is like NaN."""
    return values[0][0], all(ok and repr(norms) == repr(values[0][0]) for norms, ok in values)


def check_averaged(parameters: Sequence[torch.Tensor], module: nn.Module | None) -> None:
    """Raise where FSDP is told not to reduce gradients now: it would add the estimate's to those of training."""
    if unreduced_by_fsdp2(parameters) or (module is not None and unreduced_by_fsdp1(module)):
        raise CurvatureError(_NOT_AVERAGED)


def data_groups(
    slots: Sequence[Slot], module: nn.Module | None, given: tuple[dist.ProcessGroup, ...]
) -> tuple[dist.ProcessGroup, ...]:
    """The groups over which ranks hold different data.

    Args:
        slots: of the parameters.
        module: their module, where it is known.
        given: what to take where the parameters do not tell; all ranks, or what the user said.

    Raises:
        LayoutError: for tensor parallelism beside other ranks, unless the user said.
    """
    parameters = [slot.parameter for slot in slots]
    found = data_groups_of_fsdp2(parameters) or (() if module is None else data_groups_of_fsdp1(module))
    if found or not dist.is_initialized():
        return found
    managed = managed_by_fsdp2()
    cut = [p for p in parameters if isinstance(p, DTensor) and id(p) not in managed]
    everyone = all(dist.get_world_size(group) == dist.get_world_size() for group in given)
    if not cut or not everyone:
        return given
    if all(p.device_mesh.size() == dist.get_world_size() for p in cut):
        return ()  # tensor parallelism over all ranks: they all have the same data
    raise LayoutError(
        "parameters are DTensors that FSDP does not manage, on some of the ranks: which ranks hold different data is "
        "not known; give the optimizer data_group=, the process group of those that do"
    )


@contextmanager
def undisturbed(parameters: Sequence[torch.Tensor], module: nn.Module | None) -> Iterator[None]:
    """Gradients are set aside, and batch-norm statistics held; afterwards they are as they were."""
    aside = [(p, _own(p.grad)) for p in parameters]
    held = hold_statistics(module)
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        release_statistics(held)
        for p, gradient in aside:
            p.grad = gradient


def _own(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient in memory of its own: DDP and FSDP1 write the next one where this one is, if it is a view."""
    if gradient is None or isinstance(gradient, DTensor):
        return gradient
    shared = gradient.untyped_storage().nbytes() > gradient.numel() * gradient.element_size()
    return gradient.clone() if shared else gradient
