"""Casting a model to low precision, all but what needs more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from oput_dist.layout import clean_name, ddp_modules, flattened_in

from .listing import table

__all__ = ["to_low_precision"]

Modules = type[nn.Module] | Iterable[type[nn.Module]] | None
NamesOrModules = str | type[nn.Module] | Iterable[str | type[nn.Module]] | None

_LOW = (torch.bfloat16, torch.float16)


def to_low_precision(
    model: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    fp32_modules: Modules = nn.Embedding,
    fp32_buffers: NamesOrModules = ("rope", "rotary"),
    show: bool = False,
) -> nn.Module:
    """Cast a model in place to a low precision, but keep some modules and buffers in float32.

    Every floating-point parameter and buffer becomes ``dtype``, except parameters and buffers of ``fp32_modules``, and
    buffers of what ``fp32_buffers`` names. A parameter that several modules share is kept if any of them is. Parameters
    stay the same objects, so that an optimizer that has them keeps them.

    Args:
        model: the module, not wrapped by DDP or FSDP yet: they lay out memory by dtype. ``torch.compile`` may be there.
        dtype: ``torch.bfloat16`` or ``torch.float16``. Default bfloat16.
        device: where to move everything. Default: nowhere.
        fp32_modules: classes of modules to keep, or None; what is given replaces the default, ``nn.Embedding``.
        fp32_buffers: words, in any case, that the qualified names of modules contain whose buffers are kept; or
            classes of modules; or both. Default ``("rope", "rotary")``.
        show: print the dtype of every parameter and buffer.

    Returns:
        the model.

    Raises:
        TypeError, ValueError: for another dtype, for what is no class of modules, for a wrapped model; nothing has
            changed then.

    Example::

        model = oput.to_low_precision(model, fp32_modules=(torch.nn.Embedding, torch.nn.LayerNorm))
    """
    if dtype not in _LOW:
        raise ValueError(
            f"to_low_precision: dtype={dtype!r} is not allowed: must be one of {', '.join(map(str, _LOW))}"
        )
    classes, _ = _sorted("fp32_modules", fp32_modules, words_too=False)
    buffer_classes, words = _sorted("fp32_buffers", fp32_buffers, words_too=True)
    if ddp_modules(model) or flattened_in(model) or any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError(
            "to_low_precision: the model is wrapped already (DistributedDataParallel, FSDP or DTensors), which laid "
            "out its memory by dtype: call to_low_precision first, and wrap the model then"
        )
    kept = _kept(model, classes, buffer_classes, words)
    rows = []
    for name, p in model.named_parameters():
        wanted = _wanted(p, dtype, kept)
        rows.append((clean_name(name), "parameter", wanted))
        p.data = p.data.to(dtype=wanted, device=device)
        if p.grad is not None:
            p.grad.data = p.grad.data.to(dtype=wanted, device=device)
    cast: dict[int, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            wanted = _wanted(buffer, dtype, kept)
            rows.append((clean_name(f"{prefix}.{leaf}" if prefix else leaf), "buffer", wanted))
            module._buffers[leaf] = cast.setdefault(id(buffer), buffer.to(dtype=wanted, device=device))
    if show:
        print(table(("name", "", "dtype"), [(*names, str(kind).removeprefix("torch.")) for *names, kind in rows]))
    return model


def _kept(
    model: nn.Module,
    classes: tuple[type[nn.Module], ...],
    buffer_classes: tuple[type[nn.Module], ...],
    words: tuple[str, ...],
) -> set[int]:
    """The tensors to keep, by id: all of those that some module keeps, under any of its names."""
    kept: set[int] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        name = clean_name(f"{prefix}.").lower()
        whole = isinstance(module, classes)
        if whole:
            kept.update(id(p) for p in module.parameters(recurse=False))
        if whole or isinstance(module, buffer_classes) or any(word in name for word in words):
            kept.update(id(b) for b in module.buffers(recurse=False))
    return kept


def _wanted(tensor: torch.Tensor, dtype: torch.dtype, kept: set[int]) -> torch.dtype:
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if id(tensor) in kept else dtype


def _sorted(name: str, given: Any, words_too: bool) -> tuple[tuple[type[nn.Module], ...], tuple[str, ...]]:
    entries = () if given is None else (given,) if isinstance(given, (str, type)) else tuple(given)
    words = tuple(entry.lower() for entry in entries if isinstance(entry, str) and words_too)
    classes = tuple(entry for entry in entries if isinstance(entry, type) and issubclass(entry, nn.Module))
    if len(words) + len(classes) < len(entries):
        allowed = "a class of modules, or a word" if words_too else "a class of modules"
        raise TypeError(f"to_low_precision: {name}={given!r} is not allowed: each must be {allowed}")
    return classes, words
