"""Packing: many small tensors treated as one, since a call costs more than their arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .batch import Batch

__all__ = ["PACK", "SMALL", "Pack", "packs", "scatter", "segment_sums"]

SMALL = 32_768
"""Elements up to which a tensor is packed with others."""
PACK = 2**20
"""Elements of a pack: bounds the scratch memory."""

Pack = list[int]
"""Indices of tensors of a batch that share their scalars."""


def packs(batch: Batch) -> tuple[list[int], list[Pack]]:
    """The tensors to run one by one, and the packs of the others."""
    single = [i for i, p in enumerate(batch.p) if p.numel() > SMALL]
    by_row: dict[int, list[int]] = {}
    for i, p in enumerate(batch.p):
        if p.numel() <= SMALL:
            by_row.setdefault(batch.scalars.which[i], []).append(i)
    return single, [pack for small in by_row.values() for pack in _cut(small, batch.p)]


def _cut(indices: Sequence[int], tensors: Sequence[torch.Tensor]) -> Iterator[Pack]:
    pack: Pack = []
    size = 0
    for i in indices:
        if pack and size + tensors[i].numel() > PACK:
            yield pack
            pack, size = [], 0
        pack.append(i)
        size += tensors[i].numel()
    yield pack


def scatter(packed: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Write a packed tensor back to where its pieces came from."""
    torch._foreach_copy_(tensors, list(torch.split(packed, [t.numel() for t in tensors])))


def segment_sums(packed: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The sum of each segment, in order and in float64."""
    return torch.segment_reduce(packed.double(), "sum", lengths=lengths)
