"""A CPU's cores shared out among independent pieces of work."""

from __future__ import annotations

import functools
import heapq
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import accumulate, pairwise
from threading import Barrier, local
from typing import TypeVar

import torch

from oput_dist.kernels.team import let_go, no_others, use

__all__ = ["parts", "shared_out", "started", "threads"]

T = TypeVar("T")

_PART = 2**20
"""Elements of matrices that a core works on at a time, at most: of more the memory that is used meanwhile counts, and
with fewer what torch and Python do for each operation."""
_TURNS = 2
"""Of each core, about: if one is later than was estimated, others take what is left."""
_LEAST = 2**16
"""Elements of matrices that are worth being worked on by themselves."""
_own = local()
_UNEVEN = 1.1
"""How much longer than an even share the cores may take, before matrices are cut into more parts, or a piece gets all
threads instead of one."""


def shared_out(jobs: Sequence[Callable[[], T]], costs: Sequence[float]) -> list[T]:
    """The results of all jobs, each on a core of its own, the dearest first; what would leave others idle has them all.

    LAPACK makes little of several threads, and where other processes want the cores too, they wait for each other:
    seconds for what takes milliseconds. Products of small matrices and passes over them lose as much by starting
    threads each time. A job gets the same result on one core, whatever the others are.

    Args:
        jobs: that run torch operations on CPUs, and do not wait for each other. Gradients are not recorded in them.
        costs: of each, in any unit, estimated.
    """
    given = torch.get_num_threads()
    order = sorted(range(len(jobs)), key=lambda i: -costs[i])
    alone = 0 if given > 1 else len(jobs)
    while alone < len(jobs) and _uneven([costs[i] for i in order[alone:]], given):
        alone += 1
    found = {i: _run(jobs[i]) for i in order[:alone]}
    if rest := deque(order[alone:]):
        _together(lambda: _until_empty(rest, jobs, found), min(given, len(rest)), given)
    return [found[i] for i in range(len(jobs))]


def parts(costs: Sequence[Sequence[float]], elements: Sequence[int]) -> list[list[slice]]:
    """Which of some matrices are worked on at a time.

    As many as can be, as few times as leave no core idle: to call torch for a matrix may take longer than its work.

    Args:
        costs: of each matrix, in any unit, estimated; of those that are alike together.
        elements: of each matrix of those that are alike.
    """
    return _parts(tuple(map(tuple, costs)), tuple(elements), threads())


@functools.lru_cache(256)
def _parts(costs: Sequence[Sequence[float]], elements: Sequence[int], cores: int) -> list[list[slice]]:
    even = sum(map(sum, costs)) / cores
    most = [max(1, min(len(each), len(each) * size // _LEAST)) for each, size in zip(costs, elements, strict=True)]
    jobs = [_jobs(each, size, cores, even / _TURNS) for each, size in zip(costs, elements, strict=True)]
    jobs = [min(wanted, limit) for wanted, limit in zip(jobs, most, strict=True)]
    good = max([_UNEVEN * even, *map(max, costs)])
    best, least = jobs, _longest(costs, jobs, cores)
    for _ in range(cores):
        more = [i for i, number in enumerate(jobs) if number < most[i]]
        if least <= good or not more:
            break
        finer = [[*jobs[:i], jobs[i] + 1, *jobs[i + 1 :]] for i in more]
        jobs = min(finer, key=lambda other: _longest(costs, other, cores))
        if (longest := _longest(costs, jobs, cores)) < least:
            best, least = jobs, longest
    return [_cut(each, number) for each, number in zip(costs, best, strict=True)]


def _jobs(costs: Sequence[float], elements: int, cores: int, share: float) -> int:
    """How many times some matrices that are alike are worked on, if each takes about so long."""
    most = max(1, _PART // max(1, elements))
    turns = -(-len(costs) // (most * cores))
    return max(turns * cores if turns > 1 else -(-len(costs) // most), round(sum(costs) / share) if share else 1)


def _cut(costs: Sequence[float], jobs: int) -> list[slice]:
    """So many parts, that take about as long."""
    until = [0.0, *accumulate(costs)]
    edges = sorted({_nearest(until, until[-1] * job / jobs) for job in range(jobs)} | {len(costs)})
    return [slice(start, end) for start, end in pairwise(edges)]


def _longest(costs: Sequence[Sequence[float]], jobs: Sequence[int], cores: int) -> float:
    """How long it takes, with so many parts of those that are alike."""
    every = [sum(each[part]) for each, number in zip(costs, jobs, strict=True) for part in _cut(each, number)]
    return _time(sorted(every, reverse=True), cores)


def _nearest(rising: Sequence[float], wanted: float) -> int:
    """The place of the number that is nearest."""
    after = min(bisect_left(rising, wanted), len(rising) - 1)
    return after - (after > 0 and wanted - rising[after - 1] < rising[after] - wanted)


def threads() -> int:
    """Torch's number of threads; in a job, which has one, that of who shared it out."""
    given: int | None = getattr(_own, "given", None)
    return given or torch.get_num_threads()


def started(size: int) -> ThreadPoolExecutor:
    """Threads that stay, each on one core.

    A new thread would use all cores in its products: the number is each thread's own. It is also that of threads to
    come, as autograd's, and so must be set again by who has them started, who may be in a job.
    """
    here, given, all_of_them = torch.get_num_threads(), threads(), Barrier(size)
    pool = ThreadPoolExecutor(size, "oput-matrices", initializer=_begin, initargs=(given,))
    list(pool.map(lambda _: all_of_them.wait(), range(size)))
    torch.set_num_threads(given)
    use(here)
    return pool


@functools.lru_cache(1)
def _workers(given: int) -> ThreadPoolExecutor:
    """With the thread that shares out as many as torch has: anew, when that was changed. What is found beside the
    training has others, or a step would wait for it."""
    return started(given - 1)


os.register_at_fork(after_in_child=_workers.cache_clear)  # a child has none of its parent's threads


def _together(work: Callable[[], None], size: int, given: int) -> None:
    """What so many threads do at once, each on one core, this one among them.

    If it only waited, Linux might let two of the others run on one core for up to 70 ms: until this one sleeps there is
    none idle to wake the last of them on.
    """
    let_go()
    under_way = [_workers(given).submit(work) for _ in range(size - 1)]
    try:
        with no_others(), _given(given):
            work()
    finally:
        wait(under_way)  # all, also where one fails: they write to what is kept
    for one in under_way:
        one.result()


def _until_empty(queue: deque[int], jobs: Sequence[Callable[[], T]], found: dict[int, T]) -> None:
    while True:
        try:
            i = queue.popleft()
        except IndexError:  # others have the rest
            return
        found[i] = _run(jobs[i])


@contextmanager
def _given(number: int) -> Iterator[None]:
    """What :func:`threads` says in a job."""
    _own.given = number
    try:
        yield
    finally:
        del _own.given


def _begin(given: int) -> None:
    _own.given = given
    torch.get_num_threads()  # or the thread's first operation would set its number to that of all, as it then is
    torch.set_num_threads(1)


def _uneven(costs: Sequence[float], cores: int) -> bool:
    """Whether jobs, the dearest first, take much longer than if they could be divided."""
    return _time(costs, cores) > _UNEVEN * sum(costs) / cores


def _time(costs: Sequence[float], cores: int) -> float:
    """That of jobs, the dearest first, each on whichever core is free."""
    busy = [0.0] * cores
    for cost in costs:
        heapq.heapreplace(busy, busy[0] + cost)
    return max(busy)


def _run(job: Callable[[], T]) -> T:
    with torch.no_grad():  # which is a thread's own
        return job()
