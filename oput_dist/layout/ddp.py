"""``DistributedDataParallel``: who gets the gradients that it has averaged, bucket by bucket."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Reduction", "ddp_modules", "replicated_by_ddp", "why_not_by_bucket"]

Receiver = Callable[[Sequence[torch.Tensor]], None]
"""Called with parameters whose ``grad`` is final; may free it."""

_KEPT = "_oput_reduction"
"""The attribute of a module that holds its :class:`Reduction`: they go together."""


def ddp_modules(module: nn.Module) -> list[DistributedDataParallel]:
    """All ``DistributedDataParallel`` in a module, itself among them."""
    return [child for child in module.modules() if isinstance(child, DistributedDataParallel)]


def replicated_by_ddp(module: nn.Module) -> dict[torch.Tensor, dist.ProcessGroup]:
    """The parameters in a module whose gradients DDP averages, each with the ranks that hold it: more than this one."""
    return {
        parameter: ddp.process_group
        for ddp in ddp_modules(module)
        if dist.get_world_size(ddp.process_group) > 1
        for name, parameter in ddp.module.named_parameters()
        if name not in ddp.parameters_to_ignore
    }


def why_not_by_bucket(ddp: DistributedDataParallel) -> str | None:
    """Why the gradients of its buckets cannot be taken over as they become ready, and what to do; None if they can."""
    for name, what in (("find_unused_parameters", "parameters without a gradient"), ("static_graph", "a static graph")):
        if getattr(ddp, name, False):
            return f"{name}=True: only at the end of the pass does DDP know of {what}; leave it out"
    if getattr(ddp, "mixed_precision", None) is not None:
        return "mixed_precision: its gradients are not those of the parameters; cast with torch.autocast instead"
    if getattr(ddp, "_delay_all_reduce_params", None):
        return "delay_all_reduce_named_params: leave it out"
    if getattr(ddp, _KEPT, None) is None and getattr(ddp, "_comm_hooks", None):
        return "a communication hook is registered already: leave it out"
    return None


class Reduction:
    """Averages the gradients of a ``DistributedDataParallel`` and gives each bucket to a receiver at once.

    Gradients are the same to the bit as without, where each pass begins without gradients: each rank's times one over
    the number of ranks, then summed. DDP cannot be given another communication hook later; without a receiver this one
    leaves gradients where DDP itself would.

    Attributes:
        receiver: who gets the parameters of a bucket; None for nobody.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.receiver: Receiver | None = None
        self._ddp = weakref.ref(ddp)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        ddp.register_comm_hook(self, _reduce)
        ddp.reducer._set_optimizer_in_backward()  # type: ignore[attr-defined]  # it shall not copy buckets to gradients at the end

    @classmethod
    def of(cls, ddp: DistributedDataParallel) -> Reduction:
        """That of a module, made if it has none yet; see :func:`why_not_by_bucket`."""
        known: Reduction | None = getattr(ddp, _KEPT, None)
        if known is None:
            known = cls(ddp)
            setattr(ddp, _KEPT, known)
        return known

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the module reduces as any other."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """What DDP calls for each bucket, in the same order on all ranks."""
        buffer = bucket.buffer()
        if buffer.is_cuda:
            side = self._streams.setdefault(buffer.device, torch.cuda.Stream(buffer.device))  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(buffer.device))
            with torch.cuda.stream(side):
                self._reduce(bucket, buffer)
            main = torch.cuda.current_stream(buffer.device)
            _at_the_end(lambda: main.wait_stream(side))
        else:
            self._reduce(bucket, buffer)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done

    def _reduce(self, bucket: dist.GradBucket, buffer: torch.Tensor) -> None:
        ddp = self._ddp()
        assert ddp is not None
        group = ddp.process_group
        buffer.mul_(1.0 / dist.get_world_size(group))
        dist.all_reduce(buffer, group=group)
        parameters, gradients = bucket.parameters(), bucket.gradients()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if self.receiver is not None or ddp.gradient_as_bucket_view:
                parameter.grad = gradient
            elif parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad.copy_(gradient)
        if self.receiver is not None:
            self.receiver(parameters)
            for parameter in parameters:  # what the receiver left: DDP's buckets are not for keeping
                if parameter.grad is not None and not ddp.gradient_as_bucket_view:
                    parameter.grad = parameter.grad.clone()


def _reduce(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
    return state.reduce(bucket)


def _at_the_end(work: Callable[[], None]) -> None:
    """Run something when the backward pass ends."""
    torch.autograd.Variable._execution_engine.queue_callback(work)
