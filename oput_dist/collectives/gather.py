"""Gather pieces that each rank updated into the whole tensors that every rank keeps, in buckets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

__all__ = ["BUCKET_BYTES", "Gathering", "buckets", "gather_pieces", "width"]

BUCKET_BYTES = 32 * 2**20
"""Bytes that a bucket receives: the bound of the scratch memory, twice over because two are in flight."""

# torch 2.13 renames it; both exist for a while, and the old one warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_pieces(tensors: Sequence[Sequence[torch.Tensor]], group: dist.ProcessGroup) -> None:
    """Make every rank's copies whole, in place.

    Args:
        tensors: for each tensor, its pieces (views), one for each rank of ``group``; this rank's own piece is up to
            date. All on one device; any dtypes: each travels as it is.
        group: the group.
    """
    told = Gathering(group)
    told.add(tensors)
    told.finish()


class Gathering:
    """The same for tensors that are up to date one after the other: some travel while others are made.

    Args:
        group: see :func:`gather_pieces`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._rank = group, dist.get_rank(group)
        self._pending: _Bucket | None = None

    def add(self, tensors: Sequence[Sequence[torch.Tensor]]) -> None:
        """Send this rank's pieces of tensors; see :func:`gather_pieces`."""
        for pieces in buckets(tensors):
            bucket = _Bucket(pieces, self._rank, self._group)
            self.finish()
            self._pending = bucket

    def finish(self) -> None:
        """Wait for what was sent last."""
        if self._pending is not None:
            self._pending.finish()
        self._pending = None


def buckets(tensors: Iterable[Sequence[torch.Tensor]]) -> Iterator[list[Sequence[torch.Tensor]]]:
    """Tensors of one dtype, up to the bucket size; a larger tensor is a bucket of its own."""
    by_dtype: dict[torch.dtype, list[Sequence[torch.Tensor]]] = {}
    for pieces in tensors:
        by_dtype.setdefault(pieces[0].dtype, []).append(pieces)
    for dtype, same in by_dtype.items():
        bucket: list[Sequence[torch.Tensor]] = []
        size = 0
        for pieces in same:
            nbytes = sum(piece.numel() for piece in pieces) * dtype.itemsize
            if bucket and size + nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(pieces)
            size += nbytes
        yield bucket


def width(tensors: Sequence[Sequence[torch.Tensor]]) -> int:
    """Elements that each rank sends of a bucket: as many as the largest share has, since gloo wants equal sizes."""
    shares: list[int] = [sum(piece.numel() for piece in share) for share in zip(*tensors, strict=True)]
    return max(shares)


class _Bucket:
    """One all-gather in flight."""

    def __init__(self, tensors: list[Sequence[torch.Tensor]], rank: int, group: dist.ProcessGroup) -> None:
        self._tensors, self._rank = tensors, rank
        ranks = dist.get_world_size(group)
        example = tensors[0][0]
        self._received = torch.empty(ranks, width(tensors), dtype=example.dtype, device=example.device)
        send = self._received[rank]  # in place: the own share is not copied again
        at = 0
        for pieces in tensors:
            own = pieces[rank]
            send[at : at + own.numel()].view(own.shape).copy_(own)
            at += own.numel()
        self._work = _all_gather(self._received.view(-1), send, group=group, async_op=True)

    def finish(self) -> None:
        self._work.wait()
        targets, sources = [], []
        for rank, share in enumerate(self._received):
            if rank == self._rank:
                continue
            at = 0
            for pieces in self._tensors:
                piece = pieces[rank]
                targets.append(piece)
                sources.append(share[at : at + piece.numel()].view(piece.shape))
                at += piece.numel()
        if targets:
            torch._foreach_copy_(targets, sources)
