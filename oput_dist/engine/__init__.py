"""The engine: what happens in ``step()``. Sees layouts and rules; nothing in it belongs to one optimizer."""

from .norm import clip_grad_norm_
from .optimizer import Common, Optimizer, Params
from .recipe import Group, Recipe, Shape, decay_rate, row_of
from .size import state_bytes

__all__ = [
    "Common",
    "Group",
    "Optimizer",
    "Params",
    "Recipe",
    "Shape",
    "clip_grad_norm_",
    "decay_rate",
    "row_of",
    "state_bytes",
]
