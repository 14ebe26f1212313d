"""State that the owners of matrices keep: on one rank only, and spread over all of them in checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch.distributed.tensor import DTensor

from oput_dist.backends import compute_dtype
from oput_dist.collectives import Ranks
from oput_dist.matrix.work import Kept, Work

from .packed import Packed, as_kept, memory_of, numbers_of, with_memory
from .slot import Slot

__all__ = ["Owned", "Range", "allocate", "kept_by", "kept_bytes"]


@dataclass(frozen=True)
class Range:
    """Where the numbers of one block are: in those of all blocks of its parameter, one after the other."""

    block: int
    start: int
    length: int
    kept: Kept


@dataclass(frozen=True)
class _State:
    """One state of all blocks of a parameter."""

    dtype: torch.dtype
    ranges: tuple[Range, ...]
    length: int
    optional: bool


def kept_by(work: Work | None, slot: Slot) -> dict[str, _State]:
    """What the owners of a parameter's blocks keep, by name."""
    if work is None:
        return {}
    found: dict[str, list[tuple[int, Kept]]] = {}
    for i, block in enumerate(work.blocks(tuple(slot.layout.shape))):
        sizes = tuple(part.stop - part.start for part in block)
        for name, kept in work.kept(sizes, compute_dtype(slot.dtype)).items():
            found.setdefault(name, []).append((i, kept))
    return {name: _state(each) for name, each in found.items()}


def _state(each: Sequence[tuple[int, Kept]]) -> _State:
    ranges, at = [], 0
    for block, kept in each:
        ranges.append(Range(block, at, prod(kept.shape), kept))
        at += prod(kept.shape)
    return _State(each[0][1].dtype, tuple(ranges), at, each[0][1].optional)


