"""Class N: sums over each parameter, one packed all-reduce."""

from __future__ import annotations

import math
from typing import Any

import optimi
import pytorch_optimizer
import torch_optimizer
from torch import Tensor

import oput_dist as oput
from tests.cases.elementwise import DECAY, DECOUPLED, PLAIN
from tests.conformance import FAST, Case
from tests.formulas import basic
from tests.formulas import norms as formulas
from tests.parity import NOT_GIVEN, Oracle, timm

LAMB_2019 = {"bias_correction": False, "clamp": 10.0, "always_adapt": True}
LARC = {"trust_clip": True, "always_adapt": True, "trust_coeff": 0.05}
A2GRAD = {"beta": 0.3, "lips": 1.0}
A2GRAD_SECOND = {"lips": 0.5, "weight_decay": 0.2}
APOLLO: dict[str, Any] = {"lr": 0.01, "warmup": 0}
APOLLO_SECOND = {"lr": 0.004, "weight_decay": 0.2}
BELIEF = {"rebound": "belief"}
SWITCH = {"lr": 0.1, "eps": 0.1, "betas": (0.8, 0.9), "tolerance": 0.5}

CASES = [
    Case("stableadamw", "oput_dist.StableAdamW", {"lr": 0.1}, FAST, exact=False),
    Case("lamb", "oput_dist.Lamb", {"lr": 0.1, "weight_decay": 0.1}, FAST, exact=False),
    Case("lamb adapt", "oput_dist.Lamb", {"lr": 0.5, "always_adapt": True, "clamp": 2.0}, FAST, exact=False),
    Case("lamb clipped", "oput_dist.Lamb", {"lr": 0.1, "max_grad_norm": 1.0}, FAST, exact=False),
    Case("adamw cautious", "oput_dist.AdamW", {"lr": 0.1, "cautious": True}, FAST, exact=False),
    Case("lamb cautious", "oput_dist.Lamb", {"lr": 0.1, "cautious": True}, FAST, exact=False),
    Case("adamw clipped", "oput_dist.AdamW", {"lr": 0.1, "max_grad_norm": 1.0}, FAST, exact=False),
    Case("lamb 2019", "oput_dist.Lamb", {"lr": 0.1, **LAMB_2019}, FAST, exact=False),
    Case("lars", "oput_dist.LARS", {"lr": 0.1, "trust_coeff": 0.5, "weight_decay": 0.1}, FAST, exact=False),
    Case("lars nesterov", "oput_dist.LARS", {"lr": 0.1, **LARC, "nesterov": True}, FAST, exact=False),
    Case("novograd", "oput_dist.NovoGrad", {"lr": 0.1}, FAST, exact=False, partly=False, vectors=("exp_avg_sq",)),
    Case(
        "novograd amsgrad",
        "oput_dist.NovoGrad",
        {"lr": 0.1, "amsgrad": True, "grad_averaging": True, "betas": (0.9, 0.5)},
        FAST,
        exact=False,
        partly=False,
        vectors=("exp_avg_sq", "max_exp_avg_sq"),
    ),
    Case("a2grad uni", "oput_dist.A2GradUni", A2GRAD, A2GRAD_SECOND, exact=False, partly=False, vectors=("v_k",)),
    Case("a2grad inc", "oput_dist.A2GradInc", A2GRAD, A2GRAD_SECOND, exact=False, partly=False, vectors=("v_k",)),
    Case(
        "a2grad exp", "oput_dist.A2GradExp", A2GRAD, A2GRAD_SECOND, exact=False, partly=False, vectors=("v_kk", "v_k")
    ),
    Case("apollo", "oput_dist.Apollo", {"lr": 0.01, "warmup": 2}, APOLLO_SECOND, exact=False),
    Case("apollo stable", "oput_dist.Apollo", {**APOLLO, "weight_decay_type": "stable"}, APOLLO_SECOND, exact=False),
    Case("apollo belief", "oput_dist.Apollo", {**APOLLO, **BELIEF, "lr": 0.3}, FAST, exact=False),
    Case(
        "apollo belief stable",
        "oput_dist.Apollo",
        {**APOLLO, **BELIEF, "lr": 0.3, "weight_decay_type": "stable"},
        FAST,
        exact=False,
    ),
    Case("swats", "oput_dist.SWATS", SWITCH, FAST, exact=False, partly=False, vectors=("exp_avg2", "sgd_lr")),
    Case(
        "swats amsgrad",
        "oput_dist.SWATS",
        {**SWITCH, "amsgrad": True, "nesterov": True},
        FAST,
        exact=False,
        partly=False,
        vectors=("exp_avg2", "sgd_lr"),
    ),
    Case("amos", "oput_dist.Amos", {"lr": 0.1}, FAST, exact=False, partly=False, vectors=("exp_avg_sq", "decay")),
    Case(
        "amos momentum",
        "oput_dist.Amos",
        {"lr": 0.1, "momentum": 0.5, "eta": 0.7},
        FAST,
        exact=False,
        partly=False,
        vectors=("exp_avg_sq", "decay"),
    ),
]

