"""What happens between the sums of one stage and the next: factors are made, and state that is not parameter-shaped."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from oput_dist.backends import Batch, Scalars, compute_dtype, send
from oput_dist.kernels.stage import Axes, Factors, Joint, Vectors

from .recipe import Recipe, vector_shape
from .slot import Slot
from .sums import Boundary, Family, broadcast_shape

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
        self._totals: dict[torch.device, tuple[Boundary, torch.Tensor]] = {}
        self._factors: dict[int, list[tuple[torch.Tensor, int]]] = {}  # slot -> factors of its family, and its place
        self._joint: dict[int, torch.Tensor] = {}  # group -> its factors

    def settle(self, number: int, boundary: Boundary, table: torch.Tensor, device: torch.device) -> None:
        """Take the totals of one device after stage ``number``, and make what :class:`Vectors` make of them."""
        self._totals[device] = (boundary, table)
        for family in boundary.families.values():
            self._settle_family(number, boundary, table, family)

    # ------------------------------------------------------------------------------------ one shape of parameters

    def _settle_family(self, number: int, boundary: Boundary, table: torch.Tensor, family: Family) -> None:
        recipe = family.recipe
        given = recipe.stages[number + 1].given
        assert isinstance(given, Vectors)
        axes = recipe.sums(number)
        sums = [boundary.totals(table, family, i, kept) for i, kept in enumerate(axes)]
        count = boundary.totals(table, family, len(axes), ())
        step = boundary.totals(table, family, len(axes) + 1, ()) / count.clamp(min=1.0)
        memories = [self._vectors(family, name, kept) for name, kept in recipe.vectors]
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
        compute = compute_dtype(family.slots[0].dtype)
        for factor, kept in zip(factors, given.axes, strict=True):
            whole = factor.to(compute).expand(n, *broadcast_shape(family.shape, kept))
            for place, slot in enumerate(family.slots):
                self._factors.setdefault(slot.index, []).append((whole, place))

    def _vectors(self, family: Family, name: str, axes: Axes) -> list[torch.Tensor]:
        """The vector state of all members, each rank's copy; of what is frozen, zeros that are not kept."""
        memories = []
        for slot in family.slots:
            live = slot.parameter.requires_grad or slot.parameter.grad is not None
            state = self._context.state[slot.parameter] if live else {}
            memories.append(slot.vector(state, name, vector_shape(slot.layout.shape, axes), compute_dtype(slot.dtype)))
        return memories

    # -------------------------------------------------------------------------------------------- the whole model

    def settle_jointly(self, number: int, recipes: dict[int, Recipe], h: dict[int, Any]) -> None:
        """Make what :class:`Joint` makes of the totals over all parameters.

        Args:
            number: the stage before.
            recipes: by number of the parameter group, those with a Joint.
            h: the scalars of those groups.
        """
        home = next(iter(self._totals))
        totals = torch.stack([b.rows(t).sum(0).to(home, non_blocking=True) for b, t in self._totals.values()]).sum(0)
        for group in self._context.model_groups:
            dist.all_reduce(totals, group=group)
        losses = [loss for b, t in self._totals.values() if (loss := b.loss(t)) is not None]
        for index, recipe in recipes.items():
            given, entry = recipe.stages[number + 1].given, self._context.real_groups[index]
            assert isinstance(given, Joint)
            old = {name: torch.as_tensor(entry[name], dtype=torch.float64, device=home) for name in recipe.kept}
            new, factors = given.fn(totals, old, h[index], losses[0])
            for name in recipe.kept:
                entry[name] = torch.where(totals[-1] > 0, new[name], old[name])
            self._joint[index] = torch.stack([torch.as_tensor(f, dtype=torch.float64, device=home) for f in factors])

    # ------------------------------------------------------------------------------------------- for the next stage

    def table(self, number: int, recipe: Recipe, slots: Sequence[Slot], batch: Batch) -> torch.Tensor | None:
        """What a stage that needs no axes is given: a row for each slot."""
        given, device = recipe.stages[number].given, slots[0].device
        if given is None:
            return None
        if isinstance(given, Factors):
            boundary, table = self._totals[device]
            return table[self._places(("given", number, id(boundary)), boundary, slots, batch)]
        if isinstance(given, Joint):
            groups = sorted({slot.group for slot in slots})
            rows = torch.stack([self._joint[group] for group in groups]).to(device, non_blocking=True)
            which = torch.tensor([groups.index(slot.group) for slot in slots], device="cpu")
            return rows[send(which, device)]
        return torch.stack([torch.stack([f[i].reshape(()) for f, i in self._factors[slot.index]]) for slot in slots])

    def _places(self, key: Any, boundary: Boundary, slots: Sequence[Slot], batch: Batch) -> torch.Tensor:
        if key not in batch.cache:
            batch.cache[key] = boundary.places(slots, slots[0].device)
        places: torch.Tensor = batch.cache[key]
        return places

    def factors(
        self, number: int, recipe: Recipe, slots: Sequence[Slot], own: Sequence[Any]
    ) -> tuple[torch.Tensor, ...]:
        """What a stage that sees axes is given for boxes that lie alike, at indices ``own``, in slots of one family."""
        axes = recipe.factors(number)
        if not axes:
            return ()
        result = []
        for k, kept in enumerate(axes):
            family = self._factors[slots[0].index][k][0]
            rows = [self._factors[slot.index][k][1] for slot in slots]
            whole = family if rows == list(range(len(family))) else family[torch.tensor(rows, device=family.device)]
            result.append(_part(whole, own, kept))
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
