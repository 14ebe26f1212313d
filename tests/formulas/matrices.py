"""Optimizers that work on whole matrices, a matrix at a time."""

from __future__ import annotations

import math

from torch import Tensor

from tests.formulas.basic import Memory

POLAR_EXPRESS = """8.28721201814563 -23.595886519098837 17.300387312530933
4.107059111542203 -2.9478499167379106 0.5448431082926601
3.9486908534822946 -2.908902115962949 0.5518191394370137
3.3184196573706015 -2.488488024314874 0.51004894012372
2.300652019954817 -1.6689039845747493 0.4188073119525673
1.891301407787398 -1.2679958271945868 0.37680408948524835
1.8750014808534479 -1.2500016453999487 0.3750001645474248"""


def muon(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    polar_express: bool = False,
    adjust_lr: str | None = "original",
    adam_factor: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
) -> None:
    if p.ndim < 2:
        lr = lr * adam_factor
        p.mul_(1 - lr * weight_decay)
        memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * g
        memory["v"] = betas[1] * memory.get("v", 0.0) + (1 - betas[1]) * g**2
        root = (memory["v"] / (1 - betas[1] ** t)).sqrt() + 1e-8
        p.sub_(lr * memory["m"] / (1 - betas[0] ** t) / root)
        return
    p.mul_(1 - lr * weight_decay)
    memory["m"] = momentum * memory.get("m", 0.0) + (1 - momentum) * g
    x = (1 - momentum) * g + momentum * memory["m"] if nesterov else memory["m"]
    x = x.reshape(len(x), -1) / x.norm()
    for step in range(ns_steps):
        a, b, c = 3.4445, -4.7750, 2.0315
        if polar_express:
            a, b, c = map(float, POLAR_EXPRESS.splitlines()[step].split())
            a, b, c = a / 1.01, b / 1.01**3, c / 1.01**5
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    rows, columns = x.shape
    scale = {"original": math.sqrt(max(1, rows / columns)), "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns))}
    p.sub_(lr * scale.get(adjust_lr or "", 1.0) * x.reshape(p.shape))
