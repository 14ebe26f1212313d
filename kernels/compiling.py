"""Compile a kernel for a GPU that is not there: for tests, and to read what the compiler made of a rule."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .boxed import TILES, boxed_constexprs
from .boxed import boxed as boxes
from .codes import Format, decode_blocks, encode_blocks
from .codes import constexprs as code_constexprs
from .grouped import constexprs, grouped, num_warps
from .stage import Prologue, Stage
from .symmetric import constexprs as symmetric_constexprs
from .symmetric import launch_of, symmetric

__all__ = ["TARGETS", "Report", "compile_code", "compile_stage", "compile_symmetric"]

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Report:
    """What the compiler made of a stage: its wide accesses and its spills."""

    target: str
    wide_loads: int
    """128-bit global loads."""
    wide_stores: int
    spills: int
    """Bytes of stack (NVIDIA) or spilled vector registers (AMD)."""
    registers: int
    """Of a thread, of the 255 (NVIDIA) or 512 (AMD) that it may have before some are spilled."""
    assembly: str


def compile_stage(
    target: str,
    stage: Stage,
    prologue: Prologue,
    scalars: type,
    sums: int = 0,
    scaled: bool = False,
    p: torch.dtype = torch.float32,
    g: torch.dtype = torch.float32,
    state: tuple[torch.dtype, ...] = (),
    boxed: tuple[int, tuple[int, ...]] | None = None,
) -> Report:
    """Compile ``stage`` for a target of :data:`TARGETS`, without a GPU. Not under ``TRITON_INTERPRET=1``.

    With ``boxed``, the number of factors and how each term leaves a tile, in the boxed kernel, else in the grouped one.
    """
    from triton.compiler import ASTSource

    pointers = {"table": "*i64", "hyper": "*fp64", "tiles": "*i32", "scale": "*fp64"}
    if boxed is None:
        kernel, fixed = grouped, constexprs(stage, prologue, scalars, sums, scaled, p, g, state)
        pointers |= {"partial": "*fp64", "sums": "*fp64"}
    else:
        kernel = boxes
        fixed = boxed_constexprs(stage, prologue, scalars, *boxed, TILES[0], scaled, p, g, state)
    source = ASTSource(
        fn=kernel, signature={**pointers, **dict.fromkeys(fixed, "constexpr")}, constexprs=fixed, attrs={}
    )
    hip = TARGETS[target][0] == "hip"
    return _report(target, _compiled(source, target, {"num_warps": num_warps(hip)}))


def compile_symmetric(target: str, dtype: torch.dtype, transposed: bool) -> Report:
    """Compile the symmetric product that adds a matrix, as it is launched, for a target of :data:`TARGETS`.

    Sizes and strides are multiples of 16. ``transposed``: columns of ``x`` are contiguous, not rows.
    """
    from triton.compiler import ASTSource

    hip = TARGETS[target][0] == "hip"
    launch = launch_of(dtype, hip)
    # As a launch does it: strides of one are known, and what is a multiple of 16.
    fixed = {**symmetric_constexprs(dtype, True, launch), "x_row" if transposed else "x_column": 1, "add_column": 1}
    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    kinds = {"x": pointer, "add": pointer, "out": pointer, "alpha": "fp32", "beta": "fp32"}
    signature = {name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in symmetric.arg_names}
    sixteen = [i for i, kind in enumerate(signature.values()) if kind[0] == "*" or kind == "i32"]
    attrs = {(i,): [["tt.divisibility", 16]] for i in sixteen}
    source = ASTSource(fn=symmetric, signature=signature, constexprs=fixed, attrs=attrs)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return _report(target, _compiled(source, target, options))


def compile_code(target: str, code: Format, encode: bool) -> Report:
    """Compile what codes blocks, or what decodes them, for a target of :data:`TARGETS`."""
    from triton.compiler import ASTSource

    kernel, fixed = (encode_blocks if encode else decode_blocks), code_constexprs(code, encode)
    kinds = {"codes": "*u8", "scales": "*fp32", "values": "*fp32", "out": "*fp32", "count": "i32"}
    signature = {name: "constexpr" if name in fixed else kinds[name] for name in kernel.arg_names}
    pointers = [i for i, kind in enumerate(signature.values()) if kind[0] == "*"]
    attrs = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attrs)
    return _report(target, _compiled(source, target, {}))


def _compiled(source: Any, target: str, options: dict[str, Any]) -> Any:
    """Without the line numbers, which take a tenth of the time and change no instruction."""
    import triton
    from triton.backends.compiler import GPUTarget

    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


_WIDE_LOAD = re.compile(
    r"= load <(?:4 x (?:float|i32)|8 x (?:i16|half|bfloat)|16 x i8)>, ptr addrspace\(1\) [^,]*, align 16"
)


def _report(target: str, compiled: Any) -> Report:
    if "ptx" in compiled.asm:
        text = compiled.asm["ptx"]
        loads = len(re.findall(r"ld\.global\.(?:\w+\.)*v4\.b32", text))
        stores = len(re.findall(r"st\.global\.(?:\w+\.)*v4\.b32", text))
        return Report(target, loads, stores, *_usage(compiled.asm["cubin"]), text)
    text = compiled.asm["amdgcn"]
    # In LLVM's IR, since later pairs of hyperparameters too are joined to 128 bits; in the assembly at least as many.
    loads = min(len(_WIDE_LOAD.findall(compiled.asm["llir"])), len(re.findall(r"(?:global|buffer)_load_dwordx4", text)))
    stores = len(re.findall(r"(?:global|buffer)_store_dwordx4", text))
    spills = sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text))
    return Report(target, loads, stores, spills, int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0]), text)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Bytes of stack that a CUDA binary uses, where more than none means that registers were spilled; and registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    return int(stack), int(registers)
