"""Captured activations by hook name, with labels and provenance."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_finite, unknown_hook
from expertsteer_lens.errors import ArgumentError, DataError

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def layer_of(hook_name: str) -> int:
    """The 0-based layer in a hook name such as `blocks.3.hook_resid_post`.

    Raises:
        ArgumentError: the name carries no layer index.
    """
    layer = layer_or_none(hook_name)
    if layer is None:
        raise ArgumentError(
            f"hook_name {hook_name!r} carries no layer index; expected e.g. "
            "'blocks.3.hook_resid_post'."
        )
    return layer


def layer_or_none(hook_name: str) -> int | None:
    """The layer in a hook name, or None for a place outside the layers (embedding, final norm).

    Example:
        >>> layer_or_none("blocks.3.hook_resid_post"), layer_or_none("conv2.hook_out")
        (3, None)
    """
    match = _LAYER.search(hook_name)
    return int(match.group(1)) if match else None


@dataclass(frozen=True, eq=False)
class ActivationStore(Mapping[str, Tensor]):
    """Activations `[n, d_model]` by hook name: row `i` of every tensor belongs to the same prompt
    (or token).

    Behaves like a read-only dict. Tensors are cloned on construction, so a later in-place change
    elsewhere cannot reach them. Expert and target stores are *paired* when they were captured from
    the same texts in the same order."""

    activations: Mapping[str, Float[Tensor, "n d_model"]]
    labels: Tensor | None = None
    """Class of each row, shape `[n]`, 1 = positive (the behaviour one steers towards); None if
    unlabelled."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able facts about the capture: model, fingerprint, basis, positions, BOS policy, hash of
    the texts."""

    def __post_init__(self) -> None:
        if not self.activations:
            raise DataError("activations is empty; give at least one hook name.")
        cloned: dict[str, Tensor] = {}
        for name, value in self.activations.items():
            if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
                raise DataError(
                    f"activations[{name!r}] must be a floating tensor of shape [n, d_model]."
                )
            check_finite(f"activations[{name!r}]", value)
            cloned[name] = value.detach().clone().contiguous()
        rows = {name: t.shape[0] for name, t in cloned.items()}
        if len(set(rows.values())) > 1:
            raise DataError(
                f"activations must have the same number of rows under every hook name, got {rows}."
            )
        object.__setattr__(self, "activations", cloned)
        if self.labels is not None:
            labels = torch.as_tensor(self.labels).detach().clone()
            if labels.shape != (self.n,):
                raise DataError(
                    f"labels must have shape ({self.n},), one per row, got {tuple(labels.shape)}."
                )
            object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "provenance", dict(self.provenance))

    @classmethod
    def from_cache(
        cls,
        cache: Mapping[str, Tensor],
        hook_names: Sequence[str] | None = None,
        *,
        positions: str | int = "last",
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ActivationStore:
        """Build a store from a TransformerLens `ActivationCache` (or any dict of `[batch, pos,
        d_model]`).

        Args:
            cache: as `run_with_cache` returns it.
            hook_names: which entries; default: every `blocks.*.hook_resid_post`.
            positions: "last" (the last real token), "mean" (over real tokens) or an absolute index.
            attention_mask: `[batch, pos]`; needed when prompts of unequal length were padded.
                Default: no padding.
            labels: one per batch row.

        The values are taken as they are: for LayerNorm models processed weights give centred
        activations and raw weights raw ones; `capture` records which, a cache cannot."""
        keys = list(cache.keys())
        names = (
            list(hook_names)
            if hook_names is not None
            else [k for k in keys if k.endswith("hook_resid_post")]
        )
        if not names:
            raise DataError("cache holds no 'hook_resid_post'; pass hook_names.")
        out = {}
        for name in names:
            if name not in cache:
                raise unknown_hook(name, keys, "an activation cache")
            out[name] = take_positions(cache[name], positions, attention_mask)
        return cls(out, labels, {"source": "cache", "positions": positions})

    def __getitem__(self, hook_name: str) -> Tensor:
        if hook_name not in self.activations:
            raise unknown_hook(hook_name, self.activations.keys(), "an ActivationStore")
        return self.activations[hook_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __len__(self) -> int:
        return len(self.activations)

    @property
    def hook_names(self) -> list[str]:
        """Hook names in capture order."""
        return list(self.activations)

    @property
    def n(self) -> int:
        """Number of rows (prompts or tokens)."""
        return next(iter(self.activations.values())).shape[0]

    @property
    def d_model(self) -> int:
        """Width of the first hook point."""
        return next(iter(self.activations.values())).shape[1]

    def select(self, rows: Tensor | Sequence[int]) -> ActivationStore:
        """A new store with the given rows (indices or a boolean mask), in that order."""
        index = torch.as_tensor(rows)
        labels = None if self.labels is None else self.labels[index]
        return ActivationStore(
            {k: v[index] for k, v in self.activations.items()}, labels, self.provenance
        )

    def to(self, *args: Any, **kwargs: Any) -> ActivationStore:
        """A new store with every tensor moved as by `torch.Tensor.to`."""
        return ActivationStore(
            {k: v.to(*args, **kwargs) for k, v in self.activations.items()},
            self.labels,
            self.provenance,
        )

    def median_norm(self, hook_name: str) -> float:
        """Median Euclidean norm of the rows at `hook_name`: the unit of
        `relative_to="median_norm"`."""
        return float(self[hook_name].float().norm(dim=1).median())

    def __repr__(self) -> str:
        labelled = "" if self.labels is None else f", {int((self.labels > 0).sum())} positive"
        size = f"n={self.n}{labelled}, d_model={self.d_model}"
        return f"ActivationStore({len(self)} hook points, {size})"


def take_positions(
    activations: Float[Tensor, "batch pos d"],
    positions: str | int,
    attention_mask: Tensor | None = None,
) -> Float[Tensor, "n d"]:
    """One row per prompt ("last", "mean" or an absolute token index), or every real token ("all",
    prompt after prompt).

    An index counts real tokens from 0 (BOS included); negative counts from the end. Padding is
    never counted."""
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
        wanted = -1 if positions == "last" else int(positions)
        lengths = mask.sum(1)
        rank = torch.full_like(lengths, wanted) if wanted >= 0 else lengths + wanted
        if ((rank < 0) | (rank >= lengths)).any():
            row = int(((rank < 0) | (rank >= lengths)).nonzero()[0])
            raise DataError(
                f"positions={positions} is outside prompt {row}, which has {int(lengths[row])} "
                "tokens."
            )
        hit = mask & (mask.long().cumsum(1) - 1 == rank[:, None])
        return activations[hit]
    raise ArgumentError(f"positions must be 'last', 'mean', 'all' or an int, got {positions!r}.")
