"""Which parameters are matrices, for optimizers that work on whole ones; the others go to a rule of vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from oput_dist.engine import Params
from oput_dist.engine.split import Test, split

__all__ = ["MATRIX", "is_hidden_matrix", "routed", "routing_table"]

MATRIX = "matrix"
"""The key of a parameter group that says whether its parameters are worked on as matrices."""
HEADS = ("head", "lm_head", "output", "classifier", "unembed", "embed_out")
"""Names of layers that map to classes or tokens, whose rows are no directions of one space."""


def is_hidden_matrix(name: str, layer: nn.Module | None, axes: int) -> bool:
    """Whether a parameter is a matrix of a hidden layer: two axes or more, no embedding, no output head.

    Args:
        name: qualified, "" if it is not known.
        layer: the module that it belongs to, None if that is not known.
        axes: of its original shape.
    """
    of_layer = name.split(".")[-2:-1]
    return axes >= 2 and not isinstance(layer, nn.Embedding | nn.EmbeddingBag) and not set(of_layer) & set(HEADS)


def routed(
    params: Params, matrix_params: Test | None, module: nn.Module | None = None, owner: str = "this optimizer"
) -> Any:
    """Parameter groups by kind, where names or layers tell kinds apart.

    Groups that are given stay as they are, and bare parameters are one group: in a group that does not say, matrices
    are what has two axes or more.

    Args:
        params: a module, parameters, named parameters, or groups.
        module: the module of the parameters, where it is known.
        matrix_params: tells matrices apart, see :data:`oput_dist.engine.split.Test`; None for :func:`is_hidden_matrix`.

    Raises:
        ValueError: if ``matrix_params`` matches nothing.
    """
    if matrix_params is not None and not callable(matrix_params):
        raise ValueError(
            f"{owner}: matrix_params={matrix_params!r} is not allowed: must be a function (name, layer, axes) -> bool"
        )
    if isinstance(params, torch.Tensor):
        return params  # which no optimizer takes, and says so
    if not isinstance(params, nn.Module):
        entries: list[Any] = list(params)
        bare = matrix_params is None and module is None and not any(isinstance(entry, tuple) for entry in entries)
        if bare or any(isinstance(entry, dict) for entry in entries):
            return entries
        params = entries
    matrices, others = split(params, matrix_params or is_hidden_matrix, "whether they are matrices", module)
    if not matrices and matrix_params is not None:
        raise ValueError(
            "matrix_params says of no parameter that it is a matrix: it is called as matrix_params(name, layer, axes), "
            f"as for {_listed(others)}; leave it out for hidden layers of two axes or more"
        )
    groups: list[dict[str, Any]] = [{"params": matrices, MATRIX: True}, {"params": others, MATRIX: False}]
    return [group for group in groups if group["params"]]


def _listed(entries: list[Any]) -> str:
    """The first parameters, as the test sees them."""
    shown = [entry if isinstance(entry, tuple) else ("", entry) for entry in entries[:3]]
    return ", ".join(f"({name!r}, ..., {parameter.ndim})" for name, parameter in shown)


def routing_table(optimizer: Any) -> str:
    """A line for each parameter of an optimizer of matrices: its name, its shape, its group and what updates it."""
    rows = [("parameter", "shape", "group", "updated by")]
    for slot in optimizer._current_plan().slots:
        group, shape = optimizer.param_groups[slot.group], tuple(slot.layout.shape)
        by = type(optimizer).__name__ if optimizer.is_matrix(group, shape) else "AdamW"
        rows.append((slot.name.removeprefix("parameter ").strip("'"), str(shape), str(slot.group), by))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join((*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3])) for row in rows
    )