def kept_bytes(work: Work, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that the owner of one block keeps, for parameters of a dtype."""
    return sum(kept.nbytes for kept in work.kept(shape, compute_dtype(dtype)).values())


class Owned:
    """The state of one parameter's blocks, of which this rank owns some.

    Under a name it is, on their owners, one tensor with that of their own blocks, one after the other, or its bytes;
    nothing on other ranks. What a checkpoint holds is one tensor of numbers for all blocks, the same for any number of
    ranks.

    Args:
        slot: of the parameter.
        work: that is done.
        mine: which of the blocks this rank owns.
        ranks: those that share them; None for this one alone.
    """

    def __init__(self, slot: Slot, work: Work, mine: Collection[int], ranks: Ranks | None) -> None:
        self._slot, self._ranks = slot, ranks
        self._all = kept_by(work, slot)
        self._own = {name: [r for r in state.ranges if r.block in mine] for name, state in self._all.items()}
        self._kept = {name: tuple(one.kept for one in own) for name, own in self._own.items()}
        self._plain = {
            name: (sum(one.form[0] for one in kept), kept[0].dtype, slot.device)
            for name, kept in self._kept.items()
            if kept and kept[0].packing is None
        }

    @property
    def names(self) -> Sequence[str]:
        """Of the states."""
        return list(self._all)

    def memory(self, state: MutableMapping[str, object], name: str) -> torch.Tensor | None:
        """What this rank keeps under a name, in the form that it is to have: what was loaded, or another option once
        made, is brought into it; zeros are made if it is missing. None if it owns no block.

        Raises:
            ValueError: if it is of another size.
        """
        own = self._own[name]
        if not own:
            return None
        key = self._slot.key(name)
        value = state.get(key)
        if isinstance(value, torch.Tensor) and (value.numel(), value.dtype, value.device) == self._plain.get(name):
            return value  # as at nearly every step, of every matrix
        size = sum(one.length for one in own)
        assert value is None or isinstance(value, (torch.Tensor, Packed))
        if (count := size if value is None else _count(value)) != size:
            raise ValueError(
                f"state {key!r} of {self._slot.name} has {count} elements, but the blocks that this rank owns "
                f"have {size}: if options, parameters or ranks changed, load a state dict (oput.full_state_dict)"
            )
        made = as_kept(value, self._kept[name], self._slot.device)
        if made is not value:
            state[key] = made
        return memory_of(made)

    def move(self, state: MutableMapping[str, object], name: str, memory: torch.Tensor) -> None:
        """Keep what :meth:`memory` returned, copied, elsewhere."""
        key = self._slot.key(name)
        value = state[key]
        assert isinstance(value, (torch.Tensor, Packed))
        state[key] = with_memory(value, memory)

    @property
    def owns(self) -> bool:
        """Whether this rank owns a block."""
        return any(self._own.values())

    def views(self, state: MutableMapping[str, object]) -> dict[int, dict[str, torch.Tensor]]:
        """For each block that this rank owns its state by name, flat."""
        found: dict[int, dict[str, torch.Tensor]] = {}
        for name, ranges in self._own.items():
            memory, at = self.memory(state, name), 0
            for one in ranges if memory is not None else ():
                assert memory is not None
                size, _ = one.kept.form
                found.setdefault(one.block, {})[name] = memory[at : at + size]
                at += size
        return found

    def whole(self, state: Mapping[str, object], name: str) -> torch.Tensor:
        """The numbers of all blocks. Every rank that shares them must call it.

        Bits are added up, not numbers: every element has one owner, and 0 + x would turn -0.0 into 0.0.
        """
        kept, value = self._all[name], state.get(self._slot.key(name))
        result = torch.zeros(kept.length, dtype=kept.dtype, device=self._slot.device)
        if isinstance(value, (torch.Tensor, Packed)) and self._own[name]:
            numbers = numbers_of(value).split([one.length for one in self._own[name]])  # type: ignore[no-untyped-call]
            for one, part in zip(self._own[name], numbers, strict=True):
                result[one.start : one.start + one.length] = part
        if self._ranks is not None:
            self._ranks.add_up(result.view(torch.uint8))
        return result

    def spread(self, state: Mapping[str, object], name: str) -> torch.Tensor | None:
        """The numbers of all blocks as checkpoints hold them: each rank has a part; of replicas each has all of it, on
        the CPU, as no rank need have room for it on its device. Where no mesh can say that, those of this rank's own
        blocks, or None if they are kept as they are.

        Every rank that shares them must call it.
        """
        kept = self._all[name]
        made = self._slot.layout.spread(kept.length, kept.dtype)
        if made is None:
            if self._ranks is None or self._slot.layout.groups:
                value = state.get(self._slot.key(name))
                return numbers_of(value) if isinstance(value, Packed) else None
            return self.whole(state, name).cpu()
        tensor, local, start = made
        local.copy_(self.whole(state, name)[start : start + local.numel()])
        return tensor

    def check(self, value: torch.Tensor | None, name: str) -> None:
        """Raise ValueError if this rank owns blocks, and a loaded value is not of all blocks nor of those."""
        length, size = self._all[name].length, sum(one.length for one in self._own[name])
        if value is None and size and not self._all[name].optional:
            raise ValueError(f"the state of {self._slot.name} lacks {name!r}, of blocks that this rank owns")
        if value is not None and value.numel() not in (length, size):
            raise ValueError(
                f"{name!r} of {self._slot.name} has {value.numel()} elements, but must have {length} (of the whole "
                f"parameter) or {size} (of the blocks that this rank owns, of the same number of ranks)"
            )

    def adopt(self, value: torch.Tensor, name: str) -> torch.Tensor | None:
        """What this rank keeps of a loaded state that passed :meth:`check`. Every rank must call it."""
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        own = self._own[name]
        if not own:
            return None
        whole = whole.to(self._slot.device)
        if whole.numel() == self._all[name].length:
            return torch.cat([whole[one.start : one.start + one.length] for one in own])
        return whole.clone()


def _count(value: torch.Tensor | Packed) -> int:
    """Numbers in a state."""
    return value.numel() if isinstance(value, torch.Tensor) else sum(prod(one.shape) for one in value.blocks)


def allocate(every: Sequence[tuple[Owned, MutableMapping[str, object]]]) -> None:
    """Bring the state of parameters whose blocks are worked on together, with their state dicts, one after the other
    in memory, so that a step need not stack it; zeros where there is none."""
    for name in every[0][0].names:
        pairs = [(owned, state, owned.memory(state, name)) for owned, state in every]
        found = [(owned, state, memory) for owned, state, memory in pairs if memory is not None]
        if len(found) > 1:
            joined = torch.cat([memory for _, _, memory in found])
            parts = joined.split([memory.numel() for _, _, memory in found])  # type: ignore[no-untyped-call]
            for (owned, state, _), part in zip(found, parts, strict=True):
                owned.move(state, name, part)
