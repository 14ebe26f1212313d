"""What the Triton compiler makes of every rule, for GPUs that need not be there: width of accesses, and spills."""

from __future__ import annotations

import functools
import multiprocessing
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from oput_dist.kernels.stage import Write

from .report import plain_table
from .variants import Program, programs

__all__ = ["DTYPES", "Product", "Row", "faults", "jobs", "product_faults", "product_table", "products", "report"]

DTYPES = {"sm_80": (torch.bfloat16,), "sm_90": (torch.float32,), "gfx942": (torch.float32, torch.bfloat16)}
"""In which every rule is compiled for a target. The two of NVIDIA differ in the last passes only, so each takes one
dtype; for AMD the check compares both."""
SHORT = {"sm_80": torch.bfloat16, "sm_90": torch.float16, "gfx942": torch.bfloat16}
"""In which programs are compiled that keep what rounding loses, or round at random."""
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


def jobs() -> list[Job]:
    """Every rule with its fullest prologue for every target, every other program once."""
    by_rule: dict[str, int] = {}
    known = programs()
    short = [i for i, program in enumerate(known) if program.prologue.write is not Write.NEAREST]
    for i, program in enumerate(known[: -len(short)]):
        if program.stage.rule.__name__ not in by_rule or program.scaled:
            by_rule[program.stage.rule.__name__] = i
    full = set(by_rule.values())
    rest = [(i, "sm_90", torch.bfloat16) for i in range(len(known)) if i not in full and i not in short]
    rest += [(i, target, dtype) for i in short for target, dtype in SHORT.items()]
    return [(i, target, dtype) for i in sorted(full) for target, dtypes in DTYPES.items() for dtype in dtypes] + rest


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
    )


def faults(rows: Sequence[Row]) -> list[str]:
    """What is not as it should be, a line each.

    On NVIDIA the counts must be exact: everything else in the kernel is narrower. AMD's compiler also reads pairs of
    hyperparameters 128 bits at a time, as many for every dtype: so fp32, with two accesses for bf16's one, must have
    just the loads of one more access for each tensor.
    """
    found = [f"{row}: spills registers" for row in rows if row.spills]
    found += [f"{row}: stores are not 128 bits wide" for row in rows if row.wide_stores != row.needed_stores]
    amd = {(r.program, r.dtype): r for r in rows if r.target.startswith("gfx")}
    for row in rows:
        if row.target.startswith("sm") and row.wide_loads != row.needed_loads:
            found.append(f"{row}: loads are not 128 bits wide")
    for (program, dtype), half in amd.items():
        if (
            dtype == "bfloat16"
            and (program, "float32") in amd
            and amd[program, "float32"].wide_loads - half.wide_loads != half.needed_loads
        ):
            found.append(f"{half} and {amd[program, 'float32']}: loads are not 128 bits wide")
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
        for target in DTYPES
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
