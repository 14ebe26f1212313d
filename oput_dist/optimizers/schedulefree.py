"""Schedule-free SGD and AdamW: averaging in place of a learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.hyper import Betas, Fraction, Nonnegative, NonnegativeInteger, hyperparameters
from oput_dist.engine.recipe import as_scalar
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import lerp
from oput_dist.kernels.stage import Update

__all__ = ["AdamWScheduleFree", "SGDScheduleFree", "ScheduleFree"]


@rule
def averaged(p, z, step, h):
    """The point where gradients are taken and the iterate, after a step of the iterate."""
    z = tl.where(h.first > 0, p, z)
    return lerp(p, z, h.weight) - h.ahead * step, z - step


@rule
def schedule_free_sgd(p, g, state, h):
    p, z = averaged(p, state[0], h.lr * g + h.decay * p, h)
    return p, (z,)


@rule
def schedule_free_adamw(p, g, state, h):
    z, v = state
    v = lerp(v, g * g, h.weight2)
    p, z = averaged(p, z, h.lr * g / (tl.sqrt(v) * h.root + h.eps) + h.decay * p, h)
    return p, (z, v)


@rule
def swap(p, g, state, h):
    return lerp(p, state[0], h.weight), state


class ScheduleFree(Optimizer):
    """What the schedule-free optimizers share: train and eval modes, and the weights of the average."""

    def __init__(self, params: Params, defaults: dict[str, Any], common: Common) -> None:
        running = {"k": 0, "weight_sum": 0.0, "lr_max": 0.0, "train_mode": True}
        super().__init__(params, {**defaults, **running}, common)

    def beta1(self, group: Group) -> float:
        """How near the average gradients are taken."""
        beta: float = group["betas"][0] if "betas" in group else group["momentum"]
        return beta

    def check(self, group: Group) -> None:
        if not self.beta1(group) > 0:
            name, value = ("betas", group["betas"]) if "betas" in group else ("momentum", group["momentum"])
            raise ValueError(
                f"{type(self).__name__}: {name}={value!r} is not allowed: the first beta must be a number in (0, 1), "
                "since the average is found from it"
            )

    def eval(self) -> None:
        """Make parameters the average, for evaluation and for saving the model. Called twice, it does nothing.

        All ranks must call it. What FSDP gathered before is freed, so that the next forward pass gathers the new
        values; for FSDP1 the optimizer must have been given the module.
        """
        self._switch(False, lambda beta1: 1 - 1 / beta1)

    def train(self) -> None:
        """Make parameters the point where gradients are taken, for training; see :meth:`eval`."""
        self._switch(True, lambda beta1: 1 - beta1)

    def _switch(self, mode: bool, weight: Callable[[float], float]) -> None:
        groups = {i: group for i, group in enumerate(self.param_groups) if group["train_mode"] != mode}
        rows = {i: row_of(weight=weight(self.beta1(group))) for i, group in groups.items()}
        self.rewrite(Update(swap), ("z",), rows)
        for group in groups.values():
            group["train_mode"] = mode

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, see :meth:`Optimizer.step`; in train mode only."""
        self._check_mode()
        return super().step(closure)

    def check_step(self) -> None:
        super().check_step()
        self._check_mode()

    def _check_mode(self) -> None:
        if not self._may_rehearse() and not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__} is in eval mode: call optimizer.train() before training goes on, as after "
                "evaluation: optimizer.eval(); evaluate(model); optimizer.train()"
            )

    def _weights(self, group: Group) -> tuple[Any, Any, Any]:
        """The learning rate after warm-up, the largest so far, and the weight of the coming iterate."""
        k, warmup = group["k"], group["warmup_steps"]
        lr = group["lr"] * (min(1.0, (k + 1) / warmup) if warmup else 1.0)
        tensor = isinstance(lr, torch.Tensor)
        lr_max = torch.as_tensor(lr).clamp(min=group["lr_max"]) if tensor else max(lr, group["lr_max"])
        return lr, lr_max, (k + 1) ** group["r"] * lr_max ** group["weight_lr_power"]

    def advance(self, group: dict[str, Any]) -> None:
        _, lr_max, weight = self._weights({**group, "lr": as_scalar(group["lr"])})
        group.update(k=group["k"] + 1, lr_max=lr_max, weight_sum=group["weight_sum"] + weight)

    def scalars(self, group: Group, step: int) -> Any:
        lr, _, weight = self._weights(group)
        share = weight / (group["weight_sum"] + weight + 1e-300)
        warmed = min(1.0, (group["k"] + 1) / group["warmup_steps"]) if group["warmup_steps"] else 1.0
        beta2 = group["betas"][1] if "betas" in group else 0.0
        return row_of(
            lr=lr,
            # What weight decay adds to the step, as a share of the parameter.
            decay=decay_rate(group) * warmed,
            # Of the newest iterate in the average.
            weight=share,
            # How far the parameter goes with a step of the iterate: between nothing and, with beta 0, all of it.
            ahead=1 - self.beta1(group) * (1 - share),
            first=float(step == 1),
            weight2=1 - beta2,
            root=1 / math.sqrt(1 - beta2**step),
            eps=group.get("eps", 0.0),
        )


