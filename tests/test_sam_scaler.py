"""The SAM family with GradScaler, and with gradients that are not finite."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oput_dist as oput
from oput_dist.engine.step import Outcome
from oput_dist.wrappers.gsam import GSAM
from oput_dist.wrappers.lookahead import Lookahead
from oput_dist.wrappers.looksam import LookSAM
from oput_dist.wrappers.sam import SAM
from tests.test_sam import SGD, batch, closure_of, network, one_step
from tests.test_sam_contract import FAMILY, INNER, assert_same_state, every, inside, values, what_to_call
from tests.toy import largest_difference, same


def scaled_step(optimizer: Any, model: nn.Module, step: int, scaler: Any, unscale: bool = False, bad: int = 0) -> None:
    """One step by hand; ``bad`` is the pass whose loss overflows, if any."""
    optimizer.zero_grad()
    for number in (1, 2):
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y) * (float("inf") if number == bad else 1.0)
        scaler.scale(loss).backward()
        if number == 1:
            if not optimizer.needs_second_pass:
                break
            optimizer.first_step(**({"grad_scale": scaler.get_scale()} if isinstance(optimizer, GSAM) else {}))
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("unscale", [False, True])
@inside
@pytest.mark.parametrize("name", ["sam", "gsam", "looksam"])
def test_a_scaler_changes_nothing(name: str, inner: str, unscale: bool) -> None:
    options = {"k": 2} if name == "looksam" else {}
    models = [network(), network()]
    scaled, plain = (FAMILY[name](INNER[inner](model), rho=0.3, **options) for model in models)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        scaled_step(scaled, models[0], step, scaler, unscale)
        one_step(plain, closure_of(models[1], step))
    # 1e-12 beside a norm that is 1,024 times as large
    assert largest_difference(values(models[0]), values(models[1])) <= 1e-12


@pytest.mark.parametrize("around", [False, True], ids=["", "lookahead"])
@inside
@pytest.mark.parametrize("name", ["sam", "gsam", "looksam"])
def test_an_overflow_restores_and_skips(name: str, inner: str, around: bool) -> None:
    model = network()
    optimizer = FAMILY[name](INNER[inner](model), rho=0.3, **({"k": 1} if name == "looksam" else {}))
    optimizer = Lookahead(optimizer, k=2) if around else optimizer
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaled_step(optimizer, model, 0, scaler)
    before, saved = values(model), copy.deepcopy(optimizer.state_dict())
    scaled_step(optimizer, model, 1, scaler, bad=2)
    assert same(values(model), before)
    assert optimizer.outcome is Outcome.SKIPPED
    assert (optimizer.skipped, scaler.get_scale()) == (1, 32.0)
    assert_same_state(optimizer.state_dict(), saved)
    scaled_step(optimizer, model, 1, scaler)
    assert not same(values(model), before)
    assert optimizer.skipped == 1


def test_gsam_after_unscaling_asks_for_the_scale_of_the_first_pass() -> None:
    model = network()
    optimizer, scaler = GSAM(model, torch.optim.SGD, lr=0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
    before = values(model)
    scaler.scale(F.cross_entropy(model(batch(0)[0]), batch(0)[1])).backward()
    optimizer.first_step()
    scaler.scale(F.cross_entropy(model(batch(0)[0]), batch(0)[1])).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"first_step\(grad_scale=scaler.get_scale\(\)\)"):
        scaler.step(optimizer)
    assert same(values(model), before)


# ------------------------------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("value", ["inf", "nan"])
@pytest.mark.parametrize("bad", [1, 2])
@inside
@every
def test_a_pass_that_is_not_finite_skips_the_step(name: str, inner: str, bad: int, value: str) -> None:
    model = network()
    optimizer = FAMILY[name](INNER[inner](model), skip_nonfinite=True)
    optimizer.step(what_to_call(name, model, 0))
    if name == "looksam":
        optimizer.set("steps", 0)
    before, saved = values(model), copy.deepcopy(optimizer.state_dict())
    function, passes = what_to_call(name, model, 1), []

    def poisoned(*indices: Any) -> Any:
        result = function(*indices)
        passes.append(torch.is_grad_enabled())
        if sum(passes) == bad and passes[-1]:
            return result * float(value) if indices else poison(model, result, value)
        return result

    optimizer.step(poisoned)
    assert same(values(model), before)
    assert (optimizer.outcome, optimizer.skipped) == (Outcome.SKIPPED, 1)
    assert_same_state(optimizer.state_dict(), saved)
    optimizer.step(function)
    assert (optimizer.outcome, optimizer.skipped) == (Outcome.DONE, 1)
    assert not same(values(model), before)


def poison(model: nn.Module, result: Tensor, value: str) -> Tensor:
    gradient = next(model.parameters()).grad
    assert gradient is not None
    gradient[0, 0] = float(value)
    return result


def test_a_step_that_the_inner_optimizer_skips_is_not_counted() -> None:
    model = network()
    optimizer = LookSAM(oput.Lamb(model, skip_nonfinite=True), k=3)
    optimizer.step(lambda: poison(model, closure_of(model, 0)(), "inf"))
    assert (optimizer.outcome, optimizer.skipped) == (Outcome.SKIPPED, 1)
    assert optimizer.needs_second_pass


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_gradient_that_is_not_finite_perturbs_nothing(value: str) -> None:
    model = network()
    optimizer = SAM(model, *SGD[:1], **SGD[1])
    closure_of(model, 0)()
    before = values(model)
    next(model.parameters()).grad[0, 0] = float(value)
    optimizer.first_step()
    assert same(values(model), before)
