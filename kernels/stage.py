"""The stages of an update: one pass over the tensors each, and what happens between two of them.

An elementwise optimizer has one :class:`Update`. An optimizer that needs sums has a :class:`Measure`, whose terms the
engine sums over the whole parameter, or over all of its axes but some, whatever its sharding; and after it an
:class:`Apply` (or an Update, or another Measure), which receives what follows from the sums as its last argument ``c``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, TypeAlias

from .language import Rule

__all__ = [
    "WHOLE",
    "Agreed",
    "Agreement",
    "Apply",
    "Axes",
    "Cautious",
    "Decay",
    "Factors",
    "Given",
    "Joint",
    "JointWithLoss",
    "Measure",
    "Prologue",
    "Stage",
    "Stored",
    "Update",
    "Vectors",
    "Write",
    "measures",
    "plain",
]

Axes: TypeAlias = tuple[int, ...]
"""The axes of a parameter, ascending, that a sum or a vector keeps: ``()`` for one value, ``(0,)`` for one per row."""

WHOLE: Axes = ()
"""One value for the whole parameter."""


@dataclass(frozen=True)
class Factors:
    """``rule(sums, h) -> tuple`` of scalars, once per parameter, from its own sums: each term's total over the whole
    parameter, then the number of elements that were summed. Runs inside the kernel that needs it.

    Args:
        rule: the rule.
        n: how many scalars it returns.
    """

    rule: Rule = field(hash=False)  # Triton hashes its source anew each time
    n: int = 1


@dataclass(frozen=True)
class Vectors:
    """``fn(sums, vectors, h) -> (vectors, factors)``, once per parameter, in torch operations and float64.

    For what needs more than the parameter's own totals: sums over rows or columns, and state that is not
    parameter-shaped. It is called for all parameters of one shape together, so every tensor has a leading axis for
    them and then the parameter's axes, of size one where summed: everything broadcasts. All ranks call it with the same
    numbers, also those that hold nothing of the parameter or had no gradient.

    Args:
        fn: the function. ``sums`` are the totals of each term, then ``count``, the number of elements with a gradient,
            and ``step``, the parameter's step count; use it rather than a count inside ``h``, since a rank that had no
            gradient has not counted. ``vectors`` is the vector state of the recipe. New vectors are stored only if
            some rank had a gradient.
        axes: what each factor keeps, in order. Stages that follow also receive the factors of earlier ``Vectors``,
            before these.
    """

    fn: Callable[[Any, Any, Any], tuple[Any, Any]]
    axes: tuple[Axes, ...]


@dataclass(frozen=True)
class Joint:
    """``fn(totals, kept, h) -> (kept, factors)``, once per parameter group, in torch operations and float64.

    For sums over all parameters of the model.

    Args:
        fn: the function. ``totals`` are the sums of each term over all parameters of all groups, then the number of
            elements; ``kept`` the group's running scalars (``Recipe.kept``). All are 0-d, float64, on the device. New
            scalars are stored only if some rank had a gradient. ``h`` is that of one of the group's parameters: use
            nothing of it that depends on the step.
        n: how many scalars ``factors`` has.
    """

    fn: Callable[..., tuple[Any, Any]]
    n: int = 1


@dataclass(frozen=True)
class JointWithLoss(Joint):
    """``fn(totals, kept, h, loss) -> (kept, factors)``: a :class:`Joint` that needs the batch loss too, the mean over
    the data-parallel ranks. A step then must be given it."""


@dataclass(frozen=True)
class Stored:
    """The vector state of the recipe as it is, before a first stage: the factors are the vectors, in order."""

    axes: tuple[Axes, ...]


@dataclass(frozen=True)
class Agreed:
    """What ``before`` gives, and then the factor of an update that keeps only what agrees with the gradient.

    It is the number of elements over that of those that agree, which an :class:`Agreement` counted; at most 1,000.
    """

    before: Factors | Vectors | Joint | Stored | None


Given: TypeAlias = Factors | Vectors | Joint | Stored | Agreed
"""What comes before a stage, and gives its ``c``: mostly what follows from the sums of a Measure before it."""


@dataclass(frozen=True)
class Update:
    """``rule(p, g, state, h) -> (p, state)``: reads and writes everything in one pass; with ``c`` if given any.

    State that a rule only reads comes last, and is left out of what it returns: then it is not stored.
    """

    rule: Rule = field(hash=False)  # Triton hashes its source anew each time
    given: Given | None = None
    sums: ClassVar[tuple[Axes, ...]] = ()
    maxima: ClassVar[tuple[Axes, ...]] = ()
    writes_parameter: ClassVar[bool] = True
    writes_state: ClassVar[bool] = True


@dataclass(frozen=True)
class Measure:
    """``rule(p, g, state, h) -> (state, terms)``: writes the state and sums each term; with ``c`` if it is given any.

    Args:
        rule: the rule.
        sums: for each term the axes that its sum keeps; ``WHOLE`` for the sum over the whole parameter.
        writes_state: whether the state changes; without, it is not stored.
        given: what comes before.
        maxima: for each further term the axes that its maximum keeps. Terms are >= 0; where there is no gradient the
            maximum is 0.
    """

    rule: Rule = field(hash=False)  # Triton hashes its source anew each time
    sums: tuple[Axes, ...]
    writes_state: bool = True
    given: Given | None = None
    maxima: tuple[Axes, ...] = ()
    writes_parameter: ClassVar[bool] = False


@dataclass(frozen=True)
class Apply:
    """``rule(p, g, state, h, c) -> p``: writes the parameter, reads the state."""

    rule: Rule = field(hash=False)  # Triton hashes its source anew each time
    given: Given | None
    sums: ClassVar[tuple[Axes, ...]] = ()
    maxima: ClassVar[tuple[Axes, ...]] = ()
    writes_parameter: ClassVar[bool] = True
    writes_state: ClassVar[bool] = False


@dataclass(frozen=True)
class Agreement:
    """Counts the elements that a stage would move against the gradient, and changes nothing."""

    stage: Update | Apply
    sums: ClassVar[tuple[Axes, ...]] = (WHOLE,)
    maxima: ClassVar[tuple[Axes, ...]] = ()
    writes_parameter: ClassVar[bool] = False
    writes_state: ClassVar[bool] = False

    @property
    def rule(self) -> Rule:
        """That of the stage."""
        return self.stage.rule

    @property
    def given(self) -> Given | None:
        """What the stage is given."""
        return self.stage.given


@dataclass(frozen=True)
class Cautious:
    """A stage that moves only what it moves against the gradient, by as much more as there are fewer such elements.

    It follows an :class:`Agreement`. What decoupled decay removes before the rule is not part of the move.

    Paper: Liang et al., https://arxiv.org/abs/2411.16085.
    """

    stage: Update | Apply
    sums: ClassVar[tuple[Axes, ...]] = ()
    maxima: ClassVar[tuple[Axes, ...]] = ()
    writes_parameter: ClassVar[bool] = True

    @property
    def rule(self) -> Rule:
        """That of the stage."""
        return self.stage.rule

    @property
    def given(self) -> Agreed:
        """What the stage is given, and the factor."""
        given = self.stage.given
        assert not isinstance(given, Agreed)
        return Agreed(given)

    @property
    def writes_state(self) -> bool:
        """As the stage."""
        return self.stage.writes_state


Stage: TypeAlias = Update | Measure | Apply | Agreement | Cautious


def measures(stage: Stage) -> bool:
    """Whether anything is summed, so that an exchange follows."""
    return bool(stage.sums or stage.maxima)


def plain(stage: Stage) -> Update | Measure | Apply:
    """The stage whose rule runs."""
    return stage.stage if isinstance(stage, (Agreement, Cautious)) else stage


class Decay(Enum):
    """Where weight decay enters, outside the rule. Both use the scalar ``decay`` of the parameter's row."""

    NONE = 0
    L2 = 1
    """``g = g + decay * p`` wherever the gradient is read."""
    SHRINK = 2
    """``p = p * decay`` before the rule of a stage that writes the parameter."""


class Write(Enum):
    """How a new parameter is brought into the dtype that it is stored in."""

    NEAREST = 0
    KAHAN = 1
    """To nearest. What that loses is kept, in the first state tensor, and added wherever the parameter is read."""
    STOCHASTIC = 2
    """Up or down, more likely to what is nearer, by random bits, which are the first state tensor."""


@dataclass(frozen=True)
class Prologue:
    """What is done to gradient and parameter before and after every rule. Static: each value is a kernel of its own.

    Order: cast to the compute dtype (fp32; fp64 stays fp64), scale the gradient (unscale and clip factor, one device
    scalar), negate it (``maximize``), decay.
    """

    decay: Decay = Decay.NONE
    maximize: bool = False
    write: Write = Write.NEAREST

    @property
    def aside(self) -> int:
        """How many state tensors, the first ones, are for the write alone; rules do not see them."""
        return int(self.write is not Write.NEAREST)
