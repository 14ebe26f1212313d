"""Runs that stop half-way: one small model under every layout, saved in every form, resumed under every other layout.

All values lie on a grid on which means over ranks are exact, so a run under any layout must give what one process
gives: bitwise for elementwise optimizers, to rounding for those with norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import oput_dist as oput
from tests.conformance import on_grid
from tests.meshes import world_mesh

HALF, ALL = 3, 6
UPDATE = 1e-6  # of the update: how far rounding may take an optimizer with norms


class Part(nn.Module):
    """Holds layers; its loss is the sum of every parameter times a constant, which is then its gradient."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, factors: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        for name, factor in factors.items():
            layer, _, kind = name.rpartition(".")
            values = getattr(self.get_submodule(layer), kind)
            total = total if values is None else total + (values * factor).sum()
        return total


class Net(nn.Module):
    """Layers with uneven and short pieces. ``head`` comes last here, but first in FSDP1's list of flat parameters."""

    def __init__(self, biases: bool = False) -> None:
        """``biases``: of all layers, as what is kept of older releases has them; they are short like that of one."""
        super().__init__()
        self.block = Part(up=nn.Linear(5, 6), down=nn.Linear(6, 4), conv=nn.Conv2d(3, 4, 2, bias=biases))
        self.head = nn.Linear(7, 3, bias=biases)
        self.scale = nn.Parameter(torch.zeros(11))
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(on_grid(ORDER.index(name), tuple(p.shape), torch.float32))

    def forward(self, factors: dict[str, Tensor]) -> Tensor:
        inner = {name.removeprefix("block."): factor for name, factor in factors.items() if name.startswith("block.")}
        outer = (self.head.weight * factors["head.weight"]).sum() + (self.scale * factors["scale"]).sum()
        if self.head.bias is not None:
            outer = outer + (self.head.bias * factors["head.bias"]).sum()
        return outer + self.block(inner)


ORDER = ("scale", *(f"block.{layer}.{kind}" for layer in ("up", "down", "conv") for kind in ("weight", "bias")))
ORDER = (*ORDER, "head.weight", "head.bias")
SHAPES = {name: tuple(p.shape) for name, p in Net(biases=True).named_parameters()}
START = {name: p.detach().clone() for name, p in Net(biases=True).named_parameters()}


@dataclass(frozen=True)
class Case:
    """An optimizer with its settings."""

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    groups: str = "two"  # how the parameters are grouped
    vectors: bool = False  # state that is not parameter-shaped, which torch's own FSDP1 functions do not carry
    loss: bool = False  # whether a step needs the loss


CASES = {
    "adamw": Case("adamw", {"amsgrad": True}, groups="one empty"),
    "bf16": Case("adamw", {"state_dtype": torch.bfloat16}, groups="one"),
    "int8": Case("adamw", {"state_dtype": "int8", "state_overrides": {"*": "int8"}}, groups="one"),
    "lamb": Case("lamb", {"clamp": 10.0}, exact=False),
    "adafactor": Case("adafactor", exact=False, groups="one", vectors=True),
    "momo": Case("momo", exact=False, loss=True),
    "shampoo": Case("shampoo", {"block_size": 4, "precondition_frequency": 2}, exact=False, groups="one", vectors=True),
    "soap": Case("soap", {"precondition_frequency": 2}, exact=False, vectors=True),
}


# ------------------------------------------------------------------------------------------------------------- layouts


def _plain(net: Net) -> nn.Module:
    return net


def _ddp(net: Net) -> nn.Module:
    return DistributedDataParallel(net)


def _fsdp2(net: Net) -> nn.Module:
    return _sharded(net, world_mesh((dist.get_world_size(),)))


def _hsdp(net: Net) -> nn.Module:
    return _sharded(net, world_mesh((2, 2), ("replicate", "shard")))


def _fsdp2_tp(net: Net) -> nn.Module:
    mesh = world_mesh((2, 2), ("data", "model"))
    return _sharded(_split(net, mesh["model"]), mesh["data"])


