"""The optimizers: one file for each, or for a close family. Know nothing of layouts or ranks.

Each line below takes the classes that a file lists in ``__all__``; :func:`available` finds them here.
"""

from .adafactor import *
from .adam import *
from .adamp import *
from .adan import *
from .lamb import *
from .lion import *
from .momo import *
from .registry import OPTIMIZERS, available, create
from .sgd import *
from .sm3 import *
from .stableadamw import *

__all__ = [*(cls.__name__ for cls in OPTIMIZERS.values()), "available", "create"]
