"""Packing: many small tensors treated as one, since a call costs more than their arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .batch import Batch

__all__ = ["PACK", "SMALL", "Pack", "packs", "segment_sums"]

SMALL = 32_768
"""Elements up to which a tensor is packed with others."""
PACK = 2**20
"""Elements of a pack: bounds the scratch memory."""


class Pack:
    """Tensors of a batch that share their scalars, and the flat memory that they are copied to and from.

    Args:
        indices: which tensors.
        sizes: their elements.
        keep: whether to keep the memory from step to step.
    """

    def __init__(self, indices: list[int], sizes: list[int], keep: bool) -> None:
        self.indices, self.sizes, self._keep = indices, sizes, keep
        self.numel = sum(sizes)
        self._kept: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def gather(self, number: int, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Copy tensors, the ``number``-th list of this pack, to flat memory; returns it and its pieces."""
        known = self._kept.get(number)
        if known is None or known[0].dtype != tensors[0].dtype:
            flat = torch.empty(self.numel, dtype=tensors[0].dtype, device=tensors[0].device)
            known = flat, list(torch.split(flat, self.sizes))
            if self._keep:
                self._kept[number] = known
        torch._foreach_copy_(known[1], tensors)
        return known


def packs(batch: Batch) -> tuple[list[int], list[Pack]]:
    """The tensors to run one by one, and the packs of the others: the same as long as scalars are shared alike."""
    known = batch.cache.get("packs")
    if known is None or known[0] != batch.scalars.which:
        known = batch.cache["packs"] = (batch.scalars.which, _sorted(batch))
    result: tuple[list[int], list[Pack]] = known[1]
    return result


def _sorted(batch: Batch) -> tuple[list[int], list[Pack]]:
    single = [i for i, p in enumerate(batch.p) if p.numel() > SMALL]
    keep = batch.lasting and sum(p.numel() for p in batch.p if p.numel() <= SMALL) <= PACK
    by_row: dict[int, list[int]] = {}
    for i, p in enumerate(batch.p):
        if p.numel() <= SMALL:
            by_row.setdefault(batch.scalars.which[i], []).append(i)
    return single, [pack for small in by_row.values() for pack in _cut(small, batch.p, keep)]


def _cut(indices: Sequence[int], tensors: Sequence[torch.Tensor], keep: bool) -> Iterator[Pack]:
    pack: list[int] = []
    size = 0
    for i in indices:
        if pack and size + tensors[i].numel() > PACK:
            yield Pack(pack, [tensors[j].numel() for j in pack], keep)
            pack, size = [], 0
        pack.append(i)
        size += tensors[i].numel()
    yield Pack(pack, [tensors[j].numel() for j in pack], keep)


def segment_sums(packed: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The sum of each segment, in order and in float64."""
    return torch.segment_reduce(packed.double(), "sum", lengths=lengths)
