"""An optimizer is short, and its signature says all of its hyperparameters: names, defaults and what is allowed.

What is counted: for each class of the suite the lines of its file, divided by the optimizers in it. Blank lines,
comments and docstrings do not count, nor do imports, whose number tells how many words there are and not how much is
said. Everything else does, rules and helpers too.
"""

from __future__ import annotations

import ast
import inspect
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from torch import nn

import oput_dist as oput
from oput_dist.engine.hyper import Fraction, Positive, check_of, hyperparameters, signature_checks
from oput_dist.optimizers import OPTIMIZERS
from tests.toy import create

MOST = 45


def is_counted(node: ast.AST) -> bool:
    """Imports are not, nor strings that are statements."""
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return not text and not isinstance(node, (ast.Import, ast.ImportFrom))


def lines_of_code(source: str) -> int:
    nodes: list[Any] = [node for node in ast.walk(ast.parse(source)) if not is_counted(node)]
    left_out = {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") for n, line in lines if n not in left_out)


def test_what_is_counted() -> None:
    imports = "import a\nfrom b import (\n    c,\n)\n\n"
    source = imports + 'class D:\n    """Doc\n    string."""\n    x = """1\n2"""  # 3\n    # 4\n'
    assert lines_of_code(source) == 3


def test_half_of_the_optimizers_have_at_most_so_many_lines() -> None:
    files = Counter(inspect.getsourcefile(cls) for cls in OPTIMIZERS.values())
    sizes = {Path(file).name: lines_of_code(Path(file).read_text()) / n for file, n in files.items() if file}
    each = [sizes[Path(file).name] for file, n in files.items() if file for _ in range(n)]
    assert len(each) == len(OPTIMIZERS) >= 50
    assert statistics.median(each) <= MOST, sorted(sizes.items(), key=lambda item: item[1])


# -------------------------------------------------------------------------------------------- what signatures say

CASES = [
    (name, key, parameter.default)
    for name, cls in OPTIMIZERS.items()
    for key, parameter in inspect.signature(cls).parameters.items()
    if key != "params" and parameter.kind is not parameter.VAR_KEYWORD
]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2))]


@pytest.mark.parametrize(("name", "key", "default"), CASES, ids=[f"{name}-{key}" for name, key, _ in CASES])
def test_every_hyperparameter_has_a_range(name: str, key: str, default: Any) -> None:
    """At construction, in a group that is added later, and where a value is changed between steps."""
    for bad in (1,) if isinstance(default, bool) else (math.nan, "no such word"):
        message = rf"={bad!r} is not allowed: must be"
        with pytest.raises(ValueError, match=message):
            create(name, parameters(), **{key: bad})
        optimizer = create(name, parameters())
        if key in optimizer.defaults:
            with pytest.raises(ValueError, match=f"{key}{message}"):
                optimizer.add_param_group({"params": parameters(), key: bad})
            optimizer.param_groups[0][key] = bad
            with pytest.raises(ValueError, match=f"{key}{message}"):
                optimizer.step()


NOT_KEPT = {
    "radam": ["decouple_wd"],
    "ranger21": ["num_epochs", "num_batches_per_epoch"],
    "adahessian": ["product", "seed"],
    "muon": ["matrix_params"],
    "shampoo": ["matrix_params"],
    "soap": ["matrix_params"],
    "sophia": ["estimator"],
    "sophiag": ["seed"],
    "sophiah": ["product", "seed"],
}
"""Arguments from which others follow, or an estimator is made."""


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgdw"])  # SGDW's groups are SGD's
def test_groups_have_what_the_signature_lists_in_its_order(name: str) -> None:
    listed = [key for case, key, _ in CASES if case == name and key not in NOT_KEPT.get(name, [])]
    assert list(create(name, parameters()).defaults)[: len(listed)] == listed


def test_a_subclass_keeps_the_ranges_of_what_it_does_not_list() -> None:
    class Mine(oput.SGD):
        def __init__(self, params: Any, momentum: Positive = 0.5, nesterov: Any = None) -> None:
            super().__init__(params, momentum=momentum, nesterov=nesterov)

    checks = signature_checks(Mine)
    assert checks["momentum"](2.0) is None  # its own, though SGD's would refuse it
    assert checks["nesterov"](1) == "True or False"
    assert checks["dampening"](2.0) is not None


def test_annotations() -> None:
    assert check_of(float) is check_of(Any) is check_of(Annotated[float, "text"]) is None
    optional = check_of(Fraction | None)
    assert optional is not None
    assert [optional(value) for value in (None, 0.5, 1.0)] == [None, None, "None or a number in [0, 1)"]


def test_hyperparameters_are_what_the_signature_lists() -> None:
    def init(self: Any, params: Any, lr: float, k: int, gone: int = 3, **common: Any) -> dict[str, Any]:
        return hyperparameters(locals(), "gone")

    assert list(init(0, 1, 2.0, 3, x=4).items()) == [("lr", 2.0), ("k", 3)]
