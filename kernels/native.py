"""Codes on a CPU: what becomes of blocks, in C++, for the blocks of many states in one call.

Compiled torch code of the same arithmetic takes two to four times as long.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from .codes import FORMATS, Format
from .cpp import OPENMP, PRELUDE, build
from .cpp_codes import codes_source, decoding, encoding, number_of, tables

__all__ = ["Job", "Native", "native"]

Job = tuple[Format, torch.Tensor, torch.Tensor, torch.Tensor]
"""A format; codes ``[blocks, width]``, scales ``[blocks]`` and numbers ``[blocks, block]``, dense, on the CPU."""

_JOBS = """
struct Job { int64_t format; uint8_t* codes; float* scales; float* numbers; int64_t blocks; };

// Every thread has the same part of each job, as loops over the numbers give them out, and goes through it from its
// end: what such a loop wrote last, and what it reads first, is then in this core's cache.
template <typename Work>
static void each_block(const Job* jobs, int64_t count, Work work) {
    constexpr int64_t SLICES = 64;
    int64_t total = 0;
    for (int64_t n = 0; n < count; ++n) total += jobs[n].blocks;
    #pragma omp parallel if (total > 64)
    {
        const int64_t parts = SLICES * omp_get_num_threads(), first = SLICES * omp_get_thread_num();
        for (int64_t part = first + SLICES - 1; part >= first; --part)
            for (int64_t n = 0; n < count; ++n)
                for (int64_t i = jobs[n].blocks * part / parts; i < jobs[n].blocks * (part + 1) / parts; ++i)
                    work(jobs[n], i);
    }
}
"""


def _source() -> str:
    def cases(call: str, code: Format) -> str:
        return f"        case {number_of(code)}: return {call};\n"

    def place(code: Format) -> tuple[str, str]:
        return f"job.codes + i * {code.width}", f"job.numbers + i * {code.block}"

    to_codes = "".join(
        cases(encoding(code, numbers, codes, "job.scales + i", "known"), code)
        for code in FORMATS
        for codes, numbers in [place(code)]
    )
    to_numbers = "".join(
        cases(decoding(code, codes, "job.scales[i]", numbers), code)
        for code in FORMATS
        for codes, numbers in [place(code)]
    )
    return f"""{PRELUDE}{OPENMP}{codes_source()}{_JOBS}
extern "C" void encode(const Job* jobs, int64_t count, int64_t known) {{
    each_block(jobs, count, [=](const Job& job, int64_t i) {{
        switch (job.format) {{
{to_codes}        }}
    }});
}}

extern "C" void decode(const Job* jobs, int64_t count, const float* tables, const uint8_t* bytes) {{
    each_block(jobs, count, [=](const Job& job, int64_t i) {{
        switch (job.format) {{
{to_numbers}        }}
    }});
}}
"""


class Native:
    """The two functions of the library."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def encode(self, jobs: Sequence[Job], known: bool) -> None:
        """Write codes, and scales unless these are known."""
        self._library.encode(_written(jobs), ctypes.c_int64(len(jobs)), ctypes.c_int64(known))

    def decode(self, jobs: Sequence[Job]) -> None:
        """Write numbers."""
        self._library.decode(_written(jobs), ctypes.c_int64(len(jobs)), *tables())


def _written(jobs: Sequence[Job]) -> Any:
    rows = [
        (number_of(code), codes.data_ptr(), scales.data_ptr(), numbers.data_ptr(), codes.shape[0])
        for code, codes, scales, numbers in jobs
    ]
    return (ctypes.c_int64 * (5 * len(rows)))(*chain.from_iterable(rows))


@functools.cache
def native() -> Native | None:
    """The library; None where it cannot be built: compiled torch operations remain."""
    try:
        return Native(build(_source()))
    except Exception:  # whatever torch's parts raise
        return None
