"""Wrappers under every layout: the model of tests/checkpoints.py is trained, saved half-way and resumed elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import set_state_dict

import oput_dist as oput
from oput_dist.engine.wrapper import wrappers_of
from oput_dist.wrappers.average import Averaging
from oput_dist.wrappers.averaging import EMA, LAWA, SWA
from oput_dist.wrappers.graft import AdaGraft
from oput_dist.wrappers.lookahead import Lookahead
from tests.checkpoints import (
    ALL,
    HALF,
    LAYOUTS,
    SHAPES,
    Net,
    Run,
    differences,
    distributed,
    grouped,
    parts,
    whole,
)
from tests.conformance import on_grid

RESUMED = {  # from what others each layout resumes
    "one": ("fsdp2", "fsdp1flat"),
    "zero1": ("zero1",),
    "fsdp2": ("fsdp2", "one"),
    "fsdp1": ("fsdp1",),
    "fsdp1flat": ("fsdp1flat",),
    "fsdp2x3": ("fsdp2", "zero1"),
}
Groups = Callable[[], list[dict[str, Any]]]


def averages(groups: Groups, common: dict[str, Any]) -> Any:
    inner = Lookahead(oput.AdamW(groups(), lr=0.1, weight_decay=0.1, **common), k=2, alpha=0.5)
    return LAWA(SWA(EMA(inner, decay=0.9, warmup=True), start=1, every=2), window=2, every=1)


def half(groups: Groups, common: dict[str, Any]) -> Any:
    inner = Lookahead(oput.AdamW(groups(), lr=0.1, **common), k=2, slow_dtype=torch.bfloat16)
    return EMA(inner, decay=0.9, average_dtype=torch.bfloat16)


def pullback(groups: Groups, common: dict[str, Any]) -> Any:
    inner = oput.SGDW(groups(), lr=0.1, momentum=0.5, weight_decay=0.1, **common)
    return Lookahead(inner, k=2, inner_state="pullback")


def around_torch(groups: Groups, common: dict[str, Any]) -> Any:
    return Lookahead(torch.optim.AdamW(groups(), lr=0.1, foreach=False), k=2, **common)


def nested(groups: Groups, common: dict[str, Any]) -> Any:
    return EMA(Lookahead(oput.Lamb(groups(), lr=0.1, weight_decay=0.1, **common), k=2), decay=0.5)


def graft(scope: Any, groups: Groups, common: dict[str, Any]) -> Any:
    magnitude = oput.SGD(groups(), lr=0.1, momentum=0.5, weight_decay=0.0, **common)
    direction = oput.Adafactor if scope == "tensor" and "module" not in common else oput.AdamW
    return AdaGraft(magnitude, direction(groups(), lr=0.02, weight_decay=0.0, **common), scope=scope, weight_decay=0.1)


@dataclass(frozen=True)
class Case:
    """A wrapper around an optimizer."""

    make: Callable[[Groups, dict[str, Any]], Any]
    exact: bool = True
    """Whether all layouts give the same bits; else the same to rounding in float64."""
    ours: bool = True
    """Whether the inner optimizer is of this library."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.exact else torch.float64


CASES = {
    "averages": Case(averages),
    "half": Case(half),
    "pullback": Case(pullback),
    "around torch": Case(around_torch, exact=False, ours=False),
    "nested": Case(nested, exact=False),
    "graft": Case(partial(graft, "tensor"), exact=False),
    "graft global": Case(partial(graft, "global"), exact=False),
}
LIMIT = 1e-12  # of the update


def cases_of(layout: str) -> list[str]:
    """torch's optimizers know no ``shard_group``; FSDP1 no statistics of Adafactor's, and one dtype for all state."""
    spread = LAYOUTS[layout]
    without = {"around torch"} if spread.zero1 else {"graft", "half"} if spread.fsdp1 else set()
    return [name for name in CASES if name not in without]


def started(layout: str, case: str, lr: float = 0.1) -> Run:
    spread, module = LAYOUTS[layout], LAYOUTS[layout].wrap(Net().to(CASES[case].dtype))
    common: dict[str, Any] = {"shard_group": dist.group.WORLD} if spread.zero1 else {}
    if spread.fsdp1:
        common["module"] = module
    optimizer = CASES[case].make(lambda: grouped(module, "two", lr), common)
    return Run(module, optimizer, torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.75))


def factors_of(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: on_grid(100 * (step + 1) + i, shape, dtype) for i, (name, shape) in enumerate(SHAPES.items())}


def train(layout: str, case: str, run: Run, steps: range) -> None:
    for step in steps:
        factors = factors_of(step, CASES[case].dtype)
        run.optimizer.zero_grad()
        if LAYOUTS[layout].tensor_parallel:
            for name, p in run.module.named_parameters():
                p.grad = distributed(factors[name], p)
        else:
            run.module(factors).backward()
        run.optimizer.step()
        run.scheduler.step()


