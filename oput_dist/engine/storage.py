"""In what form each state of each parameter is kept: a dtype, or codes of a few bits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from oput_dist.kernels.codes import FORMATS, Format, format_of

from .hyper import nearest
from .slot import Slot

__all__ = ["SMALL_STATE", "Kind", "Storage", "check_storage", "codable", "storage_of"]

Kind = torch.dtype | str | None
"""A dtype, the name of a :class:`Format`, or None for the parameter's own dtype."""

SMALL_STATE = 4096
"""Parameters with fewer elements keep their state in float32 where others have codes, unless an override fits them."""

_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_LONG = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}
"""As torch calls them, for what comes out of text: configurations, command lines."""
_CODES = tuple(dict.fromkeys(code.name for code in FORMATS))

_SIGNED = (
    "avg_grad",
    "exp_avg",
    "exp_avg_diff",
    "exp_avg_grad",
    "exp_avg_slow",
    "grad_ma",
    "i_buffer",
    "momentum_buffer",
    "neg_grad_ma",
)
_NEVER_NEGATIVE = ("exp_avg_sq", "exp_avg_var", "exp_hessian_diag_sq", "square_avg", "variance_ma")


def codable(name: str) -> bool | None:
    """Whether state of a name may be negative, where codes can hold it; None where they cannot.

    Moving averages can be coded: what rounding does to them fades. Weights, sums that only grow, and what the next
    gradient is subtracted from cannot.
    """
    if name in _NEVER_NEGATIVE:
        return False
    return True if name in _SIGNED or name.startswith("momentum_buffer_") else None


@dataclass(frozen=True)
class Storage:
    """The form of all state.

    Args:
        overall: of state that nothing else names.
        named: by name of the state.
        overrides: by class of module or pattern of the parameter's qualified name; the last that fits counts.
    """

    overall: Kind
    named: tuple[tuple[str, Kind], ...] = ()
    overrides: tuple[tuple[type[nn.Module] | str, Kind], ...] = ()

    @property
    def blocks(self) -> tuple[int, ...]:
        """The sizes of blocks of the codes that may be used."""
        kinds = {self.overall, *(kind for _, kind in (*self.named, *self.overrides))}
        return tuple(sorted({code.block for code in FORMATS if code.name in kinds}))

    def of(self, name: str, slot: Slot) -> torch.dtype | Format | None:
        """The form of one state of a parameter, worked out once; None for the parameter's own dtype."""
        key = ("form", name, self)
        if key not in slot.facts:
            slot.facts[key] = self._form(name, slot)
        known: torch.dtype | Format | None = slot.facts[key]
        return known

    def _form(self, name: str, slot: Slot) -> torch.dtype | Format | None:
        kind, least = dict(self.named).get(name, self.overall), SMALL_STATE
        for which, other in self.overrides:
            if _fits(which, slot):
                kind, least = other, 0
        if kind is None or isinstance(kind, torch.dtype):
            return kind
        signed = codable(name)
        if signed is None:
            return None
        return torch.float32 if slot.layout.shape.numel() < least else format_of(kind, signed)


def _fits(which: type[nn.Module] | str, slot: Slot) -> bool:
    if isinstance(which, str):
        return fnmatchcase(slot.called or "", which)
    return slot.layer is not None and issubclass(slot.layer, which)


def storage_of(owner: str, given: Any, overrides: Any) -> torch.dtype | Storage | None:
    """What ``state_dtype=`` and ``state_overrides=`` mean: one dtype for all, None for the parameters', or a storage.

    Raises:
        ValueError, TypeError: for what is no dtype and no format.
    """
    if isinstance(given, Mapping):
        named = tuple((str(name), _kind(owner, f"state_dtype[{name!r}]", kind)) for name, kind in given.items())
        overall: Kind = None
    else:
        named, overall = (), _kind(owner, "state_dtype", given)
    coded = any(isinstance(kind, str) for kind in (overall, *(kind for _, kind in named)))
    if overrides is None:
        overrides = {nn.Embedding: "fp32", nn.EmbeddingBag: "fp32"} if coded else {}
    if not isinstance(overrides, Mapping):
        raise TypeError(f"{owner}: state_overrides={overrides!r} must be a dict from classes of modules or names")
    chosen = tuple((_which(owner, key), _kind(owner, f"state_overrides[{key!r}]", v)) for key, v in overrides.items())
    if not named and not chosen and not coded:
        assert not isinstance(overall, str)
        return overall
    return Storage(overall, named, chosen)


def check_storage(owner: str, storage: Storage | None, names: Collection[str]) -> None:
    """Raise ValueError for state that an optimizer does not keep, or codes where it keeps none that can have them.

    Args:
        owner: what messages call it.
        storage: the form of its state.
        names: of its state.
    """
    if storage is None:
        return
    for name, kind in storage.named:
        if name not in names:
            known = ", ".join(map(repr, sorted(names))) or "none in the shape of a parameter"
            raise ValueError(
                f"{owner}: state_dtype names {name!r}, but the state of this optimizer is {known}{nearest(name, names)}"
            )
        if isinstance(kind, str) and codable(name) is None:
            raise ValueError(
                f"{owner}: state_dtype={{{name!r}: {kind!r}}}: {name!r} cannot be kept in {kind}, since errors of "
                "codes would add up in it; leave it out, or give a dtype such as 'bf16'"
            )
    kinds = [kind for kind in (storage.overall, *(kind for _, kind in storage.overrides)) if isinstance(kind, str)]
    if kinds and all(codable(name) is None for name in names):
        known = ", ".join(map(repr, sorted(names))) or "none in the shape of a parameter"
        raise ValueError(
            f"{owner}: state_dtype={kinds[0]!r}, but no state of this optimizer can be coded, which moving averages "
            f"can: it is {known}; leave state_dtype out, or give a dtype such as 'bf16'"
        )


def _kind(owner: str, what: str, given: Any) -> Kind:
    kind = {**_DTYPES, **_LONG}.get(given.removeprefix("torch."), given) if isinstance(given, str) else given
    if kind is None or kind in _DTYPES.values() or kind in _CODES:
        return kind
    names = [*_DTYPES, *_CODES]
    allowed = ", ".join(map(repr, names))
    raise ValueError(
        f"{owner}: {what}={given!r} is not allowed: must be None, a torch dtype (float32, float64, bfloat16, float16) "
        f"or one of {allowed}{nearest(str(given), names)}"
    )


def _which(owner: str, key: Any) -> type[nn.Module] | str:
    if isinstance(key, str) or (isinstance(key, type) and issubclass(key, nn.Module)):
        return key
    raise TypeError(
        f"{owner}: state_overrides has the key {key!r}: each must be a class of modules, or a pattern of parameters' "
        "qualified names such as '*.head.*'"
    )
