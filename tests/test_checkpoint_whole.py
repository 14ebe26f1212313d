"""Plain torch.save: state dicts with whole tensors, from any layout into any other."""

from __future__ import annotations

import copy
import io
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import oput_dist as oput
from tests.checkpoints import ALL, HALF, LAYOUTS, differences, distributed, end, restore, start, train, whole
from tests.conformance import on_grid
from tests.pool import Pool
from tests.toy import largest_difference


def copied(value: Any) -> Any:
    """What is left of a value after torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --------------------------------------------------------------------------------------------- what one process saved


def of_one_process(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model and ``optimizer.state_dict()`` half-way, after a plain torch.save, and where the run ends."""
    run = start("one", case)
    train("one", case, run, range(HALF))
    saved = copied({"model": whole(run.module), "optimizer": run.optimizer.state_dict()})
    train("one", case, run, range(HALF, ALL))
    return saved, end(run)


def resume_from_one(layouts: list[str], case: str, saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    faults = []
    for layout in layouts:
        run = start(layout, case, lr=9.0)
        restore(run.module, saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.scheduler.last_epoch = HALF
        train(layout, case, run, range(HALF, ALL))
        faults += [f"{layout}: {line}" for line in differences(end(run), wanted, 0.0)]
    return faults


@pytest.mark.parametrize("case", ["adamw", "bf16"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_state_dict_of_one_process_loads_under_any_layout(pool: Pool, ranks: int, case: str) -> None:
    saved, wanted = of_one_process(case)
    layouts = [name for name, layout in LAYOUTS.items() if layout.ranks == ranks]
    for faults in pool.run(ranks, resume_from_one, layouts, case, saved, wanted):
        assert not faults, "\n".join(faults)


def sharded(kind: str, values: dict[str, Tensor]) -> tuple[dict[str, nn.Parameter], dict[str, Any]]:
    module = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in values.items()})
    if kind == "fsdp2":
        fully_shard(module)
    return dict(module.items()), {"shard_group": dist.group.WORLD} if kind == "zero1" else {}


def continue_torchs(saved: dict[str, Any], values: list[Tensor]) -> list[float]:
    """torch's own AdamW stopped half-way; how far ours ends from where torch's does."""
    wanted = walk(torch.optim.AdamW, values, saved, range(3, 6), {})
    return [
        largest_difference(walk(oput.AdamW, values, saved, range(3, 6), kind), wanted)
        for kind in ({}, {"shard_group": dist.group.WORLD})
    ]


def walk(
    make: Any, values: list[Tensor], saved: dict[str, Any] | None, steps: range, options: dict[str, Any]
) -> list[Tensor]:
    params = [nn.Parameter(value.clone()) for value in values]
    optimizer = make(params, lr=0.05, **options)
    if saved is not None:
        optimizer.load_state_dict(copy.deepcopy(saved))  # torch takes the tensors themselves
    for step in steps:
        for i, p in enumerate(params):
            p.grad = on_grid(10 * step + i, tuple(p.shape), p.dtype)
        optimizer.step()
    return [p.detach() for p in params]


def test_torchs_own_state_dict_loads_into_partitioned_state(pool: Pool) -> None:
    values = [on_grid(1, (5, 3), torch.float64), on_grid(2, (7,), torch.float64)]
    params = [nn.Parameter(value.clone()) for value in values]
    optimizer = torch.optim.AdamW(params, lr=0.05)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = on_grid(10 * step + i, tuple(p.shape), p.dtype)
        optimizer.step()
    saved = copied(optimizer.state_dict())
    for errors in pool.run(2, continue_torchs, saved, [p.detach() for p in params]):
        assert max(errors) <= 2e-15


# ------------------------------------------------------------------------------------------------ what the dict holds

ODD = [-0.0, 0.0, float("nan"), float("inf"), 1e-45, -1e-45, 3.0]


def odd_bits(dtype: torch.dtype) -> list[bool]:
    """Whether -0.0, NaN, infinity and denormal numbers come back as they were, from two ranks."""
    values = torch.tensor(ODD).to(dtype).repeat(2).reshape(7, 2)
    p = nn.Parameter(torch.ones(7, 2, dtype=dtype))
    optimizer = oput.Lion([p], shard_group=dist.group.WORLD)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = values
    optimizer.load_state_dict(saved)
    found = oput.full_state_dict(optimizer)["state"][0]["exp_avg"]
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return [found.dtype == dtype, torch.equal(found.view(bits), values.view(bits))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_survive(pool: Pool, dtype: torch.dtype) -> None:
    assert pool.run(2, odd_bits, dtype) == [[True, True]] * 2


def kept() -> tuple[bool, bool]:
    run = start("fsdp2", "adamw")
    train("fsdp2", "adamw", run, range(1))
    mine = oput.full_state_dict(run.optimizer, keep=dist.get_rank() == 1)
    plain = all(
        type(v) is Tensor and v.device.type == "cpu" for s in mine.get("state", {}).values() for v in s.values()
    )
    shapes = sorted(tuple(s["exp_avg"].shape) for s in mine.get("state", {}).values())
    return mine == {}, plain and shapes == sorted(tuple(p.shape) for p in whole(run.module).values())


def test_only_ranks_that_keep_it_get_it(pool: Pool) -> None:
    assert pool.run(2, kept) == [(True, False), (False, True)]


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made under it and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not any(
            isinstance(x, Tensor) and x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() for x in args
        ):
            size = out.untyped_storage().nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(out.untyped_storage(), self._freed, size)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def peak() -> float:
    """The most memory that is live while the state is put together and not kept, in whole state tensors."""
    params = [nn.Parameter(torch.ones(64, 32)) for _ in range(6)]
    optimizer = oput.AdamW(params, shard_group=dist.group.WORLD)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with Live() as live:
        oput.full_state_dict(optimizer, keep=False)
    return live.peak / (64 * 32 * 4)


def test_no_more_than_one_whole_tensor_at_a_time(pool: Pool) -> None:
    for tensors in pool.run(2, peak):
        assert 1 <= tensors <= 1.25  # and what the ranks tell each other


# ---------------------------------------------------------------------------------------------- counters, missing state

GRADIENTS = {"always": range(6), "late": range(4, 6), "never": range(0), "twice": (0, 5), "frozen": range(0)}


def uneven(kind: str) -> dict[str, Tensor]:
    """Parameters that get gradients at other times than others; saved and loaded half-way. Where the run ends."""
    values = {name: on_grid(i, (5, 3), torch.float32) for i, name in enumerate(GRADIENTS)}

    def make() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        params, options = sharded("plain" if kind == "straight" else kind, values)
        params["frozen"].requires_grad_(False)
        return params, oput.AdamW([{"params": list(params.items())}], lr=0.1, **options)

    def go(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            for i, (name, p) in enumerate(params.items()):
                if step in GRADIENTS[name]:
                    grad = on_grid(100 * step + i, (5, 3), torch.float32)
                    p.grad = distributed(grad, p)
            optimizer.step()

    params, optimizer = make()
    go(params, optimizer, range(3))
    if kind != "straight":
        model, saved = {name: full(p) for name, p in params.items()}, copied(oput.full_state_dict(optimizer))
        assert {int(s["step"]) if s else None for s in saved["state"].values()} == {3, 1, None}
        params, optimizer = make()
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(distributed(model[name], p))
        optimizer.load_state_dict(saved)
    go(params, optimizer, range(3, 6))
    return {name: full(p) for name, p in params.items()}


def full(p: Tensor) -> Tensor:
    return getattr(p.detach(), "full_tensor", p.detach)().clone()


@pytest.mark.parametrize("kind", ["plain", "zero1", "fsdp2"])
def test_each_parameter_keeps_its_own_count(pool: Pool, kind: str) -> None:
    wanted = uneven("straight")
    for found in pool.run(2, uneven, kind):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def test_it_takes_no_other_optimizer() -> None:
    with pytest.raises(TypeError, match="oput_dist, but this is a SGD"):
        oput.full_state_dict(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
