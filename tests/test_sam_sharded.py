"""The SAM family under every kind of sharding: one trajectory, one all-reduce, and ranks that agree."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import oput_dist as oput
from oput_dist.engine.step import Outcome
from oput_dist.layout import whole_or_local
from oput_dist.wrappers.esam import ESAM
from oput_dist.wrappers.gsam import GSAM
from oput_dist.wrappers.looksam import LookSAM
from oput_dist.wrappers.sam import ASAM, SAM
from tests.layouts import Layout
from tests.meshes import world_mesh
from tests.pool import Pool
from tests.toy import largest_difference, same
from tests.wrapped import LAYOUTS

LIMIT = 1e-12
FAMILY: dict[str, tuple[Any, dict[str, Any]]] = {
    "sam": (SAM, {"rho": 0.2}),
    "asam": (ASAM, {"rho": 0.5, "eta": 0.01}),
    "gsam": (GSAM, {"rho": 0.3}),
    "looksam": (LookSAM, {"rho": 0.3, "k": 2}),
    "esam": (ESAM, {"rho": 0.3, "beta": 0.5, "gamma": 1.0}),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Place:
    """A model under one kind of sharding, and this rank's share of the batches."""

    def __init__(self, kind: str) -> None:
        self.kind, self.options = kind, {}
        model: Any = network()
        if kind in ("ddp", "zero1"):
            model = DistributedDataParallel(model)
            self.options = {"shard_group": dist.group.WORLD} if kind == "zero1" else {}
        elif kind in ("fsdp2", "hsdp"):
            shape = (2, 2) if kind == "hsdp" else (dist.get_world_size(),)
            mesh = world_mesh(shape, ("replicate", "shard")[-len(shape) :])
            fully_shard(model[2], mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif kind == "tp":
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(model, world_mesh((dist.get_world_size(),)), plan)
        elif kind.startswith("fsdp1"):
            options: Any = {"device_id": torch.device("cpu"), "use_orig_params": kind == "fsdp1"}
            model[2] = FullyShardedDataParallel(model[2], **options)
            model = FullyShardedDataParallel(model, **options)
        self.model = model
        own = kind not in ("tp", "plain")
        self.share = slice(dist.get_rank(), None, dist.get_world_size()) if own else slice(None)

    def make(self, name: str, base: str, like: str = "", **settings: Any) -> Any:
        """The optimizer; ``like`` says which kind of sharding has its order of parameters."""
        wrapper, known = FAMILY[name]
        settings = {**known, **settings}
        params: Any = self.model
        if like == "fsdp1-flat":  # first the parameters of the outer unit
            params = sorted(self.model.named_parameters(), key=lambda named: named[0].startswith("2."))
        if base == "sgd":
            return wrapper(params, torch.optim.SGD, lr=0.1, momentum=0.9, **settings)
        return wrapper(oput.Lamb(params, lr=0.05, **self.options), **settings)

    def losses(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (12,), generator=generator)
        return F.cross_entropy(self.model(x[self.share]), y[self.share], reduction="none")

    def call(self, name: str, step: int) -> Callable[..., Tensor]:
        def closure() -> Tensor:
            loss = self.losses(step).mean()
            loss.backward()
            return loss

        return (lambda indices: self.losses(step)) if name == "esam" else closure

    def values(self) -> list[Tensor]:
        summon: Any = contextlib.nullcontext()
        if self.kind.startswith("fsdp1"):
            summon = FullyShardedDataParallel.summon_full_params(self.model, writeback=False)
        with summon, torch.no_grad():
            found = [p.full_tensor() if isinstance(p, DTensor) else p for p in self.model.parameters()]
            return [p.detach().clone() for p in found]


@torch.no_grad()
def copy_weights(place: Place, other: Place) -> None:
    for p, q in zip(place.model.parameters(), other.model.parameters(), strict=True):
        whole_or_local(q.detach()).copy_(whole_or_local(p.detach()))


def bases(kind: str) -> list[str]:
    """On two ranks optimizers of torch, too."""
    return ["lamb", "sgd"] if kind in ("ddp", "fsdp2", "fsdp1") and dist.get_world_size() == 2 else ["lamb"]


def trajectory(kind: str, name: str, base: str) -> float:
    """The largest difference from one process, over some steps and a move to one process and on.

    On the same layout a resumed run goes on bit for bit.
    """
    place, alone = Place(kind), Place("plain")
    sharded, whole = place.make(name, base), alone.make(name, base, kind)
    for step in range(3):
        sharded.step(place.call(name, step))
        whole.step(alone.call(name, step))
    there = place.values()
    worst = largest_difference(there, alone.values())
    again = Place(kind)
    again.losses(0).mean().backward()  # at the first DistributedDataParallel arranges its buckets anew, which rounds
    copy_weights(place, again)
    resumed = again.make(name, base)
    resumed.load_state_dict(copy.deepcopy(sharded.state_dict()))
    singles = [(alone, whole)]
    if base == "lamb":
        moved = Place("plain")
        with torch.no_grad():
            for p, value in zip(moved.model.parameters(), there, strict=True):
                p.copy_(value)
        singles.append((moved, moved.make(name, base, kind)))
        singles[-1][1].load_state_dict(oput.full_state_dict(sharded))
    for one, optimizer in [(place, sharded), (again, resumed), *singles]:
        for step in range(3, 5):
            optimizer.step(one.call(name, step))
    end = place.values()
    assert same(end, again.values())
    return max(worst, *(largest_difference(end, one.values()) for one, _ in singles))


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The sizes of what ``dist.all_reduce`` is called with."""
    sizes: list[int] = []
    reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield sizes
    finally:
        dist.all_reduce = reduce


def reductions(kind: str, name: str) -> tuple[int, int]:
    """All-reduces of a first step, and of making the gradients of the second."""
    place = Place(kind)
    optimizer = place.make(name, "lamb")
    place.losses(0).mean().backward()
    with counted() as first:
        optimizer.first_step()
    place.losses(0).mean().backward()
    before, optimizer._first = optimizer._first, optimizer._first
    optimizer.restore()
    with counted() as second, torch.no_grad():
        optimizer.rewrite_gradients(before)
    return len(first), len(second)


def poisoned(kind: str, name: str, bad: int) -> bool:
    """Whether a step does nothing on this rank when one rank's gradient alone is not finite in one pass."""
    place = Place(kind)
    optimizer = place.make(name, "lamb", skip_nonfinite=True)
    optimizer.step(place.call(name, 0))
    if name == "looksam":
        optimizer.set("steps", 0)
    before, state = place.values(), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    for number in (1, 2):
        place.losses(1).mean().backward()
        if number == bad and dist.get_rank() == dist.get_world_size() - 1:
            owned = [whole_or_local(p.grad) for p in place.model.parameters() if p.grad is not None]
            next(g for g in owned if g.numel()).view(-1)[0] = float("inf")
        if number == 1:
            optimizer.first_step()
    optimizer.step()
    assert optimizer.outcome is Outcome.SKIPPED
    assert optimizer.skipped == 1
    for key, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(whole(v), whole(state[key][k])) for k, v in entry.items())
    kept = same(place.values(), before)
    optimizer.step(place.call(name, 1))
    assert optimizer.outcome is Outcome.DONE
    return kept


