"""Division by the root of an average of squares: one pass in C++ and torch operations, against the formula."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import oput_dist as oput
from oput_dist.matrix import rootmean
from oput_dist.matrix.rootmean import Scales, scaled, scaled_with_norms
from tests.pool import Pool

LARGE, SMALL = (160, 128), (7, 5)  # the first takes the pass in C++
N = 4


def given(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x, g and squares of some matrices, whose sizes differ."""
    sizes = 10.0 ** torch.arange(-3, N - 3).view(-1, 1, 1)
    drawn = torch.Generator().manual_seed(5)
    x, g, squares = (torch.randn(N, *shape, generator=drawn, dtype=torch.float64) * sizes for _ in range(3))
    return [x.to(dtype), g.to(dtype), squares.square().to(dtype)]


def scales(decay: float, counting: torch.Tensor | None = None) -> Scales:
    return Scales(decay, torch.logspace(-8, -2, N).double(), torch.linspace(0.5, 3.0, N).double(), counting)


def test_large_matrices_take_one_pass() -> None:
    x, g, squares = given(LARGE)
    assert rootmean._in_one_pass(x, g, squares)
    assert not rootmean._in_one_pass(*given(SMALL))
    assert not rootmean._in_one_pass(x.double(), g.double(), squares.double())
    assert not rootmean._in_one_pass(x.mT, g.mT, squares.mT)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_is_the_formula(shape: tuple[int, ...], decay: float) -> None:
    x, g, squares = given(shape)
    x64, g64, v64 = given(shape, torch.float64)
    new = decay * v64 + (1.0 if decay == 1 else 1 - decay) * g64**2
    h = scales(decay).weights
    wanted = h.size.view(-1, 1, 1) * x64 / (new.sqrt() + h.eps.view(-1, 1, 1))
    made, norms = scaled_with_norms(x, g, squares, scales(decay), torch.empty_like(x))
    torch.testing.assert_close(squares.double(), new, rtol=1e-6, atol=0)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(norms, wanted.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
    again = given(shape)[2]
    assert torch.equal(scaled(x, g, again, scales(decay), torch.empty_like(x)), made)
    assert torch.equal(again, squares)


@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_what_does_not_count_keeps_its_average(shape: tuple[int, ...]) -> None:
    x, g, squares = given(shape)
    counting = torch.tensor([True, False, True, False])
    g[~counting] = 0.0
    before = squares.clone()
    scaled(x, g, squares, scales(0.9, counting), torch.empty_like(x))
    same = (squares == before).flatten(1).all(1)
    assert torch.equal(same, ~counting)


def test_a_matrix_gets_the_same_in_any_stack_and_on_any_number_of_threads() -> None:
    x, g, squares = given(LARGE)
    made, norms = scaled_with_norms(x, g, squares, scales(0.9), torch.empty_like(x))
    threads = torch.get_num_threads()
    for i, number in enumerate((1, 2, 3, 1)):
        h = scales(0.9).weights
        own = Scales(0.9, h.eps[i : i + 1], h.size[i : i + 1])
        a, b, c = (each[i : i + 1] for each in given(LARGE))
        torch.set_num_threads(number)
        try:
            one, norm = scaled_with_norms(a, b, c, own, torch.empty_like(a))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(one[0], made[i])
        assert torch.equal(norm[0], norms[i])
        assert torch.equal(c[0], squares[i])


def test_without_a_compiler_torch_operations_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g, squares = given(LARGE)
    made = scaled(x, g, squares, scales(0.9), torch.empty_like(x))
    monkeypatch.setattr(rootmean, "_library", lambda terms: None)
    x, g, again = given(LARGE)
    other = scaled(x, g, again, scales(0.9), torch.empty_like(x))
    torch.testing.assert_close(other, made, rtol=1e-6, atol=0)
    torch.testing.assert_close(again, squares, rtol=1e-6, atol=0)


def trained(make: str) -> list[torch.Tensor]:
    """Whole parameters after some steps, on any number of ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    drawn = torch.Generator().manual_seed(0)

    def spread(value: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)

    params = [nn.Parameter(spread(torch.randn(384, 128, generator=drawn))) for _ in range(2)]
    optimizer = oput.create(make, params, lr=0.1, precondition_frequency=2, block_size=128)
    for _ in range(4):
        for p in params:
            p.grad = spread(torch.randn(384, 128, generator=drawn))
        optimizer.step()
    return [p.full_tensor().detach() for p in params]


@pytest.mark.parametrize("make", ["shampoo", "soap"])
def test_no_sharding_changes_a_bit_of_what_takes_one_pass(pool: Pool, make: str) -> None:
    (alone,) = pool.run(1, trained, make)
    for whole in pool.run(3, trained, make):
        assert all(torch.equal(p, q) for p, q in zip(whole, alone, strict=True))
