"""The SAM family with scalers, statistics, exceptions, checkpoints, other wrappers, and in bad hands."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import oput_dist as oput
from oput_dist.engine.step import Outcome
from oput_dist.wrappers.esam import ESAM
from oput_dist.wrappers.gsam import GSAM
from oput_dist.wrappers.lookahead import Lookahead
from oput_dist.wrappers.looksam import LookSAM
from oput_dist.wrappers.sam import ASAM, SAM
from tests.test_sam import SGD, batch, closure_of, losses_of, network, one_step
from tests.toy import largest_difference, same

FAMILY: dict[str, Callable[..., Any]] = {"sam": SAM, "asam": ASAM, "gsam": GSAM, "looksam": LookSAM, "esam": ESAM}
every = pytest.mark.parametrize("name", FAMILY)
INNER: dict[str, Callable[..., Any]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "lamb": lambda model: oput.Lamb(model, lr=0.05),
}
inside = pytest.mark.parametrize("inner", INNER)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same_state(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, Tensor):
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_same_state(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        for one, other in zip(found, wanted, strict=True):
            assert_same_state(one, other)
    else:
        assert found == wanted


def what_to_call(name: str, model: nn.Module, step: int) -> Callable[..., Tensor]:
    return losses_of(model, step) if name == "esam" else closure_of(model, step)


# ------------------------------------------------------------------------------------------- statistics, exceptions


def normalised() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("given", ["params", "module", "inner"])
@every
def test_statistics_move_in_the_first_pass_only(name: str, given: str) -> None:
    model, once = normalised(), normalised()
    once(batch(0)[0])
    make: dict[str, Callable[[], Any]] = {
        "params": lambda: FAMILY[name](model, *SGD[:1], **SGD[1]),
        "module": lambda: FAMILY[name](model.parameters(), *SGD[:1], module=model, **SGD[1]),
        "inner": lambda: FAMILY[name](oput.Lamb(model, lr=0.05)),
    }
    optimizer = make[given]()
    optimizer.step(what_to_call(name, model, 0))
    assert same(list(model.buffers()), list(once.buffers()))
    model(batch(1)[0])
    once(batch(1)[0])
    assert int(model[1].num_batches_tracked) == 2
    assert model[1].track_running_stats


@every
def test_an_exception_in_the_second_pass_leaves_everything_as_it_was(name: str) -> None:
    model = normalised()
    optimizer = FAMILY[name](oput.Lamb(model, lr=0.05))
    before, function, passes = values(model), what_to_call(name, model, 0), []

    def fails(*indices: Any) -> Any:
        passes.append(values(model))
        if len(passes) == 2:
            model(batch(0)[0])
            raise KeyboardInterrupt
        return function(*indices)

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    assert not same(passes[1], before)
    assert same(values(model), before)
    assert not optimizer.state
    assert int(model[1].num_batches_tracked) == 1
    assert model[1].track_running_stats
    optimizer.step(function)
    assert optimizer.outcome is Outcome.DONE


def test_memory_of_weights_stays_where_it_is_and_nothing_is_kept() -> None:
    model = network()
    optimizer = GSAM(model, *SGD[:1], **SGD[1])
    places = [p.data_ptr() for p in model.parameters()]
    optimizer.step(closure_of(model, 0))
    assert [p.data_ptr() for p in model.parameters()] == places
    assert optimizer._first is None
    assert {key for entry in optimizer.state_dict()["state"].values() for key in entry} == {"momentum_buffer"}


@pytest.mark.parametrize("where", ["between", "inside"])
def test_clipping(where: str) -> None:
    model, wanted = network(), network()
    inside = {"max_grad_norm": 0.1} if where == "inside" else {}
    optimizer, plain = SAM(model, oput.SGD, lr=0.1, **inside), SAM(wanted, torch.optim.SGD, lr=0.1)
    for one, net in ((optimizer, model), (plain, wanted)):
        closure_of(net, 0)()
        one.first_step()
        closure_of(net, 0)()
        if where == "between" or one is plain:
            assert nn.utils.clip_grad_norm_(net.parameters(), 0.1) > 0.1
        one.second_step()
    assert largest_difference(values(model), values(wanted)) <= 1e-14


def test_gradients_of_micro_batches_accumulate() -> None:
    model, whole = network(), network()
    by_parts, at_once = SAM(model, *SGD[:1], **SGD[1]), SAM(whole, *SGD[:1], **SGD[1])
    x, y = batch(0)
    for pass_number in range(2):
        for part in (slice(0, 6), slice(6, 12)):
            (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
        by_parts.second_step() if pass_number else by_parts.first_step()
    at_once.step(closure_of(whole, 0))
    assert largest_difference(values(model), values(whole)) <= 1e-14


# ---------------------------------------------------------------------------------------------- saving, and nesting


def run(name: str, optimizer: Any, model: nn.Module, steps: range) -> None:
    for step in steps:
        optimizer.step(what_to_call(name, model, step))


@pytest.mark.parametrize("way", ["state_dict", "dcp", "pickle"])
@inside
@every
def test_a_resumed_run_goes_on_bit_for_bit(name: str, inner: str, way: str) -> None:
    options = {"k": 3} if name == "looksam" else {}
    model = network()
    optimizer = FAMILY[name](INNER[inner](model), **options)
    run(name, optimizer, model, range(4))
    other = copy.deepcopy(model)
    other.zero_grad()  # for torch, which otherwise makes no state to load into
    resumed = FAMILY[name](INNER[inner](other), **options)
    if way == "dcp":
        set_optimizer_state_dict(other, resumed, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    else:
        saved = optimizer.state_dict()
        resumed.load_state_dict(pickle.loads(pickle.dumps(saved)) if way == "pickle" else copy.deepcopy(saved))
    run(name, optimizer, model, range(4, 8))
    run(name, resumed, other, range(4, 8))
    assert same(values(model), values(other))
    assert_same_state(resumed.state_dict(), optimizer.state_dict())


def test_looksam_keeps_its_direction_and_count() -> None:
    model = network()
    optimizer = LookSAM(oput.Lamb(model), k=3)
    run("looksam", optimizer, model, range(2))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["looksam_steps"] == 2
    assert saved["state"][0]["looksam_direction"].shape == (6, 4)
    del saved["state"][0]["looksam_direction"]
    with pytest.raises(ValueError, match="looksam_direction"):
        LookSAM(oput.Lamb(network()), k=3).load_state_dict(saved)


def test_state_is_made_without_a_step() -> None:
    for name, wrapper in FAMILY.items():
        model = network()
        optimizer = wrapper(oput.Lamb(model))
        before = values(model)
        kept = get_optimizer_state_dict(model, optimizer)["state"]["0.weight"]
        assert same(values(model), before)
        assert ("looksam_direction" in kept) == (name == "looksam")
        assert optimizer.outcome is Outcome.REHEARSED


def test_lookahead_around_sam_around_lamb() -> None:
    model, wanted = network(), network()
    nested = Lookahead(SAM(oput.Lamb(model, lr=0.05), rho=0.3), k=2, alpha=0.5)
    plain, slow = SAM(oput.Lamb(wanted, lr=0.05), rho=0.3), values(wanted)
    for step in range(4):
        one_step(nested, closure_of(model, step), by_hand=step % 2 == 1)
        one_step(plain, closure_of(wanted, step))
        if step % 2:
            slow = [s + 0.5 * (p.detach() - s) for s, p in zip(slow, wanted.parameters(), strict=True)]
            for p, s in zip(wanted.parameters(), slow, strict=True):
                p.data.copy_(s)
    assert largest_difference(values(model), values(wanted)) <= 1e-14
    other = copy.deepcopy(model)
    resumed = Lookahead(SAM(oput.Lamb(other, lr=0.05), rho=0.3), k=2, alpha=0.5)
    resumed.load_state_dict(nested.state_dict())
    for one, net in ((nested, model), (resumed, other)):
        run("sam", one, net, range(4, 7))
    assert same(values(model), values(other))


def test_sam_around_lookahead() -> None:
    model = network()
    optimizer = SAM(Lookahead(oput.Lamb(model, lr=0.05), k=2), rho=0.3)
    first = F.cross_entropy(model(batch(0)[0]), batch(0)[1]).item()
    for _ in range(10):
        optimizer.step(closure_of(model, 0))
    assert F.cross_entropy(model(batch(0)[0]), batch(0)[1]).item() < first


def test_momo_gets_the_loss_of_the_first_pass() -> None:
    models = [network() for _ in range(3)]
    closures = [closure_of(model, 0) for model in models]
    one, two, three = (SAM(oput.Momo(model, lr=100.0), rho=0.5) for model in models)
    loss = one.step(closures[0])
    closures[1]()
    two.first_step()
    later = closures[1]().detach()
    two.second_step(loss=loss)
    three.step(closures[2], loss=later)
    assert loss.item() != later.item()
    assert same(values(models[0]), values(models[1]))
    assert not same(values(models[0]), values(models[2]))


def test_a_copy_goes_on_alike() -> None:
    model = network()
    optimizer = LookSAM(oput.Lamb(model), k=2)
    run("looksam", optimizer, model, range(3))
    twin, other = copy.deepcopy((model, optimizer))
    run("looksam", optimizer, model, range(3, 6))
    run("looksam", other, twin, range(3, 6))
    assert same(values(model), values(twin))


# -------------------------------------------------------------------------------------------------------- bad input


@every
def test_a_step_without_closure_or_first_step_shows_the_call(name: str) -> None:
    model = network()
    optimizer = FAMILY[name](model, *SGD[:1], **SGD[1])
    closure_of(model, 0)()
    before = values(model)
    with pytest.raises(RuntimeError, match=r"optimizer.first_step\(\)"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"without first_step\(\): call step\(closure\)"):
        optimizer.second_step()
    optimizer.first_step()
    for wrong, text in (
        (optimizer.first_step, r"a first step was made already"),
        (lambda: optimizer.step(lambda: None), r"a first step was made already"),
        (optimizer.state_dict, r"state_dict\(\) between first_step\(\) and second_step\(\)"),
        (lambda: optimizer.load_state_dict({}), r"load_state_dict\(\) between"),
    ):
        with pytest.raises(RuntimeError, match=text):
            wrong()
    optimizer.restore()
    assert same(values(model), before)


@every
def test_what_cannot_be_wrapped_is_refused(name: str) -> None:
    wrapper = FAMILY[name]
    for inner in (SAM(network(), *SGD[:1], **SGD[1]), Lookahead(LookSAM(network(), *SGD[:1], **SGD[1]))):
        with pytest.raises(TypeError, match=r"is wrapped by (SAM|LookSAM) already"):
            wrapper(inner)
    with pytest.raises(TypeError, match=r"\(params, torch.optim.SGD, lr=0.1\)"):
        wrapper(network().parameters())
    with pytest.raises(TypeError, match="an optimizer was given, so 'lr' cannot be"):
        wrapper(torch.optim.SGD(network().parameters()), lr=0.1)
    with pytest.raises(ValueError, match="rho=-1 is not allowed"):
        wrapper(network(), torch.optim.SGD, rho=-1)
    with pytest.raises(ValueError, match="skip_nonfinite=1 is not allowed"):
        wrapper(network(), torch.optim.SGD, skip_nonfinite=1)
    with pytest.raises(TypeError, match="module=3"):
        wrapper(network().parameters(), torch.optim.SGD, module=3)


@pytest.mark.parametrize(
    ("wrapper", "settings", "text"),
    [
        (SAM, {"adaptive": 1}, "adaptive=1 is not allowed"),
        (SAM, {"eta": float("nan")}, "eta=nan is not allowed"),
        (SAM, {"local": None}, "local=None is not allowed"),
        (GSAM, {"rho_min": 0.1}, "rho_min=0.1 without lr_max"),
        (GSAM, {"lr_min": 0.1}, "lr_min=0.1 without lr_max"),
        (GSAM, {"lr_max": 0.1, "lr_min": 0.2}, "must be below lr_max"),
        (GSAM, {"alpha": float("inf")}, "alpha=inf is not allowed"),
        (LookSAM, {"k": 0}, "k=0 is not allowed"),
        (LookSAM, {"alpha": -0.1}, "alpha=-0.1 is not allowed"),
        (ESAM, {"beta": 0.0}, "beta=0.0 is not allowed"),
        (ESAM, {"gamma": 1.1}, "gamma=1.1 is not allowed"),
        (ESAM, {"seed": 0.5}, "seed=0.5 is not allowed"),
    ],
)
def test_settings_out_of_range(wrapper: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        wrapper(network(), torch.optim.SGD, **settings)


def test_settings_changed_to_what_is_wrong() -> None:
    model = network()
    optimizer = LookSAM([{"params": model[0].parameters()}, {"params": model[2].parameters()}], torch.optim.SGD)
    optimizer.param_groups[1]["looksam_k"] = 2
    with pytest.raises(ValueError, match="it must be the same in all"):
        optimizer.step(closure_of(model, 0))
    optimizer.param_groups[1]["looksam_k"] = 0
    with pytest.raises(ValueError, match="k=0 is not allowed"):
        optimizer.step(closure_of(model, 0))


def test_esam_says_what_losses_it_takes() -> None:
    model = network()
    optimizer = ESAM(model, torch.optim.SGD)
    x, y = batch(0)
    with pytest.raises(TypeError, match="def losses_of"):
        optimizer.step(closure_of(model, 0))
    with pytest.raises(ValueError, match=r"all samples have shape \(\).*reduction='none'"):
        optimizer.step(lambda indices: F.cross_entropy(model(x), y))
    before = values(model)
    with pytest.raises(ValueError, match=r"losses of 6 samples have shape \(12,\)"):
        optimizer.step(lambda indices: F.cross_entropy(model(x), y, reduction="none"))
    assert same(values(model), before)


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = SAM(table, torch.optim.SGD)
    before = values(table)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.first_step()
    assert same(values(table), before)
    with pytest.raises(RuntimeError, match="without first_step"):
        optimizer.second_step()
