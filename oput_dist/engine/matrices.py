"""Parameters that are worked on whole: which ranks share them, and so which one works on each block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from oput_dist.backends import compute_dtype
from oput_dist.collectives import Matrix, Owners, Ranks
from oput_dist.collectives.balance import assigned
from oput_dist.collectives.owners import Wholes
from oput_dist.layout import LayoutError, within
from oput_dist.matrix.cores import parts, shared_out
from oput_dist.matrix.work import Held, Kept, Turn, Work, as_stack

from .owned import Owned, allocate, kept_by, kept_bytes
from .plan import Plan
from .recipe import Group, Recipe
from .slot import Slot

__all__ = ["MATRIX_STEPS", "Matrices", "matrices_in", "matrices_of", "owning_slots", "takes_part"]

MATRIX_STEPS = "matrix_steps"
"""The key of a parameter group that counts its steps, where work on matrices falls due at some of them."""

State = MutableMapping[torch.Tensor, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class _Block:
    """A rectangle of a parameter, worked on by itself."""

    slot: Slot
    of_slot: int
    """Its number among the blocks of the parameter."""
    phases: tuple[int, ...]
    """Of what recurs."""
    index: tuple[slice, ...]
    work: Work

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in self.index)


class _Family:
    """Parameters whose blocks the same ranks share."""

    def __init__(self, slots: Sequence[Slot], blocks: Sequence[_Block], owners: Owners, ranks: Ranks | None) -> None:
        self.slots, self.blocks, self._owners = slots, blocks, owners
        self.owned: dict[int, Owned] = {}
        self._on_cpu = slots[0].device.type == "cpu"
        self._together: set[int] = set()
        self._memory: dict[int, list[torch.Tensor | None]] = {}
        self._stacks: dict[tuple[int, ...], Held] = {}
        self._kinds: dict[int, object] = {}  # equal for slots whose blocks are all worked on together
        mine: dict[Slot, list[_Block]] = {block.slot: [] for block in blocks}
        for block, owner in zip(blocks, owners.owners, strict=True):
            if owner == owners.rank:
                mine[block.slot].append(block)
        works = {block.slot: block.work for block in blocks}
        for slot, own in mine.items():
            self.owned[slot.index] = Owned(slot, works[slot], {block.of_slot for block in own}, ranks)
            kinds = {(block.shape, block.work, slot.group) for block in own}
            self._kinds[slot.index] = kinds.pop() if len(kinds) == 1 else slot

    def run(self, memory: Mapping[int, torch.Tensor], state: State, steps: Mapping[int, int]) -> None:
        """See :meth:`Matrices.run`."""

        def work(wholes: Wholes, here: bool) -> Wholes:
            every = self._parts(self._alike(wholes), steps)
            jobs = [self._job(numbers, wholes, here, state, steps) for numbers, _ in every]
            made = shared_out(jobs, [cost for _, cost in every]) if self._on_cpu else [job() for job in jobs]
            return {
                i: whole
                for (numbers, _), results in zip(every, made, strict=True)
                for i, whole in zip(numbers, results, strict=True)
            }

        stepping = [slot for slot in self.slots if slot.index in memory]
        self.create(stepping, state)
        self._look_where_state_is(stepping, state)
        active = {i for i, block in enumerate(self.blocks) if block.slot.index in memory}
        pieces = [memory.get(slot.index, slot.piece) for slot in self.slots]
        self._owners.run(pieces, work, active if len(active) < len(self.blocks) else None)

    def create(self, slots: Sequence[Slot], state: State) -> None:
        """Make this rank's state of the blocks of some slots, or bring it together once, as after loading."""
        alike: dict[Any, list[tuple[Owned, dict[str, Any]]]] = {}
        for slot in slots:
            owned = self.owned.get(slot.index)
            if owned is not None and owned.owns and slot.index not in self._together:
                self._together.add(slot.index)
                alike.setdefault(self._kinds[slot.index], []).append((owned, state[slot.parameter]))
        for every in alike.values():
            allocate(every)

    def _alike(self, wholes: Wholes) -> list[list[int]]:
        """The matrices that can be worked on together: of one shape, kind and parameter group."""
        alike: dict[Any, list[int]] = {}
        for i in wholes:
            block = self.blocks[i]
            alike.setdefault((block.shape, block.work, block.slot.group), []).append(i)
        return list(alike.values())

    def _parts(self, alike: Sequence[Sequence[int]], steps: Mapping[int, int]) -> list[tuple[Sequence[int], float]]:
        """What is worked on at a time, with its cost: on GPUs, where each launch costs, all that are alike."""
        if not self._on_cpu:
            return [(numbers, 0.0) for numbers in alike]
        costs = [self._costs(numbers, steps) for numbers in alike]
        cuts = parts(costs, [prod(self.blocks[numbers[0]].shape) for numbers in alike])
        return [
            (numbers[part], sum(each[part]))
            for numbers, each, cut in zip(alike, costs, cuts, strict=True)
            for part in cut
        ]

    def _costs(self, numbers: Sequence[int], steps: Mapping[int, int]) -> list[float]:
        """Of matrices that are alike, in this step."""
        blocks = [self.blocks[i] for i in numbers]
        work, shape, step = blocks[0].work, blocks[0].shape, steps[blocks[0].slot.group]
        known = {phases: work.load(shape, Turn(step, (phases,))) for phases in {block.phases for block in blocks}}
        return [known[block.phases] for block in blocks]

    def _job(
        self, numbers: Sequence[int], wholes: Wholes, here: bool, state: State, steps: Mapping[int, int]
    ) -> Callable[[], Sequence[torch.Tensor]]:
        """What makes the results of some matrices that are worked on together."""
        block = self.blocks[numbers[0]]
        turn = Turn(steps[block.slot.group], tuple(self.blocks[i].phases for i in numbers))
        held = self._held(tuple(numbers), state)
        return partial(_worked_on, block.work, [wholes.pop(i) for i in numbers], here, held, turn)

    def _look_where_state_is(self, slots: Sequence[Slot], state: State) -> None:
        """Forget the stacks, or what they are views of would stay too, if state of some slots is no longer there."""
        for slot in slots:
            owned = self.owned.get(slot.index)
            if owned is not None and owned.owns:
                memory = [owned.memory(state[slot.parameter], name) for name in owned.names]
                last = self._memory.get(slot.index, ())
                if len(last) != len(memory) or any(a is not b for a, b in zip(last, memory, strict=True)):
                    self._stacks.clear()
                    self._memory[slot.index] = memory

    def _held(self, numbers: tuple[int, ...], state: State) -> Held:
        """The state of some blocks that are worked on together: that of an earlier step, where it serves again."""
        if numbers in self._stacks:
            return self._stacks[numbers]
        blocks = [self.blocks[i] for i in numbers]
        work, shape = blocks[0].work, blocks[0].shape
        kept = _kept(work, shape, compute_dtype(blocks[0].slot.dtype))
        if not kept:
            return Held({}, {})
        slots = dict.fromkeys(block.slot for block in blocks)
        views = {slot: self.owned[slot.index].views(state[slot.parameter]) for slot in slots}
        parts = {name: [views[block.slot][block.of_slot][name] for block in blocks] for name in kept}
        held = Held(kept, parts)
        if held.in_place:
            self._stacks[numbers] = held
        return held


