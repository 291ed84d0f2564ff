"""The edit of one steering vector, ready to be applied to the activations of a pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from expertsteer_lens.errors import WidthError

from .arithmetic import centre, finish, outside_unchanged, unit_of, wide
from .edits import Edit, add


class VectorEdit:
    """The edit of one steering vector, ready to be applied to the activations of a pass.

    Everything that applies a vector goes through here, on this machine and on a server. It is sent
    to a server as source, which is why it is a plain class (see `hosts.nnsight.remote.pack`).

    Args:
        edit: what is done.
        hook_name: for messages.
        direction: `[d]`.
        scale: the coefficient in the unit of the activations.
        preserve_norm: rescale each edited token to the norm it had.
        centred: whether the edit is done on x - mean(x); the mean of x is left as it is.
        parameters: the vector's own, where the edit has any.

    Example:
        >>> from expertsteer_lens.interventions.edits import EDITS
        >>> double = VectorEdit(EDITS["rescale"], "a hook", torch.tensor([1.0, 0.0]), 1.0)
        >>> double(torch.tensor([[[3.0, 4.0]]]))
        tensor([[[6., 4.]]])
    """

    def __init__(
        self,
        edit: Edit,
        hook_name: str,
        direction: Tensor,
        scale: float,
        *,
        preserve_norm: bool = False,
        centred: bool = False,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.hook_name = hook_name
        self.scale = scale
        self.adds_delta = edit.is_constant and not preserve_norm
        """Whether all that it ever does is to add `delta`."""
        self._function = edit.function
        self._direction = direction
        self._preserve_norm = preserve_norm
        self._centred = centred
        self._adds_centred = centred and edit.adds_along
        self._parameters = dict(parameters or {})
        self.live: Mapping[str, Tensor] | None = None
        """Parameters that gradients should reach, in place of the vector's own."""
        self._constant: Tensor | None = None
        if edit.is_constant:
            constant = edit.delta(direction, scale)
            self._constant = centre(constant) if centred else constant
        self._ready: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, x: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Edited activations, in the type of `x`.

        Args:
            x: `[batch, pos, d]`, in whatever basis the model has.
            mask: tokens to edit `[batch, pos]`; None edits every token.
            rows: multiplies the coefficient, `[batch]`.
        """
        if self.adds_delta:
            return add(x, self._delta_by_row(x, rows), mask=mask)
        before = centre(wide(x)) if self._centred else wide(x)
        if self._constant is None:
            scale = self.scale if rows is None else self.scale * rows[:, None]
            parameters = self._values(before)
            after = self._function(before, self._unit(before), scale, **parameters)
        else:
            after = before + self._delta_by_row(before, rows)
        after = finish(before, after, None, self._preserve_norm)
        # The change is what is added, so the part of x outside of the basis (its mean) stays.
        return outside_unchanged(x, (wide(x) + (after - before)).to(x.dtype), mask)

    def delta(self, x: Tensor) -> Tensor:
        """What a constant edit adds, `[d]` in the type and on the device of `x`.

        Raises:
            WidthError: the activations have another width.
        """
        key = ("delta", x.dtype, x.device)
        if key not in self._ready:
            self._check_width(x)
            assert self._constant is not None
            self._ready[key] = self._constant.to(x)
        return self._ready[key]

    def _delta_by_row(self, x: Tensor, rows: Tensor | None) -> Tensor:
        delta = self.delta(x)
        return delta if rows is None else rows.to(x)[:, None, None] * delta

    def _unit(self, x: Tensor) -> Tensor:
        key = ("unit", x.dtype, x.device)
        if key not in self._ready:
            self._check_width(x)
            unit = unit_of(self._direction, x)
            self._ready[key] = centre(unit) if self._adds_centred else unit
        return self._ready[key]

    def _values(self, x: Tensor) -> dict[str, Tensor]:
        """The parameters in the type and on the device of `x`."""
        if self.live is not None:  # they change from pass to pass, so nothing of them is kept
            return {name: value.to(x) for name, value in self.live.items()}
        for name, value in self._parameters.items():
            key = (f"parameter {name}", x.dtype, x.device)
            if key not in self._ready:
                self._ready[key] = value.to(x)
        return {
            name: self._ready[f"parameter {name}", x.dtype, x.device] for name in self._parameters
        }

    def _check_width(self, x: Tensor) -> None:
        if self._direction.shape[0] != x.shape[-1]:
            raise WidthError(
                f"the vector at {self.hook_name!r} has width {self._direction.shape[0]}, but the "
                f"activations there have width {x.shape[-1]}."
            )