def whole(value: Any) -> Tensor:
    return whole_or_local(torch.as_tensor(value))


def interrupted(kind: str) -> float:
    """An exception after the forward pass of the second: the weights are as before, and training goes on right."""
    place, alone = Place(kind), Place("plain")
    sharded, plain = place.make("sam", "lamb"), alone.make("sam", "lamb")
    before, passes = place.values(), []

    def fails() -> Tensor:
        passes.append(1)
        loss = place.losses(0).mean()
        if len(passes) == 2:
            raise KeyboardInterrupt
        loss.backward()
        return loss

    with pytest.raises(KeyboardInterrupt):
        sharded.step(fails)
    assert same(place.values(), before)
    sharded.step(place.call("sam", 1))
    plain.step(alone.call("sam", 1))
    return largest_difference(place.values(), alone.values())


def watched(kind: str) -> float:
    """A look at the loss before each step by hand leaves gathered weights behind, which must not be used again."""
    place, other = Place(kind), Place(kind)
    for one in (place, other):
        optimizer = one.make("sam", "lamb")
        for step in range(2):
            one.losses(step).mean().backward()
            for end in (optimizer.first_step, optimizer.second_step):
                if one is place:
                    with torch.no_grad():
                        one.losses(step)
                end(zero_grad=True)
                if end == optimizer.first_step:
                    one.losses(step).mean().backward()
    return largest_difference(place.values(), other.values())


