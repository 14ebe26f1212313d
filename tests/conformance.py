"""The conformance harness: the same seeded gradients for one plain process and for a sharded run must give one result.

Three tables are crossed: optimizer cases (``Case``), layouts (``tests/layouts.py``) and backends. A new optimizer is
one row in ``tests/cases/``. The ranks only report what they hold (``on_rank``); the parent process builds
the reference and judges (``faults``), so that nothing distributed can touch the reference.

Training has LAST + 1 steps. At NONE_ON_ALL some gradients are None on every rank. At the last step some are None on one
rank only, and the rule is: that rank's piece of the parameter, its state and its counter stay as they were, and it adds
nothing to the norms. The reference for that step is a plain run on tensors made of just the elements that take part.
Where that cannot be said (FSDP1's flat parameters have one gradient for all; sums over rows and columns need whole
tensors) every gradient is there on every rank.
"""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from oput_dist.engine.forms import with_tensors
from oput_dist.engine.writing import COMPENSATION
from oput_dist.layout import whole_or_local
from tests.layouts import Layout, Plain
from tests.pool import Pool
from tests.wrapped import LAYOUTS

LAST, NONE_ON_ALL = 3, 1
SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "one": (1,),
    "vector": (11,),
    "row": (1, 6),
    "matrix": (7, 5),
    "conv": (4, 3, 2, 2),
    "short": (2, 3),  # fewer rows than ranks
    "square": (3, 3),
}
SKIPPED = ("vector", "conv", "scalar")  # gradients that are None on all ranks at step NONE_ON_ALL
DROPPED = ("vector", "matrix", "short", "one")  # gradients that are None on one rank at the last step
ABSENT = 1  # ... and that rank (with the replicas of its piece)
SECOND = {"lr": 0.05, "weight_decay": 0.2}  # the second parameter group
FAST = {"lr": 0.4, "weight_decay": 0.2}  # where errors are relative to the update, it must not drown in the parameter
GRID = 64  # every value is a multiple of 1/64 below 4, so that means over ranks are exact and hide no error
RELATIVE_ERROR = {
    torch.float32: 1e-6,
    torch.float64: 1e-14,
    torch.bfloat16: 1e-2,
}  # of the update, where norms are summed


@dataclass(frozen=True)
class Case:
    """One row: an optimizer with its settings. ``exact``: elementwise, so the sharded result must be bitwise equal."""

    name: str
    optimizer: str  # where to import it from: "oput_dist.Lamb"
    options: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)  # what the second parameter group overrides
    exact: bool = True
    partly: bool = True  # whether a run on the elements that take part is a reference for missing gradients
    vectors: tuple[str, ...] = ()  # state that is not parameter-shaped: whole on every rank
    loss: bool = False  # whether ``step`` takes the loss
    owned: tuple[str, ...] = ()  # state that owners of matrices keep, each for itself: not looked at

    def advance(self, optimizer: Any, step: int, difference: float = 0.0) -> None:
        """A step. Ranks may differ in their loss, whose mean is the same as in one process."""
        optimizer.step(**({"loss": 2.5 - step + difference} if self.loss else {}))

    def build(self, params: dict[str, Tensor], **extra: Any) -> torch.optim.Optimizer:
        module, _, name = self.optimizer.rpartition(".")
        names = list(SHAPES)
        halves = [names[0::2], names[1::2]]  # FSDP1 has one tensor for several names
        groups: list[dict[str, Any]] = [
            {"params": list(dict.fromkeys(params[k] for k in half if k in params))} for half in halves
        ]
        groups[1].update(self.second)
        if module.startswith("torch."):  # torch's own optimizers prove the harness; they have no backends
            extra = {"foreach": False}
        options = {**self.options, **extra}
        return getattr(importlib.import_module(module), name)([group for group in groups if group["params"]], **options)


