"""Edits: pure functions on activations `[batch, pos, d]`, and the table of those a plan can name.

The public functions take an optional boolean mask `[batch, pos]` and return a new tensor of the
same shape, dtype and device. Tokens outside the mask come back bit for bit. A `direction` is used
as a unit vector: it is normalised here, so its length never matters.

`EDITS` holds the edits that a `SteeringVector` knows by name. `register_edit` adds one of yours:

    >>> import torch
    >>> from expertsteer_lens import SteeringPlan
    >>> from expertsteer_lens.interventions.edits import EDITS, Edit, register_edit
    >>> def mirror(activations, direction, coefficient):
    ...     along = activations @ direction
    ...     return activations - (2 * coefficient * along)[..., None] * direction
    >>> register_edit("mirror", Edit(mirror, coefficient="fraction"))
    >>> vectors = {"blocks.0.hook_resid_post": torch.tensor([3.0, 4.0])}
    >>> plan = SteeringPlan.from_vectors(vectors, edit="mirror", relative_to="unit")
    >>> plan.vectors[0]
    blocks.0.hook_resid_post: mirror +1, d=2
    >>> plan.vectors[0].prepared(centred=False)(torch.ones(1, 1, 2))
    tensor([[[-0.6800, -1.2400]]])
    >>> del EDITS["mirror"]
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_choice
from expertsteer_lens._tables import register
from expertsteer_lens.errors import ArgumentError

from .arithmetic import Mask, check_width, finish, move_between, multiply_along, unit_of, wide
from .arithmetic import centre as centre

Activations = Float[Tensor, "batch pos d"]


# -- the functions --------------------------------------------------------------------------------


def add(
    activations: Activations, delta: Tensor, *, mask: Mask = None, preserve_norm: bool = False
) -> Activations:
    """x + delta.

    Args:
        activations: `[batch, pos, d]`.
        delta: `[d]`, or anything that broadcasts to the activations (e.g. `[batch, 1, d]`: one per
            row).
        mask: tokens to edit; None edits every token.
        preserve_norm: rescale each edited token to the norm it had, so that only the angle changes.

    Raises:
        WidthError: the last axis of `delta` is not `d`.

    Example:
        >>> add(torch.zeros(1, 2, 2), torch.tensor([1.0, 2.0]), mask=torch.tensor([[False, True]]))
        tensor([[[0., 0.],
                 [1., 2.]]])
    """
    check_width("delta", delta, activations)
    base = wide(activations) if preserve_norm else activations
    return finish(activations, base + delta.to(base), mask, preserve_norm)


def add_relative(
    activations: Activations,
    direction: Tensor,
    *,
    coefficient: float | Tensor,
    mask: Mask = None,
    preserve_norm: bool = False,
) -> Activations:
    """x + coefficient * |x| v: every token is steered by the same fraction of its own norm.

    Residual norms differ from token to token, by orders of magnitude where a token is an attention
    sink: a constant that is right for most tokens is nothing to these, and much to a small one.

    Args:
        activations: `[batch, pos, d]`.
        direction: `[d]`.
        coefficient: fraction of the norm; a number, or a tensor that broadcasts to `[batch, pos]`.
        mask: tokens to edit; None edits every token.
        preserve_norm: rescale each edited token to the norm it had.

    Example:
        >>> add_relative(torch.tensor([[[3.0, 4.0]]]), torch.tensor([2.0, 0.0]), coefficient=0.2)
        tensor([[[4., 4.]]])
    """
    edited = _add_relative_edit(wide(activations), unit_of(direction, activations), coefficient)
    return finish(activations, edited, mask, preserve_norm)


def add_contextual(
    activations: Activations,
    direction: Tensor,
    *,
    coefficient: float | Tensor,
    weights: Float[Tensor, " d"],
    bias: float | Tensor = 1.0,
    mask: Mask = None,
    preserve_norm: bool = False,
) -> Activations:
    """x + coefficient * (bias + x . weights) v: the strength is an affine function of the token's
    own activation. At weights 0 and bias 1 it adds coefficient * v.

    The form of arXiv 2604.24693 (CLAS), with a coefficient that scales the whole. Where
    bias + x . weights is below 0, the token is steered the other way.

    Args:
        activations: `[batch, pos, d]`.
        direction: `[d]`; normalised here.
        coefficient: length added where bias + x . weights is 1; a number, or a tensor that
            broadcasts to `[batch, pos]`.
        weights: `[d]`, per unit of the activations; used as they are.
        bias: the strength of a token whose activation is orthogonal to the weights.
        mask: tokens to edit; None edits every token.
        preserve_norm: rescale each edited token to the norm it had.

    Raises:
        WidthError: the direction or the weights have another width than the activations.

    Example:
        >>> x, right = torch.tensor([[[0.0, 2.0], [0.0, 4.0]]]), torch.tensor([1.0, 0.0])
        >>> add_contextual(x, right, coefficient=10.0, weights=torch.tensor([0.0, 0.5]), bias=0.0)
        tensor([[[10.,  2.],
                 [20.,  4.]]])
    """
    check_width("weights", weights, activations)
    x = wide(activations)
    unit, given = unit_of(direction, activations), torch.as_tensor(bias).to(x)
    edited = _add_contextual_edit(x, unit, coefficient, weights.to(x), given)
    return finish(activations, edited, mask, preserve_norm)


def ablate(
    activations: Activations,
    direction: Tensor,
    *,
    coefficient: float | Tensor = 1.0,
    mask: Mask = None,
    preserve_norm: bool = False,
    strength: float | Tensor | None = None,
) -> Activations:
    """x - coefficient * (x . v) v: at 1 nothing is left along v; at -1 the component is doubled.

    Idempotent at coefficient 1. The projection is computed in at least float32.

    Args:
        activations: `[batch, pos, d]`.
        direction: `[d]`.
        coefficient: the fraction of the projection taken away; a number, or a tensor that
            broadcasts to `[batch, pos]`.
        mask: tokens to edit; None edits every token.
        preserve_norm: rescale each edited token to the norm it had.
        strength: old name of `coefficient`.

    Example:
        >>> ablate(torch.tensor([[[3.0, 4.0]]]), torch.tensor([2.0, 0.0]))
        tensor([[[0., 4.]]])
    """
    if strength is not None:
        _warn_renamed("ablate", "strength=s", "coefficient=s")
        coefficient = strength
    unit = unit_of(direction, activations)
    edited = multiply_along(wide(activations), unit, 1.0 - coefficient)
    return finish(activations, edited, mask, preserve_norm)


def rescale(
    activations: Activations,
    direction: Tensor,
    *,
    coefficient: float | Tensor | None = None,
    mask: Mask = None,
    preserve_norm: bool = False,
    factor: float | Tensor | None = None,
) -> Activations:
    """x + coefficient * (x . v) v: the component along v times (1 + coefficient); the rest is left
    alone.

    Args:
        activations: `[batch, pos, d]`.
        direction: `[d]`.
        coefficient: the fraction of the projection that is added; a number, or a tensor that
            broadcasts to `[batch, pos]`. 0 changes nothing, -1 ablates, 1 doubles.
        mask: tokens to edit; None edits every token.
        preserve_norm: rescale each edited token to the norm it had.
        factor: what the component is multiplied by: 1 + coefficient, the old way to say it.

    Raises:
        ArgumentError: no coefficient is given.

    Example:
        >>> rescale(torch.tensor([[[3.0, 4.0]]]), torch.tensor([2.0, 0.0]), coefficient=1.0)
        tensor([[[6., 4.]]])
    """
    if factor is not None:
        _warn_renamed("rescale", "factor=f", "coefficient=f - 1")
    elif coefficient is None:
        raise ArgumentError("rescale needs a coefficient, got none; 1.0 doubles the component.")
    else:
        factor = 1.0 + coefficient
    unit = unit_of(direction, activations)
    edited = multiply_along(wide(activations), unit, factor)
    return finish(activations, edited, mask, preserve_norm)


def clamp(
    activations: Activations,
    direction: Tensor,
    *,
    low: float | Tensor | None = None,
    high: float | Tensor | None = None,
    mask: Mask = None,
    preserve_norm: bool = False,
) -> Activations:
    """Move the projection on v into [low, high], leaving the rest alone; `low == high` sets it.

    Args:
        activations: `[batch, pos, d]`.
        direction: `[d]`.
        low: smallest projection allowed (a number, or a tensor that broadcasts to `[batch, pos]`);
            None: no bound.
        high: largest projection allowed; None: no bound.
        mask: tokens to edit; None edits every token.
        preserve_norm: rescale each edited token to the norm it had.

    Raises:
        ArgumentError: neither bound is given, or low > high.

    Example:
        >>> clamp(torch.tensor([[[3.0, 4.0]]]), torch.tensor([2.0, 0.0]), high=1.0)
        tensor([[[1., 4.]]])
    """
    if low is None and high is None:
        raise ArgumentError("clamp needs low, high or both, got neither.")
    x = wide(activations)
    lower = None if low is None else torch.as_tensor(low, dtype=x.dtype, device=x.device)
    upper = None if high is None else torch.as_tensor(high, dtype=x.dtype, device=x.device)
    if lower is not None and upper is not None and bool((lower > upper).any()):
        raise ArgumentError(f"clamp needs low <= high, got low={low}, high={high}.")
    edited = move_between(x, unit_of(direction, activations), lower, upper)
    return finish(activations, edited, mask, preserve_norm)


# -- the table ------------------------------------------------------------------------------------

EditFunction = Callable[..., Tensor]
"""`function(activations, direction, coefficient, **parameters) -> activations`.

