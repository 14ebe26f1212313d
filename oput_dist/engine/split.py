"""Two kinds of parameters, told apart by name, layer and original shape: the same before and after wrapping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from oput_dist.layout import Flat, clean_name, flattened_in, is_flattened

from .optimizer import Params

__all__ = ["Test", "split"]

Test = Callable[[str, nn.Module | None, int], bool]
"""``test(name, layer, axes)``: whether a parameter is of the first kind. ``name`` is qualified, "" if it is not known;
``layer`` the module that it belongs to, None if that is not known; ``axes`` those of its original shape."""


def split(params: Params, test: Test, by: str, module: nn.Module | None = None) -> tuple[list[Any], list[Any]]:
    """The parameters of either kind, with their names where all are known.

    Args:
        params: a module; or named parameters, or parameters, of which less is known.
        test: tells them apart.
        by: what the kinds differ in, for messages: "decay".
        module: the module of parameters that are given by themselves, where it is known.

    Raises:
        ValueError: for parameter groups, and for a flat parameter of FSDP1 that holds both kinds.
    """
    if isinstance(params, nn.Module):
        named: list[tuple[str, torch.Tensor]] = [(clean_name(name), p) for name, p in params.named_parameters()]
        first = _by_module(params, test, by)
    else:
        entries: list[Any] = list(params)
        if any(isinstance(entry, dict) for entry in entries):
            raise ValueError(
                f"this configuration makes parameter groups of its own, by {by}: give it a module, or named "
                "parameters, and not groups"
            )
        named = [entry if isinstance(entry, tuple) else ("", entry) for entry in entries]
        known = {} if module is None else _by_module(module, test, by)
        if not known and any(is_flattened(p) for _, p in named):
            raise ValueError(
                "FSDP1 (FullyShardedDataParallel) flattened these parameters, so their shapes and layers are unknown: "
                f"this configuration, which tells parameters apart by {by}, needs the wrapped module in their place"
            )
        first = {p: known[p] if p in known else test(name, None, _axes(p)) for name, p in named}
    with_names = all(name for name, _ in named)
    kinds: tuple[list[Any], list[Any]] = ([], [])
    for name, p in named:
        kinds[not first[p]].append((name, p) if with_names else p)
    return kinds


def _axes(parameter: torch.Tensor) -> int:
    """Of its original shape; under DeepSpeed's ``zero.Init`` a parameter itself is an empty placeholder."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _by_module(module: nn.Module, test: Test, by: str) -> dict[torch.Tensor, bool]:
    layers = {clean_name(f"{name}."): child for name, child in module.named_modules()}
    flattened = flattened_in(module)

    def kind(name: str, axes: int) -> bool:
        owner = name[: name.rfind(".") + 1] or "."
        return test(name, layers.get(owner), axes)

    found: dict[torch.Tensor, bool] = {}
    for name, p in module.named_parameters():
        flat = flattened.get(p)
        if flat is None:
            found[p] = kind(clean_name(name), _axes(p))
        else:
            found[p] = _of_flat(clean_name(name), flat, [kind(o.name, len(o.shape)) for o in flat.originals], by)
    return found


def _of_flat(name: str, flat: Flat, each: list[bool], by: str) -> bool:
    if len(set(each)) > 1:
        pairs = list(zip(each, (original.name for original in flat.originals), strict=True))
        one, other = (next(original for kind, original in pairs if kind is wanted) for wanted in (True, False))
        raise ValueError(
            f"the flat parameter {name!r} of FSDP1 holds {one!r} and {other!r}, which differ in {by}: wrap the module "
            "with use_orig_params=True"
        )
    return each[0]
