"""MomoAdam, Prodigy and DAdaptAdam: sums over all parameters of all groups, so the formulas are whole optimizers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor


def dot(xs: list[Tensor], ys: list[Tensor]) -> float:
    return sum((x * y).sum().item() for x, y in zip(xs, ys, strict=True))


class MomoAdam(torch.optim.Optimizer):
    """The averages are those of the whole model; each group has its own step size and its own bound of the loss."""

    def __init__(
        self,
        groups: Any,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lb: float = 0.0,
        divide: bool = True,
        use_fstar: bool = False,
        decouple_lr: bool = False,
        max_lr: float | None = None,
    ) -> None:
        self.eps, self.divide, self.use_fstar, self.decouple_lr = eps, divide, use_fstar, decouple_lr
        (self.b1, self.b2), self.t, self.f, self.gamma = betas, 0, 0.0, 0.0
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "lb": lb, "max_lr": max_lr})
        self.bounds = [group["lb"] for group in self.param_groups]
        self.flat = [p for group in self.param_groups for p in group["params"]]
        self.m, self.v = [torch.zeros_like(p) for p in self.flat], [torch.zeros_like(p) for p in self.flat]

    @torch.no_grad()
    def step(self, loss: float) -> None:  # type: ignore[override]
        self.t += 1
        b1, b2, rho = self.b1, self.b2, 1 - self.b1**self.t
        g = [p.grad for p in self.flat]
        self.f = b1 * self.f + (1 - b1) * float(loss)
        self.gamma = b1 * self.gamma + (1 - b1) * dot(g, self.flat)
        self.m = [b1 * m + (1 - b1) * x for m, x in zip(self.m, g, strict=True)]
        self.v = [b2 * v + (1 - b2) * x**2 for v, x in zip(self.v, g, strict=True)]
        root = [(v / (1 - b2**self.t)) ** 0.5 + self.eps for v in self.v]
        u = [m / d for m, d in zip(self.m, root, strict=True)]
        pm, mm = dot(self.flat, self.m), dot(self.m, u)
        where = dict(zip(self.flat, u, strict=True))
        for i, group in enumerate(self.param_groups):
            lr = group["lr"]
            shrink = (lr / group["max_lr"] if self.decouple_lr else lr) * group["weight_decay"]
            a, bound = 1 + shrink, self.bounds[i]
            if self.use_fstar and a * self.f + pm - a * self.gamma < a * rho * bound:
                bound = max((a * self.f + pm - a * self.gamma) / (2 * a * rho), group["lb"])
            tau = min(lr / rho, max(a * (self.f - rho * bound - self.gamma) + pm, 0.0) / mm)
            if self.use_fstar:
                bound = max((self.f + pm - self.gamma - tau * mm / 2) / rho, group["lb"])
            self.bounds[i] = bound
            for p in group["params"]:
                p.copy_((p - tau * where[p]) / a if self.divide else p * (1 - shrink) - tau * where[p])


class Estimating(torch.optim.Optimizer):
    """What is common to both: one ``d``; options of the first group hold for it; ``lr`` is each group's own."""

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, {**self.usual, **options})
        first = self.param_groups[0]
        self.d, self.d_max, self.numerator, self.t = first["d0"], first["d0"], 0.0, 0
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {k: torch.zeros_like(p) for k in ("m", "v", "s")} | {"start": p.detach().clone()}

    usual: ClassVar[dict[str, Any]] = {
        "lr": 1.0,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decouple_lr": False,
        "use_bias_correction": False,
        "d0": 1e-6,
        "growth_rate": float("inf"),
    }

    def rate(self, group: dict[str, Any]) -> float:
        b1, b2 = group["betas"]
        corrected = group["use_bias_correction"]
        return group["lr"] * ((1 - b2**self.t) ** 0.5 / (1 - b1**self.t) if corrected else 1.0)

    def shrunk(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        if group["decouple_lr"]:
            return p * (1 - group["lr"] / group["max_lr"] * group["weight_decay"])
        return p * (1 - self.d * self.rate(group) * group["weight_decay"]) if group["decouple"] else p.clone()

    def gradient(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        l2 = not group["decouple"] and not group["decouple_lr"]
        return p.grad + group["weight_decay"] * p if l2 else p.grad


class Prodigy(Estimating):
    usual = Estimating.usual | {"decouple": True, "beta3": None, "safeguard_warmup": False, "d_coef": 1.0}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self.t += 1
        first, d = self.param_groups[0], self.d
        b3 = first["betas"][1] ** 0.5 if first["beta3"] is None else first["beta3"]
        self.numerator *= b3
        size = 0.0
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], self.rate(group)
            for p in group["params"]:
                g, at = self.gradient(p, group), self.state[p]
                self.numerator += d**2 / first["d0"] * lr * (g * (at["start"] - p)).sum().item()
                at["m"] = b1 * at["m"] + (1 - b1) * d * g
                at["v"] = b2 * at["v"] + (1 - b2) * (d * g) ** 2
                counts = 0.0 if lr == 0 else 1.0 if group["safeguard_warmup"] else lr
                at["s"] = b3 * at["s"] + d**2 / first["d0"] * counts * g
                size += at["s"].abs().sum().item()
        found = first["d_coef"] * self.numerator / size
        now = max(d, found) if d == first["d0"] else d
        self.d_max = max(self.d_max, found)
        now = min(self.d_max, now * first["growth_rate"])
        for group in self.param_groups:
            for p in group["params"]:
                at = self.state[p]
                step = d * self.rate(group) * at["m"] / (at["v"] ** 0.5 + now * group["eps"])
                p.copy_(self.shrunk(p, group) - step)
        self.d = now


class DAdaptAdam(Estimating):
    usual = Estimating.usual | {"decouple": False, "layer_scale": 1.0}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self.t += 1
        first, d = self.param_groups[0], self.d
        b = first["betas"][1] ** 0.5
        along = size = 0.0
        for group in self.param_groups:
            (b1, b2), lr, scale = group["betas"], self.rate(group), group["layer_scale"]
            for p in group["params"]:
                g, at = self.gradient(p, group), self.state[p]
                along += scale * d * lr * (g * at["s"] / (at["v"] ** 0.5 + group["eps"])).sum().item()
                at["m"] = b1 * at["m"] + (1 - b1) * scale * d * lr * g
                at["v"] = b2 * at["v"] + (1 - b2) * g**2
                at["s"] = b * at["s"] + (1 - b) * d * lr * g
                size += scale * at["s"].abs().sum().item()
        self.numerator = b * self.numerator + (1 - b) * along
        found = self.numerator / ((1 - b) * size)
        for group in self.param_groups:
            for p in group["params"]:
                at = self.state[p]
                p.copy_(self.shrunk(p, group) - at["m"] / (at["v"] ** 0.5 + group["eps"]))
        self.d = max(d, min(found, d * first["growth_rate"]))
