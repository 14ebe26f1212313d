"""Which parameters are matrices, for optimizers that work on whole ones; the others go to a rule of vectors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from oput_dist.engine import Params
from oput_dist.engine.split import Test, split

__all__ = ["MATRIX", "is_hidden_matrix", "routed"]

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
    words = name.split(".")
    return axes >= 2 and not isinstance(layer, nn.Embedding | nn.EmbeddingBag) and not set(words) & set(HEADS)


def routed(params: Params, matrix_params: Test | None) -> list[dict[str, Any]]:
    """Parameter groups by kind. Groups that are given stay as they are; one that does not say is of matrices where its
    parameters have two axes or more.

    Args:
        params: a module, parameters, named parameters, or groups.
        matrix_params: tells matrices apart, see :data:`oput_dist.engine.split.Test`; None for :func:`is_hidden_matrix`.

    Raises:
        ValueError: if no parameter is a matrix.
    """
    if not isinstance(params, nn.Module):
        entries: list[Any] = list(params) if isinstance(params, Iterable) else [params]
        if entries and isinstance(entries[0], dict):
            return entries
        params = entries
    matrices, others = split(params, matrix_params or is_hidden_matrix, "whether they are matrices")
    if not matrices:
        raise ValueError(
            "no parameter is a matrix of a hidden layer, so there is nothing to work on whole: give the module, or "
            "matrix_params=lambda name, layer, axes: axes >= 2, or use another optimizer"
        )
    groups: list[dict[str, Any]] = [{"params": matrices, MATRIX: True}, {"params": others, MATRIX: False}]
    return [group for group in groups if group["params"]]
