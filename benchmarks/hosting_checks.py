"""Whether steps on state in host memory are those on state beside the parameters, and what the copies take."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import oput_dist as oput
from oput_dist.engine.hosted import Home, Hosted
from oput_dist.engine.waves import WAVE

from .checks import Result, Setup

__all__ = ["bounded", "hosted_steps", "never_waits", "rate"]


def place(setup: Setup) -> Any:
    """What ``state_device`` is: on a CPU a home that serves it, so that all but the streams is the same."""
    return "cpu" if setup.device.type == "cuda" else Home("cpu")


@contextmanager
def waves_of(setup: Setup, elements: int) -> Iterator[None]:
    """Waves of so many elements."""
    kind = setup.device.type
    before, WAVE[kind] = WAVE[kind], elements
    try:
        yield
    finally:
        WAVE[kind] = before


def trained(name: str, setup: Setup, steps: int, shapes: list[tuple[int, ...]], **options: Any) -> Any:
    """Parameters, and the optimizer, whose copies may still be under way."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(s, generator=generator).to(setup.device, setup.dtype).requires_grad_() for s in shapes]
    optimizer = oput.create(name, params, backend=setup.backend, lr=1e-2, **options)
    drawn = [torch.randn(s, generator=generator).to(setup.device, setup.dtype) for s in shapes]
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = drawn[i] * (1 + step) if (step, i) != (1, 1) else None
        optimizer.step()
    return params, optimizer


def hosted_steps(name: str, setup: Setup, scale: int, steps: int, options: dict[str, Any]) -> Result:
    """Parameters and state after steps in waves that cut parameters, to the bit; nothing waits before they are read.

    A copy that came too late or too early would show, since each step works on what the last one left.
    """
    shapes = [(40 * scale, 130), (5000,), (64, 256 * scale), (100, 41), ()]
    with waves_of(setup, 2048 * scale):
        params, optimizer = trained(name, setup, steps, shapes, state_device=place(setup), **options)
        state = optimizer.state_dict()["state"]  # waits for the copies, and for nothing else
    plain, near = trained(name, setup, steps, shapes, **options)
    kept = [value for value in optimizer.state[params[0]].values() if isinstance(value, Hosted)]
    if not kept or any(_tensors(value)[0].device.type != "cpu" for value in kept):
        return Result(math.inf, "no state is on the host")
    if setup.device.type == "cuda" and not all(t.is_pinned() for value in kept for t in _tensors(value)):
        return Result(math.inf, "state is not in pinned memory")
    if not all(torch.equal(p, q) for p, q in zip(params, plain, strict=True)):
        return Result(math.inf, "parameters are not the same bits")
    other = near.state_dict()["state"]
    same = all(torch.equal(state[i][k].cpu(), other[i][k].cpu()) for i in other for k in other[i])
    return Result(0.0 if same else math.inf, "" if same else "state is not the same bits")


def _tensors(hosted: Hosted) -> list[torch.Tensor]:
    memory = hosted.memory
    return [memory] if isinstance(memory, torch.Tensor) else [memory.codes, memory.scales]


def never_waits(name: str, setup: Setup) -> Result:
    """A step with state on the host must not wait for the GPU either."""
    shapes = [(1024, 1024)] * 4
    _, optimizer = trained(name, setup, 2, shapes, state_device=place(setup))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return Result(math.inf, str(error).splitlines()[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Result(0.0)


def bounded(setup: Setup) -> Result:
    """Memory on the device during a step beyond parameters and gradients: two waves, and not the state."""
    elements, wave = 2**27, 2**22
    params, optimizer = trained("adamw", setup, 1, [(elements // 8, 8)], state_device=place(setup))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    told = oput.memory(optimizer)
    peak = torch.cuda.max_memory_allocated() - before + told.scratch
    right = told.host == 8 * elements and told.state == 4 * len(params)
    note = f"{peak / 2**20:.0f} MiB on the device, {told.host / 2**20:.0f} MiB on the host"
    return Result(peak / (2 * 8 * wave + 2**24) if right else math.inf, note)


def rate(setup: Setup) -> Result:
    """Bytes a second in each direction, beside those of one plain copy: both at once where copies overlap."""
    elements = 2**28
    _, optimizer = trained("adamw", setup, 2, [(elements // 64, 64)], state_device=place(setup))
    host = torch.empty(2**30, dtype=torch.uint8, device="cpu", pin_memory=True)
    here = torch.empty_like(host, device=setup.device)
    here.copy_(host, non_blocking=True)
    seconds = []
    for work in (lambda: here.copy_(host, non_blocking=True), optimizer.step):
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    alone, both = 2**30 / seconds[0], 8 * elements / seconds[1]
    # Copies one after the other reach half.
    return Result(0.6 * alone / both, f"{both / 1e9:.1f} GB/s in and out at once, a copy alone {alone / 1e9:.1f} GB/s")
