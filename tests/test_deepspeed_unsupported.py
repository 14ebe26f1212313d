"""What no optimizer of the suite can do for DeepSpeed: refused at ``initialize``, as a user would come upon it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import oput_dist as oput
from tests.deepspeed_worlds import enter
from tests.pool import Pool

CPU = {"device": "cpu"}
NVME = {"device": "nvme", "nvme_path": "/tmp"}
ZENFLOW = {"topk_ratio": 0.1, "select_strategy": "step", "select_interval": 4, "update_interval": 4}
AUTO_TP = {
    "autotp_size": 2,
    "partition_config": {
        "use_default_specs": False,
        "layer_specs": [
            {"patterns": [".*up\\.weight$"], "partition_type": "column"},
            {"patterns": [".*down\\.weight$"], "partition_type": "row"},
        ],
    },
}


class Mlp(nn.Module):
    """Two layers, as AutoTP splits them; or a mixture of experts."""

    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        if experts:
            from deepspeed.moe.layer import MoE

            self.experts = MoE(8, nn.Linear(8, 8), num_experts=2, ep_size=experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))).square().mean()


def said(config: dict[str, Any], model: str = "") -> str:
    """The type and text of what ``initialize`` raises."""
    deepspeed = enter()
    module: nn.Module = Mlp(experts=int(model == "experts"))
    if model == "pipeline":
        module = deepspeed.PipelineModule([nn.Linear(8, 8), nn.Linear(8, 8)], num_stages=2, loss_fn=nn.MSELoss())
    whole = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "oput.Lamb"}, **config}
    try:
        deepspeed.initialize(model=module, model_parameters=module.parameters(), config=whole)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def zero(stage: int, **options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **options}}


REFUSED = {
    "nvme, stage 2": (zero(2, offload_optimizer=NVME), "", "zero_optimization.offload_optimizer.device: Lamb keeps"),
    "parameters on nvme": (
        zero(3, offload_optimizer=CPU, offload_param=NVME),
        "",
        "zero_optimization.offload_param.device: Lamb has not been tried with parameters on nvme: use cpu",
    ),
    "SuperOffload": (
        zero(3, offload_optimizer={**CPU, "super_offload": True}),
        "",
        "zero_optimization.offload_optimizer.super_offload: Lamb cannot run in the processes of SuperOffload",
    ),
    "ZenFlow": (
        zero(2, offload_optimizer=CPU, zenflow=ZENFLOW),
        "",
        "zero_optimization.zenflow: Lamb cannot run in the processes of ZenFlow",
    ),
    "ZenFlow, stage 3": (zero(3, offload_optimizer=CPU, zenflow=ZENFLOW), "", "zero_optimization.zenflow: Lamb cannot"),
    "experts": (zero(2), "experts", "optimizer.type: Lamb has not been tried with layers of experts (MoE)"),
    "pipeline": (zero(1), "pipeline", "pipeline: Lamb has not been tried with a PipelineModule"),
    "bf16 masters": (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, **zero(2, offload_optimizer=CPU)},
        "",
        "bf16.bf16_master_weights_and_grads: Lamb steps fp32 copies of the weights",
    ),
    "fp16 masters": (
        {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}, **zero(2, offload_optimizer=CPU)},
        "",
        "fp16.fp16_master_weights_and_grads: Lamb steps fp32 copies of the weights",
    ),
    "release": (
        {"optimizer": {"type": "oput.Lamb", "params": {"gradient_release": True}}, **zero(1)},
        "",
        "optimizer.params.gradient_release: Lamb would step in the backward pass",
    ),
    "a wrapper by its name": (
        {"optimizer": {"type": "oput.ema"}, **zero(1)},
        "",
        "optimizer.type: EMA wraps another optimizer and cannot be named here",
    ),
    "no table": (
        {"optimizer": {"type": "oput.Lamb", "params": [0.1]}, **zero(1)},
        "",
        "optimizer.params: must be a table of options, but is [0.1]",
    ),
    **{
        f"tensor parallel, stage {stage}": (
            {"tensor_parallel": AUTO_TP, **zero(stage)},
            "",
            "tensor_parallel.autotp_size: Lamb needs whole parameters",
        )
        for stage in range(4)
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_key(pool: Pool, name: str) -> None:
    config, model, text = REFUSED[name]
    for line in pool.run(2, said, config, model):
        assert line.startswith(f"ConfigError: DeepSpeed's configuration, {text}")


def test_sam_is_refused_where_parameters_are_exchanged(pool: Pool) -> None:
    for line in pool.run(1, sam_at, 1):
        assert line.startswith("DeepSpeed's configuration, zero_optimization.stage: SAM takes passes")
        assert "EMA, LAWA, Lookahead, SWA around an optimizer of oput_dist work at any" in line


def sam_at(stage: int) -> str:
    deepspeed, module = enter(), Mlp()
    config = {"train_micro_batch_size_per_gpu": 1, **zero(stage)}
    optimizer = oput.SAM(oput.AdamW(module.parameters()))
    try:
        deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    except ValueError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------- tensor parallelism


def split(stage: int, steps: int) -> tuple[dict[str, torch.Tensor], str]:
    """The parameters of a model that AutoTP split, put together, and what a full state dict says."""
    import torch.distributed as dist

    deepspeed, module = enter(), Mlp()
    adamw = {"type": "oput.AdamW", "params": {"lr": 0.1, "weight_decay": 0.1}}
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "optimizer": adamw, **zero(stage)}
    config["tensor_parallel"] = AUTO_TP
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    for step in range(steps):
        engine.backward(engine(batch(step)))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=stage == 3):
        pieces = {name: p.detach().clone() for name, p in module.named_parameters()}
    try:
        oput.deepspeed.full_state_dict(engine)
        answer = ""
    except ValueError as error:
        answer = str(error)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, pieces)
    axes = {"up.weight": 0, "up.bias": 0, "down.weight": 1}
    return {k: torch.cat([r[k] for r in ranks], axes[k]) if k in axes else p for k, p in pieces.items()}, answer


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("stage", range(4))
def test_elementwise_optimizers_step_what_tensor_parallelism_splits(pool: Pool, stage: int) -> None:
    plain, start = Mlp(), Mlp().state_dict()
    optimizer = oput.AdamW(plain.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        plain(batch(step)).backward()
        optimizer.step()
    for got, answer in pool.run(2, split, stage, 3):
        for name, wanted in plain.state_dict().items():
            moved = (wanted - start[name]).abs().max()
            assert (got[name] - wanted).abs().max() <= 1e-5 * moved, name
        assert "tensor_parallel.autotp_size: full state dicts need whole parameters" in answer
