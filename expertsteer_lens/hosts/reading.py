"""Capture: activations of texts as an `ActivationStore`, the same on every host."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertsteer_lens._checks import check_classes, check_number
from expertsteer_lens._progress import progress_bar
from expertsteer_lens.data.activations import MEDIAN_TOKEN_NORMS, ActivationStore
from expertsteer_lens.data.chat import Chat, Text, check_texts
from expertsteer_lens.data.spans import Span, answer_span, check_spans, content
from expertsteer_lens.data.texts import TEXTS_KEY
from expertsteer_lens.data.texts import texts_sha256 as texts_sha256
from expertsteer_lens.errors import ArgumentError, DataError, HostError

from .parts import TokenBatch
from .token_ends import gives_offsets, token_ends, tokens_in

if TYPE_CHECKING:
    from .base import Host


def capture(
    model: Any,
    prompts: Sequence[Text],
    hook_names: Sequence[str] | None = None,
    *,
    positions: str | int = "last",
    spans: Sequence[Span] | None = None,
    labels: Tensor | Sequence[int] | None = None,
    batch_size: int = 16,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    progress: bool | None = False,
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
        positions: which token is *read* (a plan's `positions` say which are steered): "last" (the
            last token), "mean" (over tokens), "answer" (mean over the tokens of the answer: the
            assistant's last message of a chat, else the whole text; or of `spans`), "all" (one row
            per token, prompt after prompt) or an absolute token index (BOS counts; negative from
            the end).
        spans: one (start, end) per prompt, in characters of its content (see `data.spans`): only
            tokens that end inside are looked at, so `positions="mean"` with the answers' spans is
            the mean over the answer. None: every token.
        labels: one per prompt, 1 = positive; repeated per token for "all".
        batch_size: prompts per pass. Prompts are batched by length; the order of the result is that
            of `prompts`.
        prepend_bos: None prepends BOS iff the tokenizer has one, and leaves a chat to its template.
        max_length: most tokens allowed per prompt; None: the model's context length.
        progress: show a tqdm bar; None: where standard error is a terminal.

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
    classes = None if labels is None else check_classes("labels", labels, len(texts))
    names = host.check_hook_names(list(hook_names) if hook_names is not None else host.hook_names())
    if not names:
        raise ArgumentError(
            "hook_names is empty; give at least one name, or None for every block's output."
        )
    tokens = host.tokenize(texts, prepend_bos=prepend_bos, max_length=max_length)
    _check_positions(positions, tokens.lengths)
    if positions == "answer" and spans is None and any(isinstance(text, Chat) for text in texts):
        spans = [answer_span(text) for text in texts]
    pick = "mean" if positions == "answer" else positions
    chosen = None if spans is None else _tokens_in_spans(host, texts, tokens, spans)
    order = torch.argsort(tokens.lengths.cpu(), stable=True).tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rows: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(texts) for name in names}
    norms: dict[str, list[Tensor]] | None = {} if pick == "mean" else None
    n_bytes = 4 * host.d_model * len(names) * len(texts)
    cost = f"{len(texts)} texts, {int(tokens.lengths.sum())} tokens"
    if positions != "all":
        cost += f", {n_bytes / 2**20:.0f} MiB of states are kept"
    for index in progress_bar(batches, "capture", progress=progress, unit="batch", cost=cost):
        part = _trimmed(tokens, index)
        here = None if chosen is None else chosen[index, : part.input_ids.shape[1]]
        per_text = part.lengths if here is None else here.sum(1)
        counts = per_text.tolist() if positions == "all" else [1] * len(index)
        for name, value in host.read(part, names, pick, here, norms).items():
            for row, taken in zip(index, torch.split(value, counts), strict=True):
                rows[name][row] = taken
        _check_finite(rows, index)
    counts = [r.shape[0] for r in rows[names[0]]]
    # One hook point at a time gives up its rows, so that they never stand beside all the matrices.
    stacked = {name: torch.cat(rows.pop(name)) for name in list(rows)}
    return ActivationStore(
        stacked,
        None if classes is None else classes.repeat_interleave(torch.tensor(counts)),
        {
            **_provenance(host, texts, names, positions, prepend_bos, counts),
            **({} if spans is None else {"spans": [list(span) for span in spans]}),
            **({MEDIAN_TOKEN_NORMS: _medians(norms)} if norms else {}),
        },
    )


def read_tokens(
    host: Host,
    texts: Sequence[Text],
    tokens: TokenBatch,
    positions: str | int,
    spans: Sequence[Span] | None = None,
) -> Tensor:
    """Mask `[n, pos]` of the tokens whose activations `capture` reads; arguments as there."""
    _check_positions(positions, tokens.lengths)
    if positions == "answer" and spans is None and any(isinstance(text, Chat) for text in texts):
        spans = [answer_span(text) for text in texts]
    real = tokens.attention_mask.bool()
    if spans is not None:
        real = _tokens_in_spans(host, texts, tokens, spans)
    if positions in ("mean", "answer", "all"):
        return real
    rank = real.long().cumsum(1) - 1  # of a token among those looked at
    count = real.sum(1, keepdim=True)
    wanted = -1 if positions == "last" else int(positions)
    return real & (rank == (wanted if wanted >= 0 else count + wanted))


def _medians(norms: dict[str, list[Tensor]]) -> dict[str, float]:
    """Median over all tokens, by hook name."""
    return {name: float(torch.cat(parts).median()) for name, parts in norms.items()}


def _tokens_in_spans(
    host: Host, texts: Sequence[Text], tokens: TokenBatch, spans: Sequence[Span]
) -> Tensor:
    """Mask `[n, pos]` of the tokens that end inside the span of their text.

    Raises:
        HostError: the tokenizer cannot say which characters a token covers.
        DataError: no token of a text ends inside its span.
    """
    spans = check_spans(spans, texts)
    if not gives_offsets(host.tokenizer):
        raise HostError(
            f"the tokenizer of {host.name!r} does not say which characters its tokens cover, so "
            "no part of a text can be read; use a fast tokenizer, or read the whole text."
        )
    chosen = tokens_in(token_ends(host, texts, tokens), spans)
    empty = (~chosen.any(dim=1)).nonzero()[:, 0].tolist()
    if empty:
        i = empty[0]
        part = content(texts[i])[slice(*spans[i])]
        raise DataError(
            f"no token of prompts[{i}] ends inside its span {tuple(spans[i])} ({part[:40]!r}); "
            "does the chat template rewrite the message? Read the whole text (reading='mean')."
        )
    return chosen.to(tokens.input_ids.device)


def _trimmed(tokens: TokenBatch, index: Sequence[int]) -> TokenBatch:
    width = int(tokens.lengths[index].max())
    return type(tokens)(tokens.input_ids[index, :width], tokens.attention_mask[index, :width])


def _check_positions(positions: str | int, lengths: Tensor) -> None:
    """Refuse before the model runs what `take_positions` would refuse half way."""
    if positions in ("last", "mean", "answer", "all"):
        return
    if not isinstance(positions, int) or isinstance(positions, bool):
        raise ArgumentError(
            f"positions must be 'last', 'mean', 'answer', 'all' or an int, got {positions!r}."
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
        TEXTS_KEY: texts_sha256(texts),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    out = {}
    for package in ("expertsteer-lens", "torch", "transformers", "transformer-lens", "nnsight"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out
