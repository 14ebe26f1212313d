"""The threads that OpenMP keeps for the next loop of this thread, which wait for it busily for some milliseconds."""

from __future__ import annotations

import os

from .cpp import built

__all__ = ["let_go"]

_SOURCE = """
#ifdef _OPENMP
#include <omp.h>
#endif
extern "C" void let_go() {
#ifdef _OPENMP
    omp_pause_resource_all(omp_pause_soft);
#endif
}
"""
_PROCESS = os.getpid()


def let_go() -> None:
    """End them, so that other threads have the cores: the next loop starts new ones, in some 50 microseconds.

    Nothing in a forked process: OpenMP would wait for its parent's threads there, for ever. Nor without a compiler.
    """
    library = built(_SOURCE) if os.getpid() == _PROCESS else None
    if library is not None:
        library.let_go()
