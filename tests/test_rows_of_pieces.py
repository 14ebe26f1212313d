"""Pieces that lie together are summed over, and scaled, in one loop of rows: what each gets is its own."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import nn

import oput_dist as oput
from oput_dist.backends import Batch, Scalars, backend
from oput_dist.backends.rows import ROW, Rows, parted
from oput_dist.backends.torchlike import Compile
from oput_dist.kernels.stage import Prologue
from tests.deepspeed_worlds import enter
from tests.pool import Pool

SIZES = (9 * ROW + 3, 1, 700, 8 * ROW - 704, 20 * ROW, 5, ROW + 77, 7 * ROW)
"""The fourth ends where a row does, and so does the fifth; the run ends inside of one."""


def columns(seed: int, count: int) -> list[list[torch.Tensor]]:
    made = torch.Generator().manual_seed(seed)
    return [list(torch.rand(sum(SIZES), generator=made).split(SIZES)) for _ in range(count)]


def lamb_batch(every: list[list[torch.Tensor]]) -> Batch:
    optimizer = oput.Lamb([torch.zeros(1)], lr=0.1, weight_decay=0.01)
    group = optimizer.param_groups[0]
    rows = [(1.0, *optimizer.scalars(group, 1)), (1.0, *optimizer.scalars({**group, "lr": 0.3}, 5))]
    p, g, m, v = every
    which = [int(i >= 5) for i in range(len(SIZES))]
    scalars = Scalars(type(optimizer.scalars(group, 1)), rows, which, torch.device("cpu"))
    return Batch(p, g, list(zip(m, v, strict=True)), scalars, Prologue())


def test_every_element_is_in_one_row_or_one_part() -> None:
    """Summing ones gives sizes, whatever was cut."""
    run = Rows(range(len(SIZES)), SIZES)
    assert run.worthwhile
    ends = {end // ROW for end in accumulate(SIZES) if end % ROW}
    assert len({end for end in ends if end < run.count}) == run.count - len(run._whole)
    sums = run.by_piece([torch.full((run.count, 1), float(ROW), dtype=torch.float64)])[:, 0]
    assert (sums + torch.zeros_like(sums).index_add(0, run.pieces, run.lengths.double())).tolist() == list(SIZES)


def test_what_does_not_lie_together_is_left() -> None:
    """Neither is what has other scalars, nor a run too short."""
    every = columns(0, 4)
    every[1][4] = every[1][4].clone()
    runs, rest, left = parted(lamb_batch(every))
    assert [run.indices for run in runs] == [[0, 1, 2, 3]]
    assert left == [4, 5, 6, 7]
    assert rest is not None
    assert [p.numel() for p in rest.p] == list(SIZES[4:])


def test_many_edges_are_not_worth_it() -> None:
    assert not Rows(range(100), [ROW // 2 + 1] * 100).worthwhile


@pytest.mark.parametrize("apart", [None, 4], ids=["one run", "two parts"])
def test_values_are_those_of_the_pieces(apart: int | None) -> None:
    """Both stages of Lamb, on pieces of two groups, against the plain loop over pieces."""
    together, alone = columns(0, 4), [[t.clone() for t in column] for column in columns(0, 4)]
    if apart is not None:
        together[1][apart] = together[1][apart].clone()
    optimizer = oput.Lamb([torch.zeros(1)], lr=0.1)
    first, second = optimizer.recipe(optimizer.param_groups[0], torch.Size((1,))).stages
    results = []
    for name, every in (("compile", together), ("eager", alone)):
        sums = backend(name).run(first, lamb_batch(every), None)
        assert sums is not None
        table = torch.cat([sums, torch.tensor(SIZES, dtype=torch.float64).unsqueeze(1)], 1)
        assert backend(name).run(second, lamb_batch(every), table) is None
        results.append(sums)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)
    for got, wanted in zip(together, alone, strict=True):
        for i, (one, other) in enumerate(zip(got, wanted, strict=True)):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7, msg=lambda m, i=i: f"piece {i}: {m}")


# --------------------------------------------------------------------------------------------------------- DeepSpeed's

SHAPES = ((300, 513), (513,), (77,), (401, 300), (3,), (65, 1000), (100,))
RULES: dict[str, dict[str, Any]] = {"Lamb": {"weight_decay": 0.01, "cautious": True}, "StableAdamW": {}}


def given(step: int) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=made) * 0.01 for shape in SHAPES]


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(start) for start in given(100)])

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(w * g).sum() for w, g in zip(self.weights, gradients, strict=True)]).sum()


def offloaded(name: str, stage: int) -> tuple[int, list[float]]:
    """Loops of rows that this rank made, and how far each parameter is from that of one process, of its way."""
    deepspeed = enter()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
        "optimizer": {"type": f"oput.{name}", "params": {"lr": 0.01, "backend": "compile", **RULES[name]}},
    }
    model, loops = Weights(), 0
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    alone = [start.requires_grad_() for start in given(100)]
    optimizer = oput.create(name, alone, lr=0.01, backend="eager", **RULES[name])
    by_rows = Compile._run_rows

    def counted(*args: Any) -> None:
        nonlocal loops
        loops += 1
        by_rows(*args)

    Compile._run_rows = counted  # type: ignore[method-assign]
    try:
        for step in range(3):
            engine.backward(engine(given(step)))
            engine.step()
            for p, g in zip(alone, given(step), strict=True):
                p.grad = g
            optimizer.step()
    finally:
        Compile._run_rows = by_rows  # type: ignore[method-assign]
    whole = [deepspeed.utils.safe_get_full_fp32_param(w) for w in model.weights]
    return loops, [
        float((one.view_as(p) - p.detach()).norm() / (p.detach() - start).norm())
        for one, p, start in zip(whole, alone, given(100), strict=True)
    ]


@pytest.mark.parametrize(("name", "stage"), [("Lamb", 2), ("StableAdamW", 3)])
def test_offloaded_partitions_follow_one_process(pool: Pool, name: str, stage: int) -> None:
    for loops, errors in pool.run(2, offloaded, name, stage, timeout=240.0):
        assert loops >= 6
        assert max(errors) <= 1e-6, errors
