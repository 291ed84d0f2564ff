"""What a capture will read, known before the model is run, and a place in memory for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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
