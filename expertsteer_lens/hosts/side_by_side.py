"""Models read on the same texts, batch by batch together: while a batch is at hand, the tokens of
all of them that end at the same character can be paired, and nothing else of them is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from expertsteer_lens._progress import progress_bar
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.data.capture_plan import StatesInMemory, starts_of
from expertsteer_lens.data.chat import Text
from expertsteer_lens.data.spans import Span
from expertsteer_lens.data.states import CheckedStates
from expertsteer_lens.errors import DataError

from .batching import length_batches
from .reading import Request
from .row_picker import TokenRows
from .token_ends import NO_END, TOKEN_ENDS, common_ends, token_ends

if TYPE_CHECKING:
    from .base import Host
    from .parts import TokenBatch

Rows = dict[str, Tensor]
HookNames = Sequence[Sequence[str]]
"""Of each of the models."""
OnTokens = Callable[[list[int], list[Rows], Tensor], object]
"""Given the texts of a batch (their places), of each model the rows `[n, d]` of its tokens by hook
name, row by row of the same words, and how many are of each text."""


class TokenSample:
    """Some of the tokens that end at the same character in all models, evenly over the texts and
    over each text: their states, row by row of the same words.

    Args:
        n_rows: how many in all, about; at least one of a text, where it has one.
        n_texts: how many texts will be read.
        hook_names: of each model, where they are read.
    """

    def __init__(self, n_rows: int, n_texts: int, hook_names: HookNames) -> None:
        self.per_text = max(1, round(n_rows / n_texts))
        self.hook_names = hook_names
        self.texts: list[int] = []
        """Of each row so far: which of the texts that are read it is of."""
        self._rows: tuple[dict[str, list[Tensor]], ...] = tuple(
            {name: [] for name in names} for names in hook_names
        )

    def among(self, mask: Tensor) -> Tensor:
        """The tokens that are taken of those of a mask `[batch, pos]`."""
        taken = torch.zeros_like(mask)
        for row, tokens in enumerate(mask):
            places = tokens.nonzero()[:, 0]
            n = min(self.per_text, len(places))
            if n:
                taken[row, places[(2 * torch.arange(n) + 1) * len(places) // (2 * n)]] = True
        return taken

    def take(self, index: Sequence[int], counts: Tensor, rows: Sequence[Rows]) -> None:
        """Keep the rows of a pass: of these texts so many each, of every model."""
        self.texts += torch.tensor(index).repeat_interleave(counts).tolist()
        for mine, given in zip(self._rows, rows, strict=True):
            for name, kept in mine.items():
                kept.append(given[name])

    @property
    def n(self) -> int:
        """Rows so far."""
        return len(self.texts)

    def stores(
        self, facts: Sequence[Mapping[str, Any]], groups: Sequence[int]
    ) -> list[ActivationStore]:
        """Hand over the states of each model, text after text, with the group of each row in
        `provenance["groups"]`; nothing of them stays here.

        Args:
            facts: provenance of each.
            groups: of every text that was read, equal for equal texts.
        """
        order = torch.tensor(self.texts).argsort(stable=True)
        of_rows = [groups[text] for text in sorted(self.texts)]
        return [
            ActivationStore(
                CheckedStates.of({name: torch.cat(mine.pop(name))[order] for name in list(mine)}),
                provenance={**given, "positions": "token pairs", "groups": of_rows},
            )
            for mine, given in zip(self._rows, facts, strict=True)
        ]


class StoredTokens:
    """The tokens of a model that is not there, read before with `capture(..., positions="all",
    ends=True)`.

    Args:
        states: one row a token.
        texts: what was read, in that order.

    Raises:
        DataError: the states do not say where their tokens end.
    """

    def __init__(self, states: ActivationStore, texts: Sequence[Text]) -> None:
        ends = _ends_of_rows(states, len(texts))
        if ends is None:
            raise DataError(
                "expert_tokens holds states that do not say where their tokens end; make them with "
                "ExpertSteer(...).capture(expert, pairs, anchors=anchors, tokens=True)."
            )
        self.states = states
        self._ends = [torch.tensor(of_text, dtype=torch.long) for of_text in ends]
        self._starts = starts_of([len(of_text) for of_text in ends])
        # Reversed: of a text that comes twice the first stands for both.
        self._place = {text: i for i, text in reversed(list(enumerate(texts)))}
        self._rows: dict[str, Tensor] = {}

    def ends(self, texts: Sequence[Text]) -> Tensor:
        """As `token_ends`."""
        rows = [self._ends[self._place[text]] for text in texts]
        return pad_sequence(rows, batch_first=True, padding_value=NO_END)

    def rows(self, texts: Sequence[Text], mask: Tensor, hook_names: Sequence[str]) -> Rows:
        """The states of the tokens of a mask `[batch, pos]`, text after text."""
        index = torch.cat(
            [
                self._starts[self._place[text]] + tokens.nonzero()[:, 0]
                for text, tokens in zip(texts, mask, strict=True)
            ]
        )
        for name in hook_names:
            if name not in self._rows:
                self._rows[name] = self.states[name]
        return {name: self._rows[name][index] for name in hook_names}


def _ends_of_rows(states: ActivationStore, n_texts: int) -> list[list[int]] | None:
    """Where the tokens end that the rows are of, text by text; None where the states do not say so,
    or not of as many."""
    ends, counts = (states.provenance.get(name) for name in (TOKEN_ENDS, "rows_per_prompt"))
    if not isinstance(ends, list) or not all(isinstance(of_text, list) for of_text in ends):
        return None
    lengths = [len(of_text) for of_text in ends]
    if lengths != counts or len(lengths) != n_texts or sum(lengths) != states.n:
        return None
    return ends if all(type(end) is int for of_text in ends for end in of_text) else None


def capture_side_by_side(
    hosts: Sequence[Host],
    texts: Sequence[Text],
    hook_names: HookNames,
    token_hook_names: HookNames,
    on_tokens: OnTokens,
    *,
    positions: str | int,
    spans: Sequence[Span] | None = None,
    sample: TokenSample | None = None,
    stored: StoredTokens | None = None,
    batch_size: int | None = None,
    progress: bool | None = False,
) -> list[ActivationStore]:
    """What `capture` gives of each model, and from the same passes the pairs of tokens.

    Args:
        hosts: models, whose tokenizers give offsets.
        texts: read by all.
        hook_names: of each, where a state of each text is kept.
        token_hook_names: of each, where tokens are read; of the stored ones first.
        on_tokens: called with each batch's pairs of tokens; not where there are none.
        positions: as in `capture`.
        spans: as in `capture`.
        sample: filled with some of the pairs of tokens, at hook points of its own; not where some
            are stored.
        stored: tokens of a further model.
        batch_size: as in `capture`.
        progress: show a progress bar; None: where standard error is a terminal.

    Raises:
        Errors of `capture`.
    """
    requests = [
        Request.of(host, texts, names, positions=positions, spans=spans, batch_size=batch_size)
        for host, names in zip(hosts, hook_names, strict=True)
    ]
    longer = torch.stack([request.tokens.lengths for request in requests]).amax(0)
    batches = length_batches(longer.tolist(), batch_size=batch_size)
    requests = [replace(r, plan=replace(r.plan, batches=batches)) for r in requests]
    held = [StatesInMemory(request.plan) for request in requests]
    cost = f"{len(texts)} texts, by {len(hosts)} models"
    bar = progress_bar(range(len(batches)), "anchors", progress=progress, unit="batch", cost=cost)
    first = 0 if stored is None else 1
    for number in bar:
        index = batches[number]
        part = [texts[i] for i in index]
        masks = _common_tokens(hosts, part, [request.batch(number) for request in requests], stored)
        every = _rows_at(token_hook_names[first:], masks[first:])
        some: list[TokenRows] = []
        if sample is not None:
            some = _rows_at(sample.hook_names, [sample.among(mask) for mask in masks])
        for i, (request, into) in enumerate(zip(requests, held, strict=True)):
            request.read(number, into, [*every[i : i + 1], *some[i : i + 1]])
        if every:
            before = [] if stored is None else [stored.rows(part, masks[0], token_hook_names[0])]
            rows = [*before, *(of_one.rows for of_one in every)]
            on_tokens(index, rows, masks[0].sum(1).cpu())
        if some and sample is not None:
            sample.take(index, some[0].mask.sum(1).cpu(), [of_one.rows for of_one in some])
    return [request.result(states) for request, states in zip(requests, held, strict=True)]


def read_common_tokens(
    hosts: Sequence[Host],
    texts: Sequence[Text],
    token_hook_names: HookNames,
    on_tokens: OnTokens,
    *,
    stored: StoredTokens | None = None,
    batch_size: int | None = None,
    progress: bool | None = False,
) -> None:
    """The pairs of tokens alone; the passes end after the last layer they are read at. Arguments
    are those of `capture_side_by_side`."""
    tokens = [host.tokenize(list(texts)) for host in hosts]
    longer = torch.stack([t.lengths for t in tokens]).amax(0)
    batches = length_batches(longer.tolist(), batch_size=batch_size)
    cost = f"{len(texts)} texts through {len(hosts)} models, every token of them"
    for index in progress_bar(batches, "token pairs", progress=progress, unit="batch", cost=cost):
        part = [texts[i] for i in index]
        here = [t.part(index) for t in tokens]
        masks = _common_tokens(hosts, part, here, stored)
        if not bool(masks[0].any()):
            continue
        first = 0 if stored is None else 1
        live = zip(hosts, here, token_hook_names[first:], masks[first:], strict=True)
        rows = [] if stored is None else [stored.rows(part, masks[0], token_hook_names[0])]
        rows += [host.read(batch, names, "all", mask) for host, batch, names, mask in live]
        on_tokens(index, rows, masks[0].sum(1).cpu())


def _rows_at(hook_names: HookNames, masks: Sequence[Tensor]) -> list[TokenRows]:
    """What is asked of each model; nothing where they have no token in common."""
    if not bool(masks[0].any()):
        return []
    return [TokenRows(names, mask) for names, mask in zip(hook_names, masks, strict=True)]


def _common_tokens(
    hosts: Sequence[Host],
    texts: Sequence[Text],
    batches: Sequence[TokenBatch],
    stored: StoredTokens | None,
) -> list[Tensor]:
    """Of each model, of the stored one first, the mask `[batch, pos]` of the tokens that end where
    one of every other's does.

    Ends grow along a row, so the chosen tokens of all models come in the same order."""
    ends = [] if stored is None else [stored.ends(texts)]
    ends += [token_ends(h, texts, b) for h, b in zip(hosts, batches, strict=True)]
    masks = [
        torch.stack([common_ends(mine, other) for j, other in enumerate(ends) if j != i]).all(0)
        for i, mine in enumerate(ends)
    ]
    first = len(masks) - len(batches)
    live = [m.to(b.input_ids.device) for m, b in zip(masks[first:], batches, strict=True)]
    return [*masks[:first], *live]
