"""Agreement between the ranks that share parameters: on what any of them holds, and on errors."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .slot import Slot

__all__ = ["agreed", "gathered", "joint_groups"]

T = TypeVar("T")


def joint_groups(slots: Iterable[Slot], shared: Container[Slot] = ()) -> list[dist.ProcessGroup]:
    """The groups of more than one rank over which anything of these parameters is spread or replicated by a layout.

    Empty for plain parameters: nothing tells whether other ranks hold the same ones, and they may well not take part.

    Args:
        slots: of the parameters.
        shared: those of which replicas, too, hold different state.
    """
    found: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for slot in slots:
        groups = [*slot.layout.groups]
        if slot in shared:
            groups += slot.layout.replica_groups
        if slot.layout.gather_group is not None:
            groups.append(slot.layout.gather_group)
        if isinstance(slot.parameter, DTensor):
            groups += slot.parameter.device_mesh.get_all_groups()
        for group in groups:
            found.setdefault(tuple(dist.get_process_group_ranks(group)), group)
    return [group for ranks, group in found.items() if len(ranks) > 1]


def gathered(value: T, merge: Callable[[Sequence[T]], T], groups: Sequence[dist.ProcessGroup]) -> T:
    """What ``merge`` makes of the values of all ranks that the groups connect: small objects, not tensors.

    ``merge`` must be idempotent. Walking the dimensions of a mesh once reaches all its ranks.
    """
    for group in groups:
        values: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
        value = merge(values)
    return value


def agreed(work: Callable[[], tuple[T, str]], groups: Sequence[dist.ProcessGroup], owner: str) -> T:
    """The result of ``work`` if it succeeds on all ranks, and they will go on alike; else all ranks raise.

    Args:
        work: makes no collective. Returns the result, and in words the collectives that will follow from it.
        groups: what connects the ranks; without any, this rank works alone.
        owner: who asks, for messages.

    Raises:
        Exception: whatever ``work`` raised here.
        ValueError: with what another rank raised, or if the ranks would go on differently.
    """
    failure: Exception | None = None
    try:
        result, follows = work()
    except Exception as error:
        failure, follows = error, ""
    texts = [] if failure is None else [f"rank {dist.get_rank() if groups else 0}: {failure}"]
    failed, plans = gathered((texts, {follows}), _merged, groups)
    if failure is not None:
        raise failure
    if failed:
        raise ValueError(f"{owner}: nothing was changed on any rank, because of {failed[0]}")
    if len(plans) > 1:
        raise ValueError(f"{owner}: the ranks were given different things to load, only some of them {max(plans)}")
    return result


def _merged(values: Sequence[tuple[list[str], set[str]]]) -> tuple[list[str], set[str]]:
    first = next((texts for texts, _ in values if texts), [])
    return first, set().union(*(plans for _, plans in values))
