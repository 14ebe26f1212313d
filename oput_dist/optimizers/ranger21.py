"""Ranger21: many improvements of AdamW at once, with a learning rate schedule of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.hyper import (
    Betas,
    Fraction,
    Nonnegative,
    Positive,
    PositiveInteger,
    check_group,
    hyperparameters,
    positive_integer,
)
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import at_most, lerp, lookahead, softplus
from oput_dist.kernels.stage import WHOLE, Joint, Measure, Update, Vectors

from .centralize import is_centralized
from .scalars import WHY_NOT_CAUTIOUS, lookahead_scalars

__all__ = ["Ranger21"]


@rule
def ranger21_sums(p, g, state, h):
    return state, (g, g * g, p * p)


@functools.cache  # so that equal recipes stay equal
def normalization(length: int, numel: int, centred: bool) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """How the gradient is clipped, centred and normalised: ``(g * ratio - mean) * scale``, then once more ``* again``.

    What is constant along its rows is nothing once centred: it is not blown up to the size of its rounding errors.

    Args:
        length: elements of a row (of the whole parameter if it has one axis).
        numel: of the parameter.
        centred: whether the mean of each row is taken out.
    """

    def factors(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
        total, squares, weights = sums[:3]
        most = torch.maximum(weights.sqrt(), h.clip_eps) * h.clip
        norm = squares.sqrt()
        ratio = torch.where((norm > most) & (h.clip > 0), most / norm.clamp(min=1e-6), torch.ones_like(norm))
        if centred and length == 1:
            ratio = torch.zeros_like(ratio)
        mean = ratio * total / length if centred else torch.zeros_like(total)
        left = (ratio**2 * squares - length * mean**2).reshape(len(total), -1).sum(1).view(-1, *[1] * (total.ndim - 1))
        rest = 0.0 if centred else (ratio * total).reshape(len(total), -1).sum(1).view_as(left) / numel
        size = (ratio**2 * squares).reshape(len(total), -1).sum(1).view_as(left)
        variance = left - numel * rest**2
        constant = variance <= 1e-12 * size
        deviation = (torch.where(constant, 0.0, variance) / max(numel - 1, 1)).sqrt()
        if numel > 2:
            scale = torch.where(constant, 0.0, 1 / (deviation + 1e-8))
            again = 1 / (deviation * scale + 1e-8)
        else:
            scale = again = torch.ones_like(deviation)
        return vectors, (ratio, mean, scale, again, weights)

    return factors


@rule
def ranger21_variance(p, g, state, h, c):
    m, previous, v, slow = state
    g = (g * c[0] - c[1]) * c[2]
    v = lerp(v, g * g, h.weight2)
    return (m, previous, v, slow), (v * h.correct2,)


def stable_decay(totals: Any, kept: Any, h: Any) -> tuple[Any, Any]:
    """One over the root of the mean variance of all parameters; 0, for no decay, where there is none."""
    total, numel = totals.unbind()
    return {}, (torch.where(total > 0, (numel / torch.where(total > 0, total, 1.0)).sqrt(), 0.0),)


@rule
def ranger21_apply(p, g, state, h, c):
    odd, even, v, slow = state
    ratio, mean, scale, again, weights, stability = c
    g = (g * ratio - mean) * scale * again
    keep = 1.0 - at_most(h.decay * stability, 1.0)
    norm = tl.sqrt(weights) * keep
    fast = p * keep * (1.0 - h.lr * 2.0 * h.norm_loss * (1.0 - 1.0 / (norm + h.eps)))
    current = lerp(tl.where(h.odd > 0, odd, even), g, h.weight1)
    other = tl.where(h.odd > 0, even, odd)
    denominator = tl.sqrt(v) * h.root + h.eps
    denominator = tl.where(h.smooth > 0, softplus(denominator * h.smooth) * h.smoothed, denominator)
    fast = fast - h.step_size * ((1.0 + h.beta0) * current - h.beta0 * other) / denominator
    p, slow = lookahead(p, fast, slow, h)
    return p, (tl.where(h.odd > 0, current, odd), tl.where(h.odd > 0, even, current), v, slow)


def schedule(step: int, total: int, warmup: int, warmdown_start: int, least: float) -> float:
    """The share of the learning rate at a step: up linearly, level, and down linearly to ``least``."""
    share = min(1.0, step / warmup) if warmup else 1.0
    if step < warmdown_start:
        return share
    down = max(step + 1 - warmdown_start, 1) / (total - warmdown_start + 1)
    return max(1 - (1 - least) * min(down, 1.0), least)


class Ranger21(Optimizer):
    r"""Ranger21: AdamW with positive-negative momentum, adaptive gradient clipping, gradient centralisation and
    normalisation, stable weight decay, norm loss, softplus, lookahead, and a schedule of its own.

    .. math::
        \tilde g_t &= N(C(A(g_t))), \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) \tilde g_t^2, \qquad
            V_t = \operatorname{mean}_\text{model} \frac{v_t}{1 - \beta_2^t} \\
        \hat p_t &= (1 - \eta_t\lambda / \sqrt{V_t})\, p_{t-1}, \qquad
            \bar p_t = \bigl(1 - 2\eta_t\nu (1 - 1 / (\lVert \hat p_t \rVert_\text{row} + \epsilon))\bigr) \hat p_t \\
        m_t &= \beta_1^2 m_{t-2} + (1 - \beta_1^2) N(\tilde g_t), \qquad
            u_t = \frac{(1 + \beta_0) m_t - \beta_0 m_{t-1}}{\sqrt{(1 + \beta_0)^2 + \beta_0^2}} \\
        p_t &= \bar p_t - \frac{\eta_t}{1 - \beta_1^t}
            \frac{u_t}{\operatorname{softplus}_s(\sqrt{v_t / (1 - \beta_2^t)} + \epsilon)}

    and lookahead every ``lookahead_mergetime`` steps. :math:`A` scales rows (of vectors: the whole) whose norm exceeds
    ``agc_clipping_value`` times that of the weights; :math:`C` takes out the mean of each row; :math:`N` divides by the
    standard deviation of the whole parameter. Rows are slices along the first axis. All norms and means run over whole
    parameters, :math:`V_t` over the whole model, whatever the sharding. The reference decays only the last parameter,
    and scales the noise by :math:`\beta_2`; here all decay, and the scale is that of the formula.

    The schedule multiplies the group's ``lr``: up linearly over ``num_warmup_iterations`` (else over
    :math:`2 / (1 - \beta_2)` steps, or 22% of the run if that is more than 45% of it), level, and from 72% of the run
    on down to ``warmdown_min_lr``. It needs the length of the run: ``num_iterations``, or ``num_epochs`` and
    ``num_batches_per_epoch``; not with both ``use_warmup=False`` and ``warmdown_active=False``.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        num_epochs, num_batches_per_epoch: integers >= 1.
        num_iterations: steps of the run, in place of both, an integer >= 1.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        beta0: the factor :math:`\beta_0 \ge 0` of negative momentum. Default 1.
        eps: :math:`\epsilon > 0`. Default 1e-8.
        weight_decay: :math:`\lambda \ge 0`. Default 1e-4.
        use_gc, gc_conv_only: centralise gradients; only those with more than three axes. Default True, False.
        agc_clipping_value: >= 0; 0 for none. Default 0.01.
        agc_eps: the least norm of weights for clipping, > 0. Default 1e-3.
        normloss_factor: :math:`\nu \ge 0`. Default 1e-4.
        beta_softplus: sharpness :math:`s \ge 0`; 0 for no softplus. Default 50.
        lookahead_mergetime: an integer >= 1. Default 5.
        lookahead_blending_alpha: in [0, 1). Default 0.5.
        use_warmup, num_warmup_iterations, warmdown_active, warmdown_start_pct, warmdown_min_lr: the schedule.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range, or no length of the run where the schedule needs it.

    Sharding class R and G: two packed all-reduces a step. State: 16 bytes per parameter (fp32).

    When: vision models, when neither schedule nor regularisation shall be tuned. Start: ``lr=3e-3``,
    ``num_iterations=200``.

    Paper: Wright and Demeure, https://arxiv.org/abs/2106.13731.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        num_epochs: PositiveInteger | None = None,
        num_batches_per_epoch: PositiveInteger | None = None,
        num_iterations: PositiveInteger | None = None,
        betas: Betas = (0.9, 0.999),
        beta0: Nonnegative = 1.0,
        eps: Positive = 1e-8,
        weight_decay: Nonnegative = 1e-4,
        use_gc: bool = True,
        gc_conv_only: bool = False,
        agc_clipping_value: Nonnegative = 1e-2,
        agc_eps: Positive = 1e-3,
        normloss_factor: Nonnegative = 1e-4,
        beta_softplus: Nonnegative = 50.0,
        lookahead_mergetime: PositiveInteger = 5,
        lookahead_blending_alpha: Fraction = 0.5,
        use_warmup: bool = True,
        num_warmup_iterations: PositiveInteger | None = None,
        warmdown_active: bool = True,
        warmdown_start_pct: Fraction = 0.72,
        warmdown_min_lr: Nonnegative = 3e-5,
        **common: Unpack[Common],
    ) -> None:
        run = {"num_epochs": num_epochs, "num_batches_per_epoch": num_batches_per_epoch}
        check_group("Ranger21", {k: n for k, n in run.items() if n is not None}, dict.fromkeys(run, positive_integer))
        if num_iterations is None and num_epochs is not None and num_batches_per_epoch is not None:
            num_iterations = num_epochs * num_batches_per_epoch
        given = hyperparameters(locals(), "num_epochs", "num_batches_per_epoch", "run")
        super().__init__(params, {**given, "base_lr": None}, common)

    def check(self, group: Group) -> None:
        if group["num_iterations"] is None and (group["use_warmup"] or group["warmdown_active"]):
            raise ValueError(
                "Ranger21 has a schedule of its own and needs the length of the run: Ranger21(model.parameters(), "
                f"lr={group['lr']}, num_epochs=10, num_batches_per_epoch=len(loader)), or num_iterations=; or "
                "use_warmup=False, warmdown_active=False for a schedule of yours"
            )
        if group["warmdown_active"] and group["base_lr"] is None and float(group["lr"]) == 0:
            raise ValueError("Ranger21: lr=0 with its own schedule: give the rate that the schedule is to begin with")

    why_not_cautious = WHY_NOT_CAUTIOUS

    def complete(self, group: dict[str, Any]) -> None:
        super().complete(group)
        if group["base_lr"] is None:
            group["base_lr"] = float(group["lr"])

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        rows = (0,) if len(shape) > 1 else WHOLE
        numel, length = math.prod(shape), math.prod(shape[1:] if len(shape) > 1 else shape)
        given = Vectors(normalization(length, numel, is_centralized(group, shape)), (rows, rows, WHOLE, WHOLE, rows))
        stages = (
            Measure(ranger21_sums, (rows,) * 3, writes_state=False),
            Measure(ranger21_variance, (WHOLE,), given=given),
            Update(ranger21_apply, Joint(stable_decay)),
        )
        return Recipe(stages, ("grad_ma", "neg_grad_ma", "variance_ma", "lookahead_params"))

    def _share(self, group: Group, step: int) -> float:
        """What the schedule leaves of the learning rate."""
        total, beta2 = group["num_iterations"], group["betas"][1]
        warmup, start = 0, step + 1
        if group["use_warmup"]:
            untuned = math.ceil(2 / (1 - beta2))
            warmup = group["num_warmup_iterations"] or (int(0.22 * total) if untuned > 0.45 * total else untuned)
        if group["warmdown_active"]:
            start = int(group["warmdown_start_pct"] * total)
        least = min(1.0, group["warmdown_min_lr"] / group["base_lr"]) if group["base_lr"] else 1.0
        return schedule(step, total or step, warmup, start, least)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        beta0, sharpness = group["beta0"], group["beta_softplus"]
        share = self._share(group, step)
        lr = group["lr"] * share
        first, pull = lookahead_scalars(step, group["lookahead_mergetime"], group["lookahead_blending_alpha"])
        return row_of(
            # After warm-up and warm-down.
            lr=lr,
            # The same over the first moment's bias correction and the norm of the noise.
            step_size=lr / (1 - beta1**step) / math.hypot(1 + beta0, beta0),
            # Weight decay, as a share of the parameter at unit variance.
            decay=decay_rate(group) * share,
            weight1=1 - beta1**2,
            weight2=1 - beta2,
            # One over the second moment's bias correction.
            correct2=1 / (1 - beta2**step),
            root=1 / math.sqrt(1 - beta2**step),
            eps=group["eps"],
            beta0=beta0,
            # 1 at odd steps, which update the first of the two momenta, 0 at even ones.
            odd=float(step % 2),
            clip=group["agc_clipping_value"],
            clip_eps=group["agc_eps"],
            norm_loss=group["normloss_factor"],
            # Sharpness of the softplus of the denominator; 0 for none.
            smooth=sharpness,
            # One over it, or 0.
            smoothed=1 / sharpness if sharpness else 0.0,
            first=first,
            pull=pull,
        )
