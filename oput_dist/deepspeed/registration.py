"""Optimizers by their names in DeepSpeed's configuration, and the two places of DeepSpeed where they are let in."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import config as ds_config
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.utils import log_dist

from oput_dist import wrappers
from oput_dist.engine import Common, Optimizer
from oput_dist.engine.hyper import nearest
from oput_dist.engine.wrapper import Wrapper
from oput_dist.optimizers.registry import OPTIMIZERS, available, create, lookup

from .checks import ConfigError, check_optimizer, joins, origin_of
from .joined import Joined
from .zero import Zero

__all__ = ["ConfigError", "register"]

PREFIX = "oput."
_INSTEAD = {
    "max_grad_norm": "DeepSpeed clips gradients itself: set gradient_clipping, at the top of the configuration",
    "state_device": "DeepSpeed keeps state in host memory itself, and saves it: set "
    'zero_optimization.offload_optimizer to {"device": "cpu"}',
}
"""Options that DeepSpeed has a key of its own for."""
_OWN = ("module", "shard_group", "model_group", "data_group", "params", *_INSTEAD)
"""Those, and options that make no sense in a configuration."""
_WRAPPERS = {name.lower(): name for name, kind in vars(wrappers).items() if isinstance(kind, type)}
_DONE = "_oput_dist_registered"


def register() -> None:
    """Let every optimizer of the suite in: by name in a configuration, as an instance, as a callable. Once is enough.

    Raises:
        ImportError: for a version of DeepSpeed without the places where they are let in.
    """
    if hasattr(DeepSpeedEngine, _DONE):
        return
    for owner, name in (
        (ds_config, "get_optimizer_name"),
        (DeepSpeedEngine, "_configure_optimizer"),
        (zero_utils, "ZERO_SUPPORTED_OPTIMIZERS"),
    ):
        if not hasattr(owner, name):
            raise ImportError(
                f"oput_dist.deepspeed: DeepSpeed {deepspeed.__version__} has no {owner.__name__}.{name}: install "
                "deepspeed>=0.19.8,<0.20"
            )
    zero_utils.ZERO_SUPPORTED_OPTIMIZERS += OPTIMIZERS.values()
    for name in {_canonical(PREFIX + name) for name in available()}:
        setattr(
            torch.optim, name, functools.partial(create, name.removeprefix(PREFIX))
        )  # DeepSpeed asks if it is there
    ds_config.get_optimizer_name = _resolving(ds_config.get_optimizer_name)
    DeepSpeedEngine._configure_optimizer = _configuring(DeepSpeedEngine._configure_optimizer)
    setattr(DeepSpeedEngine, _DONE, True)


def _canonical(name: str) -> str:
    """``oput.Lamb`` for ``OPUT.lamb``: the name of the class, or of the configuration (``oput.sgd_nesterov``).

    Raises:
        ConfigError: for an unknown one, with the nearest.
    """
    asked = name[len(PREFIX) :]
    wrapper = _WRAPPERS.get(asked.lower())
    if wrapper is not None:
        raise ConfigError(
            f"DeepSpeed's configuration, optimizer.type: {wrapper} wraps another optimizer and cannot be named here: "
            f"leave optimizer out, and call deepspeed.initialize(optimizer=oput.{wrapper}(oput.AdamW(model)), ...)"
        )
    try:
        kind = lookup(asked)
    except ValueError as error:
        raise ConfigError(f"DeepSpeed's configuration, optimizer.type: {error}") from None
    plain = asked.lower().replace("_", "").replace("-", "")
    return PREFIX + (kind.__name__ if plain == kind.__name__.lower() else asked.lower())


def _resolving(get_name: Callable[[Mapping[str, Any]], str | None]) -> Callable[[Mapping[str, Any]], str | None]:
    @functools.wraps(get_name)
    def resolving(param_dict: Mapping[str, Any]) -> str | None:
        name = get_name(param_dict)
        if isinstance(name, str) and name.lower().startswith(PREFIX):
            given = param_dict["optimizer"].get("params", {})
            if not isinstance(given, dict):
                raise ConfigError(
                    f"DeepSpeed's configuration, optimizer.params: must be a table of options, but is {given!r}"
                )
        return _canonical(name) if isinstance(name, str) and name.lower().startswith(PREFIX) else name

    return resolving


def _configuring(configure: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(configure)
    def configuring(engine: Any, client_optimizer: Any, model_parameters: Any) -> None:
        name = engine._config.optimizer_name
        if client_optimizer is None and name is not None and name.startswith(PREFIX):
            client_optimizer = _from_config(engine, name.removeprefix(PREFIX), model_parameters)
        elif client_optimizer is not None and not isinstance(client_optimizer, torch.optim.Optimizer):
            client_optimizer = client_optimizer(model_parameters)
        if not isinstance(client_optimizer, (Optimizer, Wrapper)):
            configure(engine, client_optimizer, model_parameters)
            return
        check_optimizer(engine, client_optimizer)
        if not joins(engine, client_optimizer):
            configure(engine, client_optimizer, model_parameters)
            return
        _leave_gradients(engine.module, client_optimizer)
        engine._config.zero_force_ds_cpu_optimizer = False  # it would insist on one of DeepSpeed's own
        if type(client_optimizer) not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:  # a class of a user's
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(type(client_optimizer))
        joined = Joined(client_optimizer)
        configure(engine, client_optimizer, model_parameters)
        zero = Zero(engine.optimizer, client_optimizer)
        joined.attach(zero, engine.module)
        joined.take_losses(engine)
        _log(engine, client_optimizer, zero)

    return configuring


def _from_config(engine: Any, name: str, model_parameters: Iterable[Any]) -> Optimizer:
    """The optimizer that a configuration names.

    Raises:
        ConfigError: for an option that it does not take, or a value out of range.
    """
    options = {key: _of_json(value) for key, value in (engine.optimizer_params() or {}).items()}
    kind = lookup(name)
    known = [key for key in inspect.signature(kind.__init__).parameters if key not in ("self", "params", "common")]
    known += [key for key in Common.__annotations__ if key not in _OWN]
    for key in options:
        if key in _INSTEAD:
            raise ConfigError(f"DeepSpeed's configuration, optimizer.params.{key}: {_INSTEAD[key]}")
        if key not in known:
            raise ConfigError(
                f"DeepSpeed's configuration, optimizer.params.{key}: {kind.__name__} has no such option."
                f"{nearest(key, known)} It takes {', '.join(known)}"
            )
    entries, module = list(model_parameters), engine.module
    params: Any = module if [id(p) for p in entries] == [id(p) for p in module.parameters()] else entries
    if params is entries and any(isinstance(entry, (dict, torch.Tensor)) for entry in entries):
        options["module"] = module
    try:
        return create(name, params, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"DeepSpeed's configuration, optimizer.params: {error}") from error


def _leave_gradients(module: torch.nn.Module, optimizer: Optimizer | Wrapper) -> None:
    """Keep DeepSpeed, which would for a class of such a name, from orthogonalising gradients by itself."""
    if "muon" in f"{type(optimizer).__name__} {type(origin_of(optimizer)).__name__}".lower():
        for parameter in module.parameters():
            if getattr(parameter, "use_muon", False):
                parameter.use_muon = False  # type: ignore[attr-defined]


def _of_json(value: Any) -> Any:
    """A value as Python has it: tuples."""
    return tuple(value) if isinstance(value, list) else value


def _log(engine: Any, optimizer: Optimizer | Wrapper, zero: Zero) -> None:
    stage = engine.zero_optimization_stage()
    if zero.partitions:
        numel = sum(part.tensor.numel() for part in zero.partitions)
        count = sum(len(part.flat.originals) for part in zero.partitions)
        layout = f"{count} parameters in {len(zero.partitions)} flat partitions of {numel} elements on this rank"
    else:
        layout = f"{sum(len(group['params']) for group in optimizer.param_groups)} whole parameters"
    kind = type(engine.optimizer).__name__
    log_dist(f"oput_dist: {type(optimizer).__name__} at ZeRO stage {stage} ({kind}): {layout}", ranks=[0])
