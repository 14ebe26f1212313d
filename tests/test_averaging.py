"""EMA, SWA and LAWA against torch and by hand; the average in place of the parameters; what they count and refuse."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import oput_dist as oput
from oput_dist.wrappers.averaging import EMA, LAWA, SWA
from oput_dist.wrappers.lookahead import Lookahead
from tests.formulas import wrappers
from tests.layouts import Weights
from tests.parity import EXACT
from tests.toy import largest_difference, parameters, same, tensors, walk

DOUBLE = torch.float64
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ema": (EMA, {"decay": 0.8}),
    "swa": (SWA, {"start": 2, "every": 2}),
    "lawa": (LAWA, {"window": 3, "every": 2}),
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


def made(kind: str, params: Any, inner: Any = oput.AdamW, **more: Any) -> Any:
    wrapper, settings = KINDS[kind]
    return wrapper(params, inner, **settings, **{"lr": 0.05, **more})


def shown(optimizer: Any, params: list[nn.Parameter]) -> list[Tensor]:
    with optimizer.averaged():
        return [p.detach().clone() for p in params]


def history(optimizer: Any, params: list[nn.Parameter], steps: int) -> list[list[Tensor]]:
    """The parameters after each step."""
    return [walk(optimizer, params, range(step, step + 1)) for step in range(steps)]


def torchs(params: list[nn.Parameter], taken: Callable[[int], bool], steps: int, **how: Any) -> list[Tensor]:
    """What torch averages of plain AdamW's parameters."""
    model = Weights({})
    model.weights = nn.ParameterList(params)
    average, optimizer = AveragedModel(model, **how), oput.AdamW(params, lr=0.05)
    for step in range(steps):
        walk(optimizer, params, range(step, step + 1))
        if taken(step + 1):
            average.update_parameters(model)
    return [p.detach() for p in average.module.weights]


# ------------------------------------------------------------------------------------------------------- the averages


