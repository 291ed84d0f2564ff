"""Which rows of a pass are kept: looked up once a pass, not at every hook point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertsteer_lens.data.read_positions import take_positions


def take_rows(
    activation: Tensor, positions: str | int, attention_mask: Tensor | None = None
) -> Tensor:
    """`take_positions` as float32 rows `[n, d]`, wherever the model runs; means are taken in
    float32."""
    value = activation.float() if positions == "mean" else activation
    return take_positions(value, positions, attention_mask).float()


@dataclass(eq=False)
class TokenRows:
    """Single tokens that a pass is asked for beside what represents its texts."""

    names: Sequence[str]
    """Hook points."""
    mask: Tensor
    """`[batch, pos]`: which tokens."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """Filled by the pass: `[n_tokens, d]` by hook name, as `Host.read` returns rows."""


class RowPicker:
    """Picks what `take_rows` picks, from every activation `[batch, pos, d]` of one pass.

    A mask is turned into indices or weights once, on each device the model lies on: at a hook point
    only the rows that are wanted are touched, and a GPU is not waited for. Means are matrix
    products with the weights, which round otherwise than a sum and a division (by 1e-6 of a row).

    Args:
        positions: see `take_positions`.
        mask: `[batch, pos]`, the tokens that are looked at.

    Raises:
        ArgumentError, DataError: as `take_positions`.

    Example:
        >>> picker = RowPicker("last", torch.tensor([[1, 1, 1], [1, 1, 0]]))
        >>> picker.rows(torch.arange(6.0).view(2, 3, 1)).flatten().tolist()
        [2.0, 4.0]
    """

    def __init__(self, positions: str | int, mask: Tensor) -> None:
        real = mask.bool()
        self.is_mean = positions == "mean"
        self._tokens = {real.device: real.reshape(-1).nonzero()[:, 0]}
        if self.is_mean:
            weights = real.float() / real.sum(1, keepdim=True)
            self._kept = {real.device: weights}
        else:
            places = torch.arange(real.numel(), device=real.device).view(*real.shape, 1)
            self._kept = {real.device: take_positions(places, positions, real)[:, 0]}

    def rows(self, activation: Tensor) -> Tensor:
        """Float32 rows `[n, d]`: copies, where the activation is."""
        kept = _on(self._kept, activation.device)
        if self.is_mean:
            return torch.bmm(kept[:, None], activation.float())[:, 0]
        rows = activation.reshape(-1, activation.shape[-1]).index_select(0, kept)
        return rows.float()

    def tokens(self, values: Tensor) -> Tensor:
        """The values `[n_tokens]` of the tokens looked at, of `[batch, pos]`, row after row."""
        return values.reshape(-1).index_select(0, _on(self._tokens, values.device))


def _on(there: dict[torch.device, Tensor], device: torch.device) -> Tensor:
    if device not in there:
        there[device] = next(iter(there.values())).to(device)
    return there[device]
