"""The comparisons of whole-matrix optimizers run: with other libraries, and in training."""

from __future__ import annotations

import time

import torch

from benchmarks import preconditioned, race
from launch.data import read_corpus


def test_a_short_race_is_written_down() -> None:
    corpus = read_corpus(None, race.SIZE.context)
    first, again = (race.run("SOAP", 3e-3, 1, 40, corpus) for _ in range(2))
    assert first.losses == again.losses  # everything follows from the seed
    assert first.losses[-1] < first.losses[0] - 0.5
    assert race.reached([first], first.losses[1]) == (20, first.seconds[1])
    assert race.reached([first], 0.0) is None


def test_contenders_take_turns() -> None:
    threads = torch.get_num_threads()
    names = ("oput", "pytorch_optimizer")
    contenders = {name: preconditioned.CONTENDERS["soap"][name] for name in names}
    found = preconditioned.compare(contenders, [(12, 8), (8, 8)], 2, time.perf_counter)
    assert [len(turn) for turns in found.values() for turn in turns] == [
        preconditioned.PERIODS * preconditioned.EVERY
    ] * 4
    line = preconditioned.row("oput", found["oput"], found["oput"])
    assert line["times ours"] == 1.0
    assert 0 < line["median"] <= line["p99"]
    assert torch.get_num_threads() == threads
