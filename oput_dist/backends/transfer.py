"""From host to device without waiting."""

from __future__ import annotations

import torch

__all__ = ["send"]


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor``, which is on the CPU, on ``device``; the host does not wait.

    The pinned copy may be dropped at once: PyTorch does not use its memory again before the transfer is done.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
