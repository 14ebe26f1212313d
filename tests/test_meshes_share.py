"""The ranks of any mesh share whole matrices, whatever others the world has: one process against many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import oput_dist as oput
from tests.counting import NAMES, OPTIONS, assert_same_state, owned_bytes, sent, worked
from tests.parity import pull
from tests.pool import Pool

SHAPES = [(8, 4), (12, 8), (4, 8), (8, 8), (4, 4), (9,), (12, 4), (5, 4)]
PLACES = [
    (Replicate(), Shard(0)),
    (Shard(0), Shard(1)),
    (Shard(1), Replicate()),
    (Shard(0), Shard(0)),
    (Replicate(), Replicate()),
]


def pulled(name: str, mesh: DeviceMesh | None, seed: int = 0) -> dict[str, Any]:
    """Some steps on matrices that a mesh holds; then saved, loaded and gone on."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]

    def held(i: int, value: Tensor) -> Tensor:
        if mesh is None:
            return value.clone()
        places = PLACES[i % len(PLACES)][2 - mesh.ndim :] if value.ndim > 1 else [Replicate()] * mesh.ndim
        return distribute_tensor(value.clone(), mesh, places, src_data_rank=None)

    params = [nn.Parameter(held(i, value)) for i, value in enumerate(values)]
    made = [oput.create(name, params, **OPTIONS[name]) for _ in range(2)]
    whole: dict[str, Any] = {}
    with worked() as counted, sent() as told:
        for step in range(6):
            optimizer = made[step // 3]
            if step == 3:
                whole = oput.full_state_dict(made[0])
                optimizer.load_state_dict(whole)
            for i, p in enumerate(params):
                p.grad = held(i, pull(values[i], i, step)) if (step, i) != (1, 2) else None
            optimizer.step()
    ends = [p.detach() if mesh is None else p.detach().full_tensor() for p in params]  # type: ignore[attr-defined]
    return {"ends": ends, "worked": sum(counted), "sent": told, "owned": owned_bytes(optimizer), "whole": whole}


def inside(name: str, how: str) -> dict[str, Any] | None:
    """A mesh of 2 x 2 in a world of five, of which the last rank does nothing."""
    names = ("a", "b") if how == "in turn" else ("c", "d")  # DTensor takes the first of equal meshes for all of them
    mesh = DeviceMesh("cpu", [[0, 1], [2, 4]], mesh_dim_names=names)
    if how == "flattened":
        mesh._flatten()
    return None if dist.get_rank() == 3 else pulled(name, mesh)


@pytest.mark.parametrize("how", ["in turn", "flattened"])
@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_of_some_ranks(pool: Pool, name: str, how: str) -> None:
    alone = pulled(name, None)
    ranks = [rank for rank in pool.run(5, inside, name, how) if rank is not None]
    assert sum(rank["worked"] for rank in ranks) == alone["worked"]
    for rank in ranks:
        assert max((a - b).abs().max().item() for a, b in zip(rank["ends"], alone["ends"], strict=True)) < 1e-10
        assert_same_state(rank["whole"], alone["whole"])
        assert rank["sent"]["calls"] == 6 * 2 * (1 if how == "flattened" else 2)  # there and back, along each dimension
    assert sum(rank["owned"] for rank in ranks) == alone["owned"]


def stages(name: str) -> dict[str, Any]:
    """Two stages of a pipeline, each with other matrices on a mesh of its own."""
    meshes = [DeviceMesh("cpu", ranks) for ranks in ([0, 1], [2, 3])]
    stage = dist.get_rank() // 2
    return pulled(name, meshes[stage], stage)


@pytest.mark.parametrize("name", NAMES)
def test_stages_side_by_side(pool: Pool, name: str) -> None:
    ranks = pool.run(4, stages, name)
    for stage in (0, 1):
        alone = pulled(name, None, stage)
        own = ranks[2 * stage : 2 * stage + 2]
        assert sum(rank["worked"] for rank in own) == alone["worked"]
        for rank in own:
            assert max((a - b).abs().max().item() for a, b in zip(rank["ends"], alone["ends"], strict=True)) < 1e-10


def out_of_order() -> str | None:
    """A mesh whose ranks do not ascend: refused on all its ranks before anything changed, unless it was flattened."""
    mesh = DeviceMesh("cpu", [[0, 1], [3, 2]], mesh_dim_names=("a", "b"))
    if dist.get_rank() == 4:
        mesh._flatten()
        return None
    p = nn.Parameter(distribute_tensor(torch.eye(4), mesh, [Replicate(), Shard(0)], src_data_rank=None))
    p.grad = p.detach().clone()
    optimizer = oput.Muon([p], lr=0.1)
    try:
        optimizer.step()
    except ValueError as error:
        text = str(error)
        assert torch.equal(p.detach().to_local(), p.grad.to_local())  # type: ignore[union-attr]
        mesh._flatten()
        oput.Muon([p], lr=0.1).step()
        return text
    return "it was taken"


def test_a_mesh_out_of_order_is_refused_until_it_is_flattened(pool: Pool) -> None:
    for text in pool.run(5, out_of_order)[:4]:
        assert text is not None
        assert "parameter 0 of group 0" in text
        assert "do not ascend along each dimension" in text
        assert "mesh._flatten()" in text
