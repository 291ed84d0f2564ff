"""Rows of an evaluation that the user stopped, and the evaluation that goes on from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expertsteer_lens._checks import keep_finished
from expertsteer_lens._progress import progress_bar
from expertsteer_lens.errors import ArgumentError, Interrupted

from .result import SETTING, Evaluation, EvaluationRow

if TYPE_CHECKING:
    from torch import Tensor

    from expertsteer_lens.data.activations import ActivationStore
    from expertsteer_lens.pipeline.fitted import ExpertSteering
    from expertsteer_lens.steer.plan import SteeringPlan

    from .comparisons import Job


@dataclass(frozen=True, eq=False)
class FinishedRows:
    """What was measured before the user stopped an evaluation."""

    rows: tuple[EvaluationRow, ...]
    setting: str
    """Digest of the plans, the fit, the texts, the budget and the seed they were measured under."""

    @classmethod
    def of(cls, whole: Evaluation) -> FinishedRows:
        """All rows of an evaluation that came to its end."""
        return cls(whole.rows, whole.provenance[SETTING])

    def __repr__(self) -> str:
        return f"FinishedRows({len(self.rows)} rows)"


class KeptRows:
    """Measures the rows of one evaluation, and keeps them if the user stops it.

    Args:
        plans: the plan under test and those it is compared with, by name.
        facts: hashes of texts, models, the fit and `base`, names of methods, and the seed.
        budget: damage allowed, nats per token.
        generation: what is written under every method.
        finished: rows to go on from.

    Raises:
        ArgumentError: those rows were measured under another setting.
    """

    def __init__(
        self,
        plans: Mapping[str, SteeringPlan],
        facts: Mapping[str, Any],
        budget: float,
        generation: Any,
        finished: FinishedRows | None,
    ) -> None:
        said = [
            {name: _digest(plan) for name, plan in plans.items()},
            dict(facts),
            budget,
            repr(generation),
        ]
        text = json.dumps(said, sort_keys=True, default=str)
        self.setting = hashlib.sha256(text.encode()).hexdigest()
        if finished is not None and finished.setting != self.setting:
            raise ArgumentError(
                "finished holds rows of another evaluation (another plan, fit, model or base, "
                "other plans to compare, texts, methods, budget, generation or seed); pass the "
                "arguments of the one that was stopped, or leave finished out."
            )
        self.rows = {(r.method, r.seed): r for r in (finished.rows if finished else ())}

    def measured(
        self, jobs: Sequence[Job], measure: Callable[[Job], EvaluationRow], progress: bool | None
    ) -> list[EvaluationRow]:
        """A row for each job, those that are kept as they are.

        Raises:
            Interrupted: the user stopped it.
        """
        todo = [job for job in jobs if (job.method, job.seed) not in self.rows]
        try:
            for job in progress_bar(
                todo,
                "evaluate",
                progress=progress,
                unit="row",
                cost="each is calibrated on neutral texts, then measured on the test prompts",
            ):
                self.rows[job.method, job.seed] = measure(job)
        except KeyboardInterrupt as stop:
            raise Interrupted(
                f"stopped after {len(self.rows)} of {len(jobs)} rows, which are kept: catch "
                "`errors.Interrupted as stop` and call evaluate again with the same arguments and "
                "finished=stop.finished.",
                FinishedRows(tuple(self.rows.values()), self.setting),
            ) from stop
        except Exception as error:
            if self.rows:
                kept = FinishedRows(tuple(self.rows.values()), self.setting)
                keep_finished(error, kept, f"{len(self.rows)} rows", "evaluate")
            raise
        return [self.rows[job.method, job.seed] for job in jobs]


def _digest(plan: SteeringPlan) -> list[Any]:
    """All that decides what a plan does."""
    vectors = []
    for v in plan.vectors:
        vectors.append((repr(v), _sha256(v.direction, *v.parameters.values())))
    return [vectors, repr(plan.positions)]


def facts_of_fit(fit: ExpertSteering) -> list[Any]:
    """All that decides what a fit gives to an evaluation: its settings and texts, what it was read
    from, and the directions it came to."""
    return [
        fit.config.to_dict(),
        fit.seed,
        fit.data.text_hashes,
        fit.provenance,
        [[pair.expert, pair.target] for pair in fit.layer_pairs],
        [[*key, _sha256(rfm.direction)] for key, rfm in fit.rfms.items()],
    ]


def facts_of_base(base: ActivationStore, fit: ExpertSteering) -> list[Any]:
    """Digests of the states of a base model at the hook points of the expert that are used."""
    names = sorted({expert for expert, _ in fit.aligners} & set(base))
    return [[name, _sha256(base[name])] for name in names]


def _sha256(*tensors: Tensor) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.detach().cpu().double().numpy().tobytes())
    return content.hexdigest()
