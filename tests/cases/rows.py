"""Class R: sums over rows, columns, channels."""

from __future__ import annotations

import came_pytorch
import optimi
import pytorch_optimizer
import ranger_adabelief
import torch
import torch.optim as T
import torch_optimizer

import oput_dist as oput
from tests.cases.elementwise import DECAY, DECOUPLED, PLAIN
from tests.conformance import FAST, SECOND, Case
from tests.formulas import rows, sm3
from tests.parity import NOT_GIVEN, Oracle, timm

CAME_MEANS = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col")
SM3_BOUNDS = tuple(f"accumulator_{axis}" for axis in range(4))

SOON = {"lr": 0.1, "k": 2}

CASES = [
    Case(
        "adafactor", "oput_dist.Adafactor", {"lr": 0.3}, FAST, exact=False, partly=False, vectors=("row_var", "col_var")
    ),
    Case(
        "adafactor cautious",
        "oput_dist.Adafactor",
        {"lr": 0.3, "cautious": True},
        FAST,
        exact=False,
        partly=False,
        vectors=("row_var", "col_var"),
    ),
    Case("sm3", "oput_dist.SM3", {"lr": 0.1}, FAST, exact=False, partly=False, vectors=SM3_BOUNDS),
    Case(
        "sm3 plain", "oput_dist.SM3", {"lr": 0.1, "momentum": 0.0}, FAST, exact=False, partly=False, vectors=SM3_BOUNDS
    ),
    Case("adamp", "oput_dist.AdamP", {"lr": 0.1, "delta": 10.0}, FAST, exact=False, partly=False),
    Case("sgdp", "oput_dist.SGDP", {"lr": 0.1, "delta": 10.0, "momentum": 0.9}, FAST, exact=False, partly=False),
    Case(
        "sgdp nesterov",
        "oput_dist.SGDP",
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        FAST,
        exact=False,
        partly=False,
    ),
    Case("ranger", "oput_dist.Ranger", {**SOON, "weight_decay": 0.1}, FAST, exact=False, partly=False),
    Case(
        "ranger conv",
        "oput_dist.Ranger",
        {**SOON, "gc_conv_only": True, "decouple_wd": False},
        FAST,
        exact=False,
        partly=False,
    ),
    Case("ranger without gc", "oput_dist.Ranger", {**SOON, "use_gc": False}, SECOND),
    Case("rangeradabelief", "oput_dist.RangerAdaBelief", SOON, FAST, exact=False, partly=False),
    Case(
        "rangeradabelief without gc",
        "oput_dist.RangerAdaBelief",
        {**SOON, "use_gc": False, "decouple_wd": False},
        SECOND,
    ),
    Case("came", "oput_dist.CAME", {"lr": 0.1}, FAST, exact=False, partly=False, vectors=CAME_MEANS),
    Case("adammini", "oput_dist.AdamMini", {"lr": 0.1}, FAST, exact=False, partly=False, vectors=("exp_avg_sq",)),
    Case(
        "adammini heads",
        "oput_dist.AdamMini",
        {"lr": 0.1},
        {**FAST, "heads": 1},
        exact=False,
        partly=False,
        vectors=("exp_avg_sq",),
    ),
]

WITHOUT_GC = {"use_gc": NOT_GIVEN}
WARM_PHASE = {"degenerated_to_sgd": True}