def _sharded(net: Net, mesh: Any) -> nn.Module:
    fully_shard(net.block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def _split(net: Net, mesh: Any) -> Net:
    parallelize_module(net.block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return net


def _fsdp1(use_orig_params: bool) -> Callable[[Net], nn.Module]:
    def wrap(net: Net) -> nn.Module:
        options = {"device_id": torch.device("cpu"), "use_orig_params": use_orig_params}
        net.block = FullyShardedDataParallel(net.block, **options)
        return FullyShardedDataParallel(net, **options)

    return wrap


@dataclass(frozen=True)
class Layout:
    """How a model is spread, and over how many ranks."""

    ranks: int
    wrap: Callable[[Net], nn.Module]
    zero1: bool = False
    tensor_parallel: bool = False
    fsdp1: bool = False

    def cases(self, way: str) -> list[str]:
        """The cases that are saved in a way: torch's own for FSDP1 takes no state of other shapes.

        By torch.distributed.checkpoint not Lamb, whose state is AdamW's and whose groups are Momo's: what else there is
        of it tests/test_checkpoint.py saves and loads.
        """
        if way == "whole":
            return ["bf16", "adafactor", "momo", "shampoo"]
        return [name for name, case in CASES.items() if name != "lamb" and not (self.fsdp1 and case.vectors)]


LAYOUTS = {
    "one": Layout(1, _plain),
    "ddp": Layout(2, _ddp),
    "zero1": Layout(2, _ddp, zero1=True),
    "fsdp2": Layout(2, _fsdp2),
    "fsdp1": Layout(2, _fsdp1(True), fsdp1=True),
    "fsdp1flat": Layout(2, _fsdp1(False), fsdp1=True),
    "fsdp2x3": Layout(3, _fsdp2),
    "hsdp": Layout(4, _hsdp),
    "fsdp2+tp": Layout(4, _fsdp2_tp, tensor_parallel=True),
}


# ------------------------------------------------------------------------------------------------------------ one run


@dataclass
class Run:
    """A model under a layout, its optimizer and schedule, and the number of steps that it has behind it."""

    module: nn.Module
    optimizer: Any
    scheduler: Any


def grouped(module: nn.Module, how: str, lr: float) -> list[dict[str, Any]]:
    """The parameters in groups: torch has no names of groups that are empty, so then there are none at all."""
    named = list(module.named_parameters())
    if how == "one":
        return [{"params": named}]
    inner = [(name, p) for name, p in named if "block." in name]
    outer = {"params": [(name, p) for name, p in named if "block." not in name], "lr": 3 * lr, "weight_decay": 0.0}
    if how == "one empty":
        outer["params"] = [p for _, p in outer["params"]]
        return [{"params": [p for _, p in inner]}, outer, {"params": []}]
    return [{"params": inner}, outer]


def start(layout: str, case: str, lr: float = 0.1, biases: bool = False) -> Run:
    """A schedule and the user add keys of their own to the groups."""
    spread, settings = LAYOUTS[layout], CASES[case]
    module = spread.wrap(Net(biases))
    groups = grouped(module, settings.groups, lr)
    options: dict[str, Any] = {"shard_group": dist.group.WORLD} if spread.zero1 else {}
    if spread.fsdp1 or layout == "ddp":  # whose replicas share whole matrices then
        options["module"] = module
    optimizer = oput.create(settings.optimizer, groups, lr=lr, weight_decay=0.1, **settings.options, **options)
    for group in optimizer.param_groups:
        group["note"] = 7  # a user's own key
    scheduler = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.75)
    return Run(module, optimizer, scheduler)


Given = dict[int, dict[str, Tensor]]
"""The gradients of each step under a layout, which no parameter changes: the first run has them from its backward
passes, and the others copies."""


def train(layout: str, case: str, run: Run, steps: range, given: Given | None = None) -> None:
    given = {} if given is None else given
    for step in steps:
        run.optimizer.zero_grad()
        if step not in given:
            given[step] = gradients(layout, run.module, step)
        for name, p in run.module.named_parameters():
            p.grad = given[step][name].clone() if name in given[step] else None
        run.optimizer.step(**({"loss": 1.0 + step} if CASES[case].loss else {}))
        run.scheduler.step()


def gradients(layout: str, module: nn.Module, step: int) -> dict[str, Tensor]:
    """Those of this rank; parameters of which it has nothing may be without."""
    factors = {
        name: on_grid(100 * (step + 1) + i, shape, torch.float32) for i, (name, shape) in enumerate(SHAPES.items())
    }
    if LAYOUTS[layout].tensor_parallel:  # such layers want inputs, and cannot be summed over
        return {name: distributed(factors[name], p) for name, p in module.named_parameters()}
    module(factors).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def distributed(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value.clone()
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def plain_name(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in ("module", "_fsdp_wrapped_module"))


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The parameters, on every rank."""
    with FullyShardedDataParallel.summon_full_params(module):
        named = {plain_name(name): p.detach() for name, p in module.named_parameters()}
        found = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in named.items()}
        return {name: value.reshape(SHAPES[name]).clone() for name, value in found.items()}


@torch.no_grad()
def restore(module: nn.Module, values: dict[str, Tensor]) -> None:
    with FullyShardedDataParallel.summon_full_params(module, writeback=True):
        for name, p in module.named_parameters():
            p.copy_(distributed(values[plain_name(name)], p))


# -------------------------------------------------------------------------------------------- saved, and resumed


def parts(run: Run) -> dict[str, Any]:
    """What torch.distributed.checkpoint saves and loads."""
    model, optimizer = get_state_dict(run.module, run.optimizer)
    return {"model": model, "optimizer": optimizer, "scheduler": run.scheduler.state_dict()}


def save(ranks: int, folder: str) -> None:
    """Save every layout of so many ranks in every form, and go on to the end."""
    for layout, spread in LAYOUTS.items():
        if spread.ranks != ranks:
            continue
        runs = {case: start(layout, case) for case in CASES}
        given: Given = {}
        for case, run in runs.items():
            train(layout, case, run, range(HALF), given)
        path = Path(folder, layout)
        dcp.save({case: parts(runs[case]) for case in spread.cases("dcp")}, checkpoint_id=path)
        files = {case: plain(runs[case]) for case in spread.cases("whole")}
        for case, run in runs.items():
            train(layout, case, run, range(HALF, ALL), given)
        ends = {case: end(run) for case, run in runs.items()}
        if dist.get_rank() == 0:
            torch.save(files, path / "whole.pt")
            torch.save(ends, path / "ends.pt")


def plain(run: Run) -> dict[str, Any]:
    """What a plain torch.save takes, from rank 0."""
    optimizer = oput.full_state_dict(run.optimizer, keep=dist.get_rank() == 0)
    return {"model": whole(run.module), "optimizer": optimizer, "scheduler": run.scheduler.state_dict()}


def end(run: Run) -> dict[str, Any]:
    """Where a run arrived: parameters, whole state, groups."""
    return {"model": whole(run.module), "optimizer": oput.full_state_dict(run.optimizer)}


def load_dcp(runs: dict[str, Run], filled: dict[str, dict[str, Any]], folder: Path) -> None:
    """Set runs, new or old, back to where saved ones stopped; ``filled`` has their parts, which are overwritten."""
    dcp.load(filled, checkpoint_id=folder)
    for case, run in runs.items():
        saved = filled[case]
        model = dict(saved["model"])  # under DDP torch gives its keys other names
        set_state_dict(run.module, run.optimizer, model_state_dict=model, optim_state_dict=saved["optimizer"])
        run.scheduler.load_state_dict(saved["scheduler"])


def resumed_by_dcp(layout: str, folder: Path, cases: Iterable[str], biases: bool = False) -> dict[str, Run]:
    """New runs that go on where saved ones stopped."""
    runs = {case: start(layout, case, lr=9.0, biases=biases) for case in cases}  # the saved rate must come back
    load_dcp(runs, {case: parts(run) for case, run in runs.items()}, folder)
    return runs


def load_whole(runs: dict[str, Run], folder: Path) -> None:
    """Set runs, new or old, back to where saved ones stopped."""
    loaded = torch.load(folder / "whole.pt", weights_only=True)
    for case, run in runs.items():
        restore(run.module, loaded[case]["model"])
        run.optimizer.load_state_dict(loaded[case]["optimizer"])
        run.scheduler.load_state_dict(loaded[case]["scheduler"])


def load(layout: str, folder: str, way: str) -> list[str]:
    """What differs, on this rank, after resuming under a layout everything that was saved in a way."""
    faults = []
    wanted = torch.load(Path(folder, "one", "ends.pt"), weights_only=True)
    own = torch.load(Path(folder, layout, "ends.pt"), weights_only=True)
    spread = LAYOUTS[layout]
    every = {case: start(layout, case, lr=9.0) for case in spread.cases(way)}
    filled = {case: parts(run) for case, run in every.items()} if way == "dcp" else {}
    given: Given = {}
    for source in LAYOUTS:  # what one leaves behind, the next must set back
        path = Path(folder, source)
        runs = {case: run for case, run in every.items() if case in LAYOUTS[source].cases(way)}
        if way == "dcp":
            load_dcp(runs, {case: filled[case] for case in runs}, path)
        else:
            load_whole(runs, path)
        for case, run in runs.items():
            train(layout, case, run, range(HALF, ALL), given)
            found = end(run)
            lines = differences(found, wanted[case], 0.0 if CASES[case].exact else UPDATE)
            lines += [f"not bitwise: {line}" for line in differences(found, own[case], 0.0)] if source == layout else []
            faults += [f"{case} saved under {source}, resumed under {layout} by {way}: {line}" for line in lines]
    return faults


def differences(found: dict[str, Any], wanted: dict[str, Any], limit: float) -> list[str]:
    """Errors of parameters relative to how far training moved them, of state relative to its largest element."""
    lines = []
    if found["model"].keys() != wanted["model"].keys():
        return [f"parameters {sorted(found['model'])} instead of {sorted(wanted['model'])}"]
    for name, value in wanted["model"].items():
        lines += _apart(name, found["model"][name], value, (value - START[name]).abs().max(), limit)
    ours, theirs = by_name(found), by_name(wanted)
    if ours.keys() != theirs.keys():
        return [*lines, f"state of {sorted(ours)} instead of {sorted(theirs)}"]
    for name, state in theirs.items():
        if ours[name].keys() != state.keys():
            lines.append(f"{name} has state {sorted(ours[name])} instead of {sorted(state)}")
            continue
        for key, value in state.items():
            lines += _apart(f"{key} of {name}", ours[name][key], value, value.abs().max(), limit)
    for group, other in zip(found["optimizer"]["param_groups"], wanted["optimizer"]["param_groups"], strict=True):
        options = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in (group, other)]
        lines += [] if options[0] == options[1] else [f"group {options[0]} instead of {options[1]}"]
    return lines


def by_name(run: dict[str, Any]) -> dict[Any, dict[str, Tensor]]:
    """The state of each parameter; without names, the groups are the inner and the outer parameters."""
    state_dict = run["optimizer"]
    order = [key for group in state_dict["param_groups"] for key in group["params"]]
    names = [n for g in state_dict["param_groups"] for n in g.get("param_names", ())] or sorted(
        run["model"], key=lambda name: "block." not in name
    )
    return {name: state_dict["state"][key] for name, key in zip(names, order, strict=True)}


def _apart(name: str, found: Tensor, wanted: Tensor, scale: Tensor, limit: float) -> list[str]:
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return [f"{name} is {found.dtype} {tuple(found.shape)} instead of {wanted.dtype} {tuple(wanted.shape)}"]
    if torch.equal(found, wanted):
        return []
    error = float((found.double() - wanted.double()).abs().max() / scale.double())
    return [] if error <= limit else [f"{name} is off by {error:.1e}, limit {limit:.0e}"]
