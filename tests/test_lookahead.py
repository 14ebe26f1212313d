"""Lookahead against another library and the formula; what it counts, keeps and refuses."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import oput_dist as oput
from oput_dist.engine.wrapper import Wrapper
from oput_dist.layout import LayoutError
from oput_dist.wrappers.averaging import EMA
from oput_dist.wrappers.graft import AdaGraft
from oput_dist.wrappers.lookahead import SLOW, Lookahead
from tests.formulas import wrappers
from tests.parity import EXACT
from tests.toy import largest_difference, parameters, same, tensors, walk

DOUBLE = torch.float64
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}


def around(kind: Any, options: dict[str, Any], steps: int = 13, dtype: torch.dtype = DOUBLE, **settings: Any) -> Any:
    params = parameters(dtype)
    optimizer = Lookahead(params, kind, **settings, **options)
    return walk(optimizer, params, range(steps)), optimizer


# ------------------------------------------------------------------------------------------------------- the algorithm


@pytest.mark.parametrize("mode", ["keep", "reset", "pullback"])
@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (1, 0.3), (3, 0.8), (2, 0.99)])
@pytest.mark.parametrize("kind", [torch.optim.SGD, oput.SGD])
def test_equals_pytorch_optimizer_and_the_formula(kind: Any, k: int, alpha: float, mode: str) -> None:
    found, _ = around(kind, SGD, k=k, alpha=alpha, inner_state=mode)
    theirs = parameters(DOUBLE)
    pulled = "none" if mode == "keep" else mode
    other = pytorch_optimizer.Lookahead(torch.optim.SGD(theirs, **SGD), k=k, alpha=alpha, pullback_momentum=pulled)
    assert largest_difference(found, walk(other, theirs, range(13))) <= EXACT
    own = parameters(DOUBLE)
    how = "" if mode == "keep" else f"{mode} momentum_buffer"
    formula = wrappers.Lookahead(own, torch.optim.SGD(own, **SGD), k, alpha, how)
    assert largest_difference(found, walk(formula, own, range(13))) <= EXACT  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["keep", "reset", "pullback"])
def test_the_momentum_of_adam(mode: str) -> None:
    for kind in (torch.optim.AdamW, oput.AdamW):
        found, _ = around(kind, {"lr": 0.05, "weight_decay": 0.1}, k=3, inner_state=mode)
        own = parameters(DOUBLE)
        how = "" if mode == "keep" else f"{mode} exp_avg"
        formula = wrappers.Lookahead(own, torch.optim.AdamW(own, lr=0.05, weight_decay=0.1), 3, 0.5, how)
        assert largest_difference(found, walk(formula, own, range(13))) <= 10 * EXACT  # type: ignore[arg-type]


def test_every_momentum_of_several_is_pulled_back() -> None:
    _, optimizer = around(oput.AggMo, {"betas": (0.0, 0.9)}, steps=2, k=2, inner_state="pullback")
    entry = next(iter(optimizer.state.values()))
    assert [n for n in entry if n.startswith(SLOW)] == [SLOW, *(f"{SLOW}_momentum_buffer_{i}" for i in range(2))]
    for i in range(2):
        assert torch.equal(entry[f"momentum_buffer_{i}"], entry[f"{SLOW}_momentum_buffer_{i}"])
        assert entry[f"momentum_buffer_{i}"].abs().max() > 0


@pytest.mark.parametrize("backend", ["foreach", "compile"])
def test_backends_agree(backend: str) -> None:
    found, _ = around(oput.AdamW, {"backend": backend}, dtype=torch.float32, k=2, inner_state="pullback")
    wanted, _ = around(oput.AdamW, {"backend": "eager"}, dtype=torch.float32, k=2, inner_state="pullback")
    assert same(found, wanted)


def test_slow_weights_in_bf16() -> None:
    found, optimizer = around(oput.AdamW, {"lr": 0.05}, dtype=torch.float32, k=2, slow_dtype=torch.bfloat16)
    wanted, _ = around(oput.AdamW, {"lr": 0.05}, dtype=torch.float32, k=2)
    assert {entry[SLOW].dtype for entry in optimizer.state.values()} == {torch.bfloat16}
    assert 0 < largest_difference(found, wanted) < 0.02
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(optimizer.state_dict())
    assert {entry[SLOW].dtype for entry in twin.state.values()} == {torch.bfloat16}


@pytest.mark.parametrize("strided", [False, True])
def test_slow_weights_on_another_device(monkeypatch: pytest.MonkeyPatch, strided: bool) -> None:
    """There is no other device here: the way by which they go there and back is walked all the same."""

    def run() -> Any:
        params = parameters(DOUBLE)
        if strided:
            params = [nn.Parameter(torch.stack([p.detach()] * 2, -1)[..., 0]) for p in params]
        optimizer = Lookahead(params, oput.AdamW, k=2, slow_device="cpu", lr=0.05)
        first = walk(optimizer, params, range(5))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return first, walk(optimizer, params, range(5, 9))

    wanted = run()
    monkeypatch.setattr(Lookahead, "_far", lambda self, slot: True)
    for found, near in zip(run(), wanted, strict=True):
        assert same(found, near)


def test_slow_weights_on_the_cpu_of_what_is_sharded_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = Lookahead(params, oput.AdamW, slow_device="cpu")
    slot = SimpleNamespace(device=torch.device("cuda", 0), layout=object(), name="parameter 'w'")
    monkeypatch.setattr(optimizer, "plan", lambda: SimpleNamespace(slots=[slot]))
    with pytest.raises(LayoutError, match=r"slow_device='cpu' is for whole parameters, but parameter 'w' is sharded"):
        walk(optimizer, params, range(1))


# ------------------------------------------------------------------------------------------------------ what is counted


def test_skipped_steps_do_not_count() -> None:
    wanted, _ = around(oput.AdamW, {"lr": 0.05}, k=3)
    params = parameters(DOUBLE)
    optimizer = Lookahead(params, oput.AdamW, k=3, lr=0.05, skip_nonfinite=True)
    for step in range(13):
        if step in (0, 2, 7):
            for p in params:
                p.grad = torch.full_like(p, math.nan)
            optimizer.step()
            assert optimizer.param_groups[0]["lookahead_steps"] == step
        walk(optimizer, params, range(step, step + 1))
    assert optimizer.skipped == 3
    assert same([p.detach() for p in params], wanted)


@pytest.mark.parametrize("kind", [torch.optim.SGD, oput.SGD])
def test_grad_scaler(kind: Any) -> None:
    """An overflow is skipped, and does not count."""
    params = parameters()
    optimizer = Lookahead(params, kind, k=2, lr=0.5)
    scaler = GradScaler("cpu", init_scale=4.0, growth_interval=100)
    for step in (0, 1, 2):
        scaler.scale(torch.ones(()))
        for p, g in zip(params, tensors(100 + step), strict=True):
            p.grad = 4.0 * g if step != 1 else torch.full_like(g, math.inf)
        scaler.step(optimizer)
        scaler.update(4.0)
    other = parameters()
    twin = Lookahead(other, kind, k=2, lr=0.5)
    walk(twin, other, range(1))
    wanted = walk(twin, other, range(2, 3))
    assert optimizer.param_groups[0]["lookahead_steps"] == 2
    assert largest_difference([p.detach() for p in params], wanted) <= 1e-6


@pytest.mark.parametrize("kind", [torch.optim.AdamW, oput.AdamW])
def test_a_step_that_only_creates_state_does_not_count(kind: Any) -> None:
    """As torch.distributed.checkpoint asks for; and weights that are loaded after it are where slow weights begin."""
    model = nn.Linear(3, 2)
    optimizer = Lookahead(model, kind, k=2, lr=0.1)
    state = get_optimizer_state_dict(model, optimizer)
    assert {name for entry in state["state"].values() for name in entry} >= {SLOW, "exp_avg"}
    assert optimizer.param_groups[0]["lookahead_steps"] == 0
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(bool((p - 7).abs().max() < 1) for p in model.parameters())


def test_groups_count_for_themselves() -> None:
    params = parameters(DOUBLE)
    optimizer = Lookahead(params[:2], torch.optim.SGD, k=3, lr=0.1)
    for p, g in zip(params[:2], tensors(100, DOUBLE), strict=False):
        p.grad = g
    optimizer.step()
    optimizer.add_param_group({"params": params[2:], "lr": 0.2, "lookahead_k": 2, "lookahead_alpha": 0.9})
    found = walk(optimizer, params, range(1, 7))
    for some, lr, k, alpha, start in ((slice(0, 2), 0.1, 3, 0.5, 0), (slice(2, 4), 0.2, 2, 0.9, 1)):
        own = parameters(DOUBLE)
        formula = wrappers.Lookahead(own[some], torch.optim.SGD(own[some], lr=lr), k, alpha)
        assert largest_difference(found[some], walk(formula, own, range(start, 7))[some]) <= EXACT  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- a real torch optimizer


@pytest.mark.parametrize("mode", ["keep", "pullback"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, oput.AdamW])
@pytest.mark.parametrize("how", ["state dict", "deepcopy", "pickle"])
def test_resumes_bitwise_in_the_midst_of_a_cycle(kind: Any, mode: str, how: str) -> None:
    params = parameters()
    optimizer = Lookahead(params, kind, k=4, inner_state=mode, lr=0.05)
    walk(optimizer, params, range(6))
    if how == "state dict":
        others = [nn.Parameter(p.detach().clone()) for p in params]
        twin = Lookahead(others, kind, k=3, inner_state=mode, lr=9.0)
        twin.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    else:
        both = (params, optimizer)
        others, twin = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert same(walk(twin, others, range(6, 12)), walk(optimizer, params, range(6, 12)))
    assert twin.param_groups[0]["lookahead_k"] == 4


def test_schedules_and_hooks() -> None:
    params, called = parameters(), []
    optimizer = Lookahead(params, torch.optim.SGD, k=2, lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(2):
        walk(optimizer, params, range(step, step + 1))
        schedule.step()
    assert called == ["before", "after"] * 2
    assert optimizer.inner.param_groups[0]["lr"] == 0.25


def test_closures_and_losses_go_inside() -> None:
    p = nn.Parameter(torch.ones(3))
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    optimizer = Lookahead([p], torch.optim.SGD, k=1, alpha=0.5, lr=0.25)
    assert float(optimizer.step(closure)) == 3.0
    assert calls == [1]
    assert torch.equal(p, torch.full((3,), 0.75))
    momo = Lookahead([p], oput.Momo, k=1)
    p.grad = torch.ones(3)
    momo.step(loss=1.0)
    with pytest.raises(ValueError, match="needs the batch loss"):
        momo.step()


class Twice(Wrapper):
    """Takes the gradient anew, as SAM does."""

    prefix = "twice"

    def step(self, closure: Any = None, **extra: Any) -> Any:
        closure()
        return self.step_inner(closure)


def test_nests() -> None:
    """Around a wrapper that calls the closure twice, inside of another, and around Lamb."""
    p = nn.Parameter(torch.ones(3))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        (loss := (p**2).sum()).backward()
        return loss

    optimizer = EMA(Lookahead(Twice(oput.Lamb([p], lr=0.1, always_adapt=True), {}), k=2), decay=0.5)
    for _ in range(4):
        optimizer.step(closure)
    group = optimizer.param_groups[0]
    assert (group["lookahead_steps"], group["ema_steps"]) == (4, 4)
    assert {"step", "exp_avg", SLOW, "ema_average"} <= optimizer.state[p].keys()
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(optimizer.state_dict())
    assert torch.equal(twin.state_dict()["state"][0][SLOW], optimizer.state[p][SLOW])


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"k": 0}, r"k=0 is not allowed: must be an integer >= 1"),
        ({"k": 2.5}, r"k=2.5 is not allowed"),
        ({"alpha": 0.0}, r"alpha=0.0 is not allowed: must be a number in \(0, 1\]"),
        ({"alpha": 1.5}, r"alpha=1.5 is not allowed"),
        ({"inner_state": "none"}, r"inner_state='none' is not allowed: must be 'keep' or 'reset' or 'pullback'"),
        ({"slow_dtype": torch.int8}, r"slow_dtype=torch.int8 is not allowed"),
        ({"slow_device": "cuda"}, r"slow_device='cuda' is not allowed: must be None or 'cpu'"),
        (
            {"inner_state": "reset"},
            r"is for optimizers with momentum, and SGD here keeps none: give inner_state='keep'",
        ),
    ],
)
@pytest.mark.parametrize("kind", [torch.optim.SGD, oput.SGD])
def test_bad_settings(kind: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"Lookahead: .*{says}"):
        Lookahead(parameters(), kind, lr=0.1, **settings)


def test_settings_changed_to_bad_ones_are_found_before_anything_changes() -> None:
    params = parameters()
    optimizer = Lookahead(params, torch.optim.SGD, lr=0.1)
    optimizer.param_groups[0]["lookahead_k"] = 0
    with pytest.raises(ValueError, match=r"Lookahead: k=0 is not allowed"):
        walk(optimizer, params, range(1))
    assert same([p.detach() for p in params], [p.detach() for p in parameters()])


def test_what_cannot_be_wrapped() -> None:
    params = parameters()
    with pytest.raises(TypeError, match=r"Lookahead wraps an optimizer: give one, Lookahead\(optimizer\)"):
        Lookahead(params)
    with pytest.raises(TypeError, match=r"an optimizer was given, so 'lr' cannot be"):
        Lookahead(oput.SGD(params, lr=0.1), lr=0.1)
    with pytest.raises(TypeError, match=r"is wrapped by Lookahead already"):
        Lookahead(EMA(Lookahead(oput.SGD(params, lr=0.1))))
    for name in ("AdamWScheduleFree", "SGDScheduleFree", "Ranger", "RangerVA", "RangerQH", "Ranger21"):
        extra = {"num_iterations": 10} if name == "Ranger21" else {}
        with pytest.raises(TypeError, match=rf"Lookahead cannot wrap {name}, which keeps slow weights or an average"):
            Lookahead(EMA(getattr(oput, name)(params, **extra)))
    graft = AdaGraft(oput.SGD(params, lr=0.1), oput.AdamW(params, weight_decay=0.0))
    with pytest.raises(TypeError, match=r"inner_state='reset' is for one momentum, but AdaGraft has two optimizers"):
        Lookahead(graft, inner_state="reset")
    Lookahead(graft)


def test_state_dicts_of_others_are_refused_before_anything_changes() -> None:
    params = parameters()
    optimizer = Lookahead(oput.AdamW(params, lr=0.1))
    walk(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"has no 'lookahead_k': it was saved without Lookahead"):
        optimizer.load_state_dict(oput.AdamW(parameters()).state_dict())
    lacking = copy.deepcopy(saved)
    del lacking["state"][1][SLOW]
    with pytest.raises(ValueError, match=rf"Lookahead: the state of .* lacks '{SLOW}'"):
        optimizer.load_state_dict(lacking)
    with pytest.raises(ValueError, match=rf"'{SLOW}', which this optimizer does not keep"):
        oput.AdamW(parameters()).load_state_dict(saved)
    torch.testing.assert_close(optimizer.state_dict()["state"], saved["state"], rtol=0, atol=0)
