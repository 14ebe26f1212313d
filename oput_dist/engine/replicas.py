"""Do replicas still agree? Hashes of the bits of parameters and state, compared over the ranks that hold the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from oput_dist.layout import Box

from .forms import value_of
from .mixing import ODD, mixed
from .slot import Slot
from .wrapper import Own, check_own
from .writing import COMPENSATION

__all__ = ["ReplicaError", "check_replicas"]

_CHUNK = 2**20  # elements hashed at once: bounds the temporaries
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Row = tuple[int, int | None]
"""Where a rank's piece lies in the whole, as a hash, and the hash of its bits; None if the rank lacks it."""


class ReplicaError(RuntimeError):
    """Ranks that should hold the same parameters or state do not."""


@dataclass
class _Held:
    """A tensor of which this rank holds a piece."""

    label: str
    place: int
    memory: torch.Tensor | None
    """None if this rank lacks it."""
    nothing: bool
    """Whether there is nothing to hold here."""
    device: torch.device
    """Where it is looked at: the parameter's, also of what lives on the host."""


@torch.no_grad()
def check_replicas(optimizer: Own, group: dist.ProcessGroup | None = None) -> None:
    """Check that replicas of parameters, of optimizer state and of step counters are the same, to the last bit.

    Ranks that hold the same elements are replicas, whatever the layout: DDP's copies, the replicas of HSDP, what tensor
    parallelism replicates, whole parameters under ZeRO-1, row and column statistics. The ranks exchange 64-bit hashes,
    not data; it costs one pass over this rank's memory and can be called every few hundred steps.

    Every rank of ``group`` must call it.

    Args:
        optimizer: the optimizer.
        group: the ranks that train this model; all ranks by default. Needed where ranks hold different models, as the
            stages of a pipeline do, or plain tensors that are pieces of one.

    Raises:
        ReplicaError: on every rank, naming the first difference: the parameter, the tensor, the ranks, and for the
            first two ranks that differ the number of elements and the largest difference.
    """
    check_own("check_replicas", optimizer)
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    held = [tensor for slot in optimizer._current_plan().slots for tensor in _held(optimizer, slot)]
    labels = _digest([tensor.label for tensor in held])
    tables: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(tables, (labels, _rows(held)), group=group)
    if any(theirs != labels for theirs, _ in tables):
        raise ReplicaError(
            f"the ranks optimize different parameters ({[len(rows) for _, rows in tables]} tensors and counters): "
            "give group=, the ranks that train the same ones"
        )
    for i, rows in enumerate(zip(*[rows for _, rows in tables], strict=True)):
        classes = _classes(rows)
        if classes is not None:
            raise ReplicaError(f"{held[i].label} {_described(held[i], classes, group)}")


def _held(optimizer: Own, slot: Slot) -> list[_Held]:
    """What of a slot has replicas: a list that is the same on all ranks, but for memory and places."""
    layout, state = slot.layout, optimizer.state.get(slot.parameter, {})
    recipe = optimizer.recipe(optimizer.param_groups[slot.group], layout.shape)
    cut, whole = _digest(_places(layout.boxes)), _digest("whole")
    partitioned = layout.gather_group is not None  # every rank has the whole parameter, and state for its piece
    memory = slot.parameter.detach() if partitioned else slot.piece
    result = [_Held(slot.name, whole if partitioned else cut, memory, memory.numel() == 0, slot.device)]

    def add(name: str, place: int, memory: torch.Tensor | None, device: torch.device = slot.device) -> None:
        nothing = slot.numel == 0 and (memory is None or place == cut)
        result.append(_Held(f"{name!r} of {slot.name}", place, memory, nothing, device))

    for name in (*recipe.state, COMPENSATION):
        value = value_of(slot, state, name)
        add(name, cut, None if value is None else layout.piece_of_state(value))
    for name, _ in recipe.vectors:
        add(name, whole, None if state.get(slot.key(name)) is None else layout.memory_of_vector(state[slot.key(name)]))
    step = state.get("step")
    step = None if step is None else torch.as_tensor(step, dtype=torch.float32)
    add("step", whole, step, slot.device if step is None else step.device)
    return result


