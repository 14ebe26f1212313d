"""Shampoo and SOAP, a block at a time, with singular value decompositions in place of eigendecompositions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.formulas.basic import Memory


def adamw(
    p: Tensor, g: Tensor, memory: Memory, t: int, lr: float, wd: float, betas: tuple[float, float], eps: float
) -> None:
    p.mul_(1 - lr * wd)
    memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * g
    memory["v"] = betas[1] * memory.get("v", 0.0) + (1 - betas[1]) * g**2
    p.sub_(lr * memory["m"] / (1 - betas[0] ** t) / ((memory["v"] / (1 - betas[1] ** t)).sqrt() + eps))


def blocks(shape: torch.Size, size: int | None) -> list[tuple[slice, ...]]:
    parts = [[slice(i, i + (size or d)) for i in range(0, d, size or d)] for d in shape]
    return list(itertools.product(*parts))


def unfold(g: Tensor, axis: int) -> Tensor:
    return g.transpose(0, axis).reshape(g.shape[axis], -1)


def onto(g: Tensor, matrix: Tensor, axis: int) -> Tensor:
    return torch.tensordot(matrix, g, dims=([1], [axis])).movedim(0, axis)


def power(matrix: Tensor, exponent: float) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix)
    return u @ torch.diag(s**exponent) @ vh


def shampoo(
    p: Tensor,
    g: Tensor,
    memory: dict[Any, Any],
    t: int,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    beta3: float | None = None,
    eps: float = 1e-12,
    block_size: int | None = 1024,
    precondition_frequency: int = 10,
    start_step: int = 1,
    stagger: bool = False,
    exponents: tuple[float, ...] | None = None,
    root_method: str = "eigh",
    graft: str | None = "adam",
    graft_beta: float = 0.999,
    graft_eps: float = 1e-8,
    phases: Sequence[int] | None = None,
    delay: int = 0,
) -> None:
    if p.ndim < 2:
        adamw(p, g, memory, t, lr, weight_decay, (0.9, 0.999), 1e-8)
        return
    p.mul_(1 - lr * weight_decay)
    for number, index in enumerate(blocks(p.shape, block_size)):
        own = memory.setdefault(number, {})
        p[index] -= lr * block_update(
            g[index],
            own,
            t,
            betas,
            betas[0] if beta3 is None else beta3,
            eps,
            [(t + phase) % precondition_frequency == 0 for phase in phases]
            if phases is not None
            else [t == start_step or (t > start_step and t % precondition_frequency == 0)] * p.ndim,
            exponents,
            graft,
            graft_beta,
            graft_eps,
            delay,
        )


def block_update(
    g: Tensor,
    own: dict[str, Any],
    t: int,
    betas: tuple[float, float],
    beta3: float,
    eps: float,
    refresh: Sequence[bool],
    exponents: tuple[float, ...] | None,
    graft: str | None,
    graft_beta: float,
    graft_eps: float,
    delay: int = 0,
) -> Tensor:
    beta1, beta2 = betas
    k = g.ndim
    factors = own.setdefault("factors", [0.0] * k)
    for i in range(k):
        square = unfold(g, i) @ unfold(g, i).T
        factors[i] = factors[i] + square if beta2 == 1 else beta2 * factors[i] + (1 - beta2) * square
    m = own.get("m", torch.zeros_like(g))
    f = (beta3 * m + (1 - beta3) * g) / (1 - beta3 * beta1 ** (t - 1))
    own["m"] = beta1 * m + (1 - beta1) * g
    own["v"] = (
        own.get("v", 0.0) + g**2 if graft == "adagrad" else (graft_beta * own.get("v", 0.0) + (1 - graft_beta) * g**2)
    )
    corrected = own["v"] / (1 - graft_beta**t) if graft == "adam" else own["v"]
    d = f if graft in (None, "sgd") else f / (corrected.sqrt() + graft_eps)
    if any(refresh):
        exponent = 1 / (2 * k) if exponents is None else exponents[k - 1]
        correction = 1.0 if beta2 == 1 else 1 - beta2**t
        found = [power(a / correction + eps * torch.eye(len(a), dtype=g.dtype), -exponent) for a in factors]
        last = own.get("roots") or found  # the first time all are found
        new = [new if now else old for new, old, now in zip(found, last, refresh, strict=True)]
        own.setdefault("later", {})[t + delay if own.get("roots") else t] = new
    own["roots"] = own.get("later", {}).pop(t, own.get("roots"))
    if own["roots"] is None:
        return d
    u = f
    for i, root in enumerate(own["roots"]):
        u = onto(u, root, i)
    return u if graft is None else u * d.norm() / u.norm()


def soap(
    p: Tensor,
    g: Tensor,
    memory: dict[Any, Any],
    t: int,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.95, 0.95),
    shampoo_beta: float | None = None,
    eps: float = 1e-8,
    precondition_frequency: int = 10,
    max_preconditioner_dim: int = 10000,
    stagger: bool = False,
    phases: Sequence[int] | None = None,
    delay: int = 0,
) -> None:
    if p.ndim < 2:
        adamw(p, g, memory, t, lr, weight_decay, betas, eps)
        return
    p.mul_(1 - lr * weight_decay)
    beta = betas[1] if shampoo_beta is None else shampoo_beta
    axes = [i for i, d in enumerate(p.shape) if d <= max_preconditioner_dim]
    bases: dict[int, Tensor] = memory.setdefault("bases", {})
    if t > 1:
        turned = g
        for i in axes:
            turned = onto(turned, bases[i].T, i)
        memory["m"] = betas[0] * memory.get("m", 0.0) + (1 - betas[0]) * g
        memory["v"] = betas[1] * memory.get("v", 0.0) + (1 - betas[1]) * turned**2
        u = memory["m"] / (1 - betas[0] ** (t - 1))
        for i in axes:
            u = onto(u, bases[i].T, i)
        u = u / ((memory["v"]).sqrt() + eps) * (1 - betas[1] ** (t - 1)) ** 0.5
        for i in axes:
            u = onto(u, bases[i], i)
        p.sub_(lr * u)
    factors = memory.setdefault("factors", {})
    for i in axes:
        factors[i] = beta * factors.get(i, 0.0) + (1 - beta) * unfold(g, i) @ unfold(g, i).T
        if t == 1:
            u, _, _ = torch.linalg.svd(factors[i])
            bases[i] = u
        elif (t - 1 + (0 if phases is None else phases[i])) % precondition_frequency == 0:
            product = factors[i] @ bases[i]
            order = (bases[i] * product).sum(0).argsort(descending=True)
            memory[i, t + delay] = order, gram_schmidt(product[:, order])
        if (i, t) in memory:
            order, bases[i] = memory.pop((i, t))
            memory["v"] = memory["v"].index_select(i, order)


def gram_schmidt(columns: Tensor) -> Tensor:
    found: list[Tensor] = []
    for column in columns.T:
        for _ in range(2):
            for other in found:
                column = column - (other @ column) * other
        found.append(column / column.norm())
    return torch.stack(found, 1)
