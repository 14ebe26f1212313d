"""A plan says beforehand what is measured afterwards: state, bytes sent, collectives; and it balances owners."""

from __future__ import annotations

import random
from collections import Counter
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import oput_dist as oput
from benchmarks import plan as page
from oput_dist.collectives import gather as gather_module
from oput_dist.collectives import ranks as ranks_module
from oput_dist.collectives.balance import assigned, least_load
from oput_dist.collectives.nearness import nearest
from oput_dist.engine.owned import kept_bytes
from tests.layouts import Weights
from tests.pool import Pool

SHAPES = [(48, 32), (64, 36), (36, 64), (24,), (48, 32), (60, 24), (40, 40), (7, 5, 4), (2, 9), (1,), (52, 20), (30,)]
BLOCKED = {"shampoo": {"block_size": 16}, "soap": {"block_size": 20}}
NAMES = ["adamw", "lamb", "adafactor", "muon", "shampoo", "soap"]
MATRIX = ["muon", "shampoo", "soap"]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, BLOCKED.get(name, {})) for name in NAMES),
    ("lamb", {"max_grad_norm": 1.0, "state_dtype": torch.bfloat16}),
    ("sm3", {}),
    ("came", {}),
    ("adamw", {"cautious": True}),
    ("soap", {"factor_dtype": "bfloat16", "block_size": 20}),
    ("shampoo", {"factor_dtype": "int8", "block_size": 16, "refresh_delay": 1}),
    ("soap", {"factor_dtype": "int8", "block_size": 20}),
]


def shapes() -> dict[str, tuple[int, ...]]:
    return {f"p{i}": shape for i, shape in enumerate(SHAPES)}


# --------------------------------------------------------------------------------------------- predicted and measured


