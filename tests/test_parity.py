"""Each optimizer against another library's, in fp64 over 13 steps of a noisy quadratic, each on its own trajectory.

What has no other implementation is compared with its formula, written out here in plain PyTorch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import lion_pytorch
import optimi
import pytest
import pytorch_optimizer
import torch
from torch import Tensor

import oput_dist as oput

SHAPES = [(6, 5), (5,), (4, 3, 2, 2), (1,)]
STEPS = 13
EXACT = 2e-15  # a few last bits of parameters of size 1
SECOND = {"lr": 0.003, "weight_decay": 0.07}


def without_its_package(package: str, modules: list[str]) -> ModuleType:
    """The last of some modules of a package whose own ``__init__`` cannot be imported: timm's wants torchvision."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = spec.submodule_search_locations[0]
    bare = ModuleType("bare_" + package)
    bare.__path__ = [f"{root}/optim"]
    sys.modules[bare.__name__] = bare
    for name in modules:
        module = importlib.import_module(f"{bare.__name__}.{name}")
    return module


timm_lamb = without_its_package("timm", ["lamb"]).Lamb
timm_adamp = without_its_package("timm", ["adamp"]).AdamP
timm_adan = without_its_package("timm", ["adan"]).Adan


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def pull(p: Tensor, i: int, step: int) -> Tensor:
    """The gradient of a quadratic with noise that depends on the tensor and the step alone."""
    generator = torch.Generator().manual_seed(1000 + 10 * step + i)
    return 0.3 * (p - 0.5) + torch.randn(p.shape, generator=generator, dtype=torch.float64)


def train(make: Callable[..., torch.optim.Optimizer], options: dict[str, Any], second: dict[str, Any]) -> list[Tensor]:
    params = [torch.nn.Parameter(value) for value in start()]
    optimizer = make([{"params": params[:2]}, {"params": params[2:], **second}], **options)
    for step in range(STEPS):
        for i, p in enumerate(params):
            p.grad = pull(p.detach(), i, step)
        optimizer.step()
    return [p.detach() for p in params]


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    moved = max((w - s).abs().max().item() for w, s in zip(wanted, start(), strict=True))
    assert moved > 1e-2  # or nothing was tested
    return max((f - w).abs().max().item() for f, w in zip(found, wanted, strict=True))


T = torch.optim
ORACLES: list[tuple[Any, dict[str, Any], Any, dict[str, Any]]] = [
    (oput.SGD, {"lr": 0.01}, T.SGD, {}),
    (oput.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}, T.SGD, {}),
    (oput.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "maximize": True}, T.SGD, {}),
    (oput.SGD, {"lr": 0.01, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}, T.SGD, {}),
    (oput.Adam, {"lr": 0.01}, T.Adam, {}),
    (oput.Adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}, T.Adam, {}),
    (oput.Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True}, T.Adam, {}),
    (oput.AdamW, {"lr": 0.01}, T.AdamW, {}),
    (oput.AdamW, {"lr": 0.01, "weight_decay": 0.2, "betas": (0.5, 0.9), "eps": 1e-2}, T.AdamW, {}),
    (oput.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}, T.AdamW, {}),
    (oput.Adafactor, {"lr": 0.01}, T.Adafactor, {}),
    (oput.Adafactor, {"lr": 0.05, "weight_decay": 0.1, "d": 1.5, "eps": (1e-3, 1e-2)}, T.Adafactor, {}),
    (oput.Adafactor, {"lr": 0.1, "beta2_decay": -0.5, "maximize": True}, T.Adafactor, {}),
    (oput.AdamP, {"lr": 0.01}, timm_adamp, {}),
    (oput.AdamP, {"lr": 0.01, "delta": 1.0, "betas": (0.5, 0.9)}, timm_adamp, {}),
    (oput.AdamP, {"lr": 0.01, "weight_decay": 0.1, "delta": 3.0, "nesterov": True}, timm_adamp, {}),
    (oput.Lion, {"lr": 0.01}, lion_pytorch.Lion, {}),
    (oput.Lion, {"lr": 0.01, "weight_decay": 0.3, "betas": (0.8, 0.95)}, lion_pytorch.Lion, {}),
    (oput.Lion, {"lr": 0.01, "weight_decay": 0.3}, pytorch_optimizer.Lion, {}),
    (oput.Adan, {"lr": 0.01}, timm_adan, {"foreach": False}),
    (oput.Adan, {"lr": 0.01, "weight_decay": 0.2, "betas": (0.9, 0.8, 0.95)}, timm_adan, {"foreach": False}),
    (oput.Adan, {"lr": 0.01, "weight_decay": 0.2, "no_prox": True}, timm_adan, {"foreach": False}),
    (oput.Adan, {"lr": 0.01, "weight_decay": 0.2, "eps": 1e-3}, pytorch_optimizer.Adan, {}),
    (oput.StableAdamW, {"lr": 0.01}, optimi.StableAdamW, {"triton": False}),
    (oput.StableAdamW, {"lr": 0.01, "weight_decay": 0.2, "betas": (0.8, 0.9)}, optimi.StableAdamW, {"triton": False}),
    (
        oput.StableAdamW,
        {"lr": 0.01, "weight_decay": 1e-3, "decouple_lr": True, "max_lr": 0.02},
        optimi.StableAdamW,
        {"triton": False},
    ),
    (oput.Lamb, {"lr": 0.01, "weight_decay": 0.1}, timm_lamb, {"max_grad_norm": None, "foreach": False}),
    (
        oput.Lamb,
        {"lr": 0.01, "weight_decay": 0.0, "always_adapt": True, "betas": (0.8, 0.95), "eps": 1e-3},
        timm_lamb,
        {"max_grad_norm": None, "foreach": False},
    ),
    (oput.Lamb, {"lr": 0.01, "weight_decay": 0.0}, timm_lamb, {"max_grad_norm": None, "foreach": False}),
    (
        oput.SGD,
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "decouple_wd": True},
        optimi.SGD,
        {"torch_init": True, "triton": False},
    ),
]


