"""Which parameters weight decay spares: biases and those of normalisation layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from oput_dist.layout import Flat, clean_name, flattened_in, is_flattened

from .optimizer import Params

__all__ = ["groups_by_decay"]


def groups_by_decay(params: Params) -> list[dict[str, Any]]:
    """Two parameter groups: what decays, and with ``weight_decay=0`` biases and what belongs to normalisation layers.

    A parameter is spared if its name ends in ``bias``, if it belongs to a layer whose class is called ``...Norm...``,
    or if its original shape has fewer than two axes. The result is the same before and after wrapping.

    Args:
        params: a module; or named parameters, or parameters, of which less is known.

    Raises:
        ValueError: for parameter groups, and for a flat parameter of FSDP1 that holds both kinds.
    """
    if isinstance(params, nn.Module):
        named = [(clean_name(name), p) for name, p in params.named_parameters()]
        spared = _spared_by_module(params)
    else:
        entries: list[Any] = list(params)
        if any(isinstance(entry, dict) for entry in entries):
            raise ValueError(
                "this configuration makes parameter groups of its own, for decay and none: give it a module, or named "
                "parameters, and not groups"
            )
        named = [entry if isinstance(entry, tuple) else ("", entry) for entry in entries]
        if any(is_flattened(p) for _, p in named):
            raise ValueError(
                "FSDP1 (FullyShardedDataParallel) flattened these parameters, so their shapes and layers are unknown: "
                "this configuration, which spares biases and norms from decay, needs the wrapped module in their place"
            )
        spared = {p: _is_spared(name, len(p.shape)) for name, p in named}
    with_names = all(name for name, _ in named)
    decayed: list[Any] = []
    kept: list[Any] = []
    for name, p in named:
        (kept if spared[p] else decayed).append((name, p) if with_names else p)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_spared(name: str, axes: int) -> bool:
    return axes < 2 or name.rpartition(".")[2] == "bias"


def _spared_by_module(module: nn.Module) -> dict[torch.Tensor, bool]:
    norms = {clean_name(name) for name, child in module.named_modules() if "Norm" in type(child).__name__}
    flattened = flattened_in(module)

    def is_spared(name: str, axes: int) -> bool:
        return _is_spared(name, axes) or name.rpartition(".")[0] in norms

    spared: dict[torch.Tensor, bool] = {}
    for name, p in module.named_parameters():
        flat = flattened.get(p)
        if flat is None:
            spared[p] = is_spared(clean_name(name), len(p.shape))
        else:
            spared[p] = _of_flat(clean_name(name), flat, [is_spared(o.name, len(o.shape)) for o in flat.originals])
    return spared


def _of_flat(name: str, flat: Flat, each: list[bool]) -> bool:
    if len(set(each)) > 1:
        pairs = list(zip(each, (original.name for original in flat.originals), strict=True))
        yes, no = (next(original for spared, original in pairs if spared is kind) for kind in (True, False))
        raise ValueError(
            f"the flat parameter {name!r} of FSDP1 holds {no!r}, which decays, and {yes!r}, which does not: wrap the "
            "module with use_orig_params=True"
        )
    return each[0]
