"""cautious=True: what it does to NaN, with lookahead, and when it is switched on in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import oput_dist as oput
from tests.pool import Pool
from tests.toy import create, parameters, same, walk


@pytest.mark.parametrize("backend", ["eager", "foreach", "compile"])
@pytest.mark.parametrize("name", ["adamw", "lamb", "adafactor"])
def test_nan_shows(name: str, backend: str) -> None:
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = oput.create(name, [p], lr=0.1, cautious=True, backend=backend)
    p.grad = torch.ones(4, 4)
    p.grad[1, 1] = torch.nan
    optimizer.step()
    assert p[1, 1].isnan()


@pytest.mark.parametrize("name", ["ranger", "rangeradabelief", "rangerqh", "rangerva", "ranger21"])
def test_lookahead_refuses_it(name: str) -> None:
    with pytest.raises(ValueError, match=r"cautious=True is not possible here: its lookahead"):
        create(name, parameters(), cautious=True)
    optimizer = create(name, parameters())
    optimizer.param_groups[0]["cautious"] = True
    with pytest.raises(ValueError, match="not possible here"):
        optimizer.step()


def test_switched_on_in_training_it_begins_then() -> None:
    params, other = parameters(), parameters()
    optimizer, plain = oput.AdamW(params, lr=0.05), oput.AdamW(other, lr=0.05)
    assert same(walk(optimizer, params, range(2)), walk(plain, other, range(2)))
    optimizer.param_groups[0]["cautious"] = True
    assert not same(walk(optimizer, params, range(2, 4)), walk(plain, other, range(2, 4)))


@pytest.mark.parametrize("name", ["adafactor", "came", "adammini", "lamb"])
def test_each_matrix_has_a_factor_of_its_own(name: str) -> None:
    shapes = [(7, 6), (1, 6), (3, 4), (6, 7)]
    drawn = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=drawn) for shape in shapes]
    grads = [[torch.randn(shape, generator=drawn) for shape in shapes] for _ in range(3)]
    params = [nn.Parameter(value.clone()) for value in values]
    optimizer = create(name, params, lr=0.05, weight_decay=0.1, cautious=True)
    for step in grads:
        for p, gradient in zip(params, step, strict=True):
            p.grad = gradient
        optimizer.step()
    for i, p in enumerate(params):
        other = nn.Parameter(values[i].clone())
        optimizer = create(name, [other], lr=0.05, weight_decay=0.1, cautious=True)
        for step in grads:
            other.grad = step[i]
            optimizer.step()
        assert torch.equal(p, other), shapes[i]


def switched_on_where_sums_are_impossible() -> Any:
    module = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=False)
    optimizer = oput.AdamW(module.parameters(), lr=0.1)
    for step in range(3):
        module(torch.ones(2, 4)).sum().backward()
        if step == 2:
            optimizer.param_groups[0]["cautious"] = True
            before = [p.detach().clone() for p in module.parameters()]
            with pytest.raises(ValueError, match="pass the wrapped module"):
                optimizer.step()
            return same([p.detach() for p in module.parameters()], before)
        optimizer.step()


def test_sums_that_begin_to_be_needed_are_refused_where_shapes_are_unknown(pool: Pool) -> None:
    assert pool.run(2, switched_on_where_sums_are_impossible) == [True, True]


def test_options_of_the_whole_optimizer_do_not_belong_in_a_group() -> None:
    for option in ({"max_grad_norm": 1.0}, {"state_dtype": torch.bfloat16}, {"backend": "eager"}):
        with pytest.raises(ValueError, match="holds for the whole optimizer"):
            oput.AdamW([{"params": parameters(), **option}])
    with pytest.warns(UserWarning, match="'cautios'.*'cautious'"):
        oput.AdamW([{"params": parameters(), "cautios": True}])


@pytest.mark.parametrize("name", ["adafactor", "came", "lamb"])
def test_each_parameter_has_a_factor_of_its_own(name: str) -> None:
    """Among parameters of several shapes, of which some agree more than others, each goes where it goes alone."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 3), (6, 5), (4, 3), (2, 3, 2), (5,)]
    together = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3, "cautious": True, "backend": "foreach"}
    optimizers = [oput.create(name, together, **options), *(oput.create(name, [p], **options) for p in alone)]
    for _ in range(3):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        assert (p - q).abs().max() < 1e-6
