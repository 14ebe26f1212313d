"""Tensors that lie one after the other in memory, as one: pieces of flat tensors (FSDP1, DeepSpeed's ZeRO).

An elementwise stage does not ask where a tensor ends, and one loop over memory starts threads once, where one for each
piece starts them as often as there are pieces, and packs the small ones besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from .batch import Batch

__all__ = ["joined"]


def joined(batch: Batch) -> Batch:
    """The batch with tensors as one where parameters, gradients and state all lie one after the other.

    Only tensors that share their scalars are joined. Where none lie so, this is the batch itself.
    """
    found = _runs_of(batch)
    if len(found) == len(batch.p):
        return batch
    sizes = [sum(batch.p[i].numel() for i in run) for run in found]
    p, g, *state = (
        [column[run[0]].as_strided((n,), (1,)) for run, n in zip(found, sizes, strict=True)]
        for column in batch.columns()
    )
    scalars = batch.scalars.of(run[0] for run in found)
    states: list[tuple[torch.Tensor, ...]] = list(zip(*state, strict=True)) if state else [()] * len(found)
    cache = batch.cache.setdefault(("joined", *sizes), {})
    return Batch(p, g, states, scalars, batch.prologue, batch.scale, cache, batch.lasting)


def _runs_of(batch: Batch) -> list[range]:
    """Ranges of a batch's tensors that lie one after the other, gradients and state too, of one row of scalars each."""
    count = len(batch.p)
    if "runs" not in batch.cache:  # what the parameters allow does not change as long as they are the same
        batch.cache["runs"] = list(_runs([batch.p], [0] * count, range(count)))
    known: list[range] = batch.cache["runs"]
    if len(known) == count:
        return known
    columns, which = batch.columns(), batch.scalars.which
    return [part for run in known for part in ([run] if len(run) == 1 else _runs(columns, which, run))]


def _runs(columns: Sequence[Sequence[torch.Tensor]], which: Sequence[int], indices: range) -> Iterator[range]:
    """Ranges of indices whose tensors lie one after the other in every column, of one row of scalars each."""
    spans = [[_span(column[i]) for i in indices] for column in columns]
    start = indices.start
    for number, (i, k) in enumerate(pairwise(indices)):
        if which[i] != which[k] or any(span[number][1:] != span[number + 1][::2] for span in spans):
            yield range(start, k)
            start = k
    yield range(start, indices.stop)


def _span(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Where it begins, where it ends, and where the memory that it is in begins."""
    start = tensor.data_ptr()
    return start, start + tensor.nbytes, tensor.untyped_storage().data_ptr()
