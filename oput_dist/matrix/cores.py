"""A CPU's cores shared out among independent pieces of work."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["PART", "shared_out"]

T = TypeVar("T")

PART = 2**16
"""Elements of matrices that a core works on at a time, so that what is read and written over and over stays in its
caches: a step of Shampoo goes over its matrices some twenty times."""
_UNEVEN = 1.5
"""How much longer than an even share the cores may take, before a piece gets all threads instead of one."""


def shared_out(jobs: Sequence[Callable[[], T]], costs: Sequence[float]) -> list[T]:
    """The results of all jobs, each on a core of its own, the dearest first; what would leave others idle has them all.

    LAPACK makes little of several threads, and where other processes want the cores too, they wait for each other:
    seconds for what takes milliseconds. Products of small matrices and passes over them lose as much by starting
    threads each time. A job gets the same result on one core, whatever the others are.

    Args:
        jobs: that run torch operations on CPUs, and do not wait for each other. Gradients are not recorded in them.
        costs: of each, in any unit, estimated.
    """
    threads = torch.get_num_threads()
    order = sorted(range(len(jobs)), key=lambda i: -costs[i])
    alone = 0 if threads > 1 else len(jobs)
    while alone < len(jobs) and _uneven([costs[i] for i in order[alone:]], threads):
        alone += 1
    found = {i: _run(jobs[i]) for i in order[:alone]}
    if rest := order[alone:]:
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(min(threads, len(rest))) as pool:  # new threads take the number that was set
                found.update(zip(rest, pool.map(_run, [jobs[i] for i in rest]), strict=True))
        finally:
            torch.set_num_threads(threads)
    return [found[i] for i in range(len(jobs))]


def _uneven(costs: Sequence[float], threads: int) -> bool:
    """Whether jobs, the dearest first to whichever core is free, take much longer than if they could be divided."""
    busy = [0.0] * min(threads, len(costs))
    for cost in costs:
        heapq.heapreplace(busy, busy[0] + cost)
    return max(busy) > _UNEVEN * sum(costs) / threads


def _run(job: Callable[[], T]) -> T:
    with torch.no_grad():  # which is a thread's own
        return job()
