"""Every optimizer under every layout gives what one process gives. Adding an optimizer is one row in tests/cases/."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import oput_dist as oput
from tests.cases import CASES
from tests.conformance import SECOND, Case, Row, faults
from tests.pool import Pool
from tests.wrapped import WORLDS, WRAPPED_WORLDS

BY_NAME = {case.name: case for case in CASES}
INEXACT = [case for case in CASES if not case.exact]
FEW = [BY_NAME[name] for name in ("adamw", "lion", "stableadamw", "lamb", "lamb clipped")]
ONE_EACH = [*{case.optimizer: case for case in reversed(CASES)}.values(), BY_NAME["lamb clipped"]]
TORCH = [
    Case("torch adamw", "torch.optim.AdamW", {"lr": 0.1}, SECOND),
    Case("torch sgd", "torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}, SECOND),
]


THOROUGH = [("rows", 3), ("zero1", 2), ("grid", 4)]
"""Where every setting of every optimizer runs; elsewhere one setting of each does."""


def rows_for(layout: str, n: int) -> list[Row]:
    """One setting of each optimizer in fp32; in the thorough worlds every setting.

    What differs by backend and by dtype does not differ by layout. So of the two plain-PyTorch backends one world has
    eager, the others have foreach, and reference runs are eager; fp64, which shows that sums are not made in fp32, is
    for all settings where there is one group to sum over, and for one of each where there are two.
    """
    summed: dict[tuple[str, int], list[Case]] = {
        ("rows", 3): INEXACT,
        ("grid", 4): [case for case in ONE_EACH if not case.exact],
    }
    cases = CASES if (layout, n) in THOROUGH else ONE_EACH
    return [
        *itertools.product(cases, [torch.float32], ["eager" if (layout, n) == ("zero1", 2) else "foreach"]),
        *itertools.product(summed.get((layout, n), []), [torch.float64], ["foreach"]),
    ]


@pytest.mark.parametrize(("layout", "n"), WORLDS)
def test_sharding_changes_nothing(pool: Pool, layout: str, n: int) -> None:
    found = faults(pool, layout, n, rows_for(layout, n))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("layout", "n"), WRAPPED_WORLDS)
def test_wrapping_changes_nothing(pool: Pool, layout: str, n: int) -> None:
    found = faults(pool, layout, n, list(itertools.product(ONE_EACH, [torch.float32], ["foreach"])))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("layout", "n", "cases"), [("rows", 3, ONE_EACH), ("zero1", 2, CASES)], ids=["rows", "zero1"])
def test_sharding_changes_nothing_in_bf16(pool: Pool, layout: str, n: int, cases: list[Case]) -> None:
    found = faults(pool, layout, n, list(itertools.product(cases, [torch.bfloat16], ["foreach"])))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("layout", ["rows", "zero1"])
def test_sharding_changes_nothing_when_compiled(pool: Pool, layout: str) -> None:
    found = faults(pool, layout, 2, list(itertools.product(FEW, [torch.float32], ["compile"])))
    assert not found, "\n".join(found)


# ------------------------------------------------------------------------------------ the harness itself is put to test


def test_harness_accepts_elementwise_optimizers_of_torch(pool: Pool) -> None:
    for layout, n in (("rows", 3), ("grid", 4), ("fsdp2", 2)):
        found = faults(pool, layout, n, list(itertools.product(TORCH, [torch.float32], ["eager"])))
        assert not found, "\n".join(found)


class LocalLamb(oput.Lamb):
    """Planted fault: the norms stay local, as those of most libraries."""

    def step(self, closure: Any = None) -> Any:
        reduce = dist.all_reduce
        dist.all_reduce = lambda *args, **kwargs: None
        try:
            return super().step(closure)
        finally:
            dist.all_reduce = reduce


class ZeroFilledAdamW(oput.AdamW):
    """Planted fault: a missing gradient counts as zero, so that momentum and decay still move the parameter."""

    def step(self, closure: Any = None) -> Any:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is None):
            p.grad = torch.zeros_like(p)
        return super().step(closure)


class LastBitLion(oput.Lion):
    """Planted fault: one element on one rank is off by one unit in the last place."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        if dist.is_initialized() and dist.get_rank() == 1:
            piece = self.param_groups[0]["params"][-1].to_local().view(-1)
            piece[:1] = torch.nextafter(piece[:1], torch.tensor(9.0))


class MisplacedAdamW(oput.AdamW):
    """Planted fault: right numbers, but state whose layout a checkpoint would not understand."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for state in self.state.values():
            if isinstance(state["exp_avg"], DTensor):
                state["exp_avg"] = state["exp_avg"].to_local()


@pytest.mark.parametrize(
    ("fault", "options", "exact", "message"),
    [
        ("LocalLamb", {"weight_decay": 0.1}, False, "matrix.param is off by"),
        ("ZeroFilledAdamW", {}, True, "after the last step, vector.exp_avg is off by"),
        ("LastBitLion", {}, True, "rank 1: short.param is off by"),
        ("MisplacedAdamW", {}, True, "state exp_avg of matrix is not laid out as its parameter"),
    ],
)
def test_harness_finds_planted_faults(
    pool: Pool, fault: str, options: dict[str, Any], exact: bool, message: str
) -> None:
    case = Case(fault, f"tests.test_conformance.{fault}", {"lr": 0.1, **options}, SECOND, exact)
    found = faults(pool, "rows", 3, [(case, torch.float32, "foreach")])
    assert any(message in line for line in found), "\n".join(found)
