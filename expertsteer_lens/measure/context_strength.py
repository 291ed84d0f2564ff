"""A strength that each token's own activation decides, learnt on validation prompts.

The edit is that of arXiv 2604.24693 (CLAS): x + s (b + x.w) v at the steered hook point, with w and
b learnt and v as it was. How they are learnt is ours. There (in its authors' published code) the
loss is the cross-entropy of wanted completions, without a limit on what else changes, and the
checkpoint of lowest held-out loss is taken. Here the log-odds of a behaviour are raised at the same
damage to neutral texts, from the fixed strength on, and the fixed strength is given back unless it
is beaten on prompts that nothing was learnt from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens._html import repr_html
from expertsteer_lens._progress import Step
from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.chat import Text, check_texts
from expertsteer_lens.data.texts import text_hash
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.interventions.edits import find_edit
from expertsteer_lens.steer.plan import SteeringPlan
from expertsteer_lens.steer.vector import SteeringVector

from .calibration import BUDGET_UNITS, BudgetUnit, OverBudgetError, calibrate
from .context_gradient import StrengthGradient
from .neutral import NeutralTexts
from .prepared import Completions

if TYPE_CHECKING:
    import pandas

    from expertsteer_lens.hosts import Host

EDIT = "add_contextual"
TRAIN_FRACTION = 0.6
"""Share of the prompts, and of the texts, that gradients are taken on."""
LEAST_PROMPTS, LEAST_TEXTS = 4, 4
LOOK_EVERY, PATIENCE = 2, 3
"""Steps between two looks at the held-out prompts; looks without a better one until it stops."""
GRID_STEP, GRID_REACH = 1.05, 48
"""Coefficients of both strengths: powers of 1.05, as many as 48 to either side of the plan's own.
The usual grid is too coarse to compare two plans at one budget: a step on it is up to a half."""


@dataclass(frozen=True, eq=False)
class ContextStrength:
    """What was learnt, and the fixed strength beside it, both at the largest coefficient within the
    budget."""

    fixed: SteeringPlan
    """The plan that was given, at that coefficient."""
    learnt: SteeringPlan
    """The learnt strength of the step that did best on the held-out prompts."""
    gain: float
    """Mean over the held-out prompts of the log-odds under `learnt` minus those under `fixed`,
    nats."""
    gain_se: float
    """Its standard error over prompts. `gain` is the largest over the steps looked at, so it is a
    little too good; other prompts are needed to know what it is worth."""
    best_step: int
    history: tuple[dict[str, Any], ...]
    """Per step: `step`, `coefficient`, `spread` (root mean square over tokens of their strength
    minus 1); but for the last, `effect` (nats on the training prompts) and `cost` (nats per token
    on the training texts); where it was looked at, `gain` and `gain_se` on the held-out prompts,
    with the coefficient that the held-out texts allow."""
    budget: float
    unit: BudgetUnit
    seed: int
    facts: dict[str, Any]
    """Numbers and hashes of prompts and texts, and the settings."""

    @property
    def beats_fixed(self) -> bool:
        """Whether the learnt strength is better by more than two standard errors on prompts that
        nothing was learnt from."""
        return self.gain > 2 * self.gain_se and self.gain > 0

    @property
    def plan(self) -> SteeringPlan:
        """The learnt strength if it beats the fixed one, else the fixed one; `provenance` says
        which."""
        chosen = self.learnt if self.beats_fixed else self.fixed
        facts = {**chosen.provenance, "context_strength": self.to_dict()}
        return replace(chosen, provenance=facts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content, as stored in a plan."""
        return {
            "kept": "learnt" if self.beats_fixed else "fixed",
            "gain": self.gain,
            "gain_se": self.gain_se,
            "best_step": self.best_step,
            "budget": self.budget,
            "unit": self.unit,
            "seed": self.seed,
            **self.facts,
            "history": [dict(row) for row in self.history],
        }

    def to_pandas(self) -> pandas.DataFrame:
        """The history, one row a step."""
        import pandas as pd

        return pd.DataFrame([dict(row) for row in self.history])

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        kept = "learnt strength" if self.beats_fixed else "fixed strength kept; the learnt one"
        return (
            f"ContextStrength({kept}: {self.gain:+.3g} ± {self.gain_se:.2g} nats against the fixed "
            f"one on {self.facts['n_held_out']} held-out prompts, step {self.best_step})"
        )


