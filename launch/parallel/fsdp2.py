"""FSDP2: each rank holds some rows of every parameter, as DTensors. On a mesh (replica, shard) it is HSDP."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from launch.model import GPT


def shard(model: GPT, mesh: DeviceMesh, bf16: bool) -> nn.Module:
    """In place. Parameters stay fp32; with `bf16` computation is not, and gradients are summed in fp32."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model
