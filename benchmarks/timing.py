"""Timing of optimizer steps: candidates take turns, round after round, so that noise falls on all of them alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .peers import Candidate

__all__ = ["CASES", "Case", "Timing", "copy_bandwidth", "measure", "median_ratio", "ratio", "take_turns"]


@dataclass(frozen=True)
class Case:
    """The tensors that are stepped."""

    name: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def __str__(self) -> str:
        return f"{self.name}: {len(self.shapes):,} tensors, {self.elements:,} elements"


def _gpt(layers: int, width: int, vocabulary: int) -> tuple[tuple[int, ...], ...]:
    """The parameters of a GPT."""
    layer = ((3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,))
    layer += ((width, 4 * width), (width,), *((width,),) * 4)
    return ((vocabulary, width), (1024, width), *layer * layers, (width,), (width,))


def even(name: str, elements: int, tensors: int) -> Case:
    """``elements`` in all, in equal tensors."""
    return Case(name, ((elements // tensors,),) * tensors)


CASES = {
    "large": even("large", 30_000_000, 1),
    "small": even("small", 1_000_000, 1_000),
    "medium": Case("medium", _gpt(9, 512, 3_000)),
    "model": Case("model", _gpt(12, 1024, 50_257)),
}


@dataclass
class Timing:
    """One candidate's times, seconds a step, by round."""

    candidate: Candidate
    seconds: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan


def ratio(a: Timing, b: Timing) -> float:
    """How many times as long ``a`` takes: the median over rounds, within which both ran back to back."""
    return median_ratio(a.seconds, b.seconds)


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median over rounds of the ratio of two times; NaN without any."""
    pairs = [x / y for x, y in zip(a, b, strict=False)]
    return statistics.median(pairs) if pairs else math.nan


def measure(
    wanted: Sequence[Candidate],
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    deadline: float = math.inf,
) -> list[Timing]:
    """Time them all in turn on the same parameters and gradients; state is each one's own.

    Stops after the round in which ``deadline`` (``time.monotonic``) passes. A candidate that fails is reported as such.
    """
    params = [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in case.shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 0.01
    timings = [Timing(candidate) for candidate in wanted]
    steps: list[Callable[[], Any] | None] = []
    for timing in timings:
        steps.append(_warm(timing, params, device) if time.monotonic() < deadline else None)
        if steps[-1] is None and not timing.error:
            timing.error = "no time left"
    live = [(timing, step) for timing, step in zip(timings, steps, strict=True) if step is not None]
    taken = take_turns([step for _, step in live], device, rounds, deadline)
    for (timing, _), seconds in zip(live, taken, strict=True):
        timing.seconds = seconds
    return timings


def take_turns(
    steps: Sequence[Callable[[], Any]], device: torch.device, rounds: int, deadline: float = math.inf
) -> list[list[float]]:
    """Seconds that each took in every round; they must have run before. ``deadline`` as for :func:`measure`."""
    repeat = [_repeats(step, device) for step in steps]
    seconds: list[list[float]] = [[] for _ in steps]
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            turn = number % max(len(steps), 1)  # start each round with another one
            for i in [*range(turn, len(steps)), *range(turn)]:
                seconds[i].append(_time(steps[i], repeat[i], device))
            if time.monotonic() > deadline:
                break
    finally:
        gc.enable()
    return seconds


def _warm(timing: Timing, params: Sequence[torch.Tensor], device: torch.device) -> Callable[[], Any] | None:
    try:
        step: Callable[[], Any] = timing.candidate.make(params).step
        for _ in range(3):
            step()
        synchronize(device)
    except Exception as error:  # whatever a library cannot do here is a line of the table
        lines = str(error).strip().splitlines()
        timing.error = f"{type(error).__name__}: {lines[0] if lines else ''}"
        return None
    return step


def _repeats(step: Callable[[], Any], device: torch.device) -> int:
    """Steps of one measurement: about 20 ms, for the clock, and so that the launch of the first is not all there is."""
    return max(1, min(20, round(0.02 / max(_time(step, 1, device), 1e-6))))


def _time(step: Callable[[], Any], times: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            step()
        return (time.perf_counter() - start) / times
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    for _ in range(times):
        step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes a second of a copy within memory, read and written: the roof for every step."""
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    times = [_time(lambda: target.copy_(source), 3, device) for _ in range(12)]
    return 2 * source.nbytes / min(times)
