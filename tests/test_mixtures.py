"""Parameters of many layouts in one optimizer, and parameters that change their layout under it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import oput_dist as oput
from tests.conformance import on_grid
from tests.pool import Pool
from tests.test_sharded_cost import collectives

Where = tuple[DeviceMesh, list[Placement]] | None
STEPS = 3


def places() -> list[tuple[tuple[int, ...], Where]]:
    """Shapes and where they live: plain, and on three meshes of four ranks, cut in most of the ways there are."""
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    strided = _StridedShard(0, split_factor=2)
    return [
        ((5, 3), None),  # plain
        ((), None),
        ((7, 3), (line, [Shard(0)])),  # FSDP2
        ((3,), (line, [Shard(0)])),  # ... with an empty piece
        ((6, 5), (square["model"], [Shard(0)])),  # column-wise tensor parallel
        ((3, 5), (square["model"], [Shard(1)])),  # row-wise
        ((4,), (square["model"], [Replicate()])),
        ((8, 3), (square, [strided, Shard(0)])),  # FSDP2 over column-wise
        ((5, 4), (square, [Shard(0), Shard(1)])),  # ... over row-wise
        ((9, 2), (square, [Replicate(), Shard(0)])),  # HSDP
        ((5, 2), (square["data"], [Shard(0)])),
    ]


def cut(value: Tensor, where: Where) -> Tensor:
    return value if where is None else distribute_tensor(value, *where, src_data_rank=None)


def mixed() -> dict[str, Any]:
    """Trains all of them in one group, beside the same in plain tensors; a frozen one is among them."""
    spots = places()
    values = [on_grid(i, shape, torch.float32) for i, (shape, _) in enumerate(spots)]
    ours = [nn.Parameter(cut(v.clone(), where)) for v, (_, where) in zip(values, spots, strict=True)]
    theirs = [nn.Parameter(v.clone()) for v in values]
    for params in (ours, theirs):
        params[2].requires_grad_(False)
    errors: dict[str, Any] = {}
    for name in ("lamb", "stableadamw", "adafactor"):
        pair = [oput.create(name, params, lr=0.3, weight_decay=0.1, max_grad_norm=0.7) for params in (ours, theirs)]
        before = [p.detach().clone() for p in theirs]
        for step in range(STEPS):
            for i, (p, q, (shape, where)) in enumerate(zip(ours, theirs, spots, strict=True)):
                if i != 2:
                    q.grad = on_grid(100 * step + i, shape, torch.float32)
                    p.grad = cut(q.grad.clone(), where)
            norms = [float(oput.clip_grad_norm_(params, 1e9)) for params in (ours, theirs)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-6)
            for optimizer in pair:
                optimizer.step()
        errors[name] = max(
            float((p.full_tensor() if isinstance(p, DTensor) else p).sub(q).abs().max() / (q - b).abs().max())
            for i, (p, q, b) in enumerate(zip(ours, theirs, before, strict=True))
            if i != 2
        )
        with torch.no_grad():  # the next optimizer begins where both are equal
            for p, q, (_, where) in zip(ours, theirs, spots, strict=True):
                p.copy_(cut(q.detach(), where))
    kept = ours[2].full_tensor()
    return {**errors, "frozen": float((kept - values[2]).abs().max())}


def test_one_group_of_every_layout(pool: Pool) -> None:
    for found in pool.run(4, mixed):
        assert found.pop("frozen") == 0.0
        assert set(found) == {"lamb", "stableadamw", "adafactor"}
        assert all(error <= 2e-6 for error in found.values()), found


# ------------------------------------------------------------------------------------------------- partial gradients


def partial_gradients(absent: int, name: str) -> tuple[list[list[float]], float]:
    """Replicated parameters with partial gradients; one rank may have none at all."""
    mesh = init_device_mesh("cpu", (2,))
    replicated = nn.Parameter(distribute_tensor(torch.arange(1.0, 5.0), mesh, [Replicate()]))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    optimizer = oput.create(name, [replicated, sharded], lr=0.1, weight_decay=0.1)
    begun = time.monotonic()
    for _ in range(2):
        if dist.get_rank() != absent:
            terms = torch.arange(4.0) * (1 if dist.get_rank() else -2)
            replicated.grad = DTensor.from_local(terms, mesh, [Partial()])
            sharded.grad = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)], src_data_rank=None)
        optimizer.step()
    return [replicated.to_local().tolist(), sharded.to_local().flatten().tolist()], time.monotonic() - begun


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_partial_gradients_are_added_up(pool: Pool, name: str) -> None:
    p, q = nn.Parameter(torch.arange(1.0, 5.0)), nn.Parameter(torch.ones(4, 2))
    plain = oput.create(name, [p, q], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        p.grad, q.grad = -torch.arange(4.0), torch.ones(4, 2)
        plain.step()
    for (replicated, sharded), _ in pool.run(2, partial_gradients, 2, name):
        assert replicated == pytest.approx(p.tolist(), rel=1e-6)
        assert sharded == pytest.approx(q.flatten().tolist()[:4], rel=1e-6)


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_a_rank_without_gradients_holds_up_nobody(pool: Pool, name: str) -> None:
    with_all, without = pool.run(2, partial_gradients, 1, name, timeout=20.0)
    assert without[0] == [[1.0, 2.0, 3.0, 4.0], [1.0] * 4]  # what has no gradient stays
    assert with_all[0][0][3] > 4.0  # rank 0 alone gave terms of the sum: -2 * (0, 1, 2, 3)
    assert max(with_all[1], without[1]) < 5.0


def partial_costs() -> list[dict[str, int]]:
    """Collectives of an elementwise step: managed by FSDP2, replicated over a mesh by hand, and sharded."""
    counted = []
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    managed = fully_shard(nn.Linear(3, 3), mesh=square)
    loose = nn.ParameterList([distribute_tensor(torch.ones(3), square, [Replicate(), Replicate()]) for _ in range(9)])
    cut = nn.ParameterList([distribute_tensor(torch.ones(4), square["model"], [Shard(0)]) for _ in range(9)])
    for module in (managed, loose, cut):
        optimizer = oput.AdamW(module)
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        counted.append(collectives(optimizer.step))
    return counted


def test_only_what_may_be_partial_is_exchanged(pool: Pool) -> None:
    assert pool.run(4, partial_costs) == [[{}, {"allreduce_": 2}, {}]] * 4


def misplaced() -> str:
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    optimizer = oput.AdamW([("weight", p)])
    with pytest.raises(ValueError, match="'weight'") as error:
        optimizer.step()
    assert p.to_local().tolist() == [1.0, 1.0]
    return str(error.value)


def test_a_partial_gradient_of_a_sharded_parameter_is_refused(pool: Pool) -> None:
    for message in pool.run(2, misplaced):
        assert "Partial" in message
        assert "redistribute the gradient before the step" in message


# ---------------------------------------------------------------------------------------- changed after construction


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        x = torch.ones(2, 5, dtype=next(module.parameters()).dtype)
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


def colwise(module: nn.Module) -> nn.Module:
    return parallelize_module(module, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(output_layouts=Replicate())})


def rewrapped(how: str, given: str, name: str) -> str:
    """What comes of wrapping a module after its optimizer was made: the error, or "" if training goes on."""
    module = net()
    wrap: dict[str, Callable[[], Any]] = {
        "fully_shard": lambda: fully_shard(module),
        "fully_shard a part": lambda: fully_shard(module[1]),
        "tensor parallel": lambda: colwise(module),
        "assign": lambda: module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True),
        "fsdp1": lambda: FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True),
        "fsdp1 flat": lambda: FullyShardedDataParallel(module, device_id=torch.device("cpu")),
    }
    optimizer = oput.create(name, module if given == "module" else module.parameters(), lr=0.1)
    outer = wrap[how]()
    try:
        train(outer if isinstance(outer, FullyShardedDataParallel) else module, optimizer)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("how", "given", "name", "message"),
    [
        ("fully_shard", "module", "adamw", "'0.weight' was replaced .* make the optimizer after wrapping"),
        ("fully_shard", "parameters", "adamw", "parameter 0 .* was replaced .* make the optimizer after wrapping"),
        ("fully_shard a part", "parameters", "lamb", r"parameter 2 .* was replaced"),
        ("tensor parallel", "module", "adamw", "'0.weight' was replaced"),
        ("assign", "module", "sgd", "'0.weight' was replaced"),
        ("fsdp1 flat", "module", "adamw", "'0.weight' was replaced"),
        ("fsdp1", "module", "lamb", "'0.weight'.* pass the wrapped module"),
        ("fsdp1", "module", "adamw", "^$"),
    ],
)
def test_wrapped_after_the_optimizer_was_made(pool: Pool, how: str, given: str, name: str, message: str) -> None:
    for found in pool.run(2, rewrapped, how, given, name):
        assert_matches(message, found)


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text, re.DOTALL), text


def moved(change: str, name: str) -> float:
    """Training goes on after the parameters of a module moved, as it would have with them where they are now."""
    ours, theirs = net(), net()
    if change == "dtype":  # FSDP2 itself cannot change it
        ours = colwise(ours)
    else:
        fully_shard(ours)
    pair = [oput.create(name, m, lr=0.1, weight_decay=0.1) for m in (ours, theirs)]
    for module, optimizer in zip((ours, theirs), pair, strict=True):
        train(module, optimizer)
    if change == "dtype":
        for module in (ours, theirs):
            module.to(torch.float64)
    else:
        ours.load_state_dict({k: v.clone() for k, v in ours.state_dict().items()})
    assert {p.dtype for p in ours.parameters()} == {p.dtype for p in theirs.parameters()}
    for module, optimizer in zip((ours, theirs), pair, strict=True):
        train(module, optimizer)
    return max(
        float(((p.full_tensor() if isinstance(p, DTensor) else p) - q).abs().max())
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("change", ["dtype", "load"])
def test_moved_after_the_optimizer_was_made(pool: Pool, change: str, name: str) -> None:
    for error in pool.run(2, moved, change, name):
        assert error <= 1e-6


def tied() -> float:
    ours, theirs = net(), net()
    for module in (ours, theirs):
        module[1] = nn.Linear(6, 5)
        module.append(nn.Linear(5, 6, bias=False))
        module[2].weight = module[0].weight
        with torch.no_grad():
            module[1].weight.fill_(0.25)
            module[1].bias.zero_()
    fully_shard(ours[1])
    fully_shard(ours)
    for module in (ours, theirs):
        train(module, oput.Lamb(module, lr=0.1, max_grad_norm=0.5), 3)
    assert len(list(ours.parameters())) == 4
    return max(
        float((p.full_tensor() - q).abs().max()) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_tied_parameters_of_two_modules_under_fsdp2(pool: Pool) -> None:
    for error in pool.run(2, tied):
        assert error <= 1e-6


# ---------------------------------------------------------------------------------------------------------- bad input


def bad_input() -> dict[str, str]:
    ours = [dist.new_group([0]), dist.new_group([1])]
    mesh = init_device_mesh("cpu", (2,))
    sharded = fully_shard(net())
    meta = nn.Parameter(DTensor.from_local(torch.ones(2, 2, device="meta"), mesh, [Shard(0)], run_check=False))
    meta.grad = torch.ones_like(meta)
    p = nn.Parameter(torch.ones(2))
    attempts: dict[str, Callable[[], Any]] = {
        "outsider": lambda: oput.AdamW([p], shard_group=ours[1 - dist.get_rank()]),
        "sharded": lambda: oput.AdamW(sharded, shard_group=dist.group.WORLD).step(),
        "no module": lambda: oput.AdamW([p], module=[p]),  # type: ignore[arg-type]
        "device": lambda: oput.Lamb([("weight", meta)]).step(),
    }
    found = {}
    for name, attempt in attempts.items():
        with pytest.raises((ValueError, TypeError)) as error:
            attempt()
        found[name] = str(error.value)
    return found


def test_bad_groups_modules_and_devices(pool: Pool) -> None:
    for found in pool.run(2, bad_input):
        assert_matches("shard_group=.*must be a process group that this rank belongs to", found["outsider"])
        assert_matches("'0.weight'.*DTensor.*leave shard_group out", found["sharded"])
        assert_matches("module=.*must be the nn.Module", found["no module"])
        assert_matches("'weight' is on meta, but the ranks .* communicate on .*move the module", found["device"])
