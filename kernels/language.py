"""The language that rules are written in: the Triton subset that also runs on plain torch tensors.

A *rule* is a small pure function decorated with :func:`rule`. The Triton kernels call it on tiles; :func:`as_torch`
gives the same function on torch tensors, by rebinding the name ``tl`` (and the rules that it calls) to torch.
Without Triton installed, ``tl`` is the torch namespace and everything but the Triton kernels works.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["HAS_TRITON", "TORCH", "Rule", "as_torch", "fresh_function", "in_language", "jit", "rule", "tl"]


class _TorchLanguage:
    """The names of ``triton.language`` that rules may use, on torch tensors and 0-d tensors."""

    sqrt = staticmethod(torch.sqrt)
    abs = staticmethod(torch.abs)
    exp = staticmethod(torch.exp)
    log = staticmethod(torch.log)
    floor = staticmethod(torch.floor)
    static_range = staticmethod(range)
    int32, float32 = torch.int32, torch.float32
    instead: Mapping[Any, Callable[..., Any]] = types.MappingProxyType({})
    """Functions that take the place of rules."""

    @staticmethod
    def where(condition: torch.Tensor, x: Any, y: Any) -> torch.Tensor:
        return torch.where(condition, x, y)

    @staticmethod
    def minimum(x: torch.Tensor, y: Any) -> torch.Tensor:
        """Of what cannot be NaN, or may then be anything: see :func:`oput_dist.kernels.math.at_most` for the rest."""
        return torch.minimum(x, y) if isinstance(y, torch.Tensor) else x.clamp(max=y)

    @staticmethod
    def maximum(x: torch.Tensor, y: Any) -> torch.Tensor:
        """Likewise."""
        return torch.maximum(x, y) if isinstance(y, torch.Tensor) else x.clamp(min=y)

    @staticmethod
    def cast(x: torch.Tensor, dtype: torch.dtype, bitcast: bool) -> torch.Tensor:
        assert bitcast, "rules change dtypes with .to"
        return x.view(dtype)


TORCH = _TorchLanguage()


class _PlainRule:
    """Stands in for a Triton JIT function where Triton cannot be installed: holds the function, launches nothing."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.__name__ = fn.__name__
        self.__doc__ = fn.__doc__

    def __call__(self, *args: Any) -> Any:
        return as_torch(self)(*args)


try:
    import triton
    import triton.language as tl
    import triton.runtime.interpreter

    HAS_TRITON = True
    jit: Callable[..., Any] = triton.jit
    _RULE_TYPES: tuple[type, ...] = (triton.runtime.jit.JITFunction, triton.runtime.interpreter.InterpretedFunction)
except ImportError:  # no wheel for this platform: the torch backends remain
    HAS_TRITON = False
    tl = TORCH
    jit = _PlainRule
    _RULE_TYPES = (_PlainRule,)

Rule = Any  # a function decorated with @rule: a Triton JIT function, its interpreted form, or a _PlainRule


def rule(fn: Callable[..., Any]) -> Rule:
    """Mark a function as a rule: pure, in the subset of Triton that :class:`_TorchLanguage` also has.

    Example::

        @rule
        def sgd(p, g, state, h):
            return p - h.lr * g, state
    """
    fn.__globals__.setdefault("tl", tl)  # Triton's interpreter insists on it, even where a rule needs no function of it
    return jit(fn)


_known: dict[tuple[Rule, Any], Callable[..., Any]] = {}


def as_torch(a_rule: Rule) -> Callable[..., Any]:
    """The rule as a function of torch tensors (elementwise tensors for tiles, 0-d or 1-d tensors for scalars)."""
    return in_language(a_rule, TORCH)


def in_language(a_rule: Rule, language: Any) -> Callable[..., Any]:
    """The rule with another object for ``tl``, in the rules that it calls too."""
    key = (a_rule, language)
    if key not in _known:
        fn: types.FunctionType = a_rule.fn
        _known[key] = fresh_function(fn, {**fn.__globals__, **_rebound(fn, language)})
    return _known[key]


def _rebound(fn: types.FunctionType, language: Any) -> dict[str, Any]:
    """The globals that ``fn`` must see differently: the language, and other rules."""
    names = {name: fn.__globals__[name] for name in fn.__code__.co_names if name in fn.__globals__}
    rebound: dict[str, Any] = {
        name: language.instead.get(value) or in_language(value, language)
        for name, value in names.items()
        if isinstance(value, _RULE_TYPES)
    }
    if names.get("tl") is tl:
        rebound["tl"] = language
    return rebound


def fresh_function(fn: types.FunctionType, namespace: dict[str, Any] | None = None) -> Callable[..., Any]:
    """A copy of ``fn`` with a code object, and on request globals, of its own.

    torch.compile keeps its compiled variants, and their limit, per code object: functions made from one template must
    not share it. Dynamo also looks globals up through the module named by ``__name__``, so a changed namespace gets a
    module.
    """
    name = f"{fn.__name__}_{len(_made)}"
    if namespace is None:
        namespace = fn.__globals__
    else:
        module = types.ModuleType(f"oput_dist._torch_rules.{name}")
        module.__dict__.update({**namespace, "__name__": module.__name__})
        sys.modules[module.__name__] = module
        namespace = module.__dict__
    copy = types.FunctionType(fn.__code__.replace(co_name=name), namespace, name, fn.__defaults__, fn.__closure__)
    _made.append(copy)
    return copy


_made: list[types.FunctionType] = []  # keeps every name taken once
