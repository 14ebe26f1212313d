"""Optimizers for distributed PyTorch training: any optimizer, any sharding, the trajectory of one process.

Example::

    import oput_dist as oput

    optimizer = oput.Lamb(model.parameters(), lr=1e-3)
"""

from .engine import Optimizer, clip_grad_norm_, state_bytes
from .optimizers import SGD, Adafactor, Adam, AdamP, AdamW, Adan, Lamb, Lion, Momo, StableAdamW, available, create

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adafactor",
    "Adam",
    "AdamP",
    "AdamW",
    "Adan",
    "Lamb",
    "Lion",
    "Momo",
    "Optimizer",
    "StableAdamW",
    "available",
    "clip_grad_norm_",
    "create",
    "state_bytes",
]
