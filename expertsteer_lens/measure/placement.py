"""At which block a direction is best written.

A direction is learnt where the texts are understood, in the middle of a model. It is one of the
residual stream, which all blocks share, and may be written to any other block: written early, it
goes through more of them. Which block does most at the same damage is measured here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from expertsteer_lens._checks import check_list, check_number
from expertsteer_lens._html import repr_html
from expertsteer_lens._progress import Step
from expertsteer_lens._upward import upward
from expertsteer_lens.data.activations import layer_of
from expertsteer_lens.data.chat import Text, check_texts
from expertsteer_lens.data.contrast import Behaviour
from expertsteer_lens.data.texts import text_hash
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.interventions.edits import find_edit
from expertsteer_lens.steer.plan import SteeringPlan
from expertsteer_lens.steer.vector import SteeringVector

from .calibration import BudgetUnit, OverBudgetError, calibrate
from .neutral import NeutralTexts
from .prepared import Completions

if TYPE_CHECKING:
    import pandas

LEARNT_AT = "learnt_at"
"""Where the provenance of a vector says at which hook point its direction was learnt, if that is
not where it is written."""
RESIDUAL = re.compile(r"blocks\.\d+\.hook_resid_(pre|mid|post)")


@dataclass(frozen=True, eq=False)
class Placement:
    """What a direction does at each block, each time at the largest strength within the budget."""

    plan: SteeringPlan
    """The direction at the block chosen, at its strength."""
    rows: tuple[dict[str, Any], ...]
    """One a block, from the first on: `hook_name`, `coefficient`, `cost` (nats per token), `effect`
    (nats of the behaviour, mean over its prompts), `effect_se`, `gain` (effect minus that at the
    block where the direction was learnt, prompt by prompt) and `gain_se`. Where even the smallest
    strength costs more than the budget, `hook_name` alone; where that is so at the block where the
    direction was learnt, no row has a gain."""
    learnt_at: str
    """The block whose states the direction was learnt from."""
    budget: float
    unit: BudgetUnit
    facts: dict[str, Any]
    """Numbers and hashes of prompts and texts."""

    @property
    def hook_name(self) -> str:
        """The block chosen: the one with the largest effect (of a negative coefficient the lowest),
        if it beats the block that the direction was learnt at by more than two standard errors over
        prompts, else that one."""
        return self.plan.vectors[0].hook_name

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content, as stored in a plan."""
        return {
            LEARNT_AT: self.learnt_at,
            "written_to": self.hook_name,
            "budget": self.budget,
            "unit": self.unit,
            **self.facts,
            "rows": [dict(row) for row in self.rows],
        }

    def to_pandas(self) -> pandas.DataFrame:
        """One row a block."""
        import pandas as pd

        return pd.DataFrame([dict(row) for row in self.rows])

    def plot(self) -> Any:
        """Plotly figure: effect and strength by block."""
        return upward("plot_placement")(self)

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        row = next(r for r in self.rows if r["hook_name"] == self.hook_name)
        more = "over budget where it was learnt"
        if "gain" in row:
            more = f"{row['gain']:+.2f} ± {row['gain_se']:.2f} more"
        return (
            f"Placement(learnt at {self.learnt_at}, written to {self.hook_name}: "
            f"{row['effect']:+.2f} nats, {more}; {len(self.rows)} blocks)"
        )


def learnt_at(vector: SteeringVector) -> str:
    """The hook point that the vector's direction was learnt at."""
    return str(vector.provenance.get(LEARNT_AT, vector.hook_name))


def move(vector: SteeringVector, hook_name: str, median_norm: float) -> SteeringVector:
    """The vector written elsewhere.

    Args:
        vector: its direction stays.
        hook_name: where it is written.
        median_norm: of the states there, the unit of its strength.
    """
    facts = dict(vector.provenance)
    facts.pop(LEARNT_AT, None)
    if hook_name != learnt_at(vector):
        facts[LEARNT_AT] = learnt_at(vector)
    norm = median_norm if vector.relative_to == "median_norm" else None
    return replace(vector, hook_name=hook_name, median_norm=norm, provenance=facts)


