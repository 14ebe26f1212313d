"""Optimizers for distributed PyTorch training: any optimizer, any sharding, the trajectory of one process.

Example::

    import oput_dist as oput

    optimizer = oput.Lamb(model.parameters(), lr=1e-3)
"""

from .curvature import CurvatureError as CurvatureError
from .curvature import EmpiricalFisher as EmpiricalFisher
from .curvature import Estimator as Estimator
from .curvature import GaussNewtonBartlett as GaussNewtonBartlett
from .curvature import Hutchinson as Hutchinson
from .engine import Optimizer as Optimizer
from .engine import clip_grad_norm_ as clip_grad_norm_
from .engine import state_bytes as state_bytes
from .engine.decay import param_groups_weight_decay as param_groups_weight_decay
from .engine.memory import Memory as Memory
from .engine.memory import memory as memory
from .engine.precision import to_low_precision as to_low_precision
from .engine.release import prepare_for_gradient_release as prepare_for_gradient_release
from .engine.release import remove_gradient_release as remove_gradient_release
from .engine.replicas import ReplicaError as ReplicaError
from .engine.replicas import check_replicas as check_replicas
from .engine.whole import full_state_dict as full_state_dict
from .engine.wrapper import Wrapper as Wrapper
from .optimizers import *
from .planning import Forecast as Forecast
from .planning import Machine as Machine
from .planning import plan as plan
from .wrappers import ASAM as ASAM
from .wrappers import EMA as EMA
from .wrappers import ESAM as ESAM
from .wrappers import GSAM as GSAM
from .wrappers import LAWA as LAWA
from .wrappers import SAM as SAM
from .wrappers import SWA as SWA
from .wrappers import AdaGraft as AdaGraft
from .wrappers import Lookahead as Lookahead
from .wrappers import LookSAM as LookSAM

__version__ = "0.1.0"
