"""From host to device without waiting, and launches there."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = ["on", "send"]


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor``, which is on the CPU, on ``device``; the host does not wait.

    The pinned copy may be dropped at once: PyTorch does not use its memory again before the transfer is done.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def on(device: torch.device) -> Any:
    """Launch on the device of the tensors, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
