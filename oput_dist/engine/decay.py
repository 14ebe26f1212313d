"""Which parameters weight decay spares: biases and those of normalisation layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from .optimizer import Params
from .split import split

__all__ = ["groups_by_decay"]


def groups_by_decay(params: Params) -> list[dict[str, Any]]:
    """Two parameter groups: what decays, and with ``weight_decay=0`` biases and what belongs to normalisation layers.

    A parameter is spared if its name ends in ``bias``, if it belongs to a layer whose class is called ``...Norm...``,
    or if its original shape has fewer than two axes. The result is the same before and after wrapping.

    Args:
        params: a module; or named parameters, or parameters, of which less is known.

    Raises:
        ValueError: for parameter groups, and for a flat parameter of FSDP1 that holds both kinds.
    """
    spared, decayed = split(params, _is_spared, "decay")
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_spared(name: str, layer: nn.Module | None, axes: int) -> bool:
    return axes < 2 or name.rpartition(".")[2] == "bias" or "Norm" in type(layer).__name__
