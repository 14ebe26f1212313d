"""Optimizers for distributed PyTorch training: any optimizer, any sharding, the trajectory of one process.

Example::

    import oput_dist as oput

    optimizer = oput.Lamb(model.parameters(), lr=1e-3)
"""

from .engine import Optimizer, clip_grad_norm_, state_bytes
from .engine.replicas import ReplicaError, check_replicas
from .engine.whole import full_state_dict
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
    "ReplicaError",
    "StableAdamW",
    "available",
    "check_replicas",
    "clip_grad_norm_",
    "create",
    "full_state_dict",
    "state_bytes",
]
