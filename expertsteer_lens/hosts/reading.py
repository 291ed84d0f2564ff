"""Capture: activations of texts as an `ActivationStore`, the same on every host."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertsteer_lens._checks import check_number
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.chat import Text, check_texts, joined_bytes
from expertsteer_lens.errors import ArgumentError, DataError

from .parts import TokenBatch

if TYPE_CHECKING:
    from .base import Host


def capture(
    model: Any,
    prompts: Sequence[Text],
    hook_names: Sequence[str] | None = None,
    *,
    positions: str | int = "last",
    labels: Tensor | Sequence[int] | None = None,
    batch_size: int = 16,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    progress: bool = False,
) -> ActivationStore:
    """Run the prompts through the model and keep what passes the hook points, in the order of the
    prompts.

    Reading is right padded with an explicit mask, stops after the last layer needed, and returns
    float32 copies on the CPU in the model's basis: for models whose output ignores a constant in
    the residual stream (measured, see `Host.basis`) the mean over `d_model` is taken off, so
    processed and unprocessed weights give the same numbers.

    Args:
        model: any model `as_host` accepts.
        prompts: texts, or chats (lists of messages), which are rendered with the model's own
            template.
        hook_names: which hook points; default: `blocks.*.hook_resid_post`.
        positions: "last" (the last token), "mean" (over tokens), "all" (one row per token, prompt
            after prompt) or an absolute token index (BOS counts; negative from the end).
        labels: one per prompt, 1 = positive; repeated per token for "all".
        batch_size: prompts per pass. Prompts are batched by length; the order of the result is that
            of `prompts`.
        prepend_bos: None prepends BOS iff the tokenizer has one, and leaves a chat to its template.
        max_length: most tokens allowed per prompt; None: the model's context length.
        progress: show a tqdm bar.

    Raises:
        HookNameError: unknown hook name, or one that does not carry `[batch, pos, d]`.
        DataError: unusable prompts or labels, or NaN/Inf in an activation (naming hook and prompt).
        ModelStateError: the model is in training mode.
        InterventionError: a hook point did not fire.
    """
    from . import as_host

    host = as_host(model)
    host.check_ready()
    check_number("batch_size", batch_size, low=1, integer=True)
    texts = check_texts("prompts", prompts)
    names = host.check_hook_names(list(hook_names) if hook_names is not None else host.hook_names())
    if not names:
        raise ArgumentError(
            "hook_names is empty; give at least one name, or None for every block's output."
        )
    tokens = host.tokenize(texts, prepend_bos=prepend_bos, max_length=max_length)
    _check_positions(positions, tokens.lengths)
    order = torch.argsort(tokens.lengths.cpu(), stable=True).tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rows: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(texts) for name in names}
    for index in _shown(batches, progress):
        part = _trimmed(tokens, index)
        counts = part.lengths.tolist() if positions == "all" else [1] * len(index)
        for name, value in host.read(part, names, positions).items():
            for row, taken in zip(index, torch.split(value, counts), strict=True):
                rows[name][row] = taken
        _check_finite(rows, index)
    counts = [r.shape[0] for r in rows[names[0]]]
    stacked = {name: torch.cat(parts) for name, parts in rows.items()}
    return ActivationStore(
        stacked,
        _labels(labels, counts),
        _provenance(host, texts, names, positions, prepend_bos, counts),
    )


def _trimmed(tokens: TokenBatch, index: Sequence[int]) -> TokenBatch:
    width = int(tokens.lengths[index].max())
    return type(tokens)(tokens.input_ids[index, :width], tokens.attention_mask[index, :width])


def _check_positions(positions: str | int, lengths: Tensor) -> None:
    """Refuse before the model runs what `take_positions` would refuse half way."""
    if positions in ("last", "mean", "all"):
        return
    if not isinstance(positions, int) or isinstance(positions, bool):
        raise ArgumentError(
            f"positions must be 'last', 'mean', 'all' or an int, got {positions!r}."
        )
    outside = (lengths <= positions) if positions >= 0 else (lengths < -positions)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise DataError(
            f"positions={positions} is outside prompts[{row}], which has {int(lengths[row])} "
            "tokens."
        )


def _check_finite(rows: dict[str, list[Tensor]], index: Sequence[int]) -> None:
    for name, values in rows.items():
        for row in index:
            if not torch.isfinite(values[row]).all():
                raise DataError(
                    f"the activation of prompts[{row}] at {name!r} holds NaN or Inf; look at that "
                    "text, and at the model's "
                    "dtype (float16 overflows above 65504)."
                )


def _labels(labels: Tensor | Sequence[int] | None, counts: Sequence[int]) -> Tensor | None:
    if labels is None:
        return None
    given = torch.as_tensor(labels)
    if given.shape != (len(counts),):
        raise DataError(
            f"labels must have shape ({len(counts)},), one per prompt, got {tuple(given.shape)}."
        )
    return given.repeat_interleave(torch.tensor(counts))


def _provenance(
    host: Host,
    texts: Sequence[Text],
    names: Sequence[str],
    positions: str | int,
    prepend_bos: bool | None,
    counts: Sequence[int],
) -> dict[str, Any]:
    return {
        "source": "capture",
        "host": host.kind,
        "name": host.name,
        "fingerprint": host.fingerprint,
        "d_model": host.d_model,
        "n_layers": host.n_layers,
        "dtype": str(host.dtype).removeprefix("torch."),
        "basis": host.basis,
        "hook_names": list(names),
        "positions": positions,
        "prepend_bos": prepend_bos
        if prepend_bos is not None
        else getattr(host.tokenizer, "bos_token_id", None) is not None,
        "rows_per_prompt": list(counts) if positions == "all" else 1,
        "texts_sha256": texts_sha256(texts),
        "versions": _versions(),
    }


def texts_sha256(texts: Sequence[Text]) -> str:
    """What the provenance of captured states says of their texts: the same for the same texts in
    the same order."""
    return hashlib.sha256(joined_bytes(texts)).hexdigest()


def _versions() -> dict[str, str]:
    out = {}
    for package in ("expertsteer-lens", "torch", "transformers", "transformer-lens", "nnsight"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def _shown(batches: list[list[int]], progress: bool) -> Any:
    if not progress:
        return batches
    from tqdm.auto import tqdm

    return tqdm(batches, desc="capture", unit="batch")
