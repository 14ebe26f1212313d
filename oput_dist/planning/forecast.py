"""What a plan says, and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Forecast", "Spread"]


@dataclass(frozen=True)
class Spread:
    """One quantity over all ranks."""

    least: float
    most: float
    mean: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of the value of each rank."""
        return cls(min(values), max(values), sum(values) / len(values))

    @property
    def imbalance(self) -> float:
        """The largest over the mean; 1 where there is nothing."""
        return self.most / self.mean if self.mean else 1.0


@dataclass(frozen=True)
class Forecast:
    """What training will cost, computed without it. Bytes and seconds are those of one rank and one step."""

    optimizer: str
    layout: str
    mesh: tuple[int, ...]
    elements: int
    """Of all parameters."""
    parameter_bytes: Spread
    gradient_bytes: Spread
    state_bytes: Spread
    """On the device."""
    host_bytes: Spread
    """Of state in host memory (``state_device="cpu"``)."""
    all_state_bytes: Spread
    """Of both."""
    whole_state_bytes: int
    """What one process alone would hold."""
    sent: Mapping[str, Spread]
    """Bytes that each rank sends, by purpose. What DDP and FSDP send for gradients and parameters is not among it."""
    sent_bytes: Spread
    """For all purposes together."""
    collectives: Mapping[str, int]
    """How many there are, by kind."""
    owner_seconds: Spread
    """Of work on whole matrices; zeros without any."""
    owner_bytes: Spread
    """That owners of matrices keep."""
    least_imbalance: tuple[float, float]
    """What the imbalance of both is at least while no matrix is split: the dearest may exceed the mean."""
    seconds: Mapping[str, float]
    """Estimated time of the busiest rank, by purpose; nothing overlaps, so this is the most that it takes."""

    @property
    def ranks(self) -> int:
        """How many there are."""
        ranks = 1
        for size in self.mesh:
            ranks *= size
        return ranks

    @property
    def state_share(self) -> float:
        """State of the fullest rank over an even share of all, ``whole_state_bytes / ranks``."""
        return self.all_state_bytes.most * self.ranks / self.whole_state_bytes if self.whole_state_bytes else 1.0

    @property
    def step_seconds(self) -> float:
        """Estimated time of a step."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        rows = [
            ("", "least", "most", "mean"),
            *(
                (name, *map(_bytes, (spread.least, spread.most, spread.mean)))
                for name, spread in (
                    ("parameters", self.parameter_bytes),
                    ("gradients", self.gradient_bytes),
                    ("state", self.state_bytes),
                    *([("state on host", self.host_bytes)] if self.host_bytes.most else []),
                    *((f"sent, {purpose}", spread) for purpose, spread in self.sent.items()),
                )
            ),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        table = [
            row[0].ljust(widths[0]) + "".join(f"  {cell.rjust(w)}" for cell, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        ranks = " x ".join(map(str, self.mesh))
        lines = [
            f"{self.optimizer}, {self.layout} on {ranks} rank{'s' * (self.ranks > 1)}, "
            f"{self.elements:,} parameters; bytes of a rank, sent in a step",
            *table,
            f"state of the fullest rank: {self.state_share:.2f} of an even share",
        ]
        if self.owner_seconds.most:
            lines.append(
                f"owners of matrices, largest over mean: time {self.owner_seconds.imbalance:.2f} (at least "
                f"{self.least_imbalance[0]:.2f}), bytes {self.owner_bytes.imbalance:.2f} (at least "
                f"{self.least_imbalance[1]:.2f})"
            )
        count = ", ".join(f"{n} {kind}" for kind, n in self.collectives.items() if n) or "none"
        parts = ", ".join(f"{what} {_seconds(value)}" for what, value in self.seconds.items() if value)
        lines += [f"collectives in a step: {count}", f"estimated step: {_seconds(self.step_seconds)} ({parts})"]
        return "\n".join(lines)


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.2f} {unit}"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
