"""What cannot be done under DeepSpeed: said while the engine is built, with the key of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size

from oput_dist.engine import Optimizer
from oput_dist.engine.wrapper import Wrapper, wrappers_of
from oput_dist.wrappers import EMA, LAWA, SWA, Lookahead

__all__ = ["ConfigError", "check_optimizer", "check_whole_state", "joins", "origin_of"]

FOLLOWING = (EMA, LAWA, Lookahead, SWA)
"""Wrappers that take the gradients of one backward pass, and whose state lies as the inner optimizer's does."""
_Refusals = Iterator[tuple[str, str]]


class ConfigError(ValueError):
    """DeepSpeed's configuration asks for what an optimizer cannot do, or does not know."""


def origin_of(optimizer: Any) -> Any:
    """The innermost of wrapped optimizers; the optimizer itself, if it wraps none."""
    return optimizer.origin if isinstance(optimizer, Wrapper) else optimizer


def check_optimizer(engine: Any, optimizer: Optimizer | Wrapper) -> None:
    """Raise ConfigError for what an engine's configuration and an optimizer cannot do together. Changes nothing."""
    for refusals in (_of_wrappers, _of_options, _of_offload, _of_precision, _of_parallelism, _of_checkpoints):
        for key, why in refusals(engine, optimizer):
            raise ConfigError(f"DeepSpeed's configuration, {key}: {type(optimizer).__name__} {why}")


def joins(engine: Any, optimizer: Optimizer | Wrapper) -> bool:
    """Whether one step can be made of the steps that DeepSpeed makes; otherwise it steps the optimizer as it is."""
    return isinstance(origin_of(optimizer), Optimizer) and all(isinstance(w, FOLLOWING) for w in wrappers_of(optimizer))


def _of_wrappers(engine: Any, optimizer: Optimizer | Wrapper) -> _Refusals:
    stage = engine.zero_optimization_stage()
    if not joins(engine, optimizer) and (stage > 0 or engine.bfloat16_enabled() or engine.fp16_enabled()):
        yield (
            "zero_optimization.stage" if stage else "bf16.enabled, fp16.enabled",
            "takes passes through the model or optimizers of its own, for which DeepSpeed has no place: use stage 0 in "
            f"fp32; {', '.join(kind.__name__ for kind in FOLLOWING)} around an optimizer of oput_dist work at any",
        )


def _of_options(engine: Any, optimizer: Optimizer | Wrapper) -> _Refusals:
    origin = origin_of(optimizer)
    if getattr(origin, "_shard_group", None) is not None:
        yield "zero_optimization.stage", "was given shard_group, but DeepSpeed partitions itself: leave it out"
    if getattr(origin, "gradient_release", False):
        yield (
            "optimizer.params.gradient_release",
            "would step in the backward pass, but DeepSpeed reduces gradients and frees them itself: leave it out",
        )
    if isinstance(origin, Optimizer) and origin.options.home is not None:
        yield (
            "optimizer.params.state_device",
            "would keep state in host memory beside what DeepSpeed keeps there and saves: leave it out, and set "
            '"zero_optimization": {"offload_optimizer": {"device": "cpu"}}',
        )


def _of_offload(engine: Any, optimizer: Optimizer | Wrapper) -> _Refusals:
    zero = engine._config.zero_config
    offload, parameters = zero.offload_optimizer, zero.offload_param
    if offload is not None and str(offload.device) != "none":
        if offload.device == "nvme":
            yield "zero_optimization.offload_optimizer.device", "keeps its state in memory, not on nvme: use cpu"
        if getattr(offload, "ratio", 1.0) != 1.0:
            yield "zero_optimization.offload_optimizer.ratio", "runs on one device, so the ratio must be 1.0"
        if getattr(offload, "super_offload", False):
            yield (
                "zero_optimization.offload_optimizer.super_offload",
                "cannot run in the processes of SuperOffload, which know Adam only: leave it out",
            )
    if parameters is not None and parameters.device == "nvme":
        yield "zero_optimization.offload_param.device", "has not been tried with parameters on nvme: use cpu"
    if getattr(zero, "zenflow", None) is not None:
        yield "zero_optimization.zenflow", "cannot run in the processes of ZenFlow, which know Adam only: leave it out"


