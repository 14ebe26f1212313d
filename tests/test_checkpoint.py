"""torch.distributed.checkpoint: resuming continues the trajectory, on the same layout, another one, or other ranks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from oput_dist.layout import whole_or_local
from tests.conformance import memory, on_grid
from tests.layouts import Weights
from tests.pool import Pool
from tests.toy import NAMES, NORMS, create

SHAPES: dict[str, tuple[int, ...]] = {"matrix": (7, 5), "vector": (11,), "short": (2, 3), "conv": (4, 3, 2, 2)}
START = {k: on_grid(i, shape, torch.float32) for i, (k, shape) in enumerate(SHAPES.items())}
HALF, ALL = 3, 6


def make(name: str, module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Two groups, and all state in use."""
    parameters = dict(module.named_parameters())
    groups = [
        {"params": [p for k, p in parameters.items() if k != "vector"]},
        {"params": [parameters["vector"]], "lr": 0.3, "weight_decay": 0.0},
    ]
    return create(name, groups, lr=0.1, weight_decay=0.1, **options)


class Course:
    """A model for one optimizer after the other: wrapped once, and its backward passes, which give the same each time,
    run once."""

    def __init__(self, layout: str) -> None:
        self.module = Weights(START)
        if layout == "fsdp2":
            fully_shard(self.module)
        self._options = {"shard_group": dist.group.WORLD} if layout == "zero1" else {}
        self._params = dict(self.module.named_parameters())
        self._start = {k: memory(p).clone() for k, p in self._params.items()}
        self._given: dict[int, dict[str, Tensor]] = {}

    def begin(self, name: str) -> torch.optim.Optimizer:
        """A new optimizer, and the parameters as they were."""
        for k, p in self._params.items():
            memory(p).copy_(self._start[k])
            p.grad = None
        return make(name, self.module, **self._options)

    def train(self, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            if step not in self._given:
                self.module.zero_grad()
                self.module(
                    {k: on_grid(50 * (step + 1) + i, v, torch.float32) for i, (k, v) in enumerate(SHAPES.items())}
                ).backward()
                self._given[step] = {k: p.grad for k, p in self._params.items()}
            for k, grad in self._given[step].items():
                self._params[k].grad = grad.clone()
            optimizer.step()


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {k: getattr(p.detach(), "full_tensor", p.detach)().clone() for k, p in module.named_parameters()}


def parts(module: nn.Module, optimizer: torch.optim.Optimizer, flat: bool) -> dict[str, Any]:
    """Copies, since the next optimizer has the same model."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(module, optimizer, options=options)
    return copy.deepcopy({"model": get_model_state_dict(module), "optimizer": state})


def save(layout: str, folder: str, flat: bool, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """Runs of all these optimizers, half-way, in one checkpoint: each costs a fixed time. Where they then end."""
    course, saved, ends = Course(layout), {}, {}
    for name in names:
        optimizer = course.begin(name)
        course.train(optimizer, range(HALF))
        saved[name] = parts(course.module, optimizer, flat)
        course.train(optimizer, range(HALF, ALL))
        ends[name] = whole(course.module)
    dcp.save(saved, checkpoint_id=folder)
    return ends


def resume(layout: str, folder: str, flat: bool, names: list[str]) -> dict[str, dict[str, Tensor]]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    course, optimizers, targets, ends = Course(layout), {}, {}, {}
    for name in names:
        optimizers[name] = course.begin(name)
        for group in optimizers[name].param_groups:
            group["lr"] = 9.0  # the saved one must come back
        targets[name] = parts(course.module, optimizers[name], flat)
    dcp.load(targets, checkpoint_id=folder)
    for name, optimizer in optimizers.items():
        set_model_state_dict(course.module, targets[name]["model"])
        set_optimizer_state_dict(course.module, optimizer, targets[name]["optimizer"], options=options)
        course.train(optimizer, range(HALF, ALL))
        ends[name] = whole(course.module)
    return ends


@functools.cache
def uninterrupted(name: str) -> dict[str, Tensor]:
    course = alone()
    course.train(course.begin(name), range(ALL))
    return whole(course.module)


@functools.cache
def alone() -> Course:
    return Course("plain")


def early(layout: str, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint does before the first step: it makes the state, by a step with zero gradients and lr 0."""
    course, ends = Course(layout), {}
    before = whole(course.module)
    for name in names:
        optimizer = course.begin(name)
        state = get_optimizer_state_dict(course.module, optimizer)["state"]
        assert set(state) == set(SHAPES), name
        assert all(not whole_or_local(v).any() for entries in state.values() for v in entries.values()), name
        torch.testing.assert_close(whole(course.module), before, rtol=0, atol=0)
        course.train(optimizer, range(ALL))
        ends[name] = whole(course.module)
    return ends


def check(ends: dict[str, dict[str, Tensor]], bitwise: bool = False) -> None:
    for name, found in ends.items():
        for k, wanted in uninterrupted(name).items():
            error = (found[k] - wanted).abs().max() / (wanted - START[k]).abs().max()
            assert error <= (0.0 if bitwise or name not in NORMS else 1e-6), (name, k, error)


SOME = ["adafactor", "adamw", "adamwschedulefree", "lamb", "novograd", "prodigy", "ranger21", "sm3"]
CHANGES = [  # every optimizer where all state must be cut anew, one of each kind for all other changes
    ("fsdp2", 2, "fsdp2", 3, NAMES),
    ("zero1", 3, "fsdp2", 2, NAMES),
    ("plain", 1, "fsdp2", 2, SOME),
    ("fsdp2", 4, "fsdp2", 2, SOME),
    ("fsdp2", 2, "plain", 1, SOME),
    ("zero1", 2, "zero1", 3, SOME),
    ("fsdp2", 3, "zero1", 2, SOME),
]


SAVED = {("fsdp2", 2): NAMES, ("zero1", 3): NAMES}
"""What is saved by a layout on so many ranks, here and by what follows; else some."""


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[str, list[Any]]]:
    """Where a layout saved, and where the runs of each rank ended: once for all who resume them."""

    @functools.cache
    def made(layout: str, n: int) -> tuple[str, list[Any]]:
        folder = str(tmp_path_factory.mktemp(f"{layout}{n}"))
        return folder, pool.run(n, save, layout, folder, False, SAVED.get((layout, n), SOME), timeout=240.0)

    return made


