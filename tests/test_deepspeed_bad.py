"""What DeepSpeed's configuration cannot ask for is said at ``initialize``, with its key, on every rank."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch

from tests.deepspeed_worlds import enter
from tests.pool import Pool

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": (
        {"optimizer": {"type": "oput.Lam"}},
        "optimizer.type: unknown optimizer 'Lam'. Did you mean 'lamb'",
    ),
    "unknown option": (
        {"optimizer": {"type": "oput.Lamb", "params": {"lr": 1.0, "beta": [0.9, 0.99]}}},
        "optimizer.params.beta: Lamb has no such option. Did you mean 'betas'",
    ),
    "value": ({"optimizer": {"type": "oput.lamb", "params": {"lr": -1.0}}}, "optimizer.params: Lamb: lr=-1.0 is not"),
    "betas": (
        {"optimizer": {"type": "oput.lamb", "params": {"betas": [0.9, 1.5]}}},
        "optimizer.params: Lamb: betas=(0.9, 1.5) is not allowed",
    ),
    "clipping": (
        {"optimizer": {"type": "oput.lamb", "params": {"max_grad_norm": 1.0}}},
        "optimizer.params.max_grad_norm: DeepSpeed clips gradients itself: set gradient_clipping",
    ),
    "state_device": (
        {"optimizer": {"type": "oput.lamb", "params": {"state_device": "cpu"}}},
        "optimizer.params.state_device: DeepSpeed keeps state in host memory itself, and saves it: set zero_optim",
    ),
    "shard_group": (
        {"optimizer": {"type": "oput.lamb", "params": {"shard_group": 1}}},
        "optimizer.params.shard_group: Lamb has no such option",
    ),
    "nvme": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
        "zero_optimization.offload_optimizer.device: Lamb keeps its state in memory, not on nvme",
    ),
    "ratio": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        "zero_optimization.offload_optimizer.ratio: Lamb runs on one device",
    ),
    "elastic": (
        {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}},
        "zero_optimization.elastic_checkpoint: Lamb keeps state",
    ),
    "universal": (
        {
            "optimizer": {"type": "oput.Lion", "params": {}},
            "zero_optimization": {"stage": 1},
            "checkpoint": {"load_universal": True},
        },
        "checkpoint.load_universal: Lion keeps other state than exp_avg and exp_avg_sq",
    ),
    "universal, codes": (
        {
            "optimizer": {"type": "oput.AdamW", "params": {"state_dtype": "int8"}},
            "zero_optimization": {"stage": 1},
            "checkpoint": {"load_universal": True},
        },
        "checkpoint.load_universal: AdamW keeps state as codes",
    ),
    "universal, round robin": (
        {
            "optimizer": {"type": "oput.AdamW", "params": {}},
            "zero_optimization": {"stage": 2, "round_robin_gradients": True},
            "checkpoint": {"load_universal": True},
        },
        "zero_optimization.round_robin_gradients: AdamW would be loaded wrong",
    ),
    "fp16 at stage 0": (
        {"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}},
        "fp16.loss_scale: Lamb would get gradients that are too small",
    ),
}


def refusal(config: dict[str, Any]) -> tuple[str, str]:
    """The type and text of what ``initialize`` raises."""
    deepspeed = enter()
    model = torch.nn.Linear(3, 2)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "oput.Lamb", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 1},
        **config,
    }
    try:
        deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("name", BAD)
def test_refused_at_initialize(pool: Pool, name: str) -> None:
    config, text = BAD[name]
    for kind, said in pool.run(2, refusal, config):
        assert kind == "ConfigError"
        assert said.startswith("DeepSpeed's configuration, ")
        assert text in said


def another_version() -> list[str]:
    """What is said where DeepSpeed keeps other structures."""
    enter()
    from deepspeed.runtime.engine import DeepSpeedEngine

    from oput_dist.deepspeed import registration
    from oput_dist.layout.deepspeed import deepspeed_partitions

    class Other:
        single_partition_of_fp32_groups = ()

    said = []
    with pytest.raises(ValueError, match="deepspeed") as caught:
        deepspeed_partitions(Other())
    said.append(str(caught.value))
    configure, done = DeepSpeedEngine._configure_optimizer, registration._DONE
    registration._DONE = "_never"
    del DeepSpeedEngine._configure_optimizer
    try:
        registration.register()
    except ImportError as error:
        said.append(str(error))
    finally:
        DeepSpeedEngine._configure_optimizer, registration._DONE = configure, done
    return said


def test_other_versions_of_deepspeed_are_refused(pool: Pool) -> None:
    structures, hooks = pool.run(1, another_version)[0]
    assert "Other of this version of DeepSpeed has no round_robin_bit16_groups" in structures
    assert "has no DeepSpeedEngine._configure_optimizer: install deepspeed>=0.19.8,<0.20" in hooks


def log_lines() -> list[str]:
    import logging

    from deepspeed.utils import logger

    deepspeed, lines = enter(), []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Handler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model = torch.nn.Linear(3, 2)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "OPUT.lamb", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 2},
    }
    deepspeed.initialize(model=model, config=config)
    logger.removeHandler(handler)
    logger.setLevel(logging.WARNING)
    return [line for line in lines if "oput_dist: " in line]


def test_the_choice_is_logged_once_on_the_first_rank(pool: Pool) -> None:
    first, second = pool.run(2, log_lines)
    assert len(first) == 1
    assert second == []
    assert "Lamb at ZeRO stage 2 (DeepSpeedZeroOptimizer): 2 parameters in 1 flat partitions" in first[0]


def test_oput_dist_alone_imports_no_deepspeed() -> None:
    import subprocess

    code = "import sys, oput_dist; print('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def step_of_foreign(stage: int) -> bool:
    """Whether an optimizer of torch's is left as it was."""
    deepspeed = enter()
    model = torch.nn.Linear(3, 2)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    make = functools.partial(torch.optim.Adagrad, lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=make, config=config)
    return "step" not in vars(engine.basic_optimizer)


def test_optimizers_of_others_are_left_alone(pool: Pool) -> None:
    assert pool.run(1, step_of_foreign, 1) == [True]


def refreshed(name: str, stage: int) -> tuple[str, str]:
    """The type and text of what ``refresh`` raises between backward and step."""
    deepspeed = enter()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": f"oput.{name}", "params": {}},
    }
    model = torch.nn.Linear(3, 2)
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    loss = engine(torch.ones(1, 3)).sum()
    try:
        engine.basic_optimizer.refresh(loss)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("name", ["Sophia", "AdaHessian"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_refresh_is_refused_under_zero(pool: Pool, name: str, stage: int) -> None:
    """Its backward pass would be taken for the next step's; it names what estimates there."""
    for kind, text in pool.run(2, refreshed, name, stage):
        assert (kind, text.split(" ")[0]) == ("CurvatureError", f"{name}.refresh")
        assert "update_hessian(batch_size)" in text
        assert text.endswith("use stage 0")
