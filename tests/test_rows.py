"""What is particular to the optimizers that sum over rows: SGDP, Ranger, RangerAdaBelief, CAME and Adam-mini."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import oput_dist as oput

BELIEF = oput.RangerAdaBelief


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes or ((4, 6), (5,))]


# ---------------------------------------------------------------------------------------------- what is given


def test_snippets_of_the_sources() -> None:
    """As in sources/oput-readme.md, and with the signature of optimi."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = [
            oput.Ranger(
                parameters(),
                lr=1e-3,
                alpha=0.5,
                k=6,
                N_sma_threshhold=5,
                betas=(0.95, 0.999),
                eps=1e-5,
                weight_decay=0,
            ),
            oput.Ranger(
                parameters(),
                1e-3,
                (0.9, 0.99),
                1e-2,
                1e-6,
                6,
                0.5,
                True,
                decouple_lr=False,
                max_lr=None,
                foreach=None,
                triton=None,
            ),
            oput.SGDP(
                parameters(),
                lr=1e-3,
                momentum=0,
                dampening=0,
                weight_decay=1e-2,
                nesterov=False,
                delta=0.1,
                wd_ratio=0.1,
            ),
            oput.CAME(parameters(), lr=2e-4, weight_decay=1e-2, betas=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16)),
        ]
        for optimizer in made:
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            optimizer.step()


@pytest.mark.parametrize("make", [oput.Ranger, BELIEF])
@pytest.mark.parametrize("name", ["n_sma_threshold", "N_sma_threshhold", "n_sma_threshhold"])
def test_each_spelling_of_the_threshold(make: Any, name: str) -> None:
    (group,) = make(parameters(), **{name: 7}).param_groups
    assert group["n_sma_threshold"] == 7
    assert not [key for key in group if "threshhold" in key]
    (group,) = make([{"params": parameters(), name: 7}]).param_groups
    assert group["n_sma_threshold"] == 7
    with pytest.raises(ValueError, match=r"n_sma_threshold=3.9 .*a finite number >= 4"):
        make(parameters(), **{name: 3.9})


RANGES: list[tuple[Any, dict[str, Any], str]] = [
    *[
        row
        for make in (oput.Ranger, BELIEF)
        for row in [
            *[(make, {"k": k}, r"k=.*an integer >= 1") for k in (0, -1, 2.5, True, "6", None)],
            *[(make, {"alpha": alpha}, r"alpha=.*a number in \(0, 1\]") for alpha in (0.0, 1.1, math.nan, True, "x")],
            *[(make, {"betas": betas}, r"betas=.*2 numbers in \[0, 1\)") for betas in ((0.9, 1.0), (0.9,), 0.9)],
            (make, {"eps": -1e-8}, r"eps=-1e-08 .*>= 0"),
            (make, {"use_gc": 1}, r"use_gc=1 .*True or False"),
            (make, {"gc_conv_only": None}, r"gc_conv_only=None .*True or False"),
            (make, {"decouple_wd": "no"}, r"decouple_wd='no' .*True or False"),
            (make, {"n_sma_threshold": math.inf}, r"n_sma_threshold=inf .*a finite number >= 4"),
            (make, {"n_sma_threshold": None}, r"n_sma_threshold=None .*a finite number >= 4"),
        ]
    ],
    (oput.SGDP, {"momentum": 1.0}, r"momentum=1.0 .*\[0, 1\)"),
    (oput.SGDP, {"dampening": -0.1}, r"dampening=-0.1 .*\[0, 1\)"),
    (oput.SGDP, {"nesterov": True}, r"nesterov=True .*momentum > 0"),
    (oput.SGDP, {"nesterov": 1}, r"nesterov=1 .*True or False"),
    (oput.SGDP, {"eps": 0.0}, r"eps=0.0 .*> 0"),
    (oput.SGDP, {"delta": -1.0}, r"delta=-1.0 .*>= 0"),
    (oput.SGDP, {"wd_ratio": 1.0}, r"wd_ratio=1.0 .*\[0, 1\)"),
    *[(oput.CAME, {"betas": betas}, r"betas=.*3 numbers in \[0, 1\)") for betas in ((0.9, 0.9), (0.9, 0.9, 1.0))],
    *[
        (oput.CAME, {"eps": eps}, r"eps=.*each a finite number > 0")
        for eps in (1e-8, (1e-8,), (0.0, 1e-8), (1e-8, "x"))
    ],
    (oput.CAME, {"clip_threshold": 0.0}, r"clip_threshold=0.0 .*> 0"),
    (oput.AdamMini, {"betas": (0.9, 1.0)}, r"betas=.*\[0, 1\)"),
    (oput.AdamMini, {"eps": math.nan}, r"eps=nan .*>= 0"),
    *[(oput.AdamMini, {"heads": heads}, r"heads=.*None or an integer >= 1") for heads in (0, -2, 1.5, True)],
    (oput.AdamMini, {"heads": 3}, r"heads=3 must divide the number of rows, 4 of shape \(4, 6\)"),
]


