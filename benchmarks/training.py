"""A small byte-level GPT trained once: what the benchmarks that compare losses share."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from launch.data import Corpus, sequence_starts, sequences
from launch.model import GPT

__all__ = ["Run", "Size", "train"]


@dataclass(frozen=True)
class Size:
    """Of the model and of a batch."""

    width: int
    layers: int
    heads: int
    context: int
    batch: int

    def model(self) -> GPT:
        """A model whose parameters follow from torch's seed."""
        return GPT(self.width, self.layers, self.heads, self.context)


@dataclass(frozen=True)
class Run:
    """Held-out losses of one run, with the steps and seconds of training until each."""

    steps: list[int]
    losses: list[float]
    seconds: list[float]


def train(
    size: Size,
    make: Callable[[GPT], torch.optim.Optimizer],
    seed: int,
    steps: int,
    corpus: Corpus,
    every: int,
) -> Run:
    """Train once; the model, the batches and their order follow from the seed alone.

    The learning rate warms up for a tenth of the steps and falls to zero along a cosine.

    Args:
        size: of model and batch.
        make: the optimizer of a model, which it may cast first.
        seed: see above.
        steps: of training.
        corpus: the text.
        every: steps between looks at the held-out text, in float32 whatever the model is in.
    """
    torch.manual_seed(seed)
    model = size.model()
    optimizer = make(model)
    warmup = steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(i - warmup, 0) / (steps - warmup))),
    )
    found = Run([0], [_held_out(model, size, corpus)], [0.0])
    spent = 0.0
    for step in range(steps):
        start = time.process_time()
        inputs, targets = _batch(corpus.train, size, seed, step)
        F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        spent += time.process_time() - start
        if (step + 1) % every == 0:
            found.steps.append(step + 1)
            found.losses.append(_held_out(model, size, corpus))
            found.seconds.append(spent)
    return found


def _batch(text: torch.Tensor, size: Size, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts = sequence_starts(len(text), size.context, size.batch, seed, step)
    return sequences(text, starts, size.context, torch.device("cpu"))


@torch.no_grad()
def _held_out(model: GPT, size: Size, corpus: Corpus) -> float:
    """The mean loss of 16 fixed batches of the held-out text, of the parameters in float32."""
    twin = size.model()
    twin.load_state_dict(model.state_dict())
    losses = []
    for number in range(16):
        inputs, targets = _batch(corpus.held_out, size, 12345, number)
        losses.append(F.cross_entropy(twin(inputs).flatten(0, 1), targets.flatten()).item())
    return statistics.mean(losses)
