"""Whole matrices: who works on which, what is sent, and Muon on odd parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import oput_dist as oput
from oput_dist.collectives import owners as owners_module
from oput_dist.collectives import ranks as ranks_module
from oput_dist.collectives.balance import assigned
from oput_dist.collectives.routes import senders, share_of
from oput_dist.layout import Box
from oput_dist.matrix.orthogonal import Orthogonalize, orthogonalized, polar_express
from oput_dist.optimizers.routing import is_hidden_matrix
from tests.pool import Pool

SHAPES = [(8, 6), (6, 8), (8, 6), (4, 4), (9, 5), (3, 7), (8, 6), (5,)]


def matrices() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


# ------------------------------------------------------------------------------------------------ who works on which


def test_the_dearest_first_to_the_rank_with_least_to_do() -> None:
    assert assigned([5.0, 1.0, 4.0, 3.0, 3.0], 2) == [0, 1, 1, 1, 0]
    assert assigned([1.0], 4) == [0]
    costs = [float(1 + (7 * i) % 13) for i in range(64)]
    loads = [0.0] * 8
    for cost, owner in zip(costs, assigned(costs, 8), strict=True):
        loads[owner] += cost
    assert max(loads) < 1.05 * sum(loads) / 8


def test_the_pieces_of_a_replica_go_to_the_owners_in_it() -> None:
    """Two replicas of two shards; a matrix that all hold; and one that the owner holds nothing of."""
    upper, lower = (share_of([Box(0, (2, 3), (slice(at, at + 2), slice(0, 3)), (3, 1))]) for at in (0, 2))
    assert [senders([upper, lower, upper, lower], owner) for owner in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [senders([upper] * 3, owner) for owner in range(3)] == [[0], [1], [2]]
    assert senders([upper, upper, share_of([]), share_of([])], 3) == [1]


def worked_on_rank() -> tuple[int, int, list[Tensor]]:
    """How many matrices this rank worked on in a step, the elements that it sent, and where the step led."""
    counted, sent = [], []
    call, exchange = Orthogonalize.__call__, ranks_module._all_to_all

    def counting(self: Orthogonalize, stacked: Tensor, *more: Any) -> Tensor:
        counted.append(len(stacked))
        return call(self, stacked, *more)

    def measuring(output: Tensor, given: Tensor, sizes: list[int], sizes_in: list[int], **more: Any) -> Any:
        sent.append(sum(size for rank, size in enumerate(sizes_in) if rank != dist.get_rank()))
        return exchange(output, given, sizes, sizes_in, **more)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)) for value in matrices()]
    for p in params:
        p.grad = p.detach().clone()
    optimizer = oput.Muon(params, lr=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Orthogonalize, "__call__", counting)
        patch.setattr(ranks_module, "_all_to_all", measuring)
        patch.setattr(owners_module, "WAVE_BYTES", 8 * 100)  # several waves
        optimizer.step()
    return sum(counted), sum(sent), [p.detach().full_tensor() for p in params]  # type: ignore[attr-defined]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_each_matrix_is_worked_on_once(pool: Pool, n: int) -> None:
    plain = [nn.Parameter(value) for value in matrices()]
    for p in plain:
        p.grad = p.detach().clone()
    oput.Muon(plain, lr=0.1).step()
    ranks = pool.run(n, worked_on_rank)
    assert sum(count for count, _, _ in ranks) == len(SHAPES) - 1
    elements = sum(torch.Size(shape).numel() for shape in SHAPES if len(shape) == 2)
    assert sum(sent for _, sent, _ in ranks) <= 2 * elements  # there and back, and nothing of one's own
    for _, _, found in ranks:
        assert all((a - b).abs().max() < 1e-13 for a, b in zip(found, plain, strict=True))


# ------------------------------------------------------------------------------------------------- what once went wrong


def moved_on_rank() -> list[Tensor]:
    """Rank 0's parameter moves in memory; then another is frozen, and thawed again."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    optimizer = oput.Muon(module, lr=0.1, shard_group=dist.group.WORLD)
    for step in range(4):
        if step == 1 and dist.get_rank() == 0:
            module[0].weight.data = module[0].weight.data.clone()
        module[1].weight.requires_grad_(step != 2)
        optimizer.zero_grad()
        module(torch.ones(3, 6)).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in module.parameters()]


