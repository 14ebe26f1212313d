"""Shampoo and SOAP: libraries as oracles, roots that fail, odd gradients, staggered refreshes, who keeps what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import oput_dist as oput
from oput_dist.matrix import kronecker, roots
from oput_dist.matrix.kronecker import cut, due
from oput_dist.matrix.shampoo import Precondition
from oput_dist.matrix.work import Turn
from tests.formulas import kronecker as formulas
from tests.parity import pull
from tests.pool import Pool

SHAPES = [(6, 5), (4, 3, 2, 2), (3, 3), (7, 6)]  # a basis of a null space of two axes or more would be anyone's choice
EVERY = {"precondition_frequency": 1}
NONE = {"weight_decay": 0.0}


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def trained(
    make: Callable[..., torch.optim.Optimizer], steps: int = 13, spoil: Callable[[int, list[Any]], None] | None = None
) -> list[Tensor]:
    params = parameters()
    optimizer = make(params)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = pull(p.detach(), i, step)
        if spoil is not None:
            spoil(step, params)
        optimizer.step()
    return [p.detach() for p in params]


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert max((w - p).abs().max().item() for w, p in zip(wanted, parameters(), strict=True)) > 1e-2
    return max((f - w).abs().max().item() for f, w in zip(found, wanted, strict=True))


# ------------------------------------------------------------------------------------------------------------ libraries


def test_the_papers_rule_is_that_of_pytorch_optimizer() -> None:
    found = trained(lambda p: oput.Shampoo(p, 0.02, (0.0, 1.0), eps=1e-3, graft=None, block_size=None, **EVERY))
    wanted = trained(lambda p: pytorch_optimizer.Shampoo(p, lr=0.02, matrix_eps=1e-3))
    assert apart(found, wanted) < 1e-9


@pytest.mark.parametrize("frequency", [1, 3])
def test_soap_is_that_of_pytorch_optimizer(frequency: int) -> None:
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.0, "precondition_frequency": frequency}
    found = trained(lambda p: oput.SOAP(p, stagger=False, **options))
    wanted = trained(lambda p: pytorch_optimizer.SOAP(p, **options))
    assert apart(found, wanted) < 1e-6  # its QR decomposition is in fp32


# ------------------------------------------------------------------------------------------------------- what can fail


@pytest.mark.parametrize("method", roots.METHODS)
@pytest.mark.parametrize("root", [2.0, 4.0])
def test_inverse_roots(method: str, root: float) -> None:
    torch.manual_seed(0)
    a = torch.randn(3, 6, 6, dtype=torch.float64)
    a = a @ a.mT / 6
    ((found, good),) = roots.inverse_roots([a], root, 1e-3, method)
    back = torch.linalg.matrix_power(torch.linalg.inv(found), int(root))
    assert good is None
    assert (back - a - 1e-3 * torch.eye(6, dtype=torch.float64)).abs().max() < 1e-9


@pytest.mark.parametrize("method", roots.METHODS)
def test_a_singular_matrix_has_a_root_and_one_that_is_not_finite_has_none(method: str) -> None:
    a = torch.stack([torch.zeros(4, 4), torch.ones(4, 4), torch.full((4, 4), torch.nan), torch.eye(4)])
    ((found, good),) = roots.inverse_roots([a], 4.0, 1e-6, method)
    assert good is not None
    assert good.tolist() == [True, True, False, True]
    assert bool(torch.isfinite(found).all())
    assert (found[3] - torch.eye(4)).abs().max() < 1e-5


@pytest.mark.parametrize("make", [oput.Shampoo, oput.SOAP])
def test_a_decomposition_that_fails_in_fp32_is_made_in_fp64(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    eigh, dtypes = torch.linalg.eigh, []

    def failing(a: Tensor, **options: Any) -> Any:
        dtypes.append(a.dtype)
        if a.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(a, **options)

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(5, 4))
        optimizer = make([p], lr=0.1, **EVERY)
        for _ in range(2):
            p.grad = torch.randn(5, 4)
            optimizer.step()
        assert optimizer.report().failures == 0
        return [p.detach()]

    wanted = run()
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    assert apart_by(run(), wanted) < 1e-3
    assert torch.float64 in dtypes


def apart_by(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max((f - w).abs().max().item() for f, w in zip(found, wanted, strict=True))


def test_roots_that_cannot_be_found_stay_as_they_were_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(a: Tensor, **options: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    p = nn.Parameter(torch.ones(3, 2))
    optimizer = oput.Shampoo([p], lr=0.1, **EVERY)
    p.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])
    optimizer.step()
    before = optimizer.state[p]["root_0"].clone()
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["root_0"], before)
    assert bool(torch.isfinite(p).all())
    report = optimizer.report()
    assert (report.blocks, report.gradients, report.refreshes, report.failures) == (1, 2, 1, 1)


@pytest.mark.parametrize("make", [oput.Shampoo, oput.SOAP])
def test_without_any_root_the_grafted_step_is_taken_or_none(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(a: Tensor, **options: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    p, plain = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer, adam = make([p], lr=0.1, weight_decay=0.0, **EVERY), torch.optim.Adam([plain], lr=0.1)
    for _ in range(3):
        p.grad = plain.grad = torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 7.0]])
        optimizer.step()
        adam.step()
    wanted = plain if make is oput.Shampoo else torch.ones(3, 2)
    assert torch.allclose(p, wanted, rtol=1e-5)
    assert optimizer.report().failures == 3


@pytest.mark.parametrize("make", [oput.Shampoo, oput.SOAP])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_a_gradient_that_is_not_finite_or_zero_is_no_gradient(make: Any, bad: float) -> None:
    """The trajectory is that without the step, for this matrix; others go on."""

    def spoiling(step: int, params: list[Any]) -> None:
        if step == 4:
            params[0].grad = params[0].grad * 0 + bad

    def leaving_out(step: int, params: list[Any]) -> None:
        if step == 4:
            params[0].grad = None

    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.0, "precondition_frequency": 3, "stagger": False}
    found = trained(lambda p: make(p, **options), spoil=spoiling)
    assert all(bool(torch.isfinite(p).all()) for p in found)
    assert apart(found, trained(lambda p: make(p, **options), spoil=leaving_out)) == 0.0


@pytest.mark.parametrize("make", [oput.Shampoo, oput.SOAP])
def test_masks_as_on_gpus_give_the_same(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiling(step: int, params: list[Any]) -> None:
        if step % 4 == 2:
            params[step % 3].grad[0, 0] = torch.nan

    def run() -> list[Tensor]:
        return trained(lambda p: make(p, lr=0.02, precondition_frequency=3), spoil=spoiling)

    wanted = run()
    monkeypatch.setattr(kronecker, "READABLE", set())
    assert apart(run(), wanted) < 1e-12


@pytest.mark.parametrize("make", [oput.Shampoo, oput.SOAP])
def test_gradients_of_low_rank(make: Any) -> None:
    p = nn.Parameter(torch.ones(40, 30))
    optimizer = make([p], lr=0.01, **EVERY)
    for step in range(20):
        generator = torch.Generator().manual_seed(step % 2)
        p.grad = torch.randn(40, 1, generator=generator) @ torch.randn(1, 30, generator=generator)
        optimizer.step()
    assert bool(torch.isfinite(p).all())
    assert (p - 1).abs().max() < 20 * 0.01 * 20
    assert optimizer.report().failures == 0


# ------------------------------------------------------------------------------------------------------------ schedules


def test_what_is_staggered_is_due_in_its_phase_and_else_all_at_once() -> None:
    phases = ((0, 1), (2, 3), (0, 3))
    steps = [due(Turn(step, phases), 4, True, 1, 2) for step in range(1, 9)]
    assert steps[:4] == [[[], [1, 2]], [[1], []], [[], [0]], [[0, 2], []]]
    assert steps[4:] == steps[:4]
    assert due(Turn(4, phases), 4, True, 5, 2) == [[], []]
    together = [due(Turn(step, phases), 4, False, 3, 2) for step in range(1, 9)]
    assert [bool(places[0]) for places in together] == [False, False, True, True, False, False, False, True]
    assert all(places in ([[], []], [[0, 1, 2]] * 2) for places in together)


@pytest.mark.parametrize(("make", "formula"), [(oput.Shampoo, formulas.shampoo), (oput.SOAP, formulas.soap)])
def test_staggered_axes_are_those_of_the_formulas(make: Any, formula: Callable[..., None]) -> None:
    """The dearest comes first: the side of 6 at the first step of a period of 3, that of 5 a step before it."""
    ours = nn.Parameter(torch.linspace(-1, 1, 30, dtype=torch.float64).view(6, 5))
    wanted, memory = ours.detach().clone(), {}
    optimizer = make([ours], lr=0.02, weight_decay=0.0, precondition_frequency=3)
    for step in range(10):
        ours.grad = pull(ours.detach(), 0, step)
        formula(
            wanted, pull(wanted, 0, step), memory, step + 1, lr=0.02, precondition_frequency=3, phases=(0, 1), **NONE
        )
        optimizer.step()
    assert (ours - wanted).abs().max() < 1e-12
    assert optimizer.report().refreshes == (7 if make is oput.SOAP else 6)


def test_each_root_is_found_once_in_a_period_and_all_steps_cost_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time a block finds all of its roots; then each has its phase. A side of 8 costs as much as 8 of 4."""
    costs: list[int] = []
    method = roots.METHODS["eigh"]
    monkeypatch.setitem(
        roots.METHODS, "eigh", lambda a, *more: (costs.append(len(a) * a.shape[-1] ** 3), method(a, *more))[1]
    )
    params = [
        nn.Parameter(torch.zeros(shape)) for shape in [(4, 4)] * 4 + [(8, 8), (8, 4), (4, 4), (4, 4), (4, 4), (8, 4)]
    ]
    optimizer = oput.Shampoo(params, lr=0.1, precondition_frequency=3)
    each = []
    for _ in range(9):
        costs.clear()
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
        each.append(sum(costs) // 4**3)
    assert each[3:] == [16] * 6  # 4 sides of 8 and 16 of 4, over 3 steps
    assert sum(each[:3]) > 3 * 16


def test_blocks_cover_a_parameter_once() -> None:
    covered = torch.zeros(7, 5, 3)
    for index in cut((7, 5, 3), 3):
        covered[index] += 1
    assert bool((covered == 1).all())
    assert cut((7, 5), None) == [(slice(0, 7), slice(0, 5))]


# ------------------------------------------------------------------------------------------------------- who keeps what


def kept_on_rank(make: str, dims: list[tuple[int, int]]) -> tuple[int, int, int]:
    """Bytes that this rank keeps, gradients of blocks that it worked on, and blocks."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    generator = torch.Generator().manual_seed(2)
    values = [torch.randn(shape, generator=generator) for shape in dims]
    params = [nn.Parameter(distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)) for value in values]
    optimizer = oput.create(make, params, lr=0.1)
    seen: list[int] = []
    for p in params:
        p.grad = p.detach().clone()
    kind = {"shampoo": Precondition}.get(make) or type(optimizer.work(optimizer.param_groups[0], (2, 2)))
    call = kind.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "__call__", lambda self, g, *more: (seen.append(len(g)), call(self, g, *more))[1])
        optimizer.step()
    return oput.state_bytes(optimizer), sum(seen), optimizer.report().blocks


MIXED = [(12 + 4 * (i % 4), 16 + 8 * (i % 3)) for i in range(24)]


@pytest.mark.parametrize("make", ["shampoo", "soap"])
@pytest.mark.parametrize("n", [2, 3])
def test_each_block_is_one_ranks_and_state_is_divided(pool: Pool, make: str, n: int) -> None:
    (alone,) = pool.run(1, kept_on_rank, make, MIXED)
    ranks = pool.run(n, kept_on_rank, make, MIXED)
    assert sum(worked for _, worked, _ in ranks) == alone[1] == len(MIXED)
    assert {blocks for _, _, blocks in ranks} == {len(MIXED)}
    steps = 4 * len(MIXED)  # every rank counts the steps of every parameter
    assert sum(kept - steps for kept, _, _ in ranks) == alone[0] - steps
    assert max(kept for kept, _, _ in ranks) <= 1.1 * alone[0] / n


@pytest.mark.parametrize("make", ["shampoo", "soap", "muon"])
def test_more_ranks_than_matrices(pool: Pool, make: str) -> None:
    ranks = pool.run(4, kept_on_rank if make != "muon" else nothing_kept, make, [(5, 3), (3, 4)])
    assert sum(worked for _, worked, _ in ranks) == 2


def nothing_kept(make: str, dims: list[tuple[int, int]]) -> tuple[int, int, int]:
    from oput_dist.matrix.orthogonal import Orthogonalize

    seen: list[int] = []
    call = Orthogonalize.__call__
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(torch.ones(s), mesh, [Shard(0)], src_data_rank=None)) for s in dims]
    for p in params:
        p.grad = p.detach().clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Orthogonalize, "__call__", lambda self, g, *more: (seen.append(len(g)), call(self, g, *more))[1])
        oput.create(make, params, lr=0.1).step()
    return 0, sum(seen), 0


def moved_on_rank(make: str) -> list[Tensor]:
    """A parameter freezes and thaws, and another group comes later: owners stay, and so does what they keep."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))
    group = torch.distributed.group.WORLD if torch.distributed.get_world_size() > 1 else None
    weights = [layer.weight for layer in module]
    optimizer = oput.create(make, weights[:3], lr=0.1, shard_group=group, **EVERY)
    for step in range(5):
        if step == 2:
            optimizer.add_param_group({"params": [weights[3]]})
        weights[1].requires_grad_(step != 1)
        optimizer.zero_grad()
        module(torch.eye(6)).square().sum().backward()
        optimizer.step()
    return [p.detach() for p in weights]


@pytest.mark.parametrize("make", ["shampoo", "soap"])
def test_owners_stay_when_parameters_freeze_or_come_later(pool: Pool, make: str) -> None:
    (alone,) = pool.run(1, moved_on_rank, make)
    for ranks in pool.run(3, moved_on_rank, make):
        assert apart_by(ranks, alone) < 1e-6


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.1)}, r"betas=.* must be a tuple of a number in \[0, 1\) and one in \[0, 1\]"),
        ({"betas": (1.0, 0.9)}, "betas="),
        ({"block_size": 0}, "block_size=0 is not allowed: must be None or an integer >= 1"),
        ({"graft": "lion"}, "graft='lion' is not allowed: must be None or 'sgd' or 'adagrad'"),
        ({"exponents": (0.5, -1.0)}, "exponents="),
        ({"exponents": (0.3,), "root_method": "newton"}, r"root_method='newton' cannot take exponents=\(0.3,\)"),
        ({"stagger": 1}, "stagger=1 is not allowed: must be True or False"),
        (
            {"factor_dtype": "uint8"},
            r"factor_dtype='uint8' is not allowed: must be None or 'bfloat16' or 'int8' Did you mean 'int8'\?",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oput.Shampoo([nn.Parameter(torch.ones(2, 2))], **options)


def test_newton_schulz_of_three_axes_is_refused_before_anything_changes() -> None:
    p = nn.Parameter(torch.ones(2, 2, 2))
    p.grad = torch.ones_like(p)
    optimizer = oput.Shampoo([p], root_method="newton_schulz")
    with pytest.raises(ValueError, match=r"cannot take the root 2k = 6 of a parameter of shape \(2, 2, 2\)"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2, 2, 2))


