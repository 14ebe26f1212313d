"""Class E: momenta, their signs, and averages of them."""

from __future__ import annotations

import madgrad
import optimi
import pytorch_optimizer
import pytorch_ranger
import qhoptim.pyt
import torch
import torch_optimizer
from pytorch_ranger.ranger913A import RangerVA

import oput_dist as oput
from tests.cases.elementwise import DECOUPLED, PLAIN
from tests.conformance import SECOND, Case
from tests.formulas import basic, momentum
from tests.parity import NOT_GIVEN, Oracle, timm

CASES = [
    Case("sgd averaged", "oput_dist.SGD", {"lr": 0.1, "momentum": 0.9, "dampening": True}, SECOND),
    Case("sgdw", "oput_dist.SGDW", {"lr": 0.1, "momentum": 0.9}, SECOND),
    Case("accsgd", "oput_dist.AccSGD", {"lr": 0.1, "kappa": 100.0}, SECOND),
    Case("aggmo", "oput_dist.AggMo", {"lr": 0.1}, SECOND),
    Case("aggmo of 5", "oput_dist.AggMo", {"lr": 0.1, "betas": (0.0, 0.5, 0.75, 0.9, 0.99)}, SECOND),
    Case("madgrad", "oput_dist.MADGRAD", {"lr": 0.1}, SECOND),
    Case("madgrad plain", "oput_dist.MADGRAD", {"lr": 0.1, "momentum": 0.0, "decouple_decay": True}, SECOND),
    Case("pid", "oput_dist.PID", {"lr": 0.01, "dampening": 0.1}, SECOND),
    Case("qhm", "oput_dist.QHM", {"lr": 0.1, "momentum": 0.9}, SECOND),
    Case("qhadam", "oput_dist.QHAdam", {"lr": 0.1, "nus": (0.7, 0.9)}, SECOND),
    Case("rangerqh", "oput_dist.RangerQH", {"lr": 0.1, "k": 2}, SECOND),
    Case("rangerva", "oput_dist.RangerVA", {"lr": 0.1, "k": 2}, SECOND),
    Case("rangerva abs", "oput_dist.RangerVA", {"lr": 0.1, "grad_transformer": "abs", "amsgrad": False}, SECOND),
    Case("signum", "oput_dist.Signum", {"lr": 0.1}, SECOND),
    Case("signsgd", "oput_dist.Signum", {"lr": 0.1, "momentum": 0.0}, SECOND),
    Case("tiger", "oput_dist.Tiger", {"lr": 0.1}, SECOND),
]

L2 = {"lr": 0.01, "weight_decay": 0.1}
OPTIMI = {"triton": False}
KOZISTR = {"foreach": False}
WITHOUT_MAX = {"decouple_lr": NOT_GIVEN}
TWO_PARTS = 5e-15  # it takes the two parts of the step one after the other, and rounds the parameter twice
# It computes in fp32, also for fp64 parameters.
FLOAT32 = {"dtype": torch.float32, "limit": 1e-6}

