"""State in host memory: whose it is, and what holds it."""

from __future__ import annotations

from typing import Any

import torch

from oput_dist.backends import Carrier, to_host, zeros_on_host

from .coded import Coded

__all__ = ["HOST", "Home", "Hosted", "Remote"]

HOST = torch.device("cpu")


class Home:
    """Host memory in which the state of parameters on some devices lives.

    Args:
        types: of these devices.
    """

    def __init__(self, *types: str) -> None:
        self.types = types
        self._carriers: dict[torch.device, Carrier] = {}

    def serves(self, device: torch.device) -> bool:
        """Whether the state of parameters on a device lives here; of what is only planned for, it does."""
        return device.type in (*self.types, "meta")

    def carrier(self, device: torch.device) -> Carrier:
        """What brings state to a device and back: one, since it keeps memory there from step to step."""
        if device not in self._carriers:
            self._carriers[device] = Carrier(device)
        return self._carriers[device]

    def __reduce__(self) -> Any:  # of copies, too: streams and what they work on stay behind
        return Home, self.types


class Hosted:
    """One state of this rank's piece of a parameter, in host memory.

    Args:
        memory: numbers, flat, in the order of the parameter's memory; or codes.
        device: that copies from there and to there.
    """

    def __init__(self, memory: torch.Tensor | Coded, device: torch.device | None) -> None:
        self.memory = memory
        """For copies that wait for :attr:`last` themselves."""
        self.device = device
        """None for what was copied or pickled, which no device knows."""
        self.last: Any = None
        """When the last copy from the device is done."""

    @classmethod
    def of(cls, value: torch.Tensor | Coded, device: torch.device) -> Hosted:
        """A copy."""
        if isinstance(value, Coded):
            return cls(Coded(value.code, to_host(value.codes, device), to_host(value.scales, device)), device)
        return cls(to_host(value, device), device)

    @classmethod
    def zeros(cls, numel: int, dtype: torch.dtype, device: torch.device) -> Hosted:
        """Numbers, all zero."""
        return cls(zeros_on_host((numel,), dtype, device), device)

    @property
    def value(self) -> torch.Tensor | Coded:
        """What is there, for the host: waits for the device."""
        if self.last is not None:
            self.last.synchronize()
        return self.memory

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return torch.float32 if isinstance(self.memory, Coded) else self.memory.dtype

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return self.memory.nbytes

    def __getstate__(self) -> dict[str, Any]:
        return {"memory": self.value, "device": None, "last": None}


class Remote:
    """Of cells whose state is in host memory.

    Attributes:
        source: what is copied from.
        target: what is copied to.
    """

    source: Hosted
    target: Hosted
