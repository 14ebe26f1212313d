"""Relatives of Adam: class E, and MARS in class N."""

from __future__ import annotations

from typing import Any

import adabelief_pytorch
import adabound
import adamod
import pytorch_optimizer
import torch.optim as T
import torch_optimizer

import oput_dist as oput
from tests.cases.elementwise import DECAY, DECOUPLED, PLAIN
from tests.conformance import FAST, SECOND, Case
from tests.formulas import adam_like
from tests.parity import NOT_GIVEN, Oracle, timm

CASES = [
    Case("rmsprop", "oput_dist.RMSprop", {"lr": 0.1}, SECOND),
    Case("rmsprop centered", "oput_dist.RMSprop", {"lr": 0.1, "momentum": 0.9, "centered": True, "alpha": 0.9}, SECOND),
    Case("radam", "oput_dist.RAdam", {"lr": 0.1, "betas": (0.9, 0.99)}, SECOND),
    Case("nadam", "oput_dist.NAdam", {"lr": 0.1, "decoupled_weight_decay": True}, SECOND),
    Case("adopt", "oput_dist.ADOPT", {"lr": 0.1}, SECOND),
    Case("adopt decoupled", "oput_dist.ADOPT", {"lr": 0.1, "decouple": True}, SECOND),
    Case("adabelief", "oput_dist.AdaBelief", {"lr": 0.1, "betas": (0.9, 0.99)}, SECOND),
    Case("adabelief amsgrad", "oput_dist.AdaBelief", {"lr": 0.1, "rectify": False, "amsgrad": True}, SECOND),
    Case("adabound", "oput_dist.AdaBound", {"lr": 0.1}, SECOND),
    Case("adabound amsbound", "oput_dist.AdaBound", {"lr": 0.1, "amsbound": True, "gamma": 1.0}, SECOND),
    Case("adamod", "oput_dist.AdaMod", {"lr": 0.1, "beta3": 0.5}, SECOND),
    Case("diffgrad", "oput_dist.DiffGrad", {"lr": 0.1}, SECOND),
    Case("yogi", "oput_dist.Yogi", {"lr": 0.1, "initial_accumulator": 0.5}, SECOND),
    Case("ademamix", "oput_dist.AdEMAMix", {"lr": 0.1, "T_alpha_beta3": 3}, SECOND),
    Case("laprop", "oput_dist.LaProp", {"lr": 0.1}, SECOND),
    # On a part of a matrix, which has one axis, MARS is AdamW unless it also takes vectors.
    Case("mars", "oput_dist.MARS", {"lr": 0.1, "gamma": 0.1}, FAST, exact=False, partly=False),
    Case("mars vectors", "oput_dist.MARS", {"lr": 0.1, "gamma": 0.1, "optimize_1d": True}, FAST, exact=False),
]

MORE: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}
DECOUPLE: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.2, "decoupled_weight_decay": True}
BELIEF: dict[str, Any] = {"print_change_log": False}
ADOPT: dict[str, Any] = {"clip_exp": 0.25, "decouple": NOT_GIVEN}
NEAR_ZERO = 5e-15  # an element whose first gradient is near zero is divided by it, last bits and all
MIX: dict[str, Any] = {"weight_decouple": True, "foreach": False, "T_alpha_beta3": NOT_GIVEN}

