"""Sophia: momentum over an estimate of the Hessian's diagonal, clipped element by element."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from typing_extensions import Unpack

from oput_dist.curvature import Estimator, GaussNewtonBartlett, Hutchinson
from oput_dist.engine import Common, Group, Params, Recipe, Shape, row_of
from oput_dist.engine.forms import numbers_of
from oput_dist.engine.hyper import Betas, Nonnegative, Positive, PositiveInteger, hyperparameters
from oput_dist.engine.sweep import part_of, sweep
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import at_least, at_most, lerp
from oput_dist.kernels.stage import WHOLE, Decay, Measure, Update

from .curved import Curved

__all__ = ["Sophia", "SophiaG", "SophiaH", "SophiaReport"]


@rule
def sophia(p, g, state, h):
    m, hessian = state
    m = lerp(m, g, h.weight1)
    ratio = m / at_least(h.rho * hessian, h.eps)
    return p - h.lr * at_most(at_least(ratio, -1.0), 1.0), (m,)


@rule
def sophia_report(p, g, state, h):
    """``p`` is the moment, ``g`` the Hessian."""
    return state, ((tl.abs(p) >= at_least(h.rho * g, h.eps)).to(p.dtype), g * g)


class SophiaReport(NamedTuple):
    """What :meth:`Sophia.report` tells: 0-d float64 tensors, the same on all ranks."""

    clip_fraction: torch.Tensor
    """The share of elements whose next update is clipped; 1 is signed momentum. Meant to be 0.5 to 0.9."""
    hessian_norm: torch.Tensor
    """The L2 norm of the averaged estimates of all parameters together."""


class Sophia(Curved):
    r"""Sophia, with an estimate of the Hessian's diagonal every ``k`` steps.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        h_t = \beta_2 h_{t-k} + (1 - \beta_2) \hat h_t \ \text{ every } k \text{ steps, else } h_{t-1} \\
        p_t &= (1 - \eta\lambda) p_{t-1}
        - \eta \operatorname{clip}\bigl(m_t / \max(\rho h_t, \epsilon), 1\bigr)

    No bias correction. Where the estimate is zero or negative the update is a sign. ``refresh`` makes the estimates:
    see :class:`Curved`. Before the first one, which is due at once, all updates are signs.

    Args:
        params: parameters, groups, named parameters, or a module. A module tells whose batch-norm statistics to hold.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-4.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.965, 0.99).
        rho: :math:`\rho > 0` (the paper's :math:`\gamma`): the smaller, the more is clipped. Default 0.04.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.1.
        k: steps between estimates, an integer >= 1. Default 10.
        eps: :math:`\epsilon > 0`. Default 1e-15.
        estimator: ``"gauss-newton-bartlett"``, ``"hutchinson"``, ``"empirical-fisher"``, or an object:
            ``oput.Hutchinson(product="difference")``. Default Gauss-Newton-Bartlett.
        **common: see :class:`oput_dist.engine.Common`; ``data_group`` is where ranks with different data are.

    Raises:
        ValueError: for a value out of range.

    Sharding class E, and whatever the estimate's backward pass exchanges. State: 8 bytes per parameter (fp32).

    When: pre-training of language models. Start: ``lr=3e-4``, ``weight_decay=0.1``.

    Paper: Liu et al., https://arxiv.org/abs/2305.14342.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-4,
        betas: Betas = (0.965, 0.99),
        rho: Positive = 0.04,
        weight_decay: Nonnegative = 0.1,
        k: PositiveInteger = 10,
        eps: Positive = 1e-15,
        estimator: str | Estimator = "gauss-newton-bartlett",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals(), "estimator"), common, estimator)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        return Recipe((Update(sophia),), ("exp_avg", "hessian"), Decay.SHRINK)

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(lr=group["lr"], weight1=1 - group["betas"][0], rho=group["rho"], eps=group["eps"])

    def weight(self, group: Group) -> float:
        return 1.0 - float(group["betas"][1])

    def report(self) -> SophiaReport:
        """How much is clipped, and how large the estimates are. Every rank must call it: one small all-reduce."""
        plan = self._current_plan()
        parts = []
        for slot in plan.slots:
            if slot.numel and (held := self.state.get(slot.parameter)):
                moment, hessian = (numbers_of(slot, held, name) for name in ("exp_avg", "hessian"))
                parts.append(part_of(slot, moment, hessian))
        rows = {i: row_of(rho=group["rho"], eps=group["eps"]) for i, group in enumerate(self.param_groups)}
        sums = sweep(plan, Measure(sophia_report, (WHOLE, WHOLE), writes_state=False), parts, rows)
        assert sums is not None
        clipped, squares, count = sums.total(self._spread().model).unbind()
        return SophiaReport(clipped / count.clamp(min=1), squares.sqrt())


