"""What happens between the sums of one stage and the next: factors are made, and state that is not parameter-shaped."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from oput_dist.backends import Batch, Scalars, compute_dtype, send
from oput_dist.kernels.stage import Agreed, Axes, Factors, Given, Joint, JointWithLoss, Vectors

from .recipe import Recipe, vector_shape
from .slot import Slot
from .sums import Boundary, Family, Members, broadcast_shape

__all__ = ["Between", "Context"]


class Context(Protocol):
    """What the step knows and this needs."""

    state: MutableMapping[torch.Tensor, dict[str, Any]]
    real_groups: Sequence[dict[str, Any]]
    model_groups: tuple[dist.ProcessGroup, ...]

    def recipe_of(self, slot: Slot) -> Recipe: ...

    def scalars_of(self, slots: Sequence[Slot]) -> Scalars: ...


class Between:
    """The totals of the last boundary, and the factors that follow from all boundaries so far, in one step."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._totals: dict[int, dict[torch.device, tuple[Boundary, torch.Tensor]]] = {}  # by stage
        self._members: list[Members] = []  # of each boundary so far; a slot may be in several
        self._factors: dict[int, list[torch.Tensor]] = {}  # by id of the family
        self._joint: dict[int, torch.Tensor] = {}  # group -> its factors
        self._memories: dict[int, tuple[torch.Tensor, ...]] = {}  # slot -> its vector state

    def settle(self, number: int, boundary: Boundary, table: torch.Tensor, device: torch.device) -> None:
        """Take the totals of one device after stage ``number``, and make what :class:`Vectors` make of them."""
        self._totals.setdefault(number, {})[device] = (boundary, table)
        self._members.append(boundary.members)
        for family in boundary.families.values():
            self._settle_family(number, boundary, table, family)

    # ------------------------------------------------------------------------------------ one shape of parameters

    def _settle_family(self, number: int, boundary: Boundary, table: torch.Tensor, family: Family) -> None:
        recipe = family.recipe
        given = recipe.stages[number + 1].given
        assert isinstance(given, Vectors)
        axes = (*recipe.sums(number), *recipe.maxima(number))
        sums = [boundary.totals(table, family, *item) for item in zip(family.terms, axes, strict=True)]
        count, step = (boundary.totals(table, family, item, ()) for item in family.counts)
        if not family.by_maximum:
            step = step / count.clamp(min=1.0)
        memories = self._vectors(family)
        n, ndim = len(family.slots), len(family.shape)
        old = tuple(
            torch.stack(memory).double().view(n, *broadcast_shape(family.shape, kept))
            for memory, (_, kept) in zip(memories, recipe.vectors, strict=True)
        )
        scalars = self._context.scalars_of(family.slots)
        columns = [column.view(n, *[1] * ndim) for column in scalars.table.unbind(1)[1:]]
        new, factors = given.fn((*sums, count, step), old, scalars.kind(*columns))
        for memory, before, after in zip(memories, old, new, strict=True):
            if after is not before:
                kept_or_new = torch.where(count > 0, after, before).to(memory[0].dtype)
                torch._foreach_copy_(memory, list(kept_or_new.view(n, *memory[0].shape).unbind(0)))
        self._keep_factors(family, factors, given.axes)

    def _keep_factors(self, family: Family, factors: Sequence[torch.Tensor], axes: Sequence[Axes]) -> None:
        compute, n = compute_dtype(family.slots[0].dtype), len(family.slots)
        self._factors[id(family)] = [
            factor.to(compute).expand(n, *broadcast_shape(family.shape, kept))
            for factor, kept in zip(factors, axes, strict=True)
        ]

    def _factors_of(self, slots: Sequence[Slot]) -> list[tuple[torch.Tensor, list[int]]]:
        """The factors so far of slots in one family, and the places of the slots in each."""
        found = []
        for members in self._members:
            if slots[0].index in members:
                family, rows = members[slots[0].index][0], [members[slot.index][1] for slot in slots]
                found += [(factor, rows) for factor in self._factors[id(family)]]
        return found

    def give_stored(self, families: Sequence[Family], members: Members) -> None:
        """Give first stages the vector state as it is, where they ask for it."""
        self._members.append(members)
        for family in families:
            vectors = family.recipe.vectors
            stacked = [torch.stack(memories) for memories in self._vectors(family)]
            shapes = [(len(family.slots), *broadcast_shape(family.shape, kept)) for _, kept in vectors]
            factors = [memory.view(shape) for memory, shape in zip(stacked, shapes, strict=True)]
            self._keep_factors(family, factors, [kept for _, kept in vectors])

    def _vectors(self, family: Family) -> list[list[torch.Tensor]]:
        """Each vector state of all members, each rank's copy; of what is frozen, zeros that are not kept."""
        named = [(name, vector_shape(family.shape, axes)) for name, axes in family.recipe.vectors]
        if not named:
            return []
        known = self._memories
        for slot in family.slots:
            if slot.index not in known:
                live = slot.parameter.requires_grad or slot.parameter.grad is not None
                state = self._context.state[slot.parameter] if live else {}
                dtype = compute_dtype(slot.dtype)
                known[slot.index] = tuple([slot.vector(state, name, shape, dtype) for name, shape in named])
        return [list(column) for column in zip(*(known[slot.index] for slot in family.slots), strict=True)]

    # -------------------------------------------------------------------------------------------- the whole model

    def settle_jointly(self, number: int, recipes: dict[int, Recipe], h: dict[int, Any]) -> None:
        """Make what :class:`Joint` makes of the totals over all parameters.

        Args:
            number: the stage before.
            recipes: by number of the parameter group, those with a Joint.
            h: the scalars of those groups.
        """
        by_device = self._totals[number]
        home = next(iter(by_device))
        totals = torch.stack([b.rows(t).sum(0).to(home, non_blocking=True) for b, t in by_device.values()]).sum(0)
        for group in self._context.model_groups:
            dist.all_reduce(totals, group=group)
        losses = [loss for b, t in by_device.values() if (loss := b.loss(t)) is not None]
        for index, recipe in recipes.items():
            given, entry = recipe.stages[number + 1].given, self._context.real_groups[index]
            assert isinstance(given, Joint)
            old = {name: torch.as_tensor(entry[name], dtype=torch.float64, device=home) for name in recipe.kept}
            more = losses[:1] if isinstance(given, JointWithLoss) else []
            new, factors = given.fn(totals, old, h[index], *more)
            for name in recipe.kept:
                entry[name] = torch.where(totals[-1] > 0, new[name], old[name])
            self._joint[index] = torch.stack([torch.as_tensor(f, dtype=torch.float64, device=home) for f in factors])

    # ------------------------------------------------------------------------------------------- for the next stage

    def table(self, number: int, recipe: Recipe, slots: Sequence[Slot], batch: Batch) -> torch.Tensor | None:
        """What a stage that needs no axes is given: a row for each slot."""
        return self._rows(recipe.stages[number].given, number, slots, batch)

    def _rows(self, given: Given | None, number: int, slots: Sequence[Slot], batch: Batch) -> torch.Tensor | None:
        if given is None:
            return None
        if isinstance(given, Agreed):
            scale = self._agreed(number, slots, batch)
            before = self._rows(given.before, number - 1, slots, batch)
            return scale if before is None else torch.cat([before, scale], 1)
        if isinstance(given, Factors):
            return self._summed(number, slots, batch)
        known = [[f[i].reshape(()) for f, (i,) in self._factors_of([slot])] for slot in slots]
        if isinstance(given, Joint):
            joint = self._joint_rows(slots)
            return (
                torch.cat([torch.stack([torch.stack(row) for row in known]).to(joint.dtype), joint], 1)
                if known[0]
                else joint
            )
        return torch.stack([torch.stack(row) for row in known])

    def _summed(self, number: int, slots: Sequence[Slot], batch: Batch) -> torch.Tensor:
        """The totals of each slot after the stage before ``number``: each sum, then the number of elements."""
        device = slots[0].device
        boundary, table = self._totals[number - 1][device]
        key = ("given", number, id(boundary), tuple(slot.index for slot in slots))  # stacks of one batch share a cache
        return table[self._places(key, boundary, slots, batch)]

    def _agreed(self, number: int, slots: Sequence[Slot], batch: Batch) -> torch.Tensor:
        """``[slots, 1]``: the factor of :class:`Agreed`."""
        agreeing, elements = self._summed(number, slots, batch).unbind(1)
        elements = elements.clamp(min=1.0)
        return (elements / torch.maximum(agreeing, elements * 1e-3)).unsqueeze(1)

    def _joint_rows(self, slots: Sequence[Slot]) -> torch.Tensor:
        device, groups = slots[0].device, sorted({slot.group for slot in slots})
        rows = torch.stack([self._joint[group] for group in groups]).to(device, non_blocking=True)
        which = torch.tensor([groups.index(slot.group) for slot in slots], device="cpu")
        return rows[send(which, device)]

    def _places(self, key: Any, boundary: Boundary, slots: Sequence[Slot], batch: Batch) -> torch.Tensor:
        if key not in batch.cache:
            batch.cache[key] = boundary.places(slots, slots[0].device)
        places: torch.Tensor = batch.cache[key]
        return places

    def factors(
        self, number: int, recipe: Recipe, slots: Sequence[Slot], own: Sequence[Any], batch: Batch
    ) -> tuple[torch.Tensor, ...]:
        """What a stage that sees axes is given for boxes that lie alike, at indices ``own``, in slots of one family.

        Factors of rows and columns, then those of the whole model, then that of :class:`Agreed`.
        """
        axes, given = recipe.factors(number), recipe.stages[number].given
        result = []
        for (whole, rows), kept in zip(self._factors_of(slots), axes, strict=True):
            if rows != list(range(len(whole))):
                whole = whole[torch.tensor(rows, device=whole.device)]
            result.append(_part(whole, own, kept))
        scalars = []
        if isinstance(given.before if isinstance(given, Agreed) else given, Joint):
            scalars.append(self._joint_rows(slots))
        if isinstance(given, Agreed):
            scalars.append(self._agreed(number, slots, batch))
        compute, ones = compute_dtype(slots[0].dtype), [1] * len(slots[0].layout.shape)
        result += [column.to(compute).view(-1, *ones) for table in scalars for column in table.unbind(1)]
        return tuple(result)


def _part(factor: torch.Tensor, index: Sequence[Any], axes: Axes) -> torch.Tensor:
    """The part of stacked factors that belongs to boxes."""
    for axis in axes:
        own = index[axis]
        if isinstance(own, slice):
            factor = factor[(slice(None),) * (axis + 1) + (own,)]
        else:
            factor = factor.index_select(axis + 1, own.to(factor.device))
    return factor
