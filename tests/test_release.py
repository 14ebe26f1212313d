"""Gradient release is an ordinary step to the bit, frees gradients, and refuses what it cannot do."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.utils import skip_init

import oput_dist as oput
from oput_dist.optimizers import OPTIMIZERS
from tests import releasing
from tests.pool import Pool
from tests.releasing import (
    REFUSED,
    SUPPORTED,
    apart,
    batch,
    differing,
    differing_in_one_pass,
    differing_under,
    held,
    started,
    train,
)
from tests.toy import create

FEW = ["adamw", "lamb", "adafactor", "adamwschedulefree"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone_it_is_the_ordinary_step(dtype: torch.dtype) -> None:
    assert differing("alone", SUPPORTED, dtype=dtype) == []


def test_on_two_ranks_it_is_the_ordinary_step(pool: Pool) -> None:
    assert pool.run(2, differing, "ddp", SUPPORTED) == [[], []]
    assert pool.run(2, differing_in_one_pass, SUPPORTED) == [[], []]


def partitioned(names: list[str]) -> list[str]:
    return differing("ddp", names, shard_group=dist.group.WORLD)


def test_other_layouts_and_options(pool: Pool) -> None:
    assert differing("alone", FEW, cautious=True, maximize=True) == []
    assert differing("alone", FEW, backend="eager", state_dtype=torch.float64) == []
    for wrap in ("ddp", "ddp views", "fsdp2"):  # a third is no binary fraction
        assert pool.run(3, differing, wrap, FEW) == [[], [], []]
    assert pool.run(2, partitioned, FEW) == [[], []]


def test_strided_shards_and_missing_gradients(pool: Pool) -> None:
    for layout, ranks, names in (("fsdp2", 3, FEW), ("fsdp2-hsdp", 4, FEW), ("fsdp2-tp", 4, ["adamw", "lion"])):
        assert pool.run(ranks, differing_under, layout, names) == [[]] * ranks


def test_every_other_optimizer_is_refused() -> None:
    assert set(SUPPORTED) | set(REFUSED) == set(OPTIMIZERS)
    for name, why in REFUSED.items():
        with pytest.raises(ValueError, match=why):
            started("alone", name, True)


# --------------------------------------------------------------------------------------------------------------- memory


def deep() -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(24) for layer in (nn.Linear(32, 32), nn.Tanh())))


def most_alive(wrap: str, release: bool) -> tuple[int, int]:
    """The most bytes of gradients that are alive whenever one of them becomes final, and the bytes of all."""
    torch.manual_seed(0)
    model = deep()
    if wrap == "fsdp2":
        for layer in model:
            releasing.fully_shard(layer)
        releasing.fully_shard(model)
    params = list(model.parameters())
    sizes = [0]

    def bytes_of(tensor: Tensor) -> int:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local.numel() * local.element_size()

    def look(p: Tensor) -> None:
        sizes.append(sum(bytes_of(q.grad) for q in params if q.grad is not None))

    for p in params:
        p.register_post_accumulate_grad_hook(look)  # before it is released
    optimizer = oput.AdamW(model, lr=1e-3, gradient_release=release)
    if release:
        oput.prepare_for_gradient_release(model, optimizer, ignore_existing_hooks=True)
    for _ in range(2):
        model(torch.ones(2, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return max(sizes), sum(bytes_of(p) for p in params)


@pytest.mark.parametrize("wrap", ["alone", "fsdp2"])
def test_ninety_percent_of_the_gradients_are_never_there(pool: Pool, wrap: str) -> None:
    for release in (False, True):
        for most, every in pool.run(2, most_alive, wrap, release) if wrap == "fsdp2" else [most_alive(wrap, release)]:
            assert most == every if not release else most <= 0.1 * every


def highest_memory() -> int:
    """Bytes. Not what `resource` tells: a process that is started inherits that from the one that starts it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def peaks(width: int, depth: int) -> list[float]:
    """By how much the memory of a process grows with gradient release, and then without, over its gradients' bytes."""
    model = nn.Sequential(*(skip_init(nn.Linear, width, width, bias=False) for _ in range(depth)))
    for p in model.parameters():
        nn.init.constant_(p, 1e-3)  # drawn at random they would take longer than training
    found = []
    for release in (True, False):
        optimizer = oput.SGD(model, lr=1e-9, gradient_release=release, backend="foreach")
        if release:
            oput.prepare_for_gradient_release(model, optimizer)
        before = highest_memory()
        for _ in range(2):
            model(torch.ones(1, width)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if release:
            oput.remove_gradient_release(model)
        found.append((highest_memory() - before) / sum(4 * p.numel() for p in model.parameters()))
    return found


def test_the_process_grows_by_so_much_less() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        fresh.submit(peaks, 512, 2).result()  # code is loaded, too
        released, ordinary = fresh.submit(peaks, 1024, 96).result()
    assert released + ordinary > 0.9  # the second only counts what goes beyond the first
    assert released < 0.1


# ------------------------------------------------------------------------------------------------------ around the loop


def test_removed_and_prepared_again_it_goes_on(pool: Pool) -> None:
    for result in (
        again("alone"),
        *(one for wrap in ("ddp", "ddp views", "fsdp2") for one in pool.run(2, again, wrap)),
    ):
        assert result


def again(wrap: str) -> bool:
    """With release, without, with release again: as without all the way."""
    plain, other = started(wrap, "lamb", False), started(wrap, "lamb", True)
    for steps, release in ((range(2), True), (range(2, 4), False), (range(4, 6), True)):
        train(*plain, steps)
        if release and steps.start:
            oput.prepare_for_gradient_release(*other)
        train(*other, steps)
        if release:
            oput.remove_gradient_release(other[0])
    with pytest.warns(UserWarning, match="not prepared"):
        oput.remove_gradient_release(other[0])
    return not apart(held(*other), held(*plain))


def test_loops_without_step_and_schedulers(recwarn: pytest.WarningsRecorder) -> None:
    runs = [started("alone", "adamw", release) for release in (False, True)]
    for model, optimizer in runs:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for step in range(3):
            model(batch(step)).backward()
            if not optimizer.gradient_release:
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
    assert not apart(held(*runs[1]), held(*runs[0]))
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_resumed_from_a_checkpoint() -> None:
    plain, other = started("alone", "adamw", False), started("alone", "adamw", True)
    train(*plain, range(3))
    train(*other, range(3))
    fresh = started("alone", "adamw", True)
    fresh[0].load_state_dict(copy.deepcopy(other[0].state_dict()))
    fresh[1].load_state_dict(copy.deepcopy(other[1].state_dict()))
    train(*plain, range(3, 5))
    train(*fresh, range(3, 5))
    assert not apart(held(*fresh), held(*plain))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_not_prepared(how: str) -> None:
    pair = started("alone", "adamw", True)
    train(*pair, range(2))
    model, optimizer = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = held(*pair)
    train(model, optimizer, range(2, 3))  # an ordinary step
    assert not apart(held(*pair), before)
    train(*pair, range(2, 3))
    assert not apart(held(model, optimizer), held(*pair))
    oput.prepare_for_gradient_release(model, optimizer)
    model(batch(3)).backward()
    assert all(p.grad is None for p in model.parameters())


def test_state_made_early_changes_nothing() -> None:
    plain, other = started("alone", "lamb", False), started("alone", "lamb", True)
    assert get_optimizer_state_dict(*other)["state"]
    train(*plain, range(2))
    train(*other, range(2))
    assert not apart(held(*other), held(*plain))


def test_frozen_parameters_and_those_of_nobody_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    optimizer = oput.AdamW([*model[0].parameters(), *model[1].parameters()], gradient_release=True)
    oput.prepare_for_gradient_release(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["1.weight", "1.bias"]
    assert model[2].weight.grad is not None


def test_freezing_on_the_way() -> None:
    runs = [started("alone", "adamw", release) for release in (False, True)]
    for model, optimizer in runs:
        for steps, frozen in ((range(1), False), (range(1, 3), True), (range(3, 4), False)):
            model.out.requires_grad_(not frozen)
            optimizer._plan = None  # as after loading state
            train(model, optimizer, steps)
    assert not apart(held(*runs[1]), held(*runs[0]))
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = oput.AdamW(model, gradient_release=True)
    oput.prepare_for_gradient_release(model, optimizer)
    model.bias.requires_grad_(True)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="'bias' was frozen when gradient release was prepared"):
        model(torch.ones(2)).sum().backward()
    assert torch.equal(model.weight, before)


def accumulated(wrap: str, release: bool) -> list[Any]:
    """Two passes whose gradients are not reduced, and one that reduces all."""
    model, optimizer = started(wrap, "adamw", release)
    for step in range(6):
        last = step % 3 == 2
        if wrap != "fsdp2":
            model.require_backward_grad_sync = last  # as no_sync does
        else:
            model.set_requires_gradient_sync(last)
        model(batch(step)).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return held(model, optimizer)


def both_accumulated(wrap: str) -> bool:
    return not apart(accumulated(wrap, True), accumulated(wrap, False))


@pytest.mark.parametrize("wrap", ["ddp", "ddp views", "fsdp2"])
def test_passes_without_reduction_accumulate(pool: Pool, wrap: str) -> None:
    assert pool.run(2, both_accumulated, wrap) == [True, True]


def freed(wrap: str) -> bool:
    """Whether nothing holds a prepared model and optimizer that nobody uses any more."""
    pair = started(wrap, "adamw", True)
    train(*pair, range(1))
    seen = [weakref.ref(one) for one in pair]
    del pair
    gc.collect()
    return all(one() is None for one in seen)


def test_they_are_freed_together(pool: Pool) -> None:
    assert freed("alone")
    assert pool.run(2, freed, "ddp") == [True, True]


def test_under_compile() -> None:
    runs = []
    for release in (False, True):
        model, optimizer = started("alone", "adamw", release)
        train(torch.compile(model, backend="aot_eager"), optimizer, range(2))
        runs.append(held(model, optimizer))
    assert not apart(*runs)


def test_a_made_one_that_is_not_prepared_steps_as_ever() -> None:
    model = nn.Linear(2, 2)
    optimizer = create("adamw", model, gradient_release=True)
    model(torch.ones(2)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight, before)
