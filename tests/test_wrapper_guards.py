"""What wrappers refuse, and what they must not take for something else."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import oput_dist as oput


def stepped(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: int = 1) -> torch.optim.Optimizer:
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("torch_inside", [True, False])
def test_state_of_other_options_is_refused(torch_inside: bool) -> None:
    p = nn.Parameter(torch.ones(3))
    kind = torch.optim.AdamW if torch_inside else oput.AdamW
    saved = stepped(oput.LAWA(kind([p]), window=5, every=1), p, 7).state_dict()
    target = oput.LAWA(kind([p]), window=3, every=1)
    with pytest.raises(ValueError, match="LAWA: the state dict has 'lawa_3', which this LAWA does not keep"):
        target.load_state_dict(saved)
    assert not target.state
    saved = stepped(oput.Lookahead(kind([p]), inner_state="pullback"), p).state_dict()
    with pytest.raises(ValueError, match="'lookahead_slow_exp_avg', which this Lookahead does not keep"):
        oput.Lookahead(kind([p])).load_state_dict(saved)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, oput.AdamW])
def test_a_warm_up_from_zero_counts(kind: type[torch.optim.Optimizer]) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = stepped(oput.EMA(kind([p], lr=0.0)), p, 2)
    assert optimizer.param_groups[0]["ema_steps"] == 2


def test_a_step_without_a_second_pass_is_refused_at_lr_0_too() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="second pass"):
        oput.SAM(torch.optim.SGD([p], lr=0.0)).step()


def test_optimizers_with_passes_of_their_own_are_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="SAM cannot wrap LBFGS, whose step needs a closure"):
        oput.SAM(torch.optim.LBFGS([p]))
    with pytest.raises(TypeError, match="AdaGraft cannot wrap LBFGS"):
        oput.AdaGraft(oput.SGD([p], lr=0.1), torch.optim.LBFGS([p]))


def test_schedulers_see_second_steps() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = oput.SAM(oput.SGD([p], lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    p.grad = torch.ones(3)
    optimizer.first_step(zero_grad=False)
    optimizer.second_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
