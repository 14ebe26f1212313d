"""launch/train.py, run as a person runs it: curves, resuming, and what it says to bad input."""

import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from launch import data
from launch.errors import UsageError
from launch.model import GPT
from launch.options import parse
from launch.report import keep_rows
from launch.schedule import scale
from launch.train import main
from launch.world import World
from tests.pool import Pool
from tests.started import start, torchrun
from tests.test_recipes import train

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "launch" / "train.py"
SMALL = ["--width", "16", "--layers", "2", "--heads", "2", "--context", "16", "--batch-size", "8", "--threads", "1"]
SMALL += ["--eval-every", "4", "--eval-sequences", "5", "--data", str(ROOT / "launch")]
STEADY = [*SMALL, "--schedule", "constant", "--optimizer", "lamb", "--lr", "0.01", "--opt", "backend=foreach"]
CURVE = ("step", "loss", "lr", "val_loss")


def curve(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in CURVE if key in row} for row in rows]


def assert_close(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


# --- curves and resuming ---

STEPS = 32


@pytest.fixture(scope="module")
def uninterrupted(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On the ranks of the pool; what torchrun starts has the same numbers."""
    out = tmp_path_factory.mktemp("uninterrupted")
    pool.run(2, train, [*STEADY, "--parallel", "fsdp2", "--steps", str(STEPS), "--out", str(out)])
    return out


def test_resume_after_sigkill_continues_bitwise(pool: Pool, uninterrupted: Path, tmp_path: Path) -> None:
    saving = ["--checkpoint", tmp_path / "saved", "--checkpoint-every", 3, "--resume"]
    flags = [*STEADY, "--parallel", "fsdp2", "--steps", STEPS, "--out", tmp_path, *saving]
    moment = random.randrange(5, 16)
    ranks = torchrun(2, TRAIN, flags, tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) <= moment:
        assert all(rank.process.is_alive() for rank in ranks), "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for rank in ranks:
        rank.process.kill()
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2
    assert len(curve(tmp_path)) < STEPS, "it was too late to kill the run"
    (tmp_path / "saved" / ".incomplete").mkdir(exist_ok=True)  # as if killed while it was being written
    said, _ = pool.run(2, train, [*map(str, flags)])
    assert "continuing from" in said
    assert curve(tmp_path) == curve(uninterrupted)
    assert [p.name for p in (tmp_path / "saved").iterdir()] == [f"step-{STEPS:06d}"]


@pytest.mark.parametrize(("before", "after"), [((2, "fsdp2"), (1, "single")), ((1, "single"), (2, "zero1"))])
def test_another_number_of_ranks_continues_to_rounding(
    pool: Pool, uninterrupted: Path, tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    for (ranks, parallel), steps in ((before, STEPS // 2), (after, STEPS)):
        flags = ["--parallel", parallel, "--steps", steps, "--out", tmp_path, "--checkpoint", tmp_path / "saved"]
        pool.run(ranks, train, [*STEADY, *map(str, flags), "--resume"])
    wanted = curve(uninterrupted)
    assert_close(curve(tmp_path), wanted)
    assert wanted[-1]["val_loss"] < wanted[0]["val_loss"] - 0.2


@pytest.mark.parametrize(
    "kind",
    [
        ["--optimizer", "sophiag", "--wrap", "looksam", "lookahead", "ema", "--parallel", "fsdp2"],
        ["--optimizer", "muon", "--wrap", "sam", "--parallel", "zero1"],
    ],
    ids=["sophia", "sam"],
)
def test_what_wrappers_and_estimates_keep_continues_bitwise(pool: Pool, tmp_path: Path, kind: list[str]) -> None:
    """Estimates are due every 10 steps, slow weights meet every 5, the run is left at the 8th."""
    flags = [*SMALL, *kind, "--schedule", "constant", "--lr", "0.003", "--opt", "backend=foreach"]
    pool.run(2, train, [*flags, "--steps", "14", "--out", str(tmp_path / "whole")])
    saving = ["--out", str(tmp_path / "parts"), "--checkpoint", str(tmp_path / "saved"), "--resume"]
    for steps in ("8", "14"):
        pool.run(2, train, [*flags, "--steps", steps, *saving])
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_steps_are_those_of_a_plain_loop_of_torch(tmp_path: Path) -> None:
    flags = ["--optimizer", "adamw", "--lr", "0.01", "--opt", "weight_decay=0.1", "backend=foreach", "--clip", "0.5"]
    flags += ["--schedule", "constant", "--steps", "5", "--seed", "3", "--accumulate", "2", "--out", str(tmp_path)]
    assert main([*SMALL, *flags]) == 0
    text = data.read_corpus(ROOT / "launch", 16).train
    torch.manual_seed(3)
    model = GPT(16, 2, 2, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    losses = []
    for step in range(5):
        starts = data.sequence_starts(len(text), 16, 8, 3, step)
        windows = torch.stack([text[s : s + 17].long() for s in starts.tolist()])
        loss = F.cross_entropy(model(windows[:, :-1]).reshape(-1, 256), windows[:, 1:].reshape(-1))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    assert [row["loss"] for row in curve(tmp_path)[1:]] == pytest.approx(losses, rel=1e-5)


# --- parts ---


def test_schedules() -> None:
    for schedule in ("constant", "cosine", "flat-cosine"):
        assert [scale(schedule, s, 100, 4) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert scale("constant", 99, 100, 4) == 1.0
    assert [scale("cosine", s, 100, 0) for s in (0, 25, 50, 75, 100)] == pytest.approx(
        [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0]
    )
    assert scale("cosine", 52, 100, 4) == pytest.approx(0.5)
    assert [scale("flat-cosine", s, 100, 10) for s in (50, 70, 85, 100)] == pytest.approx([1, 1, 0.5, 0])
    assert scale("flat-cosine", 95, 100, 90) == pytest.approx(0.5)


@pytest.mark.parametrize(("ranks", "parts"), [(1, 4), (2, 1), (2, 3), (3, 2), (4, 3)])
def test_all_ranks_together_see_the_batch_of_one(ranks: int, parts: int) -> None:
    starts = data.sequence_starts(1000, 32, 12 * ranks * parts, seed=5, step=9)
    pieces = [piece for rank in range(ranks) for piece in data.share(starts, rank, ranks, parts)]
    assert {len(piece) for piece in pieces} == {12}
    assert torch.equal(torch.cat(pieces), starts)
    assert 0 <= starts.min() <= starts.max() < 1000 - 32


def test_batches_differ_by_step_and_seed_and_nothing_else() -> None:
    batches = {(seed, step): data.sequence_starts(10**6, 32, 8, seed, step) for seed in range(3) for step in range(3)}
    assert len({tuple(batch.tolist()) for batch in batches.values()}) == 9
    torch.manual_seed(1)
    assert torch.equal(data.sequence_starts(10**6, 32, 8, 2, 1), batches[2, 1])


def test_corpus_is_all_text_below_a_folder(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": b"b" * 300,
        "deep/er/a.md": "ä".encode() * 150,
        "image.png": b"\x89PNG\xff" * 100,
        "zeros.txt": b"\0" * 100,
        ".hidden": b"h" * 100,
        ".git/config": b"g" * 100,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    corpus = data.read_corpus(tmp_path, 64)
    whole = bytes(torch.cat([corpus.train, corpus.held_out]).tolist())
    assert len(corpus.held_out) == 65
    assert sorted(whole) == sorted(b"b" * 300 + "ä".encode() * 150)
    assert data.read_corpus(tmp_path, 64).digest == corpus.digest
    assert "ä".encode() * 150 in whole


def test_unfinished_rows_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4}\n{"st')
    assert keep_rows(path, 9) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4}]
    assert keep_rows(path, 2) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert keep_rows(path, -1) == []


# --- bad input ---


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--optimizer lam", r"lam.*[Ll]amb"),
        ("--optimizer ranger --wrap lookahead", r"--wrap lookahead: Lookahead cannot wrap Ranger, which keeps slow"),
        ("--wrap sam asam", r"--wrap asam: ASAM: the optimizer is wrapped by"),
        ("--optimizer sophiah", r"cannot be differentiated twice.*product=.difference"),
        ("--optimizer adamw --opt beta=0.9", r"AdamW .*'beta'.*'betas'"),
        ("--optimizer adamw --opt betas=0.9", r"AdamW: betas=0.9 .*2 numbers in \[0, 1\)"),
        ("--optimizer adamw --opt eps=-1", r"AdamW: eps=-1 .*>"),
        ("--optimizer adamw --opt amsgrad=yes", r"AdamW: amsgrad='yes' .*True or False"),
        ("--optimizer adamw --opt state_dtype=int7", r"state_dtype='int7'.*'int8'"),
        ("--opt lr=1", r"--opt lr .*--lr"),
        ("--opt eps", r"'eps' is not of the form key=value"),
        ("--opt eps=1 eps=2", r"--opt sets eps twice"),
        ("--lr nan", r"--lr: 'nan' is not a finite number of at least 0"),
        ("--clip -1", r"--clip: '-1' is not"),
        ("--steps 0", r"--steps: '0' is not a whole number of at least 1"),
        ("--width 10 --heads 4", r"--width 10 is not a multiple of --heads 4"),
        ("--batch-size 10 --accumulate 4", r"--batch-size 10 .* 1 rank.* 4 micro-batch.*use 8 or 12"),
        ("--warmup 9 --steps 9", r"--warmup 9 must be less than --steps 9"),
        ("--resume", r"need --checkpoint DIR"),
        ("--schedule linear", r"'linear' .*flat-cosine"),
        ("--parallel zero3", r"'zero3' .*fsdp2"),
        ("--step 3", r"unrecognized arguments: --step 3"),
        ("--data /no/such/folder", r"--data /no/such/folder is not a folder"),
        ("--out /dev/null/here", r"/dev/null/here cannot be written"),
        ("--checkpoint /dev/null/here", r"/dev/null/here cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(flags: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *flags.split()]) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(f"train.py: [^\n]*{sentence}[^\n]*\n", message), message


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds 0 bytes of text; --context 64 needs at least 130"):
        data.read_corpus(tmp_path, 64)
    (tmp_path / "a.txt").write_text("a" * 129)
    with pytest.raises(UsageError, match="holds 129 bytes"):
        data.read_corpus(tmp_path, 64)
    (tmp_path / "b.txt").write_text("b")
    assert len(data.read_corpus(tmp_path, 64).train) == 65


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--parallel", "single"], "--parallel single is for one rank, not 3; use ddp, zero1 or fsdp2"),
        (["--batch-size", "16", "--accumulate", "2"], r"16 .* 3 rank\(s\) times 2 .* use 12 or 18"),
        (["--batch-size", "2"], "use 3"),
    ],
)
def test_what_does_not_fit_the_ranks(flags: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse(flags, World(rank=1, size=3, local_rank=1, local_size=3))


def test_two_ranks_print_the_sentence_once_and_end_with_2() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(TRAIN), *SMALL, "--batch-size", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.stderr.count("train.py: --batch-size 5 cannot be divided over 2 rank(s)") == 1
    assert re.search(r"exitcode +: 2 ", done.stderr)
    assert f'File "{TRAIN}"' not in done.stderr


def test_a_plain_process_ends_with_2(tmp_path: Path) -> None:
    process = start(TRAIN, ["--optimizer", "nonesuch"], tmp_path)
    assert process.wait() == 2
    assert re.fullmatch("train.py: [^\n]*nonesuch[^\n]*\n", process.complained)


# --- checkpoints that do not fit ---


@pytest.fixture(scope="module")
def adam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adam")
    assert main(adam_flags(folder)) == 0
    return folder


def adam_flags(folder: Path, *more: str) -> list[str]:
    flags = ["--optimizer", "adam", "--steps", "2", "--out", str(folder), "--checkpoint", str(folder / "saved")]
    return [*SMALL, *flags, "--opt", "backend=foreach", *more]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "step-000002 exists; continue it with --resume or give another --checkpoint folder"),
        (["--resume", "--width", "32"], "was written with --width 16, not 32"),
        (["--resume", "--optimizer", "adamw"], "was written with --optimizer Adam, not AdamW"),
        (["--resume", "--opt", "amsgrad=True"], "max_exp_avg_sq is absent there and float32.* in this run of Adam"),
        (["--resume", "--opt", "state_dtype=bfloat16"], r"is float32.* there and bfloat16.* in this run"),
    ],
)
def test_checkpoint_of_something_else(
    adam: Path, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in adam.rglob("*") if p.is_file()}
    assert main(adam_flags(adam, *more)) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(f"train.py: [^\n]*{sentence}[^\n]*\n", message), message
    assert {p: p.read_bytes() for p in adam.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("victim", ["run.json", "state/.metadata", "state/*.distcp"])
def test_damaged_checkpoint(adam: Path, tmp_path: Path, victim: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(adam, tmp_path, dirs_exist_ok=True)
    (path,) = (tmp_path / "saved" / "step-000002").glob(victim)
    path.write_bytes(path.read_bytes()[:100])
    assert main(adam_flags(tmp_path, "--resume")) == 2
    message = capsys.readouterr().err
    assert re.fullmatch("train.py: [^\n]*step-000002 is damaged [^\n]*\n", message), message


def test_failed_save_ends_all_ranks_and_leaves_the_last_good_one(adam: Path, tmp_path: Path) -> None:
    shutil.copytree(adam, tmp_path, dirs_exist_ok=True)
    (tmp_path / "saved" / ".incomplete").write_text("in the way")
    good = {p: p.read_bytes() for p in (tmp_path / "saved" / "step-000002").rglob("*") if p.is_file()}
    ranks = torchrun(2, TRAIN, adam_flags(tmp_path, "--resume", "--steps", "4"), tmp_path)
    assert [rank.wait() for rank in ranks] == [1, 1]
    said = "".join(rank.complained for rank in ranks)
    assert said.count("step-000004 could not be written (FileExistsError") == 1
    assert {p: p.read_bytes() for p in (tmp_path / "saved" / "step-000002").rglob("*") if p.is_file()} == good


def test_changed_options_win_over_the_checkpoint(
    adam: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(adam, tmp_path, dirs_exist_ok=True)
    still = ["--opt", "eps=1e30"]  # so large that the model stays as it is
    assert main(adam_flags(tmp_path, "--resume", "--steps", "3", *still)) == 0
    assert "with another opt, steps than before" in capsys.readouterr().out
    assert main(adam_flags(tmp_path, "--resume", "--steps", "4", *still, "--lr", "1")) == 0
    at_2, at_3, at_4 = (row["val_loss"] for row in curve(tmp_path)[2:])
    assert at_2 == at_3 == at_4
