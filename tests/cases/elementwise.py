"""Class E: each element is updated on its own, so any sharding gives bitwise what one process gives."""

from __future__ import annotations

import lion_pytorch
import optimi
import pytorch_optimizer
import torch.optim as T

import oput_dist as oput
from tests.conformance import SECOND, Case
from tests.formulas import basic
from tests.parity import Oracle, timm

CASES = [
    Case("sgd", "oput_dist.SGD", {"lr": 0.1}, SECOND),
    Case("sgd momentum", "oput_dist.SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}, SECOND),
    Case("sgd nesterov", "oput_dist.SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "decouple_wd": True}, SECOND),
    Case("adam", "oput_dist.Adam", {"lr": 0.1}, SECOND),
    Case("adam amsgrad", "oput_dist.Adam", {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}, SECOND),
    Case("adamw", "oput_dist.AdamW", {"lr": 0.1}, SECOND),
    Case("adamw decoupled", "oput_dist.AdamW", {"lr": 0.1, "decouple_lr": True, "max_lr": 0.2}, SECOND),
    Case("lion", "oput_dist.Lion", {"lr": 0.1}, SECOND),
    Case("adan", "oput_dist.Adan", {"lr": 0.1}, SECOND),
    Case("adan no_prox", "oput_dist.Adan", {"lr": 0.1, "no_prox": True}, SECOND),
]

DECAY = {"lr": 0.02, "weight_decay": 0.1}
PLAIN = {"lr": 0.05, "weight_decay": 0.0}
DECOUPLED = {"decouple_lr": True, "max_lr": 0.5}

ORACLES = [
    Oracle(oput.SGD, {"lr": 0.01}, T.SGD),
    Oracle(oput.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}, T.SGD),
    Oracle(oput.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "maximize": True}, T.SGD),
    Oracle(oput.SGD, {"lr": 0.01, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}, T.SGD),
    Oracle(
        oput.SGD,
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "decouple_wd": True},
        optimi.SGD,
        {"torch_init": True, "triton": False},
    ),
    Oracle(oput.SGD, {**DECAY, "decouple_wd": True, "momentum": 0.9}, basic.sgdw, second=PLAIN),
    Oracle(oput.Adam, {"lr": 0.01}, T.Adam),
    Oracle(oput.Adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}, T.Adam),
    Oracle(oput.Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True}, T.Adam),
    Oracle(oput.Adam, {**DECAY, **DECOUPLED}, basic.adam, second=PLAIN),
    Oracle(oput.AdamW, {"lr": 0.01}, T.AdamW),
    Oracle(oput.AdamW, {"lr": 0.01, "weight_decay": 0.2, "betas": (0.5, 0.9), "eps": 1e-2}, T.AdamW),
    Oracle(oput.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}, T.AdamW),
    Oracle(oput.AdamW, {**DECAY, **DECOUPLED}, basic.adam, second=PLAIN),
    Oracle(oput.Lion, {"lr": 0.01}, lion_pytorch.Lion),
    Oracle(oput.Lion, {"lr": 0.01, "weight_decay": 0.3, "betas": (0.8, 0.95)}, lion_pytorch.Lion),
    Oracle(oput.Lion, {"lr": 0.01, "weight_decay": 0.3}, pytorch_optimizer.Lion),
    Oracle(oput.Adan, {"lr": 0.01}, timm("adan", "Adan"), {"foreach": False}),
    Oracle(
        oput.Adan,
        {"lr": 0.01, "weight_decay": 0.2, "betas": (0.9, 0.8, 0.95)},
        timm("adan", "Adan"),
        {"foreach": False},
    ),
    Oracle(oput.Adan, {"lr": 0.01, "weight_decay": 0.2, "no_prox": True}, timm("adan", "Adan"), {"foreach": False}),
    Oracle(oput.Adan, {"lr": 0.01, "weight_decay": 0.2, "eps": 1e-3}, pytorch_optimizer.Adan),
]
