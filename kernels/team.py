"""The threads that OpenMP keeps for the next loop of this thread, which wait for it busily for some milliseconds."""

from __future__ import annotations

import functools
from typing import Any

from .cpp import build

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


def let_go() -> None:
    """End them, so that other threads have the cores: the next loop starts new ones, in some 50 microseconds."""
    library = _library()
    if library is not None:
        library.let_go()


@functools.cache
def _library() -> Any:
    """None where it cannot be built."""
    try:
        return build(_SOURCE)
    except Exception:  # whatever torch's parts raise: they wait as they do
        return None
