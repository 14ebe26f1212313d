"""State in few bits: blocks of numbers to codes and back, by torch operations, in C++, or by Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from oput_dist.kernels.codes import LEAST, PROGRAM, Format, constexprs, decode_blocks, encode_blocks
from oput_dist.kernels.language import as_torch, fresh_function
from oput_dist.kernels.native import Job, Native, native

from .batch import Backend
from .transfer import on

__all__ = ["Job", "decode", "encode"]

_CHUNK = 2**17
"""Elements at once in plain torch operations: bounds the temporaries."""


def decode(backend: Backend, jobs: Sequence[Job]) -> None:
    """Write blocks of numbers from their codes and scales.

    Args:
        backend: what runs it.
        jobs: each a format; codes, uint8, ``[blocks, code.width]``; scales, float32, ``[blocks]``; and the numbers,
            float32, ``[blocks, code.block]``. Dense, on one device.
    """
    jobs = [job for job in jobs if job[1].shape[0]]
    library = _library(backend, jobs)
    if library is not None:
        library.decode(jobs)
        return
    for some in _calls(backend, jobs):
        code, codes, scales, numbers = _joined(some)
        if backend.name == "triton":
            grid = (-(-len(codes) // PROGRAM),)
            with on(codes.device):
                decode_blocks[grid](codes, scales, numbers, len(codes), **constexprs(code, encode=False))
            continue
        body = _decoding(code, backend.name == "compile")
        for part in _parts(code, len(codes), backend):
            body(codes[part], scales[part], numbers[part])
        _give_back(some, 3, numbers)


def encode(backend: Backend, jobs: Sequence[Job], known: bool = False) -> None:
    """Write codes of blocks of numbers, and the scales, unless these are known: at least the largest magnitude.

    A block with a number that is not finite is NaN from then on. Arguments as of :func:`decode`.
    """
    jobs = [job for job in jobs if job[1].shape[0]]
    library = _library(backend, jobs)
    if library is not None:
        library.encode(jobs, known)
        return
    for some in _calls(backend, jobs):
        code, codes, scales, numbers = _joined(some)
        if backend.name == "triton":
            grid = (-(-len(codes) // PROGRAM),)
            with on(codes.device):
                encode_blocks[grid](numbers, codes, scales, len(codes), **constexprs(code, encode=True, known=known))
            continue
        body = _encoding(code, known, backend.name == "compile")
        for part in _parts(code, len(codes), backend):
            body(numbers[part], codes[part], scales[part])
        _give_back(some, 1, codes)
        _give_back(some, 2, scales)


def _library(backend: Backend, jobs: Sequence[Job]) -> Native | None:
    """C++ where backend ``compile`` is on a CPU, and it could be built."""
    here = backend.name == "compile" and bool(jobs) and jobs[0][1].device.type == "cpu"
    return native() if here else None


def _calls(backend: Backend, jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Which jobs to do in one call: in plain torch operations those of one format and few blocks, as each operation
    costs more than the arithmetic of a small tensor."""
    if backend.name in ("triton", "compile"):
        yield from ([job] for job in jobs)
        return
    by_format: dict[Format, list[Job]] = {}
    for job in jobs:
        by_format.setdefault(job[0], []).append(job)
    for code, every in by_format.items():
        most, together, count = _CHUNK // code.block, list[Job](), 0
        for job in every:
            if together and count + len(job[1]) > most:
                yield together
                together, count = [], 0
            together.append(job)
            count += len(job[1])
        yield together


def _joined(jobs: list[Job]) -> Job:
    """One job for all of some, in memory of its own unless it is one."""
    if len(jobs) == 1:
        return jobs[0]
    formats, codes, scales, numbers = zip(*jobs, strict=True)
    return formats[0], torch.cat(codes), torch.cat(scales), torch.cat(numbers)


def _give_back(jobs: list[Job], item: int, made: torch.Tensor) -> None:
    """Copy what was made for all of some jobs, an item of each, to where it belongs."""
    if len(jobs) > 1:
        pieces = torch.split(made, [len(job[1]) for job in jobs])
        torch._foreach_copy_([job[item] for job in jobs], list(pieces))  # type: ignore[misc]


def _parts(code: Format, count: int, backend: Backend) -> list[slice]:
    step = count if backend.name == "compile" else _CHUNK // code.block
    return [slice(start, start + step) for start in range(0, count, step)]


@functools.cache
def _decoding(code: Format, compiled: bool) -> Callable[..., None]:
    value = as_torch(code.decode)

    def body(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        scale, half = scales.unsqueeze(1), code.width
        if code.bits == 8:
            out.copy_(value(codes.to(torch.float32)) * scale)
        else:
            out[:, :half].copy_(value((codes & 15).to(torch.float32)) * scale)
            out[:, half:].copy_(value((codes >> 4).to(torch.float32)) * scale)

    return _made(body, compiled)


@functools.cache
def _encoding(code: Format, known: bool, compiled: bool) -> Callable[..., None]:
    to_code = as_torch(code.encode)

    def body(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        if known:
            scale = scales
        else:
            scale = values.abs().amax(1)  # NaN stays
            scale = torch.where(scale < LEAST, 0.0, torch.where(scale < torch.inf, scale, torch.inf))
            scales.copy_(scale)
        inverse = torch.where(scale > 0, 1.0 / torch.where(scale > 0, scale, 1.0), 0.0).unsqueeze(1)
        if code.bits == 8:
            codes.copy_(to_code(values * inverse).to(torch.uint8))
        else:
            low, high = values[:, : code.width], values[:, code.width :]
            codes.copy_(to_code(low * inverse).to(torch.uint8) | (to_code(high * inverse).to(torch.uint8) << 4))

    return _made(body, compiled)


def _made(body: Callable[..., None], compiled: bool) -> Callable[..., None]:
    own = fresh_function(body)  # type: ignore[arg-type]
    return torch.compile(own, dynamic=True, fullgraph=True) if compiled else own
