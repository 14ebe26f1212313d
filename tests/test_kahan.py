"""Kahan summation: what parameters of 16 bits lose in rounding is kept, in every backend and layout."""

from __future__ import annotations

import copy
import itertools
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

import oput_dist as oput
from benchmarks import rounding_checks
from benchmarks.checks import Setup
from benchmarks.variants import Variant
from oput_dist.kernels.language import as_torch
from oput_dist.kernels.rounding import to_bfloat16, to_float16
from tests.conformance import SHAPES, faults, gradients, start_values
from tests.layouts import Plain, Weights
from tests.pool import Pool
from tests.test_conformance import BY_NAME
from tests.test_kernels import CPU, run
from tests.toy import parameters, same, walk
from tests.wrapped import LAYOUTS

LOST = "kahan_comp"
SHORT = (torch.bfloat16, torch.float16)
ROUNDINGS = [(to_bfloat16, torch.bfloat16), (to_float16, torch.float16)]


@pytest.mark.parametrize(("rounding", "dtype"), ROUNDINGS, ids=["bfloat16", "float16"])
def test_rounding_is_that_of_a_cast(rounding: Any, dtype: torch.dtype) -> None:
    """For numbers of all sizes, ties, the largest, the smallest, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (500_000,), generator=generator).to(torch.int32)
    short = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    ties = (short[1:] + short[:-1]) / 2
    special = torch.tensor([65519.0, 65520.0, -65520.0, 65504.0, 3.4e38, torch.inf, -torch.inf, torch.nan, 0.0, -1e-45])
    small = torch.randn(100_000, generator=generator) * 1e-5
    x = torch.cat([bits.view(torch.float32), short, ties, special, small])
    torch.testing.assert_close(as_torch(rounding)(x), x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", SHORT)
def test_formula(dtype: torch.dtype) -> None:
    """``s = (p + k)(1 - lr wd) - lr g`` in fp32; ``p`` is ``s`` rounded, ``k`` the rest, rounded."""
    lr, decay = 3e-4, 0.1
    p = nn.Parameter(torch.randn(3_000, generator=torch.Generator().manual_seed(0)).to(dtype))
    wanted, lost = p.detach().clone(), torch.zeros_like(p)
    optimizer = oput.SGD([p], lr=lr, weight_decay=decay, decouple_wd=True)
    for step in range(20):
        p.grad = torch.randn(3_000, generator=torch.Generator().manual_seed(step + 1)).to(dtype)
        optimizer.step()
        total = (wanted.float() + lost.float()) * torch.tensor(1 - lr * decay, dtype=torch.float32)
        total = total - torch.tensor(lr, dtype=torch.float32) * p.grad.float()
        wanted = total.to(dtype)
        lost = (total - wanted.float()).to(dtype)
    assert torch.equal(p, wanted)
    assert torch.equal(optimizer.state[p][LOST], lost)
    assert optimizer.state[p][LOST].dtype == dtype
    assert lost.any()


# AdamW and others shrink parameters before the rule, Adan and Lamb inside; Adafactor has several stages.
DECAYING = [("adamw", 1_000), *((name, 100) for name in ("lion", "adan", "sgdw", "adafactor", "stableadamw"))]


@pytest.mark.parametrize(("name", "steps"), DECAYING, ids=[name for name, _ in DECAYING])
def test_small_decay_adds_up(name: str, steps: int) -> None:
    """Steps without gradients at lr * weight decay = 1e-4 or 1e-3, both below half a unit in the last place."""

    def decayed(dtype: torch.dtype, kahan_sum: bool | None) -> Tensor:
        p = nn.Parameter(torch.tensor([[1.0, 1.25], [-1.9375, 0.01]], dtype=dtype))
        start = p.detach().double()
        optimizer = oput.create(name, [p], lr=1 / steps, weight_decay=0.1, kahan_sum=kahan_sum)
        for _ in range(steps):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        return p.detach().double() / start

    wanted = decayed(torch.float32, None)
    assert (wanted - 0.9048).abs().max() < 2e-4
    kept = decayed(torch.bfloat16, None)
    assert ((kept - wanted).abs() / wanted).max() < 0.01
    assert torch.equal(decayed(torch.bfloat16, False), torch.ones(2, 2).double())


class Regression:
    """A small network, its data, and how well it does after a training in some dtype."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(256, 16, generator=generator)
        self.y = (self.x @ torch.randn(16, 4, generator=generator)).sin()

    def loss(self, dtype: torch.dtype, **options: Any) -> float:
        """After 300 steps of AdamW, of the parameters in fp32."""
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
        short = copy.deepcopy(model).to(dtype)
        optimizer = oput.AdamW(short, lr=1e-3, weight_decay=0.01, state_dtype=torch.float32, **options)
        for _ in range(300):
            for p, q in zip(model.parameters(), short.parameters(), strict=True):
                p.data.copy_(q.data)  # forward and backward in fp32, so that nothing but the store differs
            model.zero_grad()
            loss = (model(self.x) - self.y).square().mean()
            loss.backward()
            for p, q in zip(model.parameters(), short.parameters(), strict=True):
                q.grad = p.grad.to(dtype)  # type: ignore[union-attr]
            optimizer.step()
        return loss.item()


