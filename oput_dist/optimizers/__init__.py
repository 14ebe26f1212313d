"""The optimizers: one file for each, or for a close family. Know nothing of layouts or ranks."""

from .adafactor import Adafactor
from .adam import Adam, AdamW
from .adamp import AdamP
from .adan import Adan
from .lamb import Lamb
from .lion import Lion
from .momo import Momo
from .registry import OPTIMIZERS, available, create
from .sgd import SGD
from .stableadamw import StableAdamW

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "Adafactor",
    "Adam",
    "AdamP",
    "AdamW",
    "Adan",
    "Lamb",
    "Lion",
    "Momo",
    "StableAdamW",
    "available",
    "create",
]
