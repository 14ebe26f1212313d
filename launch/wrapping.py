"""What can stand around the optimizer: --wrap sam lookahead makes Lookahead(SAM(optimizer))."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

import oput_dist as oput
from launch.errors import UsageError

WRAPPERS: dict[str, Callable[[Any], oput.Wrapper]] = {
    cls.__name__.lower(): cls
    for cls in (oput.SAM, oput.ASAM, oput.GSAM, oput.LookSAM, oput.Lookahead, oput.EMA, oput.SWA)
}


def wrapped(optimizer: oput.Optimizer | oput.Wrapper, names: Sequence[str]) -> oput.Optimizer | oput.Wrapper:
    """The optimizer inside of the wrappers of these names, the first innermost, each with its defaults."""
    for name in names:
        try:
            optimizer = WRAPPERS[name](optimizer)
        except (TypeError, ValueError) as e:
            raise UsageError(f"--wrap {name}: {e}") from e
    return optimizer


def title(optimizer: torch.optim.Optimizer) -> str:
    """What is around what: Lookahead(Lamb)."""
    name = type(optimizer).__name__
    return f"{name}({title(optimizer.inner)})" if isinstance(optimizer, oput.Wrapper) else name


def averaged(optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """Inside of it the model has the average of its weights, if the optimizer keeps one."""
    enter: Callable[[], AbstractContextManager[None]] = getattr(optimizer, "averaged", nullcontext)
    return enter()
