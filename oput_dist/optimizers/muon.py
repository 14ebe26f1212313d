"""Muon: momentum, orthogonalised. And AdamW for what is no matrix."""

from __future__ import annotations

from typing import Any, Literal

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.hyper import (
    Betas,
    Fraction,
    Nonnegative,
    Positive,
    PositiveInteger,
    hyperparameters,
)
from oput_dist.engine.split import Test
from oput_dist.kernels.language import rule
from oput_dist.kernels.math import lerp
from oput_dist.kernels.stage import Measure, Update
from oput_dist.matrix.orthogonal import NEWTON_SCHULZ, Orthogonalize, polar_express

from .matrixwise import Matrixwise

__all__ = ["Muon"]


@rule
def muon_momentum(p, g, state, h):
    m = lerp(state[0], g, h.weight)
    return (m, m), ()


@rule
def muon_nesterov(p, g, state, h):
    m = lerp(state[0], g, h.weight)
    return (m, lerp(g, m, h.momentum)), ()


@rule
def muon_apply(p, g, state, h):
    return (1.0 - h.rate_decay) * p - h.rate * state[1], ()


class Muon(Matrixwise):
    r"""Muon: the momentum of each hidden matrix, orthogonalised; AdamW for all other parameters.

    .. math::
        m_t &= \mu m_{t-1} + (1 - \mu) g_t, \qquad \tilde m_t = (1 - \mu) g_t + \mu m_t \\
        p_t &= (1 - \eta\lambda) p_{t-1} - \eta\, s\, \operatorname{NS}(\tilde m_t)

    :math:`\operatorname{NS}` brings singular values near one by Newton-Schulz iterations. Under sharding each matrix is
    put together and worked on by one rank: the ranks share the work by estimated time, what is sent is one piece to the
    owner and one back, and momentum stays sharded.

    A module's matrices are the parameters of two axes or more that belong to no embedding and to no layer called
    ``head``, ``lm_head`` and the like: the same before and after wrapping. Of bare parameters only the shapes are
    known. Groups may say ``"matrix": True`` or ``False``.

    Args:
        params: parameters, groups, named parameters, or a module (best: it tells embeddings).
        lr: learning rate :math:`\eta \ge 0` of matrices. Default 1e-3.
        momentum: :math:`\mu` in [0, 1). Default 0.95.
        nesterov: look ahead as above; without, :math:`\tilde m = m`. Default True.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.1.
        ns_steps: iterations, an integer >= 1. Default 5.
        polar_express: take the coefficients of Polar Express, one triple for each step, in place of Muon's. Default
            False.
        adjust_lr: the factor :math:`s`: ``"original"``: :math:`\sqrt{\max(1, rows / columns)}`;
            ``"match_rms_adamw"``: :math:`0.2 \sqrt{\max(rows, columns)}`, so that AdamW's learning rate and decay
            serve; None: 1. Default original.
        eps: the least norm that a matrix is divided by, > 0. Default 1e-7.
        adam_factor: learning rate of AdamW for the other parameters, as a factor of ``lr``, so that one schedule serves
            both; >= 0. Default 1.
        betas: of AdamW, each in [0, 1). Default (0.9, 0.95).
        adam_eps: of AdamW, >= 0. Default 1e-8.
        ns_dtype: ``"bfloat16"``, ``"float32"`` or ``"float64"``, to iterate in; None: bfloat16 on GPUs, else the
            parameters' own. Default None.
        matrix_params: ``(name, layer, axes) -> bool``: what is a matrix; None: as said above. Default None.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range, or if ``matrix_params`` matches nothing. (Without it, parameters that are
            all vectors go to AdamW.)

    Sharding class M: matrices to their owners and back. State: 4 bytes per parameter (fp32) of matrices, 8 of others.

    When: hidden layers of transformers. Start: ``lr=0.02``, ``adam_factor=0.15``.

    Paper: Jordan et al., https://kellerjordan.github.io/posts/muon/; Liu et al., https://arxiv.org/abs/2502.16982.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        momentum: Fraction = 0.95,
        nesterov: bool = True,
        weight_decay: Nonnegative = 0.1,
        ns_steps: PositiveInteger = 5,
        polar_express: bool = False,
        adjust_lr: Literal["original", "match_rms_adamw"] | None = "original",
        eps: Positive = 1e-7,
        adam_factor: Nonnegative = 1.0,
        betas: Betas = (0.9, 0.95),
        adam_eps: Nonnegative = 1e-8,
        ns_dtype: Literal["bfloat16", "float32", "float64"] | None = None,
        matrix_params: Test | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, matrix_params, hyperparameters(locals(), "matrix_params", "__class__"), common)

    def matrix_recipe(self, group: Group, shape: Shape) -> Recipe:
        steps = group["ns_steps"]
        coefficients = polar_express(steps) if group["polar_express"] else (NEWTON_SCHULZ,) * steps
        dtype = None if group["ns_dtype"] is None else getattr(torch, group["ns_dtype"])
        whole = Orthogonalize(coefficients, group["eps"], group["adjust_lr"], dtype)
        first = Measure(muon_nesterov if group["nesterov"] else muon_momentum, ())
        return Recipe((first, Update(muon_apply)), ("momentum_buffer",), whole=whole)

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(
            **self.others(group, step),
            rate=group["lr"],
            rate_decay=decay_rate(group),
            weight=1 - group["momentum"],
            momentum=group["momentum"],
        )
