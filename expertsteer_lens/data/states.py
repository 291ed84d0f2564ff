"""Matrices of states by hook name that were checked once: what an `ActivationStore` is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from expertsteer_lens._checks import check_finite
from expertsteer_lens.errors import DataError

Shape = tuple[int, int]


class CheckedStates(Mapping[str, Tensor]):
    """Finite floating matrices `[n, d]` by hook name, with one `n`, in memory of their own or in
    files that are read when a hook point is asked for.

    Whoever makes one answers for that: nothing is looked at here, so that states in files are not
    read before they are needed, and rows taken from checked states are not checked again.

    Args:
        shapes: `(n, d)` by hook name.
        read: gives the states of a hook point.
        held: whether they are in memory; what is made of them is then in memory too, and else made
            when it is asked for.

    Example:
        >>> states = CheckedStates.of({"a": torch.tensor([[1.0], [2.0]])})
        >>> states.select(torch.tensor([1]))["a"].tolist(), states.shapes
        ([[2.0]], {'a': (2, 1)})
    """

    def __init__(
        self, shapes: Mapping[str, Shape], read: Callable[[str], Tensor], *, held: bool
    ) -> None:
        self.shapes = dict(shapes)
        self.held = held
        self._read = read

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> CheckedStates:
        """States in memory, which nobody else may have hold of."""
        own = dict(tensors)
        shapes = {name: (value.shape[0], value.shape[1]) for name, value in own.items()}
        return cls(shapes, own.__getitem__, held=True)

    @classmethod
    def checked(cls, given: Mapping[str, Any]) -> CheckedStates:
        """Copies of tensors that anybody may give.

        Raises:
            DataError: there is none, one is no floating `[n, d]` matrix of finite numbers, or they
                have unequal numbers of rows.
        """
        if not isinstance(given, Mapping) or not given:
            raise DataError("activations is empty; give at least one hook name.")
        own: dict[str, Tensor] = {}
        for name, value in given.items():
            if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
                raise DataError(
                    f"activations[{name!r}] must be a floating tensor of shape [n, d_model]."
                )
            check_finite(f"activations[{name!r}]", value)
            own[name] = value.detach().clone().contiguous()
        rows = {name: value.shape[0] for name, value in own.items()}
        if len(set(rows.values())) > 1:
            raise DataError(
                f"activations must have the same number of rows under every hook name, got {rows}."
            )
        return cls.of(own)

    def __getitem__(self, hook_name: str) -> Tensor:
        if hook_name not in self.shapes:
            raise KeyError(hook_name)
        return self._read(hook_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, hook_name: object) -> bool:
        return hook_name in self.shapes  # the inherited one would read the states

    def select(self, rows: Tensor) -> CheckedStates:
        """The rows of an index, in its order."""
        n = int(rows.sum()) if rows.dtype == torch.bool else len(rows)
        shapes = {name: (n, width) for name, (_, width) in self.shapes.items()}
        return self._made(lambda value: value[rows.to(value.device)], shapes)

    def only(self, hook_names: Iterable[str]) -> CheckedStates:
        """The same states at these hook points, in this order."""
        shapes = {name: self.shapes[name] for name in hook_names}
        if self.held:
            return CheckedStates.of({name: self._read(name) for name in shapes})
        return CheckedStates(shapes, self._read, held=False)

    def to(self, *args: Any, **kwargs: Any) -> CheckedStates:
        """The states moved as by `torch.Tensor.to`, in memory of their own.

        Raises:
            DataError: they are no longer floating, or too large for the new type.
        """

        def change(value: Tensor) -> Tensor:
            moved = value.to(*args, **{**kwargs, "copy": True})
            if not moved.is_floating_point():
                raise DataError(f"activations must be floating, so they cannot be {moved.dtype}.")
            check_finite("activations", moved)
            return moved

        return self._made(change, self.shapes)

    def _made(
        self, change: Callable[[Tensor], Tensor], shapes: Mapping[str, Shape]
    ) -> CheckedStates:
        if self.held:
            return CheckedStates.of({name: change(self._read(name)) for name in self.shapes})
        last: dict[str, Tensor] = {}

        def read(hook_name: str) -> Tensor:
            # The last one is kept: who goes over layer pairs asks for it again and again.
            if hook_name not in last:
                made = change(self._read(hook_name))
                last.clear()
                last[hook_name] = made
            return last[hook_name]

        return CheckedStates(shapes, read, held=False)
