"""Copies of an optimizer: deepcopy, pickle, and state dicts, also to and from torch's own classes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import oput_dist as oput
from tests.toy import (
    every_optimizer,
    largest_difference,
    make,
    parameters,
    same,
    trajectory,
    walk,
)


@every_optimizer
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike_and_apart(name: str, how: str) -> None:
    params = parameters()
    optimizer = make(
        name, params, max_grad_norm=0.5, maximize=True, state_dtype=torch.float64
    )  # settings are copied too
    walk(optimizer, params, range(3))
    pair = (optimizer, params)
    other, others = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    wanted = walk(optimizer, params, range(3, 6))
    assert not same(others, wanted)
    assert same(walk(other, others, range(3, 6)), wanted)
    assert same(wanted, params)


@every_optimizer
def test_state_dict_round_trip_continues_bitwise(name: str) -> None:
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"state_dtype": torch.float32}), (torch.bfloat16, {})):
        params = parameters(dtype)
        optimizer = make(name, params, **options)
        walk(optimizer, params, range(3))
        file = io.BytesIO()
        torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        fresh = [nn.Parameter(p.detach().clone()) for p in saved["params"]]
        loaded = make(name, fresh, lr=9.0, **options)
        loaded.load_state_dict(saved["optimizer"])
        for p, q in zip(params, fresh, strict=True):
            assert {k: v.dtype for k, v in loaded.state[q].items()} == {
                k: v.dtype for k, v in optimizer.state[p].items()
            }
        assert same(walk(loaded, fresh, range(3, 6)), walk(optimizer, params, range(3, 6)))


@every_optimizer
def test_state_of_bf16_parameters_may_be_fp32(name: str) -> None:
    params = parameters(torch.bfloat16)
    optimizer = make(name, params, state_dtype=torch.float32)
    walk(optimizer, params, range(1))
    wanted = {"kahan_comp": torch.bfloat16}
    assert all(v.dtype == wanted.get(k, torch.float32) for state in optimizer.state.values() for k, v in state.items())


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_names_of_state_dtypes(name: str, dtype: torch.dtype) -> None:
    params = parameters()
    optimizer = oput.Lion(params, state_dtype=name)
    walk(optimizer, params, range(1))
    assert {optimizer.state[p]["exp_avg"].dtype for p in params} == {dtype}


TORCH = [("adamw", torch.optim.AdamW, {}), ("adam", torch.optim.Adam, {"amsgrad": True})]


@pytest.mark.parametrize(("name", "theirs", "options"), TORCH, ids=[row[0] for row in TORCH])
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_state_dicts_are_torchs(name: str, theirs: Any, options: dict[str, Any], direction: str) -> None:
    """A run that changes from torch's class to ours or back half-way gives what torch alone gives."""
    settings = {"lr": 0.05, "weight_decay": 0.1, **options}
    params, alone = parameters(torch.float64), parameters(torch.float64)
    wanted = walk(theirs(alone, **settings), alone, range(6))
    first, second = (theirs, getattr(oput, theirs.__name__))[:: 1 if direction == "from torch" else -1]
    before = first(params, **settings)
    walk(before, params, range(3))
    after = second(params, **{**settings, "lr": 9.0})
    after.load_state_dict(before.state_dict())
    found = walk(after, params, range(3, 6))
    assert largest_difference(found, wanted) <= 2e-15


@every_optimizer
def test_an_early_state_dict_changes_nothing(name: str) -> None:
    params = parameters()
    optimizer = make(name, params)
    optimizer.load_state_dict(optimizer.state_dict())
    assert same(walk(optimizer, params, range(6)), trajectory(name))
