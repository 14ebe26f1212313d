"""The optimizers: one file for each, or for a close family. Know nothing of layouts or ranks."""

from .adam import Adam, AdamW
from .adan import Adan
from .lamb import Lamb
from .lion import Lion
from .registry import OPTIMIZERS, available, create
from .sgd import SGD
from .stableadamw import StableAdamW

__all__ = ["OPTIMIZERS", "SGD", "Adam", "AdamW", "Adan", "Lamb", "Lion", "StableAdamW", "available", "create"]
