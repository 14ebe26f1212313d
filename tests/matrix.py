"""The table at the end of a test run: how often each optimizer was checked, and in which way.

Static counts come from the tables that the tests go through; they are printed only for test files that passed.
"""

from __future__ import annotations

import re
from collections import Counter

__all__ = ["Tally"]


class Tally:
    """Counts reports of a run.

    Attributes:
        passed: passed tests of each file.
        failed: files in which some test failed or was skipped.
        named: passed tests that carry an optimizer's name, by file and name.
    """

    def __init__(self) -> None:
        self.passed: Counter[str] = Counter()
        self.failed: set[str] = set()
        self.named: Counter[tuple[str, str]] = Counter()

    def add(self, nodeid: str, outcome: str) -> None:
        """Take in the outcome of one test."""
        file = nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py")
        if outcome != "passed":
            self.failed.add(file)
            return
        self.passed[file] += 1
        for word in set(re.findall(r"[a-z0-9]+", nodeid.partition("[")[2])):
            self.named[file, word] += 1

    def lines(self) -> list[str]:
        """The table; nothing if this was not a run of the whole suite."""
        columns = {
            "oracles": ("test_parity", _oracles),
            "layouts": ("test_conformance", _layouts),
            "interpreted": ("test_kernels", _variants),
            "compiled": ("test_compile", _compiled),
        }
        if not all(self.passed[file] and file not in self.failed for file, _ in columns.values()):
            return []
        counts = {title: count() for title, (_, count) in columns.items()}
        counts["contract"] = Counter(
            {name: n for (file, name), n in self.named.items() if file in ("test_contract", "test_copies")}
        )
        from oput_dist.optimizers import OPTIMIZERS

        head = f"{'optimizer':20}" + "".join(f"{title:>13}" for title in counts)
        rows = [
            f"{cls.__name__:20}" + "".join(f"{count[name]:13}" for count in counts.values())
            for name, cls in OPTIMIZERS.items()
        ]
        sums = [sum(count[name] for name in OPTIMIZERS) for count in counts.values()]
        total = f"{f'{len(rows)} optimizers':20}" + "".join(f"{n:13}" for n in sums)
        return [head, *rows, total]


def _oracles() -> Counter[str]:
    from tests.cases import ORACLES

    return Counter(row.ours.__name__.lower() for row in ORACLES)


def _layouts() -> Counter[str]:
    from tests.test_conformance import ONE_EACH, rows_for
    from tests.wrapped import WORLDS, WRAPPED_WORLDS

    ran = [case for world in WORLDS for case, _, _ in rows_for(*world)]
    ran += [case for _ in WRAPPED_WORLDS for case in ONE_EACH]
    return Counter(case.optimizer.rpartition(".")[2].lower() for case in ran)


def _variants() -> Counter[str]:
    from benchmarks.variants import variants

    return Counter(variant.optimizer for variant in variants())


def _compiled() -> Counter[str]:
    from benchmarks.machine_code import jobs
    from benchmarks.variants import programs, variants

    by_program = Counter(programs()[number] for number, _, _ in jobs())
    found: Counter[str] = Counter()
    for name in {variant.optimizer for variant in variants()}:
        own = {p for variant in variants() if variant.optimizer == name for p in variant.programs()}
        found[name] = sum(by_program[program] for program in own)
    return found
