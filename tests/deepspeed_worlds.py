"""Training under DeepSpeed on the pool's ranks, and the same in one plain process, on the same gradients.

As in ``tests/conformance.py`` the ranks only report what they hold; the parent process builds the reference and judges.
"""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tests import conformance
from tests.conformance import FAST, RELATIVE_ERROR, Case, Key, on_grid
from tests.layouts import Weights
from tests.pool import Pool

LAST = 3
Weighed = dict[str, np.ndarray]
_WORLD: list[Any] = []  # in a worker: the process group that DeepSpeed knows


@dataclass(frozen=True)
class World:
    """How an engine is built."""

    stage: int
    groups: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of ``zero_optimization``."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """At the top of the configuration."""
    given: str = "config"
    """How the optimizer is given: by its name in the configuration, or as an "instance" or a "callable"."""
    dtype: str = "fp32"
    """Of the engine: "fp32", "bf16" or "fp16". In low precision the first rank alone has gradients, which are exact."""
    init: bool = False
    """Whether parameters are partitioned from the beginning (``zero.Init``)."""

    @property
    def precision(self) -> dict[str, Any]:
        low = {"bf16": {"enabled": True}, "fp16": {"enabled": True, "loss_scale": 8.0 if self.stage else 1.0}}
        return {} if self.dtype == "fp32" else {self.dtype: low[self.dtype]}


def start_values() -> dict[str, Tensor]:
    """Those of the conformance harness, but for the 0-d one, which DeepSpeed does not take."""
    return {name: value for name, value in conformance.start_values(torch.float32).items() if value.ndim}


def gradients(step: int) -> dict[str, Tensor]:
    made = conformance.gradients(step, torch.float32, skips=False)
    return {name: g for name, g in made.items() if g is not None and g.ndim}


def enter() -> Any:
    """Import DeepSpeed in a worker, whose world may be another one than at the last task."""
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(dist.get_rank()),
        LOCAL_RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
        LOCAL_SIZE="1",  # what it would find by itself, starting a process at each reduction of stage 3
    )
    import deepspeed
    from deepspeed.runtime.zero import utils
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils import groups, logger, nvtx

    import oput_dist.deepspeed  # noqa: F401

    logger.setLevel(logging.WARNING)
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for half a minute
    if _WORLD != [dist.group.WORLD]:  # what DeepSpeed keeps belongs to the world before
        _WORLD[:] = [dist.group.WORLD]
        deepspeed.comm.comm.cdb = None
        for name in [name for name, value in vars(groups).items() if isinstance(value, dist.ProcessGroup)]:
            setattr(groups, name, None)
        groups.mesh_device = None
        deepspeed.zero.Init.param_id = 0  # counts alike on ranks that were in other worlds before, and so does this
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    groups.mpu = None  # as tensor parallelism leaves it
    nvtx.enable_nvtx = False  # ranges for a profiler around every function
    # Every engine of stage 3 collects garbage, for as long as half of its start takes: once for each task is enough.
    utils.gc = SimpleNamespace(collect=lambda: 0)
    gc.collect()
    gc.freeze()
    return deepspeed


def grouped(params: Mapping[str, Any], case: Case, count: int) -> list[dict[str, Any]]:
    """Parameter groups; the second has other hyperparameters."""
    names = list(params)
    groups: list[dict[str, Any]] = [{"params": [params[k] for k in names[i::count]]} for i in range(count)]
    if count > 1:
        groups[1].update(case.second)
    return groups


def made(case: Case, params: Any, **extra: Any) -> Any:
    module, _, name = case.optimizer.rpartition(".")
    return getattr(importlib.import_module(module), name)(params, **{**case.options, **extra})


class Driven:
    """An engine with the face of an optimizer: gradients are made by a backward pass."""

    def __init__(self, engine: Any, factors: dict[str, Tensor]) -> None:
        self._engine, self._factors = engine, factors

    def update_hessian(self, batch_size: int) -> None:
        self._engine.basic_optimizer.update_hessian(batch_size)

    def step(self, loss: float = 0.0) -> None:
        micro = self._engine.gradient_accumulation_steps()
        for weight in [0.5, 1.5] if micro == 2 else [1.0] * micro:  # whose mean is 1
            value = self._engine({name: factor * weight for name, factor in self._factors.items()})
            self._engine.backward(value - value.detach() + loss)
            self._engine.step()


def parts(step: int, rank: int, ranks: int, alone: bool = False) -> dict[str, Tensor]:
    """This rank's share of the gradients: the mean over ranks is the gradient, exactly."""
    whole = gradients(step)
    if alone:
        return {name: g * ranks * (rank == 0) for name, g in whole.items()}
    shares = {
        name: [on_grid(7000 + 100 * step + 10 * r + i, tuple(g.shape), torch.float32) for r in range(ranks - 1)]
        for i, (name, g) in enumerate(whole.items())
    }
    for name, g in whole.items():
        shares[name].append(g - sum(shares[name], torch.zeros_like(g)))
    return {name: share[rank] * ranks for name, share in shares.items()}


