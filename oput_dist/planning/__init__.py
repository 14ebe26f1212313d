"""What training will cost on ranks that need not exist: memory, what is sent, balance, and time."""

from .forecast import Forecast, Spread
from .machine import Machine
from .plan import plan

__all__ = ["Forecast", "Machine", "Spread", "plan"]
