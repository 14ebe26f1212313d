"""Ranks that work together: of one process group, or of a mesh, which has a group along each dimension."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Exchange", "Ranks", "Traffic"]

_all_to_all = dist.all_to_all_single

Pair = tuple[int, int]
"""Where something comes from, and where it goes."""


class Ranks:
    """Ranks, by numbers from 0.

    Over several groups what is sent goes along one dimension after the other. So no group of all ranks is needed: to
    make one takes all ranks of the world in general, of which some may have no part in this.

    Attributes:
        groups: one along each dimension; ranks ascend along each.
        rank: the number of this one, in row-major order.
        size: how many there are.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup]) -> None:
        self.groups = tuple(groups)
        self._sizes = tuple(dist.get_world_size(group) for group in groups)
        self._place = tuple(dist.get_rank(group) for group in groups)
        self.size = prod(self._sizes)
        self._places = list(itertools.product(*map(range, self._sizes)))
        self.rank = self._places.index(self._place)
        self.leaving = functools.cache(self._leaving)
        self.coming = functools.cache(self._coming)

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks, in order: small objects, not tensors."""
        values = [value]
        for group, size in zip(reversed(self.groups), reversed(self._sizes), strict=True):
            rows: list[Any] = [None] * size
            dist.all_gather_object(rows, values, group=group)
            values = [one for row in rows for one in row]
        return values

    def add_up(self, table: torch.Tensor) -> None:
        """Sum a tensor over all ranks, in place."""
        for group in self.groups:
            dist.all_reduce(table, group=group)

    def _leaving(self, dim: int) -> list[list[Pair]]:
        """What this rank sends along a dimension, to each rank of that group in turn."""
        sources = [s for s, place in enumerate(self._places) if place[dim:] == self._place[dim:]]
        targets = [t for t, place in enumerate(self._places) if place[:dim] == self._place[:dim]]
        return [
            [(s, t) for s in sources for t in targets if self._places[t][dim] == member]
            for member in range(self._sizes[dim])
        ]

    def _coming(self, dim: int) -> list[list[Pair]]:
        """What it receives then, from each."""
        sources = [s for s, place in enumerate(self._places) if place[dim + 1 :] == self._place[dim + 1 :]]
        targets = [t for t, place in enumerate(self._places) if place[: dim + 1] == self._place[: dim + 1]]
        return [
            [(s, t) for s in sources if self._places[s][dim] == member for t in targets]
            for member in range(self._sizes[dim])
        ]


class Traffic:
    """How much every rank sends to every other, along each dimension: static, so worked out once.

    Args:
        ranks: who they are.
        sizes: elements that one rank sends to another.

    Attributes:
        leaving: elements that this one sends along a dimension, to each of its group in turn.
        coming: those that it receives then.
        order: of whom, and for whom, they are.
        lengths: elements of each of these.
    """

    def __init__(self, ranks: Ranks, sizes: Callable[[int, int], int]) -> None:
        self.ranks, dims = ranks, range(len(ranks.groups))
        self.leaving = [[sum(sizes(*pair) for pair in pairs) for pairs in ranks.leaving(dim)] for dim in dims]
        self.coming = [[sum(sizes(*pair) for pair in pairs) for pairs in ranks.coming(dim)] for dim in dims]
        self.order = [list(itertools.chain.from_iterable(ranks.coming(dim))) for dim in dims]
        self.lengths = [[sizes(*pair) for pair in pairs] for pairs in self.order]


class Exchange:
    """What every rank sends to every other, on its way. All must make it.

    Args:
        traffic: how much.
        packed: what this one sends, to each in turn. It is kept until it was sent.
    """

    def __init__(self, traffic: Traffic, packed: torch.Tensor) -> None:
        self._traffic, self._ranks = traffic, traffic.ranks
        self._send(0, packed)

    def _send(self, dim: int, packed: torch.Tensor) -> None:
        leaving, coming = self._traffic.leaving[dim], self._traffic.coming[dim]
        self._packed, self._received = packed, packed.new_empty(sum(coming))
        self._work = _all_to_all(self._received, packed, coming, leaving, group=self._ranks.groups[dim], async_op=True)

    def wait(self) -> list[torch.Tensor]:
        """What came, from each rank in turn."""
        for dim in range(1, len(self._ranks.groups)):
            parts = self._parts(dim - 1)
            self._send(dim, torch.cat([parts[pair] for pairs in self._ranks.leaving(dim) for pair in pairs]))
        parts = self._parts(len(self._ranks.groups) - 1)
        return [parts[source, self._ranks.rank] for source in range(self._ranks.size)]

    def _parts(self, dim: int) -> dict[Pair, torch.Tensor]:
        self._work.wait()
        parts = self._received.split(self._traffic.lengths[dim])  # type: ignore[no-untyped-call]
        return dict(zip(self._traffic.order[dim], parts, strict=True))
