"""Ranger21: its schedule, and what it needs for it. Its trajectory is in tests/cases/schedules.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import oput_dist as oput


def rates(steps: int, **options: Any) -> list[float]:
    """The learning rate of each step, as the rule sees it."""
    optimizer = oput.Ranger21([nn.Parameter(torch.ones(2))], lr=1.0, **options)
    return [optimizer.scalars(optimizer.param_groups[0], step).lr for step in range(1, steps + 1)]


@pytest.mark.parametrize("options", [{}, {"num_epochs": 3}, {"num_batches_per_epoch": 10}])
def test_without_the_length_of_the_run_it_shows_the_right_call(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"needs the length of the run: .*num_epochs=10, num_batches_per_epoch=len"):
        oput.Ranger21([nn.Parameter(torch.ones(2))], **options)


def test_without_its_schedule_it_needs_no_length() -> None:
    assert rates(3, use_warmup=False, warmdown_active=False) == [1.0] * 3


@pytest.mark.parametrize("name", ["num_epochs", "num_batches_per_epoch", "num_iterations", "num_warmup_iterations"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_lengths_are_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"Ranger21: {name}=.*an integer >= 1"):
        oput.Ranger21([nn.Parameter(torch.ones(2))], **{"num_iterations": 10, name: value})


def test_the_schedule_goes_up_stays_and_goes_down() -> None:
    found = rates(100, num_epochs=10, num_batches_per_epoch=10, num_warmup_iterations=20, warmdown_min_lr=0.1)
    assert found[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert found[20:71] == [1.0] * 51
    assert found[71:] == pytest.approx([1 - 0.9 * (i + 1) / 29 for i in range(29 - 0)][: len(found[71:])])
    assert found[-1] >= 0.1
    assert found == rates(100, num_iterations=100, num_warmup_iterations=20, warmdown_min_lr=0.1)


def test_the_default_warmup_is_2000_steps_or_22_percent_of_a_short_run() -> None:
    assert rates(1, num_iterations=100_000)[0] == pytest.approx(1 / 2000)
    assert rates(1, num_iterations=1000)[0] == pytest.approx(1 / 220)


def test_after_the_run_the_rate_stays_at_the_least() -> None:
    assert rates(60, num_iterations=50, warmdown_min_lr=0.2)[-5:] == pytest.approx([0.2] * 5)


def moved(shapes: list[tuple[int, ...]], gradient: Any, **options: Any) -> float:
    """The largest move of a parameter in four steps."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    before = [p.detach().clone() for p in params]
    optimizer = oput.Ranger21(params, lr=1e-2, num_iterations=100, use_warmup=False, **options)
    for step in range(4):
        for p in params:
            p.grad = gradient(p, torch.Generator().manual_seed(step))
        optimizer.step()
    return max((p.detach() - b).abs().max().item() for p, b in zip(params, before, strict=True))


def test_what_centring_leaves_nothing_of_does_not_move() -> None:
    """Weights of one column, and gradients that are constant along rows: rounding errors are no gradients."""

    def column(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        size = (p.shape[0], *[1] * (p.ndim - 1))
        return torch.randn(size, generator=generator).expand(p.shape) * 0.01

    assert moved([(8, 1)], column, weight_decay=0.0, normloss_factor=0.0) == 0.0
    assert moved([(8, 6), (5,)], column, weight_decay=0.0, normloss_factor=0.0) < 1.0


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_no_gradient_at_all_leaves_the_model_finite(decay: float) -> None:
    assert moved([(3, 4), (1, 5)], lambda p, _: torch.zeros_like(p), weight_decay=decay) < 0.1


def test_a_rate_of_zero_is_no_beginning_of_a_schedule() -> None:
    with pytest.raises(ValueError, match="lr=0 with its own schedule"):
        oput.Ranger21([nn.Parameter(torch.ones(2))], lr=0.0, num_iterations=10)