class SophiaG(Sophia):
    r"""Sophia with the Gauss-Newton-Bartlett estimate: see :class:`Sophia` and :class:`GaussNewtonBartlett`.

    .. math:: p_t = (1 - \eta\lambda) p_{t-1} - \eta \operatorname{clip}\bigl(m_t / \max(\rho h_t, \epsilon), 1\bigr)

    ``refresh`` takes a function that returns logits; labels are sampled from them::

        optimizer.refresh(lambda: model(inputs))

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-4.
        betas: of momentum and estimates, each in [0, 1). Default (0.965, 0.99).
        rho: :math:`\rho > 0`. Default 0.04.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.1.
        k: steps between estimates, an integer >= 1. Default 10.
        eps: :math:`\epsilon > 0`. Default 1e-15.
        seed: of the sampled labels. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E, and the estimate's backward pass. State: 8 bytes per parameter (fp32).

    When: pre-training of language models. Start: ``lr=3e-4``, ``weight_decay=0.1``.

    Paper: Liu et al., https://arxiv.org/abs/2305.14342.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-4,
        betas: Betas = (0.965, 0.99),
        rho: Positive = 0.04,
        weight_decay: Nonnegative = 0.1,
        k: PositiveInteger = 10,
        eps: Positive = 1e-15,
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        estimator = GaussNewtonBartlett(seed)
        super().__init__(params, lr, betas, rho, weight_decay, k, eps, estimator, **common)


class SophiaH(Sophia):
    r"""Sophia with Hutchinson's estimate: see :class:`Sophia` and :class:`Hutchinson`.

    .. math:: p_t = (1 - \eta\lambda) p_{t-1} - \eta \operatorname{clip}\bigl(m_t / \max(\rho h_t, \epsilon), 1\bigr)

    ``refresh`` takes a function that returns the mean loss::

        optimizer.refresh(lambda: F.cross_entropy(model(inputs), labels))

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-4.
        betas: of momentum and estimates, each in [0, 1). Default (0.96, 0.99).
        rho: :math:`\rho > 0`. Default 0.01.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.1.
        k: steps between estimates, an integer >= 1. Default 10.
        eps: :math:`\epsilon > 0`. Default 1e-15.
        product: how the Hessian is multiplied: ``"exact"``, or ``"difference"`` under FSDP and with fused attention.
            Default exact.
        seed: of the probes. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.
        CurvatureError: in ``refresh``, where the model cannot be differentiated twice.

    Sharding class E, and the estimate's passes. State: 8 bytes per parameter (fp32).

    When: the loss is no cross-entropy, so that there are no labels to sample. Start: ``lr=1e-3``, ``rho=0.1``,
    ``product="difference"``.

    Paper: Liu et al., https://arxiv.org/abs/2305.14342.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-4,
        betas: Betas = (0.96, 0.99),
        rho: Positive = 0.01,
        weight_decay: Nonnegative = 0.1,
        k: PositiveInteger = 10,
        eps: Positive = 1e-15,
        product: Literal["exact", "difference"] = "exact",
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        estimator = Hutchinson(product=product, seed=seed)
        super().__init__(params, lr, betas, rho, weight_decay, k, eps, estimator, **common)
