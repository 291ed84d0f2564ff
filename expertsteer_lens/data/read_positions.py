"""Which tokens' states are kept when texts are read (which tokens are steered: `interventions`)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, DataError

ReadName = Literal["last", "mean", "all", "answer", "attention"]
ReadPositions = ReadName | int
"""What may be read of a text: see `capture`."""
OF_THE_ANSWER = ("answer", "attention")
"""Ways of reading that look at the tokens of the answer alone, where a text says which they are."""
MEANS = ("mean", *OF_THE_ANSWER)
"""Ways of reading that make one row of many tokens."""


def take_positions(
    activations: Float[Tensor, "batch pos d"],
    positions: str | int,
    attention_mask: Tensor | None = None,
) -> Float[Tensor, "n d"]:
    """One row per prompt ("last", "mean" or an absolute token index), or every real token ("all",
    prompt after prompt).

    An index counts real tokens from 0 (BOS included); negative counts from the end. Padding is
    never counted.

    Raises:
        DataError: the tensors are not `[batch, pos, d]` and `[batch, pos]`, or a prompt is too
            short for the index.
        ArgumentError: unknown `positions`.

    Example:
        >>> states = torch.arange(6.0).view(2, 3, 1)
        >>> take_positions(states, "last", torch.tensor([[1, 1, 1], [1, 1, 0]])).flatten().tolist()
        [2.0, 4.0]
    """
    if activations.ndim != 3:
        raise DataError(
            f"activations must have shape [batch, pos, d_model], got {tuple(activations.shape)}."
        )
    batch, pos, _ = activations.shape
    mask = (
        torch.ones(batch, pos, dtype=torch.bool)
        if attention_mask is None
        else attention_mask.bool()
    )
    mask = mask.to(activations.device)
    if mask.shape != (batch, pos):
        raise DataError(f"attention_mask must have shape {(batch, pos)}, got {tuple(mask.shape)}.")
    if positions == "all":
        return activations[mask]
    if positions == "mean":
        weights = mask.to(activations.dtype)[..., None]
        return (activations * weights).sum(1) / weights.sum(1)
    if positions == "last" or isinstance(positions, int):
        index = -1 if positions == "last" else int(positions)
        lengths = mask.sum(1)
        rank = torch.full_like(lengths, index) if index >= 0 else lengths + index
        if ((rank < 0) | (rank >= lengths)).any():
            row = int(((rank < 0) | (rank >= lengths)).nonzero()[0])
            raise DataError(
                f"positions={positions} is outside prompt {row}, which has {int(lengths[row])} "
                "tokens."
            )
        hit = mask & (mask.long().cumsum(1) - 1 == rank[:, None])
        return activations[hit]
    raise ArgumentError(f"positions must be 'last', 'mean', 'all' or an int, got {positions!r}.")
