"""Norms over all parameters: clipping inside the update, and :func:`clip_grad_norm_` for any mixture of layouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from oput_dist.backends import BACKENDS, Batch, Scalars, choose, send
from oput_dist.collectives import Schedule, packed_sum
from oput_dist.kernels.math import square_terms
from oput_dist.kernels.stage import WHOLE, Measure, Prologue
from oput_dist.layout import Flat, LayoutError, dense_strides, flat, flattened_in, layouts_of, whole_or_local

from .partial import PartialSums

__all__ = ["clip_factor", "clip_grad_norm_", "power_table"]

_NORM = Measure(square_terms, (WHOLE,), writes_state=False)


class _NormScalars(NamedTuple):
    order: float


def _square_sums(tensors: Sequence[torch.Tensor], backends: tuple[str, ...]) -> torch.Tensor:
    """``[tensors, 1]``, float64: the sum of squares of each of some flat tensors of one dtype and device."""
    device = tensors[0].device
    scalars = Scalars(_NormScalars, [(0.0, 2.0)], [0] * len(tensors), device)
    batch = Batch(list(tensors), list(tensors), [()] * len(tensors), scalars, Prologue())
    sums = choose(backends, device, sum(t.numel() for t in tensors)).run(_NORM, batch, None)
    assert sums is not None
    return sums


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """``min(1, max_norm / (norm + 1e-6))``, as torch has it."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


@torch.no_grad()
def clip_grad_norm_(
    parameters: nn.Module | torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scale gradients in place so that their joint norm is at most ``max_norm``, for any mixture of layouts and meshes.

    Plain parameters, DTensors on one or several meshes, and parameters without a gradient may be mixed. The sums of
    all of them travel in one all-reduce per process group; replicas are counted once. Every rank must call it with the
    same parameters; a gradient that is None counts as zero.

    Args:
        parameters: the parameters (or one of them), or the module; FSDP1 needs the wrapped module.
        max_norm: the largest norm to leave as it is; >= 0.
        norm_type: the order of the norm, > 0, or ``inf``.
        error_if_nonfinite: raise RuntimeError if the norm is NaN or infinite. This waits for the device.

    Returns:
        the norm before clipping: a 0-d tensor, the same on all ranks.

    Raises:
        ValueError: for a negative or NaN ``max_norm``, or a ``norm_type`` that is not positive.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm={max_norm!r} is not allowed: must be a number >= 0")
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type!r} is not allowed: must be a number > 0, or inf")
    flattened = flattened_in(parameters) if isinstance(parameters, nn.Module) else {}
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    every = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    if not every:
        return torch.zeros(())
    norm = _joint_norm(every, flattened, float(norm_type))
    if error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {norm.item()}, so they cannot be clipped"
        )
    factor = clip_factor(norm, max_norm)
    # However gradients are placed: partial sums scale alike.
    gradients: dict[Any, list[torch.Tensor]] = {}
    for memory in (whole_or_local(p.grad) for p in every if p.grad is not None):
        gradients.setdefault((memory.device, memory.dtype), []).append(memory)
    for (device, dtype), memories in gradients.items():
        torch._foreach_mul_(memories, factor.to(device, dtype, non_blocking=True))
    return norm


def power_table(
    pieces: Mapping[int, torch.Tensor],
    schedule: Schedule,
    device: torch.device,
    order: float = 2.0,
    backends: tuple[str, ...] = BACKENDS,
) -> torch.Tensor:
    """What the norm of an order adds up (or takes the maximum of), for each of some parameters, over all ranks.

    Args:
        pieces: this rank's pieces of the gradients, flat and not empty, by number of the parameter.
        schedule: of one value for each parameter.
        device: where the table is; pieces elsewhere are left out.
        order: of the norm.
        backends: that may run.
    """
    table = torch.zeros(schedule.size, dtype=torch.float64, device=device)
    kinds: dict[torch.dtype, list[int]] = {}
    for i, piece in pieces.items():
        if piece.device == device:
            kinds.setdefault(piece.dtype, []).append(i)
    for rows in kinds.values():
        places = send(torch.tensor([schedule.starts[i] for i in rows], device="cpu"), device)
        table[places] = _powers([pieces[i] for i in rows], order, backends).squeeze(1)
    packed_sum(table, schedule, maximum=order == float("inf"))
    return table


def _joint_norm(
    parameters: Sequence[torch.Tensor], flattened: Mapping[torch.Tensor, Flat], order: float
) -> torch.Tensor:
    """The norm of all gradients together, float64 accumulation, in the widest dtype of the gradients."""
    each = [layouts_of(parameter, None, flattened) for parameter in parameters]
    for i, own in enumerate(each):
        if own[0].why_no_sums is not None:
            raise LayoutError(f"clip_grad_norm_: parameter {i}: {own[0].why_no_sums}")
    settled = PartialSums(parameters, [own[0] for own in each]).settled()
    gradients = [settled.get(i, parameter.grad) for i, parameter in enumerate(parameters)]
    layouts = [layout for own in each for layout in own]
    owners = [i for i, own in enumerate(each) for _ in own]
    pieces = {
        i: flat(piece, dense_strides(piece))
        for i, (owner, layout) in enumerate(zip(owners, layouts, strict=True))
        if (gradient := gradients[owner]) is not None and (piece := layout.piece(gradient)).numel()
    }
    devices = list(dict.fromkeys(parameter.device for parameter in parameters)) or [torch.device("cpu")]
    largest = order == float("inf")
    totals = []
    for device in devices:
        items = [
            (layout.groups if parameters[owner].device == device else (), 1)
            for layout, owner in zip(layouts, owners, strict=True)
        ]
        table = power_table(pieces, Schedule.of(items), device, order)
        totals.append(table.max() if largest else table.sum())
    total = torch.stack([t.to(devices[0], non_blocking=True) for t in totals])
    norm = total.max() if largest else total.sum() ** (1.0 / order)
    wide = any(piece.dtype == torch.float64 for piece in pieces.values())
    return norm if wide else norm.float()


def _powers(tensors: Sequence[torch.Tensor], order: float, backends: tuple[str, ...]) -> torch.Tensor:
    """``[tensors, 1]``: what the norm of an order adds up (or takes the maximum of), for each tensor."""
    if order == 2.0:
        return _square_sums(tensors, backends)
    if order == float("inf"):
        return torch.stack([t.abs().max().double() for t in tensors]).unsqueeze(1)
    return torch.stack([t.double().abs().pow(order).sum() for t in tensors]).unsqueeze(1)