def end(case: str, run: Run) -> dict[str, Any]:
    """Where a run arrived: parameters, whole state, groups; without state for an optimizer of torch's."""
    if not CASES[case].ours:
        return {"model": whole(run.module), "optimizer": {"state": {}, "param_groups": []}}
    state = oput.full_state_dict(run.optimizer)
    for entry in state["state"].values():
        entry.pop("direction_step", None)  # FSDP1: a rank may hold nothing of a parameter, and count nothing
    return {"model": whole(run.module), "optimizer": state}


def apart(case: str, found: dict[str, Any], wanted: dict[str, Any], limit: float | None = None) -> list[str]:
    limit = (0.0 if CASES[case].exact else LIMIT) if limit is None else limit
    if not CASES[case].ours:
        lines = [(name, (found["model"][name] - w).abs().max().item()) for name, w in wanted["model"].items()]
        return [f"{name} is off by {error:.1e}" for name, error in lines if error > limit]
    return differences(found, wanted, limit)


# ------------------------------------------------------------------------------------------------ saved, and resumed


def loss_of(run: Run, layout: str, dtype: torch.dtype) -> Tensor:
    if LAYOUTS[layout].tensor_parallel:
        return torch.zeros(())
    with torch.no_grad():
        return run.module(factors_of(0, dtype)).clone()


def seen(layout: str, case: str, run: Run) -> dict[str, Any]:
    """What the model is with each average, and its loss then; afterwards all must be what it was, after errors too."""
    dtype, before, shown = CASES[case].dtype, whole(run.module), {}
    loss = loss_of(run, layout, dtype)
    for optimizer in wrappers_of(run.optimizer):
        if not isinstance(optimizer, Averaging):
            continue
        with pytest.raises(KeyError, match="in the block"), optimizer.averaged():  # noqa: PT012
            shown[type(optimizer).__name__] = {**whole(run.module), "loss": loss_of(run, layout, dtype)}
            raise KeyError("an error in the block")
        assert torch.equal(loss, loss_of(run, layout, dtype))
        check_same(whole(run.module), before)
    return shown


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def save(ranks: int, folder: str) -> None:
    """Train under every layout of so many ranks; save half-way, and where each run ended."""
    for layout, spread in LAYOUTS.items():
        if spread.ranks != ranks:
            continue
        runs = {case: started(layout, case) for case in cases_of(layout)}
        for case, run in runs.items():
            train(layout, case, run, range(HALF))
        path = Path(folder, layout)
        path.mkdir(exist_ok=True)
        if layout in [source for sources in RESUMED.values() for source in sources]:
            dcp.save({case: parts(run) for case, run in runs.items()}, checkpoint_id=path)
        ends = {}
        for case, run in runs.items():
            seen(layout, case, run)  # and training goes on
            train(layout, case, run, range(HALF, ALL))
            ends[case] = end(case, run), seen(layout, case, run)
        if dist.get_rank() == 0:
            torch.save(ends, path / "ends.pt")


def compared(ranks: int, folder: str) -> list[str]:
    """What differs from one process, and after resuming from what other layouts saved."""
    faults = []
    wanted = torch.load(Path(folder, "one", "ends.pt"), weights_only=True)
    for layout, spread in LAYOUTS.items():
        if spread.ranks != ranks:
            continue
        own = torch.load(Path(folder, layout, "ends.pt"), weights_only=True)
        for case, (found, shown) in own.items():
            faults += [f"{case} under {layout}: {line}" for line in apart(case, found, wanted[case][0])]
            faults += [f"{case} under {layout}: {line}" for line in apart_shown(layout, case, shown, wanted[case][1])]
        for source in RESUMED.get(layout, ()):
            both = [case for case in cases_of(layout) if case in cases_of(source)]
            for case, found in resumed(layout, Path(folder, source), both).items():
                lines = apart(case, found, wanted[case][0])
                if source == layout:
                    lines += [f"not bitwise: {line}" for line in apart(case, found, own[case][0], 0.0)]
                faults += [f"{case} saved under {source}, resumed under {layout}: {line}" for line in lines]
    return faults


def apart_shown(layout: str, case: str, found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    faults = []
    for kind, values in wanted.items():
        for name, value in values.items():
            error = (found[kind][name] - value).abs().max().item() / (100.0 if name == "loss" else 1.0)
            if not error <= (0.0 if CASES[case].exact else LIMIT) and not (name == "loss" and tensor_parallel(layout)):
                faults.append(f"{name} with {kind} is off by {error:.1e}")
    return faults


def tensor_parallel(layout: str) -> bool:
    return LAYOUTS[layout].tensor_parallel


def resumed(layout: str, folder: Path, cases: list[str]) -> dict[str, dict[str, Any]]:
    runs = {case: started(layout, case, lr=9.0) for case in cases}
    loaded = {case: parts(run) for case, run in runs.items()}
    dcp.load(loaded, checkpoint_id=folder)
    ends = {}
    for case, run in runs.items():
        saved = loaded[case]
        set_state_dict(run.module, run.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        run.scheduler.load_state_dict(saved["scheduler"])
        train(layout, case, run, range(HALF, ALL))
        ends[case] = end(case, run)
    return ends
