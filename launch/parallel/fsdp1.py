"""FSDP1: `FullyShardedDataParallel`, which flattens the parameters of a block and gives each rank a range of them."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from launch.model import GPT, Block


def shard(
    model: GPT,
    mesh: DeviceMesh,
    bf16: bool,
    strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD,
    use_orig_params: bool = True,
) -> nn.Module:
    """The wrapped model: the optimizer needs it too, since a bare flat parameter does not tell the shapes in it.

    `mesh` has the axis "shard" or, for `HYBRID_SHARD`, the axes "replica" and "shard". With a mesh, checkpoints are
    DTensors, so that the other parallelisms can read them.
    """
    return FullyShardedDataParallel(
        model,
        device_mesh=mesh,
        device_id=next(model.parameters()).device,
        sharding_strategy=strategy,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        mixed_precision=MixedPrecision(torch.bfloat16, torch.float32) if bf16 else None,
        use_orig_params=use_orig_params,
    )
