"""SM3-II, written element by element."""

from __future__ import annotations

import itertools

from torch import Tensor

Memory = dict[str, Tensor]


def sm3(p: Tensor, g: Tensor, memory: Memory, t: int, lr: float, weight_decay: float, momentum: float) -> None:
    old = memory.setdefault("bounds", [[0.0] * size for size in p.shape])
    new = [[0.0] * size for size in p.shape]
    direction = g.clone()
    for at in itertools.product(*map(range, p.shape)):
        nu = min(old[axis][i] for axis, i in enumerate(at)) + g[at].item() ** 2
        for axis, i in enumerate(at):
            new[axis][i] = max(new[axis][i], nu)
        direction[at] = g[at] / (nu + 1e-30) ** 0.5
    memory["bounds"] = new
    memory["m"] = momentum * memory.get("m", 0.0) + (1 - momentum) * direction
    p.copy_(p * (1 - lr * weight_decay) - lr * memory["m"])