ORACLES = [
    Oracle(oput.SM3, {"lr": 0.05, "momentum": 0.0}, pytorch_optimizer.SM3, second={"lr": 0.02}),
    Oracle(oput.SM3, {"lr": 0.05, "momentum": 0.9}, pytorch_optimizer.SM3, second={"lr": 0.02}),
    Oracle(oput.SM3, {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1}, sm3.sm3),
    Oracle(oput.Adafactor, {"lr": 0.01}, T.Adafactor),
    Oracle(oput.Adafactor, {"lr": 0.05, "weight_decay": 0.1, "d": 1.5, "eps": (1e-3, 1e-2)}, T.Adafactor),
    Oracle(oput.Adafactor, {"lr": 0.1, "beta2_decay": -0.5, "maximize": True}, T.Adafactor),
    Oracle(oput.AdamP, {"lr": 0.01}, timm("adamp", "AdamP")),
    Oracle(oput.AdamP, {"lr": 0.01, "delta": 1.0, "betas": (0.5, 0.9)}, timm("adamp", "AdamP")),
    Oracle(oput.AdamP, {"lr": 0.01, "weight_decay": 0.1, "delta": 3.0, "nesterov": True}, timm("adamp", "AdamP")),
    Oracle(oput.SGDP, {"lr": 0.01}, timm("sgdp", "SGDP")),
    Oracle(oput.SGDP, {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "delta": 1.0}, timm("sgdp", "SGDP")),
    Oracle(
        oput.SGDP,
        {"lr": 0.01, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "delta": 3.0, "wd_ratio": 0.3},
        timm("sgdp", "SGDP"),
    ),
    Oracle(oput.SGDP, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "eps": 0.1}, pytorch_optimizer.SGDP),
    Oracle(oput.SGDP, {**DECAY, **DECOUPLED, "momentum": 0.9, "delta": 10.0}, rows.sgdp, second=PLAIN),
    # torch_optimizer computes in fp32
    Oracle(oput.Ranger, {"lr": 0.01, "use_gc": False}, torch_optimizer.Ranger, WITHOUT_GC, 2e-6, dtype=torch.float32),
    Oracle(
        oput.Ranger,
        {"lr": 0.01, "use_gc": False, "k": 4, "alpha": 0.7, "N_sma_threshhold": 7, "weight_decay": 0.1},
        torch_optimizer.Ranger,
        WITHOUT_GC,
        2e-6,
        dtype=torch.float32,
    ),
    # optimi has another form of eps
    Oracle(
        oput.Ranger,
        {"lr": 0.01, "use_gc": False, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.1, "alpha": 0.3, "k": 5},
        optimi.Ranger,
        {**WITHOUT_GC, "triton": False},
    ),
    Oracle(
        oput.Ranger,
        {"lr": 0.01, "use_gc": False, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.1, "decouple_wd": False},
        optimi.Ranger,
        {**WITHOUT_GC, "triton": False},
    ),
    Oracle(
        oput.Ranger,
        {"lr": 0.01, "use_gc": False, "betas": (0.9, 0.99), "eps": 0.0, "decouple_lr": True, "max_lr": 0.1},
        optimi.Ranger,
        {**WITHOUT_GC, "triton": False, "max_lr": 0.1},
        second={"lr": 0.003, "weight_decay": 1e-4},
    ),
    Oracle(oput.Ranger, {"lr": 0.01, "weight_decay": 0.1}, pytorch_optimizer.Ranger, WARM_PHASE),
    Oracle(
        oput.Ranger,
        {"lr": 0.01, "betas": (0.8, 0.99), "k": 4, "gc_conv_only": True, "n_sma_threshold": 7.0},
        pytorch_optimizer.Ranger,
        WARM_PHASE,
    ),
    Oracle(
        oput.Ranger,
        {"lr": 0.01, "weight_decay": 0.1, "decouple_wd": False},
        pytorch_optimizer.Ranger,
        {**WARM_PHASE, "weight_decouple": False, "decouple_wd": NOT_GIVEN},
    ),
    Oracle(oput.Ranger, {**DECAY, **DECOUPLED}, rows.ranger, second=PLAIN),
    Oracle(
        oput.Ranger, {**DECAY, "n_sma_threshold": 4.0, "gc_conv_only": True, "alpha": 0.8}, rows.ranger, second=PLAIN
    ),
    # ranger_adabelief computes in fp32; its decay, unless L2, scales with the step and ends in the momentum
    Oracle(
        oput.RangerAdaBelief,
        {"lr": 0.01},
        ranger_adabelief.RangerAdaBelief,
        limit=2e-6,
        second={"lr": 0.003},
        dtype=torch.float32,
    ),
    Oracle(
        oput.RangerAdaBelief,
        {"lr": 0.01, "decouple_wd": False, "weight_decay": 0.1, "k": 4, "alpha": 0.7, "betas": (0.8, 0.99)},
        ranger_adabelief.RangerAdaBelief,
        {"weight_decouple": False, "decouple_wd": NOT_GIVEN},
        limit=2e-6,
        dtype=torch.float32,
    ),
    Oracle(
        oput.RangerAdaBelief,
        {"lr": 0.01, "gc_conv_only": True, "N_sma_threshhold": 7, "eps": 1e-8},
        ranger_adabelief.RangerAdaBelief,
        limit=2e-6,
        second={"lr": 0.003},
        dtype=torch.float32,
    ),
    Oracle(oput.RangerAdaBelief, {**DECAY}, rows.ranger_adabelief, second=PLAIN),
    Oracle(oput.RangerAdaBelief, {**DECAY, **DECOUPLED, "eps": 1e-6}, rows.ranger_adabelief, second=PLAIN),
    Oracle(oput.RangerAdaBelief, {**DECAY, "decouple_wd": False}, rows.ranger_adabelief, second=PLAIN),
    Oracle(oput.RangerAdaBelief, {**DECAY, "use_gc": False, "k": 3}, rows.ranger_adabelief, second=PLAIN),
    # CAME's steps are ten times lr and more; the last bits of its quotients show
    Oracle(oput.CAME, {"lr": 0.01}, came_pytorch.CAME, limit=5e-15),
    Oracle(
        oput.CAME,
        {"lr": 0.01, "betas": (0.8, 0.9, 0.99), "weight_decay": 0.1, "clip_threshold": 0.7, "eps": (1e-3, 1e-2)},
        came_pytorch.CAME,
        limit=5e-15,
    ),
    Oracle(oput.CAME, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}, pytorch_optimizer.CAME, limit=5e-15),
    Oracle(oput.CAME, {**DECAY, **DECOUPLED}, rows.came, limit=5e-15, second=PLAIN),
    Oracle(oput.AdamMini, {"lr": 0.01}, rows.adam_mini),
    Oracle(oput.AdamMini, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}, rows.adam_mini),
    Oracle(oput.AdamMini, {**DECAY, "heads": 2}, rows.adam_mini, second=PLAIN),
    Oracle(oput.AdamMini, {**DECAY, **DECOUPLED, "heads": 1}, rows.adam_mini, second={**PLAIN, "heads": None}),
]