CAUTION = {"cautious": NOT_GIVEN, "caution": True}
TIMM_LAMB = {"max_grad_norm": None, "foreach": False}

TIMM = {"foreach": False}
JETTIFY = {
    **dict.fromkeys(LAMB_2019, NOT_GIVEN),
    "clamp_value": 10.0,
}
KOZISTR_SWATS = {"weight_decouple": False, "foreach": False, "tolerance": NOT_GIVEN}
KOZISTR_APOLLO = {"warmup": NOT_GIVEN, "warmup_steps": 0, "foreach": False}


class KozistrAmos(pytorch_optimizer.Amos):
    """With our scale of tensors with more than two axes."""

    @staticmethod
    def get_scale(p: Tensor) -> float:
        return 0.5 if p.ndim < 2 else math.sqrt(2 / p[0].numel())


ORACLES = [
    Oracle(oput.AdamW, {**DECAY, "cautious": True}, timm("adamw", "AdamWLegacy"), CAUTION),
    Oracle(oput.AdamW, {**DECAY, "cautious": True, "amsgrad": True}, timm("adamw", "AdamWLegacy"), CAUTION),
    Oracle(oput.Lion, {**DECAY, "cautious": True}, timm("lion", "Lion"), CAUTION),
    Oracle(oput.StableAdamW, {"lr": 0.01}, optimi.StableAdamW, {"triton": False}),
    Oracle(
        oput.StableAdamW, {"lr": 0.01, "weight_decay": 0.2, "betas": (0.8, 0.9)}, optimi.StableAdamW, {"triton": False}
    ),
    Oracle(
        oput.StableAdamW,
        {"lr": 0.01, "weight_decay": 1e-3, "decouple_lr": True, "max_lr": 0.02},
        optimi.StableAdamW,
        {"triton": False},
        second={"lr": 0.003, "weight_decay": 2e-3},
    ),
    Oracle(oput.Lamb, {"lr": 0.01, "weight_decay": 0.1}, timm("lamb", "Lamb"), TIMM_LAMB),
    Oracle(
        oput.Lamb,
        {"lr": 0.01, "weight_decay": 0.0, "always_adapt": True, "betas": (0.8, 0.95), "eps": 1e-3},
        timm("lamb", "Lamb"),
        TIMM_LAMB,
    ),
    Oracle(oput.Lamb, {"lr": 0.01, "weight_decay": 0.0}, timm("lamb", "Lamb"), TIMM_LAMB),
    Oracle(oput.Lamb, {**DECAY, "clamp": 1.5}, basic.lamb, second=PLAIN),
    Oracle(oput.Lamb, {**DECAY, "always_adapt": True}, basic.lamb, second=PLAIN),
    Oracle(oput.Lamb, {**DECAY, **DECOUPLED}, basic.lamb, second=PLAIN),
    Oracle(oput.Lamb, {"lr": 0.01, "weight_decay": 0.1, **LAMB_2019}, torch_optimizer.Lamb, JETTIFY),
    Oracle(oput.Lamb, {"lr": 0.01, **LAMB_2019, "betas": (0.8, 0.95)}, torch_optimizer.Lamb, JETTIFY, second=PLAIN),
    Oracle(
        oput.Lamb,
        {"lr": 0.01, "weight_decay": 0.1, **LAMB_2019, "clamp": 1.5},
        torch_optimizer.Lamb,
        {**JETTIFY, "clamp_value": 1.5},
    ),
    Oracle(oput.LARS, {"lr": 1.0, "momentum": 0.0}, timm("lars", "Lars"), TIMM),
    Oracle(
        oput.LARS, {"lr": 1.0, "momentum": 0.9, "trust_coeff": 0.02, "weight_decay": 0.1}, timm("lars", "Lars"), TIMM
    ),
    Oracle(oput.LARS, {"lr": 0.5, "momentum": 0.8, "dampening": 0.4, **LARC}, timm("lars", "Lars"), TIMM),
    Oracle(oput.LARS, {"lr": 0.05, "momentum": 0.8, "eps": 0.1, **LARC}, timm("lars", "Lars"), TIMM, second=PLAIN),
    Oracle(
        oput.LARS,
        {"lr": 1.0, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "trust_coeff": 0.02},
        timm("lars", "Lars"),
        TIMM,
    ),
    Oracle(oput.LARS, {**DECAY, **DECOUPLED, "momentum": 0.9, "trust_coeff": 0.5}, formulas.lars, second=PLAIN),
    Oracle(oput.NovoGrad, {"lr": 0.01}, pytorch_optimizer.NovoGrad, TIMM),
    Oracle(oput.NovoGrad, {"lr": 0.01, "betas": (0.9, 0.5), "weight_decay": 0.1}, pytorch_optimizer.NovoGrad, TIMM),
    # its second moment is fp32
    Oracle(
        oput.NovoGrad,
        {"lr": 0.01, "betas": (0.9, 0.3), "amsgrad": True, "grad_averaging": True, "weight_decay": 0.1},
        torch_optimizer.NovoGrad,
        limit=2e-8,
    ),
    Oracle(oput.NovoGrad, {**DECAY, "grad_averaging": True}, formulas.novograd, second=PLAIN),
    Oracle(oput.NovoGrad, {**DECAY, "amsgrad": True, "betas": (0.9, 0.3)}, formulas.novograd, second=PLAIN),
    Oracle(oput.NovoGrad, {**DECAY, **DECOUPLED}, formulas.novograd, second=PLAIN),
    Oracle(oput.A2GradUni, {}, torch_optimizer.A2GradUni, second={"lips": 3.0}),
    Oracle(oput.A2GradInc, {"beta": 0.3}, torch_optimizer.A2GradInc, second={"lips": 3.0}),
    Oracle(oput.A2GradExp, {"beta": 0.3, "rho": 0.8}, torch_optimizer.A2GradExp, second={"rho": 0.3}),
    Oracle(oput.A2GradUni, A2GRAD, formulas.a2grad_uni, second=A2GRAD_SECOND),
    Oracle(oput.A2GradInc, {**A2GRAD, "lr": 9.0}, formulas.a2grad_inc, second=A2GRAD_SECOND),
    Oracle(oput.A2GradExp, {**A2GRAD, "lr": 9.0}, formulas.a2grad_exp, second=A2GRAD_SECOND),
    Oracle(oput.Apollo, APOLLO, pytorch_optimizer.ApolloDQN, KOZISTR_APOLLO),
    Oracle(oput.Apollo, {**APOLLO, "beta": 0.7, "eps": 0.1}, pytorch_optimizer.ApolloDQN, KOZISTR_APOLLO),
    Oracle(oput.Apollo, APOLLO, torch_optimizer.Apollo, {"lr": 1.0}, second={"weight_decay": 0.1}),
    *[
        Oracle(
            oput.Apollo,
            {**APOLLO, "rebound": rebound, "weight_decay": 0.1, "weight_decay_type": kind, "lr": lr},
            pytorch_optimizer.ApolloDQN,
            {**KOZISTR_APOLLO, "weight_decay_type": kind.lower()},
        )
        for rebound, lr in (("constant", 0.01), ("belief", 0.3))
        for kind in ("L2", "decoupled", "stable")
    ],
    Oracle(oput.Apollo, {**DECAY, "warmup": 20}, formulas.apollo, second=PLAIN),
    Oracle(oput.Apollo, {**DECAY, "warmup": 5, "init_lr": 0.004}, formulas.apollo, second=PLAIN),
    Oracle(oput.Apollo, {**DECAY, **APOLLO, **BELIEF}, formulas.apollo, second=PLAIN),
    Oracle(
        oput.Apollo,
        {**DECAY, **APOLLO, "lr": 0.005, **DECOUPLED, "weight_decay_type": "stable"},
        formulas.apollo,
        second={"lr": 0.002, "weight_decay": 0.0},
    ),
    Oracle(oput.SWATS, {"lr": 0.05}, torch_optimizer.SWATS),
    Oracle(oput.SWATS, {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True}, torch_optimizer.SWATS),
    # 1e-15 inside its root
    Oracle(oput.SWATS, {**SWITCH, "tolerance": 0.1}, pytorch_optimizer.SWATS, KOZISTR_SWATS, limit=1e-12, apart=True),
    Oracle(oput.SWATS, {**SWITCH, "weight_decay": 0.1}, formulas.swats),
    # the others' Nesterov momentum is not one: their momentum itself is added to the scaled one
    Oracle(oput.SWATS, {**SWITCH, "amsgrad": True, "nesterov": True}, formulas.swats),
    Oracle(oput.Amos, {"lr": 0.05}, KozistrAmos, second={"lr": 0.02}),
    Oracle(oput.Amos, {"lr": 0.1, "momentum": 0.9, "beta": 0.9}, KozistrAmos, second={"lr": 0.2}),
    Oracle(oput.Amos, {"lr": 0.2, "c_coef": 0.6, "d_coef": 0.4, "beta": 0.8}, KozistrAmos, second={"lr": 0.5}),
    Oracle(oput.Amos, {"lr": 0.2, "momentum": 0.5, "extra_l2": 0.01, "weight_decay": 0.1}, formulas.amos),
    Oracle(
        oput.Amos, {"lr": 0.2, "c_coef": 2.0, "d_coef": 3.0, "weight_decay": 0.1}, formulas.amos, second={"eta": 2.0}
    ),
]
