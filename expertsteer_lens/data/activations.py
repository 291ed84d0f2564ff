"""Captured activations by hook name, with labels and provenance."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_classes, check_list, unknown_hook
from expertsteer_lens._html import repr_html
from expertsteer_lens.errors import ArgumentError, DataError

from .read_positions import take_positions as take_positions
from .states import CheckedStates

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


MEDIAN_TOKEN_NORMS = "median_token_norms"
"""Where the provenance of rows that are means over tokens has the tokens' median norms."""


def medians_of(norms: Mapping[str, Tensor]) -> dict[str, Any]:
    """Median over all tokens, by hook name, as provenance; none where the rows are tokens.

    >>> medians_of({"blocks.0.hook_resid_post": torch.tensor([3.0, 1.0, 2.0])})
    {'median_token_norms': {'blocks.0.hook_resid_post': 2.0}}
    """
    found = {name: float(values.median()) for name, values in norms.items() if len(values)}
    return {MEDIAN_TOKEN_NORMS: found} if found else {}


@dataclass(frozen=True, eq=False)
class ActivationStore(Mapping[str, Tensor]):
    """Activations `[n, d_model]` by hook name: row `i` of every tensor belongs to the same prompt
    (or token).

    Behaves like a read-only dict. Tensors are cloned on construction, so a later in-place change
    elsewhere cannot reach them; a store in a folder (`open`) maps a hook point's states when they
    are asked for, and rows selected of it are read then too. Expert and target stores are *paired*
    when they were captured from the same texts in the same order.

    Raises:
        DataError: no hook name, a tensor that is not a floating `[n, d_model]` matrix of finite
            numbers, unequal numbers of rows, or labels that are not one class per row.

    Example:
        >>> states = {"blocks.0.hook_resid_post": torch.tensor([[0.0, 3.0], [4.0, 0.0]])}
        >>> store = ActivationStore(states, labels=[1, 0])
        >>> store
        ActivationStore(1 hook points, n=2, 1 positive, d_model=2)
        >>> store.select([1])["blocks.0.hook_resid_post"].tolist()
        [[4.0, 0.0]]
        >>> store.median_norm("blocks.0.hook_resid_post")
        3.0
    """

    activations: Mapping[str, Float[Tensor, "n d_model"]]
    labels: Tensor | None = None
    """Class of each row, shape `[n]`, 1 = positive (the behaviour one steers towards), 0 or -1 =
    negative; None if unlabelled."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able facts about the capture: model, fingerprint, basis, positions, BOS policy, hash of
    the texts."""

    def __post_init__(self) -> None:
        given = self.activations
        states = given if isinstance(given, CheckedStates) else CheckedStates.checked(given)
        object.__setattr__(self, "activations", states)
        if self.labels is not None:
            labels = check_classes("labels", self.labels, self.n)
            object.__setattr__(self, "labels", labels.detach().clone())
        object.__setattr__(self, "provenance", dict(self.provenance))

    @classmethod
    def open(cls, path: str | Path, *, check: bool = True) -> ActivationStore:
        """The store that `capture(..., store=path)` wrote: nothing is read but its index; the
        states of a hook point are mapped into memory when they are asked for.

        Args:
            path: the folder.
            check: compare the checksum of a hook point's file when it is first asked for, which
                reads all of it once.

        Raises:
            ArtifactError: there is no complete store, or a file of it is damaged; a damaged file of
                states is noticed when its hook point is asked for.

        Example:
            >>> import tempfile
            >>> from expertsteer_lens import capture, zoo
            >>> expert, _ = zoo.load_pair(host="huggingface")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     made = capture(expert, ["Mia is happy."], store=folder + "/states")
            ...     ActivationStore.open(folder + "/states")
            ActivationStore(6 hook points, n=1, d_model=128)
        """
        from expertsteer_lens._atomic import check_path

        from .states_folder import open_folder

        check_path(path)
        states, labels, provenance = open_folder(Path(path), check=check)
        return cls(states, labels, provenance)

    @classmethod
    def merge(cls, path: str | Path) -> ActivationStore:
        """Put together what several processes captured with `capture(..., store=path, shard=...)`:
        `path` becomes, bit for bit, what one process would have written.

        The folders of the processes, `PATH.shard-0-of-2` and so on, lie beside it (copy them there
        from other machines) and may be removed afterwards. A merge that died goes on where it was.

        Raises:
            ArtifactError: a shard is missing, not complete, damaged or of another capture, or
                `path` holds something else or cannot be written.
            ArgumentError: `path` is no name of a folder, such as "/" or "".

        Example:
            >>> import tempfile
            >>> from expertsteer_lens import capture, zoo
            >>> expert, _ = zoo.load_pair(host="huggingface")
            >>> texts = ["Mia is happy.", "Tom is sad and goes home.", "A dog."]
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     for process in range(2):
            ...         how = {"batch_size": 1, "store": folder + "/states", "shard": (process, 2)}
            ...         part = capture(expert, texts, **how)
            ...     ActivationStore.merge(folder + "/states")
            ActivationStore(6 hook points, n=3, d_model=128)
        """
        from .states_shards import merge_shards

        if Path(path).name in ("", ".."):
            raise ArgumentError(
                f"path={str(path)!r} has no name of its own, beside which shards could lie; give "
                "the folder that capture(..., store=, shard=) was given."
            )
        merge_shards(path, medians_of)
        return cls.open(path)

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
        activations and raw weights raw ones; `capture` records which, a cache cannot.

        Raises:
            DataError: no entry to take, or a prompt too short for `positions`.
            HookNameError: an unknown hook name.
        """
        keys = list(cache.keys())
        names = (
            check_list("hook_names", hook_names, of="hook names")
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

    def __contains__(self, hook_name: object) -> bool:
        return hook_name in self.activations  # the inherited one would read the states

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
        return self._shapes()[0][0]

    @property
    def d_model(self) -> int:
        """Width of the first hook point."""
        return self._shapes()[0][1]

    def _shapes(self) -> list[tuple[int, int]]:
        assert isinstance(self.activations, CheckedStates)
        return list(self.activations.shapes.values())

    def select(
        self,
        rows: Tensor | Sequence[int] | None = None,
        *,
        hook_names: Sequence[str] | None = None,
    ) -> ActivationStore:
        """A new store with the given rows (indices or a boolean mask), in that order, at the given
        hook points; None: all of them.

        Raises:
            ArgumentError: an index that is no row, a mask that is not `[n]`, or no hook name.
            HookNameError: a hook name that is not in the store.
        """
        states, labels = self.activations, self.labels
        assert isinstance(states, CheckedStates)
        if hook_names is not None:
            hook_names = check_list("hook_names", hook_names, of="hook names")
            if not hook_names:
                raise ArgumentError("hook_names is empty; give at least one, or None for all.")
            for name in hook_names:
                if name not in states:
                    raise unknown_hook(name, states.keys(), "an ActivationStore")
            states = states.only(hook_names)
        if rows is not None:
            index = torch.as_tensor(rows)
            if index.dtype == torch.bool:
                usable = index.shape == (self.n,)
            else:
                usable = index.ndim == 1 and not (index.is_floating_point() or index.is_complex())
                usable = usable and bool(((index >= -self.n) & (index < self.n)).all())
            if not usable:
                raise ArgumentError(
                    f"rows must be indices below n={self.n} or a mask of shape ({self.n},), got "
                    f"{index.dtype} of shape {tuple(index.shape)}."
                )
            index = index.detach().clone()  # rows in files are read later
            states = states.select(index)
            labels = None if labels is None else labels[index]
        return ActivationStore(states, labels, self.provenance)

    def to(self, *args: Any, **kwargs: Any) -> ActivationStore:
        """A new store with every tensor moved as by `torch.Tensor.to`."""
        assert isinstance(self.activations, CheckedStates)
        return ActivationStore(self.activations.to(*args, **kwargs), self.labels, self.provenance)

    def median_norm(self, hook_name: str) -> float:
        """Median Euclidean norm of a token's state at `hook_name`: the unit of
        `relative_to="median_norm"`.

        Of the rows; where these are means over tokens, which are shorter than what they are means
        of, of the tokens that `capture` looked at.
        """
        of_tokens = self.provenance.get(MEDIAN_TOKEN_NORMS) or {}
        if hook_name in of_tokens:
            return float(of_tokens[hook_name])
        return float(self[hook_name].float().norm(dim=1).median())

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        labelled = "" if self.labels is None else f", {int((self.labels > 0).sum())} positive"
        size = f"n={self.n}{labelled}, d_model={self.d_model}"
        return f"ActivationStore({len(self)} hook points, {size})"
