"""Ranger, RangerAdaBelief, SGDP, CAME and Adam-mini."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Memory = dict[str, Tensor]


def rectified(beta2: float, t: int, threshold: float = 5.0) -> float | None:
    """RAdam's factor; None while it has none."""
    limit = 2 / (1 - beta2) - 1
    r = limit - 2 * t * beta2**t / (1 - beta2**t)
    above, below = (r - 4) * (r - 2) * limit, (limit - 4) * (limit - 2) * r
    return (above / below) ** 0.5 if r > threshold else None


def with_lookahead(p: Tensor, step: Callable[[], Tensor], memory: Memory, t: int, k: int, alpha: float) -> None:
    if t == 1:
        memory["slow"] = p.clone()
    p.copy_(step())
    if t % k == 0:
        memory["slow"] += alpha * (p - memory["slow"])
        p.copy_(memory["slow"])


def centred(g: Tensor, above: int) -> Tensor:
    return g - g.mean(tuple(range(1, g.ndim)), keepdim=True) if g.ndim > above else g


def ranger(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.95, 0.999),
    eps: float = 1e-5,
    k: int = 6,
    alpha: float = 0.5,
    gc_conv_only: bool = False,
    n_sma_threshold: float = 5.0,
    decouple_lr: bool = False,
    max_lr: float = 1.0,
) -> None:
    """With centralised gradients and decoupled decay."""
    (b1, b2), g = betas, centred(g, 3 if gc_conv_only else 1)
    memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
    memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * g**2
    factor, u = rectified(b2, t, n_sma_threshold), memory["m"] / (1 - b1**t)
    if factor is not None:
        u = factor * (1 - b2**t) ** 0.5 * u / (memory["v"].sqrt() + eps)
    shrink = 1 - (lr / max_lr if decouple_lr else lr) * weight_decay
    with_lookahead(p, lambda: shrink * p - lr * u, memory, t, k, alpha)


def ranger_adabelief(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.95, 0.999),
    eps: float = 1e-5,
    k: int = 6,
    alpha: float = 0.5,
    use_gc: bool = True,
    decouple_wd: bool = True,
    decouple_lr: bool = False,
    max_lr: float = 1.0,
) -> None:
    b1, b2 = betas
    g = g if decouple_wd or decouple_lr else g + weight_decay * p
    g = centred(g, 1) if use_gc else g
    memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
    memory["s"] = b2 * memory.get("s", 0.0) + (1 - b2) * (g - memory["m"]) ** 2
    factor, u = rectified(b2, t), memory["m"] / (1 - b1**t)
    if factor is not None:
        memory["s"] = memory["s"] + eps
        u = factor * (1 - b2**t) ** 0.5 * u / (memory["s"].sqrt() + eps)
    share = (lr / max_lr if decouple_lr else lr) * weight_decay if decouple_wd or decouple_lr else 0.0
    with_lookahead(p, lambda: (1 - share) * p - lr * u, memory, t, k, alpha)


def sgdp(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    momentum: float,
    delta: float,
    decouple_lr: bool,
    max_lr: float,
) -> None:
    """Fully decoupled decay, and a threshold that projects every slice of every matrix."""
    assert decouple_lr
    memory["b"] = momentum * memory.get("b", 0.0) + g
    u, ratio = memory["b"], 1.0
    if p.ndim > 1:
        rows, ratio = p.flatten(1), 0.1
        cosine = (g * p).flatten(1).sum(1) / g.flatten(1).norm(dim=1) / rows.norm(dim=1)
        assert cosine.abs().max() < delta / rows.shape[1] ** 0.5
        along = rows / (rows.norm(dim=1, keepdim=True) + 1e-8)
        u = (u.flatten(1) - along * (along * u.flatten(1)).sum(1, keepdim=True)).view_as(p)
    p.copy_((1 - lr / max_lr * weight_decay * ratio) * p - lr * u)


def root_of_factored(squares: Tensor, memory: Memory, name: str, beta: float) -> Tensor:
    """The root of the product of the averages of row and column means."""
    for axis in (-1, -2):
        key = f"{name}{axis}"
        memory[key] = beta * memory.get(key, 0.0) + (1 - beta) * squares.mean(axis, keepdim=True)
    rows, columns = memory[f"{name}-1"], memory[f"{name}-2"]
    return (rows * columns / rows.mean(-2, keepdim=True)).sqrt()


def came(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float,
    decouple_lr: bool,
    max_lr: float,
) -> None:
    """Fully decoupled decay."""
    assert decouple_lr
    squares = g**2 + 1e-30
    if p.ndim < 2:
        memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * squares
    u = g / (memory["v"].sqrt() if p.ndim < 2 else root_of_factored(squares, memory, "squares", 0.999))
    u = u / max(1.0, (u**2).mean() ** 0.5)
    m = memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * u
    trust = 1.0 if p.ndim < 2 else 1 / root_of_factored((u - m) ** 2 + 1e-16, memory, "apart", 0.9999)
    p.copy_((1 - lr / max_lr * weight_decay) * p - lr * m * trust)


def adam_mini(
    p: Tensor,
    g: Tensor,
    memory: Memory,
    t: int,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    heads: int | None = None,
    decouple_lr: bool = False,
    max_lr: float = 1.0,
) -> None:
    """One block after the other."""
    b1, b2 = betas
    blocks = 1 if p.ndim < 2 else heads or p.shape[0]
    memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
    memory["v"] = b2 * memory.get("v", g.new_zeros(blocks)) + (1 - b2) * (g.reshape(blocks, -1) ** 2).mean(1)
    p *= 1 - (lr / max_lr if decouple_lr else lr) * weight_decay
    for part, m, v in zip(p.chunk(blocks), memory["m"].chunk(blocks), memory["v"], strict=True):
        part -= lr * m / (1 - b1**t) / ((v / (1 - b2**t)) ** 0.5 + eps)
