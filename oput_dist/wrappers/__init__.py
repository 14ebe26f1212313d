"""Optimizers around other optimizers. Know nothing of layouts or ranks; not of particular optimizers either."""

from .averaging import EMA as EMA
from .averaging import LAWA as LAWA
from .averaging import SWA as SWA
from .esam import ESAM as ESAM
from .graft import AdaGraft as AdaGraft
from .gsam import GSAM as GSAM
from .lookahead import Lookahead as Lookahead
from .looksam import LookSAM as LookSAM
from .sam import ASAM as ASAM
from .sam import SAM as SAM
