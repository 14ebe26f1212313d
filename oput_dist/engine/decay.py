"""Which parameters weight decay spares: biases and those of normalisation layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .hyper import check_group, nonnegative
from .listing import table
from .optimizer import Params
from .split import split

__all__ = ["groups_by_decay", "param_groups_weight_decay"]


def groups_by_decay(params: Params) -> list[dict[str, Any]]:
    """Two parameter groups: what decays, and with ``weight_decay=0`` biases and what belongs to normalisation layers.

    A parameter is spared if its name ends in ``bias``, if it belongs to a layer whose class is called ``...Norm...``,
    or if its original shape has fewer than two axes. The result is the same before and after wrapping.

    Args:
        params: a module; or named parameters, or parameters, of which less is known.

    Raises:
        ValueError: for parameter groups, and for a flat parameter of FSDP1 that holds both kinds.
    """
    spared, decayed = split(params, _is_spared, "decay")
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def param_groups_weight_decay(
    model: nn.Module,
    weight_decay: float = 1e-2,
    additional_layers: str | type[nn.Module] | Iterable[str | type[nn.Module]] | None = None,
    show: bool = False,
) -> list[dict[str, Any]]:
    """Two parameter groups: what weight decay spares, with ``weight_decay=0``, and then what decays.

    Spared are biases, parameters of normalisation layers (whose class is called ``...Norm...``), those whose original
    shape has fewer than two axes, and ``additional_layers``. Frozen parameters are in neither group. The result is the
    same before and after wrapping by DDP, FSDP1, FSDP2 and ``torch.compile``.

    Args:
        model: the module. Under FSDP1 with ``use_orig_params=True``, or units that hold one kind only; give the
            optimizer ``module=model`` too.
        weight_decay: of what decays, >= 0. Default 1e-2.
        additional_layers: parts of parameter names, or classes of modules, to spare, too. One that matches nothing
            is warned of.
        show: print what went where.

    Returns:
        the groups, for any optimizer.

    Raises:
        TypeError, ValueError: for no module, a decay out of range, what is neither name nor class; and for a flat
            parameter of FSDP1 that holds both kinds.

    Example::

        groups = oput.param_groups_weight_decay(model, weight_decay=0.1, additional_layers=["pos_embed"])
        optimizer = oput.AdamW(groups, lr=1e-3)
    """
    owner = "param_groups_weight_decay"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{owner}: model={model!r}: must be the nn.Module whose parameters are grouped")
    check_group(owner, {"weight_decay": weight_decay}, {"weight_decay": nonnegative})
    words, classes = _additional(owner, additional_layers)
    matched: set[Any] = set()
    seen: dict[str, tuple[Any, int, bool]] = {}

    def spared(name: str, layer: nn.Module | None, axes: int) -> bool:
        hits = {word for word in words if word in name} | {kind for kind in classes if isinstance(layer, kind)}
        matched.update(hits)
        result = bool(hits) or _is_spared(name, layer, axes)
        seen[name] = (type(layer).__name__, axes, result)
        return result

    first, second = ([_tensor(entry) for entry in kind] for kind in split(model, spared, "decay"))
    for missed in sorted({*words, *classes} - matched, key=str):
        warnings.warn(f"{owner}: additional_layers: {missed!r} matches no parameter", stacklevel=2)
    if show:
        rows = [
            (name, layer, str(axes), "0" if without else str(weight_decay))
            for name, (layer, axes, without) in seen.items()
        ]
        print(table(("parameter", "layer", "axes", "weight decay"), rows))
    return [
        {"params": [p for p in first if p.requires_grad], "weight_decay": 0.0},
        {"params": [p for p in second if p.requires_grad], "weight_decay": weight_decay},
    ]


def _additional(owner: str, given: Any) -> tuple[set[str], set[type[nn.Module]]]:
    entries = () if given is None else (given,) if isinstance(given, (str, type)) else tuple(given)
    words = {entry for entry in entries if isinstance(entry, str) and entry}
    classes = {entry for entry in entries if isinstance(entry, type) and issubclass(entry, nn.Module)}
    for entry in entries:
        if entry not in words and entry not in classes:
            raise TypeError(
                f"{owner}: additional_layers: {entry!r} is not allowed: must be a part of a name, or a class of modules"
            )
    return words, classes


def _tensor(entry: Any) -> torch.Tensor:
    tensor: torch.Tensor = entry[1] if isinstance(entry, tuple) else entry
    return tensor


def _is_spared(name: str, layer: nn.Module | None, axes: int) -> bool:
    return axes < 2 or name.rpartition(".")[2] == "bias" or "Norm" in type(layer).__name__
