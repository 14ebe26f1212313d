"""What is planned for: the parameters, by shape and group, and how the optimizer updates each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from oput_dist.engine import Group, Optimizer, Recipe
from oput_dist.engine.slot import Slot
from oput_dist.layout import is_flattened
from oput_dist.optimizers import create

from .world import World

__all__ = ["Given", "given"]


@dataclass(frozen=True)
class Given:
    """Parameters and their optimizer."""

    optimizer: Optimizer
    entries: tuple[tuple[int, torch.Tensor], ...]
    """Number of the group, and the parameter: of those that are trained, in order."""
    frozen: tuple[torch.Tensor, ...]

    def group(self, number: int) -> Group:
        """A parameter group."""
        return self.optimizer.param_groups[number]

    def recipe(self, slot: Slot) -> Recipe:
        """How a slot is updated."""
        return self.optimizer.recipe_of(self.group(slot.group), slot.layout.shape)

    def slots(self, world: World, rank: int) -> list[Slot]:
        """As the engine sees the parameters on a rank."""
        made = []
        for i, (number, parameter) in enumerate(self.entries):
            layout = world.layout_of(parameter.shape, rank)
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            made.append(Slot(whole, f"parameter {i}", layout, number, i, i, False))
        return made


def given(
    model: nn.Module | Mapping[str, Sequence[int]] | None,
    optimizer: str | type[Optimizer] | Optimizer,
    dtype: torch.dtype,
    options: Mapping[str, Any],
) -> Given:
    """Parameters and their optimizer. See :func:`oput_dist.plan`.

    Raises:
        TypeError, ValueError: for what cannot be planned for.
    """
    if isinstance(optimizer, Optimizer):
        _check_own(model, optimizer, options)
        made = optimizer
    else:
        made = _made(model, optimizer, dtype, options)
    every = [(i, p) for i, group in enumerate(made.param_groups) for p in group["params"]]
    if any(is_flattened(p) for _, p in every):
        raise ValueError(
            "FSDP1 (FullyShardedDataParallel) flattened these parameters, so their shapes are not known: plan with the "
            "module as it was before, on the meta device if it is large"
        )
    if not any(p.requires_grad for _, p in every):
        raise ValueError("there is nothing to plan for: all parameters are frozen")
    return Given(
        made, tuple((i, p) for i, p in every if p.requires_grad), tuple(p for _, p in every if not p.requires_grad)
    )


def _check_own(model: Any, optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    if options:
        raise TypeError(f"an optimizer that is made already takes no option {next(iter(options))!r}: set it there")
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if model is not None and not (isinstance(model, nn.Module) and own <= {id(p) for p in model.parameters()}):
        raise ValueError(
            "the optimizer has parameters of its own, which are not those of the model: give None for the model to "
            "plan for them, or give the optimizer by name, with its options"
        )


def _made(model: Any, optimizer: Any, dtype: torch.dtype, options: Mapping[str, Any]) -> Optimizer:
    if not isinstance(optimizer, str) and not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(
            f"optimizer={optimizer!r}: must be one of this library's optimizers, its class, or its name; of a wrapper, "
            "plan for the optimizer inside"
        )
    if isinstance(model, nn.Module):
        params: Any = model
        empty = next(model.parameters(), None) is None
    elif isinstance(model, Mapping):
        shapes = {name: torch.Size(shape) for name, shape in model.items()}
        params = [(name, nn.Parameter(torch.empty(s, dtype=dtype, device="meta"))) for name, s in shapes.items()]
        empty = not params
    else:
        raise TypeError(f"model is a {type(model).__name__}: must be a module, or shapes by the parameters' names")
    if empty:
        raise ValueError("there are no parameters to plan for: give a module that has some, or shapes by name")
    if isinstance(optimizer, str):
        return create(optimizer, params, **options)
    make: Any = optimizer
    made: Optimizer = make(params, **options)
    return made
