"""Ranger21 as the paper and its reference have it, all parameters decayed: one step after the other, in the open."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus


def row_norm(x: Tensor) -> Tensor:
    return x.norm() if x.ndim < 2 else x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def centred(x: Tensor) -> Tensor:
    return x if x.ndim < 2 else x - x.flatten(1).mean(1).view(-1, *[1] * (x.ndim - 1))


def normalized(x: Tensor) -> Tensor:
    return x / (x.std() + 1e-8) if x.numel() > 2 else x


def clipped(p: Tensor, g: Tensor) -> Tensor:
    most = 0.01 * row_norm(p).clamp(min=1e-3)
    norm = row_norm(g)
    return torch.where(norm > most, g * (most / norm.clamp(min=1e-6)), g)


class Ranger21(torch.optim.Optimizer):
    """With a warm-up of three steps, level up to step 7, and down to step 13."""

    def __init__(self, groups: Any, lr: float, weight_decay: float, beta0: float, least: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "beta0": beta0, "least": least})
        self.t = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.t += 1
        t, gradients, total, count = self.t, {}, 0.0, 0
        for p in (p for group in self.param_groups for p in group["params"]):
            g = gradients[p] = normalized(centred(clipped(p, p.grad)))
            state = self.state[p]
            state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g**2
            total += (state["v"] / (1 - 0.999**t)).sum().item()
            count += p.numel()
        for group in self.param_groups:
            lr = group["lr"] * min(1.0, t / 3)
            if t >= 7:
                lr = max(group["lr"] - (group["lr"] - group["least"]) * (t + 1 - 7) / 7, group["least"])
            for p in group["params"]:
                self.move(p, centred(gradients[p]), lr, group, math.sqrt(total / count))

    def move(self, p: Tensor, g: Tensor, lr: float, group: dict[str, Any], deviation: float) -> None:
        t, state, b = self.t, self.state[p], group["beta0"]
        state.setdefault("slow", p.clone())
        momenta = state.setdefault("momenta", [torch.zeros_like(p), torch.zeros_like(p)])
        p.mul_(1 - lr * group["weight_decay"] / deviation)
        p.mul_(1 - lr * 2e-4 * (1 - 1 / (row_norm(p) + 1e-8)))
        new = 0.81 * momenta[t % 2] + 0.19 * normalized(g)
        momenta[t % 2] = new
        u = ((1 + b) * new - b * momenta[1 - t % 2]) / math.sqrt((1 + b) ** 2 + b**2)
        denominator = softplus((state["v"] / (1 - 0.999**t)).sqrt() + 1e-8, beta=50, threshold=1e9)
        p.sub_(lr / (1 - 0.9**t) * u / denominator)
        if t % 5 == 0:
            state["slow"] += 0.5 * (p - state["slow"])
            p.copy_(state["slow"])
