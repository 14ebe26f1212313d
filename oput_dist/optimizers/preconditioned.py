"""What Shampoo and SOAP share: owners keep all state of a block; gradients go there, updates come back."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from oput_dist.engine import Common, Group, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.matrices import MATRIX_STEPS, matrices_in
from oput_dist.engine.split import Test
from oput_dist.kernels.language import rule
from oput_dist.kernels.stage import Measure, Update
from oput_dist.matrix.kronecker import COUNTS
from oput_dist.matrix.work import Work

from .matrixwise import Matrixwise

__all__ = ["MatrixReport", "Preconditioned"]


@rule
def hand_over(p, g, state, h):
    return (g,), ()


@rule
def take_step(p, g, state, h):
    return (1.0 - h.rate_decay) * p - h.rate * state[0], ()


@dataclass(frozen=True)
class MatrixReport:
    """What became of the blocks of all matrices, over all steps."""

    blocks: int
    """How many there are."""
    gradients: int
    """That counted: of every block and step those that were finite and not zero everywhere."""
    refreshes: int
    """Steps at which roots or bases of a block were found anew, along all axes or some, summed over the blocks."""
    failures: int
    """Of those at which they could not be found, so that the last ones stayed."""


class Preconditioned(Matrixwise):
    """Optimizers whose work on a matrix is a :class:`Work` with state of its own."""

    forms: ClassVar[tuple[str, ...]] = ("factor_dtype",)

    def __init__(self, params: Params, matrix_params: Test | None, defaults: dict[str, Any], common: Common) -> None:
        super().__init__(params, matrix_params, {**defaults, MATRIX_STEPS: 0}, common)

    @abstractmethod
    def work(self, group: Group, shape: Shape) -> Work:
        """What is done with a matrix."""

    def check_delay(self, group: Group) -> None:
        """Raise ValueError if something would fall due again before it is taken over."""
        delay, frequency = group["refresh_delay"], group["precondition_frequency"]
        if delay and delay >= frequency:
            raise ValueError(
                f"{type(self).__name__}: refresh_delay={delay} must be below precondition_frequency={frequency}: what "
                f"is found must be taken over before it is due again"
            )

    def matrix_recipe(self, group: Group, shape: Shape) -> Recipe:
        return Recipe((Measure(hand_over, ()), Update(take_step)), whole=self.work(group, shape))

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(**self.others(group, step), rate=group["lr"], rate_decay=decay_rate(group))

    def advance(self, group: dict[str, Any]) -> None:
        group[MATRIX_STEPS] += 1

    @torch.no_grad()
    def report(self) -> MatrixReport:
        """How often roots or bases were found, and failed. Every rank that holds a part of the model must call it."""
        plan = self._current_plan()
        matrices = matrices_in(self, plan, self.param_groups)
        total, blocks = torch.zeros(3, dtype=torch.float64), 0
        for slot in plan.slots:
            owned = None if matrices is None else matrices.owned(slot)
            if owned is not None:
                counts = owned.whole(self.state.get(slot.parameter, {}), COUNTS).view(-1, 3)
                total += counts.sum(0, dtype=torch.float64).cpu()
                blocks += len(counts)
        return MatrixReport(blocks, *(int(number) for number in total))
