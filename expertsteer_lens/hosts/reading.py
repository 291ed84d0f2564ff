"""Capture: activations of texts as an `ActivationStore`, the same on every host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from expertsteer_lens._checks import check_classes, shown
from expertsteer_lens._progress import progress_bar
from expertsteer_lens.data.activations import ActivationStore, medians_of
from expertsteer_lens.data.capture_plan import CapturePlan, StatesInMemory
from expertsteer_lens.data.chat import Chat, Text, check_texts
from expertsteer_lens.data.read_positions import MEANS, OF_THE_ANSWER, ReadPositions
from expertsteer_lens.data.spans import Span, answer_span, check_spans, content
from expertsteer_lens.data.states import CheckedStates
from expertsteer_lens.data.states_shards import shard_folder, shard_of
from expertsteer_lens.data.states_writer import StatesWriter, writing
from expertsteer_lens.data.texts import texts_sha256 as texts_sha256
from expertsteer_lens.errors import ArgumentError, DataError, HostError

from .attention import UnattendedError, layers_of
from .batching import TOKENS_PER_PASS
from .capture_facts import capture_plan
from .parts import TokenBatch
from .row_picker import TokenRows
from .token_ends import TOKEN_ENDS, gives_offsets, token_ends, tokens_in

if TYPE_CHECKING:
    from .base import Host


def capture(
    model: Any,
    prompts: Sequence[Text],
    hook_names: Sequence[str] | None = None,
    *,
    positions: ReadPositions = "last",
    spans: Sequence[Span] | None = None,
    labels: Tensor | Sequence[int] | None = None,
    batch_size: int | None = None,
    tokens_per_pass: int = TOKENS_PER_PASS,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    progress: bool | None = False,
    store: str | Path | None = None,
    shard: tuple[int, int] | Literal["auto"] | None = None,
    ends: bool = False,
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
            assistant's last message of a chat, else the whole text; or of `spans`), "attention"
            (the same tokens, each weighted by the attention that the text's last token pays to it
            in the layer read, see `hosts.attention.attention_weights`), "all" (one row per token,
            prompt after prompt) or an absolute token index (BOS counts; negative from the end).
        spans: one (start, end) per prompt, in characters of its content (see `data.spans`): only
            tokens that end inside are looked at, so `positions="mean"` with the answers' spans is
            the mean over the answer. None: every token.
        labels: one per prompt, 1 = positive; repeated per token for "all".
        batch_size: most prompts per pass; None: as many as `tokens_per_pass` allows. Prompts of
            similar length share a pass; the order of the result is that of `prompts`.
        tokens_per_pass: most tokens per pass, padding included; bounds the memory of a pass.
        prepend_bos: None prepends BOS iff the tokenizer has one, and leaves a chat to its template.
        max_length: most tokens allowed per prompt; None: the model's context length.
        progress: show a tqdm bar; None: where standard error is a terminal.
        store: a folder that the states are written to batch by batch, and mapped from when they are
            asked for, so that they need not fit in memory. A capture that died (`kill -9`, no
            power, no room) goes on where it was when it is called again with the same arguments,
            and the folder becomes what it would have been, bit for bit on one machine; where the
            folder is complete no model is run. `ActivationStore.open` reads it later.
        shard: where several processes share the work: (number of this one, how many there are), or
            "auto" for what `accelerate launch` or `torchrun` says in the environment (alone where
            nothing is said). Each takes every n-th pass, writes beside `store` into
            `STORE.shard-0-of-2`, and returns those rows; `ActivationStore.merge(store)` then makes
            the whole.
        ends: with `positions="all"`: also note, in `provenance["token_ends"]`, the character of its
            text at which each token ends (-1: none), so that these tokens can be paired with
            another model's later.

    Raises:
        ArgumentError: `shard` without `store`, or more processes than passes.
        ArtifactError: `store` holds another capture or something else, another process writes it,
            or it cannot be written (no room, no permission); the batches before are kept.
        HookNameError: unknown hook name, or one that does not carry `[batch, pos, d]`.
        HostError: `positions="attention"` of a model (or a layer of it) that has no attention
            weights to give.
        DataError: unusable prompts or labels, or NaN/Inf in an activation (naming hook and prompt).
        ModelStateError: the model is in training mode.
        InterventionError: a hook point did not fire.

    Example:
        >>> from expertsteer_lens import zoo
        >>> target, hook = zoo.load("target", host="huggingface"), "blocks.2.hook_resid_post"
        >>> states = capture(target, ["The cat sat.", "A dog ran away."], [hook], positions="mean")
        >>> states[hook].shape
        torch.Size([2, 96])
    """
    from . import as_host

    part = shard_of(shard)
    if part is not None and store is None:
        raise ArgumentError("shard= goes with store=, where the processes write; give a folder.")
    request = Request.of(
        as_host(model),
        prompts,
        hook_names,
        positions=positions,
        spans=spans,
        labels=labels,
        batch_size=batch_size,
        tokens_per_pass=tokens_per_pass,
        prepend_bos=prepend_bos,
        max_length=max_length,
        ends=ends,
        to_disk=store is not None,
    )
    if store is None:
        held = StatesInMemory(request.plan)
        _read_batches(request, held, progress)
        return request.result(held)
    if part is not None:
        request, store = request.share(*part), shard_folder(store, part)
    with writing(store, request.plan) as writer:
        if not writer.is_complete:
            _read_batches(request, writer, progress)
            writer.finish(medians_of(writer.norms()))
    return ActivationStore.open(store)


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """What a capture will read of one model, checked before the model is run."""

    host: Host
    texts: list[Text]
    tokens: TokenBatch
    chosen: Tensor | None
    """Mask `[n, pos]` of the tokens that are looked at; None: all real ones."""
    pick: str | int
    """How a row is made of these, see `RowPicker`."""
    plan: CapturePlan

    @classmethod
    def of(
        cls,
        host: Host,
        prompts: Sequence[Text],
        hook_names: Sequence[str] | None,
        *,
        positions: str | int,
        spans: Sequence[Span] | None = None,
        labels: Tensor | Sequence[int] | None = None,
        batch_size: int | None = None,
        tokens_per_pass: int = TOKENS_PER_PASS,
        prepend_bos: bool | None = None,
        max_length: int | None = None,
        ends: bool = False,
        to_disk: bool = False,
    ) -> Request:
        """Arguments and errors are those of `capture`."""
        host.check_ready()
        texts = check_texts("prompts", prompts)
        classes = None if labels is None else check_classes("labels", labels, len(texts))
        given = host.hook_names() if hook_names is None else hook_names
        names = list(dict.fromkeys(host.check_hook_names(given)))
        if not names:
            raise ArgumentError(
                "hook_names is empty; give at least one name, or None for every block's output."
            )
        if positions == "attention":
            layers_of(names)
        tokens = host.tokenize(texts, prepend_bos=prepend_bos, max_length=max_length)
        _check_positions(positions, tokens.lengths)
        if spans is None:
            spans = _answers(host, texts, positions)
        chosen = None if spans is None else _tokens_in_spans(host, texts, tokens, spans)
        plan = capture_plan(
            host,
            texts,
            tokens,
            names,
            positions=positions,
            spans=spans,
            looked_at=(tokens.lengths if chosen is None else chosen.sum(1)).tolist(),
            classes=classes,
            prepend_bos=prepend_bos,
            batch_size=batch_size,
            tokens_per_pass=tokens_per_pass,
            ends=ends,
            to_disk=to_disk,
        )
        if ends:
            plan.provenance[TOKEN_ENDS] = _ends_of(host, texts, tokens, positions, chosen)
        pick = "mean" if positions == "answer" else positions
        return cls(host=host, texts=texts, tokens=tokens, chosen=chosen, pick=pick, plan=plan)

    @property
    def hook_names(self) -> list[str]:
        """Where rows are read."""
        names: list[str] = self.plan.key["hook_names"]
        return names

    def share(self, i: int, n: int) -> Request:
        """Every n-th pass, from the i-th on; see `CapturePlan.share`."""
        return replace(self, plan=self.plan.share(i, n))

    def batch(self, number: int) -> TokenBatch:
        """The tokens of one pass."""
        return self.tokens.part(self._index(number))

    def _index(self, number: int) -> list[int]:
        """The prompts of one pass, among all prompts."""
        batch, share = self.plan.batches[number], self.plan.prompts
        return batch if share is None else [share[i] for i in batch]

    def read(
        self, number: int, into: StatesWriter | StatesInMemory, also: Sequence[TokenRows] = ()
    ) -> None:
        """Run one pass and hand over its rows.

        Raises:
            DataError: NaN or Inf, naming hook point and prompt, or a prompt that gets no attention.
        """
        plan, index, part = self.plan, self._index(number), self.batch(number)
        here = None if self.chosen is None else self.chosen[index, : part.input_ids.shape[1]]
        norms: dict[str, list[Tensor]] | None = None if plan.norm_counts is None else {}
        basis = plan.provenance["basis"]
        try:
            states = self.host.read(
                part, self.hook_names, self.pick, here, norms, basis=basis, also=also
            )
        except UnattendedError as error:
            raise error.said_of(index[error.row]) from None
        _check_finite(states, index, [plan.row_counts[i] for i in plan.batches[number]])
        of_tokens = None if norms is None else {k: torch.cat(v) for k, v in norms.items()}
        into.write(number, {name: states[name] for name in self.hook_names}, of_tokens)

    def result(self, held: StatesInMemory) -> ActivationStore:
        """The store of all rows, once every pass has been read into `held`."""
        facts = {**self.plan.provenance, **medians_of(held.norms())}
        return ActivationStore(CheckedStates.of(held.states), self.plan.labels, facts)


