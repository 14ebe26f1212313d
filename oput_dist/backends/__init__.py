"""Backends: how a rule runs on local tensors. Knows nothing of ranks or optimizers."""

from __future__ import annotations

import functools
import os

import torch

from oput_dist.kernels.language import HAS_TRITON

from .batch import Backend, Batch, Row, Scalars, compute_dtype
from .torchlike import Compile, Eager, Foreach
from .triton import Triton

__all__ = ["BACKENDS", "Backend", "Batch", "Row", "Scalars", "backend", "check_backend", "choose", "compute_dtype"]

BACKENDS = ("triton", "compile", "foreach", "eager")

COMPILE_FROM = 2**22
"""Elements on a CPU from which the default is ``compile``: below, compiling takes longer than it can save."""


@functools.cache
def backend(name: str) -> Backend:
    """The backend of that name; one object per process, since it holds compiled programs."""
    kinds: dict[str, type[Backend]] = {"triton": Triton, "compile": Compile, "foreach": Foreach, "eager": Eager}
    return kinds[name]()


def interpreting() -> bool:
    """Whether Triton kernels are interpreted, and so run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_backend(name: str | None) -> None:
    """Raise if ``name`` is no backend, or one that cannot run here at all."""
    if name is None:
        return
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: must be None or one of {', '.join(map(repr, BACKENDS))}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("backend='triton': Triton is not installed; leave backend=None to have the best one chosen")


def choose(name: str | None, device: torch.device, numel: int) -> Backend:
    """The backend for tensors of ``numel`` elements together on ``device``; ``name`` decides unless it is None.

    By default: ``triton`` on CUDA and ROCm; on a CPU ``compile`` from :data:`COMPILE_FROM` elements on where there is a
    C++ compiler, else ``foreach``.
    """
    if name == "triton" and device.type == "cpu" and not interpreting():
        raise ValueError(
            "backend='triton' on CPU tensors: Triton launches on GPUs only (or set TRITON_INTERPRET=1 to test); "
            "use backend='compile', or None"
        )
    if name is not None:
        return backend(name)
    if device.type == "cuda":
        return backend("triton" if HAS_TRITON else "foreach")
    return backend("compile" if device.type == "cpu" and numel >= COMPILE_FROM and can_compile() else "foreach")


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile can build CPU code here: needs a C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError):
        return False
    return True