def test_state_of_another_number_of_blocks_is_refused() -> None:
    p = nn.Parameter(torch.ones(6, 4))
    p.grad = torch.randn(6, 4)
    optimizer = oput.Shampoo([p], block_size=3)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["factor_0"] = saved["state"][0]["factor_0"][:-1]
    with pytest.raises(ValueError, match=r"'factor_0' .* has 35 elements, but must have 36"):
        oput.Shampoo([nn.Parameter(torch.ones(6, 4))], block_size=3).load_state_dict(saved)
    del saved["state"][0]["factor_0"]
    with pytest.raises(ValueError, match="lacks 'factor_0'"):
        oput.Shampoo([nn.Parameter(torch.ones(6, 4))], block_size=3).load_state_dict(saved)


@pytest.mark.parametrize("make", [oput.Shampoo, oput.SOAP])
def test_factors_in_bf16(make: Any) -> None:
    found = [
        trained(lambda p, dtype=dtype: make(p, lr=0.02, factor_dtype=dtype, eps=1e-4)) for dtype in (None, "bfloat16")
    ]
    assert 0 < apart_by(*found) < 0.15
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.randn(4, 4)
    optimizer = make([p], factor_dtype="bfloat16")
    optimizer.step()
    assert optimizer.state[p]["factor_0"].dtype == torch.bfloat16


def test_the_routing_is_printed() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    lines = oput.Shampoo(module).routing().splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["Shampoo", "AdamW", "AdamW"]
    assert "1.weight" in lines[1]
