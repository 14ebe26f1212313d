"""clip_grad_norm_ over any mixture of layouts and meshes equals torch's on plain tensors."""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import oput_dist as oput
from tests.conformance import on_grid
from tests.pool import Pool

ORDERS = (2.0, 1.0, 3.0, 0.5, math.inf)
SHAPES = [(7, 5), (4, 3), (11,), (1, 6), (3, 2), (5,), (2, 2)]
WITHOUT = 5  # the parameter that has no gradient


def gradients(dtype: torch.dtype) -> list[Tensor]:
    return [on_grid(i, shape, dtype) for i, shape in enumerate(SHAPES)]


def mixture(dtype: torch.dtype) -> list[nn.Parameter]:
    """Plain parameters and DTensors on one-, two-dimensional and sub-meshes, together."""
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    where: list[tuple[object, list[Placement]]] = [
        (line, [Shard(0)]),
        (square, [Shard(0), Shard(1)]),
        (square, [Replicate(), Shard(0)]),
        (line, [Replicate()]),
        (square["b"], [Shard(0)]),
        (line, [Shard(0)]),
        (None, []),
    ]
    params = []
    for i, ((mesh, placements), grad) in enumerate(zip(where, gradients(dtype), strict=True)):
        if mesh is None:
            p, g = nn.Parameter(torch.zeros_like(grad)), grad
        else:
            p = nn.Parameter(distribute_tensor(torch.zeros_like(grad), mesh, placements, src_data_rank=None))
            g = distribute_tensor(grad, mesh, placements, src_data_rank=None)
        p.grad = None if i == WITHOUT else g
        params.append(p)
    return params


def clip(dtype: torch.dtype) -> list[tuple[float, str, list[Tensor]]]:
    results = []
    for order in ORDERS:
        for max_norm in (2.0, 1e6):
            params = mixture(dtype)
            norm = oput.clip_grad_norm_(params, max_norm, norm_type=order)
            assert not isinstance(norm, DTensor)
            assert norm.shape == ()
            grads = [p.grad for p in params if p.grad is not None]
            full = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
            results.append((norm.item(), str(norm.dtype), full))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_on_plain_tensors(pool: Pool, dtype: torch.dtype) -> None:
    limit = 1e-6 if dtype == torch.float32 else 1e-14
    for results in pool.run(4, clip, dtype):
        cases = [(order, max_norm) for order in ORDERS for max_norm in (2.0, 1e6)]
        for (order, max_norm), (norm, kind, grads) in zip(cases, results, strict=True):
            plain = [nn.Parameter(torch.zeros_like(g)) for g in gradients(dtype)]
            for i, (p, g) in enumerate(zip(plain, gradients(dtype), strict=True)):
                p.grad = None if i == WITHOUT else g
            wanted = torch.nn.utils.clip_grad_norm_(plain, max_norm, norm_type=order)
            assert kind == str(dtype)
            assert abs(norm - wanted.item()) <= limit * wanted.item(), (order, max_norm)
            for g, p in zip(grads, [p for p in plain if p.grad is not None], strict=True):
                assert (g - p.grad).abs().max() <= limit * p.grad.abs().max(), (order, max_norm)


def test_one_process() -> None:
    for accept in (lambda ps: ps, lambda ps: iter(ps), lambda ps: ps[0]):
        ours, theirs = ([nn.Parameter(torch.zeros_like(g)) for g in gradients(torch.float64)] for _ in range(2))
        for params in (ours, theirs):
            for p, g in zip(params, gradients(torch.float64), strict=True):
                p.grad = g
        norm = oput.clip_grad_norm_(accept(ours), 1.0)
        wanted = torch.nn.utils.clip_grad_norm_(accept(theirs), 1.0)
        assert abs(norm - wanted) <= 1e-14 * wanted
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-14, atol=0)


def test_nothing_to_clip() -> None:
    assert oput.clip_grad_norm_([nn.Parameter(torch.ones(3))], 1.0) == 0.0
    assert oput.clip_grad_norm_([], 1.0) == 0.0


def clip_partial() -> tuple[float, float]:
    """Tensor parallelism leaves partial sums as gradients of replicated parameters."""
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.full((4,), 10.0), mesh, [Partial()])
    return oput.clip_grad_norm_([p], 1.0).item(), p.grad.full_tensor().norm().item()


def test_gradients_that_are_partial_sums_are_clipped(pool: Pool) -> None:
    for before, after in pool.run(2, clip_partial):
        assert before == 40.0
        assert after == pytest.approx(1.0, abs=1e-6)


# --------------------------------------------------------------------------------------------- modules, partial sums


def clipped_module(kind: str) -> tuple[float, list[Tensor], float]:
    """The norm of one rank's module, its clipped gradients whole, and the seconds that it took."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    wrapped: nn.Module = module
    if kind.startswith("fsdp1"):
        wrapped = FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=kind == "fsdp1")
    wrapped(torch.ones(2, 5)).square().sum().backward()
    began = time.monotonic()
    norm = oput.clip_grad_norm_(wrapped, 0.5)
    took = time.monotonic() - began
    if kind == "one":
        return norm.item(), [p.grad for p in module.parameters() if p.grad is not None], took
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=kind == "fsdp1"):
        return norm.item(), [p.grad.clone() for p in module.parameters() if p.grad is not None], took


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp1-flat"])
def test_a_module_of_fsdp1(pool: Pool, kind: str) -> None:
    ((wanted, gradients, _),) = pool.run(1, clipped_module, "one")
    assert wanted > 1.0
    for norm, found, _ in pool.run(2, clipped_module, kind):
        assert norm == pytest.approx(wanted, rel=1e-6)
        for one, other in zip(found, gradients, strict=False):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def partial_on_one_rank() -> tuple[float, float]:
    """Rank 1 has no gradient; rank 0's is a partial sum."""
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()], src_data_rank=None))
    if dist.get_rank() == 0:
        p.grad = DTensor.from_local(torch.tensor([3.0, 4.0]), mesh, [Partial()], run_check=False)
    began = time.monotonic()
    return oput.clip_grad_norm_([p], 10.0).item(), time.monotonic() - began


def test_a_partial_sum_on_one_rank_keeps_nobody_waiting(pool: Pool) -> None:
    for _, took in pool.run(2, partial_on_one_rank, timeout=20.0):
        assert took < 5.0
