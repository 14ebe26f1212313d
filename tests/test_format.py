"""State dicts of earlier releases load, and training goes on as it then did.

``python -m tests.test_format`` writes the fixture of the present format, tests/fixtures/format<N>.pt, once per format:
state dicts of a few optimizers after three steps, the parameters then, and those after three more steps.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import oput_dist as oput
from oput_dist.engine.saved import FORMAT, FORMAT_KEY
from tests.toy import largest_difference, make, parameters, walk

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("format*.pt"))
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "adamw bf16 state": ("adamw", {"state_dtype": torch.bfloat16}),
    "adan": ("adan", {}),
    "lamb decoupled": ("lamb", {"decouple_lr": True}),
    "adafactor": ("adafactor", {}),
}


def fixture() -> dict[str, Any]:
    made = {}
    for case, (name, options) in CASES.items():
        params = parameters()
        optimizer = make(name, params, **options)
        before = walk(optimizer, params, range(3))
        saved = io.BytesIO()  # a copy, since the state goes on changing
        torch.save(optimizer.state_dict(), saved)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        made[case] = {"state": state, "before": before, "after": walk(optimizer, params, range(3, 6))}
    return made


def test_there_is_a_fixture_of_every_format() -> None:
    assert [path.name for path in FIXTURES] == [f"format{i}.pt" for i in range(1, FORMAT + 1)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_training_goes_on_from_an_earlier_release(path: Path, case: str) -> None:
    stored = torch.load(path, weights_only=True)[case]
    name, options = CASES[case]
    params = [nn.Parameter(value.clone()) for value in stored["before"]]
    optimizer = make(name, params, **{**options, "lr": 9.0})
    optimizer.load_state_dict(stored["state"])
    found = walk(optimizer, params, range(3, 6))
    assert largest_difference(found, stored["after"]) <= 1e-6  # processors differ in the last bits
    assert largest_difference(stored["before"], stored["after"]) > 1e-2
    if "state_dtype" in options:
        assert {v.dtype for s in optimizer.state.values() for k, v in s.items() if k != "step"} == {torch.bfloat16}


def test_a_newer_format_is_refused_before_anything_changes() -> None:
    params = parameters()
    optimizer = make("adamw", params)
    walk(optimizer, params, range(2))
    newer = optimizer.state_dict()
    for group in newer["param_groups"]:
        group[FORMAT_KEY] = FORMAT + 1
    fresh = oput.AdamW(parameters())
    with pytest.raises(ValueError, match="upgrade oput_dist"):
        fresh.load_state_dict(newer)
    assert not fresh.state


if __name__ == "__main__":
    torch.save(fixture(), Path(__file__).parent / "fixtures" / f"format{FORMAT}.pt")
