"""Whether the kernels compute what the rules say, on whatever device they run: a GPU, or a CPU that interprets them.

Each check returns a :class:`Result` whose ``error`` is in units of what is allowed: up to 1 is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from oput_dist.backends import Batch, Scalars, Stack, backend, compute_dtype
from oput_dist.kernels.grouped import BLOCK, grouped, segmented_sum
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.stage import WHOLE, Measure, Prologue, Stored

from .variants import GRADIENT_NORM, LR, ROOTED, Variant

__all__ = [
    "LOSS",
    "Result",
    "Setup",
    "accuracy",
    "exact_sums",
    "kept",
    "kept_sums",
    "many_tensors",
    "repeatable",
    "same_as_eager",
    "segments",
    "tensor_lr",
]

SHAPES: list[tuple[int, ...]] = [(1,), (1023,), (1024,), (1025,), (5000,), (2, 1024), (33, 31), ()]
INTERPRETED: list[tuple[int, ...]] = [(1,), (33, 31), (1024,), (1025,), (3, 300), ()]
"""Where a tile takes milliseconds: each border once, full tiles aligned and not, boxes of several tiles either way."""
BOXES: list[tuple[int, ...]] = [
    *((7, 5), (64, 256), (33, 130), (8, 128), (300, 16), (5, 1), (1, 9)),
    *((4, 3, 2, 2), (3, 40, 48)),
]
ABSENT = {0: 2, 1: 3}
"""The parameter without a gradient at each step: at the second one is new where the others have state, and another
keeps its state. So step counts differ in one launch."""


@dataclass(frozen=True)
class Result:
    """The outcome of one check."""

    error: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= 1  # not for NaN


@dataclass(frozen=True)
class Setup:
    """Where and in which precision."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | None = None
    backend: str = "triton"

    @property
    def name(self) -> str:
        state = "" if self.state_dtype is None else f", state {str(self.state_dtype)[6:]}"
        return f"{self.backend} {str(self.dtype)[6:]}{state}"


def shapes_for(setup: Setup) -> list[tuple[int, ...]]:
    """All odd shapes, and on a GPU so many tensors that a launch has several of each."""
    return [*SHAPES, *SHAPES[:1], *SHAPES] if setup.device.type == "cuda" else INTERPRETED


def steps_for(setup: Setup) -> range:
    """Each is compared from the same values: the second has state, and a third one only more of it."""
    return range(3 if setup.device.type == "cuda" else 2)


