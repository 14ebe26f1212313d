"""Lookahead, AdaGraft and averages of weights, on lists of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.formulas.basic import Memory, moments


class Lookahead:
    """The paper's: slow weights from before the first step, around a ``torch.optim.Optimizer``."""

    def __init__(self, params: Sequence[Tensor], optimizer: Any, k: int, alpha: float, momentum: str = "") -> None:
        self.params, self.optimizer, self.k, self.alpha = list(params), optimizer, k, alpha
        self.slow = [p.detach().clone() for p in self.params]
        self.t, (self.mode, _, self.name) = 0, momentum.partition(" ")
        self.slow_momenta: list[Any] = [0.0] * len(self.params)

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.t += 1
        if self.t % self.k:
            return
        for i, p in enumerate(self.params):
            self.slow[i] = self.slow[i] + self.alpha * (p.detach() - self.slow[i])
            p.copy_(self.slow[i])
            if self.mode == "reset":
                self.optimizer.state[p][self.name].zero_()
            elif self.mode == "pullback":
                momentum, slow = self.optimizer.state[p][self.name], self.slow_momenta[i]
                momentum.copy_(slow + self.alpha * (momentum - slow))
                self.slow_momenta[i] = momentum.clone()


def sgd_step(g: Tensor, memory: Memory, t: int, lr: float, momentum: float) -> Tensor:
    memory["b"] = momentum * memory["b"] + g if t > 1 else g.clone()
    return -lr * memory["b"]


def adam_step(g: Tensor, memory: Memory, t: int, lr: float) -> Tensor:
    m, v = moments(g, memory, t, 0.9, 0.999)
    return -lr * m / (v.sqrt() + 1e-8)


def adagraft(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: tuple[Callable[[int, Tensor], Tensor], Callable[[int, Tensor], Tensor]],
    scope: str,
    shrink: float,
) -> None:
    """``steps`` are those of the magnitude and the direction optimizer, from the number of a tensor and a gradient."""
    far = [steps[0](i, g) for i, g in enumerate(grads)]
    along = [steps[1](i, g) for i, g in enumerate(grads)]
    lengths = [[(s**2).sum() for s in each] for each in (far, along)]
    if scope == "global":
        lengths = [[torch.stack(each).sum()] * len(grads) for each in lengths]
    for p, s, m, d in zip(params, along, *lengths, strict=True):
        p.copy_(shrink * p + (m.sqrt() / d.sqrt() * s if d > 0 else 0.0))


def ema(history: Sequence[Tensor], decay: float, every: int = 1, warmup: bool = False) -> Tensor:
    """Of the parameters after each step."""
    taken = history[every - 1 :: every]
    average = taken[0]
    for n, p in enumerate(taken[1:], 1):
        beta = min(decay, (1 + n) / (10 + n)) if warmup else decay
        average = beta * average + (1 - beta) * p
    return average
