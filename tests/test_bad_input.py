"""Bad input to the library: one sentence that names the value and what would be right, before anything is changed."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import oput_dist as oput
from oput_dist.optimizers import OPTIMIZERS
from tests.pool import Pool
from tests.toy import NAMES, create

every_optimizer = pytest.mark.parametrize("name", list(OPTIMIZERS))
every_step_without_loss = pytest.mark.parametrize("name", NAMES)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


def message_of(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 400
    return text


# --------------------------------------------------------------------------------------------- at construction


@every_optimizer
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_numbers_that_every_optimizer_takes(name: str, option: str) -> None:
    for bad in (-1e-3, math.nan, math.inf, "0.1", None, torch.tensor([0.1, 0.2]), torch.tensor(-1.0)):
        with pytest.raises(ValueError, match=rf"{option}=.*finite number >= 0") as error:
            create(name, parameters(), **{option: bad})
        assert repr(bad) in message_of(error.value)
        with pytest.raises(ValueError, match=f"{option}="):
            create(name, [{"params": parameters(), option: bad}])


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("sgd", {"momentum": 1.0}, r"momentum=1.0 .*\[0, 1\)"),
    ("sgd", {"momentum": -0.1}, r"momentum=-0.1 .*\[0, 1\)"),
    ("sgd", {"dampening": math.nan}, r"dampening=nan .*\[0, 1\)"),
    ("sgd", {"nesterov": True}, r"nesterov=True .*momentum > 0"),
    ("sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, r"dampening=0.1.* dampening = 0"),
    ("sgd", {"nesterov": 1}, r"nesterov=1 .*True or False"),
    *[
        (name, {"betas": betas}, r"betas=.*numbers in \[0, 1\)")
        for name in ("adam", "adamw", "lion", "stableadamw", "lamb")
        for betas in ((0.9, 1.0), (-0.1, 0.9), (0.9, math.nan), (0.9,), (0.9, 0.9, 0.9), 0.9, (0.9, "x"))
    ],
    *[("adan", {"betas": betas}, r"betas=") for betas in ((0.9, 0.9), (0.9, 0.9, 1.0))],
    *[(name, {"eps": -1e-8}, r"eps=-1e-08") for name in ("adam", "adamw", "adan", "stableadamw", "lamb")],
    *[(name, {"eps": math.nan}, r"eps=nan") for name in ("adam", "adamw", "adan", "stableadamw", "lamb")],
    ("lamb", {"clamp": 0.0}, r"clamp=0.0 .*> 0"),
    ("lamb", {"clamp": -1.0}, r"clamp=-1.0 .*> 0"),
    ("lamb", {"max_grad_norm": 0.0}, r"max_grad_norm=0.0 .*> 0"),
    ("adamw", {"max_grad_norm": math.nan}, r"max_grad_norm=nan .*> 0"),
    ("adamw", {"decouple_lr": True, "max_lr": -1.0}, r"max_lr=-1.0 .*> 0"),
    ("adamw", {"decouple_lr": "yes"}, r"decouple_lr='yes' .*True or False"),
    ("adamw", {"maximize": None}, r"maximize=None .*True or False"),
    ("adamw", {"state_dtype": torch.int8}, r"state_dtype=torch.int8 .*float32.*'int8'"),
    ("adamw", {"state_dtype": "int5"}, r"state_dtype='int5' .*'bf16'"),
    ("adamw", {"backend": "tritn"}, r"backend='tritn'.*'triton'"),
    ("adamw", {"backend": "eager", "foreach": True}, r"eager.*foreach"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_hyperparameters(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        oput.create(name, parameters(), **options)
    message_of(error.value)


@every_optimizer
def test_unknown_options(name: str) -> None:
    with pytest.raises(TypeError, match=r"momentun"):
        create(name, parameters(), momentun=0.9)
    with pytest.raises(TypeError, match=r"weight_deca.*'weight_decay'") as error:
        create(name, parameters(), weight_deca=0.1)
    message_of(error.value)


@pytest.mark.parametrize(("wrong", "right"), [("lmab", "lamb"), ("AdamV", "adam"), ("stable_adam", "stableadamw")])
def test_unknown_names_get_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=rf"{wrong}.*'{right}") as error:
        oput.create(wrong, parameters())
    message_of(error.value)


@every_optimizer
def test_parameters_that_cannot_be_optimized(name: str) -> None:
    for empty in ([], iter(()), nn.Module()):
        with pytest.raises(ValueError, match="empty"):
            create(name, empty)
    for dtype in (torch.int64, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match=str(dtype)) as error:
            create(name, [*parameters(), torch.zeros(3, dtype=dtype)])
        message_of(error.value)
    with pytest.raises(TypeError):
        create(name, torch.zeros(3, requires_grad=True))
    with pytest.raises(TypeError):
        create(name, ["weight"])
    p = parameters()[0]
    with pytest.raises(ValueError, match="leaf"):
        create(name, [p * 2])
    with pytest.raises(ValueError, match=r"more than one|duplicate"):
        create(name, [{"params": [p]}, {"params": [p]}])


@every_optimizer
def test_a_bad_group_is_not_added(name: str) -> None:
    optimizer = create(name, parameters())
    for bad in ({"lr": -1.0}, {"weight_decay": math.nan}):
        with pytest.raises(ValueError, match="finite number"):
            optimizer.add_param_group({"params": parameters(), **bad})
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.int32)]})
    assert len(optimizer.param_groups) == 1


def test_a_misspelt_option_of_a_group_is_noticed() -> None:
    with pytest.warns(UserWarning, match=r"wieght_decay.*'weight_decay'"):
        oput.AdamW([{"params": parameters(), "wieght_decay": 0.1}])


# ---------------------------------------------------------------------------------------------------- at the step

SPARSE = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 4), (3, 4), check_invariants=True)
GRADIENTS: list[tuple[str, Callable[[], Tensor], type[Exception], str]] = [
    ("sparse", lambda: SPARSE, TypeError, "sparse"),
    ("complex", lambda: torch.zeros(3, 4, dtype=torch.complex64), TypeError, "complex"),
    ("shape", lambda: torch.zeros(4, 3), ValueError, r"\(4, 3\).*\(3, 4\)"),
]


@every_step_without_loss
@pytest.mark.parametrize(("kind", "gradient", "expected", "message"), GRADIENTS, ids=[row[0] for row in GRADIENTS])
def test_gradients_that_cannot_be_used(
    name: str, kind: str, gradient: Callable[[], Tensor], expected: type[Exception], message: str
) -> None:
    """The bad gradient comes last, so that whatever is done too early to the others shows."""
    bad, good = parameters()
    optimizer = create(name, [("good", good), ("bad", bad)])
    for p in (good, bad):
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy((good, bad, optimizer.state_dict()))
    force_gradient(bad, gradient())
    with pytest.raises(expected, match=rf"bad.*{message}") as error:
        optimizer.step()
    message_of(error.value)
    after = (good, bad, optimizer.state_dict())
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=0)
    torch.testing.assert_close(after[2]["state"], before[2]["state"], rtol=0, atol=0)


def force_gradient(p: nn.Parameter, gradient: Tensor) -> None:
    """Torch refuses most wrong gradients by itself; through ``data`` they get in, as they do from custom code."""
    p.grad = None
    kept = p.data
    p.grad_dtype = None
    p.data = torch.zeros(gradient.shape, dtype=gradient.dtype if gradient.is_complex() else p.dtype)
    p.grad = gradient
    p.data = kept


# ----------------------------------------------------------------------------------------------- clip_grad_norm_


def test_clip_grad_norm() -> None:
    params = parameters()
    for p in params:
        p.grad = torch.ones_like(p)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match=rf"max_norm={bad}.*>= 0"):
            oput.clip_grad_norm_(params, bad)
    for bad in (0.0, -2.0, math.nan):
        with pytest.raises(ValueError, match=rf"norm_type={bad}.*> 0"):
            oput.clip_grad_norm_(params, 1.0, norm_type=bad)
    params[0].grad[0, 0] = math.nan
    before = [p.grad.clone() for p in params]
    with pytest.raises(RuntimeError, match="nan"):
        oput.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    torch.testing.assert_close([p.grad for p in params], before, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------------------- state dicts


def trained(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = create(name, params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(("saved", "target"), [("adamw", "lamb"), ("adamw", "adam"), ("lion", "adan")])
def test_state_of_another_optimizer_of_the_suite(saved: str, target: str) -> None:
    state_dict = trained(saved, parameters()).state_dict()
    optimizer = trained(target, parameters())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"(?i){target}: the state dict was saved by {saved}"):
        optimizer.load_state_dict(state_dict)
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize(
    ("saved", "target", "message"),
    [
        ("lion", "adamw", "AdamW.*exp_avg_sq"),
        ("adan", "adamw", "AdamW.*(exp_avg_diff|previous_grad)"),
        ("adamw", "sgd", "SGD.*exp_avg"),
    ],
)
def test_state_of_another_optimizer(saved: str, target: str, message: str) -> None:
    state_dict = trained(saved, parameters()).state_dict()
    for group in state_dict["param_groups"]:
        del group["optimizer"]  # as another library saves it
    optimizer = trained(target, parameters())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        optimizer.load_state_dict(state_dict)
    message_of(error.value)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@every_step_without_loss
def test_state_of_another_model(name: str) -> None:
    optimizer = trained(name, parameters())
    before = copy.deepcopy(optimizer.state_dict())
    others = [[nn.Parameter(torch.ones(3, 4))], [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))]]
    shapeless = all(value.ndim == 0 for entry in optimizer.state.values() for value in entry.values())
    for other in others[: 1 if shapeless else 2]:  # SGD and Amos without momentum: no state whose shape could differ
        with pytest.raises(
            ValueError, match=r"2\]|shape \(4, [13]\) .*\(3, [14]\)|has 16 elements, but must have 9"
        ) as error:
            optimizer.load_state_dict(trained(name, other).state_dict())
        message_of(error.value)
        torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]


# ----------------------------------------------------------------------------------------------------- layouts


def raised_by(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, message_of(error)
    return "", ""


def bad_layouts() -> dict[str, tuple[str, str]]:
    mesh = init_device_mesh("cpu", (2,))
    partial = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    plain = nn.Parameter(torch.ones(4, 4))
    outsider = [dist.new_group([1]), dist.new_group([0])][dist.get_rank()]

    def plain_gradient() -> None:
        force_gradient(sharded, torch.ones(4, 4))
        oput.AdamW([sharded]).step()

    return {
        "partial parameter": raised_by(lambda: first_step(oput.AdamW([partial]))),
        "plain gradient": raised_by(plain_gradient),
        "no group": raised_by(lambda: oput.AdamW([plain], shard_group="world")),
        "group of others": raised_by(lambda: oput.AdamW([plain], shard_group=outsider)),
        "DTensor under ZeRO-1": raised_by(lambda: first_step(oput.AdamW([sharded], shard_group=dist.group.WORLD))),
    }


def first_step(optimizer: torch.optim.Optimizer) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_layouts_that_are_not_supported(pool: Pool) -> None:
    for found in pool.run(2, bad_layouts):
        for kind, text in (
            ("partial parameter", "parameter 0 .*Partial"),
            ("plain gradient", "DTensor but its gradient is a Tensor"),
            ("no group", "shard_group='world'.*process group"),
            ("group of others", "shard_group=.*process group that this rank belongs to"),
            ("DTensor under ZeRO-1", r"parameter 0 .*shard_group= is for replicated .*Shard\(dim=0\)"),
        ):
            error, message = found[kind]
            assert error in ("LayoutError", "ValueError", "TypeError"), kind
            assert re.search(text, message), message
