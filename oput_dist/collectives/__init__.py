"""Collectives: what travels between ranks, packed. Knows nothing of optimizers or layouts."""

from .gather import gather_pieces
from .packed import Schedule, packed_sum

__all__ = ["Schedule", "gather_pieces", "packed_sum"]
