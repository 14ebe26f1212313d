"""Relatives of Adam, where no library has the option, or has it right."""

from __future__ import annotations

import math

from torch import Tensor

from tests.formulas.basic import Memory, moments


def rmsprop(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    momentum: float,
    decouple_wd: bool = False,
    decouple_lr: bool = False,
    max_lr: float = 1.0,
) -> None:
    """With decoupled decay."""
    assert decouple_wd or decouple_lr
    memory["v"] = 0.99 * memory.get("v", 0.0) + (1 - 0.99) * g**2
    memory["b"] = momentum * memory.get("b", 0.0) + g / (memory["v"].sqrt() + 1e-8)
    p.copy_(p * (1 - lr / (max_lr if decouple_lr else 1.0) * weight_decay) - lr * memory["b"])


def nadam(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
) -> None:
    if decoupled_weight_decay:
        p.mul_(1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    mu = [betas[0] * (1 - 0.96 ** (i * momentum_decay) / 2) for i in range(1, t + 2)]
    _, v = moments(g, memory, t, *betas)
    from_gradient = (1 - mu[t - 1]) / (1 - math.prod(mu[:t])) * g
    from_momentum = mu[t] / (1 - math.prod(mu)) * memory["m"]
    p.sub_(lr * (from_gradient + from_momentum) / (v.sqrt() + 1e-8))


def adopt(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.9999),
    clip_exp: float | None = 0.25,
    decouple: bool = False,
    decouple_lr: bool = False,
    max_lr: float = 1.0,
) -> None:
    apart = decouple or decouple_lr
    if not apart:
        g = g + weight_decay * p
    if t == 1:
        memory["v"] = g**2
        return
    u = g / memory["v"].sqrt().clamp(min=1e-6)
    if clip_exp is not None:
        u = u.clamp(-((t - 1) ** clip_exp), (t - 1) ** clip_exp)
    memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * u
    memory["v"] = betas[1] * memory["v"] + (1 - betas[1]) * g**2
    if apart:
        p.mul_(1 - lr / (max_lr if decouple_lr else 1.0) * weight_decay)
    p.sub_(lr * memory["m"])


def adabelief(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-16,
    amsgrad: bool = False,
    weight_decouple: bool = True,
    rectify: bool = True,
    decouple_lr: bool = False,
    max_lr: float = 1.0,
) -> None:
    """Rectified, with the maximum that the authors' package keeps but does not use; L2 turned into full decoupling."""
    assert rectify
    if weight_decouple or decouple_lr:
        p.mul_(1 - lr / (max_lr if decouple_lr else 1.0) * weight_decay)
    else:
        g = g + weight_decay * p
    memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * g
    memory["s"] = betas[1] * memory.get("s", 0.0) + (1 - betas[1]) * (g - memory["m"]) ** 2 + eps
    s = memory["s"]
    if amsgrad:
        s = memory["largest"] = s.maximum(memory.get("largest", s))
    r_inf = 2 / (1 - betas[1]) - 1
    r = r_inf - 2 * t * betas[1] ** t / (1 - betas[1] ** t)
    step = lr * memory["m"] / (1 - betas[0] ** t)
    if r > 5:
        factor = (r - 4) * (r - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r)
        step = step * math.sqrt(factor * (1 - betas[1] ** t)) / (s.sqrt() + eps)
    p.sub_(step)


def adabound(
    p: Tensor, g: Tensor, memory: Memory, t: int, lr: float, weight_decay: float, base_lr: float, final_lr: float
) -> None:
    """With a base learning rate other than the initial one."""
    moments(g + weight_decay * p, memory, t, 0.9, 0.999)
    eta = lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) / (memory["v"].sqrt() + 1e-8)
    final = final_lr * lr / base_lr
    p.sub_(eta.clamp(final * (1 - 1 / (1e-3 * t + 1)), final * (1 + 1 / (1e-3 * t))) * memory["m"])


def yogi(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    initial_accumulator: float = 1e-6,
    betas: tuple[float, float] = (0.9, 0.999),
) -> None:
    """With a first moment that begins at zero."""
    g = g + weight_decay * p
    v = memory.get("v", g.new_full(g.shape, initial_accumulator))
    memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * g
    memory["v"] = v - (1 - betas[1]) * (v - g**2).sign() * g**2
    p.sub_(lr * (memory["m"] / (1 - betas[0] ** t)) / ((memory["v"] / (1 - betas[1] ** t)).sqrt() + 1e-3))


def ademamix(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float, float],
    alpha: float,
    T_alpha_beta3: int,
) -> None:
    """In the paper's words; with beta1 = 0 its formula for beta3 has the limit beta3^(T / t)."""
    share = t / T_alpha_beta3
    assert betas[0] == 0 or share > 1
    beta3 = betas[2] ** (1 / min(share, 1))
    m, v = moments(g, memory, t, betas[0], betas[1])
    memory["slow"] = beta3 * memory.get("slow", 0.0) + (1 - beta3) * g
    u = (m + min(share, 1) * alpha * memory["slow"]) / (v.sqrt() + 1e-8)
    p.copy_(p - lr * (u + weight_decay * p))


def laprop(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-15,
) -> None:
    """With decay before the step, as in AdamW."""
    memory["v"] = betas[1] * memory.get("v", 0.0) + (1 - betas[1]) * g**2
    u = g / ((memory["v"] / (1 - betas[1] ** t)).sqrt() + eps)
    memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * u
    p.copy_(p - lr * (memory["m"] / (1 - betas[0] ** t) + weight_decay * p))