def on_grid(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _on_grid(seed, shape, dtype).clone()


@functools.cache
def _on_grid(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn.clamp(-3.9, 3.9) * GRID).round().div(GRID).to(dtype)


def start_values(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: on_grid(i, shape, dtype) for i, (name, shape) in enumerate(SHAPES.items())}


def gradients(step: int, dtype: torch.dtype, skips: bool = True) -> dict[str, Tensor | None]:
    made = {name: on_grid(100 * (step + 1) + i, shape, dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    return {name: None if skips and step == NONE_ON_ALL and name in SKIPPED else grad for name, grad in made.items()}


# -------------------------------------------------------------------------------------------------------- on every rank

Snapshot = dict[str, dict[str, np.ndarray]]  # parameter -> "param" or the name of a state -> what this process holds
Pieces = dict[str, np.ndarray]  # parameter -> the flat indices of the elements that a rank holds


@dataclass
class Report:
    """What one rank holds before and after the last step."""

    before: Snapshot
    after: Snapshot
    pieces: Pieces
    absent: set[str]  # parameters whose gradient was None on this rank at the last step
    misplaced: list[str]  # state that is not laid out as its parameter


def memory(value: Tensor) -> Tensor:
    """What this process holds of a tensor, without the operations that DTensors make of this."""
    return whole_or_local(value).detach()


def local(value: Tensor) -> np.ndarray:
    value = memory(value)
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy().copy()


States = dict[str, dict[str, Any]]  # parameter -> its state, with tensors in place of what steps open


def states_of(params: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> States:
    origin: Any = getattr(optimizer, "origin", optimizer)
    if not getattr(getattr(origin, "options", None), "opens", False):
        return {name: optimizer.state[p] for name, p in params.items()}
    groups, every, found = origin.param_groups, origin._current_plan().slots, {}
    for p in dict.fromkeys(params.values()):
        slots = [slot for slot in every if slot.parameter is p]
        names = [(COMPENSATION, *origin.recipe(groups[slot.group], slot.layout.shape).state) for slot in slots]
        found[p] = with_tensors(slots, optimizer.state[p], names)
    return {name: found[p] for name, p in params.items()}


def snapshot(case: Case, layout: Layout, params: dict[str, Tensor], states: States) -> Snapshot:
    taken = {}
    for name, p in params.items():
        taken[name] = {"param": local(layout.local(name, p))}
        for key, value in sorted(states[name].items()):
            kind, _, original = key.partition(".")  # of a tensor that stands for several
            if kind in case.owned:
                continue
            if isinstance(value, Tensor) and original.rpartition(".")[2] in ("", name):
                whole = kind in ("step", *case.vectors)
                taken[name][kind] = local(value if whole else layout.local(name, value))
    return taken


Row = tuple[Case, torch.dtype, str]  # the string is the backend of the sharded run


def on_rank(layout: str, rows: list[Row]) -> list[Report]:
    """Trains every row under one layout."""
    pieces = held(LAYOUTS[layout]())
    everyone: list[Pieces] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, pieces)
    dropped = set(DROPPED) if len(everyone) > ABSENT and LAYOUTS[layout].skips else set()
    absent = {name for name in dropped if np.array_equal(pieces[name], everyone[ABSENT][name])}
    courses = {dtype: Course(LAYOUTS[layout](), dtype) for dtype in dict.fromkeys(dtype for _, dtype, _ in rows)}
    return [train(courses[dtype], case, back, pieces, absent if case.partly else set()) for case, dtype, back in rows]


def held(layout: Layout) -> Pieces:
    params = layout.start(start_values(torch.float32))
    indices = {name: torch.arange(math.prod(shape)).reshape(shape) for name, shape in SHAPES.items()}
    return {name: layout.piece(name, p, indices[name]).numpy() for name, p in params.items()}


class Course:
    """A model for one row after the other: it is wrapped once, and its backward passes, which give the same each time,
    run once."""

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        self.layout, self._dtype = layout, dtype
        self.params = layout.start(start_values(dtype))
        self._every = list(dict.fromkeys(self.params.values()))
        self._start = [memory(p).clone() for p in self._every]
        self._given: dict[int, tuple[list[Tensor | None], list[Tensor], list[Tensor]]] = {}

    def begin(self) -> None:
        torch._foreach_copy_([memory(p) for p in self._every], self._start)
        for p in self._every:
            p.grad = None

    def give(self, step: int) -> None:
        """Sets ``grad`` of every parameter, as it was when it was made, whatever a step may have written there."""
        if step not in self._given:
            self.layout.give(self.params, gradients(step, self._dtype, self.layout.skips))
            grads = [p.grad for p in self._every]
            held = [memory(grad) for grad in grads if grad is not None]
            self._given[step] = grads, held, [each.clone() for each in held]
        grads, held, values = self._given[step]
        torch._foreach_copy_(held, values)
        for p, grad in zip(self._every, grads, strict=True):
            p.grad = grad


def train(course: Course, case: Case, backend: str, pieces: Pieces, absent: set[str]) -> Report:
    layout, params = course.layout, course.params
    course.begin()
    optimizer = case.build(params, backend=backend, **layout.options)
    differs = {0: 1.0, 1: -1.0}.get(dist.get_rank(), 0.0) if dist.get_world_size() > 1 else 0.0
    for step in range(LAST):
        course.give(step)
        case.advance(optimizer, step, differs)
    before = snapshot(case, layout, params, states_of(params, optimizer))
    course.give(LAST)
    for name in absent:
        params[name].grad = None
    case.advance(optimizer, LAST, differs)
    states, apart = states_of(params, optimizer), ("step", *case.vectors, *case.owned)
    misplaced = [
        f"state {k} of {name} is not laid out as its parameter"
        for name, p in params.items()
        for k, v in states[name].items()
        if k.split(".")[0] not in apart and not layout.alike(p, v)
    ]
    return Report(before, snapshot(case, layout, params, states), pieces, absent, misplaced)


# ------------------------------------------------------------------------------------------------------- in the parent


def faults(pool: Pool, layout: str, n: int, rows: list[Row]) -> list[str]:
    """Runs everything on n ranks; one line for each tensor on each rank that differs from the plain run."""
    everyone = pool.run(n, on_rank, layout, rows, timeout=300.0)
    found = []
    for (case, dtype, backend), *reports in zip(rows, *everyone, strict=True):
        skips = LAYOUTS[layout].skips
        before = reference(Key(case), dtype, skips, LAST)
        if case.partly and skips and n > ABSENT:
            pieces = reports[ABSENT].pieces
            after = last_step(Key(case), dtype, tuple((k, tuple(pieces[k].reshape(-1).tolist())) for k in DROPPED))
        else:
            after = reference(Key(case), dtype, skips, LAST + 1)
        limit = 0.0 if case.exact and backend != "compile" else RELATIVE_ERROR[dtype]
        for rank, report in enumerate(reports):
            lines = report.misplaced + compare(case, before, report.before, report, layout, limit)
            stale = {name: {"step": before[name]["step"]} for name in report.absent if "step" in before[name]}
            wanted = {name: tensors | stale.get(name, {}) for name, tensors in after.items()}
            lines += [f"after the last step, {x}" for x in compare(case, wanted, report.after, report, layout, limit)]
            header = f"{case.name} {dtype} {backend} under {layout} on {n} ranks, rank {rank}"
            found += [f"{header}: {line}" for line in lines]
    return found


def compare(case: Case, wanted: Snapshot, got: Snapshot, report: Report, layout: str, limit: float) -> list[str]:
    """What differs between the reference and one rank's pieces of it.

    The error of a parameter is max|got - wanted| / max|wanted - start|, relative to how far training moved it; that of
    a state is relative to the largest element of that state.
    """
    start, found = start_values(torch.float64), []
    entire = ("step", *case.vectors, *(("param",) if LAYOUTS[layout].whole_parameters else ()))
    for name, tensors in wanted.items():
        if not LAYOUTS[layout].empty_pieces and not report.pieces[name].size:
            continue
        shared = not LAYOUTS[layout].skips  # then there may be state that only other names use
        if tensors.keys() != (tensors.keys() & got[name].keys() if shared else got[name].keys()):
            found.append(f"{name} has {sorted(got[name])} instead of {sorted(tensors)}")
            continue
        for k, whole in tensors.items():
            expected = whole if k in entire else whole.reshape(-1)[report.pieces[name]]
            if expected.shape != got[name][k].shape:
                found.append(f"{name}.{k} has shape {got[name][k].shape} instead of {expected.shape}")
            elif not np.array_equal(expected, got[name][k]):
                scale = np.abs(whole - start[name].numpy() if k == "param" else whole).max()
                error = np.abs(got[name][k] - expected).max() / max(scale, 1e-30)
                if not error <= limit:
                    found.append(f"{name}.{k} is off by {error:.1e}, limit {limit:.0e}")
    return found


class Key:
    """A case as a key of the cache of references: layouts and backends share one."""

    def __init__(self, case: Case) -> None:
        self.case, self.text = case, repr((case.optimizer, case.options, case.second, case.loss))

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.text == other.text


class Alone:
    """One plain process, backend eager, which goes on as far as it is asked to."""

    def __init__(self, case: Case, dtype: torch.dtype, skips: bool) -> None:
        self._case, self._layout, self._dtype, self._skips = case, Plain(), dtype, skips
        self._params = self._layout.start(start_values(dtype))
        self._optimizer = case.build(self._params, backend="eager")
        self._taken: list[Snapshot] = []  # after each step

    def after(self, steps: int) -> Snapshot:
        for step in range(len(self._taken), steps):
            self._layout.give(self._params, gradients(step, self._dtype, self._skips))
            self._case.advance(self._optimizer, step)
            states = states_of(self._params, self._optimizer) if step >= LAST - 1 else {}
            self._taken.append(snapshot(self._case, self._layout, self._params, states) if states else {})
        return self._taken[steps - 1]


@functools.cache
def alone(key: Key, dtype: torch.dtype, skips: bool) -> Alone:
    return Alone(key.case, dtype, skips)


def reference(key: Key, dtype: torch.dtype, skips: bool, steps: int) -> Snapshot:
    """Where one process is after LAST or LAST + 1 steps."""
    return alone(key, dtype, skips).after(steps)


@functools.cache
def last_step(key: Key, dtype: torch.dtype, pieces: tuple[tuple[str, tuple[int, ...]], ...]) -> Snapshot:
    """The rule for missing gradients, spelt out: a plain step on tensors made of just the elements that take part.

    Args:
        key: the case.
        dtype: of the parameters.
        pieces: the elements that have no gradient.
    """
    case, missing, before = key.case, dict(pieces), reference(key, dtype, True, LAST)
    grads = gradients(LAST, dtype)
    after = {name: {k: v.copy() for k, v in tensors.items()} for name, tensors in before.items()}
    present = {name: np.setdiff1d(np.arange(v["param"].size), missing.get(name, ())) for name, v in before.items()}

    def part(name: str, values: np.ndarray) -> Tensor:
        everything = present[name].size == values.size  # a whole tensor keeps its shape
        return torch.from_numpy(values.copy() if everything else values.reshape(-1)[present[name]]).to(dtype)

    params = {name: torch.nn.Parameter(part(name, v["param"])) for name, v in before.items() if present[name].size}
    optimizer = case.build(params, backend="eager")
    for name, p in params.items():
        p.grad = part(name, local(grads[name]))
        state = {k: part(name, v) for k, v in before[name].items() if k not in ("param", "step")}
        optimizer.state[p] = state | {k: torch.tensor(v) for k, v in before[name].items() if k == "step"}
    case.advance(optimizer, LAST)
    for name, tensors in snapshot(case, Plain(), params, states_of(params, optimizer)).items():
        for k in tensors.keys() - {"step"}:
            after[name][k].reshape(-1)[present[name]] = tensors[k].reshape(-1)
    for tensors in after.values():
        if "step" in tensors:
            tensors["step"] = tensors["step"] + 1
    return after