def label(row: Any) -> str:
    ours, options, oracle, _ = row
    return f"{ours.__name__}-{oracle.__module__.split('.')[0]}-{'-'.join(options)}"


@pytest.mark.filterwarnings("ignore:You are using weight_decay")
@pytest.mark.parametrize(("ours", "options", "oracle", "more"), ORACLES, ids=map(label, ORACLES))
def test_equals_another_library(ours: Any, options: dict[str, Any], oracle: Any, more: dict[str, Any]) -> None:
    second = {**SECOND, "weight_decay": 2e-3} if "decouple_lr" in options else SECOND
    wanted = train(oracle, {**options, **more}, second)
    assert difference(train(ours, {**options, "backend": "eager"}, second), wanted) <= EXACT


# ---------------------------------------------------------------------------------------------- formulas without oracle


def by_formula(update: Callable[..., None], groups: list[dict[str, Any]], clip: float | None = None) -> list[Tensor]:
    """``update(p, g, memory, t, **hyperparameters)`` changes ``p`` and its ``memory`` in place."""
    params = start()
    memory: list[dict[str, Tensor]] = [{} for _ in params]
    for step in range(STEPS):
        grads = [pull(p, i, step) for i, p in enumerate(params)]
        norm = sum((g**2).sum() for g in grads) ** 0.5
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            update(p, g * factor, memory[i], step + 1, **groups[i // 2])
    return params


def moments(g: Tensor, memory: dict[str, Tensor], t: int, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    memory["m"] = beta1 * memory.get("m", 0.0) + (1 - beta1) * g
    memory["v"] = beta2 * memory.get("v", 0.0) + (1 - beta2) * g**2
    return memory["m"] / (1 - beta1**t), memory["v"] / (1 - beta2**t)


def lamb(
    p: Tensor,
    g: Tensor,
    memory: dict[str, Tensor],
    t: int,
    lr: float,
    weight_decay: float,
    clamp: float = float("inf"),
    always_adapt: bool = False,
    max_lr: float | None = None,
) -> None:
    m, v = moments(g, memory, t, 0.9, 0.999)
    inside = weight_decay if max_lr is None else 0.0
    u = m / (v.sqrt() + 1e-6) + inside * p
    ratio = min((p**2).sum() ** 0.5, clamp) / (u**2).sum() ** 0.5 if weight_decay or always_adapt else 1.0
    shrink = 1.0 if max_lr is None else 1 - lr / max_lr * weight_decay
    p.copy_(shrink * p - lr * ratio * u)


def adam(
    p: Tensor,
    g: Tensor,
    memory: dict[str, Tensor],
    t: int,
    lr: float,
    weight_decay: float,
    max_lr: float | None = None,
) -> None:
    m, v = moments(g, memory, t, 0.9, 0.999)
    p.copy_(p * (1 - (lr if max_lr is None else lr / max_lr) * weight_decay) - lr * m / (v.sqrt() + 1e-8))


def sgdw(
    p: Tensor, g: Tensor, memory: dict[str, Tensor], t: int, lr: float, weight_decay: float, momentum: float
) -> None:
    memory["b"] = momentum * memory["b"] + g if t > 1 else g
    p.copy_(p * (1 - lr * weight_decay) - lr * memory["b"])


A, B = {"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.05, "weight_decay": 0.0}
FORMULAS: list[tuple[str, Any, dict[str, Any], Any, dict[str, Any], float | None]] = [
    ("Lamb clamp", oput.Lamb, {"clamp": 1.5}, lamb, {"clamp": 1.5}, None),
    ("Lamb always_adapt", oput.Lamb, {"always_adapt": True}, lamb, {"always_adapt": True}, None),
    ("Lamb max_grad_norm", oput.Lamb, {"max_grad_norm": 1.0}, lamb, {}, 1.0),
    ("Lamb decouple_lr", oput.Lamb, {"decouple_lr": True, "max_lr": 0.5}, lamb, {"max_lr": 0.5}, None),
    ("AdamW max_grad_norm", oput.AdamW, {"max_grad_norm": 1.0}, adam, {}, 1.0),
    ("AdamW decouple_lr", oput.AdamW, {"decouple_lr": True, "max_lr": 0.5}, adam, {"max_lr": 0.5}, None),
    ("Adam decouple_lr", oput.Adam, {"decouple_lr": True, "max_lr": 0.5}, adam, {"max_lr": 0.5}, None),
    ("SGD decouple_wd", oput.SGD, {"decouple_wd": True, "momentum": 0.9}, sgdw, {"momentum": 0.9}, None),
]


@pytest.mark.parametrize(("name", "ours", "options", "formula", "more", "clip"), FORMULAS, ids=[f[0] for f in FORMULAS])
def test_equals_its_formula(
    name: str, ours: Any, options: dict[str, Any], formula: Any, more: dict[str, Any], clip: float | None
) -> None:
    wanted = by_formula(formula, [{**A, **more}, {**B, **more}], clip)
    assert difference(train(ours, {**A, **options, "backend": "eager"}, B), wanted) <= EXACT


def test_each_groups_own_lr_is_the_default_of_max_lr() -> None:
    wanted = by_formula(adam, [{**A, "max_lr": A["lr"]}, {**B, "weight_decay": 0.1, "max_lr": B["lr"]}])
    found = train(oput.AdamW, {**A, "decouple_lr": True, "backend": "eager"}, {**B, "weight_decay": 0.1})
    assert difference(found, wanted) <= EXACT


def test_max_grad_norm_equals_clipping_before() -> None:
    """``max_grad_norm`` does inside the update what torch's clip_grad_norm_ does to the gradients."""
    ours = [torch.nn.Parameter(value) for value in start()]
    theirs = [torch.nn.Parameter(value) for value in start()]
    inside = oput.AdamW(ours, lr=0.01, max_grad_norm=0.7)
    after = torch.optim.AdamW(theirs, lr=0.01)
    for step in range(STEPS):
        for params in (ours, theirs):
            for i, p in enumerate(params):
                p.grad = pull(p.detach(), i, step)
        torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        inside.step()
        after.step()
    assert difference([p.detach() for p in ours], [p.detach() for p in theirs]) <= EXACT


def test_adan_betas_of_the_new_value_are_converted_with_a_warning() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match=r"write betas=\(0.98, 0.92, 0.99\)"):
        optimizer = oput.Adan([p], betas=(0.02, 0.08, 0.01))
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.98, 0.92, 0.99))