def test_a_rank_whose_parameters_moved_does_not_hang_and_frozen_matrices_come_back(pool: Pool) -> None:
    first, second = pool.run(2, moved_on_rank, timeout=60.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_in_one_matrix_leaves_others_alone_and_empty_ones_are_no_trouble() -> None:
    params = [nn.Parameter(torch.ones(3, 3)) for _ in range(3)] + [nn.Parameter(torch.zeros(5, 0))]
    for p in params:
        p.grad = torch.randn_like(p)
    params[1].grad[0, 0] = torch.nan  # type: ignore[index]
    oput.Muon(params, lr=0.1).step()
    assert [bool(torch.isfinite(p).all()) for p in params] == [True, False, True, True]


def test_frozen_matrices_are_not_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    call = Orthogonalize.__call__
    monkeypatch.setattr(
        Orthogonalize, "__call__", lambda self, x, *more: (counted.append(len(x)), call(self, x, *more))[1]
    )
    params = [nn.Parameter(torch.eye(3), requires_grad=i == 0) for i in range(5)]
    params[0].grad = torch.eye(3)
    oput.Muon(params, lr=0.1).step()
    assert counted == [1]


def test_one_schedule_serves_both_kinds() -> None:
    module = nn.Sequential(nn.Linear(3, 3))
    optimizer = oput.Muon(module, lr=0.02, adam_factor=0.15, weight_decay=0.1)
    bias = nn.Parameter(module[0].bias.detach().clone())
    adam = torch.optim.AdamW([bias], lr=0.003, betas=(0.9, 0.95), weight_decay=0.1)
    for factor in (0.0, 0.5, 1.0):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * factor
        adam.param_groups[0]["lr"] = 0.003 * factor
        for p in (*module.parameters(), bias):
            p.grad = torch.ones_like(p)
        optimizer.step()
        adam.step()
    assert torch.allclose(module[0].bias, bias, rtol=1e-6)


def test_a_group_that_changed_kind_still_loads() -> None:
    p = nn.Parameter(torch.eye(3))
    optimizer = oput.Muon([p], lr=0.1)
    for kind in (True, False):
        optimizer.param_groups[0]["matrix"] = kind
        p.grad = torch.ones_like(p)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


# ----------------------------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize(
    ("name", "layer", "axes", "wanted"),
    [
        ("layer.0.output.dense.weight", nn.Linear(2, 2), 2, True),
        ("attention.output.dense.weight", None, 2, True),
        ("lm_head.weight", nn.Linear(2, 2), 2, False),
        ("tok.weight", nn.Embedding(2, 2), 2, False),
        ("conv.weight", nn.Conv2d(1, 1, 1), 4, True),
        ("norm.weight", nn.LayerNorm(2), 1, False),
        ("", None, 2, True),
    ],
)
def test_hidden_matrices(name: str, layer: nn.Module | None, axes: int, wanted: bool) -> None:
    assert is_hidden_matrix(name, layer, axes) is wanted


def test_the_module_tells_embeddings_of_parameters_that_are_given_by_themselves() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    for params in (module, module.named_parameters(), module.parameters()):
        optimizer = oput.Muon(params, module=module)
        assert [(group["matrix"], len(group["params"])) for group in optimizer.param_groups] == [(True, 1), (False, 2)]


def test_bad_routing() -> None:
    module = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"matrix_params says of no parameter .*as for \('weight', ..., 2\)"):
        oput.Muon(module, matrix_params=lambda name, layer, axes: False)
    with pytest.raises(ValueError, match=r"matrix_params=3 is not allowed: must be a function"):
        oput.Muon(module, matrix_params=3)  # type: ignore[arg-type]


def test_polar_express_orthogonalises() -> None:
    torch.manual_seed(0)
    stacked = torch.randn(3, 5, 9, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(stacked, full_matrices=False)
    assert (orthogonalized(stacked, polar_express(10), 1e-7) - u @ vh).abs().max() < 1e-6
    assert (orthogonalized(stacked.mT, polar_express(10), 1e-7) - (u @ vh).mT).abs().max() < 1e-6
