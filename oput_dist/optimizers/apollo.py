"""Apollo: quasi-Newton steps with a diagonal Hessian, kept up by the weak secant equation."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Fraction, Nonnegative, Positive, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import at_least
from oput_dist.kernels.stage import WHOLE, Decay, Factors, Given, Measure, Stage, Update, Vectors

from .advice import warn_once

__all__ = ["Apollo"]

SIGMA = 0.01
"""The least curvature."""


@rule
def apollo_products(p, g, state, h):
    m, b, d = state
    squares = d * d
    return state, (squares * squares, (g - m) * d, b * squares)


@rule
def apollo_products_belief(p, g, state, h):
    m, b, d = state
    squares = d * d
    return state, (squares * squares, (g - m) * d, b * squares, tl.abs(g - m))


@rule
def apollo_secant(sums, h):
    """What the Hessian gains along the last update, one over the norm of that, and the least curvature."""
    fourths, y_d, b_d, _numel = sums
    scale = 1.0 / (tl.sqrt(tl.sqrt(fourths)) + h.eps)
    return -(h.weight * y_d + b_d) * scale * scale, scale, h.floor


def apollo_secant_of(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
    """The same; with a fourth sum, the largest change of the gradient, this is the least curvature."""
    fourths, y_d, b_d, *largest, _count, _step = sums
    scale = 1.0 / (fourths.sqrt().sqrt() + h.eps)
    return vectors, (-(h.weight * y_d + b_d) * scale * scale, scale, largest[0] if largest else h.floor)


@rule
def apollo_hessian(b, d, h, c):
    """The new Hessian, and the curvature."""
    v = d * c[1]
    b = b + c[0] * (v * v)
    return b, at_least(tl.abs(b), c[2]) + h.extra


@rule
def apollo(p, g, state, h, c):
    m, b, d = state
    b, curvature = apollo_hessian(b, d, h, c)
    m = m + h.weight * (g - m)
    d = m / curvature + h.weight_decay * p
    return p - h.lr * d, (m, b, d)


@rule
def apollo_curvature(p, g, state, h, c):
    _m, b, d = state
    _b, curvature = apollo_hessian(b, d, h, c)
    return state, (curvature,)


def apollo_mean(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
    """The mean curvature."""
    total, count, _step = sums
    return vectors, (total / count.clamp(min=1.0),)


@rule
def apollo_stable(p, g, state, h, c):
    m, b, d = state
    b, curvature = apollo_hessian(b, d, h, c)
    m = m + h.weight * (g - m)
    d = m / curvature + h.weight_decay / c[3] * p
    return p - h.lr * d, (m, b, d)


def decay_kind(group: Group) -> str:
    """Where weight decay enters. Decoupled from the learning rate it does as L2 would: outside of the update."""
    if group["decouple_lr"]:
        return "L2"
    kind: str | None = group["weight_decay_type"]
    return kind or ("decoupled" if group["rebound"] == "belief" else "L2")


class Apollo(Optimizer):
    r"""Apollo, as in the authors' code.

    .. math::
        y_t &= g_t - m_{t-1}, \qquad
        m_t = m_{t-1} + \alpha_t y_t, \qquad \alpha_t = \frac{1 - \beta}{1 - \beta^t}, \qquad
        v_t = \frac{d_{t-1}}{\lVert d_{t-1} \rVert_4 + \epsilon / \sigma} \\
        B_t &= B_{t-1} - \Bigl(\frac{\alpha_t \langle y_t, v_t \rangle}{\lVert d_{t-1} \rVert_4 + \epsilon / \sigma}
            + \langle B_{t-1}, v_t^2 \rangle\Bigr) v_t^2 \\
        d_t &= m_t / \max(\lvert B_t \rvert, \sigma), \qquad p_t = p_{t-1} - \eta_t d_t

    with :math:`\sigma = 0.01`, and :math:`\eta_t` that rises linearly from ``init_lr`` over the first ``warmup`` steps.
    With ``rebound="belief"`` :math:`\epsilon` is not divided, and :math:`d_t = m_t / (\max(\lvert B_t \rvert, \max
    \lvert y_t \rvert) + \epsilon / \alpha_t)`. Sums and maxima run over the whole parameter, whatever its sharding.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`; a hundredth of what gives the same steps in torch_optimizer, which has
            :math:`\sigma = 1`. Default 1e-2.
        beta: :math:`\beta` in [0, 1). Default 0.9.
        eps: :math:`\epsilon > 0`. Default 1e-4.
        warmup: how many steps the learning rate rises, >= 0. Default 500.
        init_lr: the learning rate of the first step of the warmup, >= 0; None for a thousandth of ``lr``. Default None.
        rebound: ``"constant"`` or ``"belief"``, see above. Default "constant".
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        weight_decay_type: ``"L2"``: :math:`g_t` includes :math:`\lambda p_{t-1}`; ``"decoupled"``: :math:`d_t` does;
            ``"stable"``: :math:`d_t` includes it divided by the mean of what :math:`m_t` is divided by. With
            ``decouple_lr`` decay is outside of :math:`d_t`, whatever the type. Default None: "L2" with constant
            rebound, "decoupled" with belief.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class N: one packed all-reduce a step, with stable decay or belief two, with both three. State: 12 bytes
    per parameter (fp32).

    When: curvature matters but only a diagonal of it is affordable; wants a warmup. Start: ``lr=1e-2``, ``beta=0.9``,
    ``eps=1e-4``, ``warmup=20``.

    Paper: Ma, https://arxiv.org/abs/2009.13586.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-2,
        beta: Fraction = 0.9,
        eps: Positive = 1e-4,
        warmup: Nonnegative = 500,
        init_lr: Nonnegative | None = None,
        rebound: Literal["constant", "belief"] = "constant",
        weight_decay: Nonnegative = 0.0,
        weight_decay_type: Literal["L2", "decoupled", "stable", None] = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def complete(self, group: dict[str, Any]) -> None:
        super().complete(group)
        warn_once(
            self,
            lambda group: group["warmup"] == 0 and group["init_lr"] is not None,
            f"init_lr={group['init_lr']!r} has no effect with warmup=0: write warmup=500, or leave init_lr out; where "
            f"lr={group['lr']!r} is torch_optimizer's, write lr={group['lr'] / 100!r} for the same steps",
        )

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        kind, three = decay_kind(group), (WHOLE,) * 3
        products = Measure(apollo_products, three, writes_state=False)
        if group["rebound"] == "belief":
            sums, maxima = (three, (WHOLE,)) if shape else ((*three, WHOLE), ())  # a scalar is its own maximum
            products = Measure(apollo_products_belief, sums, writes_state=False, maxima=maxima)
        outside = group["rebound"] == "belief" or kind == "stable"
        secant: Given = Vectors(apollo_secant_of, three) if outside else Factors(apollo_secant, 3)
        stages: tuple[Stage, ...] = (products, Update(apollo, secant))
        if kind == "stable":
            curvature = Measure(apollo_curvature, (WHOLE,), writes_state=False, given=secant)
            stages = (products, curvature, Update(apollo_stable, Vectors(apollo_mean, (WHOLE,))))
        decay = Decay.L2 if kind == "L2" else Decay.NONE
        return Recipe(stages, ("exp_avg_grad", "approx_hessian", "update"), decay)

    def scalars(self, group: Group, step: int) -> Any:
        lr, beta, warmup = group["lr"], group["beta"], group["warmup"]
        if step <= warmup:
            begin = lr / 1000 if group["init_lr"] is None else group["init_lr"]
            lr = begin + (lr - begin) * ((step - 1) / warmup)
        weight, belief = (1 - beta) / (1 - beta**step), group["rebound"] == "belief"
        return row_of(
            # During warmup a part of the learning rate.
            lr=lr,
            # Of the new gradient in the bias-corrected average.
            weight=weight,
            eps=group["eps"] if belief else group["eps"] / SIGMA,
            # Inside the update.
            weight_decay=0.0 if decay_kind(group) == "L2" else group["weight_decay"],
            # The least curvature, with constant rebound.
            floor=SIGMA,
            # Added to the curvature, with the rebound of the belief.
            extra=group["eps"] / weight if belief else 0.0,
        )
