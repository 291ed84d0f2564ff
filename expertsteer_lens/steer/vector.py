"""One direction at one hook point, and what is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens._html import repr_html
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.interventions.edits import EDITS as EDITS
from expertsteer_lens.interventions.edits import EditName, find_edit
from expertsteer_lens.interventions.gates import Gate
from expertsteer_lens.interventions.parameters import checked_parameters, shown_parameters
from expertsteer_lens.interventions.vector_edit import VectorEdit

RelativeTo = Literal["median_norm", "unit"]


RELATIVE_TO = ("median_norm", "unit")


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """One direction at one hook point, and what is done with it. A coefficient of 0 is off,
    whatever the edit.

    With v the direction and s = coefficient * (median_norm if relative_to is "median_norm" else 1):

    | edit | effect on x | |
    |---|---|---|
    | add | x + s v | |
    | add_contextual | x + s (bias + x.weights) v | both in `parameters` |
    | clamp | projection on v raised to at least s (s > 0), or lowered to at most s (s < 0) | |
    | add_relative | x + coefficient norm(x) v | a fraction: relative_to must be "unit" |
    | ablate | x - coefficient (x.v) v | a fraction: relative_to must be "unit" |
    | rescale | x + coefficient (x.v) v | a fraction: relative_to must be "unit" |

    Edits of yours join the table with `expertsteer_lens.interventions.register_edit`.

    Example:
        >>> SteeringVector(
        ...     "blocks.3.hook_resid_post", torch.tensor([0.6, 0.8]), 2.0, median_norm=5.0
        ... )
        blocks.3.hook_resid_post: add +2×5 (median norm), d=2
    """

    hook_name: str
    """E.g. `blocks.3.hook_resid_post`."""
    direction: Float[Tensor, " d"]
    """Unit vector, float32, pointing towards the positive class."""
    coefficient: float
    """Signed strength."""
    relative_to: RelativeTo = "median_norm"
    """What the coefficient multiplies: the layer's median residual norm, or "unit" (1)."""
    median_norm: float | None = None
    """Median norm of the target's activations at this hook point, in the plan's basis."""
    edit: EditName | str = "add"
    """ "add", "add_relative", "add_contextual", "ablate", "clamp", "rescale", or one that was
    registered."""
    preserve_norm: bool = False
    """Rescale each edited token to the norm it had."""
    gate: Gate | None = None
    """Where the edit applies, by what the activation says; None: everywhere the positions say."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able facts: expert layer, quality of the fit, ..."""
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    """What the edit asks for besides the direction, float32, in the plan's basis; none but for
    "add_contextual" (`weights` `[d]` per unit of the activations, `bias` a number) and edits that
    were registered so."""

    def __post_init__(self) -> None:
        direction = torch.as_tensor(self.direction).detach().to(torch.float32).clone().contiguous()
        if direction.ndim != 1 or not bool(torch.isfinite(direction).all()):
            raise DataError(
                f"direction at {self.hook_name!r} must be a finite vector [d], got shape "
                f"{tuple(direction.shape)} with "
                f"{int((~torch.isfinite(direction)).sum())} values that are NaN or Inf."
            )
        norm = float(direction.norm())
        if abs(norm - 1.0) > 1e-3:
            raise ArgumentError(
                f"direction at {self.hook_name!r} must be a unit vector, got norm {norm:.4g}; "
                "SteeringPlan.from_vectors normalises for you."
            )
        check_number("coefficient", self.coefficient)
        check_choice("relative_to", self.relative_to, RELATIVE_TO)
        edit = find_edit(self.edit)
        if self.relative_to == "median_norm" and edit.coefficient == "fraction":
            raise ArgumentError(
                f"edit={self.edit!r} takes a fraction as its coefficient; pass relative_to='unit'."
            )
        if edit.check is not None:
            edit.check(self.coefficient)
        if self.relative_to == "median_norm" and self.median_norm is None:
            raise ArgumentError(
                "relative_to='median_norm' needs median_norm; pass it, or relative_to='unit'."
            )
        if self.median_norm is not None:
            check_number("median_norm", self.median_norm, low=0.0, low_open=True)
        parameters = checked_parameters(self.edit, self.parameters, d=direction.shape[0])
        object.__setattr__(self, "direction", direction)
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(
            self, "gate", Gate.from_dict(self.gate) if isinstance(self.gate, Mapping) else self.gate
        )
        object.__setattr__(self, "provenance", dict(self.provenance))

    @property
    def scale(self) -> float:
        """The coefficient in the unit of the activations: coefficient * (median_norm or 1)."""
        unit = (
            self.median_norm
            if self.relative_to == "median_norm" and self.median_norm is not None
            else 1.0
        )
        return float(self.coefficient) * unit

    @property
    def delta(self) -> Float[Tensor, " d"]:
        """What `add` adds: scale * direction, float32."""
        return self.scale * self.direction

    def prepared(self, *, centred: bool) -> VectorEdit:
        """What is done to the activations at the hook point, in the centred basis or the raw
        one."""
        return VectorEdit(
            find_edit(self.edit),
            self.hook_name,
            self.direction,
            self.scale,
            preserve_norm=self.preserve_norm,
            centred=centred,
            parameters=self.parameters,
        )

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        unit = f"×{self.median_norm:.4g} (median norm)" if self.relative_to == "median_norm" else ""
        own = shown_parameters(self.parameters)
        extras = (f", {own}" if own else "") + (", norm preserved" if self.preserve_norm else "")
        extras += "" if self.gate is None else f", {self.gate}"
        width = self.direction.shape[0]
        return f"{self.hook_name}: {self.edit} {self.coefficient:+.4g}{unit}, d={width}{extras}"