def test_training_as_in_fp32() -> None:
    regression = Regression()
    wanted = regression.loss(torch.float32)
    assert regression.loss(torch.bfloat16) == pytest.approx(wanted, rel=0.01)
    assert regression.loss(torch.bfloat16, kahan_sum=False) > 1.02 * wanted


# ------------------------------------------------------------------------------------------------ backends and layouts


def test_kernels_as_eager(interpreter: Executor) -> None:
    """To the bit where there are no roots and sums, whose last bit is another."""
    exact = [Variant("lion"), Variant("sgd", {"momentum": 0.9, "weight_decay": 0.1, "cautious": True})]
    bf16, fp16 = (Setup(CPU, dtype) for dtype in SHORT)
    cases = [(variant, setup, True) for variant, setup in zip(exact, (fp16, bf16), strict=True)]
    cases += [(Variant(name), bf16, False) for name in ("lamb", "adafactor")]
    run(interpreter, rounding_checks.compensated, *cases)


@pytest.mark.parametrize("backend", ["foreach", "compile"])
def test_backends_agree(backend: str) -> None:
    """To the bit, compiled too: casts that are undone at once are dropped by compilers, bit arithmetic is not."""
    setup = Setup(CPU, torch.bfloat16, backend=backend)
    assert rounding_checks.compensated(Variant("lion"), setup, exact=True).error == 0
    assert rounding_checks.compensated(Variant("sm3"), setup, exact=False).ok


def test_the_check_sees_faults() -> None:
    """A run without compensation, and one whose learning rate is off by a thousandth, are not the same."""
    setup = Setup(CPU, torch.bfloat16, backend="foreach")

    class Off(Variant):
        def build(self, params: Any, **extra: Any) -> oput.Optimizer:
            groups = [dict(group) for group in params]
            groups[0]["lr"] = 0.05 * (1.001 if extra["backend"] == "foreach" else 1.0)
            return super().build(groups, **extra)

    assert not rounding_checks.compensated(Off("lion"), setup, exact=False).ok
    assert not rounding_checks.compensated(Variant("lion", {"kahan_sum": False}), setup, exact=False).ok


WORLDS = [("columns", 3), ("grid", 4), ("fsdp2", 2), ("fsdp1-flat", 2)]
"""Beside those where all optimizers run in bf16 (test_conformance.py)."""


@pytest.mark.parametrize(("layout", "n"), WORLDS)
def test_sharding_changes_nothing(pool: Pool, layout: str, n: int) -> None:
    cases = [BY_NAME[name] for name in ("adamw", "lion", "lamb", "adafactor")]
    found = faults(pool, layout, n, list(itertools.product(cases, SHORT[:1], ["foreach"])))
    assert not found, "\n".join(found)


# ------------------------------------------------------------------------------------------------------- who keeps it


