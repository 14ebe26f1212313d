"""Text as bytes: the corpus, its held-out part, and batches that are a pure function of the seed and the step."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from launch.errors import UsageError

STDLIB_BYTES = 8 << 20  # as much of the standard library as is read
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # uint8, one dimension
    held_out: Tensor  # uint8, one dimension
    digest: str  # of all bytes, to tell whether two ranks or two runs read the same text
    source: str  # in words


def read_corpus(folder: Path | None, context: int) -> Corpus:
    """The text below `folder`, or of Python's standard library; the last twentieth is held out.

    Files come in the order of a hash of their names, so that the held-out files are a fair sample.
    """
    if folder is None:
        root, source = Path(sysconfig.get_paths()["stdlib"]), "Python's standard library"
        text = _join(root, limit=STDLIB_BYTES, python=True)
    else:
        if not folder.is_dir():
            raise UsageError(f"--data {folder} is not a folder; give one that holds text files")
        root, source = folder, str(folder)
        text = _join(root, limit=None, python=False)
    held_out = max(len(text) // 20, context + 1)
    if len(text) < held_out + context + 1:
        raise UsageError(
            f"{root} holds {len(text)} bytes of text; --context {context} needs at least {2 * (context + 1)} bytes"
        )
    data = torch.frombuffer(text, dtype=torch.uint8)
    return Corpus(data[:-held_out], data[-held_out:], hashlib.sha256(text).hexdigest(), source)


def _join(root: Path, limit: int | None, python: bool) -> bytearray:
    text = bytearray()
    for name in sorted(_names(root, python), key=lambda name: hashlib.sha256(name.encode()).digest()):
        content = (root / name).read_bytes()
        if _is_text(content):
            text += content
        if limit is not None and len(text) >= limit:
            return text[:limit]
    return text


def _names(root: Path, python: bool) -> Iterator[str]:
    """Paths below `root`, without hidden ones, and for `python` only the library's own modules."""
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and not (python and f in NOT_STDLIB)]
        for file in files:
            path = Path(folder, file)
            if not file.startswith(".") and (path.suffix == ".py" or not python) and path.is_file():
                yield path.relative_to(root).as_posix()


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def sequence_starts(length: int, context: int, batch: int, seed: int, step: int) -> Tensor:
    """Where the `batch` sequences of 0-based step `step` start in a text of `length` bytes."""
    key = hashlib.sha256(f"{seed} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big", signed=True))
    return torch.randint(length - context, (batch,), generator=generator)


def sequences(text: Tensor, starts: Tensor, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The inputs and the targets, one byte later, of the sequences at `starts`: two (len(starts), context) tensors."""
    window = text[starts[:, None] + torch.arange(context + 1)].long()
    if device.type == "cuda":  # pinned, so that the copy does not make the host wait
        window = window.pin_memory().to(device, non_blocking=True)
    return window[:, :-1], window[:, 1:]


def share(items: Tensor, rank: int, ranks: int, parts: int) -> list[Tensor]:
    """Rank `rank`'s share of one global batch, as `parts` micro-batches."""
    return list(items.chunk(ranks)[rank].chunk(parts))