def fit_context_strength(
    plan: SteeringPlan,
    model: Any,
    behaviour: Behaviour,
    texts: Sequence[Text],
    *,
    budget: float = 0.10,
    unit: BudgetUnit = "nll",
    n_steps: int = 12,
    step_size: float = 0.1,
    seed: int = 0,
    progress: bool | None = False,
) -> ContextStrength:
    """Learn how strongly each token is steered, from its own activation: x + s (b + x.w) v.

    Starts at the fixed strength (w = 0, b = 1). Each step moves w so that the behaviour's log-odds
    rise most for a given change of the strengths, at the damage to neutral texts that the fixed
    strength does: the gradient of the effect minus that of the damage, at the rate at which the
    plan's own coefficient trades one for the other. b is such that the mean strength over the
    tokens read stays 1: how strong the whole is, the budget decides. The covariance of the states
    measures the change, so neither the unit nor the width of the model matters.

    Prompts and texts are divided by `seed`: 60 % are learnt from; on the others the coefficient is
    calibrated and the step is chosen, for both strengths alike. After three looks (every second
    step) without a better one it stops. Nothing is learnt where every prompt is alike: give prompts
    that differ.

    Args:
        plan: of vectors that add at a fixed strength (edit "add"), or at one learnt before, which
            starts anew. Gates, positions and `preserve_norm` stay as they are.
        model: the target; its weights are not changed.
        behaviour: validation prompts, at least 4 distinct ones; none that is tested on.
        texts: neutral texts for calibration, at least 4.
        budget: damage to the texts, nats per token.
        unit: "nll" or "kl", see `calibrate`.
        n_steps: most steps.
        step_size: root mean square, over the tokens read, of the change of strength in one step; 1
            is the strength itself.
        seed: divides prompts and texts.
        progress: show progress; None: where standard error is a terminal.

    Returns:
        Both strengths, how they compare on held-out prompts, and `.plan`, the better of the two.

    Raises:
        ArgumentError: a vector with another edit, a plan that steers away, or `budget` is exceeded
            by every strength.
        DataError: too few prompts or texts, or a vector that edits none of their tokens.

    Cost: a step is one forward and one backward pass of the blocks above the lowest steered layer
    over the training prompts' completions and the training texts; a look, a few forward passes over
    the others. Memory: the graph of one small batch, and `d * d` numbers a vector.

    Source: the edit, arXiv 2604.24693; the learning, chosen by us (see the head of this module).

    Example:
        >>> from expertsteer_lens import SteeringPlan, zoo
        >>> target = zoo.load("target", host="huggingface")
        >>> vectors = {"blocks.1.hook_resid_post": torch.ones(target.config.hidden_size)}
        >>> plan = SteeringPlan.from_vectors(vectors, relative_to="unit")
        >>> found = fit_context_strength(
        ...     plan, target, zoo.behaviour(n=6), zoo.neutral_texts(6), n_steps=2
        ... )
        >>> found.learnt.vectors[0].edit, len(found.history)
        ('add_contextual', 3)
    """
    check_number("budget", budget, low=0.0, low_open=True)
    check_choice("unit", unit, BUDGET_UNITS)
    check_number("n_steps", n_steps, low=1, integer=True)
    check_number("step_size", step_size, low=0.0, low_open=True)
    fixed = _fixed(plan)
    host = as_host(model)
    prompts = _divided(behaviour, seed)
    neutral = _divided_texts(check_texts("texts", texts), seed)
    learner = _Learner(host, fixed, prompts, neutral, budget, unit)
    with Step(
        "context strength",
        total=n_steps,
        progress=progress,
        unit="step",
        cost=f"each a forward and a backward pass over {len(prompts[0])} prompts and "
        f"{len(neutral[0])} neutral texts; fewer where it stops helping",
    ) as step:
        history, best = learner.run(n_steps, step_size, step.advance)
    return ContextStrength(
        fixed=learner.fixed,
        learnt=best.plan,
        gain=best.gain,
        gain_se=best.gain_se,
        best_step=best.step,
        history=tuple(history),
        budget=budget,
        unit=unit,
        seed=seed,
        facts={
            "n_trained_on": len(prompts[0]),
            "n_held_out": len(prompts[1]),
            "n_texts": [len(part) for part in neutral],
            "behaviour_hash": behaviour.hash,
            "texts_hash": text_hash(texts),
            "n_steps": n_steps,
            "step_size": step_size,
        },
    )


def _fixed(plan: SteeringPlan) -> SteeringPlan:
    """The plan with constant additions."""
    vectors = []
    for vector in plan.vectors:
        edit = find_edit(vector.edit)
        if edit.without_parameters is not None:
            vector = replace(vector, edit=edit.without_parameters, parameters={})
        if vector.edit != find_edit(EDIT).without_parameters:
            raise ArgumentError(
                f"plan: edit={vector.edit!r} at {vector.hook_name!r} has no strength that could "
                "depend on the context; use vectors with edit='add'."
            )
        vectors.append(vector)
    if max((v.coefficient for v in vectors), key=abs) <= 0:
        raise ArgumentError(
            "plan: its largest coefficient is not above 0, so it does not steer towards the "
            "behaviour; use plan.with_coefficient(...), or swap positive and negative."
        )
    return replace(plan, vectors=tuple(vectors))