def _places(boxes: Sequence[Box]) -> list[Any]:
    """Which elements of the whole a piece holds, as plain data."""
    return [
        [(index.start, index.stop) if isinstance(index, slice) else index.tolist() for index in box.index]
        for box in boxes
    ]


def _digest(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little")


def _rows(held: Sequence[_Held]) -> list[Row | None]:
    """The hashes of what this rank holds, None where there is nothing; one transfer from each device."""
    hashes: dict[int, int] = {}
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(held):
        if tensor.memory is not None and not tensor.nothing:
            by_device.setdefault(tensor.device, []).append(i)
    for device, indices in by_device.items():
        values = torch.stack([_hash(memory, device) for i in indices if (memory := held[i].memory) is not None])
        hashes.update(zip(indices, values.tolist(), strict=True))
    return [None if tensor.nothing else (tensor.place, hashes.get(i)) for i, tensor in enumerate(held)]


def _hash(memory: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A 64-bit hash of the bits, in order: 0-d, on the device."""
    bits = _bits(memory)
    total = torch.full((), bits.numel(), dtype=torch.int64, device=device)
    for start in range(0, bits.numel(), _CHUNK):
        words = bits[start : start + _CHUNK].to(device).to(torch.int64)
        total += mixed(words + torch.arange(start + 1, start + 1 + len(words), device=device) * ODD).sum()
    return total


def _bits(memory: torch.Tensor) -> torch.Tensor:
    """The elements as integers, 1-d."""
    return memory.reshape(-1).view(_INTEGERS[memory.element_size()])


def _classes(rows: Sequence[Row | None]) -> list[tuple[int | None, list[int]]] | None:
    """For the first piece on which replicas disagree, each hash (None: lacking) with its ranks; the most first."""
    places: dict[int, dict[int | None, list[int]]] = {}
    for rank, row in enumerate(rows):
        if row is not None:
            places.setdefault(row[0], {}).setdefault(row[1], []).append(rank)
    for classes in places.values():
        if len(classes) > 1:
            return sorted(classes.items(), key=lambda item: (-len(item[1]), item[1]))
    return None


def _described(tensor: _Held, classes: Sequence[tuple[int | None, list[int]]], group: dist.ProcessGroup | None) -> str:
    """The difference in words, the same on all ranks."""
    texts = [_ranks(ranks) + (" without it" if value is None else "") for value, ranks in classes]
    text = f"differs between replicas: {' against '.join(texts)}"
    (first, ones), (second, others) = classes[:2]
    if first is None or second is None:
        return text
    different, largest = _compared(tensor, ones[0], others[0], group)
    return f"{text}; of ranks {ones[0]} and {others[0]}, {different} elements differ, by up to {largest:.3g}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _compared(tensor: _Held, a: int, b: int, group: dist.ProcessGroup | None) -> tuple[int, float]:
    """On all ranks: how many elements of the tensor differ between two of them, and by how much at most."""
    rank = dist.get_rank(group)
    home, away = (r if group is None else dist.get_global_rank(group, r) for r in (a, b))
    facts: list[Any] = [None]
    if rank in (a, b):
        assert tensor.memory is not None
        mine = tensor.memory.to(tensor.device).contiguous().reshape(-1)
        if rank == b:
            dist.send(mine.view(torch.uint8), home, group=group)
        else:
            theirs = torch.empty_like(mine)
            dist.recv(theirs.view(torch.uint8), away, group=group)
            apart = (mine.double() - theirs.double()).abs().max()
            facts = [(int((_bits(mine) != _bits(theirs)).sum()), float(apart))]
    dist.broadcast_object_list(facts, src=home, group=group)
    different, largest = facts[0]
    return different, largest
