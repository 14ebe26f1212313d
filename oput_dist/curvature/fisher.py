"""Estimates from squared gradients: Gauss-Newton-Bartlett, and the empirical Fisher."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from .context import Context, Outputs
from .estimator import Estimator, first_output
from .noise import key_of, uniform

__all__ = ["EmpiricalFisher", "GaussNewtonBartlett"]

_CHUNK = 2**22  # probabilities at once: bounds the temporaries


class _SquaredGradient(Estimator):
    """``B * g * g``, where ``g`` is the gradient of the mean of ``B`` losses over the global batch."""

    @abstractmethod
    def losses(self, output: Any, context: Context, before: int) -> tuple[torch.Tensor, int]:
        """``(sum, total)``: the sum of this rank's losses for one micro-batch, and how many it has on all ranks.

        Args:
            output: what the function returned.
            context: the context.
            before: losses in earlier micro-batches, on all ranks.
        """

    def estimate(self, context: Context, outputs: Outputs) -> dict[int, torch.Tensor]:
        first, count = 0, 0
        for output in outputs:
            with torch.enable_grad():
                total, n = self.losses(output(), context, count)
                first = first or n
                # Wrappers average over ranks. Scaled by the first micro-batch, since the others are not known yet.
                (total * (context.readers / max(first, 1))).backward()  # type: ignore[no-untyped-call]
            count += n
        factor = count * (first / max(count, 1)) ** 2
        return {index: g * g * factor for index, g in context.gradients().items()}


class GaussNewtonBartlett(_SquaredGradient):
    r"""The Gauss-Newton-Bartlett estimate, for models whose outputs are logits of classes.

    .. math::
        \hat h = B\, \hat g \odot \hat g, \qquad \hat g = \nabla \tfrac1B \sum_{b=1}^{B}
        \mathrm{CE}(f(x_b), \hat y_b), \qquad \hat y_b \sim \operatorname{softmax}(f(x_b))

    Its mean is the diagonal of the Gauss-Newton matrix, so it is never negative. It takes one forward and one backward
    pass; nothing is differentiated twice, so fused attention works, and FSDP. ``B`` counts the rows of logits in the
    global batch: tokens, for a language model.

    The function returns logits ``[..., classes]``; or ``(logits, keep)``, where ``keep``, ``[...]`` and boolean, says
    which rows count (padding does not). Labels are not needed.

    Args:
        seed: of the sampled labels. Default 0.

    Paper: Liu et al., https://arxiv.org/abs/2305.14342.
    """

    def losses(self, output: Any, context: Context, before: int) -> tuple[torch.Tensor, int]:
        logits, keep = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
        call = "optimizer.refresh(lambda: model(inputs))"
        logits = first_output(logits, "logits", call)
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        if logits.ndim < 2:
            raise TypeError(
                f"the function must return logits of shape [..., classes], but returned shape {tuple(logits.shape)} "
                f"(a loss, perhaps): {call}; labels are sampled from them"
            )
        if keep is not None and (keep.dtype is not torch.bool or keep.shape != logits.shape[:-1]):
            raise TypeError(
                f"keep must be boolean and of shape {tuple(logits.shape[:-1])}, as the rows of logits, but is "
                f"{keep.dtype} of shape {tuple(keep.shape)}: optimizer.refresh(lambda: (model(inputs), mask.bool()))"
            )
        rows = logits.reshape(-1, logits.shape[-1]) if keep is None else logits[keep]
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        lower, total = context.counts(len(rows))
        index = torch.arange(before + lower, before + lower + len(rows), device=rows.device)
        labels = sampled(rows.detach(), key_of(self.seed, context.number), index)
        return F.cross_entropy(rows, labels, reduction="sum"), total


class EmpiricalFisher(_SquaredGradient):
    r"""The squared gradient of the true labels, times the batch: a poor man's curvature, for any loss.

    .. math:: \hat h = B\, g \odot g, \qquad g = \nabla \tfrac1B \sum_b \ell_b

    The function returns losses that are not reduced: ``F.cross_entropy(..., reduction="none")``; ``B`` is how many
    there are in the global batch. Unlike :class:`GaussNewtonBartlett`, its mean is not the Hessian away from optima.
    """

    def losses(self, output: Any, context: Context, before: int) -> tuple[torch.Tensor, int]:
        call = 'optimizer.refresh(lambda: F.cross_entropy(model(inputs), labels, reduction="none"))'
        losses = first_output(output, "losses", call)
        if losses.ndim == 0:
            raise TypeError(f"the function must return losses that are not reduced, since their number counts: {call}")
        return losses.sum(), context.counts(losses.numel())[1]


@torch.no_grad()
def sampled(logits: torch.Tensor, key: int, index: torch.Tensor) -> torch.Tensor:
    """A class for each row of ``[rows, classes]``, drawn from its softmax by key and row index."""
    draws = uniform(key, index)
    rows = max(1, _CHUNK // logits.shape[-1])
    labels = []
    for start in range(0, len(logits), rows):
        heights = logits[start : start + rows].double().softmax(-1).cumsum(-1)
        aim = draws[start : start + rows].unsqueeze(-1) * heights[:, -1:]
        labels.append((heights < aim).sum(-1).clamp(max=logits.shape[-1] - 1))
    return torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64, device=logits.device)
