"""LARS, NovoGrad, A2Grad, Apollo, SWATS and Amos, with the options of ours that no library has, or has right."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

Memory = dict[str, Any]


def lars(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    momentum: float,
    trust_coeff: float,
    decouple_lr: bool,
    max_lr: float,
) -> None:
    """With fully decoupled weight decay."""
    assert decouple_lr
    ratio = trust_coeff * p.norm() / (g.norm() + 1e-8) if weight_decay else 1.0
    memory["b"] = momentum * memory["b"] + ratio * g if t > 1 else ratio * g
    p.copy_(p * (1 - lr / max_lr * weight_decay) - lr * memory["b"])


def novograd(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.95, 0.98),
    grad_averaging: bool = False,
    amsgrad: bool = False,
    decouple_lr: bool = False,
    max_lr: float = 1.0,
) -> None:
    square = (g**2).sum()
    memory["v"] = square if t == 1 else betas[1] * memory["v"] + (1 - betas[1]) * square
    memory["largest"] = max(memory.get("largest", 0.0), memory["v"])
    u = g / (sqrt(memory["largest"] if amsgrad else memory["v"]) + 1e-8)
    u = u + (0.0 if decouple_lr else weight_decay) * p
    memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0] if grad_averaging else 1.0) * u
    p.copy_(p * (1 - lr / max_lr * weight_decay if decouple_lr else 1.0) - lr * memory["m"])


def _a2grad(p: Tensor, g: Tensor, memory: Memory, k: int, beta: float, lips: float, weight_decay: float) -> Any:
    """One step of all three; the noise is asked for with the squared deviation from the mean gradient."""
    g = g + weight_decay * p
    if k == 0:
        memory.update(x=p.clone(), alpha=1.0)
    memory["sum"] = memory.get("sum", 0.0) + g
    noise = yield ((g - memory["sum"] / (k + 1)) ** 2).sum()
    c = 1 / (2 * lips / (k + 1) + beta * noise)
    memory["x"] = memory["x"] - c * g
    alpha = 2 / (k + 3)
    p.copy_((1 - alpha) * p + alpha * memory["x"] - (1 - alpha) * memory["alpha"] * c * g)
    memory["alpha"] = alpha
    yield


def a2grad_uni(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    weight_decay: float = 0.0,
    beta: float = 10.0,
    lips: float = 10.0,
    **_: Any,
) -> None:
    step = _a2grad(p, g, memory, t - 1, beta, lips, weight_decay)
    memory["v"] = memory.get("v", 0.0) + next(step)
    step.send(sqrt(memory["v"]))


def a2grad_inc(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    weight_decay: float = 0.0,
    beta: float = 10.0,
    lips: float = 10.0,
    **_: Any,
) -> None:
    step = _a2grad(p, g, memory, t - 1, beta, lips, weight_decay)
    memory["v"] = memory.get("v", 0.0) * ((t - 1) / t) ** 2 + next(step)
    step.send(sqrt(memory["v"]))


def a2grad_exp(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    weight_decay: float = 0.0,
    beta: float = 10.0,
    lips: float = 10.0,
    rho: float = 0.5,
    **_: Any,
) -> None:
    step = _a2grad(p, g, memory, t - 1, beta, lips, weight_decay)
    deviation = next(step)
    memory["vv"] = deviation if t == 1 else rho * memory["vv"] + (1 - rho) * deviation
    memory["v"] = max(memory.get("v", 0.0), memory["vv"])
    step.send(sqrt(t * memory["v"]))


def apollo(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    beta: float = 0.9,
    eps: float = 1e-4,
    warmup: int = 500,
    init_lr: float | None = None,
    rebound: str = "constant",
    weight_decay_type: str | None = None,
    decouple_lr: bool = False,
    max_lr: float = 1.0,
) -> None:
    kind = weight_decay_type or {"constant": "L2", "belief": "decoupled"}[rebound]
    if decouple_lr:
        p.mul_(1 - lr / max_lr * weight_decay)
        weight_decay = 0.0
    if kind == "L2":
        g = g + weight_decay * p
    m, hessian, d = (memory.get(k, torch.zeros_like(p)) for k in ("m", "B", "d"))
    a = (1 - beta) / (1 - beta**t)
    y = g - m
    norm = (d**4).sum() ** 0.25 + (eps / 0.01 if rebound == "constant" else eps)
    v = d / norm
    memory["m"] = m + a * y
    memory["B"] = hessian + (-a * (y / norm * v).sum() - (hessian * v**2).sum()) * v**2
    if rebound == "constant":
        curvature = memory["B"].abs().clamp(min=0.01)
    else:
        curvature = torch.maximum(memory["B"].abs(), y.abs().max()) + eps / a
    memory["d"] = memory["m"] / curvature
    if kind != "L2":
        memory["d"] += weight_decay / (curvature.mean() if kind == "stable" else 1.0) * p
    begin = lr / 1000 if init_lr is None else init_lr
    p.sub_((begin + (lr - begin) * (t - 1) / warmup if t <= warmup else lr) * memory["d"])


def swats(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-3,
    amsgrad: bool = False,
    nesterov: bool = False,
    tolerance: float = 1e-6,
) -> None:
    """Each tensor switches by itself."""
    beta1, beta2 = betas
    g = g + weight_decay * p
    if "sgd" in memory:
        memory["b"] = beta1 * memory.get("b", 0.0) + g
        p.sub_(memory["sgd"] * (1 - beta1) * (g + beta1 * memory["b"] if nesterov else memory["b"]))
        return
    memory["m"] = beta1 * memory.get("m", 0.0) + (1 - beta1) * g
    memory["v"] = beta2 * memory.get("v", 0.0) + (1 - beta2) * g**2
    memory["largest"] = torch.maximum(memory.get("largest", memory["v"]), memory["v"])
    root = (memory["largest"] if amsgrad else memory["v"]).sqrt() + eps
    d = -lr * sqrt(1 - beta2**t) / (1 - beta1**t) * memory["m"] / root
    p.add_(d)
    if (d * g).sum() == 0:
        return
    gamma = (d * d).sum() / -(d * g).sum()
    memory["lambda"] = beta2 * memory.get("lambda", 0.0) + (1 - beta2) * gamma
    found = memory["lambda"] / (1 - beta2**t)
    if t > 1 and found > 0 and torch.allclose(found, gamma, rtol=tolerance, atol=1e-8):
        memory["sgd"] = found


def amos(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    beta: float = 0.999,
    momentum: float = 0.0,
    eta: float | None = None,
    extra_l2: float = 0.0,
    c_coef: float = 0.25,
    d_coef: float = 0.25,
) -> None:
    if eta is None:
        eta = 0.5 if p.ndim < 2 else sqrt(2 / p[0].numel())
    square = (g**2).mean()
    memory["v"] = beta * memory.get("v", 0.0) + (1 - beta) * square
    r = (1 - beta**t) / memory["v"]
    b = memory.get("b", 0.0)
    gamma = lr**2 * r * square / sqrt(1 + c_coef * sqrt(lr) * b)
    p.mul_(1 - lr * weight_decay)
    u = -(gamma / 2 + extra_l2) * p - lr * eta * sqrt(r) * g
    u = u / (1 + d_coef * sqrt(lr * eta) * b)
    memory["b"] = b + gamma * (1 + b)
    memory["u"] = momentum * memory.get("u", 0.0) + (1 - momentum) * u
    p.add_(memory["u"])
