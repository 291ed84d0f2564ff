"""Two models read on the same texts, batch by batch together: while a batch is at hand, the tokens
of the two that end at the same character can be paired, and nothing else of them is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expertsteer_lens._progress import progress_bar
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.capture_plan import StatesInMemory
from expertsteer_lens.data.chat import Text

from .batching import length_batches
from .reading import Request
from .row_picker import TokenRows
from .token_ends import common_ends, token_ends

if TYPE_CHECKING:
    from .base import Host
    from .parts import TokenBatch

Rows = dict[str, Tensor]
OnTokens = Callable[[list[int], Rows, Rows, Tensor], object]
"""Given the texts of a batch (their places), the rows `[n, d]` of the first model's tokens by hook
name, those of the second's, row by row of the same words, and how many are of each text."""


def capture_side_by_side(
    hosts: tuple[Host, Host],
    texts: Sequence[Text],
    hook_names: tuple[Sequence[str], Sequence[str]],
    token_hook_names: tuple[Sequence[str], Sequence[str]],
    on_tokens: OnTokens,
    *,
    positions: str | int,
    batch_size: int | None = None,
    progress: bool | None = False,
) -> tuple[ActivationStore, ActivationStore]:
    """What `capture` gives of each model, and from the same passes the pairs of tokens.

    Args:
        hosts: two models, whose tokenizers give offsets.
        texts: read by both.
        hook_names: of each, where a state of each text is kept.
        token_hook_names: of each, where tokens are read.
        on_tokens: called with each batch's pairs of tokens; not where there are none.
        positions: as in `capture`.
        batch_size: as in `capture`.
        progress: show a progress bar; None: where standard error is a terminal.

    Raises:
        Errors of `capture`.
    """
    requests = [
        Request.of(host, texts, names, positions=positions, batch_size=batch_size)
        for host, names in zip(hosts, hook_names, strict=True)
    ]
    longer = torch.maximum(*(request.tokens.lengths for request in requests))
    batches = length_batches(longer.tolist(), batch_size=batch_size)
    requests = [replace(r, plan=replace(r.plan, batches=batches)) for r in requests]
    held = [StatesInMemory(request.plan) for request in requests]
    cost = f"{len(texts)} texts, by both models"
    bar = progress_bar(range(len(batches)), "anchors", progress=progress, unit="batch", cost=cost)
    for number in bar:
        index = batches[number]
        masks = _tokens_of_both(
            hosts, [texts[i] for i in index], [request.batch(number) for request in requests]
        )
        also = [
            TokenRows(names, mask) if bool(mask.any()) else None
            for names, mask in zip(token_hook_names, masks, strict=True)
        ]
        for request, into, of_tokens in zip(requests, held, also, strict=True):
            request.read(number, into, of_tokens)
        first, second = also
        if first is not None and second is not None:
            on_tokens(index, first.rows, second.rows, masks[0].sum(1).cpu())
    one, two = (request.result(states) for request, states in zip(requests, held, strict=True))
    return one, two


def read_common_tokens(
    hosts: tuple[Host, Host],
    texts: Sequence[Text],
    token_hook_names: tuple[Sequence[str], Sequence[str]],
    on_tokens: OnTokens,
    *,
    batch_size: int | None = None,
    progress: bool | None = False,
) -> None:
    """The pairs of tokens alone; the passes end after the last layer they are read at. Arguments
    are those of `capture_side_by_side`."""
    tokens = [host.tokenize(list(texts)) for host in hosts]
    longer = torch.maximum(*(t.lengths for t in tokens))
    batches = length_batches(longer.tolist(), batch_size=batch_size)
    cost = f"{len(texts)} texts through both models, every token of them"
    for index in progress_bar(batches, "token pairs", progress=progress, unit="batch", cost=cost):
        part = [texts[i] for i in index]
        here = [t.part(index) for t in tokens]
        masks = _tokens_of_both(hosts, part, here)
        if not bool(masks[0].any()):
            continue
        first, second = (
            host.read(batch, names, "all", mask)
            for host, batch, names, mask in zip(hosts, here, token_hook_names, masks, strict=True)
        )
        on_tokens(index, first, second, masks[0].sum(1).cpu())


def _tokens_of_both(
    hosts: tuple[Host, Host], texts: Sequence[Text], batches: Sequence[TokenBatch]
) -> list[Tensor]:
    """Of each model the mask `[batch, pos]` of the tokens that end where one of the other's does.

    Ends grow along a row, so the chosen tokens of both models come in the same order."""
    one, two = (token_ends(h, texts, b) for h, b in zip(hosts, batches, strict=True))
    masks = common_ends(one, two), common_ends(two, one)
    return [m.to(b.input_ids.device) for m, b in zip(masks, batches, strict=True)]
