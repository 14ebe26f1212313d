"""Optimizers by name."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from oput_dist.engine import Optimizer, Params
from oput_dist.engine.hyper import nearest

__all__ = ["OPTIMIZERS", "available", "create", "lookup"]


class _Registry(Mapping[str, type[Optimizer]]):
    """The classes of the suite by lower-case name: every optimizer that the package's ``__init__`` takes in."""

    @functools.cached_property
    def _classes(self) -> dict[str, type[Optimizer]]:
        package = importlib.import_module(__package__ or "")
        classes = [c for c in vars(package).values() if isinstance(c, type) and issubclass(c, Optimizer)]
        return {cls.__name__.lower(): cls for cls in sorted(classes, key=lambda cls: cls.__name__.lower())}

    def __getitem__(self, name: str) -> type[Optimizer]:
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)


OPTIMIZERS: Mapping[str, type[Optimizer]] = _Registry()


def available() -> list[str]:
    """The names that :func:`create` knows, sorted."""
    return sorted(OPTIMIZERS)


def lookup(name: str) -> type[Optimizer]:
    """The class of that name, in any case; underscores and hyphens do not matter.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    key = name.lower().replace("_", "").replace("-", "")
    if key not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}.{nearest(key, OPTIMIZERS)} Available: {', '.join(available())}")
    return OPTIMIZERS[key]


def create(name: str, params: Params, **options: Any) -> Optimizer:
    """Make the optimizer of that name.

    Args:
        name: one of :func:`available`, in any case.
        params: parameters, groups, named parameters, or a module.
        **options: what the class takes.

    Raises:
        ValueError: for an unknown name or a bad value.
        TypeError: for an unknown option.

    Example::

        optimizer = oput.create("lamb", model, lr=1e-3)
    """
    make: Any = lookup(name)
    optimizer: Optimizer = make(params, **options)
    return optimizer