@pytest.mark.parametrize(("source", "n", "loaded", "m", "names"), CHANGES)
def test_resuming_continues(
    pool: Pool, saved: Callable[..., Any], source: str, n: int, loaded: str, m: int, names: list[str]
) -> None:
    folder, _ = saved(source, n)
    for ends in pool.run(m, resume, loaded, folder, False, names, timeout=240.0):
        assert list(ends) == names
        check(ends)


def test_resuming_continues_from_flattened_state(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, save, "fsdp2", str(tmp_path), True, SOME)
    for ends in pool.run(3, resume, "fsdp2", str(tmp_path), True, SOME):
        check(ends)


@pytest.mark.parametrize(("layout", "n", "names"), [("fsdp2", 2, NAMES), ("zero1", 3, SOME)])
def test_the_same_layout_resumes_bitwise(
    pool: Pool, saved: Callable[..., Any], layout: str, n: int, names: list[str]
) -> None:
    """To the last bit, norms and all; on each rank."""
    folder, straight = saved(layout, n)
    resumed = pool.run(n, resume, layout, folder, False, names, timeout=240.0)
    for found, wanted in zip(resumed, straight, strict=True):
        for name in names:
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(("layout", "n", "names"), [("plain", 1, NAMES), ("fsdp2", 2, NAMES), ("zero1", 2, SOME)])
def test_making_state_early_changes_no_trajectory(pool: Pool, layout: str, n: int, names: list[str]) -> None:
    for ends in pool.run(n, early, layout, names, timeout=120.0):
        assert list(ends) == names
        check(ends)