def _of_precision(engine: Any, optimizer: Optimizer | Wrapper) -> _Refusals:
    if engine.zero_optimization_stage() == 0 and engine.fp16_enabled() and engine.loss_scale() != 1.0:
        yield (
            "fp16.loss_scale",
            "would get gradients that are too small: at stage 0 this version of DeepSpeed divides them by the loss "
            "scale, but has not multiplied the loss by it; use stage 1, or bf16, or loss_scale 1",
        )
    if engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16:
        yield "torch_autocast.dtype", "takes one step for all parameters, which its loss scaler does not: use bfloat16"
    for dtype in ("fp16", "bf16"):
        if getattr(engine, f"{dtype}_master_weights_and_gradients")():
            yield (
                f"{dtype}.{dtype}_master_weights_and_grads",
                "steps fp32 copies of the weights, since DeepSpeed keeps others for its CPUAdam only: leave it out",
            )
    if engine.bf16_optimizer_states():
        yield (
            "bf16.bf16_optimizer_states",
            "has a dtype of state of its own, and this is for CPUAdam: leave it out, and set "
            '"state_dtype": "bf16" in optimizer.params',
        )


def _of_parallelism(engine: Any, optimizer: Optimizer | Wrapper) -> _Refusals:
    if engine.has_moe_layers:
        yield "optimizer.type", "has not been tried with layers of experts (MoE): use an optimizer of DeepSpeed's"
    if isinstance(engine.module, PipelineModule):
        yield (
            "pipeline",
            "has not been tried with a PipelineModule, whose stages hold different parameters: use a plain module "
            "with zero_optimization.stage",
        )
    origin = origin_of(optimizer)
    if tensor_parallel(engine) and isinstance(origin, Optimizer):
        for group in origin.param_groups:
            recipe = origin.recipe_of(group, torch.Size((2, 2)))
            if recipe.exchanges or recipe.whole is not None or origin._options.max_grad_norm is not None:
                yield (
                    "tensor_parallel.autotp_size",
                    "needs whole parameters, but tensor parallelism leaves each rank a part of them that DeepSpeed "
                    "does not describe: use an elementwise optimizer such as AdamW, or "
                    "torch.distributed.tensor.parallel with fully_shard",
                )


def _of_checkpoints(engine: Any, optimizer: Optimizer | Wrapper) -> _Refusals:
    zero, stage = engine._config.zero_config, engine.zero_optimization_stage()
    if zero.elastic_checkpoint:
        yield "zero_optimization.elastic_checkpoint", "keeps state that such checkpoints would not: leave it out"
    if engine.load_universal_checkpoint():
        if not _adam_like(optimizer):
            yield (
                "checkpoint.load_universal",
                "keeps other state than exp_avg and exp_avg_sq, which is all that universal checkpoints hold: use "
                "oput_dist.deepspeed.full_state_dict(engine), or as many ranks as saved",
            )
        elif origin_of(optimizer).options.storage is not None:
            yield (
                "checkpoint.load_universal",
                "keeps state as codes (state_dtype), but universal checkpoints hold numbers: use "
                "oput_dist.deepspeed.full_state_dict(engine), or as many ranks as saved",
            )
        if zero.round_robin_gradients and stage in (1, 2):
            yield (
                "zero_optimization.round_robin_gradients",
                "would be loaded wrong: universal checkpoints mistake what lies where under it; leave it out, in the "
                "run that saves as well",
            )


def tensor_parallel(engine: Any) -> bool:
    """Whether ranks hold different parts of a parameter that DeepSpeed's ZeRO takes for the whole of it."""
    return bool(engine.autotp_size() > 1 or bwc_tensor_model_parallel_world_size(engine.mpu) > 1)


def check_whole_state(engine: Any) -> None:
    """Raise ConfigError where parameters cannot be put together."""
    if tensor_parallel(engine):
        raise ConfigError(
            "DeepSpeed's configuration, tensor_parallel.autotp_size: full state dicts need whole parameters, but "
            "tensor parallelism leaves each rank a part of them that DeepSpeed does not describe: use "
            "engine.save_checkpoint"
        )


def _adam_like(optimizer: Optimizer | Wrapper) -> bool:
    if isinstance(optimizer, Wrapper):
        return False
    recipes = [optimizer.recipe_of(group, torch.Size((2, 2))) for group in optimizer.param_groups]
    return all(set(recipe.state) == {"exp_avg", "exp_avg_sq"} and not recipe.vectors for recipe in recipes)
