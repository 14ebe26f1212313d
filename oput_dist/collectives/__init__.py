"""Collectives: what travels between ranks, packed. Knows nothing of optimizers or layouts."""

from .gather import gather_pieces
from .owners import Matrix, Owners
from .packed import NamedRanks, Schedule, packed_sum, ranks_of
from .ranks import Ranks

__all__ = ["Matrix", "NamedRanks", "Owners", "Ranks", "Schedule", "gather_pieces", "packed_sum", "ranks_of"]
