"""What people do to optimizers between steps: torch's own optimizer tells what should come of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oput_dist as oput

Change = Callable[[torch.optim.Optimizer], Any]


def clear_state(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def new_state(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = defaultdict(dict)


def restart_counters(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state["step"] = torch.tensor(0.0)


def move_state(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def swap_parameter(optimizer: torch.optim.Optimizer) -> None:
    group = optimizer.param_groups[0]
    old, new = group["params"][0], nn.Parameter(torch.full((3,), 2.0))
    group["params"][0] = new
    optimizer.state[new] = optimizer.state.pop(old)


def append_parameter(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(4)))


def reverse_groups(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups.reverse()


def drop_group(optimizer: torch.optim.Optimizer) -> None:
    for p in optimizer.param_groups.pop(0)["params"]:
        del optimizer.state[p]


def other_hyperparameters(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["betas"], group["weight_decay"] = (0.5, 0.9), 0.3


def run(make: Callable[..., torch.optim.Optimizer], change: Change) -> list[Tensor]:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))]
    optimizer = make([{"params": params[:1]}, {"params": params[1:], "lr": 0.01}], lr=0.1)
    generator = torch.Generator().manual_seed(0)

    def steps(count: int) -> None:
        for _ in range(count):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    steps(4)
    change(optimizer)
    steps(4)
    final = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [v for state in optimizer.state_dict()["state"].values() for _, v in sorted(state.items())]
    return [p.detach() for p in final] + saved


@pytest.mark.parametrize(
    "change",
    [
        clear_state,
        new_state,
        restart_counters,
        move_state,
        swap_parameter,
        append_parameter,
        reverse_groups,
        drop_group,
        other_hyperparameters,
    ],
    ids=lambda change: change.__name__,
)
def test_as_torch_takes_it(change: Change) -> None:
    ours, theirs = run(oput.AdamW, change), run(torch.optim.AdamW, change)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_warmup_from_zero_counts_every_parameter() -> None:
    """One parameter's first gradient is zero, as of a zero-initialised layer: torch counts that step too."""

    def train(make: Callable[..., torch.optim.Optimizer]) -> list[float]:
        params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
        optimizer = make(params, lr=0.0)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 0.1 * step
            params[0].grad, params[1].grad = torch.ones(2), torch.full((2,), float(step > 0))
            optimizer.step()
        return [value for p in params for value in p.tolist()]

    assert train(oput.AdamW) == pytest.approx(train(torch.optim.AdamW), abs=1e-7)


def test_bad_values_set_later_change_nothing() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = oput.AdamW([p], lr=0.1)
    p.grad = torch.ones(2)
    optimizer.step()
    before = p.detach().clone()
    for key, value, message in (("betas", (0.9, 1.0), "betas"), ("decouple_lr", True, "max_lr")):
        good = optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = value
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        optimizer.param_groups[0][key] = good
        assert torch.equal(p, before)
        assert optimizer.state[p]["step"].item() == 1


def test_options_switched_off_do_not_spoil_the_own_checkpoint() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = oput.AdamW([p], lr=0.1, amsgrad=True)
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = False
    optimizer.step()
    other = oput.AdamW([nn.Parameter(torch.ones(2))], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert set(other.state_dict()["state"][0]) == {"exp_avg", "exp_avg_sq", "step"}


def test_a_compiled_step_works() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = oput.AdamW([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.ones(2)
    torch.compile(optimizer.step)()
    assert p.tolist() == pytest.approx([0.9, 0.9])


def test_small_gradients_after_a_large_one_count_where_beta_is_zero() -> None:
    def train(make: Callable[..., torch.optim.Optimizer]) -> list[float]:
        p = nn.Parameter(torch.zeros(2))
        optimizer = make([p], lr=0.1, betas=(0.0, 0.0))
        for gradient in (torch.full((2,), 1e6), torch.tensor([1e-3, -1e-3])):
            p.grad = gradient
            optimizer.step()
        return p.tolist()

    assert train(oput.Adam) == pytest.approx(train(torch.optim.Adam), abs=1e-5)