def engine_of(deepspeed: Any, case: Case, world: World) -> Any:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # the default clips at 1
        "zero_optimization": {"stage": world.stage, **world.options},
        **world.precision,
        **world.config,
    }
    model = Weights(start_values())
    if world.init:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    groups = grouped(dict(model.named_parameters()), case, world.groups)
    optimizer: Any = None
    if world.given == "config":
        config["optimizer"] = {"type": case.optimizer.replace("oput_dist", "OPUT"), "params": dict(case.options)}
    elif world.given == "instance":
        optimizer = made(case, groups)
    else:
        optimizer = functools.partial(made, case)
    return deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=groups, config=config)[0]


def weights(deepspeed: Any, engine: Any) -> Weighed:
    """The model's whole parameters, as a forward pass sees them; in low precision their fp32 copies."""
    params = dict(engine.module.named_parameters())
    outer = engine.optimizer
    if hasattr(outer, "fp32_groups"):
        pairs = [
            pair for both in zip(outer.fp16_groups, outer.fp32_groups, strict=True) for pair in zip(*both, strict=True)
        ]
        return {
            name: next(high for low, high in pairs if low is p).detach().numpy().copy() for name, p in params.items()
        }
    if engine.module.one.dtype != torch.float32:
        return {name: deepspeed.utils.safe_get_full_fp32_param(p).numpy() for name, p in params.items()}
    with deepspeed.zero.GatheredParameters(list(params.values()), enabled=engine.zero_optimization_stage() == 3):
        return {name: p.detach().float().numpy().copy() for name, p in params.items()}


def train(deepspeed: Any, case: Case, world: World, steps: range = range(LAST + 1), engine: Any = None) -> Any:
    engine = engine if engine is not None else engine_of(deepspeed, case, world)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    difference = {0: 1.0, 1: -1.0}.get(rank, 0.0) if ranks > 1 else 0.0
    for step in steps:
        case.advance(Driven(engine, parts(step, rank, ranks, world.dtype != "fp32")), step, difference)
    return engine


def on_rank(world: World, cases: list[Case], steps: int = LAST + 1) -> list[Weighed]:
    deepspeed = enter()
    reports = []
    for case in cases:
        engine = train(deepspeed, case, world, range(steps))
        reports.append(weights(deepspeed, engine))
        engine.destroy()
    return reports


# ------------------------------------------------------------------------------------------------------- in the parent


@functools.cache
def reference(key: Key, groups: int, steps: int = LAST + 1) -> Weighed:
    """One plain process, backend eager."""
    case, values = key.case, start_values()
    params = {name: torch.nn.Parameter(value) for name, value in values.items()}
    optimizer = made(case, grouped(params, case, groups), backend="eager")
    for step in range(steps):
        for name, g in gradients(step).items():
            params[name].grad = g
        case.advance(optimizer, step)
    return {name: p.detach().numpy() for name, p in params.items()}


def compared(wanted: Weighed, got: Weighed, exact: bool, limit: float = RELATIVE_ERROR[torch.float32]) -> list[str]:
    """What differs: the largest error of a parameter relative to its largest change."""
    found, start = [], start_values()
    for name, whole in wanted.items():
        scale = max(np.abs(whole - start[name].numpy()).max(), 1e-30)
        error = np.abs(got[name] - whole).max() / scale
        if not error <= (0.0 if exact else limit):
            found.append(f"{name} is off by {error:.1e}")
    return found


def faults(pool: Pool, n: int, world: World, cases: list[Case], steps: int = LAST + 1) -> list[str]:
    """Runs everything on n ranks; one line for each parameter on each rank that differs from the plain run."""
    everyone = pool.run(n, on_rank, world, cases, steps, timeout=600.0)
    found = []
    for case, *ranks in zip(cases, *everyone, strict=True):
        wanted = reference(Key(case), world.groups, steps)
        for rank, got in enumerate(ranks):
            lines = compared(wanted, got, case.exact)
            found += [f"{case.name} at {world} on {n} ranks, rank {rank}: {line}" for line in lines]
    return found


def by_name(cases: list[Case]) -> dict[str, Case]:
    return {case.name: case for case in cases}


Task = Callable[..., Any]
LAMB = Case("lamb", "oput_dist.Lamb", {"lr": 0.1, "weight_decay": 0.1}, FAST, exact=False)
