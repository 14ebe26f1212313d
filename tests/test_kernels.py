"""The Triton kernels, interpreted, compute what the eager backend does. On a GPU the same checks are benchmarks.gpu."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import pytest
import torch

from benchmarks import checks
from benchmarks.checks import Result, Setup
from benchmarks.variants import MAX_NORM, Variant, variants

CPU = torch.device("cpu")
CLIPPED = {"weight_decay": 0.1, "maximize": True, "max_grad_norm": MAX_NORM}
PLAIN = [variant for variant in variants() if not variant.options]


def run(pool: Executor, check: Callable[..., Result], *cases: tuple[Any, ...]) -> None:
    """``check`` of every case, all to the end; fails with a line for each that is wrong."""
    waiting = [(case, pool.submit(check, *case)) for case in cases]
    results = [(case, future.result()) for case, future in waiting]
    wrong = [f"{result} for {case}" for case, result in results if not result.ok]
    assert results
    assert not wrong, "\n".join(wrong)


def test_every_variant_as_eager(interpreter: Executor) -> None:
    run(interpreter, checks.same_as_eager, *((variant, Setup(CPU)) for variant in variants()))


def test_fp64(interpreter: Executor) -> None:
    cases = (Variant("adan"), Variant("lamb", CLIPPED), Variant("stableadamw"), Variant("sgd", {"momentum": 0.9}))
    cases += (Variant("adafactor"), Variant("came"), Variant("ranger21"), Variant("adamwschedulefree"))
    run(interpreter, checks.same_as_eager, *((variant, Setup(CPU, torch.float64)) for variant in cases))


def test_every_optimizer_in_bf16(interpreter: Executor) -> None:
    run(interpreter, checks.accuracy, *((variant, Setup(CPU, torch.bfloat16)) for variant in PLAIN))


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float16, None), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_other_dtypes(interpreter: Executor, dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
    setup = Setup(CPU, dtype, state_dtype)
    run(interpreter, checks.accuracy, *((variant, setup) for variant in (Variant("adamw"), Variant("lamb", CLIPPED))))


def test_tensor_lr(interpreter: Executor) -> None:
    run(interpreter, checks.tensor_lr, *((variant, Setup(CPU), CPU) for variant in (Variant("lion"), Variant("lamb"))))


def test_many_tensors(interpreter: Executor) -> None:
    run(interpreter, checks.many_tensors, (Variant("lamb"), Setup(CPU), 40))


def test_repeatable(interpreter: Executor) -> None:
    run(interpreter, checks.repeatable, (Variant("lamb", CLIPPED), Setup(CPU), 3_000, 2))


def test_sums(interpreter: Executor) -> None:
    run(interpreter, checks.exact_sums, (Setup(CPU), 20_000), (Setup(CPU, torch.float64), 5_000))
    run(interpreter, checks.segments, (Setup(CPU), 5_000))


def test_sums_of_boxes(interpreter: Executor) -> None:
    run(interpreter, checks.kept_sums, *((Setup(CPU), shape) for shape in checks.BOXES))
    run(interpreter, checks.kept_sums, (Setup(CPU, torch.float64), checks.BOXES[1]))


def test_the_checks_can_fail(interpreter: Executor) -> None:
    """An update that is off by a millionth of a parameter, and a sum without its last element, are wrong."""
    before = [{"p": torch.ones(3, dtype=torch.float64)}]
    right = [{"p": torch.full((3,), 0.9, dtype=torch.float64)}]
    off = [{"p": right[0]["p"] + torch.tensor([0.0, 1e-6, 0.0])}]
    assert checks.worst(Setup(CPU), Variant("adamw"), before, right, right) == 0
    assert checks.worst(Setup(CPU), Variant("adamw"), before, off, right) > 1
    assert not Result(float("nan")).ok
