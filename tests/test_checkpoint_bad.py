"""State dicts that do not fit: an error on every rank that names the parameter and the remedy; nothing has changed."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, distribute_tensor

import oput_dist as oput
from tests.checkpoints import start, train
from tests.pool import Pool

Change = Callable[[dict[str, Any]], Any]


def entry(saved: dict[str, Any], name: str) -> dict[str, Any]:
    """The state of a parameter in a state dict with names."""
    keys = {n: k for g in saved["param_groups"] for k, n in zip(g["params"], g["param_names"], strict=True)}
    state: dict[str, Any] = saved["state"][keys[name]]
    return state


def missing_tensor(saved: dict[str, Any]) -> None:
    del entry(saved, "block.up.weight")["exp_avg_sq"]


def missing_counter(saved: dict[str, Any]) -> None:
    del entry(saved, "block.up.weight")["step"]


def missing_parameter(saved: dict[str, Any]) -> None:
    del saved["state"][1]


def extra_tensor(saved: dict[str, Any]) -> None:
    entry(saved, "head.weight")["momentum"] = torch.zeros(3)


def extra_parameter(saved: dict[str, Any]) -> None:
    saved["state"][99] = copy.deepcopy(saved["state"][0])


def other_shape(saved: dict[str, Any]) -> None:
    entry(saved, "block.conv.weight")["exp_avg"] = torch.zeros(4, 3, 4)


def no_tensor(saved: dict[str, Any]) -> None:
    entry(saved, "scale")["exp_avg"] = "zeros"


def complex_tensor(saved: dict[str, Any]) -> None:
    entry(saved, "scale")["exp_avg"] = torch.zeros(11, dtype=torch.complex64)


def broken_counter(saved: dict[str, Any]) -> None:
    entry(saved, "scale")["step"] = torch.tensor(float("nan"))


def several_counters(saved: dict[str, Any]) -> None:
    entry(saved, "scale")["step"] = torch.tensor([1.0, 2.0])


def no_state(saved: dict[str, Any]) -> None:
    del saved["state"]


def fewer_groups(saved: dict[str, Any]) -> None:
    del saved["param_groups"][1]
    saved["state"] = {k: v for k, v in saved["state"].items() if k in saved["param_groups"][0]["params"]}


def fewer_parameters(saved: dict[str, Any]) -> None:
    group = saved["param_groups"][1]
    del saved["state"][group["params"].pop()]
    group["param_names"].pop()


def other_groups(saved: dict[str, Any]) -> None:
    one, two = saved["param_groups"]
    for key in ("params", "param_names"):
        one[key][0], two[key][0] = two[key][0], one[key][0]


def other_optimizer(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["optimizer"] = "AdamW"


def newer_format(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["oput_format"] = 2


def bad_value(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["betas"] = (0.9, 1.5)


BAD: list[tuple[Change, str]] = [
    (missing_tensor, r"'(\w+\.)*block.up.weight' lacks 'exp_avg_sq'"),
    (missing_counter, r"'(\w+\.)*block.up.weight' lacks 'step'"),
    (missing_parameter, r"lacks the state of parameter '(\w+\.)*block.up.bias'.*state_dict\['state'\]\[1\] = \{\}"),
    (extra_tensor, r"'(\w+\.)*head.weight' has 'momentum', which this optimizer does not keep"),
    (extra_parameter, "state for 99, a parameter that is in none of its groups"),
    (
        other_shape,
        r"'exp_avg' of parameter '(\w+\.)*conv.weight'.* \(4, 3, 4\) .* \(4, 3, 2, 2\): load .*full_state_dict",
    ),
    (no_tensor, r"'exp_avg' of parameter '(\w+\.)*scale' is a str, but must be a tensor"),
    (complex_tensor, r"'exp_avg' of parameter '(\w+\.)*scale' has dtype torch.complex64"),
    (broken_counter, r"'step' of parameter '(\w+\.)*scale' is tensor\(nan\), but must be a whole number"),
    (several_counters, r"'step' of parameter '(\w+\.)*scale' is tensor\(\[1., 2.\]\), but must be a whole number"),
    (no_state, "has no 'state'"),
    (fewer_groups, r"groups hold \[5\] parameters, but this optimizer's hold \[5, 2\]; it lacks 'head.weight'"),
    (fewer_parameters, r"groups hold \[5, 1\] parameters, but this optimizer's hold \[5, 2\]; it lacks 'head.weight'"),
    (other_groups, r"'(\w+\.)*scale' is in group 1 of this optimizer, but in group 0 .*: make the groups as they were"),
    (other_optimizer, "saved by AdamW: make the same optimizer"),
    (newer_format, "group 1 .* has format 2, .* formats up to 1: upgrade oput_dist"),
    (bad_value, r"betas=\(0.9, 1.5\) is not allowed"),
]


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    """Everything that a failed load must leave alone, and where it lies."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [v for state in optimizer.state.values() for _, v in sorted(state.items())]
    local = [getattr(t, "_local_tensor", t) for t in tensors]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [(t.data_ptr(), t.tolist()) for t in local], copy.deepcopy(groups)


