"""DDP: every rank holds all parameters, gradients are averaged. With an optimizer's `shard_group=` it is ZeRO-1."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel


def replicate(model: nn.Module, mesh: DeviceMesh, bf16: bool) -> nn.Module:
    """Computes in bf16 only under autocast, so `bf16` changes nothing here."""
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