class Counted:
    """Bytes that this rank sends, by collective; rings as in the plan, all-to-alls as they are."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        all_reduce, all_to_all, all_gather = dist.all_reduce, ranks_module._all_to_all, gather_module._all_gather
        ranks, rank = dist.get_world_size, dist.get_rank()

        def reduced(tensor: Tensor, *more: Any, group: Any = None, **others: Any) -> Any:
            n = ranks(group)
            self._count("all-reduce", 2 * tensor.nbytes * (n - 1) / n)
            return all_reduce(tensor, *more, group=group, **others)

        def exchanged(output: Tensor, given: Tensor, sizes: list[int], sizes_in: list[int], **more: Any) -> Any:
            away = sum(size for to, size in enumerate(sizes_in) if to != rank)
            self._count("all-to-all", away * given.element_size())
            return all_to_all(output, given, sizes, sizes_in, **more)

        def gathered(output: Tensor, own: Tensor, group: Any, **more: Any) -> Any:
            self._count("all-gather", own.nbytes * (ranks(group) - 1))
            return all_gather(output, own, group=group, **more)

        patch.setattr(dist, "all_reduce", reduced)
        patch.setattr(ranks_module, "_all_to_all", exchanged)
        patch.setattr(gather_module, "_all_gather", gathered)

    def _count(self, kind: str, sent: float) -> None:
        self.bytes[kind] += round(sent)
        self.calls[kind] += 1


def measured(layout: str, name: str, options: dict[str, Any]) -> tuple[int, dict[str, int], dict[str, int]]:
    """State bytes of this rank, and what a step sends."""
    module = Weights({name: torch.randn(shape) for name, shape in shapes().items()})
    if layout == "ddp":
        module = DistributedDataParallel(module)
    elif layout == "zero1":
        options = {**options, "shard_group": dist.group.WORLD}
    else:
        sizes = (dist.get_world_size(),) if layout == "fsdp2" else (2, 2)
        fully_shard(module, mesh=init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :]))
    optimizer = oput.create(name, module, **options)
    with pytest.MonkeyPatch.context() as patch:
        for step in range(2):
            module({name: torch.randn(shape) for name, shape in shapes().items()}).backward()
            if step:
                counted = Counted(patch)
            optimizer.step()
            optimizer.zero_grad()
    return oput.state_bytes(optimizer), dict(counted.bytes), dict(counted.calls)


def all_measured(layout: str) -> list[tuple[int, dict[str, int], dict[str, int]]]:
    return [measured(layout, name, options) for name, options in CASES]


@pytest.mark.parametrize(
    ("layout", "n"), [("fsdp2", 2), ("fsdp2", 3), ("zero1", 2), ("zero1", 3), ("hsdp", 4), ("ddp", 3)]
)
def test_state_bytes_and_collectives_are_as_planned(pool: Pool, layout: str, n: int) -> None:
    ranks = pool.run(n, all_measured, layout, timeout=120.0)
    for i, (name, options) in enumerate(CASES):
        told = oput.plan(shapes(), name, (2, 2) if layout == "hsdp" else n, layout=layout, **options)
        state = [rank[i][0] for rank in ranks]
        assert (told.state_bytes.least, told.state_bytes.most) == (min(state), max(state)), name
        assert told.state_bytes.mean == sum(state) / n, name
        for _, _, calls in (rank[i] for rank in ranks):
            assert {kind: count for kind, count in told.collectives.items() if count} == calls, name
        shared = ["to owners", "from owners"]
        parts = {"all-reduce": ["sums"], "all-to-all": shared, "all-gather": ["updated rows"]}
        if layout == "ddp":  # replicas tell each other what they made, and send nothing to owners
            parts |= {"all-to-all": ["to owners"], "all-gather": ["from owners"]}
        for kind, purposes in parts.items():
            sent = sum(rank[i][1].get(kind, 0) for rank in ranks) / n
            assert sum(told.sent[purpose].mean for purpose in purposes) == pytest.approx(sent, rel=0.01), (name, kind)
        total = sum(sum(rank[i][1].values()) for rank in ranks) / n
        assert told.sent_bytes.mean == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("n", [2, 3])
def test_whole_matrices_are_sent_at_the_floor(n: int) -> None:
    """Measured and planned are equal, by the test above. Nothing is padded, so uneven rows cost nothing."""
    for name in MATRIX:
        told = oput.plan(shapes(), name, n, **({} if name == "muon" else {"block_size": None}))
        elements = sum(prod(shape) for shape in SHAPES if len(shape) > 1)
        floor = 2 * (elements / n) * (n - 1) / n
        sent = told.sent["to owners"].mean + told.sent["from owners"].mean
        assert sent == pytest.approx(4 * floor, rel=0.05), name


@pytest.mark.parametrize("n", [2, 3, 8, 64])
def test_blocks_are_sent_below_the_floor(n: int) -> None:
    """The floor has it that an owner holds 1/N of a matrix before; of a block it may hold much more."""
    matrices = {f"p{i}.{k}": shape for i, shape in enumerate([(512, 128), (128, 512), (256, 256)]) for k in range(16)}
    for name in ("shampoo", "soap"):
        told = oput.plan(matrices, name, n, block_size=64)
        floor = 2 * (48 * 2**16 / n) * (n - 1) / n
        sent = told.sent["to owners"].mean + told.sent["from owners"].mean
        assert sent <= 4 * floor * (0.6 if n <= 8 else 1.0), (name, sent / floor / 4)


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("n", [8, 64])
def test_matrices_of_llama_are_sent_at_most_at_the_floor(name: str, n: int) -> None:
    told = oput.plan(page.llama(), name, n, **page.OPTIONS.get(name, {}))
    floor = 2 * (32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) / n) * (n - 1) / n
    assert told.sent["to owners"].mean + told.sent["from owners"].mean <= 4 * floor * 1.001


def test_one_process_holds_and_sends_what_ddp_does_for_itself() -> None:
    """But for whole matrices, of which each replica works on some."""
    alone, replicas = oput.plan(shapes(), "lamb"), oput.plan(shapes(), "lamb", 5, layout="ddp")
    optimizer = oput.Lamb([nn.Parameter(torch.randn(shape)) for shape in SHAPES])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert alone.state_bytes.most == replicas.state_bytes.least == oput.state_bytes(optimizer)
    assert alone.sent_bytes.most == replicas.sent_bytes.most == 0
    assert (alone.state_share, replicas.state_share) == (1.0, 5.0)
    assert not any(replicas.collectives.values())


def test_parameters_gradients_and_what_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(10, 9), nn.Linear(9, 7, bias=False))
    model[1].weight.requires_grad_(False)
    told = oput.plan(model, oput.AdamW, 4)
    rows = [3, 3, 3, 0]  # of the first layer
    last = [2, 2, 2, 1]
    trained = [4 * (row * 10 + row) for row in rows]
    assert told.gradient_bytes.most == max(trained)
    assert told.gradient_bytes.least == 0
    held = [own + 4 * 9 * row for own, row in zip(trained, last, strict=True)]
    assert (told.parameter_bytes.least, told.parameter_bytes.most) == (min(held), max(held))
    assert told.state_bytes.most == 2 * max(trained) + 8
    zero1 = oput.plan(model, oput.AdamW, 4, layout="zero1")
    assert zero1.parameter_bytes.least == 4 * (99 + 63)
    assert zero1.gradient_bytes.least == 4 * 99


def test_an_optimizer_brings_its_own_parameters() -> None:
    model = nn.Linear(6, 4)
    optimizer = oput.Lamb(model, lr=0.1)
    assert oput.plan(None, optimizer, 2) == oput.plan(model, optimizer, 2) == oput.plan(model, "lamb", 2)


def test_half_precision_and_embeddings_of_a_module_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16, bias=False)).to(torch.bfloat16)
    told = oput.plan(model, "muon", 4)
    assert told.gradient_bytes.most == 2 * (64 + 16) * 16 / 4
    # bf16 momentum of the matrix, both moments of the embedding, what rounding of both loses, two counters
    assert told.state_bytes.most == (2 * 16 * 16 + 4 * 64 * 16 + 2 * (64 + 16) * 16) / 4 + 8
    assert told.sent["to owners"].mean == 4 * 16 * 16 / 4 * 3 / 4  # fp32


# ---------------------------------------------------------------------------------------------------------- the balance


def loads(values: list[float], owners: list[int], ranks: int) -> list[float]:
    found = [0.0] * ranks
    for value, owner in zip(values, owners, strict=True):
        found[owner] += value
    return found


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 32, 64])
def test_owners_of_llama_are_balanced(name: str, ranks: int) -> None:
    told = oput.plan(page.llama(), name, ranks, **page.OPTIONS.get(name, {}))
    least_time, _ = told.least_imbalance
    assert told.owner_seconds.imbalance <= max(1.05, least_time * (1 + 1e-9))
    assert told.owner_bytes.imbalance <= 1.1
    assert told.state_share <= 1.1


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("name", MATRIX)
def test_state_of_mixed_shapes_is_even(name: str, ranks: int) -> None:
    """At least 4 N matrices, of which none is much larger than the others."""
    draw = random.Random(ranks)
    sides = [64, 96, 128, 192, 256, 320]
    mixed = {f"p{i}": (draw.choice(sides), draw.choice(sides)) for i in range(5 * ranks)}
    told = oput.plan(mixed, name, ranks, block_size=128) if name != "muon" else oput.plan(mixed, name, ranks)
    assert told.state_share <= 1.1


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("name", ["shampoo", "soap"])
def test_state_of_four_matrices_a_rank_is_even_whatever_they_are(name: str, ranks: int) -> None:
    """Twenty draws of each kind, where one rank need not have more."""
    optimizer: Any = oput.create(name, [nn.Parameter(torch.empty(2, 2, device="meta"))], **page.OPTIONS[name])
    work = optimizer.work(optimizer.param_groups[0], (2, 2))
    for sides in (
        [64, 96, 128, 192, 256, 320],
        [300, 500, 768, 1000, 1280, 1600, 2000, 3000],
        [1024, 1536, 2048, 4096],
    ):
        for seed in range(20):
            draw = random.Random(seed)
            shapes = [(draw.choice(sides), draw.choice(sides)) for _ in range(4 * ranks)]
            blocks = [
                tuple(part.stop - part.start for part in index) for shape in shapes for index in work.blocks(shape)
            ]
            kept = [float(kept_bytes(work, block, torch.float32)) for block in blocks]
            owned = loads(kept, assigned([work.cost(block) for block in blocks], ranks, None, kept), ranks)
            even = sum(kept) / ranks
            assert max(owned) <= 1.1 * even or least_load(kept, ranks) > 1.1 * even, (sides, seed)


def test_bytes_count_beside_time() -> None:
    costs, kept = [8.0, 8.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 8.0, 8.0, 8.0, 8.0]
    owners = assigned(costs, 2, None, kept)
    assert loads(costs, owners, 2) == [10.0, 10.0]
    assert loads(kept, owners, 2) == [17.0, 17.0]


def test_exchanges_improve_on_longest_first() -> None:
    """Longest first alone gives 11 and 9: 5 + 3 + 3 against 5 + 4."""
    costs = [5.0, 5.0, 4.0, 3.0, 3.0]
    assert sorted(loads(costs, assigned(costs, 2), 2)) == [10.0, 10.0]


def test_owners_stay_and_all_is_the_same_again() -> None:
    draw = random.Random(1)
    costs, kept = ([draw.choice([1.0, 2.5, 7.0, 9.0]) for _ in range(60)] for _ in range(2))
    settled = {i: i % 3 for i in range(0, 60, 4)}
    owners = assigned(costs, 7, settled, kept)
    assert owners == assigned(costs, 7, settled, kept)
    assert all(owners[i] == owner for i, owner in settled.items())
    assert set(owners) == set(range(7))


def test_owners_of_what_is_alike_are_exchanged_for_those_who_hold_it() -> None:
    owners, kinds = [0, 1, 0, 1, 0], ["a", "a", "a", "b", "a"]
    sizes = [(0, 8), (8, 0), (2, 6), (8, 0), (4, 4)]
    assert nearest(owners, kinds, sizes, {}) == [1, 0, 0, 1, 0]
    assert nearest(owners, kinds, sizes, {0: 0}) == [0, 0, 1, 1, 0]
    assert nearest(owners, kinds, [(4, 4)] * 5, {}) == owners


def test_the_least_load() -> None:
    assert least_load([3.0, 1.0], 4) == 3.0
    assert least_load([2.0, 2.0, 2.0], 2) == 4.0  # two of three come together
    assert least_load([1.0] * 8, 4) == 2.0
    assert least_load([], 4) == 0.0
    draw = random.Random(0)
    for _ in range(200):
        costs = [float(draw.randint(1, 9)) for _ in range(draw.randint(1, 7))]
        best = min(
            max(loads(costs, [code // 3**i % 3 for i in range(len(costs))], 3)) for code in range(3 ** len(costs))
        )
        assert least_load(costs, 3) <= best <= max(loads(costs, assigned(costs, 3), 3)) <= 4 / 3 * best


# ------------------------------------------------------------------------------------------------------------ the times


def test_times_follow_from_the_constants() -> None:
    machine = oput.Machine(
        ranks_per_node=4, start=1.0, hop=0.25, inside_rate=10.0, between_rate=2.0, memory_rate=8.0, matrix_rate=16.0
    )
    assert machine.collective(1, 100) == 0
    assert machine.collective(4, 100) == 1 + 10
    assert machine.collective(16, 100) == 1 + 2 * 2 * 0.25 + 50
    told = oput.plan({"p0": (8, 8)}, "adamw", 2, machine=machine)
    assert told.seconds["passes"] == 32 * 28 / 8  # p, g, m, v read, p, m, v written
    assert told.step_seconds == told.seconds["passes"]
    muon = oput.plan({"p0": (8, 8)}, "muon", 2, machine=machine)
    assert muon.seconds["matrices"] == 5 * 6 * 8**3 / 16
    sent = muon.sent["to owners"].most + muon.sent["from owners"].most
    assert muon.seconds["to owners and back"] == 2 * 1 + sent / 10


def test_the_table_shows_the_figures() -> None:
    text = str(oput.plan(shapes(), "muon", 3))
    assert text.splitlines()[0].startswith("Muon, fsdp2 on 3 ranks, ")
    for row in ("parameters", "gradients", "state", "sent, to owners", "owners of matrices", "estimated step"):
        assert any(line.startswith(row) for line in text.splitlines()), text


def test_the_page_is_what_the_code_says() -> None:
    """``python -m benchmarks.plan`` writes it anew."""
    assert page.OUT.read_text() == page.text()


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: oput.plan(shapes(), "shampo", 2), ValueError, "unknown optimizer 'shampo'. Did you mean 'shampoo'"),
        (lambda: oput.plan({}, "adamw", 2), ValueError, "no parameters"),
        (lambda: oput.plan(nn.ReLU(), "adamw", 2), ValueError, "no parameters"),
        (lambda: oput.plan(nn.Linear(2, 2).requires_grad_(False), "adamw", 2), ValueError, "all parameters are frozen"),
        (lambda: oput.plan(shapes(), "adamw", 0), ValueError, "mesh=0 is not allowed"),
        (lambda: oput.plan(shapes(), "adamw", (2, 2), layout="fsdp2"), ValueError, "does not fit layout='fsdp2'"),
        (lambda: oput.plan(shapes(), "adamw", 4, layout="hsdp"), ValueError, r"needs \(replicas, shards\)"),
        (lambda: oput.plan(shapes(), "adamw", 4, layout="fsdp3"), ValueError, "one of ddp, zero1, fsdp2, hsdp"),
        (lambda: oput.plan(shapes(), "adamw", 4, nonsense=1), TypeError, "no option 'nonsense'"),
        (lambda: oput.plan(shapes(), oput.AdamW([torch.ones(2, requires_grad=True)]), 2), ValueError, "of its own"),
        (lambda: oput.plan(None, "adamw", 2), TypeError, "must be a module, or shapes"),
        (lambda: oput.plan(shapes(), torch.optim.SGD, 2), TypeError, "must be one of this library's"),
        (lambda: oput.plan({"p": ()}, "adamw", 2), ValueError, "fully_shard takes no scalar"),
        (lambda: oput.Machine(hop=0.0), ValueError, r"hop=0.0 is not allowed"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
