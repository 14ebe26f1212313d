"""Writes docs/optimizers.md, the table of all optimizers, from the classes, their docstrings and measured losses.

python -m benchmarks.catalogue
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch

import oput_dist as oput
from oput_dist import wrappers
from oput_dist.optimizers import OPTIMIZERS, PRESETS

from .guide import guide, prose
from .starts import OUT as STARTS

__all__ = ["OUT", "text"]

OUT = Path(__file__).resolve().parents[1] / "docs" / "optimizers.md"
WRAPPERS = sorted(
    (cls for cls in vars(wrappers).values() if isinstance(cls, type) and issubclass(cls, oput.Wrapper)),
    key=lambda cls: cls.__name__.lower(),
)
NEEDED = {"Ranger21": {"num_iterations": 200}}
SIZE = 256
HEAD = """# Optimizers

{count} optimizers, each a rule in its own file, run by every backend and under every sharding. This page is written by
`python -m benchmarks.catalogue` from the classes themselves; each class's docstring has the rule and all arguments.

- **class**: what an update must know of the whole: E nothing (elementwise), N sums over each parameter, R sums over its
  rows or columns, G sums over the whole model, M whole matrices, each worked on by one rank.
- **state**: bytes per fp32 parameter of a matrix ({size} x {size}); of a vector, where that differs.
- **all-reduces**: a step's, for matrices and vectors together, whatever their number. `max_grad_norm` and `cautious`
  add one each, `shard_group` the gather of updated rows.
- **loss**: of the demo's GPT (0.87 M parameters) in nats per byte, mean of the first and the last ten of {steps} steps
  from the starting point below, 20 steps of warm-up and then a constant learning rate: `python -m benchmarks.starts`.
  None was tuned: it shows that the starting point trains, not which optimizer is best.

| name | class | state | all-reduces | loss | paper |
| --- | --- | --- | --- | --- | --- |
"""


def text() -> str:
    """The page."""
    results = json.loads(STARTS.read_text())
    losses = {row["optimizer"]: f"{row['first']:.2f} to {row['last']:.2f}" for row in results["rows"]}
    names = [cls.__name__ for cls in OPTIMIZERS.values()]
    lines = [HEAD.format(count=len(names), size=SIZE, steps=results["about"]["steps"]).rstrip("\n")]
    for cls in OPTIMIZERS.values():
        about = guide(cls)
        letters = re.match(r"[ENRGM](?:(?: and |, )[ENRGM])*", about.sharding)
        assert letters, about.sharding
        cells = (
            f"`{cls.__name__}`",
            letters.group().replace(" and ", ", "),
            _state(cls),
            str(_all_reduces(cls)),
            losses.get(cls.__name__, "not run"),
            _linked(about.paper),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## When to use which, and where to start",
        "",
        "| name | when | start | defaults |",
        "| --- | --- | --- | --- |",
    ]
    for cls in OPTIMIZERS.values():
        about = guide(cls)
        start = ", ".join(f"`{key}={value!r}`" for key, value in about.start.items())
        lines.append(f"| `{cls.__name__}` | {about.when} | {start} | {_defaults(cls)} |")
    lines += [
        "",
        "## Around any optimizer",
        "",
        "Each wraps any optimizer of this library or of torch, or another wrapper, and is an optimizer itself: one "
        "set of parameter groups, one state dict, the same under every sharding.",
        "",
        "| name | what it does | when | start | paper |",
        "| --- | --- | --- | --- | --- |",
    ]
    for cls in WRAPPERS:
        title, when, start, paper = prose(cls)
        written = [re.sub(r":\w+:`", "`", part).replace("``", "`") for part in (title, when, start)]
        lines.append(f"| `{cls.__name__}` | {' | '.join(written)} | {_linked(paper)} |")
    lines += [
        "",
        "## Named configurations",
        "",
        "`oput.create` also takes these names. Given a module (or named parameters), decay spares biases and the "
        "parameters of normalisation layers where the table says so.",
        "",
        "| name | optimizer | settings | biases and norms decay |",
        "| --- | --- | --- | --- |",
    ]
    for name, preset in PRESETS.items():
        settings = ", ".join(f"`{key}={value!r}`" for key, value in preset.options.items())
        lines.append(
            f"| `{name}` | `{preset.optimizer.__name__}` | {settings} | {'yes' if preset.decays_all else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def _made(cls: type[oput.Optimizer], shape: tuple[int, ...]) -> tuple[oput.Optimizer, torch.Tensor]:
    p = torch.nn.Parameter(torch.randn(shape))
    make: Any = cls
    return make([p], **NEEDED.get(cls.__name__, {})), p


def _state(cls: type[oput.Optimizer]) -> str:
    sizes = []
    for shape in ((SIZE, SIZE), (SIZE * SIZE,)):
        optimizer, p = _made(cls, shape)
        p.grad = torch.randn(shape)
        optimizer.run(None, 1.0)
        sizes.append(f"{(oput.state_bytes(optimizer) - 4) / p.numel():.3g}")
    return sizes[0] if sizes[0] == sizes[1] else f"{sizes[0]}; {sizes[1]}"


def _all_reduces(cls: type[oput.Optimizer]) -> int:
    counts = []
    for shape in ((4, 4), (4,)):
        optimizer, _ = _made(cls, shape)
        recipe = optimizer.recipe(optimizer.param_groups[0], shape)
        counts.append(sum(bool(stage.sums) + bool(stage.maxima) for stage in recipe.stages))
    return max(counts)


def _defaults(cls: type[oput.Optimizer]) -> str:
    parameters = list(inspect.signature(cls).parameters.values())[1:]
    own = [p for p in parameters if p.default is not inspect.Parameter.empty]
    return ", ".join(f"`{p.name}={p.default!r}`" for p in own)


def _linked(paper: str) -> str:
    return re.sub(r"(https?://[^\s;,]+?)(?=[.;,]?(?:\s|$))", r"<\1>", paper).rstrip(".")


if __name__ == "__main__":
    OUT.write_text(text())
    print(OUT)
