"""Adafactor: of the second moment of a matrix only row and column means are kept."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.hyper import Allowed, Nonnegative, Nonpositive, Positive, hyperparameters, optional, positive
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import at_least, lerp
from oput_dist.kernels.stage import WHOLE, Apply, Factors, Measure, Vectors

__all__ = ["Adafactor"]


def floors(value: Any) -> str | None:
    """Two least values, of which the first may be left to the dtype."""
    ok = isinstance(value, (tuple, list)) and len(value) == 2
    ok = ok and optional(positive)(value[0]) is None and positive(value[1]) is None
    return None if ok else "(eps1, eps2), each a finite number > 0; eps1 may be None"


Floors = Annotated[tuple[float | None, float], Allowed(floors)]

# Vectors and scalars: the whole second moment is kept.


@rule
def plain_direction(g, v, h):
    return g / tl.sqrt(at_least(v, h.floor))


@rule
def plain_moment(p, g, state, h):
    (v,) = state
    v = lerp(v, g * g, h.weight)
    u = plain_direction(g, v, h)
    return (v,), (p * p, u * u)


@rule
def plain_step(sums, h):
    p_squares, u_squares, numel = sums
    size = at_least(tl.sqrt(p_squares / numel), h.eps2)
    return (size * h.rho / at_least(tl.sqrt(u_squares / numel) / h.d, 1.0),)


@rule
def plain_apply(p, g, state, h, c):
    (v,) = state
    (lr,) = c
    return p * h.keep - lr * plain_direction(g, v, h)


# Matrices: the second moment is the product of its row and column means.


@rule
def factored_direction(g, rows, columns, h):
    return g / tl.sqrt(at_least(rows * columns, h.floor))


@rule
def factored_squares(p, g, state, h):
    return state, (g * g, g * g, p * p)


def factored_moments(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
    """New row and column means; the factors of the second moment, and the scale of the parameter."""
    rows, columns, p_squares, count, step = sums
    weight = step.clamp(min=1.0) ** h.beta2_decay
    row = torch.lerp(vectors[0], rows / columns.shape[-1], weight)
    column = torch.lerp(vectors[1], columns / rows.shape[-2], weight)
    mean = torch.maximum(row.mean(-2, keepdim=True), torch.as_tensor(h.eps1))
    size = torch.maximum((p_squares / count.clamp(min=1.0)).sqrt(), torch.as_tensor(h.eps2))
    return (row, column), (row / mean, column, size)


@rule
def factored_measure(p, g, state, h, c):
    rows, columns, _size = c
    u = factored_direction(g, rows, columns, h)
    return state, (u * u,)


def factored_step(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
    """The step size, relative to the scale of the parameter."""
    u_squares, count, step = sums
    rms = (u_squares / count.clamp(min=1.0)).sqrt()
    rho = torch.minimum(torch.as_tensor(h.lr), step.clamp(min=1.0).rsqrt())
    return vectors, (rho / (rms / h.d).clamp(min=1.0),)


@rule
def factored_apply(p, g, state, h, c):
    rows, columns, size, lr = c
    return p * h.keep - size * lr * factored_direction(g, rows, columns, h)


class Adafactor(Optimizer):
    r"""Adafactor, as in torch.optim.

    .. math::
        \hat\beta_t &= t^{\tau}, \qquad \rho_t = \min(\eta, t^{-1/2}), \qquad
        \alpha_t = \max(\epsilon_2, \mathrm{RMS}(p_{t-1}))\, \rho_t \\
        R_t &= (1 - \hat\beta_t) R_{t-1} + \hat\beta_t \operatorname{mean}_\text{columns}(g_t^2), \qquad
        C_t = (1 - \hat\beta_t) C_{t-1} + \hat\beta_t \operatorname{mean}_\text{rows}(g_t^2) \\
        v_t &= R_t C_t / \max(\operatorname{mean}(R_t), \epsilon_1), \qquad
        u_t = g_t / \sqrt{\max(v_t, \epsilon_1^2)} \\
        p_t &= (1 - \eta\lambda) p_{t-1} - \alpha_t\, u_t / \max(1, \mathrm{RMS}(u_t) / d)

    Matrices are taken along the last two axes; the second moment of vectors and scalars is kept whole. All means run
    over the whole parameter, whatever its sharding; an element whose gradient is missing counts as zero in those of
    rows and columns.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: the largest relative step :math:`\eta \ge 0`. Default 1e-2.
        beta2_decay: the exponent :math:`\tau \le 0`. Default -0.8.
        eps: :math:`(\epsilon_1, \epsilon_2)`, each > 0; None for the precision of the parameter's dtype.
            Default (None, 1e-3).
        d: the clipping threshold of the update's RMS, > 0. Default 1.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class R: two packed all-reduces a step. State of an R x C matrix: R + C values in fp32, the same on all
    ranks; of a vector 4 bytes per parameter.

    When: memory is scarce: a matrix keeps one value for each row and column. Start: ``lr=0.05``.

    Paper: Shazeer and Stern, https://arxiv.org/abs/1804.04235.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-2,
        beta2_decay: Nonpositive = -0.8,
        eps: Floors = (None, 1e-3),
        d: Positive = 1.0,
        weight_decay: Nonnegative = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        n = len(shape)
        if n < 2:
            stages = (Measure(plain_moment, (WHOLE, WHOLE)), Apply(plain_apply, Factors(plain_step)))
            return Recipe(stages, ("variance",))
        rows, columns = tuple(range(n - 1)), (*range(n - 2), n - 1)
        moments = Vectors(factored_moments, (rows, columns, WHOLE))
        stages = (
            Measure(factored_squares, (rows, columns, WHOLE), writes_state=False),
            Measure(factored_measure, (WHOLE,), writes_state=False, given=moments),
            Apply(factored_apply, Vectors(factored_step, (WHOLE,))),
        )
        return Recipe(stages, vectors=(("row_var", rows), ("col_var", columns)))

    def scalars(self, group: Group, step: int) -> Any:
        lr, (eps1, eps2) = group["lr"], group["eps"]
        if eps1 is None:
            eps1 = torch.finfo(group["params"][0].dtype).eps
        rho: Any = lr.clamp(max=step**-0.5) if isinstance(lr, torch.Tensor) else min(lr, step**-0.5)
        return row_of(
            # The learning rate, at most one over the square root of the step.
            rho=rho,
            lr=lr,
            beta2_decay=group["beta2_decay"],
            # Of the new square in the second moment: the step to the power of ``beta2_decay``.
            weight=step ** group["beta2_decay"],
            # The least second moment.
            floor=eps1**2,
            eps1=eps1,
            eps2=eps2,
            d=group["d"],
            # What decay leaves of the parameter.
            keep=1 - decay_rate(group),
        )
