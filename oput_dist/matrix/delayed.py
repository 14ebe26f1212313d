"""Roots and bases that are found while steps go on with the old ones, and taken over at a step that is set beforehand.

What they are found from is kept as state until then. So what a step does depends on no timing, state is never in the
midst of a change, and a copy or a run that goes on from a checkpoint finds the same again when it is due.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .cores import started, threads
from .work import Held

__all__ = ["WAITING", "Axes", "clear", "put_off", "taken_up", "waiting"]

T = TypeVar("T")
Axes = Mapping[int, Sequence[int]]
"""For some axes places in a stack of matrices."""

WAITING = "waiting"
"""With the number of an axis: the statistics that a root or basis is being found from, ``[d, d]``; else zeros."""


@dataclass(frozen=True)
class _Begun:
    """What a thread is at work on."""

    axes: dict[int, list[int]]
    found: Future[Any]


def put_off(held: Held, step: int, axes: Axes, given: Sequence[torch.Tensor], find: Callable[[], T]) -> None:
    """Keep what is ``given`` for each axis, and begin to ``find``. What that reads must not change until it is due."""
    for (axis, places), one in zip(axes.items(), given, strict=True):
        held[f"{WAITING}_{axis}"][list(places)] = one
    found = _background(given[0].device, find)
    held.begun[step] = _Begun({axis: list(places) for axis, places in axes.items()}, found)


def waiting(held: Held, axes: Axes) -> dict[int, list[int]]:
    """Of some places those at which something was put off."""
    found = {}
    for axis, places in axes.items():
        if places:
            there = held[f"{WAITING}_{axis}"][list(places)].diagonal(dim1=1, dim2=2).ne(0).any(1).tolist()
            found[axis] = [place for place, known in zip(places, there, strict=True) if known]
    return {axis: places for axis, places in found.items() if places}


def taken_up(held: Held, step: int, axes: Axes, find: Callable[[list[torch.Tensor]], T]) -> T:
    """What was put off at a step: from the thread, or found now, from what was kept."""
    begun = held.begun.pop(step, None)
    if isinstance(begun, _Begun) and begun.axes == {axis: list(places) for axis, places in axes.items()}:
        found: T = begun.found.result()
        _used_here(found)
        return found
    return find([held[f"{WAITING}_{axis}"][list(places)] for axis, places in axes.items()])


def clear(held: Held, axes: Axes) -> None:
    """Nothing is put off at these places any more."""
    for axis, places in axes.items():
        held[f"{WAITING}_{axis}"][list(places)] = 0


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return started(threads())


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def _background(device: torch.device, find: Callable[[], T]) -> Future[T]:
    stream = ready = None
    if device.type == "cuda":
        stream, ready = _stream(device), torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(device))
    return _pool().submit(_found, find, stream, ready)


def _found(find: Callable[[], T], stream: torch.cuda.Stream | None, ready: torch.cuda.Event | None) -> T:
    with torch.no_grad():
        if stream is None or ready is None:
            return find()
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            found = find()
            stream.synchronize()  # by this thread: whoever takes it up waits for nothing on the device
            return found


def _used_here(found: Any) -> None:
    """What was made on the other stream must outlive its use on this one."""
    if isinstance(found, torch.Tensor):
        if found.device.type == "cuda":
            found.record_stream(torch.cuda.current_stream(found.device))
    elif found is not None:
        for one in found:
            _used_here(one)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
