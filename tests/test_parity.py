"""Each optimizer against another library's, or its formula: 13 steps in fp64 of a noisy quadratic, two groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import oput_dist as oput
from oput_dist.optimizers import OPTIMIZERS
from tests.cases import ORACLES
from tests.formulas import basic
from tests.parity import EXACT, STEPS, Oracle, by_formula, difference, pull, start, train


@pytest.mark.filterwarnings("ignore:You are using weight_decay")
@pytest.mark.parametrize("row", ORACLES, ids=str)
def test_equals_its_oracle(row: Oracle) -> None:
    assert difference(row.found(backend="eager"), row.wanted()) <= row.limit


def test_every_optimizer_has_an_oracle() -> None:
    compared = {row.ours.__name__.lower() for row in ORACLES}
    assert compared | {"momo", "momoadam"} >= set(OPTIMIZERS)  # tests/test_momo.py, tests/test_momoadam.py


def test_each_groups_own_lr_is_the_default_of_max_lr() -> None:
    first, second = {"lr": 0.02, "weight_decay": 0.1, "decouple_lr": True}, {"lr": 0.05}
    wanted = train(by_formula(basic.adam), {**first, "max_lr": 0.02}, {**second, "max_lr": 0.05})
    found = train(oput.AdamW, {**first, "backend": "eager"}, second)
    assert difference(found, wanted) <= EXACT


@pytest.mark.parametrize(("ours", "theirs"), [(oput.AdamW, torch.optim.AdamW), (oput.Lamb, oput.Lamb)])
def test_max_grad_norm_equals_clipping_before(ours: Any, theirs: Any) -> None:
    """``max_grad_norm`` does inside the update what torch's clip_grad_norm_ does to the gradients."""
    clipped, params = [[torch.nn.Parameter(value) for value in start()] for _ in range(2)]
    inside, after = ours(clipped, lr=0.01, max_grad_norm=0.7), theirs(params, lr=0.01)
    for step in range(STEPS):
        for each in (clipped, params):
            for i, p in enumerate(each):
                p.grad = pull(p.detach(), i, step)
        torch.nn.utils.clip_grad_norm_(params, 0.7)
        inside.step()
        after.step()
    assert difference([p.detach() for p in clipped], [p.detach() for p in params]) <= EXACT


def test_adan_betas_of_the_new_value_are_converted_with_a_warning() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match=r"write betas=\(0.98, 0.92, 0.99\)"):
        optimizer = oput.Adan([p], betas=(0.02, 0.08, 0.01))
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.98, 0.92, 0.99))
