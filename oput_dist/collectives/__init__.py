"""Collectives: what travels between ranks, packed. Knows nothing of optimizers or layouts."""

from .gather import gather_pieces
from .owners import Matrix, Owners
from .packed import Schedule, packed_sum

__all__ = ["Matrix", "Owners", "Schedule", "gather_pieces", "packed_sum"]
