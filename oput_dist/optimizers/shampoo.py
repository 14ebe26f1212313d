"""Shampoo: each axis of a gradient preconditioned by a root of its own statistics."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Params, Shape
from oput_dist.engine.hyper import (
    Allowed,
    Betas,
    Fraction,
    Nonnegative,
    NonnegativeInteger,
    PositiveInteger,
    each,
    hyperparameters,
    positive,
    share,
)
from oput_dist.engine.split import Test
from oput_dist.matrix.shampoo import Precondition
from oput_dist.matrix.work import Work

from .preconditioned import Preconditioned

__all__ = ["Shampoo"]

AveragesOrSum = Annotated[
    tuple[float, float],
    Allowed(
        lambda value: (
            None
            if isinstance(value, (tuple, list))
            and len(value) == 2
            and each(lambda x: None if x == 0 else share(x), "", 2)(value) is None
            and value[0] != 1
            else "a tuple of a number in [0, 1) and one in [0, 1]"
        )
    ),
]
Exponents = Annotated[tuple[float, ...], Allowed(each(positive, "a tuple of one or more numbers > 0"))]


class Shampoo(Preconditioned):
    r"""Shampoo: every axis of a gradient multiplied by an inverse root of its own statistics.

    For a block :math:`g` of :math:`k` axes, with :math:`\times_i` a product along axis i and :math:`g_{(i)}` the matrix
    whose rows are axis i:

    .. math::
        L_i &\leftarrow \beta_2 L_i + (1 - \beta_2)\, g_{(i)} g_{(i)}^T
            \qquad (L_i + g_{(i)} g_{(i)}^T \text{ if } \beta_2 = 1) \\
        f &= (\beta_3 m + (1 - \beta_3) g) / (1 - \beta_3 \beta_1^{t-1}), \qquad
            m \leftarrow \beta_1 m + (1 - \beta_1) g \\
        u &= f \times_1 (L_1 / (1 - \beta_2^t) + \epsilon I)^{-1/2k} \times_2 \dots \\
        p &\leftarrow (1 - \eta\lambda) p - \eta\, u\, \lVert d \rVert / \lVert u \rVert

    where :math:`d` is the step of the grafted optimizer on :math:`f`, which is also taken by itself until a block has
    roots. With ``betas=(0, 1)``, ``graft=None``, ``precondition_frequency=1`` and ``block_size=None`` this is the
    paper's rule. Under sharding each block is put together and worked on by one rank, which alone keeps its state; the
    ranks share the blocks by estimated time. What is sent is the gradient to the owner and the update back.

    What is a matrix, and what goes to AdamW, is decided as by :class:`Muon`. Parameters of more than two axes have a
    factor for each. A block whose gradient is zero everywhere or not finite takes no part in a step: its state stays,
    and it only decays. A root that fails is tried again in float64 and on the CPU; if that fails too the last one
    stays, and :meth:`report` counts it.

    Args:
        params: parameters, groups, named parameters, or a module (best: it tells embeddings).
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, the first in [0, 1), the second in [0, 1]; 1 sums. Default (0.9, 0.999).
        beta3: :math:`\beta_3` in [0, 1); None for :math:`\beta_1`. Default None.
        eps: :math:`\epsilon \ge 0`. Default 1e-12.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.
        block_size: the longest side of a block, an integer >= 1; None: no blocks. Default 1024.
        precondition_frequency: steps from root to root of a block, an integer >= 1. Default 10.
        start_step: the first step with roots, an integer >= 1. Default 1.
        refresh_delay: steps after which roots that are due are taken over, an integer >= 0 below
            ``precondition_frequency``: until then they are found beside the training, from the statistics as they were,
            which are kept for it (4 bytes per element of a factor); a block's first are found at once. Default 0.
        stagger: refresh every axis of every block at a step of its own out of ``precondition_frequency``, so that all
            steps take about the same time (a block without roots finds all at the first of them); else all at
            ``start_step`` and at multiples of the frequency. Default True.
        exponents: for each number of axes the exponent of its factors (its last value for more): ``(1, 0.5, 0.25)``;
            each > 0. None for :math:`1/2k`. Default None.
        root_method: ``"eigh"``, an eigendecomposition; ``"newton"``, coupled Newton iterations, for whole ``2k``;
            ``"newton_schulz"``, for powers of two. Default eigh.
        graft: ``"sgd"``, ``"adagrad"``, ``"rmsprop"``, ``"adam"``, or None for no grafting. Default adam.
        graft_beta: of the squares of rmsprop and adam, in [0, 1). Default 0.999.
        graft_eps: >= 0. Default 1e-8.
        factor_dtype: ``"int8"`` to keep factors and roots in a byte for each element, as codes that hold correlations
            to 1e-5 (see docs/memory.md); ``"bfloat16"`` to keep them in it; None for the parameters' own. What loads
            does not change it. Default None.
        adam_factor: learning rate of AdamW for the other parameters, as a factor of ``lr``, >= 0. Default 1.
        adam_betas: of AdamW, each in [0, 1). Default (0.9, 0.999).
        adam_eps: of AdamW, >= 0. Default 1e-8.
        matrix_params: ``(name, layer, axes) -> bool``: what is a matrix; None: as said above. Default None.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range, for a root method that cannot take the exponents, or if ``matrix_params``
            matches nothing.

    Sharding class M: matrices to their owners and back. State: 16 bytes per parameter (fp32) of square blocks for
    factors and roots, 4 for the average, 4 for grafting; of other parameters 8.

    When: many steps, large batches. Start: ``lr=1e-3``.

    Paper: Gupta et al., https://arxiv.org/abs/1802.09568; Shi et al., https://arxiv.org/abs/2309.06497.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: AveragesOrSum = (0.9, 0.999),
        beta3: Fraction | None = None,
        eps: Nonnegative = 1e-12,
        weight_decay: Nonnegative = 0.0,
        block_size: PositiveInteger | None = 1024,
        precondition_frequency: PositiveInteger = 10,
        start_step: PositiveInteger = 1,
        refresh_delay: NonnegativeInteger = 0,
        stagger: bool = True,
        exponents: Exponents | None = None,
        root_method: Literal["eigh", "newton", "newton_schulz"] = "eigh",
        graft: Literal["sgd", "adagrad", "rmsprop", "adam"] | None = "adam",
        graft_beta: Fraction = 0.999,
        graft_eps: Nonnegative = 1e-8,
        factor_dtype: Literal["bfloat16", "int8"] | None = None,
        adam_factor: Nonnegative = 1.0,
        adam_betas: Betas = (0.9, 0.999),
        adam_eps: Nonnegative = 1e-8,
        matrix_params: Test | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, matrix_params, hyperparameters(locals(), "matrix_params"), common)

    def check(self, group: Group) -> None:
        self.check_delay(group)
        method = group["root_method"]
        if group["exponents"] is not None and method != "eigh":
            roots = [1 / exponent for exponent in group["exponents"]]
            fits = all(
                root == int(root) and (method == "newton" or (root >= 2 and int(root) & (int(root) - 1) == 0))
                for root in roots
            )
            if not fits:
                raise ValueError(
                    f"Shampoo: root_method={method!r} cannot take exponents={group['exponents']}: their inverses must "
                    f"be {'whole numbers' if method == 'newton' else 'powers of two from 2 on'}, or take 'eigh'"
                )

    def work(self, group: Group, shape: Shape) -> Work:
        beta3, stored = group["beta3"], group["factor_dtype"]
        if group["root_method"] == "newton_schulz" and group["exponents"] is None and len(shape) & (len(shape) - 1):
            raise ValueError(
                f"Shampoo: root_method='newton_schulz' cannot take the root 2k = {2 * len(shape)} of a parameter of "
                f"shape {tuple(shape)}: put it in a group with root_method='eigh' or with exponents"
            )
        return Precondition(
            betas=tuple(group["betas"]),
            beta3=group["betas"][0] if beta3 is None else beta3,
            eps=group["eps"],
            frequency=group["precondition_frequency"],
            start=group["start_step"],
            delay=group["refresh_delay"],
            staggered=group["stagger"],
            block_size=group["block_size"],
            exponents=None if group["exponents"] is None else tuple(group["exponents"]),
            root_method=group["root_method"],
            graft=group["graft"],
            graft_beta=group["graft_beta"],
            graft_eps=group["graft_eps"],
            factor_dtype=None if stored is None else getattr(torch, stored),
        )

    def adam_options(self, group: Group) -> dict[str, Any]:
        return {"betas": group["adam_betas"], "eps": group["adam_eps"]}