def tensors(setup: Setup, shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[torch.Tensor]:
    """Parameters, by turns 16-byte aligned and starting at the second element of their storage."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, shape in enumerate(shapes):
        offset = i % 2
        storage = torch.randn(math.prod(shape) + offset, generator=generator).to(setup.device, setup.dtype)
        made.append(storage[offset:].view(shape).requires_grad_())
    return made


def give_gradients(params: Sequence[torch.Tensor], step: int, absent: int | None = None) -> None:
    """Gradients of any sign with magnitudes in [1, 2), and three times that at each further step; every third one is
    not aligned.

    Averages of them, whose sign is a step, are then never so near zero that rounding could change it.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        offset = int(i % 3 == 2)
        drawn = 3**step * (1 + torch.rand(p.numel() + offset, generator=generator))
        drawn *= torch.randint(0, 2, drawn.shape, generator=generator) * 2 - 1
        p.grad = None if i == absent else drawn.to(p.device, p.dtype)[offset:].view(p.shape)


def groups(params: Sequence[torch.Tensor], lr: float) -> list[dict[str, Any]]:
    """Two groups with learning rates of their own."""
    half = len(params) // 2
    return [{"params": list(params[:half])}, {"params": list(params[half:]), "lr": lr / 2}]


Snapshot = list[dict[str, torch.Tensor]]


def whole(tensor: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A plain copy on the CPU."""
    plain = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return plain.detach().to("cpu", dtype, copy=True)


def snapshot(optimizer: torch.optim.Optimizer, params: Sequence[torch.Tensor]) -> Snapshot:
    """Parameters and state, float64 on the CPU."""
    return [{k: whole(v) for k, v in {"p": p, **optimizer.state[p]}.items()} for p in params]


Kept = list[dict[str, Any]]
LOSS = 1.0  # of every step, for optimizers that need it


def kept(optimizer: torch.optim.Optimizer) -> Kept:
    """What the parameter groups keep from step to step: scalars, and all else but parameters and learning rate."""
    left_out = ("params", "lr", "param_names")
    return [
        {k: whole(v) if isinstance(v, torch.Tensor) else v for k, v in group.items() if k not in left_out}
        for group in optimizer.param_groups
    ]


def reference_step(
    variant: Variant,
    before: Snapshot,
    held: Kept,
    params: Sequence[torch.Tensor],
    lr: float,
    dtype: torch.dtype = torch.float64,
) -> Snapshot:
    """One step from a snapshot, on the CPU, backend eager."""
    copies = [values["p"].to(dtype, copy=True).requires_grad_() for values in before]
    optimizer = variant.build(groups(copies, lr), backend="eager", lr=lr)
    for group, values in zip(optimizer.param_groups, held, strict=True):
        group.update({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()})
    for p, copy, values in zip(params, copies, before, strict=True):
        copy.grad = None if p.grad is None else whole(p.grad, dtype)
        state = {k: v.to(torch.float32 if k == "step" else dtype, copy=True) for k, v in values.items() if k != "p"}
        if state:
            optimizer.state[copy] = state
    optimizer.run(None, LOSS)
    return snapshot(optimizer, copies)


def allowance(setup: Setup, variant: Variant, key: str) -> tuple[float, float]:
    """What may be off: a share of the element's own size, and a share of the tensor's largest change.

    The first is the rounding of the store; the second the arithmetic, with GPUs' approximate roots and quotients. A
    second stage reads the state as it was stored, so there the rounding of a 16-bit state is an error of the update.
    """
    dtype = setup.dtype if key == "p" else setup.state_dtype or setup.dtype
    eps = torch.finfo(dtype).eps
    if setup.dtype == torch.float64:
        return 4 * eps, (640 if variant.joint else 64) * eps
    truncated = dtype == torch.bfloat16 and setup.device.type == "cpu" and setup.backend == "triton"  # interpreted
    own = (2 if dtype == torch.float32 else 1 if truncated else 0.501) * eps
    two_stages = variant.exchanges
    stored = torch.finfo(setup.state_dtype or setup.dtype).eps
    if variant.joint and stored < 1e-6:  # the step size is a quotient of differences of sums
        return own, 4e-5
    return own, 4e-6 if key != "p" or not two_stages or stored < 1e-6 else 2 * stored


def worst(setup: Setup, variant: Variant, before: Snapshot, got: Snapshot, wanted: Snapshot) -> float:
    """The largest error of any element of any tensor, in units of its allowance."""
    errors = [0.0]
    for old, new, right in zip(before, got, wanted, strict=True):
        if new.keys() != right.keys():
            return math.inf
        for key, value in right.items():
            if key == "step":
                errors.append(0.0 if torch.equal(new[key], value) else math.inf)
                continue
            start = old.get(key, torch.zeros_like(value))
            own, change = allowance(setup, variant, key)
            dtype = setup.dtype if key == "p" else setup.state_dtype or setup.dtype
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            allowed = own * torch.maximum(value.abs(), start.abs()) + change * (value - start).abs().max() + smallest
            error = ((new[key] - value).abs() / allowed).max().item()
            errors.append(error if error == error else math.inf)
    return max(errors)


def follow(
    variant: Variant,
    setup: Setup,
    shapes: Sequence[tuple[int, ...]] = (),
    lr: float = LR,
    tensor_on: torch.device | None = None,
) -> Result:
    """Some steps, each compared with the reference's step from the same values. ``tensor_on``: lr is a tensor there."""
    params = tensors(setup, shapes or shapes_for(setup))
    given: Any = lr if tensor_on is None else torch.tensor(lr, device=tensor_on)
    plain: dict[str, Any] = {"kahan_sum": False}  # what that adds is another check, rounding_checks.compensated
    optimizer = variant.build(
        groups(params, lr), backend=setup.backend, state_dtype=setup.state_dtype, lr=given, **plain
    )
    error = 0.0
    for step in steps_for(setup):
        give_gradients(params, step, ABSENT.get(step))
        before = snapshot(optimizer, params)
        wanted = reference_step(variant, before, kept(optimizer), params, float(given))
        optimizer.run(None, LOSS)
        error = max(error, worst(setup, variant, before, snapshot(optimizer, params), wanted))
    return Result(error)


def same_as_eager(variant: Variant, setup: Setup) -> Result:
    """What backend eager gives in the same dtype; true where nothing is fused, so of interpreted kernels.

    Without sums the state must be bitwise equal; parameters, and the state of ``ROOTED``, but for the roots, which
    torch takes to one unit in the last place only. With sums both must be as near as the fp64 result.
    """
    params = tensors(setup, shapes_for(setup))
    optimizer = variant.build(groups(params, LR), backend=setup.backend)
    eps = torch.finfo(setup.dtype).eps
    error = 0.0
    for step in steps_for(setup):
        give_gradients(params, step, ABSENT.get(step))
        before = snapshot(optimizer, params)
        wanted = reference_step(variant, before, kept(optimizer), params, LR, setup.dtype)
        optimizer.run(None, LOSS)
        got = snapshot(optimizer, params)
        if variant.measures:
            error = max(error, worst(setup, variant, before, got, wanted))
            continue
        for old, new, right in zip(before, got, wanted, strict=True):
            rooted = {"p", *ROOTED.get(variant.optimizer, ())}
            if not all(torch.equal(new[k], right[k]) for k in {*new, *right} - rooted):
                return Result(math.inf, f"state differs after step {step}")
            for key in rooted & right.keys():
                change = right[key] - old[key] if key == "p" else right[key]  # an average may be new for the most part
                roots = eps * (right[key].abs() + 3 * change.abs().max() + eps)
                off = ((new[key] - right[key]).abs() / roots).max().item()
                error = max(error, off if off == off else math.inf)
    return Result(error)


def accuracy(variant: Variant, setup: Setup) -> Result:
    """All odd shapes, alignments, two groups, unequal step counts."""
    return follow(variant, setup)


def tensor_lr(variant: Variant, setup: Setup, on: torch.device) -> Result:
    """A learning rate that is a tensor, on the CPU or on the device."""
    return follow(variant, setup, tensor_on=on)


def many_tensors(variant: Variant, setup: Setup, count: int) -> Result:
    """Thousands of small tensors in one launch for each stage."""
    shapes = [(1 + i % 97,) for i in range(count)]
    result = follow(variant, setup, shapes)
    params = tensors(setup, shapes)
    optimizer = variant.build(groups(params, LR), backend=setup.backend)
    give_gradients(params, 0)
    launches = 0

    def count(*_: Any, **__: Any) -> None:
        nonlocal launches
        launches += 1

    grouped.add_pre_run_hook(count)
    try:
        optimizer.step()
    finally:
        grouped.pre_run_hooks.remove(count)
    right = launches == len(list(variant.programs((1,))))
    return Result(result.error if right else math.inf, f"{len(params)} tensors in {launches} launches")


def repeatable(variant: Variant, setup: Setup, elements: int, times: int) -> Result:
    """The same steps from the same values again and again, bitwise equal: no atomics, no order left to chance."""
    shapes = [(elements,), (1025,), (1,)]
    first: Snapshot = []
    for _ in range(times):
        params = tensors(setup, shapes)
        optimizer = variant.build(groups(params, LR), backend=setup.backend)
        for step in range(2):
            give_gradients(params, step)
            optimizer.step()
        held = snapshot(optimizer, params)
        first = first or held
        if not all(torch.equal(a[k], b[k]) for a, b in zip(first, held, strict=True) for k in a):
            return Result(math.inf, "two runs differ")
    return Result(0.0, f"{times} runs of {elements:,} elements")


def exact_sums(setup: Setup, elements: int) -> Result:
    """Sums of squares of small integers are exact in fp32, so nothing less than equality is right."""
    sizes = [1, BLOCK - 1, BLOCK, BLOCK + 1, elements, 7]
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randint(-3, 4, (n,), generator=generator) for n in sizes]
    held = [w.to(setup.device, setup.dtype) for w in whole]
    scalars = Scalars(GRADIENT_NORM.scalars, [(0.0, 2.0)], [0] * len(held), setup.device)
    batch = Batch(held, held, [()] * len(held), scalars, GRADIENT_NORM.prologue)
    sums = backend(setup.backend).run(GRADIENT_NORM.stage, batch, None)
    assert sums is not None
    wanted = torch.tensor([[float((w * w).sum())] for w in whole], dtype=torch.float64)
    return Result(0.0 if torch.equal(sums.cpu(), wanted) else math.inf, f"up to {-(-elements // BLOCK):,} tiles")


@rule
def box_terms(p, g, state, h, c):
    scaled = g * c[0]
    return state, (scaled, scaled * p, g, tl.abs(g), tl.abs(g))


def kept_sums(setup: Setup, shape: tuple[int, ...]) -> Result:
    """Sums and maxima of a stack of boxes that keep the last axis, the first, none, the last, the first, with a factor.

    Of small integers they are exact in fp32, so nothing less than equality is right.
    """
    boxes, last = 2, (len(shape) - 1,)
    generator = torch.Generator().manual_seed(0)
    p, g = (torch.randint(-3, 4, (boxes, *shape), generator=generator) for _ in range(2))
    factor = torch.randint(1, 4, (boxes, *[1] * (len(shape) - 1), shape[-1]), generator=generator)
    held = [[x.to(setup.device, setup.dtype).reshape(-1) for x in whole] for whole in (p, g)]
    stage = Measure(box_terms, (last, (0,), WHOLE), False, Stored((last,)), (last, (0,)))
    scalars = Scalars(GRADIENT_NORM.scalars, [(0.0, 2.0)], [0] * boxes, setup.device)
    batch = Batch(*held, [()] * boxes, scalars, Prologue())
    given = factor.to(setup.device, compute_dtype(setup.dtype))
    stack = Stack(shape, torch.empty(shape).stride(), held, [0, 1], (given,))
    (found,) = backend(setup.backend).run_stacks(stage, batch, [stack])
    terms = (g * factor, g * factor * p, g, g.abs(), g.abs())
    for i, (term, kept, result) in enumerate(zip(terms, (last, (0,), WHOLE, last, (0,)), found, strict=True)):
        others = [1 + axis for axis in range(len(shape)) if axis not in kept]
        wanted = term.amax(others, keepdim=True) if i > 2 else term.sum(others, keepdim=True)
        if not torch.equal(result.cpu(), wanted.double()):
            return Result(math.inf, f"term {i} of shape {shape}")
    return Result(0.0, f"boxes of shape {shape}")


def segments(setup: Setup, tiles: int) -> Result:
    """The segmented sum alone, on segments of no, one, a block of, and very many tiles, against exact summation."""
    lengths = [1, 0, BLOCK, tiles, 3]
    first = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    partial = torch.randn(sum(lengths), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = torch.full((len(lengths), 2), math.nan, dtype=torch.float64, device=setup.device)
    at = first.to(setup.device)
    segmented_sum[(len(lengths),)](partial.to(setup.device), at, out, N_TERMS=2, BLOCK=BLOCK)
    wanted = [
        [math.fsum(term) for term in zip(*rows.tolist(), strict=True)] or [0.0, 0.0] for rows in partial.split(lengths)
    ]
    error = (out.cpu() - torch.tensor(wanted, dtype=torch.float64)).abs().max().item()
    return Result(error / (1e-15 * tiles), f"{tiles:,} tiles")
