"""Estimates of the diagonal of the Hessian, for optimizers that divide by it. Know nothing of particular optimizers."""

from .context import Context as Context
from .context import CurvatureError as CurvatureError
from .estimator import Estimator as Estimator
from .fisher import EmpiricalFisher as EmpiricalFisher
from .fisher import GaussNewtonBartlett as GaussNewtonBartlett
from .hutchinson import Hutchinson as Hutchinson
