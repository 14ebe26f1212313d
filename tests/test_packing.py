"""Factors, roots and bases in a byte for each element: against formulas, over ranks, through checkpoints."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import oput_dist as oput
from oput_dist.matrix.packing import Columns, Packing, Symmetric
from tests.conformance import on_grid
from tests.pool import Pool

BOTH = ["shampoo", "soap"]
OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "precondition_frequency": 3,
    "block_size": 5,
    "factor_dtype": "int8",
    "backend": "foreach",
}
SHAPES = [(11, 10), (7, 6), (4, 3, 2), (11, 10), (9,)]  # a basis of a larger null space would be anyone's choice


def statistic(side: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Of rows whose sizes are up to a million apart."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(side, 2 * side, generator=generator, dtype=torch.float64)
    rows *= torch.logspace(-4, 2, side, dtype=torch.float64).unsqueeze(1)
    return (rows @ rows.T).to(dtype)


# ------------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_a_statistic_the_diagonal_and_roots_of_correlations_are_kept(dtype: torch.dtype) -> None:
    a = statistic(6, dtype)
    kept = Symmetric().pack(a.unsqueeze(0))
    found = Symmetric().unpack(kept, (6, 6), dtype)[0]
    assert kept.dtype == torch.uint8
    assert kept.shape == (1, 4 * 6 + 6 * 6)
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), a.diagonal().float().to(dtype))
    for i in range(6):
        for j in range(i):
            size = math.sqrt(float(a[i, i]) * float(a[j, j]))
            root = math.copysign(round(32767 * math.sqrt(abs(float(a[i, j])) / size)), float(a[i, j])) / 32767
            assert abs(float(found[i, j]) / size - root * abs(root)) < 1e-6  # a step further is 6e-5 sqrt|correlation|


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_a_basis_127ths_of_the_largest_of_each_column(dtype: torch.dtype) -> None:
    q = torch.linalg.qr(statistic(9, dtype))[0]
    found = Columns().unpack(Columns().pack(q.unsqueeze(0)), (9, 9), dtype)[0]
    largest = q.abs().amax(0)
    assert ((q / largest * 127).round() * largest / 127 - found).abs().max() < 1e-6
    assert (found.T @ found - torch.eye(9)).abs().max() < 0.02


@pytest.mark.parametrize("packing", [Symmetric(), Columns()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [1, 2, 7, 40])
def test_packed_again_it_is_the_same_and_each_by_itself(packing: Packing, dtype: torch.dtype, side: int) -> None:
    stack = torch.stack([statistic(side, dtype, seed) for seed in range(5)])
    kept = packing.pack(stack)
    assert torch.equal(packing.pack(packing.unpack(kept, (side, side), dtype)), kept)
    assert torch.equal(packing.pack(packing.unpack(kept, (side, side), dtype, whole=False)), kept)
    assert torch.equal(torch.cat([packing.pack(one.unsqueeze(0)) for one in stack]), kept)
    assert not packing.unpack(torch.zeros_like(kept), (side, side), dtype).any()


def test_what_is_not_finite_shows() -> None:
    a = statistic(4)
    a[2] = a[:, 2] = math.inf
    for packing in (Symmetric(), Columns()):
        found = packing.unpack(packing.pack(a.unsqueeze(0)), (4, 4), torch.float32)
        assert not bool(torch.isfinite(found).all())


def test_a_slow_average_of_steep_statistics_has_the_same_roots() -> None:
    """Blocks of 8-bit codes would stand still: at a step the average changes by a thousandth of what is new in it."""
    side, kept = 32, torch.zeros(1, Symmetric().size((32, 32)), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(3)
    spread = torch.linalg.qr(torch.randn(side, side, generator=generator))[0] * torch.arange(1, side + 1) ** -0.5
    exact = torch.zeros(side, side, dtype=torch.float64)
    for _ in range(400):
        g = spread @ torch.randn(side, side, generator=generator)
        exact = 0.999 * exact + 0.001 * (g @ g.T).double()
        a = Symmetric().unpack(kept, (side, side), torch.float32)
        kept = Symmetric().pack(0.999 * a + 0.001 * (g @ g.T))
    values = torch.linalg.eigvalsh(exact)
    found = torch.linalg.eigvalsh(Symmetric().unpack(kept, (side, side), torch.float64)[0])
    assert values[-1] > 20 * values[0]
    assert (found / values - 1).abs().max() < 0.01


# ------------------------------------------------------------------------------------------------------- ranks, copies


def gradients(step: int) -> list[Tensor]:
    return [on_grid(100 * (step + 1) + i, shape, torch.float32) for i, shape in enumerate(SHAPES)]


def trained(make: str, steps: range, given: Any = None, **more: Any) -> tuple[list[Tensor], dict[str, Any], int]:
    """Parameters after some steps, the whole state dict, and bytes of state; over the ranks that there are."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if dist.is_initialized() else None

    def spread(value: Tensor) -> Tensor:
        return value if mesh is None else distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)

    start, state = given or ([on_grid(i, shape, torch.float32) for i, shape in enumerate(SHAPES)], None)
    params = [nn.Parameter(spread(value.clone())) for value in start]
    optimizer = oput.create(make, params, **{**OPTIONS, **more})
    if state is not None:
        optimizer.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
    for step in steps:
        for p, gradient in zip(params, gradients(step), strict=True):
            p.grad = spread(gradient)
        optimizer.step()
    whole = [p.detach().full_tensor() if mesh is not None else p.detach() for p in params]  # type: ignore[attr-defined]
    saved = oput.full_state_dict(optimizer)
    assert {group["factor_dtype"] for group in saved["param_groups"]} == {more.get("factor_dtype", "int8")}
    return whole, saved, oput.state_bytes(optimizer)