def _divided(behaviour: Behaviour, seed: int) -> tuple[Behaviour, Behaviour]:
    n = len(set(behaviour.prompts))
    if n < LEAST_PROMPTS:
        raise DataError(
            f"behaviour holds {n} distinct prompts, but a strength is learnt on one part of them "
            f"and judged on the other: give at least {LEAST_PROMPTS}."
        )
    return behaviour.split(TRAIN_FRACTION, seed=seed)


def _divided_texts(texts: Sequence[Text], seed: int) -> tuple[list[Text], list[Text]]:
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < LEAST_TEXTS:
        raise DataError(
            f"texts holds {len(distinct)} distinct neutral texts, but the damage is learnt on one "
            f"part of them and judged on the other: give at least {LEAST_TEXTS}."
        )
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = round(len(distinct) * TRAIN_FRACTION)
    return [distinct[i] for i in sorted(order[:cut])], [distinct[i] for i in sorted(order[cut:])]


@dataclass(frozen=True)
class _Look:
    """A step as the held-out prompts see it."""

    step: int
    plan: SteeringPlan
    gain: float
    gain_se: float


class _Learner:
    """The steps, and the looks at held-out prompts between them."""

    def __init__(
        self,
        host: Host,
        plan: SteeringPlan,
        prompts: tuple[Behaviour, Behaviour],
        texts: tuple[list[Text], list[Text]],
        budget: float,
        unit: BudgetUnit,
    ) -> None:
        self.host, self.budget, self.unit = host, budget, unit
        self.held_texts = NeutralTexts(host, texts[1])
        self.fixed = self._calibrated(plan)
        self.held = Completions(host, prompts[1])
        self.fixed_odds = self.held.scores(self.fixed).log_odds()
        self.gradient = StrengthGradient(host, _contextual(self.fixed), prompts[0], texts[0], unit)

    def run(
        self, n_steps: int, step_size: float, advance: Callable[[], None]
    ) -> tuple[list[dict[str, Any]], _Look]:
        """The history, and the step that did best."""
        at, allowed = self.gradient.start(), None
        history: list[dict[str, Any]] = []
        best = _Look(0, self.gradient.plan_at(at), 0.0, 0.0)
        n_worse = 0
        for step in range(n_steps + 1):
            row: dict[str, Any] = {"step": step, **self.gradient.shown(at)}
            history.append(row)
            if step and (step % LOOK_EVERY == 0 or step == n_steps):
                look = self._look(step, self.gradient.plan_at(at))
                row |= {"gain": look.gain, "gain_se": look.gain_se}
                is_better = best.step == 0 or look.gain > best.gain
                best, n_worse = (look, 0) if is_better else (best, n_worse + 1)
            if step == n_steps or n_worse == PATIENCE:
                break
            here = self.gradient.measure(at)
            row |= {"effect": here.effect.value, "cost": here.damage.value}
            allowed = here.damage.value if allowed is None else allowed
            at = self.gradient.moved(at, here, allowed, step_size)
            advance()
        return history, best

    def _look(self, step: int, plan: SteeringPlan) -> _Look:
        try:
            plan = self._calibrated(plan)
        except OverBudgetError:  # it cannot be compared: no strength of it is within the budget
            return _Look(step, plan, -math.inf, 0.0)
        change = self.held.scores(plan).log_odds() - self.fixed_odds
        error = float(change.std() / len(change) ** 0.5) if len(change) > 1 else 0.0
        return _Look(step, plan, float(change.mean()), error)

    def _calibrated(self, plan: SteeringPlan) -> SteeringPlan:
        own = max(abs(v.coefficient) for v in plan.vectors)
        middle = round(math.log(own) / math.log(GRID_STEP))
        grid = [GRID_STEP**k for k in range(middle - GRID_REACH, middle + GRID_REACH + 1)]
        found = calibrate(
            plan,
            self.host.model,
            self.held_texts,
            budget=self.budget,
            unit=self.unit,
            grid=grid,
            curve=False,
        )
        return plan.with_coefficient(found.coefficient)


def _contextual(plan: SteeringPlan) -> SteeringPlan:
    """The plan with strengths that could depend on the context and do not yet."""

    def begun(vector: SteeringVector) -> SteeringVector:
        zero = torch.zeros_like(vector.direction)
        return replace(vector, edit=EDIT, parameters={"weights": zero, "bias": torch.ones(())})

    return replace(plan, vectors=tuple(begun(v) for v in plan.vectors))
