"""Named configurations: an optimizer, its settings, and whether weight decay spares biases and normalisation layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from oput_dist.engine import Optimizer

from .ranger import Ranger, RangerAdaBelief
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """One of them.

    Args:
        optimizer: the class.
        options: its settings; what the caller gives comes first.
        decays_all: whether biases and the parameters of normalisation layers decay too.
    """

    optimizer: type[Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    decays_all: bool = False


PRESETS: Mapping[str, Preset] = {
    "ranger_gc": Preset(Ranger),
    "ranger_nogc": Preset(Ranger, {"use_gc": False}),
    "rangeradabelief_gc": Preset(RangerAdaBelief),
    "rangeradabelief_nogc": Preset(RangerAdaBelief, {"use_gc": False}),
    "rmsprop_momentum": Preset(RMSprop, {"momentum": 0.9, "decouple_wd": True}),
    "sgd_momentum": Preset(SGD, {"momentum": 0.9, "decouple_wd": True}),
    "sgd_nesterov": Preset(SGD, {"momentum": 0.9, "nesterov": True, "decouple_wd": True}),
    "sgd_plain": Preset(SGD, {"decouple_wd": True}),
}
"""By name. Names of classes mean the class as it is, so configurations of the same name have a suffix here."""