@lru_cache(256)
def _kept(work: Work, shape: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Kept]:
    return work.kept(shape, dtype)


def _worked_on(work: Work, wholes: list[torch.Tensor], here: bool, held: Held, turn: Turn) -> Sequence[torch.Tensor]:
    """What is made of some matrices: where they lie here it is written there, beside other work."""
    given = as_stack(wholes)
    places = list(wholes) if here else None
    stacked = torch.stack(wholes).contiguous() if given is None else given
    wholes.clear()
    made = work(stacked, held, turn)
    held.finish()
    if places is None:
        return made.unbind()
    return places if made is given else [place.copy_(one) for place, one in zip(places, made, strict=True)]


class Matrices:
    """Slots whose recipe has work on whole matrices. Static: made from metadata only, by all ranks.

    Frozen parameters are among them, so that owners stay when a parameter thaws.

    Args:
        plan: whose slots they are.
        recipes: of all slots of the plan.
    """

    def __init__(self, plan: Plan, recipes: Sequence[Recipe]) -> None:
        families: dict[object, tuple[Ranks | None, list[Slot], list[_Block]]] = {}
        phases = _phases(plan, recipes)
        for slot in plan.slots:
            work = recipes[slot.index].whole
            if work is None:
                continue
            groups = sharers(slot)
            key: object = (_name(groups), compute_dtype(slot.dtype), slot.device.type if groups else slot.device)
            if key not in families:
                families[key] = (Ranks(groups) if groups else None, [], [])
            _, slots, blocks = families[key]
            slots.append(slot)
            for i, index in enumerate(work.blocks(tuple(slot.layout.shape))):
                blocks.append(_Block(slot, i, phases.get((slot, i), ()), index, work))
        self._families = [
            _Family(slots, blocks, _owners(key, ranks, slots, blocks, plan.owners_known), ranks)
            for key, (ranks, slots, blocks) in families.items()
        ]
        layouts = [slot.layout for _, slots, _ in families.values() for slot in slots]
        replicas = [(group, one.device) for one in layouts for group in (*one.partial_groups, *one.replica_groups)]
        self._replicas = list({_name([pair[0]]): pair for pair in replicas}.values())

    def owned(self, slot: Slot) -> Owned | None:
        """The state that owners keep of a slot's blocks; None where it has no such work."""
        return next((f.owned[slot.index] for f in self._families if slot.index in f.owned), None)

    def anywhere(self, here: bool) -> bool:
        """Whether something is so on any of the replicas that work together, which must go on alike. All must call it.

        Ranks that hold other pieces agree by the sums that they take.
        """
        for group, device in self._replicas:
            flag = torch.tensor(here, dtype=torch.int32, device=device)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
            here = bool(flag)
        return here

    def create(self, slots: Sequence[Slot], state: State) -> None:
        """Make this rank's state of the blocks of some slots, where there is none."""
        for family in self._families:
            family.create(slots, state)

    def run(self, memory: Mapping[int, torch.Tensor], state: State, groups: Sequence[Group]) -> None:
        """Replace what every slot has by its piece of what is made of the whole. Every rank must call it.

        Args:
            memory: this rank's pieces, flat, by number of the slot: of those that take part, on all ranks alike.
            state: of the optimizer.
            groups: the parameter groups.
        """
        steps = {number: group.get(MATRIX_STEPS, 0) + 1 for number, group in enumerate(groups)}
        for family in self._families:
            family.run(memory, state, steps)


