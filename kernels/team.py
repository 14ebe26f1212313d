"""The threads of OpenMP that the loops of this thread use."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["let_go", "no_others", "use"]

_Asked = Callable[[int], int]

_SOFT = 1
"""What OpenMP calls ``omp_pause_soft``: nothing but threads goes."""
_PROCESS = os.getpid()


def let_go() -> None:
    """End those that wait for the next loop, which they do busily for some milliseconds, so that others have the cores:
    it starts new ones, in some 50 microseconds.

    Nothing in a forked process: OpenMP would wait for its parent's threads there, for ever.
    """
    pause = _torchs("omp_pause_resource_all") if os.getpid() == _PROCESS else None
    if pause is not None:
        pause(_SOFT)


@contextmanager
def no_others() -> Iterator[None]:
    """Within it this thread's loops use none but itself."""
    given = torch.get_num_threads()
    use(1)
    try:
        yield
    finally:
        use(given)


def use(number: int) -> None:
    """Set how many this thread's loops use, itself among them.

    ``torch.set_num_threads`` would also set the number of every thread that begins afterwards, as one that saves a
    checkpoint. It serves where torch's libraries do not say how to set this thread's alone.
    """
    loops, mkl = _torchs("omp_set_num_threads"), _torchs("MKL_Set_Num_Threads_Local")
    (loops or torch.set_num_threads)(number)
    if mkl is not None:
        mkl(number)


@functools.cache
def _torchs(name: str) -> _Asked | None:
    """A function of the OpenMP or MKL that torch uses, and what is built here with it; None if it uses none."""
    try:
        found: _Asked = getattr(ctypes.CDLL(torch._C.__file__), name)
    except (OSError, AttributeError):
        return None
    return found
