"""What cannot be done under DeepSpeed: said while the engine is built, with the key of the configuration."""

from __future__ import annotations

from typing import Any

import torch

from oput_dist.engine import Optimizer
from oput_dist.engine.wrapper import Wrapper

from .zero import Zero

__all__ = ["ConfigError", "check_engine", "check_optimizer"]


class ConfigError(ValueError):
    """DeepSpeed's configuration asks for what an optimizer cannot do, or does not know."""


def check_optimizer(engine: Any, optimizer: Optimizer | Wrapper) -> None:
    """Raise ConfigError for what an engine's configuration and an optimizer cannot do together. Changes nothing."""
    owner, zero = type(optimizer).__name__, engine._config.zero_config
    stage, offload = engine.zero_optimization_stage(), zero.offload_optimizer

    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"DeepSpeed's configuration, {key}: {owner} {why}")

    if isinstance(optimizer, Wrapper):
        if stage > 0 or engine.bfloat16_enabled() or engine.fp16_enabled():
            refuse(
                "zero_optimization.stage" if stage else "bf16.enabled, fp16.enabled",
                "wraps another optimizer, and DeepSpeed would exchange the parameters of one only: give the inner "
                "optimizer, or use stage 0 in fp32",
            )
        return
    if optimizer._shard_group is not None:
        refuse("zero_optimization.stage", "was given shard_group, but DeepSpeed partitions itself: leave it out")
    if offload is not None and str(offload.device) != "none":
        if offload.device == "nvme":
            refuse("zero_optimization.offload_optimizer.device", "keeps its state in memory, not on nvme: use cpu")
        if getattr(offload, "ratio", 1.0) != 1.0:
            refuse("zero_optimization.offload_optimizer.ratio", "runs on one device, so the ratio must be 1.0")
        if getattr(offload, "super_offload", False):
            refuse("zero_optimization.offload_optimizer.super_offload", "is none of DeepSpeed's: leave it out")
    if getattr(zero, "zenflow", None) is not None:
        refuse("zero_optimization.zenflow", "is none of DeepSpeed's: leave it out")
    if zero.elastic_checkpoint:
        refuse("zero_optimization.elastic_checkpoint", "keeps state that such checkpoints would not: leave it out")
    if stage == 0 and engine.fp16_enabled() and engine.loss_scale() != 1.0:
        refuse(
            "fp16.loss_scale",
            "would get gradients that are too small: at stage 0 this version of DeepSpeed divides them by the loss "
            "scale, but has not multiplied the loss by it; use stage 1, or bf16, or loss_scale 1",
        )
    if engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16:
        refuse(
            "torch_autocast.dtype", "takes one step for all parameters, which its loss scaler does not: use bfloat16"
        )
    if engine.has_moe_layers:
        refuse("optimizer.type", "has not been tried with layers of experts (MoE)")
    if engine.load_universal_checkpoint():
        if not _adam_like(optimizer):
            refuse(
                "checkpoint.load_universal",
                "keeps other state than exp_avg and exp_avg_sq, which is all that universal checkpoints hold: use "
                "oput_dist.deepspeed.full_state_dict(engine), or as many ranks as saved",
            )
        if zero.round_robin_gradients and stage in (1, 2):
            refuse(
                "zero_optimization.round_robin_gradients",
                "would be loaded wrong: universal checkpoints mistake what lies where under it; leave it out, in the "
                "run that saves as well",
            )


def check_engine(engine: Any, optimizer: Optimizer, zero: Zero) -> None:
    """Raise ConfigError where the parameters of an engine are not whole before they are partitioned."""
    for parameter in engine.module.parameters():  # DeepSpeed would orthogonalise gradients by itself
        if getattr(parameter, "use_muon", False) and "muon" in type(optimizer).__name__.lower():
            parameter.use_muon = False
    mpu = engine.mpu
    if engine.autotp_size() > 1 or (mpu is not None and getattr(mpu, "get_model_parallel_world_size", lambda: 1)() > 1):
        for group in optimizer.param_groups:
            recipe = optimizer.recipe_of(group, torch.Size((2, 2)))
            if recipe.exchanges or recipe.whole is not None or optimizer._options.max_grad_norm is not None:
                raise ConfigError(
                    f"DeepSpeed's configuration, tensor_parallel.autotp_size: {type(optimizer).__name__} needs whole "
                    "parameters, but tensor parallelism leaves each rank a part of them that DeepSpeed does not "
                    "describe: use an elementwise optimizer such as AdamW, or torch.distributed.tensor.parallel with "
                    "fully_shard"
                )


def _adam_like(optimizer: Optimizer) -> bool:
    recipes = [optimizer.recipe_of(group, torch.Size((2, 2))) for group in optimizer.param_groups]
    return all(set(recipe.state) == {"exp_avg", "exp_avg_sq"} and not recipe.vectors for recipe in recipes)