def _phases(plan: Plan, recipes: Sequence[Recipe]) -> dict[tuple[Slot, int], tuple[int, ...]]:
    """When in its period falls due what recurs for each block of a slot.

    Dealt out by cost, in the order of the model, over all matrices of one period: the same in every layout.
    """
    recurring: dict[int, list[tuple[tuple[Slot, int], float]]] = {}
    for slot in plan.in_order:
        work = recipes[slot.index].whole
        for i, index in enumerate(() if work is None else work.blocks(tuple(slot.layout.shape))):
            assert work is not None
            period, costs = work.recurring(tuple(part.stop - part.start for part in index))
            recurring.setdefault(period, []).extend(((slot, i), cost) for cost in costs)
    found: dict[tuple[Slot, int], tuple[int, ...]] = {}
    for period, every in recurring.items():
        for (block, _), phase in zip(every, assigned([cost for _, cost in every], period), strict=True):
            found[block] = (*found.get(block, ()), phase)
    return found


def matrices_of(plan: Plan, recipes: Sequence[Recipe]) -> Matrices | None:
    """The matrices of a plan, with the ranks that share them; None without any. Every rank must call it.

    Args:
        plan: the plan.
        recipes: of its slots.
    """
    wholes = tuple(recipe.whole for recipe in recipes)
    if not any(whole is not None for whole in wholes):
        return None
    key = ("matrices", wholes)
    if key not in plan.memo:
        plan.memo[key] = Matrices(plan, recipes)
    known: Matrices = plan.memo[key]
    return known


