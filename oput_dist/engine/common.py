"""The keywords that all optimizers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["Common"]


class Common(TypedDict, total=False):
    """Keywords that every optimizer takes.

    - ``decouple_lr`` (bool, False): decay by ``lr / max_lr * weight_decay``, fully decoupled from the learning rate.
      Typical values of ``weight_decay`` are then 1e-5 to 1e-4.
    - ``max_lr`` (float > 0): the largest learning rate of the schedule; a group's own initial ``lr`` if not given.
    - ``maximize`` (bool, False): ascend.
    - ``cautious`` (bool, False): move only elements whose update agrees with the gradient, and those by as much more
      as they are fewer (https://arxiv.org/abs/2411.16085). One more packed all-reduce a step.
    - ``max_grad_norm`` (float > 0): clip the global gradient norm inside the update; gradients stay as they are.
    - ``backend`` (str): ``"triton"``, ``"compile"``, ``"foreach"`` or ``"eager"``; by default the fastest.
    - ``foreach``, ``triton`` (bool): True takes that backend, False rules it out.
    - ``skip_nonfinite`` (bool, False): leave parameters, state and counters as they are, on all ranks, when any rank's
      gradients hold NaN or infinity; :attr:`Optimizer.skipped` counts it. Each step then waits for the device.
    - ``model_group`` (ProcessGroup): over which different ranks hold different parameters (pipeline stages), so that
      sums over all parameters span it.
    - ``data_group`` (ProcessGroup): over which an optimizer that needs the loss averages it; by default all ranks.
    - ``shard_group`` (ProcessGroup): partition update and state of replicated parameters over it (ZeRO-1).
    - ``gradient_release`` (bool, False): allow :func:`oput_dist.prepare_for_gradient_release`, after which each
      parameter is updated in the backward pass, as soon as its gradient is final, and the gradient is freed.
    - ``module`` (nn.Module): the module of the parameters, where ``params`` is not the module itself: gives names, the
      shapes of what FSDP1 (``FullyShardedDataParallel``) flattened, and the replicas of DDP
      (``DistributedDataParallel``), over which Muon, Shampoo and SOAP then share their work.
    - ``state_dtype`` (torch.dtype, or ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"fp64"``): of the state; the parameter's
      own by default. Or ``"int8"``, ``"fp8"``, ``"int4"``: moving averages are kept as codes, in blocks of 256 elements
      (128 for int4) with a float32 scale each, 1.02 or 0.53 bytes an element; parameters of fewer than 4,096 elements
      and those of ``nn.Embedding`` keep float32, other state the parameter's dtype. Or a dict from names of state to
      any of these. Rules see float32, and parameters are updated by it, before it is coded again.
    - ``state_overrides`` (dict): the form of the state of some parameters, by class of their module or by a pattern of
      their qualified name; the last that fits counts. ``{nn.Embedding: "fp32", nn.EmbeddingBag: "fp32"}`` by default,
      where state is coded. Needs the module, or named parameters. Example: ``{"lm_head.*": "fp32"}``.
    - ``state_device`` (str): ``"cpu"`` keeps all state in the shape of parameters in pinned host memory, and brings it
      to the GPU range by range while others are updated there. Refused where all parameters are on the CPU.
    - ``kahan_sum`` (bool): keep what rounding to bfloat16 or float16 parameters loses, as one more state,
      ``kahan_comp``, and add it wherever they are read, so that also what is far smaller than they are adds up: updates
      and weight decay. By default it is kept; False leaves it out. Other parameters take no notice.
    - ``stochastic_rounding`` (bool, False): round bfloat16 and float16 parameters up or down at random, so that nothing
      is lost on average, in place of ``kahan_sum``: no state, 2 bytes per parameter of scratch. The bits follow from
      name, step and place of each element alone, in every layout.
    """

    decouple_lr: bool
    max_lr: float | None
    maximize: bool
    cautious: bool
    max_grad_norm: float | None
    foreach: bool | None
    triton: bool | None
    backend: str | None
    skip_nonfinite: bool
    model_group: dist.ProcessGroup | None
    data_group: dist.ProcessGroup | None
    shard_group: dist.ProcessGroup | None
    gradient_release: bool
    module: nn.Module | None
    state_dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None
    state_overrides: Mapping[type[nn.Module] | str, torch.dtype | str] | None
    state_device: str | torch.device | None
    kahan_sum: bool | None
    stochastic_rounding: bool
