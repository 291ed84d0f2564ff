"""Controls, ceilings and baselines: one table of functions, and how a user adds one.

Every function makes a plan (see `methods`); `evaluate` finds its coefficient within the budget,
measures it, and writes a row. A function that has nothing to offer for the plan at hand says so,
and its row says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens._tables import register
from expertsteer_lens.align.kinds import KINDS as ALIGNER_KINDS
from expertsteer_lens.errors import ArgumentError

from .methods import (
    NotMeasured,
    base_plan,
    few_labels_plan,
    learner,
    least_squares_plan,
    mapped_plan,
    native_plan,
    paper_plan,
    realigned_plan,
    shuffled_plan,
    wrong_layer_plan,
)
from .result import FLOOR, SAME_NORM, Role

if TYPE_CHECKING:
    from expertsteer_lens.data.activations import ActivationStore
    from expertsteer_lens.pipeline.fitted import ExpertSteering
    from expertsteer_lens.steer.plan import SteeringPlan

__all__ = ["COMPARISONS", "Comparison", "NotMeasured", "Setting", "comparisons", "register_control"]

Methods = Literal["controls", "all"]
METHODS: tuple[Methods, ...] = get_args(Methods)
RESERVED_ROLES: tuple[Role, ...] = ("base", "plan", "floor")


@dataclass(frozen=True, eq=False, kw_only=True)
class Setting:
    """What a plan is evaluated with: all that a comparison may use."""

    plan: SteeringPlan
    """The plan under test."""
    fit: ExpertSteering | None = None
    """The fit it came from, if it was given."""
    base: ActivationStore | None = None
    """States of the expert's base model, if they were given."""
    n_random: int = 5
    n_shuffles: int = 3
    seed: int = 0

    @property
    def fitted(self) -> ExpertSteering:
        """The fit.

        Raises:
            NotMeasured: none was given.
        """
        if self.fit is None:
            raise NotMeasured("it needs fit=, the fit that the plan came from")
        return self.fit


def _once(setting: Setting) -> Iterable[int]:
    return (0,)


def _has_fit(setting: Setting) -> bool:
    return setting.fit is not None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One line of the table."""

    make: Callable[[Setting, int], SteeringPlan]
    """(setting, seed) to a plan; raises `NotMeasured` where there is none."""
    role: Role | str = "control"
    methods: Methods = "controls"
    """Made with `methods="controls"` and "all", or with "all" only."""
    applies: Callable[[Setting], bool] = _has_fit
    """Whether this has a meaning for what was given; no row otherwise."""
    seeds: Callable[[Setting], Iterable[int]] = _once
    """One row for each."""
    calibrate: bool = True
    """Whether the coefficient is the largest within the budget, or the plan's own."""


@dataclass(frozen=True)
class Job:
    """One steering to be made and measured."""

    method: str
    role: Role | str
    seed: int
    make: Callable[[], SteeringPlan]
    calibrate: bool = True


def comparisons(setting: Setting, methods: Methods) -> list[Job]:
    """The plan and all it is compared with, as work still to be done; see `evaluate`."""
    jobs = [Job("this plan", "plan", 0, lambda: setting.plan, calibrate=False)]
    for name, c in COMPARISONS.items():
        if (methods == "controls" and c.methods != "controls") or not c.applies(setting):
            continue
        jobs += [
            Job(name, c.role, seed, partial(c.make, setting, seed), c.calibrate)
            for seed in c.seeds(setting)
        ]
    return jobs


def register_control(
    name: str,
    make: Callable[[Setting, int], SteeringPlan],
    *,
    role: Role | str = "control",
    calibrate: bool = True,
    n_seeds: int = 1,
) -> None:
    """Have `evaluate` measure a control of yours beside its own; `COMPARISONS.pop(name)` takes it
    out again.

    Args:
        name: of its rows.
        make: takes a `Setting` (the plan under test, the fit, ...) and a seed, and returns the plan
            to measure. Where there is none it raises `NotMeasured("why")`, which becomes a row
            without numbers.
        role: "control", "ceiling", "baseline", or a word of your own.
        calibrate: give it the largest coefficient within the budget, as every other method; else
            it is measured as it is.
        n_seeds: rows, made with the seeds `seed, seed + 1, ...` of `evaluate`.

    Raises:
        ArgumentError: the name is another row's, or the role is one that `evaluate` fills itself.

    Example:
        The plan backwards, which should lower what the plan raises:

        >>> from expertsteer_lens.evaluation import COMPARISONS, register_control
        >>> def backwards(setting, seed):
        ...     coefficient = setting.plan.vectors[0].coefficient
        ...     return setting.plan.with_coefficient(-coefficient)
        >>> register_control("backwards", backwards, calibrate=False)
        >>> COMPARISONS["backwards"].role
        'control'
        >>> _ = COMPARISONS.pop("backwards")
    """
    if name in ("this plan", "unsteered", "prompting"):
        raise ArgumentError(f"name={name!r} is the name of another method; choose a new one.")
    if role in RESERVED_ROLES:
        raise ArgumentError(
            f"role={role!r} belongs to rows that evaluate makes itself; take 'control', 'ceiling', "
            "'baseline' or a word of your own."
        )
    check_number("n_seeds", n_seeds, low=1, integer=True)
    comparison = Comparison(
        make=make,
        role=role,
        applies=lambda setting: True,
        calibrate=calibrate,
        seeds=lambda setting: range(setting.seed, setting.seed + n_seeds),
    )
    register(COMPARISONS, name, comparison, what="a method", made_by=make)


