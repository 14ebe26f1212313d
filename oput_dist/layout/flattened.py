"""Bare parameters that FSDP1 flattened: their pieces are known, their shapes and neighbours are not."""

from __future__ import annotations

import torch

from .base import LayoutError
from .box import Box
from .plain import Plain

__all__ = ["Flattened", "is_flattened", "mark_flattened"]

_MARK = "_oput_flattened"


def is_flattened(parameter: torch.Tensor) -> bool:
    """Whether FSDP1 (``FullyShardedDataParallel``) made this parameter, with ``use_orig_params`` or without, or
    DeepSpeed did (:func:`mark_flattened`)."""
    by_fsdp1 = bool(getattr(parameter, "_fsdp_flattened", False)) or type(parameter).__name__ == "FlatParameter"
    return by_fsdp1 or hasattr(parameter, _MARK)


def mark_flattened(parameter: torch.Tensor) -> None:
    """Say that a tensor stands for ranges of several parameters, which nothing in it shows (DeepSpeed's partitions)."""
    setattr(parameter, _MARK, True)


class Flattened(Plain):
    """A range of a flat parameter: enough for elementwise updates, which need nothing of the rest."""

    why_no_sums = (
        "FSDP1 (FullyShardedDataParallel) flattened it, so its shape and the ranks that hold the rest are not known "
        "from the parameter alone: pass the wrapped module in place of its parameters, Optimizer(fsdp_module, ...), or "
        "beside parameter groups as module=fsdp_module"
    )

    @property
    def boxes(self) -> tuple[Box, ...]:
        raise LayoutError(self.why_no_sums)
