"""Backends: how a rule runs on local tensors. Knows nothing of ranks or optimizers."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence

import torch

from oput_dist.kernels.cpp import build
from oput_dist.kernels.language import HAS_TRITON

from .batch import Backend, Batch, Codes, Row, Scalars, Stack, compute_dtype
from .carrier import Carrier, Move, Space, to_host, zeros_on_host
from .coding import Job, decode, encode
from .packing import PACK, SMALL
from .torchlike import Compile, Eager, Foreach
from .transfer import send
from .triton import Triton

__all__ = [
    "BACKENDS",
    "PACK",
    "SMALL",
    "Backend",
    "Batch",
    "Carrier",
    "Codes",
    "Job",
    "Move",
    "Row",
    "Scalars",
    "Space",
    "Stack",
    "backend",
    "check_backend",
    "choose",
    "compute_dtype",
    "decode",
    "encode",
    "send",
    "to_host",
    "zeros_on_host",
]

BACKENDS = ("triton", "compile", "foreach", "eager")
"""All backends, the fastest first."""

COMPILE_FROM = 10**6
"""Elements on a CPU from which the default is ``compile``: below, building takes longer than it can save."""


@functools.cache
def backend(name: str) -> Backend:
    """The backend of that name; one object per process, since it holds compiled programs."""
    kinds: dict[str, type[Backend]] = {"triton": Triton, "compile": Compile, "foreach": Foreach, "eager": Eager}
    return kinds[name]()


def interpreting() -> bool:
    """Whether Triton kernels are interpreted, and so run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_backend(name: str) -> None:
    """Raise if ``name`` is no backend, or one that cannot run here at all."""
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: must be None or one of {', '.join(map(repr, BACKENDS))}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("backend='triton': Triton is not installed; leave backend=None to have the best one chosen")


def choose(allowed: Sequence[str], device: torch.device, numel: int) -> Backend:
    """The fastest of the allowed backends for parameters of ``numel`` elements together on ``device``.

    They are counted whole, so that no sharding chooses otherwise than one process: roots differ by a unit in the last
    place between ``foreach`` and ``compile``.

    ``triton`` on CUDA and ROCm; on a CPU ``compile`` from :data:`COMPILE_FROM` elements on where there is a C++
    compiler, else ``foreach``. A single allowed backend is taken whatever the size.

    Raises:
        ValueError: if only ``triton`` is allowed and the tensors are on a CPU.
    """
    gpu = device.type == "cuda"
    if list(allowed) == ["triton"] and not gpu and not interpreting():
        raise ValueError(
            f"backend='triton' on {device.type} tensors: Triton launches on GPUs only (TRITON_INTERPRET=1 tests its "
            "kernels on a CPU); use backend='compile', or None"
        )
    if len(allowed) == 1:
        return backend(allowed[0])
    usable = {
        "triton": gpu and HAS_TRITON,
        "compile": device.type == "cpu" and numel >= COMPILE_FROM and can_compile(),
        "foreach": True,
        "eager": True,
    }
    return backend(next(name for name in BACKENDS if name in allowed and usable[name]))


@functools.cache
def can_compile() -> bool:
    """Whether CPU code can be built here, by trying: it needs a C++ compiler that works."""
    try:
        build('extern "C" int one() { return 1; }')
    except Exception as error:  # whatever torch's parts raise, the other backends remain
        warnings.warn(
            f"no C++ can be built on this machine, so backend='foreach' is used on the CPU: {error}", stacklevel=2
        )
        return False
    return True
