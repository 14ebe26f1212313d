"""Values that run but are seldom meant."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from oput_dist.engine import Group, Optimizer

__all__: list[str] = []


def warn_once(optimizer: Optimizer, unmeant: Callable[[Group], bool], text: str, deeper: int = 0) -> None:
    """Warn when the newest group is the first of an optimizer that holds such values; called by ``complete``.

    ``deeper``: how many calls more than usual lie between, as an ``add_param_group`` of the class's own.
    """
    *before, new = optimizer.param_groups
    if unmeant(new) and not any(unmeant(group) for group in before):
        warnings.warn(f"{type(optimizer).__name__}: {text}", stacklevel=7 + deeper)  # where the optimizer is made
