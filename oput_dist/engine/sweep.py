"""A pass over tensors laid out like parameters, outside of a step: for wrappers and curvature estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from oput_dist.backends import BACKENDS, Batch, Scalars, choose, send
from oput_dist.collectives import Schedule, packed_sum
from oput_dist.kernels.stage import Prologue, Stage, Write, measures

from .coded import Coded, decoded
from .hosted import Hosted
from .plan import Plan
from .slot import Slot

__all__ = ["Far", "Part", "Sums", "part_of", "sweep"]


@dataclass(frozen=True)
class Part:
    """What a stage is run on for one slot: flat tensors of this rank's piece, not empty."""

    slot: Slot
    p: torch.Tensor
    """What the stage takes for the parameter, and writes."""
    g: torch.Tensor
    """What it takes for the gradient."""
    state: tuple[torch.Tensor, ...] = ()
    lost: torch.Tensor | None = None
    """What rounding of ``p`` lost, where the optimizer keeps that: read and written with it."""


@dataclass(frozen=True)
class Far:
    """A :class:`Part` of which something is in host memory. A sweep has one of them on the device at a time."""

    slot: Slot
    p: torch.Tensor | Hosted
    g: torch.Tensor | Hosted
    state: tuple[torch.Tensor | Hosted, ...] = ()
    lost: torch.Tensor | Hosted | None = None

    def brought(self) -> Part:
        """With copies of what is on the host."""
        made: dict[int, torch.Tensor] = {}  # the same for the same
        p, g, *state = (
            made.setdefault(id(each), self._brought(each)) if isinstance(each, Hosted) else each
            for each in (self.p, self.g, *self.state)
        )
        lost = self._brought(self.lost) if isinstance(self.lost, Hosted) else self.lost
        return Part(self.slot, p, g, tuple(state), lost)

    def _brought(self, hosted: Hosted) -> torch.Tensor:
        value, device = hosted.value, self.slot.device
        return decoded(self.slot, value) if isinstance(value, Coded) else value.to(device, copy=True)

    def put_back(self, part: Part, stage: Stage) -> None:
        """Copy to the host what a stage wrote."""
        pairs: list[tuple[Any, torch.Tensor | None]] = []
        if stage.writes_parameter:
            pairs += [(self.p, part.p), (self.lost, part.lost)]
        if stage.writes_state:
            pairs += zip(self.state, part.state, strict=True)
        for there, here in pairs:
            if isinstance(there, Hosted) and here is not None:
                value = there.value
                assert isinstance(value, torch.Tensor)
                value.copy_(here)


def part_of(
    slot: Slot,
    p: torch.Tensor | Hosted,
    g: torch.Tensor | Hosted,
    state: tuple[torch.Tensor | Hosted, ...] = (),
    lost: torch.Tensor | Hosted | None = None,
) -> Part | Far:
    """A part, wherever its tensors are."""
    kind: Any = Far if any(isinstance(each, Hosted) for each in (p, g, *state, lost)) else Part
    made: Part | Far = kind(slot, p, g, state, lost)
    return made


@dataclass(frozen=True)
class Sums:
    """What a Measure summed over every parameter of a plan, over all ranks that share it."""

    tables: Mapping[torch.device, torch.Tensor]
    """On each device ``[slots, terms + 1]``, float64: the total of each term, then the number of elements."""

    def total(self, groups: Sequence[dist.ProcessGroup] = ()) -> torch.Tensor:
        """``[terms + 1]``, float64: over all parameters.

        Args:
            groups: over which different ranks hold different parameters.
        """
        each = [table.sum(0) for table in self.tables.values()]
        total = torch.stack([one.to(each[0].device, non_blocking=True) for one in each]).sum(0)
        for group in groups:
            dist.all_reduce(total, group=group)
        return total


@torch.no_grad()
def sweep(
    plan: Plan,
    stage: Stage,
    parts: Sequence[Part | Far],
    scalars: Mapping[int, Any],
    backends: Sequence[str] = BACKENDS,
    given: Sums | None = None,
) -> Sums | None:
    """Run a stage on some tensors. Nothing precedes its rule: no decay, no scaling.

    Args:
        plan: of the parameters that the tensors are laid out like.
        stage: what to run; its sums are of whole parameters.
        parts: on what.
        scalars: the NamedTuple ``h`` of each parameter group, by its number; the same names for all.
        backends: that may run.
        given: the sums of a Measure before it, for a stage with :class:`Factors`.

    Returns:
        for a Measure the sums of all parameters, over all ranks that share them: all of these must call. One all-reduce
        for each process group. Slots without a part count as zero.
    """
    buckets: dict[Any, list[Part]] = {}
    for part in parts:
        if isinstance(part, Part):
            key = (part.p.dtype, part.g.dtype, part.p.device, part.lost is None, *[t.dtype for t in part.state])
            buckets.setdefault(key, []).append(part)
    made: dict[int, torch.Tensor] = {}
    for members in buckets.values():
        made.update(_run(stage, members, scalars, backends, given))
    for far in parts:
        if isinstance(far, Far):
            near = far.brought()
            made.update(_run(stage, [near], scalars, backends, given))
            far.put_back(near, stage)
    return (
        _added_up(plan, len(stage.sums), made, {m.slot.index: m.slot.numel for m in parts}) if measures(stage) else None
    )


def _run(
    stage: Stage, members: Sequence[Part], scalars: Mapping[int, Any], backends: Sequence[str], given: Sums | None
) -> dict[int, torch.Tensor]:
    """Run a stage on parts that are alike; what it measured of each, by number of the slot."""
    groups = sorted({part.slot.group for part in members})
    rows = [(0.0, *scalars[group]) for group in groups]
    which = [groups.index(part.slot.group) for part in members]
    device = members[0].p.device
    h = Scalars(type(scalars[groups[0]]), rows, which, device)
    state = [m.state if m.lost is None else (m.lost, *m.state) for m in members]
    write = Write.NEAREST if members[0].lost is None else Write.KAHAN
    batch = Batch([m.p for m in members], [m.g for m in members], state, h, Prologue(write=write))
    sums = None
    if given is not None:
        sums = given.tables[device][send(torch.tensor([m.slot.index for m in members], device="cpu"), device)]
    backend = choose(tuple(backends), device, sum(m.p.numel() for m in members))
    measured = backend.run(stage, batch, sums)
    return {} if measured is None else dict(zip((m.slot.index for m in members), measured, strict=True))


def _added_up(plan: Plan, terms: int, made: Mapping[int, torch.Tensor], counts: Mapping[int, int]) -> Sums:
    """The sums of this rank's pieces, added up over the ranks that share each parameter."""
    tables = {}
    width = terms + 1
    for device in plan.devices:
        key = ("swept", device, width)
        if key not in plan.memo:
            items = [(slot.layout.groups if slot.device == device else (), width) for slot in plan.slots]
            schedule = Schedule.of(items)
            places = torch.tensor(schedule.starts, device="cpu").unsqueeze(1) + torch.arange(width, device="cpu")
            plan.memo[key] = schedule, send(places, device)
        schedule, places = plan.memo[key]
        table = torch.zeros(schedule.size, dtype=torch.float64, device=device)
        here = [index for index in made if plan.slots[index].device == device]
        if here:
            elements = torch.tensor([[counts[i]] for i in here], dtype=torch.float64, device="cpu")
            values = torch.cat([torch.stack([made[i] for i in here]), send(elements, device)], 1)
            table[places[send(torch.tensor(here, device="cpu"), device)]] = values
        packed_sum(table, schedule)
        tables[device] = table[places]
    return Sums(tables)
