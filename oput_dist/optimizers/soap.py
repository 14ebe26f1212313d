"""SOAP: Adam in the eigenbasis of Shampoo's statistics."""

from __future__ import annotations

from typing import Any, Literal

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Params, Shape
from oput_dist.engine.hyper import Betas, Fraction, Nonnegative, NonnegativeInteger, PositiveInteger, hyperparameters
from oput_dist.engine.split import Test
from oput_dist.matrix.soap import AdamInEigenbasis
from oput_dist.matrix.work import Work

from .preconditioned import Preconditioned

__all__ = ["SOAP"]


class SOAP(Preconditioned):
    r"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's statistics.

    For a matrix :math:`g` with :math:`Q_L`, :math:`Q_R` the bases of its rows and columns:

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) (Q_L^T g Q_R)^2 \\
        u &= Q_L \frac{\hat m'}{\sqrt{\hat v} + \epsilon} Q_R^T, \qquad m' = Q_L^T m Q_R \\
        p &\leftarrow (1 - \eta\lambda) p - \eta u \\
        L &\leftarrow \beta_s L + (1 - \beta_s) g g^T, \qquad R \leftarrow \beta_s R + (1 - \beta_s) g^T g

    The bases are eigenvectors of L and R at first, and then every ``precondition_frequency`` steps those of one step
    of orthogonal iteration from the last. The first gradient only makes them: it moves nothing, as in the reference,
    which decays after the step where this decays before it. Under sharding each block is put together and worked on by
    one rank, which alone keeps its state. What is sent is the gradient to the owner and the update back.

    What is a matrix, and what goes to AdamW (with the same ``betas`` and ``eps``), is decided as by :class:`Muon`.
    Parameters of more than two axes have a basis for each. A block whose gradient is zero everywhere or not finite
    takes no part in a step: its state stays, and it only decays. A basis that cannot be found is tried again in
    float64 and on the CPU; if that fails too the last one stays, and :meth:`report` counts it.

    Args:
        params: parameters, groups, named parameters, or a module (best: it tells embeddings).
        lr: learning rate :math:`\eta \ge 0`. Default 3e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.95, 0.95).
        shampoo_beta: :math:`\beta_s` in [0, 1); None for :math:`\beta_2`. Default None.
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.01.
        precondition_frequency: steps from basis to basis, an integer >= 1. Default 10.
        refresh_delay: steps after which bases that are due are taken over, an integer >= 0 below
            ``precondition_frequency``: until then they are found beside the training, from the statistics as they were,
            which are kept for it (4 bytes per element of a factor); a block's first is found at once. Default 0.
        max_preconditioner_dim: axes that are longer keep their own basis, an integer >= 1. Default 10000.
        block_size: the longest side of a block, an integer >= 1; None: no blocks. Default None.
        stagger: refresh every axis of every block at a step of its own out of ``precondition_frequency``, so that all
            steps take about the same time; else all at multiples of the frequency. Default True.
        factor_dtype: ``"int8"`` to keep factors and bases in a byte for each element, as codes (see docs/memory.md);
            ``"bfloat16"`` to keep them in it; None for the parameters' own. What loads does not change it. Default
            None.
        adam_factor: learning rate of AdamW for the other parameters, as a factor of ``lr``, >= 0. Default 1.
        matrix_params: ``(name, layer, axes) -> bool``: what is a matrix; None: as said above. Default None.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range, or if ``matrix_params`` matches nothing.

    Sharding class M: matrices to their owners and back. State: 8 bytes per parameter (fp32) for the averages, 16 for
    factors and bases of square matrices; of other parameters 8.

    When: the fewest steps to a loss. Start: ``lr=3e-3``.

    Paper: Vyas et al., https://arxiv.org/abs/2409.11321.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 3e-3,
        betas: Betas = (0.95, 0.95),
        shampoo_beta: Fraction | None = None,
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.01,
        precondition_frequency: PositiveInteger = 10,
        refresh_delay: NonnegativeInteger = 0,
        max_preconditioner_dim: PositiveInteger = 10000,
        block_size: PositiveInteger | None = None,
        stagger: bool = True,
        factor_dtype: Literal["bfloat16", "int8"] | None = None,
        adam_factor: Nonnegative = 1.0,
        matrix_params: Test | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, matrix_params, hyperparameters(locals(), "matrix_params"), common)

    def check(self, group: Group) -> None:
        self.check_delay(group)

    def work(self, group: Group, shape: Shape) -> Work:
        factor_beta, stored = group["shampoo_beta"], group["factor_dtype"]
        return AdamInEigenbasis(
            betas=tuple(group["betas"]),
            factor_beta=group["betas"][1] if factor_beta is None else factor_beta,
            eps=group["eps"],
            frequency=group["precondition_frequency"],
            delay=group["refresh_delay"],
            staggered=group["stagger"],
            largest=group["max_preconditioner_dim"],
            block_size=group["block_size"],
            factor_dtype=None if stored is None else getattr(torch, stored),
        )

    def adam_options(self, group: Group) -> dict[str, Any]:
        return {}
