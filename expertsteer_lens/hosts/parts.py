"""Small parts that all hosts share: batches of tokens, the functions put at hook points, and who
watches a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from expertsteer_lens.errors import HookNameError, InterventionError
from expertsteer_lens.interventions.clock import ForwardInfo

EditFn = Callable[[Tensor], Tensor | None]
"""Takes the activation `[batch, pos, d]`, returns its replacement or None for no change."""


@runtime_checkable
class Observer(Protocol):
    """Hears where the model is in a sequence, before the first block of every pass; see
    `Host.watch`."""

    def on_forward(self, info: ForwardInfo) -> None:
        """A forward pass is about to run its first block."""

    def on_generate(self, entering: bool, prompt: Tensor | None = None) -> None:
        """A `generate` call begins (True; `prompt` is the mask of its prompt `[rows, pos]`, if it
        says) or ends (False)."""

    def on_prepare(self) -> None:
        """A `generate` call, seen or not, is about to run a pass of its own sequence; what it runs
        without saying so beforehand is another (guidance)."""

    def on_half_precision(self, states: Tensor, mask: Tensor | None) -> None:
        """A pass in float16 has ended: the last block's states `[batch, pos, d]`, and which tokens
        so far are real `[batch, past + pos]`, if that is known."""

    def aside(self) -> AbstractContextManager[None]:
        """Inside the block, passes of this thread are of no generate call that is open now: those
        of a streamer, and of whoever takes the steps of a stream."""

    def on_packed(self, options: Mapping[str, Any], kept: Any = None) -> None:
        """A call with these keyword arguments is about to pack several requests into one row of
        tokens (continuous batching); `kept` is the manager of an earlier one, if the model has kept
        it."""


@runtime_checkable
class Registration(Protocol):
    """Interventions that are in place."""

    def lost(self, *, thorough: bool = True) -> list[str]:
        """Hook names whose intervention someone else removed; without `thorough` only what can be
        seen at once."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Token ids and mask, right padded."""

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    """1 at real tokens, 0 at padding."""

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Real tokens per row."""
        return self.attention_mask.sum(1)

    def to(self, device: Any) -> TokenBatch:
        """The same batch on another device."""
        return TokenBatch(self.input_ids.to(device), self.attention_mask.to(device))

    def part(self, index: Sequence[int]) -> TokenBatch:
        """Some rows, as wide as the longest of them."""
        width = int(self.lengths[index].max())
        return TokenBatch(self.input_ids[index, :width], self.attention_mask[index, :width])

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> TokenBatch:
    """Rows of ids as one right-padded batch."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return TokenBatch(ids, mask)


def guarded(hook_name: str, fn: EditFn) -> EditFn:
    """`fn` with its input and output checked: three axes in, the same shape, dtype and device
    out."""

    def checked(activation: Tensor) -> Tensor | None:
        if not isinstance(activation, Tensor) or activation.ndim != 3:
            got = (
                tuple(activation.shape)
                if isinstance(activation, Tensor)
                else type(activation).__name__
            )
            raise HookNameError(
                f"hook {hook_name!r} carries {got}; only [batch, pos, d] activations can be read "
                "or steered."
            )
        result = fn(activation)
        if result is None:
            return None
        if not isinstance(result, Tensor):
            raise InterventionError(
                f"the intervention at {hook_name!r} returned {type(result).__name__}, not a tensor."
            )
        was = activation
        if result.shape == was.shape and result.dtype is was.dtype and result.device == was.device:
            return result
        changed = next(
            a for a in ("shape", "dtype", "device") if getattr(result, a) != getattr(was, a)
        )
        raise InterventionError(
            f"the intervention at {hook_name!r} changed the {changed} from {_show(was, changed)} "
            f"to {_show(result, changed)}; return it as it came."
        )

    return checked


def _show(value: Tensor, attribute: str) -> str:
    return str(tuple(value.shape)) if attribute == "shape" else str(getattr(value, attribute))
