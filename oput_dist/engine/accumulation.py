"""Optimizer accumulation: for which optimizers a step may go into the state alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oput_dist.kernels.stage import Agreed, Joint, Stage

from .recipe import Recipe

if TYPE_CHECKING:
    from .optimizer import Optimizer

__all__ = ["NoAccumulation", "check_accumulates", "joint"]

_MOMENTS = {"exp_avg", "momentum_buffer", "momentum_buffer_0"}
"""State that sums or averages gradients, so that one reaches the parameters in a later step."""


def check_accumulates(optimizer: Optimizer) -> None:
    """Raise ValueError, before anything changed, for an optimizer whose state does not carry gradients on.

    That is one without a first moment, which would drop all gradients but the last; one that keeps iterates, or counts
    steps, in its state; and one that decides for the whole model or works on whole matrices, whose cost is that of a
    full step.
    """
    why = optimizer.why_no_accumulation
    for number, group in enumerate(optimizer.param_groups):
        for shape in {tuple(p.shape) for p in group["params"]}:
            why = why or _why_not(optimizer.recipe_of(group, shape), number)
    if why is not None:
        raise ValueError(
            f"{type(optimizer).__name__}: optimizer_accumulation=True is not possible here: {why}; accumulate "
            "gradients instead, by several backward passes before step(), without gradient release"
        )


class NoAccumulation:
    """Of optimizers that follow every step of another one."""

    @property
    def optimizer_accumulation(self) -> bool:
        """False: it is not possible here."""
        return False

    @optimizer_accumulation.setter
    def optimizer_accumulation(self, value: bool) -> None:
        if value:
            raise TypeError(f"{type(self).__name__} follows every step: optimizer_accumulation is not possible with it")


def joint(stage: Stage) -> bool:
    """Whether a stage is given what follows from sums over the whole model."""
    given = stage.given
    return isinstance(given.before if isinstance(given, Agreed) else given, Joint)


def _why_not(recipe: Recipe, group: int) -> str | None:
    if recipe.whole is not None:
        return "it works on whole matrices in every step"
    if any(joint(stage) for stage in recipe.stages):
        return "it takes sums over the whole model in every step"
    if not _MOMENTS.intersection(recipe.state):
        kept = ", ".join(recipe.state) or "no state"
        return f"in group {group} it keeps {kept}, and no average of gradients, so all but the last would be lost"
    return None