def test_who_keeps_it() -> None:
    for dtype, option, expected in (
        (torch.bfloat16, None, True),
        (torch.float16, True, True),
        (torch.bfloat16, False, False),
        (torch.float32, True, False),
        (torch.float64, None, False),
    ):
        params = parameters(dtype)
        optimizer = oput.Lion(params, kahan_sum=option, state_dtype=torch.float32)
        walk(optimizer, params, range(1))
        for p in params:
            assert (LOST in optimizer.state[p]) == expected
            assert not expected or optimizer.state[p][LOST].dtype == dtype


def test_bad_value() -> None:
    with pytest.raises(ValueError, match=r"Lion: kahan_sum='yes' is not allowed"):
        oput.Lion(parameters(), kahan_sum="yes")  # type: ignore[arg-type]


def test_a_changed_parameter_is_taken_as_it_is() -> None:
    """What was lost is at most half a unit in the last place, and anything more does not belong to the parameter."""
    p = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    optimizer = oput.SGD([p], lr=1.0)
    p.grad = torch.tensor([2.0**-9, -(2.0**-8), 2.0**-10, 0.0]).to(torch.bfloat16)  # half units below and above 1, less
    optimizer.step()
    assert optimizer.state[p][LOST].tolist() == [-(2.0**-9), 2.0**-8, -(2.0**-10), 0.0]
    p.grad.zero_()
    optimizer.step()
    assert optimizer.state[p][LOST].tolist() == [-(2.0**-9), 2.0**-8, -(2.0**-10), 0.0]
    with torch.no_grad():
        p[:3] = torch.tensor([0.0, 0.125, 64.0])
    optimizer.step()
    assert p.tolist() == [0.0, 0.125, 64.0, 1.0]
    assert optimizer.state[p][LOST].tolist() == [0.0, 0.0, -(2.0**-10), 0.0]


def test_accumulation_keeps_it() -> None:
    params = parameters(torch.bfloat16)
    optimizer = oput.AdamW(params, lr=0.01)
    walk(optimizer, params, range(2))
    before = [optimizer.state[p][LOST].clone() for p in params]
    optimizer.optimizer_accumulation = True
    walk(optimizer, params, range(2, 4))
    assert same([optimizer.state[p][LOST] for p in params], before)


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_resume_is_exact() -> None:
    whole, params = parameters(torch.bfloat16), parameters(torch.bfloat16)
    wanted = walk(oput.AdamW(whole, lr=0.01), whole, range(6))
    first = oput.AdamW(params, lr=0.01)
    walk(first, params, range(3))
    second = oput.AdamW(params, lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert same(walk(second, params, range(3, 6)), wanted)


def test_state_without_it_begins_without() -> None:
    """What was saved with ``kahan_sum=False``, or before there was any, loads; what has it loads where it is off."""
    params = parameters(torch.bfloat16)
    without = oput.AdamW(params, lr=0.01, kahan_sum=False)
    walk(without, params, range(2))
    optimizer = oput.AdamW(params, lr=0.01)
    optimizer.load_state_dict(without.state_dict())
    assert all(LOST not in optimizer.state[p] for p in params)
    walk(optimizer, params, range(2, 4))
    assert all(optimizer.state[p][LOST].any() for p in params[:2])
    without.load_state_dict(optimizer.state_dict())
    assert all(LOST not in without.state[p] for p in params)


def held_by_ranks(layout: str) -> tuple[list[Tensor], list[Tensor]]:
    """Whole parameters, and what rounding lost of them, after two steps."""
    shards = LAYOUTS[layout]()
    params = shards.start(start_values(torch.bfloat16))
    case = BY_NAME["adamw"]
    optimizer = case.build(params, **shards.options)
    for step in range(2):
        shards.give(params, gradients(step, torch.bfloat16, False))
        case.advance(optimizer, step)
    saved = oput.full_state_dict(optimizer)  # type: ignore[arg-type]
    wholes = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in params.values()]
    return [w.detach().clone() for w in wholes], [entry[LOST] for entry in saved["state"].values()]


