"""What a wrapper keeps of each parameter beside the state of the optimizer in it: saved and loaded as state is."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from .agree import agreed, joint_groups
from .load import adopt, checked
from .model import Model
from .plan import Plan
from .recipe import Group, Recipe, Shape, row_of
from .saved import WHOLE_KEY
from .slot import Slot

__all__ = ["Kept"]

_OWN_KEYS = ("params", "param_names")


class Kept:
    """State of parameters' own shapes, laid out like them. Looks to the loading functions as an optimizer does.

    Args:
        owner: the name of the wrapper, for messages.
        names: of the state.
    """

    forms: ClassVar[tuple[str, ...]] = ()

    def __init__(self, owner: str, names: tuple[str, ...]) -> None:
        self.owner, self.names = owner, names
        self.state: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
        self.param_groups: list[dict[str, Any]] = []
        self._model: Model | None = None
        self._optimizer_load_state_dict_pre_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        """The names of what is kept."""
        return Recipe((), self.names)

    def ranges(self) -> Mapping[str, Any]:
        """No hyperparameters: the wrapper's own are in the groups of the optimizer in it."""
        return {}

    def validate(self, group: Group) -> None:
        """Nothing to check."""

    def scalars(self, group: Group, step: int) -> Any:
        """The same at every step, so that no step count is needed."""
        return row_of(none=0.0)

    def begin(self, plan: Plan, name: str, dtype: torch.dtype | None, anew: Callable[[Slot], bool]) -> None:
        """Make state a copy of its parameter, where it is missing or to be made ``anew``; frozen parameters need none.

        Args:
            plan: the plan.
            name: of the state.
            dtype: of new state; the parameter's by default.
            anew: whether the state of a slot is to be made anew.
        """
        wanted = {
            slot.parameter
            for slot in plan.slots
            if slot.parameter.requires_grad and (name not in self.state.get(slot.parameter, ()) or anew(slot))
        }
        for slot in plan.slots:
            if slot.parameter in wanted:
                slot.flat_state(self.state[slot.parameter], (name,), dtype)[0].copy_(slot.flat_parameter())

    def load(
        self,
        state_dict: Mapping[str, Any],
        param_groups: list[dict[str, Any]],
        plan: Plan,
        model: Model | None,
        meanwhile: Callable[[], None],
    ) -> None:
        """Check what a state dict holds of this state on all ranks, do ``meanwhile``, then take it over.

        ``meanwhile`` loads the rest; if it raises, nothing is taken over.

        Raises:
            ValueError: for missing or wrongly shaped state.
        """
        self.param_groups, self._model = param_groups, model
        groups = [{key: group[key] for key in _OWN_KEYS if key in group} for group in state_dict["param_groups"]]
        state = {
            key: {name: value for name, value in entry.items() if name in self.names}
            for key, entry in state_dict["state"].items()
        }
        if any(state.values()):  # what has no entry then lacks it; a step count makes that show
            lacking: dict[str, Any] = {"step": 0.0}
            state = {key: own or (lacking if state_dict["state"][key] else {}) for key, own in state.items()}
        kept: dict[str, Any] = {"state": state, "param_groups": groups}
        if WHOLE_KEY in state_dict:
            kept[WHOLE_KEY] = True
        ranks = joint_groups(plan.slots, set(plan.slots))
        _, entries = agreed(lambda: checked(self, kept, plan), ranks, self.owner)
        meanwhile()
        fresh: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
        for entry in entries:
            adopt(entry, fresh[entry.slot.parameter])
            fresh[entry.slot.parameter].pop("step", None)
        self.state = fresh