ORACLES = [
    Oracle(oput.RMSprop, {"lr": 0.01}, T.RMSprop),
    Oracle(oput.RMSprop, {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.1, "eps": 1e-3, "momentum": 0.8}, T.RMSprop),
    Oracle(oput.RMSprop, {"lr": 0.01, "centered": True, "maximize": True}, T.RMSprop),
    Oracle(oput.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9, "weight_decay": 0.1}, T.RMSprop),
    Oracle(oput.RMSprop, {**DECAY, "momentum": 0.9, "decouple_wd": True}, adam_like.rmsprop, second=PLAIN),
    Oracle(oput.RMSprop, {**DECAY, **DECOUPLED, "momentum": 0.9}, adam_like.rmsprop, second=PLAIN),
    Oracle(oput.RAdam, {"lr": 0.01}, T.RAdam),
    Oracle(oput.RAdam, MORE, T.RAdam),
    Oracle(oput.RAdam, {**DECOUPLE, "betas": (0.8, 0.9), "maximize": True}, T.RAdam),
    Oracle(oput.RAdam, {"lr": 0.01, "betas": (0.9, 0.6)}, T.RAdam),  # never rectified
    Oracle(
        oput.RAdam,
        {"lr": 0.01, "weight_decay": 0.2, "decouple_wd": True},
        T.RAdam,
        {"decoupled_weight_decay": True, "decouple_wd": NOT_GIVEN},
    ),
    # torch keeps the product of the momenta in fp32
    Oracle(oput.NAdam, {"lr": 0.01}, T.NAdam, limit=1e-8),
    Oracle(oput.NAdam, {**MORE, "momentum_decay": 0.1, "maximize": True}, T.NAdam, limit=1e-8),
    Oracle(oput.NAdam, DECOUPLE, T.NAdam, limit=1e-8),
    Oracle(oput.NAdam, {"lr": 0.01}, adam_like.nadam),
    Oracle(oput.NAdam, {**DECAY, "betas": (0.99, 0.95), "momentum_decay": 0.5}, adam_like.nadam, second=PLAIN),
    Oracle(oput.NAdam, {**DECOUPLE, "momentum_decay": 0.0}, adam_like.nadam),
    Oracle(oput.ADOPT, {"lr": 0.01}, timm("adopt", "Adopt"), ADOPT),
    Oracle(oput.ADOPT, {**MORE, "decouple": False}, timm("adopt", "Adopt"), ADOPT),
    Oracle(
        oput.ADOPT,
        {"lr": 0.01, "weight_decay": 0.2, "decouple": True},
        timm("adopt", "Adopt"),
        {**ADOPT, "decoupled": True},
        limit=NEAR_ZERO,
    ),
    Oracle(oput.ADOPT, {"lr": 0.01, "betas": (0.9, 0.9), "clip_exp": 0.1}, timm("adopt", "Adopt"), {"clip_exp": 0.1}),
    Oracle(oput.ADOPT, {"lr": 0.01, "clip_exp": None}, timm("adopt", "Adopt")),
    Oracle(oput.ADOPT, DECAY, adam_like.adopt, second=PLAIN),
    Oracle(oput.ADOPT, {**DECAY, "decouple": True, "clip_exp": 0.5}, adam_like.adopt, second=PLAIN),
    Oracle(oput.ADOPT, {**DECAY, **DECOUPLED}, adam_like.adopt, second=PLAIN),
    Oracle(oput.ADOPT, {**DECAY, **DECOUPLED, "decouple": True}, adam_like.adopt, second=PLAIN),
    Oracle(oput.AdaBelief, {"lr": 0.01}, adabelief_pytorch.AdaBelief, BELIEF),
    Oracle(oput.AdaBelief, {**MORE, "eps": 1e-6}, adabelief_pytorch.AdaBelief, BELIEF),
    Oracle(oput.AdaBelief, {"lr": 0.1, "degenerated_to_sgd": False}, adabelief_pytorch.AdaBelief, BELIEF),
    Oracle(oput.AdaBelief, {"lr": 0.01, "rectify": False, "weight_decay": 0.1}, adabelief_pytorch.AdaBelief, BELIEF),
    Oracle(
        oput.AdaBelief,
        {"lr": 0.01, "rectify": False, "weight_decouple": False, "weight_decay": 0.1, "amsgrad": True, "eps": 1e-5},
        adabelief_pytorch.AdaBelief,
        BELIEF,
    ),
    Oracle(
        oput.AdaBelief, {"lr": 0.01, "fixed_decay": True, "weight_decay": 0.01}, adabelief_pytorch.AdaBelief, BELIEF
    ),
    Oracle(oput.AdaBelief, {**DECAY, "amsgrad": True, "betas": (0.9, 0.8)}, adam_like.adabelief, second=PLAIN),
    Oracle(oput.AdaBelief, {**DECAY, **DECOUPLED, "weight_decouple": False}, adam_like.adabelief, second=PLAIN),
    Oracle(oput.AdaBound, {"lr": 0.01}, adabound.AdaBound),
    Oracle(oput.AdaBound, {**MORE, "final_lr": 0.05, "gamma": 0.2}, adabound.AdaBound),
    Oracle(oput.AdaBound, {"lr": 0.01, "amsbound": True, "gamma": 0.9, "betas": (0.9, 0.5)}, adabound.AdaBound),
    Oracle(oput.AdaBound, {"lr": 0.01, "amsbound": True, "weight_decay": 0.1}, torch_optimizer.AdaBound),
    Oracle(oput.AdaBound, {**DECAY, "base_lr": 0.05, "final_lr": 0.2}, adam_like.adabound, second=PLAIN),
    Oracle(oput.AdaMod, {"lr": 1.0, "beta3": 0.99}, adamod.AdaMod, limit=NEAR_ZERO),
    Oracle(oput.AdaMod, {**MORE, "beta3": 0.5}, adamod.AdaMod),
    Oracle(oput.AdaMod, {"lr": 0.05, "beta3": 0.9, "weight_decay": 0.1}, torch_optimizer.AdaMod),
    Oracle(oput.DiffGrad, {"lr": 0.01}, torch_optimizer.DiffGrad),
    Oracle(oput.DiffGrad, MORE, torch_optimizer.DiffGrad),
    Oracle(oput.Yogi, {"lr": 0.01, "initial_momentum": True}, torch_optimizer.Yogi, {"initial_momentum": NOT_GIVEN}),
    Oracle(
        oput.Yogi,
        {**MORE, "initial_momentum": True, "initial_accumulator": 0.5},
        torch_optimizer.Yogi,
        {"initial_momentum": NOT_GIVEN},
    ),
    Oracle(oput.Yogi, DECAY, adam_like.yogi, second=PLAIN),
    Oracle(oput.Yogi, {**DECAY, "initial_accumulator": 1.0, "betas": (0.8, 0.9)}, adam_like.yogi, second=PLAIN),
    Oracle(oput.AdEMAMix, {"lr": 0.01}, pytorch_optimizer.AdEMAMix, MIX),
    Oracle(
        oput.AdEMAMix,
        {"lr": 0.01, "weight_decay": 0.2, "betas": (0.8, 0.9, 0.99), "alpha": 8.0, "T_alpha_beta3": 9},
        pytorch_optimizer.AdEMAMix,
        {**MIX, "t_alpha_beta3": 9},
    ),
    Oracle(
        oput.AdEMAMix,
        {"lr": 0.01, "eps": 1e-3, "T_alpha_beta3": 1000, "maximize": True},
        pytorch_optimizer.AdEMAMix,
        {**MIX, "t_alpha_beta3": 1000},
    ),
    Oracle(
        oput.AdEMAMix,
        {**DECAY, "betas": (0.0, 0.9, 0.95), "alpha": 3.0, "T_alpha_beta3": 8},
        adam_like.ademamix,
        second=PLAIN,
    ),
    # timm keeps the second moment's bias correction in fp32, and decays after the step
    Oracle(oput.LaProp, {"lr": 0.01}, timm("laprop", "LaProp"), limit=2e-8, second={"lr": 0.003}),
    Oracle(
        oput.LaProp,
        {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-3},
        timm("laprop", "LaProp"),
        limit=2e-8,
        second={"lr": 0.003},
    ),
    Oracle(oput.LaProp, DECAY, adam_like.laprop, second=PLAIN),
    Oracle(oput.MARS, {"lr": 0.01}, timm("mars", "Mars"), {"betas": (0.95, 0.99)}, limit=NEAR_ZERO),
    Oracle(oput.MARS, {**MORE, "gamma": 0.1}, timm("mars", "Mars"), limit=NEAR_ZERO),
    Oracle(
        oput.MARS,
        {"lr": 0.01, "weight_decay": 0.2, "betas": (0.9, 0.99), "optimize_1d": True},
        timm("mars", "Mars"),
        limit=NEAR_ZERO,
    ),
]
