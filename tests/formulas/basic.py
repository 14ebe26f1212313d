"""Adam, LAMB and SGDW, with the options of ours that no library has."""

from __future__ import annotations

from torch import Tensor

Memory = dict[str, Tensor]


def moments(g: Tensor, memory: Memory, t: int, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """Both moments of Adam, bias-corrected."""
    memory["m"] = beta1 * memory.get("m", 0.0) + (1 - beta1) * g
    memory["v"] = beta2 * memory.get("v", 0.0) + (1 - beta2) * g**2
    return memory["m"] / (1 - beta1**t), memory["v"] / (1 - beta2**t)


def lamb(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    clamp: float = float("inf"),
    always_adapt: bool = False,
    decouple_lr: bool = False,
    max_lr: float = 1.0,
) -> None:
    m, v = moments(g, memory, t, 0.9, 0.999)
    u = m / (v.sqrt() + 1e-6) + (0.0 if decouple_lr else weight_decay) * p
    ratio = min((p**2).sum() ** 0.5, clamp) / (u**2).sum() ** 0.5 if weight_decay or always_adapt else 1.0
    shrink = 1 - lr / max_lr * weight_decay if decouple_lr else 1.0
    p.copy_(shrink * p - lr * ratio * u)


def adam(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    decouple_lr: bool = False,
    max_lr: float = 1.0,
) -> None:
    m, v = moments(g, memory, t, 0.9, 0.999)
    p.copy_(p * (1 - (lr / max_lr if decouple_lr else lr) * weight_decay) - lr * m / (v.sqrt() + 1e-8))


def sgdw(
    p: Tensor, g: Tensor, memory: Memory, t: int, lr: float, weight_decay: float, momentum: float, decouple_wd: bool
) -> None:
    assert decouple_wd
    memory["b"] = momentum * memory["b"] + g if t > 1 else g.clone()
    p.copy_(p * (1 - lr * weight_decay) - lr * memory["b"])
