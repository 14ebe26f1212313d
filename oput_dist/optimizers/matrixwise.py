"""What optimizers of whole matrices have in common: their routing, and AdamW for what is no matrix."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import nn

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, decay_rate
from oput_dist.engine.hyper import Check, boolean, nonnegative_integer
from oput_dist.engine.matrices import MATRIX_STEPS
from oput_dist.engine.split import Test
from oput_dist.kernels.language import rule
from oput_dist.kernels.stage import Update

from .adam import adam
from .routing import MATRIX, routed, routing_table
from .scalars import adam_scalars

__all__ = ["Matrixwise"]


@rule
def decayed_adam(p, g, state, h):
    return adam((1.0 - h.decay) * p, g, state, h)


class Matrixwise(Optimizer):
    """Matrices of hidden layers by one rule, all other parameters by AdamW in the same object.

    A module's matrices are the parameters of two axes or more that belong to no embedding and to no layer called
    ``head``, ``lm_head`` and the like: the same before and after wrapping. Of bare parameters only the shapes are
    known. Groups may say ``"matrix": True`` or ``False``.

    Args:
        params: parameters, groups, named parameters, or a module (best: it tells embeddings).
        matrix_params: ``(name, layer, axes) -> bool``: what is a matrix; None: as said above.
        defaults: of a group.
        common: see :class:`oput_dist.engine.Common`.
    """

    checks: ClassVar[dict[str, Check]] = {MATRIX: boolean, MATRIX_STEPS: nonnegative_integer}

    def __init__(self, params: Params, matrix_params: Test | None, defaults: dict[str, Any], common: Common) -> None:
        if isinstance(params, nn.Module):
            common.setdefault("module", params)
        groups = routed(params, matrix_params, common.get("module"), type(self).__name__)
        super().__init__(groups, {**defaults, MATRIX: True}, common)

    @abstractmethod
    def matrix_recipe(self, group: Group, shape: Shape) -> Recipe:
        """How matrices of one shape are updated; none of them is empty."""

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        if not self.is_matrix(group, shape):
            return Recipe((Update(decayed_adam),), ("exp_avg", "exp_avg_sq"))
        return self.matrix_recipe(group, shape)

    @staticmethod
    def is_matrix(group: Group, shape: Shape) -> bool:
        """Whether parameters of a shape are worked on as matrices in a group."""
        return bool(group[MATRIX]) and len(shape) >= 2 and 0 not in shape

    def others(self, group: Group, step: int) -> dict[str, Any]:
        """The scalars of AdamW for other parameters."""
        lr = group["lr"] * group["adam_factor"]
        return {
            **adam_scalars({**group, "lr": lr, **self.adam_options(group)}, step),
            "decay": decay_rate(group) if group["decouple_lr"] else lr * group["weight_decay"],
        }

    def adam_options(self, group: Group) -> dict[str, Any]:
        """``betas`` and ``eps`` of AdamW for other parameters."""
        return {"eps": group["adam_eps"]}

    def works_on_matrices(self) -> bool:
        return True

    def routing(self) -> str:
        """A table of which parameters are worked on as matrices and which go to AdamW, to be printed."""
        return routing_table(self)
