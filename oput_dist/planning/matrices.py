"""Matrices that are worked on whole: who owns which, what owners keep, and what is sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from oput_dist.backends import compute_dtype
from oput_dist.collectives.balance import assigned, least_load
from oput_dist.collectives.gather import buckets, width
from oput_dist.collectives.nearness import nearest
from oput_dist.collectives.routes import WAVE_BYTES, Share, rows, sent_back, sent_to_owners, share_of, waves
from oput_dist.engine.owned import kept_bytes
from oput_dist.engine.slot import Slot
from oput_dist.layout import within
from oput_dist.matrix.work import Work

from .given import Given
from .sums import Exchange
from .world import World

__all__ = ["Ownership", "ownership"]

_NOTHING = share_of([])


@dataclass(frozen=True)
class Ownership:
    """What each rank has to do with whole matrices, in order."""

    cost: list[float]
    """Floating-point operations in a step."""
    kept: list[int]
    """Bytes that it keeps as an owner."""
    to_owners: list[int]
    """Bytes that it sends to owners."""
    back: list[int]
    """Bytes that it sends as an owner."""
    least: tuple[float, float] = (0.0, 0.0)
    """What the busiest rank must have while no block is split: operations, and bytes."""
    exchanges: int = 0
    """All-to-alls."""
    told: tuple[Exchange, ...] = ()
    """All-gathers in which replicas tell each other what they made; each as :func:`oput_dist.planning.sums.gathers`."""

    @property
    def least_imbalance(self) -> tuple[float, float]:
        """That over the mean."""
        time, size = sum(self.cost), sum(self.kept)
        ranks = len(self.cost)
        return self.least[0] * ranks / time if time else 1.0, self.least[1] * ranks / size if size else 1.0

    def plus(self, other: Ownership) -> Ownership:
        """With what other matrices bring."""
        return Ownership(
            _added(self.cost, other.cost),
            _added(self.kept, other.kept),
            _added(self.to_owners, other.to_owners),
            _added(self.back, other.back),
            (self.least[0] + other.least[0], self.least[1] + other.least[1]),
            self.exchanges + other.exchanges,
            self.told + other.told,
        )


Number = TypeVar("Number", int, float)


def _added(one: Sequence[Number], other: Sequence[Number]) -> list[Number]:
    return [a + b for a, b in zip(one, other, strict=True)]


@dataclass(frozen=True)
class _Kind:
    """Blocks that are cut and worked on alike."""

    shape: tuple[int, ...]
    cost: float
    kept: int
    held: tuple[Share, ...]
    """By each rank."""
    sizes: tuple[int, ...]
    """Of what each holds, in elements."""


def ownership(given: Given, world: World, slots: Sequence[Slot]) -> Ownership:
    """What each rank has to do with whole matrices.

    Args:
        given: parameters and optimizer.
        world: the ranks.
        slots: of any rank.
    """
    families: dict[torch.dtype, list[tuple[Slot, Work]]] = {}
    for slot in slots:
        work = given.recipe(slot).whole
        if work is not None:
            families.setdefault(compute_dtype(slot.dtype), []).append((slot, work))
    none = [0] * world.ranks
    total = Ownership([0.0] * world.ranks, none, none, none)
    for dtype, members in families.items():
        total = total.plus(_family(dtype, members, world))
    return total


def _family(dtype: torch.dtype, members: Sequence[tuple[Slot, Work]], world: World) -> Ownership:
    """Of parameters whose blocks travel together, as in :class:`oput_dist.engine.matrices.Matrices`."""
    workers = world.ranks
    known: dict[tuple[torch.Size, Work], list[_Kind]] = {}
    blocks: list[_Kind] = []
    for slot, work in members:
        key = (slot.layout.shape, work)
        if key not in known:
            known[key] = _kinds(slot, work, dtype, world)
        blocks += known[key]
    costs, kept = [block.cost for block in blocks], [block.kept for block in blocks]
    kinds = list(zip(costs, kept, strict=True))
    owners = nearest(assigned(costs, workers, None, kept), kinds, [block.sizes for block in blocks], {})
    cost, own = [0.0] * workers, [0] * workers
    for i, owner in enumerate(owners):
        cost[owner] += costs[i]
        own[owner] += kept[i]
    least = (least_load(costs, workers), least_load(kept, workers))
    if workers == 1:
        return Ownership(cost, own, [0], [0], least)
    sent = waves([block.shape for block in blocks], owners, workers, dtype.itemsize, WAVE_BYTES)
    if world.replicated:
        told = tuple(one for wave in sent for one in _told(wave, blocks, owners, workers, dtype))
        return Ownership(cost, own, [0] * workers, [sum(sent for _, sent in told)] * workers, least, 0, told)
    to, back = _sent(blocks, owners, workers, dtype.itemsize)
    return Ownership(cost, own, to, back, least, 2 * len(sent))


def _told(
    wave: Sequence[int], blocks: Sequence[_Kind], owners: Sequence[int], workers: int, dtype: torch.dtype
) -> list[Exchange]:
    """The all-gathers after a wave, as in :class:`oput_dist.collectives.Owners`."""
    nothing = torch.empty(0, dtype=dtype, device="meta")
    made = {i: torch.empty(blocks[i].shape, dtype=dtype, device="meta") for i in wave}
    tensors = [[nothing if i is None else made[i] for i in row] for row in rows(wave, owners, workers)]
    return [(workers, (workers - 1) * width(bucket) * dtype.itemsize) for bucket in buckets(tensors)]


def _kinds(slot: Slot, work: Work, dtype: torch.dtype, world: World) -> list[_Kind]:
    """The blocks of a parameter."""
    ranks = range(1 if world.replicated else world.ranks)  # replicas all hold the same
    boxes = [world.layout_of(slot.layout.shape, rank).boxes for rank in ranks]
    found = []
    for index in work.blocks(tuple(slot.layout.shape)):
        shape = tuple(part.stop - part.start for part in index)
        parts = ([part for box in own for part in within(box, index)] for own in boxes)
        held = tuple(share_of(own) if own else _NOTHING for own in parts) * (world.ranks // len(ranks))
        found.append(
            _Kind(shape, work.cost(shape), kept_bytes(work, shape, dtype), held, tuple(own.numel for own in held))
        )
    return found


def _sent(blocks: Sequence[_Kind], owners: Sequence[int], workers: int, itemsize: int) -> tuple[list[int], list[int]]:
    counts: dict[int, Counter[int]] = {}
    kinds = {id(block): block for block in blocks}
    for block, owner in zip(blocks, owners, strict=True):
        counts.setdefault(id(block), Counter())[owner] += 1
    to, back = [0] * workers, [0] * workers
    for key, block in kinds.items():
        own = [counts[key][rank] for rank in range(workers)]
        for total, sent in ((to, sent_to_owners(block.held, own)), (back, sent_back(block.held, own))):
            for rank, elements in enumerate(sent):
                total[rank] += elements * itemsize
    return to, back
