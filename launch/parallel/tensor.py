"""Tensor parallelism: ranks divide the heads, the perceptrons and the vocabulary; with FSDP2, on a mesh of two axes."""

import warnings

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from launch.model import GPT
from launch.parallel import fsdp2


def cut(model: GPT, mesh: DeviceMesh, bf16: bool) -> nn.Module:
    """In place, over the one axis of `mesh`. Computes in bf16 only under autocast, so `bf16` changes nothing here.

    A column-wise layer holds some rows of its weight, `Shard(0)`, and gives that part of its output; the row-wise layer
    after it holds the matching columns, `Shard(1)`, and adds the parts up. The normalisations and the table of places
    stay plain tensors, equal on all ranks.
    """
    for block in model.blocks:
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in ("query", "key", "value", "up")}
        plan |= {name: RowwiseParallel() for name in ("out", "down")}
        parallelize_module(block, mesh, plan)
    ends = {
        "bytes": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, ends)


def shard_and_cut(model: GPT, mesh: DeviceMesh, bf16: bool) -> nn.Module:
    """In place, over a mesh (shard, tensor): each tensor-parallel piece is cut again into rows, over the data ranks.

    Column-wise weights become `(_StridedShard(0), Shard(0))`, row-wise ones `(Shard(0), Shard(1))`, and what tensor
    parallelism leaves whole is sharded over the axis "shard" alone.
    """
    cut(model, mesh["tensor"], bf16)
    # FSDP2 warns that in-place operations on the logits, which are a view here, would go wrong; the loss has none.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    return fsdp2.shard(model, mesh["shard"], bf16)
