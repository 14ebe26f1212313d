"""How much memory an optimizer's state takes on this rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from oput_dist.layout import whole_or_local

from .coded import Coded
from .hosted import Hosted
from .packed import Packed

__all__ = ["bytes_of", "host_bytes_of", "state_bytes"]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of optimizer state that this rank holds: its local pieces and its scalars, of any torch optimizer.

    Wherever they are: :func:`oput_dist.memory` tells apart what is in host memory.
    """
    return sum(bytes_of(state) for state in optimizer.state.values())


def bytes_of(state: Mapping[str, Any]) -> int:
    """Bytes of the state of one parameter that this rank holds."""
    tensors = (whole_or_local(value) for value in state.values() if isinstance(value, torch.Tensor))
    other = sum(value.nbytes for value in state.values() if isinstance(value, (Coded, Hosted, Packed)))
    return other + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def host_bytes_of(state: Mapping[str, Any]) -> int:
    """Those of them in host memory, where the parameter is not."""
    return sum(value.nbytes for value in state.values() if isinstance(value, Hosted))
