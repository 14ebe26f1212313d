"""torch.distributed.checkpoint: what it does besides saving and loading, and what it cannot do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel

import oput_dist as oput
from tests.checkpoints import (
    ALL,
    CASES,
    HALF,
    LAYOUTS,
    START,
    UPDATE,
    Run,
    differences,
    end,
    parts,
    resumed_by_dcp,
    start,
    train,
    whole,
)
from tests.pool import Pool

TWO = [name for name, layout in LAYOUTS.items() if layout.ranks == 2]
FSDP1 = [name for name in TWO if LAYOUTS[name].fsdp1]


def straight(layout: str, case: str) -> dict[str, Any]:
    run = start(layout, case)
    train(layout, case, run, range(ALL))
    return end(run)


# ------------------------------------------------------------------------------------------------------ creating state


def early(layouts: list[str]) -> list[str]:
    """State that is created before the first step is zero, and changes no trajectory."""
    faults = []
    for layout in layouts:
        for case in LAYOUTS[layout].cases("dcp"):
            run = start(layout, case)
            state = get_optimizer_state_dict(run.module, run.optimizer)["state"]
            tensors = [v for entries in state.values() for k, v in entries.items() if k != "step"]
            local = [t for v in tensors for t in local_tensors(v)]
            if set(state) != set(whole(run.module)) or any(bool(t.any()) for t in local):
                faults.append(f"{case} under {layout}: {sorted(state)}")
            faults += [f"{name} was moved" for name, p in whole(run.module).items() if not torch.equal(p, START[name])]
            train(layout, case, run, range(ALL))
            lines = differences(end(run), straight(layout, case), 0.0)
            faults += [f"{case} under {layout}: {line}" for line in lines]
    return faults


def local_tensors(value: Any) -> list[Tensor]:
    if hasattr(value, "local_shards"):  # ShardedTensor, of FSDP1
        return [shard.tensor for shard in value.local_shards()]
    return [getattr(value, "_local_tensor", value)]


@pytest.mark.parametrize(("ranks", "layouts"), [(1, ["one"]), (2, ["ddp", *FSDP1]), (4, ["fsdp2+tp"])])
def test_making_state_early_changes_nothing(pool: Pool, ranks: int, layouts: list[str]) -> None:
    for faults in pool.run(ranks, early, layouts):
        assert not faults, "\n".join(faults)


# --------------------------------------------------------------------------------------------------------- async saves


def saved_meanwhile(layout: str, folder: str) -> list[str]:
    """A save that is still under way while training goes on holds what was when it was called.

    It needs a process group of its own: torch's thread would mix its messages with those of training.
    """
    own = dist.new_group()
    cases = LAYOUTS[layout].cases("dcp")
    runs = {case: start(layout, case) for case in cases}
    for case, run in runs.items():
        train(layout, case, run, range(HALF))
    state = {case: parts(run) for case, run in runs.items()}
    future = dcp.async_save(state, checkpoint_id=Path(folder, layout), process_group=own)
    for case, run in runs.items():
        train(layout, case, run, range(HALF, ALL))
    future.result()
    faults = []
    for case, run in resumed_by_dcp(layout, Path(folder, layout), cases).items():
        train(layout, case, run, range(HALF, ALL))
        faults += [f"{case}: {line}" for line in differences(end(run), end(runs[case]), 0.0)]
    return faults


@pytest.mark.parametrize("layout", ["ddp", "zero1", "fsdp2"])
def test_async_saves(pool: Pool, tmp_path: Path, layout: str) -> None:
    for faults in pool.run(2, saved_meanwhile, layout, str(tmp_path)):
        assert not faults, "\n".join(faults)


# ------------------------------------------------------------------------------------------------- forms of state dicts


def through(layout: str, case: str, options: dict[str, Any]) -> list[str]:
    """State goes from one optimizer to a new one in a form that torch knows; training continues bitwise."""
    form = StateDictOptions(**options)
    run = start(layout, case)
    train(layout, case, run, range(HALF))
    saved = get_optimizer_state_dict(run.module, run.optimizer, options=form)
    if options.get("broadcast_from_rank0") and dist.get_rank() > 0:
        saved = {}
    other = start(layout, case, lr=9.0)
    set_optimizer_state_dict(other.module, other.optimizer, saved, options=form)
    with torch.no_grad():
        for p, q in zip(other.module.parameters(), run.module.parameters(), strict=True):
            p.copy_(q)
    other.scheduler.load_state_dict(run.scheduler.state_dict())
    for each in (run, other):
        train(layout, case, each, range(HALF, ALL))
    return differences(end(other), end(run), 0.0)


FORMS: list[tuple[str, list[str], dict[str, Any]]] = [
    ("sharded", ["bf16", "lamb", "adafactor", "momo"], {}),
    ("whole", ["bf16", "lamb", "adafactor", "momo"], {"full_state_dict": True}),
    ("from rank 0", ["bf16", "lamb"], {"full_state_dict": True, "broadcast_from_rank0": True}),
    ("flat", ["bf16", "lamb", "adafactor"], {"flatten_optimizer_state_dict": True}),
]


def through_all(layout: str, form: int) -> list[str]:
    _, cases, options = FORMS[form]
    return [f"{case}: {line}" for case in cases for line in through(layout, case, options)]


@pytest.mark.parametrize("form", range(len(FORMS)), ids=[form[0] for form in FORMS])
@pytest.mark.parametrize("layout", ["ddp", "zero1", "fsdp2"])
def test_forms_of_state_dicts(pool: Pool, layout: str, form: int) -> None:
    for faults in pool.run(2, through_all, layout, form):
        assert not faults, "\n".join(faults)


def tensor_rate(layout: str, folder: str) -> list[str]:
    """A learning rate that is a tensor is saved and loaded; loading into a dict does not touch the optimizer's own."""

    def make(lr: float) -> Run:
        run = start(layout, "lamb")
        for group in run.optimizer.param_groups:
            group["lr"] = torch.tensor(lr)
        return run

    def go(run: Run, steps: range) -> None:
        for group in run.optimizer.param_groups:
            group["lr"].mul_(0.5)
        train(layout, "lamb", run, steps)

    run = make(0.25)
    go(run, range(HALF))
    dcp.save(without_schedule(run), checkpoint_id=folder)
    schedule = copy.deepcopy(run.scheduler.state_dict())
    go(run, range(HALF, ALL))
    other = make(9.0)
    loaded = without_schedule(other)
    dcp.load(loaded, checkpoint_id=folder)
    assert [float(group["lr"]) for group in other.optimizer.param_groups] == [9.0, 9.0]
    set_optimizer_state_dict(other.module, other.optimizer, loaded["optimizer"])
    set_model_state_dict(other.module, loaded["model"])
    other.scheduler.load_state_dict(schedule)
    assert all(isinstance(group["lr"], Tensor) for group in other.optimizer.param_groups)
    go(other, range(HALF, ALL))
    return differences(end(other), end(run), 0.0)