def place(
    plan: SteeringPlan,
    model: Any,
    behaviour: Behaviour,
    texts: Sequence[Text] | NeutralTexts,
    *,
    median_norms: Mapping[str, float],
    budget: float = 0.10,
    unit: BudgetUnit = "nll",
    batch_size: int = 32,
    progress: bool | None = False,
) -> Placement:
    """Measure one direction at several blocks and keep the best.

    At each block the strength is the largest within the budget on neutral texts, as `calibrate`
    finds it; two or three passes over the texts and one over the prompts a block.

    Args:
        plan: with one vector, at the residual stream; its block is where the direction was learnt,
            unless its provenance says another.
        model: the target.
        behaviour: validation prompts: the choice is made on them, so test it on others.
        texts: neutral texts, none of them used for fitting.
        median_norms: the blocks to try, with the median norm of a token's state at each (see
            `ActivationStore.median_norm`); the block of the plan is among them.
        budget: nats per token.
        unit: of the budget, see `calibrate`.
        batch_size: texts per forward pass.
        progress: show progress; None: where standard error is a terminal.

    Raises:
        ArgumentError: several vectors, a single prompt, a strength that is no share of a norm, a
            hook point that is not the residual stream, a norm that is missing, or every block is
            over budget.

    Example:
        >>> import expertsteer_lens as esl
        >>> from expertsteer_lens import directions, zoo
        >>> target, pairs = zoo.load("target", host="huggingface"), zoo.contrast_pairs(30)
        >>> hook = "blocks.2.hook_resid_post"
        >>> states = esl.capture(target, pairs.texts, [hook], labels=pairs.labels)
        >>> vectors = {hook: directions.mean_difference(states[hook], states.labels)}
        >>> plan = esl.SteeringPlan.from_vectors(vectors, coefficient=0.3, median_norms=states)
        >>> found = place(
        ...     plan, target, zoo.behaviour(8), zoo.neutral_texts(8),
        ...     median_norms={hook: 17.0, "blocks.0.hook_resid_post": 10.0},
        ... )
        >>> found.hook_name in found.plan.vectors[0].hook_name, len(found.rows)
        (True, 2)
    """
    (vector,) = _one_vector(plan)
    if len(behaviour) < 2:
        raise ArgumentError(
            "behaviour holds 1 prompt, on which no block can be told from another; give more."
        )
    names = list(check_list("median_norms", list(median_norms), of="hook names"))
    for name in names:
        if not RESIDUAL.fullmatch(name):
            raise ArgumentError(
                f"median_norms names {name!r}; a direction of the residual stream can be written "
                "at blocks.*.hook_resid_post (pre, mid) only."
            )
        check_number(f"median_norms[{name!r}]", median_norms[name], low=0.0, low_open=True)
    own = learnt_at(vector)
    if own not in names:
        raise ArgumentError(
            f"median_norms lacks {own!r}, where the direction was learnt; give its norm too, to "
            "compare with."
        )
    host = as_host(model)
    names = sorted(host.check_hook_names(names), key=layer_of)
    neutral = texts
    if not isinstance(neutral, NeutralTexts):
        neutral = NeutralTexts(host, check_texts("texts", neutral), batch_size=batch_size)
    completions = Completions(host, behaviour)
    base, changes = completions.scores().log_odds(), dict[str, Tensor]()
    plans, rows = dict[str, SteeringPlan](), dict[str, dict[str, Any]]()
    cost = (
        f"each about 3 passes over {len(neutral.texts)} texts and 1 over {len(behaviour)} prompts"
    )
    with Step("place", total=len(names), progress=progress, unit="block", cost=cost) as step:
        for name in names:
            there = replace(plan, vectors=(move(vector, name, median_norms[name]),))
            rows[name] = {"hook_name": name}
            try:
                found = calibrate(there, model, neutral, budget=budget, unit=unit, curve=False)
            except OverBudgetError:
                step.advance()
                continue
            plans[name] = found.apply(there)
            changes[name] = completions.scores(plans[name]).log_odds() - base
            spent = next(r["cost"] for r in found.curve if r["coefficient"] == found.coefficient)
            rows[name] |= {"coefficient": found.coefficient, "cost": spent}
            step.advance()
    if not plans:
        raise OverBudgetError(
            f"the direction costs more than budget={budget:g} nats per token at every one of "
            f"{len(names)} blocks, even at the smallest strength; raise budget."
        )
    kept = changes.get(own)
    for name, change in changes.items():
        rows[name] |= {"effect": float(change.mean()), "effect_se": _se(change)}
        if kept is not None:
            rows[name] |= {"gain": float((change - kept).mean()), "gain_se": _se(change - kept)}
    side = -1.0 if vector.coefficient < 0 else 1.0  # a plan that steers away: lower is better
    best = max(changes, key=lambda name: side * rows[name]["effect"])
    if kept is not None and not side * rows[best]["gain"] > 2 * rows[best]["gain_se"]:
        best = own
    result = Placement(
        plan=plans[best],
        rows=tuple(rows.values()),
        learnt_at=own,
        budget=budget,
        unit=unit,
        facts={
            "behaviour": {"n": len(behaviour), "hash": behaviour.hash},
            "texts": {"n": len(neutral.texts), "hash": text_hash(neutral.texts)},
        },
    )
    facts = {**result.plan.provenance, "placement": result.to_dict()}
    return replace(result, plan=replace(result.plan, provenance=facts))


def _one_vector(plan: SteeringPlan) -> tuple[SteeringVector]:
    if len(plan.vectors) != 1:
        raise ArgumentError(
            f"plan has {len(plan.vectors)} vectors; place one direction at a time, e.g. "
            "fit.place(fit.plan(layer_pairs=[pair]))."
        )
    (vector,) = plan.vectors
    if vector.parameters:
        raise ArgumentError(
            f"the parameters of edit={vector.edit!r} were learnt at {vector.hook_name!r} and mean "
            "nothing elsewhere; place the direction first, then learn them."
        )
    if vector.relative_to == "unit" and find_edit(vector.edit).coefficient == "length":
        raise ArgumentError(
            "the coefficient of plan is a length (relative_to='unit'), which is another thing at "
            "every block; make the plan with relative_to='median_norm'."
        )
    return (vector,)


def _se(values: Tensor) -> float:
    """Standard error of the mean over prompts."""
    return float(values.std() / len(values) ** 0.5)
