"""One step: buckets, then stage after stage, with one packed reduction between stages. Nothing optimizer-specific."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, MutableMapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist

from oput_dist.backends import Batch, Scalars, choose, compute_dtype, send
from oput_dist.kernels.stage import Joint, JointWithLoss, Prologue, Stored, Vectors

from .between import Between
from .buckets import Bucket, Member, key_of, set_apart, written
from .cell import Cell
from .coding import Coding
from .cuts import find_cuts
from .finish import finish, updated
from .forms import drop_joint, kept_state
from .matrices import Matrices, matrices_of, takes_part
from .options import Options
from .plan import Plan, check_sums
from .recipe import Group, Recipe, as_scalar, decay_scalar, prologue_of
from .scaling import gradient_scale, norm_tables
from .slot import Slot, vectors_of
from .stacks import stacks_of
from .sums import Boundary, Family, Members, members_of
from .waves import waves
from .writing import names_of, write_of

__all__ = ["Options", "Outcome", "Spread", "Step"]

State = MutableMapping[torch.Tensor, dict[str, Any]]
Active = Sequence[tuple[Slot, torch.Tensor]]
"""Slots with a gradient and elements of their own, each with its gradient."""


class Outcome(Enum):
    """What became of a step."""

    DONE = "done"
    SKIPPED = "a gradient was not finite"
    REHEARSED = "it only created state"


@dataclass(frozen=True)
class Spread:
    """Groups beyond those of the layouts."""

    model: tuple[dist.ProcessGroup, ...] = ()
    """Over which different ranks hold different parameters (pipeline stages)."""
    data: tuple[dist.ProcessGroup, ...] = ()
    """Over which the batch loss is averaged."""


class Step:
    """The work of one ``optimizer.step()``.

    Args:
        plan: the plan.
        groups: the parameter groups.
        state: the optimizer's state.
        recipe: the recipe of a group and global shape.
        scalars: the NamedTuple ``h`` of a group at a step count.
        options: see :class:`Options`.
        first: whether this optimizer has neither stepped nor loaded state before; the same on all ranks.
        spread: see :class:`Spread`.
        loss: this rank's batch loss, where the optimizer needs it.
        unscale: multiplies every gradient before all else: 0-d, on any device; None for 1.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Sequence[dict[str, Any]],
        state: State,
        recipe: Callable[[Group, Sequence[int]], Recipe],
        scalars: Callable[[Group, int], Any],
        options: Options,
        first: bool,
        spread: Spread = Spread(),
        loss: torch.Tensor | float | None = None,
        unscale: torch.Tensor | None = None,
    ) -> None:
        self._plan, self.state, self._options, self._first = plan, state, options, first
        self._spread, self._loss, self._unscale = spread, loss, unscale
        self.real_groups, self.model_groups = groups, spread.model
        self._steps: dict[Slot, int] = {}
        self._rows: dict[Any, Scalars] = {}  # the same object for buckets that are alike, as waves of one parameter are
        without = {"weight_decay": 0.0} if options.accumulate else {}
        self._groups = [{**group, "lr": as_scalar(group["lr"]), **without} for group in groups]
        self._scalars = scalars
        made: dict[Any, int] = {}
        self._kinds: list[tuple[Recipe, Prologue]] = []  # one for slots that are updated alike
        self._names: list[tuple[str, ...]] = []  # of the state of each kind
        self._kind: list[int] = []
        for slot in plan.slots:
            key = (slot.group, slot.layout.shape, slot.dtype)
            if key not in made:
                one = recipe(self._groups[slot.group], slot.layout.shape)
                write = write_of(options.write, slot.dtype)
                kind = (one, prologue_of(one, self._groups[slot.group], write))
                if kind not in self._kinds:
                    self._kinds.append(kind)
                    self._names.append(names_of(one.state, options.write, slot.dtype))
                made[key] = self._kinds.index(kind)
            self._kind.append(made[key])
        self._check_sums()

    def _check_sums(self) -> None:
        """Raise for a parameter that cannot be summed over, where an option that was changed begins to need that."""
        key = ("summable", tuple(self._kind), tuple(self._kinds))
        if key not in self._plan.memo:
            for slot in self._plan.slots:
                if self.recipe_of(slot).exchanges:
                    check_sums(slot.name, slot.layout)
            self._plan.memo[key] = True

    def run(self) -> Outcome:
        """Run it: checks first, so that nothing has changed when one of them raises."""
        self._plan.settle_gradients()
        if self._options.storage is not None:
            find_cuts(self._plan, self._options.storage)
        matrices = self._matrices()
        slots = [slot for slot in self._plan.slots if updated(slot) and takes_part(slot, self.recipe_of(slot))]
        gradients = [(slot, gradient) for slot in slots if (gradient := slot.flat_gradient()) is not None]
        rehearsed = self._rehearsal(gradients, matrices)
        if rehearsed:
            gradients = []
        present = [slot for slot, _ in gradients]
        for device in {slot.device for slot in present}:
            choose(self._options.backends, device, 0)
        active = [(slot, gradient) for slot, gradient in gradients if slot.numel]
        self._check_loss(present)
        agree = bool if matrices is None else matrices.anywhere
        scale = gradient_scale(self._plan, active, self._options, self._spread.model, self._unscale, agree)
        if scale is None:
            return Outcome.SKIPPED
        scratch = {} if matrices is None else self._scratch({slot for slot, _ in active})
        state = {slot: (*self._state_of(slot), *scratch.get(slot.index, ())) for slot in present}
        self._steps = dict(zip(present, self._plan.next_counts(present, self.state), strict=True))
        buckets = self._buckets(active, state, scale)
        self._plan.count(present)
        self._run_stages(buckets, None if rehearsed else matrices, scratch)
        if self._options.opens:
            drop_joint(self._plan.slots, self.state, self._names_of)
        if not self._options.accumulate:
            finish(self._plan, [pair for b in buckets for pair in zip(b.slots, b.batch.p, strict=True)])
        return Outcome.REHEARSED if rehearsed else Outcome.DONE

    def recipe_of(self, slot: Slot) -> Recipe:
        """How a slot is updated."""
        return self._kinds[self._kind[slot.index]][0]

    def _names_of(self, slot: Slot) -> tuple[str, ...]:
        return self._names[self._kind[slot.index]]

    def _state_of(self, slot: Slot) -> tuple[torch.Tensor | Cell, ...]:
        return kept_state(slot, self.state[slot.parameter], self._names_of(slot), self._options)

    def _check_loss(self, present: Sequence[Slot]) -> None:
        asking = [any(isinstance(s.given, JointWithLoss) for s in recipe.stages) for recipe, _ in self._kinds]
        if self._loss is None and any(asking) and any(asking[self._kind[slot.index]] for slot in present):
            raise ValueError("this optimizer needs the batch loss: call step(loss=loss) or step(closure)")

    def _rehearsal(self, gradients: Active, matrices: Matrices | None) -> bool:
        """Whether this step is only asked to create state; then it is made, and no gradient may count.

        ``torch.distributed.checkpoint`` creates state by a step with zero gradients at lr 0. Were it counted, training
        would go on with another bias correction. So a first step at lr 0 counts only if some gradient is not zero;
        all ranks know that it is the first and see the same lr, hence take part in the one reduction that this takes.
        """
        if not self._first or any(group["lr"] != 0 for group in self._groups):
            return False
        for slot in self._plan.slots:
            if slot.parameter.requires_grad and slot.parameter.grad is not None:
                self._state_of(slot)
                vectors_of(slot, self.recipe_of(slot), self.state[slot.parameter])
                self.state[slot.parameter]["step"] = self._plan.counter(slot)
        if matrices is not None:
            matrices.create([slot for slot in self._plan.slots if slot.parameter.grad is not None], self.state)
        tables = norm_tables(self._plan, [(s, gradient) for s, gradient in gradients if s.numel], self._options)
        moving = any(bool((table != 0).any()) for table in tables.values())
        return not (moving if matrices is None else matrices.anywhere(moving))

    def _buckets(
        self,
        active: Active,
        state: dict[Slot, tuple[torch.Tensor | Cell, ...]],
        scale: dict[torch.device, torch.Tensor],
    ) -> list[Bucket]:
        kinds: dict[Any, list[Member]] = {}
        for slot, gradient in active:
            number = self._kind[slot.index]
            key = (number, slot.dtype, gradient.dtype, slot.device, *key_of(state[slot]))
            own = set_apart(slot, self._kinds[number][1], state[slot], self._steps[slot], self._options.accumulate)
            member = Member(slot, 0, slot.numel, gradient, own)
            if key in kinds:
                kinds[key].append(member)
            else:
                kinds[key] = [member]
        buckets = []
        for key, every in kinds.items():
            recipe, prologue = self._kinds[key[0]]
            whole = any(recipe.boxed(number) for number in range(len(recipe.stages)))
            total = self._elements(key[0])
            flats = {member.slot: written(member.slot, self._options.accumulate) for member in every}
            for members in waves(every, divide=not whole):
                slots = [member.slot for member in members]
                places = tuple((member.slot.index, member.start) for member in members)
                opens = bool(members[0].cells)
                batch = Batch(
                    p=[member.part(flats[member.slot]) for member in members],
                    g=[member.part(member.gradient) for member in members],
                    state=[] if opens else [member.state for member in members],  # type: ignore[misc]
                    scalars=self.scalars_of(slots),
                    prologue=prologue,
                    scale=scale.get(key[3]),
                    cache=self._plan.cache((recipe, prologue, places)),
                    lasting=not opens,
                )
                buckets.append(Bucket(members, recipe, batch, [self._steps[slot] for slot in slots], total))
        return buckets

    def _elements(self, kind: int) -> int:
        """Of the whole parameters of a kind."""
        key = ("elements", tuple(self._kind))
        if key not in self._plan.memo:
            counted = Counter[int]()
            for slot, number in zip(self._plan.slots, self._kind, strict=True):
                counted[number] += slot.layout.shape.numel()
            self._plan.memo[key] = counted
        return int(self._plan.memo[key][kind])

    def scalars_of(self, slots: Sequence[Slot]) -> Scalars:
        """The scalars of slots that are updated alike; one that does not count now is taken at its first step."""
        prologue = self._kinds[self._kind[slots[0].index]][1]
        rows: dict[tuple[int, int], int] = {}
        which = [rows.setdefault((slot.group, self._steps.get(slot, 1)), len(rows)) for slot in slots]
        key = (slots[0].device, self._kind[slots[0].index], tuple(rows), tuple(which))
        if key in self._rows:
            return self._rows[key]
        named = [self._scalars(self._groups[group], step) for group, step in rows]
        assert len({type(h) for h in named}) == 1, "scalars of one recipe must have the same names at every step"
        values = [(decay_scalar(prologue, self._groups[group]), *h) for (group, _), h in zip(rows, named, strict=True)]
        self._rows[key] = Scalars(type(named[0]), values, which, slots[0].device)
        return self._rows[key]

    def _matrices(self) -> Matrices | None:
        if all(recipe.whole is None for recipe, _ in self._kinds):
            return None
        return matrices_of(self._plan, [self.recipe_of(slot) for slot in self._plan.slots])

    def _scratch(self, written: Collection[Slot]) -> dict[int, tuple[torch.Tensor]]:
        """Memory for this rank's pieces of what is worked on whole, by number of the slot: zeros, where no gradient is.

        Of slots that all ranks know to take part; what is here alone needs a gradient, as in any other step.
        """
        alike: dict[tuple[torch.dtype, torch.device], list[Slot]] = {}
        for slot in self._plan.slots:
            if self.recipe_of(slot).whole is not None and updated(slot) and takes_part(slot, self.recipe_of(slot)):
                alike.setdefault((compute_dtype(slot.dtype), slot.device), []).append(slot)
        found: dict[int, tuple[torch.Tensor]] = {}
        for (dtype, device), slots in alike.items():
            sizes = [slot.numel for slot in slots]
            every = torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)  # type: ignore[no-untyped-call]
            for slot, memory in zip(slots, every, strict=True):
                found[slot.index] = (memory if slot in written else memory.zero_(),)
        return found

    def _run_stages(
        self, buckets: Sequence[Bucket], matrices: Matrices | None, scratch: dict[int, tuple[torch.Tensor]]
    ) -> None:
        """Stage after stage. Whether sums are exchanged between two depends on the recipes alone, not on gradients."""
        between, coding = Between(self), self._coding()
        between.give_stored(*self._families_of_stored())
        for number in range(max((len(recipe.stages) for recipe, _ in self._kinds), default=0)):
            boundaries = self._boundaries(number)
            tables = {device: boundary.zeros(device) for device, boundary in boundaries.items()}
            if number == 1 and matrices is not None:
                matrices.run({index: memory for index, (memory,) in scratch.items()}, self.state, self._groups)
            own = [bucket for bucket in buckets if number < len(bucket.recipe.stages)]
            for bucket in coding.opened(own, number) if coding else own:
                self._run_stage(number, bucket, between, boundaries, tables)
            if coding and any(r.stages[number].writes_state for r, _ in self._kinds if number < len(r.stages)):
                coding.settle()
            for device, boundary in boundaries.items():
                self._put_loss(boundary, tables[device])
                boundary.reduce(tables[device])
                between.settle(number, boundary, tables[device], device)
            self._settle_jointly(number, between)

    def _coding(self) -> Coding | None:
        key = (tuple(self._kind), tuple(self._kinds))
        return Coding(self._plan, self.recipe_of, key, self._options) if self._options.opens else None

    def _families_of_stored(self) -> tuple[list[Family], Members]:
        """Slots whose first stage is given their vector state, those of one recipe and shape together."""
        key = ("stored", tuple(self._kind), tuple(self._kinds))
        if key not in self._plan.memo:
            families: dict[Any, Family] = {}
            for slot in self._plan.slots:
                recipe = self.recipe_of(slot)
                if isinstance(recipe.stages[0].given, Stored):
                    family = families.setdefault((recipe, slot.layout.shape), Family(recipe, slot.layout.shape))
                    family.slots.append(slot)
            self._plan.memo[key] = (list(families.values()), members_of(families.values()))
        known: tuple[list[Family], Members] = self._plan.memo[key]
        return known

    def _settle_jointly(self, number: int, between: Between) -> None:
        kinds = [bool(r.sums(number)) and isinstance(r.stages[number + 1].given, Joint) for r, _ in self._kinds]
        if not any(kinds):
            return
        recipes, h = {}, {}
        for slot in self._plan.slots:
            if slot.group not in recipes and kinds[self._kind[slot.index]]:
                recipes[slot.group] = self.recipe_of(slot)
                h[slot.group] = self._scalars(self._groups[slot.group], self._steps.get(slot, 1))
        if recipes:
            between.settle_jointly(number, recipes, h)

    def _boundaries(self, number: int) -> dict[torch.device, Boundary]:
        """What is exchanged after a stage, on each device; nothing where nothing is."""
        key = ("boundary", number, tuple(self._kind), tuple(self._kinds), self._spread)
        if key not in self._plan.memo:
            with_loss = any(
                isinstance(recipe.stages[number + 1].given, JointWithLoss)
                for recipe, _ in self._kinds
                if recipe.sums(number)
            )
            made: dict[torch.device, Boundary] = {}
            for device in self._plan.devices:
                slots = [slot for slot in self._plan.slots if slot.device == device]
                boundary = Boundary(
                    slots, self.recipe_of, number, self._spread.data if with_loss and not made else None
                )
                if not boundary.empty:
                    made[device] = boundary
            self._plan.memo[key] = made
        known: dict[torch.device, Boundary] = self._plan.memo[key]
        return known

    def _put_loss(self, boundary: Boundary, table: torch.Tensor) -> None:
        place = boundary.loss(table)
        if place is not None and self._loss is not None:
            ranks = 1
            for group in self._spread.data:
                ranks *= dist.get_world_size(group)
            loss = torch.as_tensor(self._loss, dtype=torch.float64).detach()
            place.copy_(loss.reshape(()) / ranks, non_blocking=True)

    def _run_stage(
        self,
        number: int,
        bucket: Bucket,
        between: Between,
        boundaries: dict[torch.device, Boundary],
        tables: dict[torch.device, torch.Tensor],
    ) -> None:
        """Run a stage on a bucket, and enter what it measures into the table."""
        recipe, device = bucket.recipe, bucket.slots[0].device
        stage = recipe.stages[number]
        backend = choose(self._options.backends, device, bucket.total)
        if recipe.boxed(number):
            stacks = stacks_of(bucket.batch, bucket.slots)
            given = [between.factors(number, recipe, stack.slots, stack.index, bucket.batch) for stack in stacks]
            made = [stack.with_factors(factors) for stack, factors in zip(stacks, given, strict=True)]
            sums = backend.run_stacks(stage, bucket.batch, made)
            kept = (*recipe.sums(number), *recipe.maxima(number))
            for stack, terms in zip(stacks, sums, strict=True):
                if terms:
                    boundaries[device].add(tables[device], stack.slots, kept, stack.index, terms)
            result = None
        else:
            result = backend.run(stage, bucket.batch, between.table(number, recipe, bucket.slots, bucket.batch))
        if recipe.measures(number):
            counted = self._counts(number, bucket)
            values = counted if result is None else torch.cat([result, counted], 1)
            places = self._places(number, bucket, boundaries[device])[:, -values.shape[1] :]
            tables[device].index_put_((places,), values, accumulate=bucket.divided)

    def _places(self, number: int, bucket: Bucket, boundary: Boundary) -> torch.Tensor:
        cache, key = bucket.batch.cache, ("places", number, id(boundary))
        if key not in cache:
            cache[key] = boundary.places(bucket.slots, bucket.slots[0].device)
        places: torch.Tensor = cache[key]
        return places

    def _counts(self, number: int, bucket: Bucket) -> torch.Tensor:
        """``[slots, 1 or 2]``: the elements of each slot's piece and, for members of families, times its step count."""
        cache, device = bucket.batch.cache, bucket.slots[0].device
        if "counts" not in cache:
            counts = torch.tensor(bucket.numels, dtype=torch.float64, device="cpu")
            cache["counts"] = send(counts.unsqueeze(1), device)
        elements: torch.Tensor = cache["counts"]
        if not isinstance(bucket.recipe.stages[number + 1].given, Vectors):
            return elements
        steps = send(torch.tensor(bucket.steps, dtype=torch.float64, device="cpu").unsqueeze(1), device)
        weight = elements if bucket.recipe.sums(number) else 1.0  # sums add up over ranks, maxima do not
        return torch.cat([elements, weight * steps], 1)