def without_schedule(run: Run) -> dict[str, Any]:
    """torch's schedules have rates in a list, which torch.distributed.checkpoint does not fill if they are tensors."""
    return {key: value for key, value in parts(run).items() if key != "scheduler"}


@pytest.mark.parametrize("layout", ["fsdp2"])
def test_a_learning_rate_may_be_a_tensor(pool: Pool, tmp_path: Path, layout: str) -> None:
    for faults in pool.run(2, tensor_rate, layout, str(tmp_path)):
        assert not faults, "\n".join(faults)


# ------------------------------------------------------------------------------------ what torch's FSDP1 does not carry


def vectors_under_fsdp1(layout: str) -> list[str]:
    """What torch's own functions say to state of another shape, before and after the first step."""
    run = start(layout, "adafactor")
    found = []
    for steps in (range(0), range(1)):
        train(layout, "adafactor", run, steps)
        for ask in (
            lambda: get_optimizer_state_dict(run.module, run.optimizer),
            lambda: FullyShardedDataParallel.optim_state_dict(run.module, run.optimizer),
        ):
            with pytest.raises(ValueError, match="FSDP1") as error:
                ask()
            found.append(str(error.value))
    run.optimizer.state_dict()  # for this layout and rank it is as good as any
    return found


@pytest.mark.parametrize("layout", FSDP1)
def test_state_that_fsdp1_cannot_carry_is_refused(pool: Pool, layout: str) -> None:
    for messages in pool.run(2, vectors_under_fsdp1, layout):
        for message in messages:
            assert "'row_var' of parameter '" in message
            assert "oput.full_state_dict(optimizer)" in message


def own_state_dict(layout: str) -> list[str]:
    """A rank's own state dict, pieces and all, continues on the same rank."""
    faults = []
    for case in CASES:
        run = start(layout, case)
        train(layout, case, run, range(HALF))
        optimizer, scheduler = run.optimizer.state_dict(), run.scheduler.state_dict()
        values = [p.detach().clone() for p in run.module.parameters()]
        state = {k: {n: v.clone() for n, v in s.items()} for k, s in optimizer["state"].items()}
        train(layout, case, run, range(HALF, ALL))
        other = start(layout, case, lr=9.0)
        with torch.no_grad():
            for p, value in zip(other.module.parameters(), values, strict=True):
                p.copy_(value)
        other.optimizer.load_state_dict({**optimizer, "state": state})
        other.scheduler.load_state_dict(scheduler)
        train(layout, case, other, range(HALF, ALL))
        limit = 0.0 if CASES[case].exact else UPDATE
        faults += [f"{case}: {line}" for line in differences(end(other), end(run), limit)]
    return faults


@pytest.mark.parametrize("layout", TWO)
def test_a_ranks_own_state_dict_continues_there(pool: Pool, layout: str) -> None:
    for faults in pool.run(2, own_state_dict, layout):
        assert not faults, "\n".join(faults)


def test_bare_flat_parameters_have_no_whole_state(pool: Pool) -> None:
    for message in pool.run(2, bare):
        assert "whole state cannot be put together" in message
        assert "module=fsdp_module" in message


def bare() -> str:
    module = FullyShardedDataParallel(nn.Linear(5, 3), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = oput.AdamW(module.parameters())
    with pytest.raises(ValueError, match="FSDP1") as error:
        oput.full_state_dict(optimizer)
    return str(error.value)