@pytest.mark.parametrize("steps", [1, 2, 13])
def test_ema_equals_torch(steps: int) -> None:
    params = parameters(DOUBLE)
    optimizer = made("ema", params)
    walk(optimizer, params, range(steps))
    wanted = torchs(parameters(DOUBLE), lambda t: True, steps, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    assert largest_difference(shown(optimizer, params), wanted) <= EXACT


@pytest.mark.parametrize("settings", [{"every": 3}, {"warmup": True, "decay": 0.999}, {"decay": 0.0}], ids=str)
def test_ema_equals_the_formula(settings: dict[str, Any]) -> None:
    params = parameters(DOUBLE)
    optimizer = EMA(params, oput.AdamW, **{"decay": 0.8, **settings})
    values = history(optimizer, params, 13)
    wanted = [wrappers.ema([v[i] for v in values], **{"decay": 0.8, **settings}) for i in range(len(params))]
    assert largest_difference(shown(optimizer, params), wanted) <= EXACT


@pytest.mark.parametrize("steps", [4, 5, 6, 13])
def test_swa_equals_torch(steps: int) -> None:
    params = parameters(DOUBLE)
    optimizer = made("swa", params)
    walk(optimizer, params, range(steps))
    wanted = torchs(parameters(DOUBLE), lambda t: t > 2 and t % 2 == 0, steps)
    assert largest_difference(shown(optimizer, params), wanted) <= EXACT


@pytest.mark.parametrize("steps", [2, 5, 6, 13])
def test_lawa_is_the_mean_of_the_last(steps: int) -> None:
    params = parameters(DOUBLE)
    optimizer = made("lawa", params)
    last = history(optimizer, params, steps)[1::2][-3:]
    wanted = [torch.stack(values).mean(0) for values in zip(*last, strict=True)]
    assert largest_difference(shown(optimizer, params), wanted) <= EXACT


@each_kind
def test_training_is_not_changed(kind: str) -> None:
    params, plain = parameters(), parameters()
    assert same(walk(made(kind, params), params, range(9)), walk(oput.AdamW(plain, lr=0.05), plain, range(9)))


@each_kind
def test_an_average_in_fp32_of_parameters_in_bf16(kind: str) -> None:
    params, whole = parameters(torch.bfloat16), parameters(torch.bfloat16)
    optimizer, other = made(kind, params, average_dtype=torch.float32), made(kind, whole)
    walk(optimizer, params, range(9))
    walk(other, whole, range(9))
    kept = [v for e in optimizer.state.values() for n, v in e.items() if n.startswith(("ema", "swa", "lawa"))]
    assert {v.dtype for v in kept} == {torch.float32}
    assert {p.dtype for p in params} == {torch.bfloat16}
    if kind == "lawa":
        assert same(shown(optimizer, params), shown(other, whole))  # snapshots are exact
    else:
        exact = [p.detach().double() for p in (entry[f"{kind}_average"] for entry in optimizer.state.values())]
        assert largest_difference([p.double() for p in shown(optimizer, params)], exact) < 0.01


@pytest.mark.parametrize("backend", ["foreach"])
@each_kind
def test_backends_agree(kind: str, backend: str) -> None:
    results = []
    for name in (backend, "eager"):
        params = parameters()
        optimizer = made(kind, params, backend=name)
        walk(optimizer, params, range(9))
        results.append(shown(optimizer, params))
    assert same(*results)


# --------------------------------------------------------------------------------------- in place of the parameters


@each_kind
def test_parameters_come_back_bitwise_and_after_errors(kind: str) -> None:
    params = [nn.Parameter(torch.stack([p.detach()] * 2, -1)[..., 0]) for p in parameters()]
    optimizer = made(kind, params)
    before = walk(optimizer, params, range(9))
    with optimizer.averaged():
        assert not same([p.detach() for p in params], before)
        with torch.no_grad():
            params[0].fill_(3.0)
    assert same([p.detach() for p in params], before)
    with pytest.raises(KeyError), optimizer.averaged():
        raise KeyError
    assert same([p.detach() for p in params], before)
    other = parameters()  # dense in memory, as the others are not
    twin = made(kind, other)
    assert same(walk(optimizer, params, range(9, 13)), walk(twin, other, range(13)))
    assert same(shown(optimizer, params), shown(twin, other))


@each_kind
def test_what_is_refused_while_the_average_is_shown(kind: str) -> None:
    params = parameters()
    optimizer = made(kind, params)
    walk(optimizer, params, range(9))
    saved = optimizer.state_dict()
    with optimizer.averaged():
        for asked in (
            optimizer.step,
            optimizer.state_dict,
            lambda: optimizer.load_state_dict(saved),
            lambda: copy.deepcopy(optimizer),
            lambda: optimizer.averaged().__enter__(),
        ):
            with pytest.raises(
                RuntimeError, match=r"inside of `with optimizer.averaged\(\):`.*: leave the block first"
            ):
                asked()
    optimizer.step()


def test_frozen_parameters_and_groups_without_an_average_stay() -> None:
    params = parameters()
    params[1].requires_grad_(False)
    optimizer = SWA(params, oput.AdamW, start=1)
    with optimizer.averaged():
        assert same([p.detach() for p in params], [p.detach() for p in parameters()])
    for step in range(3):
        for i, (p, g) in enumerate(zip(params, tensors(step), strict=True)):
            p.grad = None if i == 1 else g
        optimizer.step()
    late = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": late, "swa_start": 100})
    late.grad = torch.ones(2)
    optimizer.step()
    value = late.detach().clone()
    found = shown(optimizer, [*params, late])
    assert torch.equal(found[1], parameters()[1])
    assert torch.equal(found[-1], value)
    assert "swa_average" not in optimizer.state.get(params[1], {})
    assert [group["swa_averages"] for group in optimizer.param_groups] == [3, 0]


def test_averages_of_averages() -> None:
    """Each shows its own, the outermost first; and all of them count."""
    params = parameters()
    optimizer = made("ema", params)
    outer = SWA(Lookahead(optimizer, k=2), every=2)
    walk(outer, params, range(6))
    before = [p.detach().clone() for p in params]
    with outer.averaged():
        swa = [p.detach().clone() for p in params]
        with optimizer.averaged():
            ema = [p.detach().clone() for p in params]
        assert same([p.detach() for p in params], swa)
    assert same([p.detach() for p in params], before)
    assert not same(swa, ema)
    assert same(shown(outer.inner, params), ema)  # Lookahead passes it on
    with optimizer.averaged(), pytest.raises(RuntimeError, match=r"EMA: step\(\) inside"):
        outer.step()


# ------------------------------------------------------------------------------------------------------ what is counted


@each_kind
def test_skipped_steps_do_not_count(kind: str) -> None:
    params, plain = parameters(), parameters()
    optimizer, wanted = made(kind, params, skip_nonfinite=True), made(kind, plain)
    for step in range(9):
        for p in params:
            p.grad = torch.full_like(p, math.nan)
        optimizer.step()
        walk(optimizer, params, range(step, step + 1))
    walk(wanted, plain, range(9))
    assert optimizer.param_groups[0][f"{kind}_steps"] == 9
    assert same(shown(optimizer, params), shown(wanted, plain))


@each_kind
def test_a_step_that_only_creates_state_does_not_count(kind: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = made(kind, model, torch.optim.AdamW)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    names = {"ema": {"ema_average"}, "swa": {"swa_average"}, "lawa": {"lawa_0", "lawa_1", "lawa_2"}}[kind]
    assert all(entry.keys() >= names for entry in state.values())
    assert (optimizer.param_groups[0][f"{kind}_steps"], optimizer.param_groups[0][f"{kind}_averages"]) == (0, 0)
    params = list(model.parameters())
    with torch.no_grad():
        params[0].fill_(7.0)  # what is loaded now is where averages begin
    for _ in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert bool((shown(optimizer, params)[0] - 7).abs().max() < 1)


@pytest.mark.parametrize("inner", [torch.optim.AdamW, oput.AdamW])
@pytest.mark.parametrize("how", ["state dict", "deepcopy", "pickle"])
@each_kind
def test_resumes_bitwise(kind: str, inner: Any, how: str) -> None:
    params = parameters()
    optimizer = made(kind, params, inner)
    walk(optimizer, params, range(7))
    if how == "state dict":
        others = [nn.Parameter(p.detach().clone()) for p in params]
        twin = made(kind, others, inner, lr=9.0)
        twin.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    else:
        both = (params, optimizer)
        others, twin = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert same(shown(twin, others), shown(optimizer, params))
    assert same(walk(twin, others, range(7, 12)), walk(optimizer, params, range(7, 12)))
    assert same(shown(twin, others), shown(optimizer, params))


def test_schedules_hooks_and_closures() -> None:
    p, called = nn.Parameter(torch.ones(3)), []

    def closure() -> Tensor:
        called.append("closure")
        optimizer.zero_grad()
        (loss := (p**2).sum()).backward()
        return loss

    optimizer = EMA([p], torch.optim.SGD, lr=0.25)
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    assert float(optimizer.step(closure).detach()) == 3.0
    schedule.step()
    assert called == ["closure", "after"]
    assert optimizer.inner.param_groups[0]["lr"] == 0.125
    momo = EMA([p], oput.Momo)
    momo.step(loss=1.0)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (EMA, {"decay": 1.0}, r"decay=1.0 is not allowed: must be a number in \[0, 1\)"),
        (EMA, {"every": 0}, r"every=0 is not allowed: must be an integer >= 1"),
        (EMA, {"warmup": 3}, r"warmup=3 is not allowed: must be True or False"),
        (EMA, {"average_dtype": torch.int32}, r"average_dtype=torch.int32 is not allowed"),
        (SWA, {"start": -1}, r"start=-1 is not allowed: must be an integer >= 0"),
        (SWA, {"every": 1.5}, r"every=1.5 is not allowed"),
        (LAWA, {"window": 0}, r"window=0 is not allowed: must be an integer >= 1"),
        (LAWA, {"every": 0}, r"every=0 is not allowed"),
        (LAWA, {"average_dtype": "bf16"}, r"average_dtype='bf16' is not allowed"),
    ],
)
def test_bad_settings(kind: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: {says}"):
        kind(parameters(), oput.AdamW, **settings)


@each_kind
def test_what_cannot_be_wrapped(kind: str) -> None:
    wrapper = KINDS[kind][0]
    name = wrapper.__name__
    with pytest.raises(TypeError, match=rf"{name} wraps an optimizer: give one, {name}\(optimizer\)"):
        wrapper(parameters())
    with pytest.raises(TypeError, match=rf"is wrapped by {name} already: wrap it once"):
        wrapper(Lookahead(made(kind, parameters())))
    with pytest.raises(ValueError, match=rf"has no '{kind}_.*': it was saved without {name}"):
        made(kind, parameters()).load_state_dict(oput.AdamW(parameters()).state_dict())


def test_another_window_is_refused() -> None:
    params = parameters()
    optimizer = LAWA(params, oput.AdamW, window=2, every=1)
    walk(optimizer, params, range(3))
    with pytest.raises(ValueError, match=r"LAWA: the state of .* lacks 'lawa_2'"):
        LAWA(parameters(), oput.AdamW, window=3).load_state_dict(optimizer.state_dict())