@pytest.mark.parametrize(("layout", "n"), [("rows", 3), ("zero1", 2), ("grid", 4)])
def test_whole_state_is_that_of_one_process(pool: Pool, layout: str, n: int) -> None:
    """Bitwise, so that it goes on anywhere."""
    plain = Plain()
    params = plain.start(start_values(torch.bfloat16))
    optimizer = BY_NAME["adamw"].build(params)
    for step in range(2):
        plain.give(params, gradients(step, torch.bfloat16, False))
        optimizer.step()
    order = [name for half in (list(SHAPES)[0::2], list(SHAPES)[1::2]) for name in half]  # of the groups
    for values, lost in pool.run(n, held_by_ranks, layout):
        assert same(values, [p.detach() for p in params.values()])
        assert same(lost, [optimizer.state[params[name]][LOST] for name in order])


def resharded(folder: str, saves: bool) -> list[Tensor]:
    """Under fully_shard, three steps and a checkpoint; or, on other ranks, that checkpoint and three more."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(_weights())
    optimizer = oput.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    if saves:
        _descend(model, optimizer, range(3))
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    if saves:
        dcp.save(parts, checkpoint_id=folder)
    else:
        dcp.load(parts, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
        _descend(model, optimizer, range(3, 6))
    return [p.full_tensor().detach() for p in model.parameters()]


def _weights() -> Weights:
    """Without the 0-d parameter, which fully_shard does not take."""
    return Weights({name: value for name, value in start_values(torch.bfloat16).items() if value.ndim})


def _descend(model: nn.Module, optimizer: oput.Optimizer, steps: range) -> None:
    for step in steps:
        for name, p in model.named_parameters():
            values = gradients(step, torch.bfloat16, False)[name]
            mesh, placements = getattr(p, "device_mesh", None), getattr(p, "placements", None)
            p.grad = values if mesh is None else distribute_tensor(values, mesh, placements, src_data_rank=None)
        optimizer.step()


def test_checkpoints_reshard(pool: Pool, tmp_path: Path) -> None:
    """From two ranks to three, through torch.distributed.checkpoint, and on as one process, to the bit."""
    pool.run(2, resharded, str(tmp_path), True)
    model = _weights()
    _descend(model, oput.AdamW(model, lr=1e-3, weight_decay=0.1), range(6))
    for found in pool.run(3, resharded, str(tmp_path), False):
        assert same(found, [p.detach() for p in model.parameters()])


# ----------------------------------------------------------------------------------- what rewrites parameters elsewhere


def test_lookahead_keeps_the_sum() -> None:
    """Weights meet in fp32 with what was lost: as those of fp32 parameters, within a unit of the remainder."""

    def trained(dtype: torch.dtype) -> list[Tensor]:
        params = [nn.Parameter(torch.ones(64, dtype=dtype))]
        inner = oput.SGD(params, lr=1e-4)
        optimizer = oput.Lookahead(inner, k=2, slow_dtype=torch.float32)
        for step in range(40):
            params[0].grad = torch.linspace(0.5, 1, 64).to(dtype) * (1 + step % 3)
            optimizer.step()
        lost = inner.state[params[0]].get(LOST, torch.zeros(64))
        return [params[0].detach().double() + lost.double()]

    (wanted,), (found,) = trained(torch.float32), trained(torch.bfloat16)
    assert (1 - wanted).min() > 1e-3
    assert ((found - wanted).abs() / (1 - wanted)).max() < 0.05


def test_switching_modes_keeps_the_sum() -> None:
    """eval() and train() of schedule-free optimizers, again and again, lose nothing that a store would."""
    params = parameters(torch.bfloat16)
    optimizer = oput.AdamWScheduleFree(params, lr=0.01, state_dtype=torch.float32)
    walk(optimizer, params, range(4))
    sums = [p.detach().float() + optimizer.state[p][LOST].float() for p in params]
    for _ in range(20):
        optimizer.eval()
        optimizer.train()
    for p, before in zip(params, sums, strict=True):
        assert ((p.float() + optimizer.state[p][LOST].float() - before).abs() <= 2e-4 * before.abs() + 1e-5).all()


def test_grafts_have_none() -> None:
    params = parameters(torch.bfloat16)
    graft = oput.AdaGraft(oput.SGD(params, lr=0.1), oput.AdamW(params, lr=0.1, weight_decay=0.0))
    walk(graft, params, range(2))
    assert not any(LOST in entry or f"direction_{LOST}" in entry for entry in graft.state.values())
