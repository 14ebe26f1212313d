"""What no library has, or has wrong: momenta and their kin, from OPTIMIZERS.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.formulas.basic import Memory


def signum(
    p: Tensor, g: Tensor, memory: Memory, t: int, lr: float, weight_decay: float, momentum: float, max_lr: float = 0.0
) -> None:
    """Decay decoupled, and with ``max_lr`` fully."""
    memory["m"] = momentum * memory.get("m", torch.zeros_like(p)) + (1 - momentum) * g
    p.copy_((1 - (lr / max_lr if max_lr else lr) * weight_decay) * p - lr * torch.sign(memory["m"]))


def madgrad(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    eps: float = 1e-6,
    max_lr: float = 1.0,
) -> None:
    """Decay fully decoupled. Without momentum the start is found anew, so that decay moves it too."""
    step = lr + eps if lr else 0.0
    start = memory.setdefault("start", p.clone())
    if momentum == 0 and t > 1:
        start = p + memory["s"] / (memory["n"] ** (1 / 3) + eps)
    memory["s"] = memory.get("s", 0.0) + step * math.sqrt(t) * g
    memory["n"] = memory.get("n", 0.0) + step * math.sqrt(t) * g**2
    root = memory["n"] ** (1 / 3) + eps
    z = start - torch.where(root > 0, memory["s"] / root, 0.0)
    p.copy_(momentum * p + (1 - momentum) * z - lr / max_lr * weight_decay * p)


def pid(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    momentum: float,
    dampening: float = 0.0,
    integral: float = 5.0,
    derivative: float = 10.0,
) -> None:
    g = g + weight_decay * p
    if t == 1:
        memory["i"], memory["d"] = g, torch.zeros_like(g)
    else:
        memory["i"] = momentum * memory["i"] + (1 - dampening) * g
        memory["d"] = momentum * memory["d"] + (1 - momentum) * (g - memory["g"])
    memory["g"] = g
    p.sub_(lr * (g + integral * memory["i"] + derivative * memory["d"]))


def ranger_va(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.95, 0.999),
    eps: float = 1e-5,
    amsgrad: bool = True,
    transformer: str | None = "softplus",
    smooth: float = 50.0,
    grad_transformer: str = "square",
    bug_compat: bool = False,
    k: int = 6,
    alpha: float = 0.5,
    max_lr: float = 0.0,
) -> None:
    """One average of the second moment; with ``bug_compat`` two, as the reference has it."""
    beta1, beta2 = betas
    slow = memory.setdefault("slow", p.clone())
    memory["m"] = beta1 * memory.get("m", 0.0) + (1 - beta1) * g
    v = memory.get("v", torch.zeros_like(p))
    if bug_compat:
        v = beta2 * v + (1 - beta2) * g**2
    memory["v"] = beta2 * v + (1 - beta2) * (g**2 if grad_transformer == "square" else g.abs())
    memory["largest"] = torch.maximum(memory.get("largest", memory["v"]), memory["v"])
    v = memory["largest" if amsgrad else "v"]
    size = v**0.5 if grad_transformer == "square" else v
    scale = torch.log1p(torch.exp(smooth * size)) / smooth if transformer == "softplus" else size + eps
    correct2 = 1 - beta2**t
    step = lr * (correct2 if grad_transformer == "abs" and not bug_compat else correct2**0.5) / (1 - beta1**t)
    p.copy_(p * (1 - (lr / max_lr if max_lr else lr) * weight_decay) - step * memory["m"] / scale)
    if t % k == 0:
        slow += alpha * (p - slow)
        p.copy_(slow)
