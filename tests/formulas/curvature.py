"""Optimizers that divide by a curvature, given four times the squared gradient for its estimate at every other step."""

from __future__ import annotations

from torch import Tensor

from tests.formulas.basic import Memory

BATCH = 4  # what the squared gradient is multiplied by


def sophia(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.965, 0.99),
    rho: float = 0.04,
    eps: float = 1e-15,
) -> None:
    if t % 2 == 1:
        memory["h"] = betas[1] * memory.get("h", 0.0) + (1 - betas[1]) * BATCH * g**2
    memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * g
    ratio = memory["m"] / (rho * memory["h"]).clamp(min=eps)
    p.copy_(p - lr * weight_decay * p - lr * ratio.clamp(-1, 1))


def adahessian(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-4,
    hessian_power: float = 1.0,
) -> None:
    if t % 2 == 1:
        memory["d"] = BATCH * g**2
    memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * g
    memory["v"] = betas[1] * memory.get("v", 0.0) + (1 - betas[1]) * memory["d"] ** 2
    root = (memory["v"] / (1 - betas[1] ** t)) ** (hessian_power / 2)
    p.copy_(p - lr * weight_decay * p - lr * memory["m"] / (1 - betas[0] ** t) / (root + eps))