`activations` `[batch, pos, d]` are in the plan's basis and in float32 or float64, `direction` `[d]`
is a unit vector of that type, `coefficient` is a number, or a tensor `[batch, 1]` where it differs
from row to row, and `parameters` are the vector's own, if the edit has any. The basis, the mask,
the norm to be kept and the model's own type are somebody else's business. For runs on a server the
function must be one that can be sent: torch operations on its arguments."""

CoefficientKind = Literal["length", "fraction"]
COEFFICIENT_KINDS = ("length", "fraction")
EditName = Literal["add", "add_relative", "add_contextual", "ablate", "clamp", "rescale"]
"""The edits that come with the package; `register_edit` adds others."""


@dataclass(frozen=True)
class Edit:
    """One kind of edit, as `EDITS` holds it: what is done, and what its coefficient means.

    A coefficient above 0 must steer towards the direction, and 0 must leave the activations as they
    are: calibration and `SteeringPlan.with_coefficient` count on both. (`ablate`, whose business is
    to take away, is the one exception to the sign.)"""

    function: EditFunction
    coefficient: CoefficientKind = "length"
    """ "length": along the direction, in the unit of the activations, so a plan may state it in
    median norms. "fraction": of the projection on the direction, or of the token's norm, so it has
    no unit."""
    is_constant: bool = False
    """Whether the edit adds coefficient * (a vector that depends on the direction alone). Such an
    edit is done in the activations' own type, and is what other programs' files can hold."""
    check: Callable[[float], None] | None = None
    """Raises `ArgumentError` for a coefficient that makes no sense; None: any finite number."""
    parameters: Mapping[str, Literal["d", ""]] = field(default_factory=dict, hash=False)
    """Names of what each vector must bring besides its direction, with their axes: "d" for a
    tensor `[d]`, "" for a number. `SteeringVector.parameters` holds them, files too."""
    remedy: str = ""
    """Where such parameters come from: the end of the error that says they are missing."""
    without_parameters: str | None = None
    """The edit that takes its place where the parameters of a vector mean nothing: along another
    direction, or at another hook point."""
    adds_along: bool = False
    """Whether all it adds is a multiple of the direction; in the centred basis that is then the
    mean-free part of it, as for a constant edit."""

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ArgumentError(
                "an Edit needs a function of (activations, direction, coefficient), got "
                f"{self.function!r}."
            )
        check_choice("coefficient", self.coefficient, COEFFICIENT_KINDS)
        for axes in self.parameters.values():
            check_choice("the axes of a parameter", axes, ("d", ""))

    def delta(self, direction: Float[Tensor, " d"], coefficient: float) -> Float[Tensor, " d"]:
        """What a constant edit adds to every token."""
        return self.function(torch.zeros_like(direction)[None, None], direction, coefficient)[0, 0]


def _add_edit(x: Tensor, direction: Tensor, coefficient: float | Tensor) -> Tensor:
    by_row = isinstance(coefficient, Tensor) and coefficient.ndim > 0
    return x + (coefficient[..., None] if by_row else coefficient) * direction  # type: ignore[index]


def _add_relative_edit(x: Tensor, direction: Tensor, coefficient: float | Tensor) -> Tensor:
    sizes: Tensor = torch.as_tensor(coefficient, device=x.device) * x.norm(dim=-1)
    return x + sizes[..., None] * direction


def _add_contextual_edit(
    x: Tensor, direction: Tensor, coefficient: float | Tensor, weights: Tensor, bias: Tensor
) -> Tensor:
    sizes: Tensor = torch.as_tensor(coefficient, device=x.device) * (bias + x @ weights)
    return x + sizes[..., None] * direction


def _ablate_edit(x: Tensor, direction: Tensor, coefficient: float | Tensor) -> Tensor:
    return multiply_along(x, direction, 1.0 - coefficient)


def _rescale_edit(x: Tensor, direction: Tensor, coefficient: float | Tensor) -> Tensor:
    return multiply_along(x, direction, 1.0 + coefficient)


def _clamp_edit(x: Tensor, direction: Tensor, coefficient: float | Tensor) -> Tensor:
    # A coefficient of 0 is off, so it bounds nothing; its sign says which side is bounded.
    bound = torch.as_tensor(coefficient, device=x.device)
    unbounded = torch.full_like(bound, torch.inf)
    low = torch.where(bound > 0, bound, -unbounded).to(x.dtype)
    high = torch.where(bound < 0, bound, unbounded).to(x.dtype)
    return move_between(x, direction, low, high)


EDITS: dict[str, Edit] = {
    "add": Edit(_add_edit, coefficient="length", is_constant=True),
    "add_relative": Edit(_add_relative_edit, coefficient="fraction", adds_along=True),
    "add_contextual": Edit(
        _add_contextual_edit,
        parameters={"weights": "d", "bias": ""},
        remedy="or learn them: fit.context_strength(plan)",
        without_parameters="add",
        adds_along=True,
    ),
    "ablate": Edit(_ablate_edit, coefficient="fraction"),
    "clamp": Edit(_clamp_edit, coefficient="length"),
    "rescale": Edit(_rescale_edit, coefficient="fraction"),
}
"""Every edit a plan can name; add to it with `register_edit`."""


def register_edit(name: str, edit: Edit) -> None:
    """Make an edit of your own known under `name`, to `SteeringVector`, plans and files alike.

    A saved plan says the name only, so register the edit before you load one. See the head of this
    module for an example.

    Raises:
        ArgumentError: the name is taken by another edit or is no name, or `edit` is no `Edit`.
    """
    if not isinstance(edit, Edit):
        raise ArgumentError(f"edit must be an Edit(function, coefficient=...), got {edit!r}.")
    if not isinstance(name, str) or not name.isidentifier():
        raise ArgumentError(f"the name of an edit must be a plain word, got {name!r}.")
    register(EDITS, name, edit, what="an edit", made_by=edit.function)


def find_edit(name: EditName | str) -> Edit:
    """The edit of this name.

    Raises:
        ArgumentError: there is none; the message says how to make it known.
    """
    if name not in EDITS:
        try:
            check_choice("edit", name, EDITS)
        except ArgumentError as error:
            raise ArgumentError(
                f"{error} One of your own must be registered first: "
                "expertsteer_lens.interventions.register_edit(name, Edit(...))."
            ) from None
    return EDITS[name]


def _warn_renamed(function: str, old: str, new: str) -> None:
    warnings.warn(
        f"edits.{function}({old}) is now edits.{function}({new})", DeprecationWarning, stacklevel=3
    )
