"""The machine that times are estimated for: every constant of the estimate, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Machine"]


@dataclass(frozen=True)
class Machine:
    """Constants of the estimate. The defaults are round figures for nodes of eight H100; none is measured by us.

    A collective takes ``latency(ranks) + bytes sent / bandwidth(ranks)`` seconds (the alpha-beta model), work on
    matrices ``operations / matrix_rate``, a pass over tensors ``bytes read and written / memory_rate``.

    Args:
        ranks_per_node: that share the fast links. Default 8.
        start: seconds that any collective takes to begin. Default 10e-6.
        hop: seconds of one hop between nodes; a tree has ``log2(nodes)`` of them, up and down. Default 5e-6.
        inside_rate: bytes a second that a rank sends to others of its node. Default 300e9.
        between_rate: bytes a second that a rank sends to other nodes. Default 50e9.
        memory_rate: bytes a second that an elementwise pass reads and writes. Default 2.7e12.
        host_rate: bytes a second that a device copies from host memory, while it copies as many there. Default 50e9.
        matrix_rate: floating-point operations a second of matrix products. Default 400e12.

    Raises:
        ValueError: for a constant that is not positive.
    """

    ranks_per_node: int = 8
    start: float = 10e-6
    hop: float = 5e-6
    inside_rate: float = 300e9
    between_rate: float = 50e9
    memory_rate: float = 2.7e12
    host_rate: float = 50e9
    matrix_rate: float = 400e12

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"Machine: {name}={value!r} is not allowed: must be a number > 0")

    def collective(self, ranks: int, sent: float) -> float:
        """Seconds of a collective of so many ranks, of which the busiest sends so many bytes."""
        if ranks <= 1:
            return 0.0
        nodes = math.ceil(ranks / self.ranks_per_node)
        rate = self.inside_rate if nodes == 1 else self.between_rate
        return self.start + 2 * math.log2(nodes) * self.hop + sent / rate
