"""Running statistics of normalisation layers, held still in passes that are not those of training."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["hold_statistics", "release_statistics"]


def hold_statistics(module: nn.Module | None) -> list[_NormBase]:
    """Let batch-norm layers normalise by the batch, as in training, without changing what they track.

    Args:
        module: the module; None if it is not known, then nothing is held.

    Returns:
        the layers that are held now, for :func:`release_statistics`.
    """
    layers = [m for m in module.modules() if isinstance(m, _NormBase)] if module is not None else []
    held = [layer for layer in layers if layer.training and layer.track_running_stats]
    for layer in held:
        layer.track_running_stats = False
    return held


def release_statistics(held: list[_NormBase]) -> None:
    """Let them track again."""
    for layer in held:
        layer.track_running_stats = True
