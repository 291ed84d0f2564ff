"""Gates: steer only where a score of the activation says so, decided per row or per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from expertsteer_lens._checks import check_choice, check_labels, check_matrix, check_number
from expertsteer_lens._html import repr_html
from expertsteer_lens.errors import ArgumentError, DataError, WidthError

Per = Literal["row", "token"]
PER = ("row", "token")
Opens = Literal["above", "below"]
OPENS = ("above", "below")


@dataclass(frozen=True, eq=False, kw_only=True)
class Gate:
    """Open where the score of an activation is at least `threshold` (where it is below, if
    `opens="below"`).

    The score is x . direction in the plan's basis (a projection, or a linear probe with its bias in
    the threshold), or whatever `score` returns. Tokens behind a closed gate keep their activation
    bit for bit.

    Example:
        >>> gate = Gate(direction=torch.tensor([1.0, 0.0]), threshold=0.5)
        >>> gate.is_open(torch.tensor([[0.7, 9.0], [0.2, 9.0]]))
        tensor([ True, False])
    """

    threshold: float
    """In the unit of the score."""
    direction: Float[Tensor, " d"] | None = None
    """Weights of a linear score; used as they are, not normalised."""
    score: Callable[[Float[Tensor, "n d"]], Float[Tensor, " n"]] | None = None
    """A score of any other kind (e.g. an RFM's prediction) on float32 rows; cannot be written to a
    file."""
    hook_name: str | None = None
    """Where the score is read, at or before the vector's layer; None: where the vector acts, before
    it acts."""
    per: Per = "row"
    """ "row": decided once per sequence, at the last prompt token; "token": by every token for
    itself."""
    opens: Opens = "above"
    """ "above" or "below" the threshold."""

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)
        check_choice("per", self.per, PER)
        check_choice("opens", self.opens, OPENS)
        if (self.direction is None) == (self.score is None):
            raise ArgumentError("a Gate needs exactly one of direction and score.")
        if self.direction is not None:
            value = torch.as_tensor(self.direction).detach().float().clone().contiguous()
            if value.ndim != 1 or not bool(torch.isfinite(value).all()) or not bool(value.any()):
                raise DataError(
                    "direction must be a finite nonzero vector [d], got shape "
                    f"{tuple(value.shape)}."
                )
            object.__setattr__(self, "direction", value)

    def scores(self, activations: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows"]:
        """The score of each activation, in float32.

        Raises:
            WidthError: `direction` has another width than the activations.
            DataError: `score` returned something other than one number per row.
        """
        rows = activations.float().reshape(-1, activations.shape[-1])
        if self.direction is not None:
            if self.direction.shape[0] != rows.shape[1]:
                raise WidthError(
                    f"the gate's direction has width {self.direction.shape[0]}, the activations "
                    f"{rows.shape[1]}."
                )
            scores = rows @ self.direction.to(rows.device)
        else:
            assert self.score is not None
            scores = torch.as_tensor(self.score(rows))
            if scores.shape != rows.shape[:1]:
                raise DataError(
                    f"the gate's score must return shape ({rows.shape[0]},), got "
                    f"{tuple(scores.shape)}."
                )
        return scores.to(rows).reshape(activations.shape[:-1])

    def is_open(self, activations: Float[Tensor, "*rows d"]) -> Bool[Tensor, "*rows"]:
        """Whether each activation opens the gate."""
        above = self.scores(activations) >= self.threshold
        return above if self.opens == "above" else ~above

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content; `from_dict` reads it back.

        Raises:
            ArgumentError: the gate holds a callable score.
        """
        if self.direction is None:
            raise ArgumentError(
                "this gate holds a callable score and cannot be written to a file; use a direction."
            )
        names = ("threshold", "hook_name", "per", "opens")
        return {
            **{name: getattr(self, name) for name in names},
            "direction": self.direction.tolist(),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Gate:
        """The gate that `to_dict` wrote."""
        return cls(**{**value, "direction": torch.tensor(value["direction"])})

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        score = "projection" if self.score is None else getattr(self.score, "__name__", "score")
        sign = ">=" if self.opens == "above" else "<"
        where = self.hook_name or "its own hook"
        return f"Gate({score} {sign} {self.threshold:.4g} per {self.per}, at {where})"


def fit_gate(
    activations: Float[Tensor, "n d"],
    labels: Tensor,
    *,
    direction: Float[Tensor, " d"] | None = None,
    score: Callable[[Tensor], Tensor] | None = None,
    hook_name: str | None = None,
    per: Per = "row",
) -> Gate:
    """A gate that opens on the positive class: the threshold with the best balanced accuracy on
    these activations.

    Among equally good thresholds the middle of the widest gap is taken. Fit on validation data in
    the basis of `capture`, not on the data the direction was learnt from.

    Args:
        activations: one row per text.
        labels: 1 where the gate should open.
        direction: linear score; the sign is taken as given (positive should score higher).
        score: any other score of `[n, d]` rows.
        hook_name: where the score will be read; None: where the vector acts.
        per: "row" or "token", see `Gate`.

    Raises:
        DataError: one class only, or unusable activations.
        ArgumentError: neither or both of direction and score.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [1.0, 1.0], [4.0, 1.0], [5.0, 1.0]])
        >>> fit_gate(x, torch.tensor([0, 0, 1, 1]), direction=torch.tensor([1.0, 0.0]))
        Gate(projection >= 2.5 per row, at its own hook)
    """
    check_matrix("activations", activations, min_rows=2)
    positive = check_labels("labels", labels, activations.shape[0]).bool()
    trial = Gate(threshold=0.0, direction=direction, score=score, hook_name=hook_name, per=per)
    values, order = trial.scores(activations).double().cpu().sort()
    is_positive = positive.cpu()[order].double()
    # A threshold between neighbours i-1 and i opens on rows i, i+1, ...
    caught = is_positive.flip(0).cumsum(0).flip(0) / is_positive.sum()
    spared = (
        torch.cat([torch.zeros(1).double(), (1 - is_positive).cumsum(0)[:-1]])
        / (1 - is_positive).sum()
    )
    gap = torch.cat([torch.ones(1).double(), values[1:] - values[:-1]])
    quality = torch.where(gap > 0, caught + spared, -torch.ones_like(gap))
    quality[0] = 1.0  # always open
    best = quality >= quality.max() - 1e-12
    index = int(torch.where(best, gap, -torch.ones_like(gap)).argmax())
    threshold = (
        float(values[0] - 1.0) if index == 0 else float((values[index - 1] + values[index]) / 2)
    )
    return Gate(threshold=threshold, direction=direction, score=score, hook_name=hook_name, per=per)