ORACLES = [
    Oracle(oput.SGD, {**L2, "momentum": 0.9, "dampening": True}, optimi.SGD, OPTIMI),
    Oracle(oput.SGD, {**L2, "momentum": 0.8, "dampening": True, "torch_init": True}, optimi.SGD, OPTIMI),
    Oracle(oput.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": False, "decouple_wd": True}, optimi.SGD, OPTIMI),
    Oracle(oput.SGDW, {**L2, "momentum": 0.9}, timm("sgdw", "SGDW"), KOZISTR),
    Oracle(oput.SGDW, {**L2, "momentum": 0.8, "nesterov": True}, timm("sgdw", "SGDW"), KOZISTR),
    Oracle(oput.SGDW, {**L2, "momentum": 0.9, "dampening": 0.3}, pytorch_optimizer.SGDW, KOZISTR),
    Oracle(oput.SGDW, {**L2, "momentum": 0.9}, optimi.SGD, {**OPTIMI, "decouple_wd": True}),
    Oracle(oput.SGDW, {"lr": 0.02, "weight_decay": 0.01}, optimi.SGD, {**OPTIMI, "decouple_wd": True}),
    Oracle(oput.SGDW, {**L2, "momentum": 0.9}, basic.sgdw, {"decouple_wd": True}, second=PLAIN),
    Oracle(oput.AccSGD, {"lr": 0.01}, torch_optimizer.AccSGD),
    Oracle(oput.AccSGD, {**L2, "kappa": 50.0, "xi": 4.0, "small_const": 0.5}, torch_optimizer.AccSGD),
    Oracle(oput.AccSGD, L2, pytorch_optimizer.AccSGD, KOZISTR),
    Oracle(oput.AggMo, {"lr": 0.01}, torch_optimizer.AggMo),
    Oracle(oput.AggMo, {**L2, "betas": (0.3, 0.6, 0.8, 0.9, 0.95)}, torch_optimizer.AggMo),
    Oracle(oput.AggMo, {**L2, "betas": (0.9,)}, torch.optim.SGD, {"momentum": 0.9, "betas": NOT_GIVEN}),
    Oracle(oput.MADGRAD, {"lr": 0.01}, madgrad.MADGRAD),
    Oracle(oput.MADGRAD, {**L2, "momentum": 0.5, "eps": 1e-3}, madgrad.MADGRAD),
    Oracle(oput.MADGRAD, {**L2, "momentum": 0.0}, madgrad.MADGRAD),
    Oracle(oput.MADGRAD, {**L2, "decouple_decay": True}, madgrad.MADGRAD),
    Oracle(oput.MADGRAD, {**L2, "decouple_decay": True, "momentum": 0.0}, madgrad.MADGRAD),
    Oracle(oput.MADGRAD, {**L2, "eps": 0.0}, madgrad.MADGRAD, second={"lr": 0.0}),
    Oracle(oput.MADGRAD, {**L2, **DECOUPLED}, momentum.madgrad, WITHOUT_MAX, second=PLAIN),
    Oracle(oput.MADGRAD, {**L2, **DECOUPLED, "momentum": 0.0}, momentum.madgrad, WITHOUT_MAX, second=PLAIN),
    Oracle(
        oput.PID,
        {**L2, "momentum": 0.9, "bug_compat": True},
        torch_optimizer.PID,
        {"bug_compat": NOT_GIVEN},
    ),
    Oracle(
        oput.PID,
        {"lr": 0.002, "momentum": 0.7, "dampening": 0.2, "integral": 2.0, "derivative": 4.0, "bug_compat": True},
        torch_optimizer.PID,
        {"bug_compat": NOT_GIVEN},
    ),
    Oracle(oput.PID, {**L2, "momentum": 0.9}, pytorch_optimizer.PID, KOZISTR),
    Oracle(oput.PID, {**L2, "momentum": 0.9}, momentum.pid),
    Oracle(
        oput.PID,
        {"lr": 0.002, "momentum": 0.7, "dampening": 0.2, "integral": 2.0, "derivative": 4.0, "weight_decay": 0.0},
        momentum.pid,
    ),
    Oracle(oput.QHM, {"lr": 0.1, "momentum": 0.9, "nu": 0.7}, qhoptim.pyt.QHM, limit=TWO_PARTS),
    Oracle(oput.QHM, {**L2, "momentum": 0.99, "nu": 0.4}, qhoptim.pyt.QHM, limit=TWO_PARTS),
    Oracle(oput.QHM, {**L2, "momentum": 0.9, "nu": 1.0, "weight_decay_type": "direct"}, qhoptim.pyt.QHM),
    Oracle(oput.QHAdam, {"lr": 0.01, "betas": (0.995, 0.999), "nus": (0.7, 1.0)}, qhoptim.pyt.QHAdam),
    Oracle(oput.QHAdam, {**L2, "nus": (0.8, 0.6), "betas": (0.9, 0.99), "eps": 1e-3}, qhoptim.pyt.QHAdam),
    Oracle(
        oput.QHAdam,
        {**L2, "nus": (0.0, 1.0), "betas": (0.9, 0.99), "decouple_weight_decay": True},
        torch_optimizer.QHAdam,
    ),
    Oracle(oput.RangerQH, {"lr": 0.01}, pytorch_ranger.RangerQH),
    Oracle(oput.RangerQH, {**L2, "k": 3, "alpha": 0.8, "nus": (0.5, 0.9), "eps": 1e-3}, pytorch_ranger.RangerQH),
    Oracle(oput.RangerQH, {**L2, "k": 1, "alpha": 0.3, "decouple_weight_decay": True}, pytorch_ranger.RangerQH),
    Oracle(oput.RangerVA, {**L2, "bug_compat": True}, RangerVA, {"bug_compat": NOT_GIVEN}, **FLOAT32),
    Oracle(
        oput.RangerVA,
        {**L2, "bug_compat": True, "grad_transformer": "abs", "amsgrad": False, "k": 4, "smooth": 10.0},
        RangerVA,
        {"bug_compat": NOT_GIVEN},
        **FLOAT32,
    ),
    Oracle(oput.RangerVA, {**L2, "bug_compat": True}, momentum.ranger_va),
    Oracle(oput.RangerVA, L2, momentum.ranger_va),
    Oracle(oput.RangerVA, {**L2, "k": 2, "alpha": 0.8, "betas": (0.5, 0.9)}, momentum.ranger_va),
    Oracle(oput.RangerVA, {**L2, "smooth": 5.0, "grad_transformer": "abs"}, momentum.ranger_va),
    Oracle(oput.RangerVA, {**L2, "transformer": "", "amsgrad": False, "eps": 1e-2}, momentum.ranger_va),
    Oracle(oput.RangerVA, {**L2, "transformer": None, "grad_transformer": "abs"}, momentum.ranger_va),
    Oracle(oput.RangerVA, {**L2, **DECOUPLED}, momentum.ranger_va, WITHOUT_MAX, second=PLAIN),
    Oracle(oput.Signum, {**L2, "momentum": 0.9}, pytorch_optimizer.SignSGD, {**KOZISTR, "weight_decouple": True}),
    Oracle(
        oput.Signum,
        {**L2, "momentum": 0.5, "decouple_wd": False},
        pytorch_optimizer.SignSGD,
        {**KOZISTR, "weight_decouple": False, "decouple_wd": NOT_GIVEN},
    ),
    Oracle(oput.Signum, {**L2, "momentum": 0.0}, pytorch_optimizer.SignSGD, KOZISTR),
    Oracle(oput.Signum, {**L2, **DECOUPLED, "momentum": 0.9}, momentum.signum, WITHOUT_MAX, second=PLAIN),
    Oracle(oput.Tiger, {"lr": 0.01}, pytorch_optimizer.Tiger, KOZISTR),
    Oracle(oput.Tiger, {**L2, "beta": 0.8}, pytorch_optimizer.Tiger, KOZISTR),
    Oracle(oput.Tiger, {**L2, "beta": 0.8}, momentum.signum, {"momentum": 0.8, "beta": NOT_GIVEN}),
]