@pytest.mark.parametrize(("make", "options", "message"), RANGES, ids=lambda value: str(value)[:60])
def test_ranges(make: Any, options: dict[str, Any], message: str) -> None:
    """At construction, and when a group is added."""
    with pytest.raises(ValueError, match=f"{make.__name__}: {message}"):
        make(parameters(), **options)
    optimizer = make(parameters())
    with pytest.raises(ValueError, match=f"{make.__name__}: {message}"):
        optimizer.add_param_group({"params": parameters(), **options})
    assert len(optimizer.param_groups) == 1


def test_eps_that_leaves_nothing_of_the_adaptation() -> None:
    """Warned of once, where the optimizer is made."""
    with pytest.warns(UserWarning, match=r"^RangerAdaBelief: eps=0.001 .*write eps=1e-8 .*eps=1e-16") as warned:
        BELIEF([{"params": [p]} for p in parameters()], eps=1e-3)
    assert [w.filename for w in warned] == [__file__]
    optimizer = BELIEF(parameters())
    with pytest.warns(UserWarning, match=r"eps=0.01 "):
        optimizer.add_param_group({"params": parameters(), "eps": 1e-2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BELIEF(parameters(), eps=1e-16)


# ---------------------------------------------------------------------------------------------------- what is done


@pytest.mark.parametrize("make", [oput.Ranger, BELIEF])
def test_slow_weights_begin_as_the_parameter_before_the_first_step(make: Any) -> None:
    (p,) = params = parameters((4, 6))
    optimizer = make(params, lr=0.1, weight_decay=0.5, alpha=0.25, k=2)
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["slow_buffer"], before)
    optimizer.step()  # with a constant gradient centralised to nothing, only decay moves the parameter
    wanted = before + 0.25 * (before * 0.95**2 - before)
    torch.testing.assert_close(p.detach(), wanted)
    assert torch.equal(optimizer.state[p]["slow_buffer"], p)


@pytest.mark.parametrize("make", [oput.Ranger, BELIEF])
def test_exchanges_only_where_gradients_are_centralised(make: Any) -> None:
    def exchanges(**options: Any) -> list[int]:
        optimizer = make(parameters(), **options)
        (group,) = optimizer.param_groups
        return [optimizer.recipe(group, shape).exchanges for shape in ((), (5,), (4, 6), (4, 3, 2), (4, 3, 2, 2))]

    assert exchanges() == [0, 0, 1, 1, 1]
    assert exchanges(gc_conv_only=True) == [0, 0, 0, 0, 1]
    assert exchanges(use_gc=False) == [0, 0, 0, 0, 0]


def test_sgdp_keeps_its_momentum_apart_from_the_projection() -> None:
    (p,) = params = parameters((4, 6))
    optimizer = oput.SGDP(params, lr=0.1, momentum=0.5, delta=100.0)
    wanted = torch.zeros_like(p)
    for step in range(3):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1 + step))
        radius = p.detach().norm(dim=1)
        optimizer.step()
        wanted = 0.5 * wanted + p.grad
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], wanted)
        assert (p.detach().norm(dim=1) > radius).all()  # a step along the tangent


def test_came_of_rows_without_gradient() -> None:
    """Rows of an embedding that no token used stay as they are; those that were used move."""
    (p,) = params = parameters((4, 6))
    optimizer = oput.CAME(params, lr=0.1)
    before = p.detach().clone()
    for scale in (1.0, 1e6):
        p.grad = torch.zeros_like(p)
        p.grad[1] = scale
        optimizer.step()
    assert torch.isfinite(p).all()
    assert [torch.equal(*rows) for rows in zip(p, before, strict=True)] == [True, False, True, True]


def test_adam_mini_keeps_a_value_for_each_row() -> None:
    params = parameters((4, 6), (5,), (2, 3, 2, 2))
    optimizer = oput.AdamMini([{"params": params[:2], "heads": 2}, {"params": params[2:]}], lr=0.1)
    for p in params:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.step()
    moments = [optimizer.state[p]["exp_avg_sq"] for p in params]
    assert [tuple(v.shape) for v in moments] == [(4, 1), (), (2, 1, 1, 1)]
    squares = [p.grad**2 * 1e-3 for p in params]
    heads = torch.stack([squares[0][:2].mean(), squares[0][2:].mean()]).repeat_interleave(2).view(4, 1)
    torch.testing.assert_close(moments[0], heads)
    torch.testing.assert_close(moments[1], squares[1].mean())
    torch.testing.assert_close(moments[2], squares[2].mean((1, 2, 3), keepdim=True))