def written(found: tuple[list[Tensor], dict[str, Any], int]) -> tuple[list[Tensor], bytes]:
    file = io.BytesIO()
    torch.save(found[1], file)
    return found[0], file.getvalue()


def same(found: tuple[list[Tensor], dict[str, Any], int], wanted: tuple[list[Tensor], dict[str, Any], int]) -> bool:
    states = (found[1]["state"], wanted[1]["state"])
    return all(torch.equal(a, b) for a, b in zip(found[0], wanted[0], strict=True)) and all(
        torch.equal(states[0][i][name], value) for i, own in states[1].items() for name, value in own.items()
    )


@pytest.mark.parametrize(("make", "n"), [("shampoo", 3), ("soap", 2)])
def test_no_rank_and_no_stop_changes_a_bit(pool: Pool, make: str, n: int) -> None:
    wanted = trained(make, range(8))
    half = written(trained(make, range(4)))
    assert same(trained(make, range(4, 8), half), wanted)
    every = pool.run(n, trained, make, range(4))
    ranks = pool.run(n, trained, make, range(4, 8), half)
    assert all(same(rank, wanted) for rank in ranks)
    assert same(trained(make, range(4, 8), written(every[0])), wanted)
    counters, others = 4 * len(SHAPES), 8 * 9  # each rank's own, and AdamW's state of the vector, padded
    assert sum(size - counters for _, _, size in every) <= wanted[2] - counters + others


@pytest.mark.parametrize("make", BOTH)
def test_a_run_goes_on_with_another_form_of_factors(make: str) -> None:
    more = {"block_size": None, **({"eps": 1e-4} if make == "shampoo" else {})}
    plain = {"factor_dtype": None, **more}
    wanted, start = trained(make, range(8), **plain)[0], [on_grid(i, s, torch.float32) for i, s in enumerate(SHAPES)]
    for before, after in ((more, plain), (plain, more)):
        found = trained(make, range(4, 8), written(trained(make, range(4), **before)), **after)[0]
        apart = [((f - w).abs().max() / (w - s).abs().max()) for f, w, s in zip(found, wanted, start, strict=True)]
        assert 0 < max(apart) < 0.1


@pytest.mark.parametrize("make", BOTH)
def test_an_option_that_is_changed_in_the_midst_of_a_run_holds_from_the_next_step(make: str) -> None:
    p = nn.Parameter(torch.ones(40, 40))
    optimizer = oput.create(make, [p], lr=0.1, block_size=None)
    sizes = []
    for stored in (None, "int8", "bfloat16", "int8", None):
        optimizer.param_groups[0]["factor_dtype"] = stored
        p.grad = torch.randn(40, 40, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        sizes.append(oput.state_bytes(optimizer))
    kept = [0, 4 * 4 * 1600, 4 * (1600 + 4 * 40), 2 * 4 * 1600]  # two factors, and two roots or bases
    rest = sizes[0] - kept[1]
    assert sizes == [rest + size for size in (kept[1], kept[2], kept[3], kept[2], kept[1])]


@pytest.mark.parametrize("make", BOTH)
def test_gradients_that_do_not_count_leave_every_byte(make: str) -> None:
    p = nn.Parameter(torch.ones(6, 6))
    optimizer = oput.create(make, [p], lr=0.1, factor_dtype="int8", precondition_frequency=1)
    for step in range(3):
        p.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    before = optimizer.state[p]["factor_0"].memory.clone()
    for bad in (0.0, math.nan, math.inf):
        p.grad = torch.full((6, 6), bad)
        optimizer.step()
        assert torch.equal(optimizer.state[p]["factor_0"].memory, before)
    assert bool(torch.isfinite(p).all())
    assert optimizer.report().failures == 0