def _read_batches(
    request: Request, into: StatesWriter | StatesInMemory, progress: bool | None
) -> None:
    """Run the passes that are not there yet."""
    plan = request.plan
    missing = [number for number in range(len(plan.batches)) if number not in into.done]
    cost = f"{len(request.texts)} texts, {int(request.tokens.lengths.sum())} tokens"
    if request.pick != "all" and isinstance(into, StatesInMemory):
        n_bytes = 4 * request.host.d_model * len(request.hook_names) * len(request.texts)
        cost += f", {n_bytes / 2**20:.0f} MiB of states are kept"
    for number in progress_bar(missing, "capture", progress=progress, unit="batch", cost=cost):
        request.read(number, into)


def read_tokens(
    host: Host,
    texts: Sequence[Text],
    tokens: TokenBatch,
    positions: str | int,
    spans: Sequence[Span] | None = None,
) -> Tensor:
    """Mask `[n, pos]` of the tokens whose activations `capture` reads; arguments as there."""
    _check_positions(positions, tokens.lengths)
    if spans is None:
        spans = _answers(host, texts, positions)
    real = tokens.attention_mask.bool()
    if spans is not None:
        real = _tokens_in_spans(host, texts, tokens, spans)
    if positions in (*MEANS, "all"):
        return real
    rank = real.long().cumsum(1) - 1  # of a token among those looked at
    count = real.sum(1, keepdim=True)
    wanted = -1 if positions == "last" else int(positions)
    return real & (rank == (wanted if wanted >= 0 else count + wanted))


