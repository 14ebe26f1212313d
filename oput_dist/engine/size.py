"""How much memory an optimizer's state takes on this rank."""

from __future__ import annotations

import torch

from oput_dist.layout import whole_or_local

__all__ = ["state_bytes"]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of optimizer state that this rank holds: its local pieces and its scalars, of any torch optimizer."""
    values = (value for state in optimizer.state.values() for value in state.values())
    tensors = (whole_or_local(value) for value in values if isinstance(value, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
