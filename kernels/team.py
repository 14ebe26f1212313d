"""The threads that OpenMP keeps for the next loop of this thread, which wait for it busily for some milliseconds."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

import torch

__all__ = ["let_go"]

_SOFT = 1
"""What OpenMP calls ``omp_pause_soft``: nothing but threads goes."""
_PROCESS = os.getpid()


def let_go() -> None:
    """End them, so that other threads have the cores: the next loop starts new ones, in some 50 microseconds.

    Nothing in a forked process: OpenMP would wait for its parent's threads there, for ever.
    """
    pause = _pause() if os.getpid() == _PROCESS else None
    if pause is not None:
        pause(_SOFT)


@functools.cache
def _pause() -> Callable[[int], int] | None:
    """That of the OpenMP that torch uses, and what is built here with it; None if it uses none."""
    try:
        return ctypes.CDLL(torch._C.__file__).omp_pause_resource_all
    except (OSError, AttributeError):
        return None