def _ends_of(
    host: Host,
    texts: Sequence[Text],
    tokens: TokenBatch,
    positions: str | int,
    chosen: Tensor | None,
) -> list[list[int]]:
    """The character at which each token that is read ends, text by text.

    Raises:
        ArgumentError: the rows are no tokens.
        HostError: the tokenizer does not say.
    """
    if positions != "all":
        raise ArgumentError(f"ends=True goes with positions='all', got {positions!r}.")
    if not gives_offsets(host.tokenizer):
        raise HostError(
            f"the tokenizer of {host.name!r} does not say which characters its tokens cover; use a "
            "fast tokenizer, or leave ends (tokens) out."
        )
    found = token_ends(host, texts, tokens)
    looked_at = tokens.attention_mask.bool() if chosen is None else chosen
    return [row[mask].tolist() for row, mask in zip(found, looked_at.cpu(), strict=True)]


def _answers(host: Host, texts: Sequence[Text], positions: str | int) -> list[Span] | None:
    """Where the answers stand, which is all of a plain text but not what the tokenizer puts before
    it; None where every token is looked at: at other positions, and of plain texts where the
    tokenizer does not say which characters its tokens cover."""
    if positions not in OF_THE_ANSWER:
        return None
    if not gives_offsets(host.tokenizer) and not any(isinstance(text, Chat) for text in texts):
        return None
    return [answer_span(text) for text in texts]


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


def _check_positions(positions: str | int, lengths: Tensor) -> None:
    """Refuse before the model runs what `take_positions` would refuse half way."""
    if positions in ("last", "all", *MEANS):
        return
    if not isinstance(positions, int) or isinstance(positions, bool):
        raise ArgumentError(
            "positions must be 'last', 'mean', 'answer', 'attention', 'all' or an int, got "
            f"{positions!r}."
        )
    # As integers of Python, which an index may be too large for a tensor's.
    n = [int(length) for length in lengths]
    outside = [row for row, k in enumerate(n) if not -k <= positions < k]
    if outside:
        row = outside[0]
        raise DataError(
            f"positions={shown(positions)} is outside prompts[{row}], which has {n[row]} tokens."
        )


def _check_finite(states: dict[str, Tensor], index: Sequence[int], counts: Sequence[int]) -> None:
    for name, value in states.items():
        if torch.isfinite(value.sum()):
            continue  # one pass; a sum that overflows is looked at below
        bad = (~torch.isfinite(value)).any(dim=1).nonzero()[:, 0]
        if len(bad):
            prompt = torch.tensor(index).repeat_interleave(torch.tensor(counts))[bad].min()
            raise DataError(
                f"the activation of prompts[{int(prompt)}] at {name!r} holds NaN or Inf; look at "
                "that text, and at the model's dtype (float16 overflows above 65504)."
            )