def matrices_in(optimizer: Any, plan: Plan, groups: Sequence[Group]) -> Matrices | None:
    """The matrices of an optimizer with these groups, its own or those that it is to get. Every rank must call it."""
    return matrices_of(plan, [optimizer.recipe(groups[slot.group], slot.layout.shape) for slot in plan.slots])


def owning_slots(optimizer: Any, plan: Plan, groups: Sequence[Group]) -> set[Slot]:
    """The slots of an optimizer with these groups of which owners keep state."""
    if not optimizer.works_on_matrices():
        return set()
    works = ((slot, optimizer.recipe(groups[slot.group], slot.layout.shape).whole) for slot in plan.slots)
    return {slot for slot, work in works if kept_by(work, slot)}


def takes_part(slot: Slot, recipe: Recipe) -> bool:
    """Whether a parameter takes part in a step. One that is worked on whole does not while it is frozen, even with an
    old gradient: which ranks work on it must be known on all of them."""
    return recipe.whole is None or slot.parameter.requires_grad


def _owners(
    key: object, ranks: Ranks | None, slots: Sequence[Slot], blocks: Sequence[_Block], known: dict[Any, Any]
) -> Owners:
    """The plan of owners of some blocks, made once: to make one, ranks exchange what they hold.

    One rank alone may come here again, as after its parameters moved in memory, and finds it in ``known``; there is
    also who owned a block before, since its state is there.
    """
    places = {slot.index: i for i, slot in enumerate(slots)}
    matrices = [_matrix(block, places[block.slot.index]) for block in blocks]
    made_from = (key, tuple(_facts(matrix) for matrix in matrices))
    names = [(block.slot.parameter, block.slot.layout.name, block.of_slot) for block in blocks]
    if made_from not in known:
        settled = {i: known[name] for i, name in enumerate(names) if name in known}
        known[made_from] = Owners(matrices, ranks, compute_dtype(slots[0].dtype).itemsize, settled)
    owners: Owners = known[made_from]
    known.update(zip(names, owners.owners, strict=True))
    return owners


def _matrix(block: _Block, piece: int) -> Matrix:
    boxes = [part for box in block.slot.boxes for part in within(box, block.index)]
    kept = kept_bytes(block.work, block.shape, block.slot.dtype)
    return Matrix(block.shape, block.work.cost(block.shape), kept, boxes, piece)


def _facts(matrix: Matrix) -> tuple[object, ...]:
    """What a plan of owners is made from, as plain values."""
    places = [(box.start, box.shape, box.strides, [str(part) for part in box.index]) for box in matrix.boxes]
    return matrix.shape, matrix.cost, matrix.kept, matrix.piece, repr(places)


def sharers(slot: Slot) -> tuple[dist.ProcessGroup, ...]:
    """The groups that connect the ranks which hold a parameter together, replicas among them; none for this one alone.

    Raises:
        LayoutError: for a mesh along which nothing can be sent in turn.
    """
    try:
        return slot.layout.sharers
    except LayoutError as error:
        raise LayoutError(f"{slot.name}: {error}") from None


def _name(groups: Sequence[dist.ProcessGroup]) -> object:
    """The same for groups that all ranks know to be of the same ranks. Of a mesh, one rank does not see all."""
    if len(groups) == 1:
        return tuple(dist.get_process_group_ranks(groups[0]))
    return tuple(group.group_name for group in groups)
