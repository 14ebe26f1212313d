"""The benchmarks of low precision: what they train, the page that they write, and what they time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import coded, precision
from benchmarks.timing import even, measure
from benchmarks.training import Size


def test_the_page_has_every_setting_and_a_broken_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(precision, "DEMO", Size(width=16, layers=1, heads=2, context=16, batch=2))
    monkeypatch.setattr(precision, "STEPS", {"parameters": 10, "state": 10})
    monkeypatch.setattr(precision, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr("sys.argv", ["precision", "--out", str(tmp_path / "runs")])
    precision.main()
    page = (tmp_path / "page.md").read_text()
    assert page.count("| `adamw` |") == 4 + 2 + 2
    assert len(list((tmp_path / "runs").glob("*.json"))) == len(precision.SETTINGS)
    capsys.readouterr()
    next((tmp_path / "runs").glob("state-lion-*")).unlink()
    precision.main()
    assert capsys.readouterr().out.count("lion") == 1
    assert (tmp_path / "page.md").read_text() == page
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)


def test_forms_of_state_take_turns() -> None:
    wanted = [coded.candidate("lion", form, "foreach") for form in coded.FORMS]
    timings = measure(wanted, even("some", 20_000, 2), torch.device("cpu"), torch.float32, rounds=1)
    assert [timing.error for timing in timings] == [""] * len(coded.FORMS)
    assert all(timing.median > 0 for timing in timings)
