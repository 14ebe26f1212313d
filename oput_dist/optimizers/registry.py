"""Optimizers by name."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from oput_dist.engine import Optimizer, Params
from oput_dist.engine.decay import groups_by_decay
from oput_dist.engine.hyper import nearest

from .presets import PRESETS, Preset

__all__ = ["OPTIMIZERS", "available", "create", "lookup"]


class _Registry(Mapping[str, type[Optimizer]]):
    """The classes of the suite by lower-case name: every optimizer that the package's ``__init__`` takes in."""

    @functools.cached_property
    def _classes(self) -> dict[str, type[Optimizer]]:
        package = importlib.import_module(__package__ or "")
        found = [c for c in vars(package).values() if isinstance(c, type) and issubclass(c, Optimizer)]
        classes = [c for c in found if not getattr(c.recipe, "__isabstractmethod__", False)]
        return {cls.__name__.lower(): cls for cls in sorted(classes, key=lambda cls: cls.__name__.lower())}

    def __getitem__(self, name: str) -> type[Optimizer]:
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)


OPTIMIZERS: Mapping[str, type[Optimizer]] = _Registry()


def available() -> list[str]:
    """The names that :func:`create` knows, sorted: of classes, and of configurations (:data:`PRESETS`)."""
    return sorted([*OPTIMIZERS, *PRESETS])


def _key(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def lookup(name: str) -> type[Optimizer]:
    """The class of that name, or of the configuration of that name, in any case; underscores and hyphens are ignored.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    preset = _preset(name)
    if preset is not None:
        return preset.optimizer
    if _key(name) not in OPTIMIZERS:
        near = nearest(_key(name), OPTIMIZERS) or nearest(name.lower(), PRESETS)
        raise ValueError(f"unknown optimizer {name!r}.{near} oput.available() lists all {len(available())} names")
    return OPTIMIZERS[_key(name)]


def _preset(name: str) -> Preset | None:
    return next((preset for known, preset in PRESETS.items() if _key(known) == _key(name)), None)


def create(name: str, params: Params, **options: Any) -> Optimizer:
    """Make the optimizer of that name.

    Args:
        name: one of :func:`available`, in any case.
        params: parameters, groups, named parameters, or a module. Some configurations decay biases and the parameters
            of normalisation layers not at all: they make the groups themselves, best from a module.
        **options: what the class takes.

    Raises:
        ValueError: for an unknown name or a bad value.
        TypeError: for an unknown option.

    Example::

        optimizer = oput.create("lamb", model, lr=1e-3)
        optimizer = oput.create("sgd_nesterov", model, lr=0.1, weight_decay=1e-4)
    """
    make: Any = lookup(name)
    preset = _preset(name)
    if preset is not None:
        options = {**preset.options, **options}
        if not preset.decays_all:
            module = params if isinstance(params, nn.Module) else None
            params = groups_by_decay(params)
            if module is not None:
                options.setdefault("module", module)
    optimizer: Optimizer = make(params, **options)
    return optimizer
