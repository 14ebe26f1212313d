"""Lookahead, AdaGraft and averages under every layout, and in Triton's interpreter."""

from __future__ import annotations

from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import oput_dist as oput
from oput_dist.backends import interpreting
from oput_dist.wrappers.averaging import EMA, LAWA
from oput_dist.wrappers.graft import AdaGraft
from oput_dist.wrappers.lookahead import Lookahead
from tests import wrapping
from tests.pool import Pool
from tests.toy import largest_difference, parameters, walk


def test_every_layout_gives_what_one_process_gives_and_resumes(pool: Pool, tmp_path: Path) -> None:
    for ranks in (1, 2, 3, 4):
        pool.run(ranks, wrapping.save, ranks, str(tmp_path))
    for ranks in (1, 2, 3, 4):
        for faults in pool.run(ranks, wrapping.compared, ranks, str(tmp_path)):
            assert not faults, "\n".join(faults)


def ends(backend: str) -> list[Tensor]:
    """Where every rule takes part: parameters, and the averages in their place."""
    torch.set_num_threads(1)
    assert backend != "triton" or interpreting()
    values = []
    for scope in ("tensor", "global"):
        params = parameters()
        common: dict[str, Any] = {"backend": backend, "weight_decay": 0.0}
        graft: Any = AdaGraft(oput.SGD(params, lr=0.1, **common), oput.AdamW(params, **common), scope=scope)
        optimizer = LAWA(EMA(Lookahead(graft, k=2), decay=0.5), window=3, every=1)
        values += walk(optimizer, params, range(5))
        for each in (optimizer, optimizer.inner):
            with each.averaged():
                values += [p.detach().clone() for p in params]
    return values


def test_triton_kernels(interpreter: Executor) -> None:
    found = interpreter.submit(ends, "triton").result()
    wanted = ends("eager")
    assert largest_difference(found, wanted) <= 2e-6