class SGDScheduleFree(ScheduleFree):
    r"""Schedule-free SGD.

    .. math::
        z_t &= z_{t-1} - \eta_t (g_t + \lambda y_{t-1}), \qquad
        x_t = (1 - c_t) x_{t-1} + c_t z_t, \qquad y_t = (1 - \beta) z_t + \beta x_t \\
        c_t &= w_t / \textstyle\sum_{i \le t} w_i, \qquad w_t = t^r (\max_{i \le t} \eta_i)^q

    Gradients are taken at :math:`y`, which is what the parameters hold in training; the average :math:`x` is the result
    (``optimizer.eval()``), and :math:`\eta_t` is the learning rate, after a linear warm-up. No schedule is needed::

        for batch in loader:
            ...
            optimizer.step()
        optimizer.eval()  # parameters are now the average: evaluate, or save the model
        optimizer.train()  # and back

    The mode is part of the state dict. Batch-norm statistics belong to :math:`y`: renew them in eval mode.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`; ten times or more that of SGD with momentum. Default 1.
        momentum: :math:`\beta` in (0, 1). Default 0.9.
        weight_decay: :math:`\lambda \ge 0`, taken at :math:`y`. Default 0.
        warmup_steps: an integer >= 0. Default 0.
        r: the power :math:`r` of the step in the weights, >= 0. Default 0.
        weight_lr_power: the power :math:`q \ge 0` of the learning rate in the weights. Default 2.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.
        RuntimeError: for a step in eval mode.

    Sharding class E: no communication. State: 4 bytes per parameter (fp32).

    When: the length of the run is not known beforehand. Start: ``lr=1.0``, ``warmup_steps=20``.

    Paper: Defazio et al., https://arxiv.org/abs/2405.15682.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1.0,
        momentum: Fraction = 0.9,
        weight_decay: Nonnegative = 0.0,
        warmup_steps: NonnegativeInteger = 0,
        r: Nonnegative = 0.0,
        weight_lr_power: Nonnegative = 2.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        return Recipe((Update(schedule_free_sgd),), ("z",))


class AdamWScheduleFree(ScheduleFree):
    r"""Schedule-free AdamW: as :class:`SGDScheduleFree`, with the step of Adam's second moment.

    .. math::
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        z_t = z_{t-1} - \eta_t \Bigl(\frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda y_{t-1}\Bigr)

    and :math:`\beta_1` in place of :math:`\beta`.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`; one to ten times AdamW's. Default 2.5e-3.
        betas: :math:`(\beta_1, \beta_2)`, in (0, 1) and [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: :math:`\lambda \ge 0`, taken at :math:`y`. Default 0.
        warmup_steps: an integer >= 0. Default 0.
        r: the power of the step in the weights, >= 0. Default 0.
        weight_lr_power: the power of the learning rate in the weights, >= 0. Default 2.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.
        RuntimeError: for a step in eval mode.

    Sharding class E: no communication. State: 8 bytes per parameter (fp32).

    When: AdamW is right, but the length of the run is not known beforehand. Start: ``lr=1e-2``, ``warmup_steps=20``.

    Paper: Defazio et al., https://arxiv.org/abs/2405.15682.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 2.5e-3,
        betas: Betas = (0.9, 0.999),
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.0,
        warmup_steps: NonnegativeInteger = 0,
        r: Nonnegative = 0.0,
        weight_lr_power: Nonnegative = 2.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        return Recipe((Update(schedule_free_adamw),), ("z", "exp_avg_sq"))