def checks(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in FAMILY:
        for base in bases(kind):
            found[f"{name}-{base}"] = trajectory(kind, name, base)
    for name in ("sam", "gsam", "looksam"):
        for bad in (1, 2):
            found[f"{name}-poisoned-{bad}"] = poisoned(kind, name, bad)
        found[f"{name}-reductions"] = reductions(kind, name)
    found["watched"] = watched(kind)
    found["interrupted"] = interrupted(kind)
    return found


CASES = [("ddp", 2), ("zero1", 3), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("tp", 2), ("fsdp1", 2), ("fsdp1-flat", 3)]


@pytest.mark.parametrize(("kind", "ranks"), CASES)
def test_sharded_is_as_one_process(pool: Pool, kind: str, ranks: int) -> None:
    sharded = kind not in ("ddp", "zero1")
    for found in pool.run(ranks, checks, kind):
        for what, value in found.items():
            if what.endswith("reductions"):
                partial = kind == "tp"  # biases behind row-wise layers: one all-reduce settles them
                again = {"sam": 0, "gsam": int(sharded), "looksam": int(kind != "ddp")}[what.split("-")[0]]
                assert value == (sharded + partial, again + partial * (again > 0)), (what, value)
            elif "poisoned" in what:
                assert value is True, what
            else:
                assert value <= LIMIT, (what, value)


# ------------------------------------------------------------------------- tensor parallelism, and all other layouts


def curved(optimizer: Any, layout: Layout, params: dict[str, Tensor], whole: Callable[[], dict[str, Tensor]]) -> None:
    """A step by hand whose gradients depend on the weights: a pull to 0.5 along sines."""
    for number in (1, 2):
        optimizer.zero_grad()
        layout.give(params, {name: torch.sin(3 * p - 0.5) for name, p in whole().items()})
        if number == 1 and optimizer.needs_second_pass:
            optimizer.first_step(zero_grad=False)
    optimizer.step()


def values_of_harness() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"matrix": (8, 4), "short": (4, 3), "square": (4, 4), "row": (2, 8), "vector": (6,), "scalar": ()}
    return {k: torch.randn(shape, generator=generator, dtype=torch.float64) for k, shape in shapes.items()}


def harness(kind: str) -> dict[str, float]:
    found = {}
    for name, (wrapper, settings) in FAMILY.items():
        layout, start = LAYOUTS[kind](), values_of_harness()
        params = layout.start({k: v.clone() for k, v in start.items()})
        alone = {k: nn.Parameter(v.clone()) for k, v in start.items()}
        sharded, single = (
            wrapper(oput.Lamb(list(p.values()), lr=0.05), **{**settings, "rho": 0.3}) for p in (params, alone)
        )

        def gathered(params: dict[str, Tensor] = params) -> dict[str, Tensor]:
            with torch.no_grad():
                return {k: p.full_tensor() if isinstance(p, DTensor) else p.detach() for k, p in params.items()}

        def given(alone: dict[str, Tensor] = alone) -> dict[str, Tensor]:
            return {k: p.detach() for k, p in alone.items()}

        for _ in range(4):  # LookSAM estimates anew in the third, and uses that in the fourth
            curved(sharded, layout, params, gathered)
            curved(single, LAYOUTS["plain"](), alone, given)
        found[name] = largest_difference(list(gathered().values()), list(given().values()))
        assert largest_difference(list(given().values()), list(start.values())) > 0.01
    return found


@pytest.mark.parametrize(("kind", "ranks"), [("tp", 2), ("fsdp2-tp", 4), ("columns", 3), ("mixture", 4)])
def test_other_layouts_and_partial_sums(pool: Pool, kind: str, ranks: int) -> None:
    for found in pool.run(ranks, harness, kind):
        assert max(found.values()) <= LIMIT, found