def attempts(layout: str, bad_ranks: list[int]) -> list[tuple[str, str, bool, float]]:
    """For each bad state dict, given to some ranks: what this rank says, whether all is as before, the seconds."""
    run = start(layout, "lamb")
    train(layout, "lamb", run, range(2))
    good = oput.full_state_dict(run.optimizer)
    found = []
    for change, _ in BAD:
        saved = copy.deepcopy(good)
        if dist.get_rank() in bad_ranks:
            change(saved)
        before, began = snapshot(run.optimizer), time.monotonic()
        try:
            run.optimizer.load_state_dict(saved)
            message = "nothing was raised"
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        found.append((change.__name__, message, snapshot(run.optimizer) == before, time.monotonic() - began))
    run.optimizer.load_state_dict(good)
    train(layout, "lamb", run, range(2, 3))
    return found


def check(found: list[tuple[str, str, bool, float]], prefix: str) -> None:
    for (name, message, unchanged, seconds), (change, text) in zip(found, BAD, strict=True):
        assert name == change.__name__
        assert re.match(f"ValueError: {prefix}Lamb: .*{text}", message), (name, message)
        assert unchanged, name
        assert seconds < 5, name


@pytest.mark.parametrize("layout", ["ddp", "zero1", "fsdp2", "fsdp1", "fsdp1flat"])
def test_every_rank_raises_the_error(pool: Pool, layout: str) -> None:
    for found in pool.run(2, attempts, layout, [0, 1]):
        check(found, "")


@pytest.mark.parametrize("layout", ["zero1", "fsdp2", "fsdp1flat"])
def test_all_ranks_refuse_what_one_rank_cannot_load(pool: Pool, layout: str) -> None:
    first, second = pool.run(2, attempts, layout, [1])
    check(second, "")
    check(first, "Lamb: nothing was changed on any rank, because of rank 1: ")


@pytest.mark.parametrize("layout", ["hsdp", "fsdp2+tp"])
def test_all_ranks_of_a_mesh_refuse_what_one_rank_cannot_load(pool: Pool, layout: str) -> None:
    replies = pool.run(4, attempts, layout, [2])
    check(replies.pop(2), "")
    for found in replies:
        check(found, "Lamb: nothing was changed on any rank, because of rank 2: ")


def different_kinds() -> str:
    """One rank is given whole tensors, the other DTensors that it would have to redistribute with it."""
    run = start("fsdp2", "lamb")
    train("fsdp2", "lamb", run, range(1))
    saved = oput.full_state_dict(run.optimizer)
    if dist.get_rank() == 1:
        mesh = next(iter(run.optimizer.state.values()))["exp_avg"].device_mesh
        for state in saved["state"].values():
            state["exp_avg"] = distribute_tensor(state["exp_avg"], mesh, [Replicate()], src_data_rank=None)
    with pytest.raises(ValueError, match="Lamb: the ranks were given different things to load") as error:
        run.optimizer.load_state_dict(saved)
    return str(error.value)


def test_ranks_must_be_given_the_same_kind(pool: Pool) -> None:
    for message in pool.run(2, different_kinds):
        assert "'exp_avg' of parameter 'scale' placed as (Replicate(),)" in message


def one_counter_for_many() -> str:
    run = start("fsdp1flat", "lamb")
    saved = oput.full_state_dict(start_and_train())
    entry(saved, "block.up.bias")["step"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match="one counter: wrap with use_orig_params=True") as error:
        run.optimizer.load_state_dict(saved)
    return str(error.value)


def start_and_train() -> Any:
    run = start("fsdp2", "lamb")
    train("fsdp2", "lamb", run, range(2))
    return run.optimizer


def test_a_flat_parameter_has_one_counter(pool: Pool) -> None:
    for message in pool.run(2, one_counter_for_many):
        assert "'block.up.weight' has made 2 steps and parameter 'block.up.bias' 1" in message


def test_errors_of_one_process_are_its_own(pool: Pool) -> None:
    """Plain parameters: nobody else is asked, and rank 1 alone loads."""
    assert pool.run(2, alone) == [None, "ValueError"]


def alone() -> str | None:
    p = nn.Parameter(torch.ones(3))
    optimizer = oput.AdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    if dist.get_rank() == 0:
        return None
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["exp_avg"]
    with pytest.raises(ValueError, match="lacks 'exp_avg'") as error:
        optimizer.load_state_dict(saved)
    return type(error.value).__name__
