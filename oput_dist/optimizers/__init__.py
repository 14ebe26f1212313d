"""The optimizers: one file for each, or for a close family. Know nothing of layouts or ranks.

Each line below takes the classes that a file lists in ``__all__``; :func:`available` finds them here.
"""

from .a2grad import *
from .accsgd import *
from .adabelief import *
from .adabound import *
from .adafactor import *
from .adahessian import *
from .adam import *
from .adammini import *
from .adamod import *
from .adamp import *
from .adan import *
from .ademamix import *
from .adopt import *
from .aggmo import *
from .amos import *
from .apollo import *
from .came import *
from .curved import Curved
from .diffgrad import *
from .lamb import *
from .laprop import *
from .lars import *
from .lion import *
from .madgrad import *
from .mars import *
from .momo import *
from .muon import *
from .nadam import *
from .novograd import *
from .pid import *
from .preconditioned import MatrixReport
from .presets import PRESETS as PRESETS
from .prodigy import *
from .qh import *
from .radam import *
from .ranger import *
from .ranger21 import *
from .rangerva import *
from .registry import OPTIMIZERS, available, create, lookup
from .rmsprop import *
from .schedulefree import *
from .sgd import *
from .sgdp import *
from .shampoo import *
from .signum import *
from .sm3 import *
from .soap import *
from .sophia import *
from .stableadamw import *
from .swats import *
from .yogi import *

__all__ = [
    *(cls.__name__ for cls in OPTIMIZERS.values()),
    "Curved",
    "MatrixReport",
    "ScheduleFree",
    "Sophia",
    "SophiaReport",
    "available",
    "create",
    "lookup",
]
