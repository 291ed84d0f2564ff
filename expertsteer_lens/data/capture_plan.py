"""What a capture will read, known before the model is run, and a place in memory for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expertsteer_lens._checks import check_number
from expertsteer_lens.errors import ArgumentError

TOKEN_ENDS = "token_ends"
"""Where the provenance of states has the character at which each token of each text ends."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CapturePlan:
    """What a capture will write, known before the model is run."""

    key: dict[str, Any]
    """What the rows are: equal keys, equal rows (but for rounding)."""
    made_with: dict[str, Any]
    """What rounding depends on: a capture is only gone on with where it is equal."""
    batches: list[list[int]]
    """Prompts of each pass."""
    row_counts: list[int]
    """Rows of each prompt."""
    norm_counts: list[int] | None
    """Token norms of each prompt; None: no norms are kept."""
    labels: Tensor | None
    """Of the rows."""
    provenance: dict[str, Any] = field(default_factory=dict)
    prompts: list[int] | None = None
    """Which prompts of the whole capture these are, in a share of it; None: all."""
    whole: dict[str, Any] | None = None
    """The plan of the whole capture as JSON, in a share of it."""

    def share(self, number: int, of: int) -> CapturePlan:
        """What one of several processes reads: every `of`-th batch from `number` on, the batches
        being those of the whole.

        Raises:
            ArgumentError: there is no such process, or fewer batches than processes.
        """
        for name, value, low in (("the number of processes", of, 1), ("a process", number, 0)):
            check_number(name, value, low=low, integer=True)
        if not number < of <= len(self.batches):
            raise ArgumentError(
                f"shard=({number}, {of}) must be a process from 0 on and the number of processes, "
                f"and there are {len(self.batches)} batches to share; use fewer processes, or "
                "smaller passes (tokens_per_pass, batch_size)."
            )
        batches = self.batches[number::of]
        prompts = sorted(p for batch in batches for p in batch)
        place = {p: i for i, p in enumerate(prompts)}
        counts, starts = self.row_counts, starts_of(self.row_counts)
        facts = dict(self.provenance)
        if isinstance(facts.get("rows_per_prompt"), list):
            facts["rows_per_prompt"] = [counts[p] for p in prompts]
        if TOKEN_ENDS in facts:
            facts[TOKEN_ENDS] = [facts[TOKEN_ENDS][p] for p in prompts]
        labels = self.labels
        if labels is not None:
            labels = torch.cat([labels[starts[p] : starts[p] + counts[p]] for p in prompts])
        return CapturePlan(
            key={**self.key, "shard": [number, of]},
            made_with=self.made_with,
            batches=[[place[p] for p in batch] for batch in batches],
            row_counts=[counts[p] for p in prompts],
            norm_counts=None
            if self.norm_counts is None
            else [self.norm_counts[p] for p in prompts],
            labels=labels,
            provenance=facts,
            prompts=prompts,
            whole=self._as_json(),
        )

    def _as_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "made_with": self.made_with,
            "batches": self.batches,
            "row_counts": self.row_counts,
            "norm_counts": self.norm_counts,
            "labels": labels_to(self.labels),
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> CapturePlan:
        """Inverse of what `whole` holds."""
        return cls(**{**saved, "labels": labels_from(saved["labels"])})


class StatesInMemory:
    """As `StatesWriter`, for states that are kept in memory: one matrix a hook point, whose rows
    the batches fill."""

    def __init__(self, plan: CapturePlan) -> None:
        self.plan = plan
        self.done: dict[int, str] = {}
        self.states: dict[str, Tensor] = {}
        self._norms: dict[str, list[Tensor]] = {}
        self._starts = starts_of(plan.row_counts)

    def write(
        self, number: int, states: Mapping[str, Tensor], norms: Mapping[str, Tensor] | None
    ) -> None:
        """See `StatesWriter.write`."""
        prompts, counts = self.plan.batches[number], self.plan.row_counts
        rows = torch.cat(
            [torch.arange(self._starts[p], self._starts[p] + counts[p]) for p in prompts]
        )
        for name, value in states.items():
            if name not in self.states:
                self.states[name] = value.new_empty(sum(counts), value.shape[1])
            self.states[name][rows] = value
        for name, value in (norms or {}).items():
            self._norms.setdefault(name, []).append(value)
        self.done[number] = ""

    def norms(self) -> dict[str, Tensor]:
        """The norms of all tokens by hook name, batch after batch."""
        return {name: torch.cat(parts) for name, parts in self._norms.items()}


def labels_to(labels: Tensor | None) -> Any:
    """Labels as JSON."""
    if labels is None:
        return None
    return {"dtype": str(labels.dtype).removeprefix("torch."), "values": labels.tolist()}


def labels_from(saved: Any) -> Tensor | None:
    """Inverse of `labels_to`."""
    if saved is None:
        return None
    dtype = getattr(torch, saved["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"labels of type {saved['dtype']!r}")
    return torch.tensor(saved["values"], dtype=dtype)


def starts_of(counts: Sequence[int]) -> list[int]:
    """Where each of consecutive parts begins.

    >>> starts_of([2, 1, 3])
    [0, 2, 3]
    """
    out, total = [], 0
    for count in counts:
        out.append(total)
        total += count
    return out
