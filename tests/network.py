"""A small classifier and its batches, in fp64, for tests of curvature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS, CLASSES = 24, 5


def network(features: int = 6, hidden: int = 8, classes: int = CLASSES) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, classes)).double()


def batch(step: int, rows: int = ROWS, features: int = 6, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, classes, (rows,), generator=generator)
