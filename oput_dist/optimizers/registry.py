"""Optimizers by name."""

from __future__ import annotations

from typing import Any

from oput_dist.engine import Optimizer, Params
from oput_dist.engine.hyper import nearest

from .adafactor import Adafactor
from .adam import Adam, AdamW
from .adamp import AdamP
from .adan import Adan
from .lamb import Lamb
from .lion import Lion
from .momo import Momo
from .sgd import SGD
from .stableadamw import StableAdamW

__all__ = ["OPTIMIZERS", "available", "create", "lookup"]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    cls.__name__.lower(): cls for cls in (Adafactor, Adam, AdamP, AdamW, Adan, Lamb, Lion, Momo, SGD, StableAdamW)
}


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
