"""What the Triton compiler makes of every rule, for GPUs that need not be there: width of accesses, and spills."""

from __future__ import annotations

import functools
import multiprocessing
import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from oput_dist.kernels.stage import Write

from .report import plain_table
from .variants import Program, programs

__all__ = ["Product", "Row", "faults", "jobs", "product_faults", "product_table", "products", "report"]

TARGETS = ("sm_80", "sm_90", "gfx942")
ROUND = list(zip(TARGETS * 2, (torch.bfloat16, torch.float32) * 3, strict=True))
"""Each target in each dtype, so that any three in a row are all targets and both dtypes."""
SHORT = [("sm_80", torch.bfloat16), ("sm_90", torch.float16), ("gfx942", torch.bfloat16)]
"""For what programs are compiled that keep what rounding loses, or round at random."""
ROOM = 160
"""Registers that a thread may take of at least 255: with so many to spare, no other prologue or dtype spills any."""
Job = tuple[int, str, torch.dtype]
"""Index in ``programs()``, target, dtype of all tensors."""


@dataclass(frozen=True)
class Row:
    """One compiled program. Needed are the 128-bit accesses that its tensors take in the path for full tiles."""

    program: str
    target: str
    dtype: str
    wide_loads: int
    needed_loads: int
    wide_stores: int
    needed_stores: int
    spills: int
    registers: int


def jobs() -> list[Job]:
    """Every rule for every target and in both dtypes, every program once; every way to write for every target.

    The programs of a rule, which differ in what is done before it and after it, take turns, and so do the rules: each
    target sees each prologue, with other rules. What they share, the accesses and nearly all registers, is the rule's.
    """
    known = programs()
    rules, ways = defaultdict(list), defaultdict(list)
    for i, program in enumerate(known):
        if program.prologue.write is Write.NEAREST:
            rules[program.stage.rule.__name__].append(i)
        else:
            ways[program.prologue.write].append(i)
    found = [job for start, group in enumerate(rules.values()) for job in _turns(group, ROUND, start)]
    return found + [job for group in ways.values() for job in _turns(group, SHORT)]


def _turns(group: Sequence[int], targets: Sequence[tuple[str, torch.dtype]], start: int = 0) -> list[Job]:
    """Each of the group once, again if there are fewer than targets (of GPUs), the last and fullest first."""
    order = [group[-1 - turn % len(group)] for turn in range(max(len(group), len(TARGETS)))]
    return [(i, *targets[(start + turn) % len(targets)]) for turn, i in enumerate(order)]


def report(work: Sequence[Job], processes: int = 2) -> list[Row]:
    """Compile in processes of their own, since Triton must not be interpreting there."""
    # By index, because rules cannot be pickled.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("forkserver")) as pool:
        return list(pool.map(_compile, work, chunksize=4))


@functools.cache
def _programs() -> list[Program]:
    """To list them costs a fifth of compiling one."""
    return programs()


def _compile(job: Job) -> Row:
    from oput_dist.kernels.compiling import compile_stage

    number, target, dtype = job
    program = _programs()[number]
    made = compile_stage(
        target,
        program.stage,
        program.prologue,
        program.scalars,
        program.sums,
        program.scaled,
        dtype,
        dtype,
        program.dtypes(dtype),
        program.boxed,
    )
    each = dtype.itemsize * 8 // 16  # a thread has eight elements of each tensor
    reads, writes = program.traffic()
    return Row(
        program.name,
        target,
        str(dtype).removeprefix("torch."),
        made.wide_loads,
        reads * each,
        made.wide_stores,
        writes * each,
        made.spills,
        made.registers,
    )


def faults(rows: Sequence[Row]) -> list[str]:
    """What is not as it should be, a line each.

    The counts must be exact: everything else in the kernel is narrower.
    """
    found = [f"{row}: spills registers" for row in rows if row.spills]
    found += [f"{row}: close to spilling registers" for row in rows if row.registers > ROOM]
    found += [f"{row}: stores are not 128 bits wide" for row in rows if row.wide_stores != row.needed_stores]
    found += [f"{row}: loads are not 128 bits wide" for row in rows if row.wide_loads != row.needed_loads]
    return found


@dataclass(frozen=True)
class Product:
    """A compiled symmetric product."""

    target: str
    dtype: str
    layout: str
    tensor_cores: int
    """Instructions that multiply matrices."""
    wide_loads: int
    """128-bit accesses that read global memory, also into shared memory."""
    spills: int


_MULTIPLY = re.compile(r"mma\.sync\.aligned|wgmma\.mma_async\.sync|v_mfma_f32")
_TO_SHARED = re.compile(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10")


def products(processes: int = 2) -> list[Product]:
    """The symmetric product of every dtype for every target, of either order in memory."""
    work = [
        (target, dtype, transposed)
        for target in TARGETS
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for transposed in (False, True)
    ]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("forkserver")) as pool:
        return list(pool.map(_compile_product, work))


def _compile_product(job: tuple[str, torch.dtype, bool]) -> Product:
    from oput_dist.kernels.compiling import compile_symmetric

    target, dtype, transposed = job
    made = compile_symmetric(*job)
    layout = "transposed" if transposed else "plain"
    wide = made.wide_loads + len(_TO_SHARED.findall(made.assembly))
    cores = len(_MULTIPLY.findall(made.assembly))
    return Product(target, str(dtype).removeprefix("torch."), layout, cores, wide, made.spills)


def product_table(rows: Sequence[Product]) -> str:
    cells = [(r.target, r.dtype, r.layout, str(r.tensor_cores), str(r.wide_loads), str(r.spills)) for r in rows]
    return plain_table(("target", "dtype", "matrix", "tensor cores", "128-bit loads", "spills"), cells)


def product_faults(rows: Sequence[Product]) -> list[str]:
    """What is not as it should be, a line each: 16-bit products without tensor cores, narrow accesses, spills.

    fp32 has tensor cores on AMD only: on NVIDIA they would cut it to TF32.
    """
    found = [f"{row}: spills registers" for row in rows if row.spills]
    found += [f"{row}: reads narrowly" for row in rows if not row.wide_loads]
    for row in rows:
        wanted = row.dtype != "float32" or row.target.startswith("gfx")
        if wanted != bool(row.tensor_cores):
            found.append(f"{row}: {'no ' if wanted else ''}tensor cores")
    return found
