"""The optimizers that are timed side by side: ours on each backend, torch's, and other libraries' where they import."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import oput_dist as oput

__all__ = ["Candidate", "candidates"]

Make = Callable[[Sequence[torch.Tensor]], Any]
TORCH = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}
PEERS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {  # library -> ours -> its class and options
    "optimi": {
        "adam": ("Adam", {}),
        "adamw": ("AdamW", {}),
        "sgd": ("SGD", {}),
        "lion": ("Lion", {}),
        "adan": ("Adan", {}),
        "stableadamw": ("StableAdamW", {} if torch.cuda.is_available() else {"triton": False}),
    },
    "pytorch_optimizer": {
        "adamw": ("AdamW", {}),
        "lion": ("Lion", {}),
        "adan": ("Adan", {}),
        "lamb": ("Lamb", {"weight_decay": 0.01}),
        "stableadamw": ("StableAdamW", {}),
    },
    "timm.optim": {"lion": ("Lion", {}), "adan": ("Adan", {}), "lamb": ("Lamb", {"weight_decay": 0.01})},
}
LR = 1e-5  # so that hundreds of timed steps leave the values near where they started


@dataclass(frozen=True)
class Candidate:
    """One way to run one optimizer."""

    optimizer: str
    """Our name for the rule."""
    by: str
    """``"oput compile"``, ``"torch fused"``, ``"optimi"``..."""
    make: Make

    @property
    def name(self) -> str:
        return f"{self.optimizer} {self.by}"


def candidates(optimizers: Sequence[str], backends: Sequence[str | None], libraries: bool = True) -> list[Candidate]:
    """Everything that can be timed here; a line is printed for each library that cannot."""
    found = []
    for name in optimizers:
        for backend in backends:
            found.append(Candidate(name, f"oput {backend or 'default'}", _ours(name, backend)))
        for mode in ("loop", "foreach", "fused") if name in TORCH else ():
            found.append(Candidate(name, f"torch {mode}", _torch(name, mode)))
    for library, classes in PEERS.items() if libraries else ():
        try:
            module = importlib.import_module(library)
        except Exception as error:  # a broken dependency raises anything
            print(f"{library}: left out, since it does not import here ({type(error).__name__}: {error})")
            continue
        for name in optimizers:
            cls, options = classes.get(name, ("", {}))
            if hasattr(module, cls):
                found.append(Candidate(name, library, _theirs(getattr(module, cls), options)))
    return found


def _ours(name: str, backend: str | None) -> Make:
    return lambda params: oput.create(name, params, lr=LR, backend=backend, **_options(name))


def _torch(name: str, mode: str) -> Make:
    cls = getattr(torch.optim, TORCH[name])
    return lambda params: cls(params, lr=LR, foreach=mode == "foreach", fused=mode == "fused", **_options(name))


def _theirs(cls: Any, options: dict[str, Any]) -> Make:
    return lambda params: cls(params, lr=LR, **options)


def _options(name: str) -> dict[str, Any]:
    return {"lamb": {"weight_decay": 0.01}}.get(name, {})  # without it Lamb adapts nothing
