"""SM3: Adagrad whose memory of squares is kept for each row and column instead of each element."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Fraction, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import at_most, lerp
from oput_dist.kernels.stage import Decay, Measure, Stored, Update, Vectors

__all__ = ["SM3"]


@rule
def sm3_bound(g, bounds):
    """The bound of an element's sum of squares: the least of its axes', and the new square."""
    least = bounds[0]
    for i in tl.static_range(1, len(bounds)):
        least = at_most(least, bounds[i])
    return least + g * g


@rule
def sm3_measure(p, g, state, h, c):
    bound = sm3_bound(g, c)
    return state, (bound,) * len(c)


def sm3_bounds(maxima: Any, bounds: Any, h: Any) -> tuple[Any, Any]:
    """The new bound of each row and column: the largest of its elements'."""
    return tuple(maxima[: len(bounds)]), ()


@rule
def sm3_apply(p, g, state, h, c):
    return p - h.lr * (g / tl.sqrt(sm3_bound(g, c) + 1e-30)), state


@rule
def sm3_apply_momentum(p, g, state, h, c):
    m = lerp(state[0], g / tl.sqrt(sm3_bound(g, c) + 1e-30), h.weight)
    return p - h.lr * m, (m,)


# Vectors and scalars keep one value for each element, which is Adagrad.


@rule
def sm3_vector(p, g, state, h):
    v = state[0] + g * g
    return p - h.lr * (g / tl.sqrt(v + 1e-30)), (v,)


@rule
def sm3_vector_momentum(p, g, state, h):
    v = state[0] + g * g
    m = lerp(state[1], g / tl.sqrt(v + 1e-30), h.weight)
    return p - h.lr * m, (v, m)


class SM3(Optimizer):
    r"""SM3-II: adaptive steps whose memory is one value for each row and column.

    .. math::
        \nu_t &= \min_i \mu^{(i)}_{t-1} + g_t^2, \qquad
        \mu^{(i)}_t = \max_{\text{other axes}} \nu_t, \qquad u_t = g_t / \sqrt{\nu_t + 10^{-30}} \\
        m_t &= \beta m_{t-1} + (1 - \beta) u_t, \qquad p_t = (1 - \eta\lambda) p_{t-1} - \eta m_t

    with a bound :math:`\mu^{(i)}` for every axis :math:`i`. Vectors and scalars are Adagrad's. Maxima run over the
    whole parameter, whatever its sharding.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 0.1.
        momentum: :math:`\beta` in [0, 1); 0 keeps no average. Default 0.9.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class R: one packed all-reduce of maxima a step. State of an R x C matrix: R + C values in fp32, the same
    on all ranks; of a vector 4 bytes per parameter; with momentum 4 bytes per parameter more.

    When: memory is scarce and gradients are sparse, as with large embeddings. Start: ``lr=0.1``, ``momentum=0.9``.

    Paper: Anil et al., https://arxiv.org/abs/1901.11150.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 0.1,
        momentum: Fraction = 0.9,
        weight_decay: Nonnegative = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        state = ("momentum_buffer",) if group["momentum"] else ()
        if len(shape) < 2:
            vector = sm3_vector_momentum if state else sm3_vector
            return Recipe((Update(vector),), ("accumulator", *state), Decay.SHRINK)
        axes = tuple((axis,) for axis in range(len(shape)))
        measure = Measure(sm3_measure, (), writes_state=False, given=Stored(axes), maxima=axes)
        bounds = tuple((f"accumulator_{axis}", (axis,)) for axis in range(len(shape)))
        apply = Update(sm3_apply_momentum if state else sm3_apply, Vectors(sm3_bounds, ()))
        return Recipe((measure, apply), state, Decay.SHRINK, bounds)

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(
            lr=group["lr"],
            # Of the new direction in the momentum: 1 without momentum.
            weight=1 - group["momentum"],
        )