def check_methods(methods: str) -> None:
    """Raise `ArgumentError` unless `evaluate` knows these."""
    check_choice("methods", methods, METHODS)


# -- the table ------------------------------------------------------------------------------------


def _random(setting: Setting, seed: int) -> SteeringPlan:
    return setting.plan.with_random_directions(seed=seed)


def _native(how: str, setting: Setting, seed: int) -> SteeringPlan:
    return native_plan(setting.fitted, setting.plan, learner(how, setting.fitted))


def _mapped(how: str, setting: Setting, seed: int) -> SteeringPlan:
    return mapped_plan(setting.fitted, setting.plan, learner(how, setting.fitted))


def _realigned(kind: str, setting: Setting, seed: int) -> SteeringPlan:
    return realigned_plan(setting.fitted, setting.plan, kind)


def _few_labels(labeller: str | None, setting: Setting, seed: int) -> SteeringPlan:
    return few_labels_plan(setting.fitted, setting.plan, labeller, seed)


def _minus_base(setting: Setting, seed: int) -> SteeringPlan:
    assert setting.base is not None
    return base_plan(setting.fitted, setting.plan, setting.base)


def _random_seeds(setting: Setting) -> Iterable[int]:
    return range(setting.seed, setting.seed + setting.n_random)


def _is_own(kind: str, setting: Setting) -> bool:
    return setting.fit is not None and setting.fit.config.aligner.kind == kind


def _is_another(kind: str, setting: Setting) -> bool:
    return setting.fit is not None and setting.fit.config.aligner.kind != kind


COMPARISONS: dict[str, Comparison] = {
    SAME_NORM: Comparison(
        make=_random, applies=lambda s: True, seeds=_random_seeds, calibrate=False
    ),
    FLOOR: Comparison(make=_random, role="floor", applies=lambda s: True, seeds=_random_seeds),
    "label-shuffled RFM": Comparison(
        make=lambda s, seed: shuffled_plan(s.fitted, s.plan, seed),
        seeds=lambda s: range(s.seed, s.seed + s.n_shuffles),
    ),
    "wrong layer": Comparison(make=lambda s, seed: wrong_layer_plan(s.fitted, s.plan)),
    "native RFM": Comparison(make=partial(_native, "RFM"), role="ceiling"),
    "native mean difference (CAA)": Comparison(
        make=partial(_native, "mean difference"), role="ceiling"
    ),
    "native PCA (RepE)": Comparison(make=partial(_native, "PCA"), role="baseline", methods="all"),
    "native logistic probe (ITI)": Comparison(
        make=partial(_native, "logistic probe"), role="baseline", methods="all"
    ),
    **{
        name: Comparison(
            make=partial(_few_labels, labeller),
            role="baseline",
            methods="all",
            seeds=lambda s: range(s.seed, s.seed + s.n_shuffles),
        )
        for name, labeller in (
            ("native mean difference, 1 pair", None),
            ("expert as labeller, 1 pair", "expert"),
            ("self as labeller, 1 pair", "self"),
        )
    },
    "expert minus base (UNLOCK)": Comparison(
        make=_minus_base, role="baseline", applies=lambda s: s.base is not None
    ),
    **{
        f"{kind} + mean difference": Comparison(
            make=partial(_mapped, "mean difference"),
            role="baseline",
            methods="all",
            applies=partial(_is_own, kind),
        )
        for kind in ALIGNER_KINDS
    },
    **{
        f"{kind} + RFM": Comparison(
            make=partial(_realigned, kind),
            role="baseline",
            methods="all",
            applies=partial(_is_another, kind),
        )
        for kind in ALIGNER_KINDS
    },
    "least squares + mean difference (L-Cross)": Comparison(
        make=lambda s, seed: least_squares_plan(s.fitted, s.plan), role="baseline", methods="all"
    ),
    "paper preset": Comparison(
        make=lambda s, seed: paper_plan(s.fitted, s.plan, seed),
        role="baseline",
        methods="all",
        seeds=lambda s: (s.fitted.seed, s.fitted.seed + 1),
    ),
}
"""All of them by the name of their rows, in the order of the rows."""
