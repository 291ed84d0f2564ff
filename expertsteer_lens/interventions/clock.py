"""The clock that knows where in the sequence a pass is, whatever the cache, the padding and whoever
calls the model.

Plain classes and no dataclasses, as `Step` is: nnsight sends them to a server as source, and
methods that `dataclass` makes up have none."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, DataError

from .positions import Step


class SequenceToken:
    """Stands for one sequence of tokens: the one that is in a cache."""


class ForwardInfo:
    """What a host knows about one forward pass before the first block runs.

    Attributes:
        batch: rows.
        n_new: tokens per row in this pass (1 for a cached decode step).
        past: tokens per row already in the key-value cache.
        attention_mask: `[batch, past + n_new]`, nonzero at real tokens; None when the host was
            given none.
        input_ids: `[batch, n_new]`, when the host can see them.
        opaque_mask: a mask was given, but in a form that does not say which tokens are padding
            (four axes, or one per kind of layer).
        packed: where each token is in its own sequence `[1, n_new]`, where the row is made of
            several sequences.
        sequence: stands for the sequence in the cache of this pass; None where that is not known.
        fills_cache: whether the pass begins a sequence in an empty cache.
    """

    def __init__(
        self,
        batch: int,
        n_new: int,
        past: int = 0,
        attention_mask: Tensor | None = None,
        input_ids: Int[Tensor, "batch new"] | None = None,
        opaque_mask: bool = False,
        packed: Int[Tensor, "batch new"] | None = None,
    ) -> None:
        self.batch = batch
        self.n_new = n_new
        self.past = past
        self.attention_mask = attention_mask
        self.input_ids = input_ids
        self.opaque_mask = opaque_mask
        self.packed = packed
        self.sequence: SequenceToken | None = None
        self.fills_cache = False

    def with_mask(self, attention_mask: Tensor) -> ForwardInfo:
        """The same pass with a mask that does say which tokens are padding."""
        same = ForwardInfo(self.batch, self.n_new, self.past, attention_mask, self.input_ids)
        same.sequence, same.fills_cache = self.sequence, self.fills_cache
        return same


class SequenceState:
    """What is known of a sequence after its latest pass.

    Attributes:
        real: its real tokens `[batch, total]`.
        lengths: of them, how many are prompt in each row.
        ids: those of its first pass, `[batch, n]`; None where they cannot be seen.
        prompt: the mask of that `[batch, pos]`; None where it did not.
        unseen_start, memory: see `Step`.
    """

    def __init__(
        self, real: Tensor, lengths: Tensor, ids: Tensor | None, prompt: Tensor | None
    ) -> None:
        self.real = real
        self.lengths = lengths
        self.ids = ids
        self.prompt = prompt
        self.unseen_start = False
        self.memory: dict[Any, Any] = {}


class GenerateCall:
    """One generate call that is open: the mask of its prompt `[rows, pos]`, if it says; whether no
    pass was seen since it began; the sequences seen in it, the latest last; and its own sequence
    among them, if it says which passes are of that."""

    def __init__(self, prompt: Tensor | None) -> None:
        self.prompt = None if prompt is None else prompt.bool()
        self.is_fresh = True
        self.seen: list[SequenceState] = []
        self.own: SequenceState | None = None


OpenCalls = tuple[list[GenerateCall], SequenceState | None, bool]
"""Generate calls that are set aside, and what was known of their next pass."""


class PositionClock:
    """Places every forward pass in its sequence.

    What counts as the prompt, in this order: `prompt_lengths` if given; inside a `generate` call
    the tokens that the call was given, if it can be seen, else those of its first pass; otherwise
    every token of a pass that starts a sequence. A pass on top of a cache belongs to the sequence
    in that cache, where the host says which (one that is not known is none of those before); else
    to the one before it. One new token counts as
    generated, several as more prompt. Several sequences may take turns, in one generate call too
    (guidance runs a second one, whose prompt is the negative one).

    Example:
        >>> clock = PositionClock()
        >>> clock.observe(ForwardInfo(batch=1, n_new=3)).index  # a prompt of three tokens
        tensor([[0, 1, 2]])
        >>> step = clock.observe(ForwardInfo(batch=1, n_new=1, past=3))  # and one on top of it
        >>> step.index, step.mask("generated"), step.mask("prompt")
        (tensor([[3]]), tensor([[True]]), tensor([[False]]))
    """

    def __init__(
        self,
        prompt_lengths: int | Sequence[int] | Tensor | None = None,
        sequences: MutableMapping[SequenceToken, SequenceState] | None = None,
    ) -> None:
        """Start with nothing known.

        Args:
            prompt_lengths: see above.
            sequences: where sequences are kept by what stands for them, if several clocks share
                them (one for each thread).
        """
        self._given_lengths = (
            None if prompt_lengths is None else torch.as_tensor(prompt_lengths, dtype=torch.long)
        )
        if self._given_lengths is not None and (
            self._given_lengths.ndim > 1 or bool((self._given_lengths < 1).any())
        ):
            raise ArgumentError(
                f"prompt_lengths must be a positive int or one per row, got {prompt_lengths!r}."
            )
        # Generate calls that are open, the innermost last.
        self._calls: list[GenerateCall] = []
        self._sequences = {} if sequences is None else sequences
        # The sequence of the latest pass.
        self._latest: SequenceState | None = None
        # Whether a generate call has said that the next pass is of its own sequence.
        self._is_prepared = False

    def generation(self, entering: bool, prompt: Tensor | None = None) -> None:
        """Note that a `generate` call begins or ends; calls may nest (a host's own generate may
        call another's, an assistant's stands inside).

        Args:
            entering: begins, or ends.
            prompt: the mask of the prompt's real tokens `[rows, pos]`, if the call says. The first
                pass need not be the prompt: it may be a chunk of it, or hold an assistant's guesses
                too. Rows may be repeated (beams).
        """
        if entering:
            self._calls.append(GenerateCall(prompt))
        elif self._calls:
            ended = self._calls.pop()
            outer = self._calls[-1] if self._calls else None
            if outer is not None and outer.prompt is None and outer.is_fresh:
                # It only passed its own text on: what is known of that is known of it.
                outer.prompt, outer.is_fresh, outer.seen = ended.prompt, ended.is_fresh, ended.seen
                outer.own = ended.own

    def set_aside(self) -> OpenCalls:
        """Note that passes from here on are of no generate call that is open, until these are taken
        up again: a streamer is handed the prompt before the call has run anything, and what it runs
        on the model would be taken for the call's first pass.

        The calls are returned and not kept, since two streams may take turns."""
        calls = self._calls, self._latest, self._is_prepared
        self._calls, self._is_prepared = [], False
        return calls

    def take_up(self, calls: OpenCalls) -> None:
        """Note that passes from here on are of these calls again."""
        self._calls, self._latest, self._is_prepared = calls

    def prepare(self) -> None:
        """Note that a generate call is about to run a pass of its own sequence."""
        self._is_prepared = True

    def observe(self, info: ForwardInfo) -> Step:
        """Place one forward pass.

        Raises:
            ArgumentError: `prompt_lengths` has another number of rows than the batch.
            DataError: the attention mask does not cover the tokens.
        """
        if info.packed is not None:
            return Step(
                info.packed, torch.zeros(1, dtype=torch.long), info.packed >= 0, packed=True
            )
        call = self._calls[-1] if self._calls else None
        begins_call = call is not None and call.is_fresh
        is_own, self._is_prepared = self._is_prepared, False
        # 1. A generate call may be given new tokens only, to go on from a cache that was filled
        #    before. What it was given is then not the whole prompt: forget it, and count instead.
        if call is not None and begins_call and call.prompt is not None and info.past > 0:
            covers_everything = call.prompt.shape[1] >= info.past + info.n_new
            call.prompt = call.prompt if covers_everything else None

        # 2. Which sequence is it? And does the pass go on with it, or start it anew?
        before = self._sequence_of(info, is_own)
        prompt = self.prompt_rows(info.batch) if begins_call else None
        if before is not None and not begins_call:
            prompt = before.prompt

        # 3. Which tokens are real: in this pass, and in everything that is cached.
        real = self._real_tokens(info, before, prompt)
        totals = real.sum(1)
        continues = before is not None and self._continues(info, before, totals)

        # 4. The pass that starts a sequence says where its prompt ends; later ones keep to that.
        if before is not None and continues:
            state = before
            state.real = real
        else:
            prompt = prompt if begins_call else None
            lengths = totals if prompt is None else _tokens_of_prompt(prompt, real)
            state = SequenceState(real, lengths, info.input_ids if info.past == 0 else None, prompt)
            on_unknown = before is None and info.past > 0 and info.n_new == 1
            state.unseen_start = on_unknown and prompt is None
        self._keep(info, state, call, is_own)
        lengths = state.lengths if self._given_lengths is None else self._given_for(info.batch)

        # 5. Real tokens are numbered along the whole sequence; this pass is its last columns.
        index = (real.long().cumsum(1) - 1).masked_fill(~real, -1)[:, info.past :]

        # 6. Several tokens on top of a cache, other than the first pass of a generate call: they
        #    may be a chunk of the prompt, or guesses to be verified: nothing shows where it ends.
        adds_several = not begins_call and info.past > 0 and info.n_new > 1
        guessed = adds_several and self._given_lengths is None and state.prompt is None
        unseen = is_own and call is None and self._given_lengths is None
        return Step(
            index,
            lengths.to(real.device),
            real,
            continues,
            guessed,
            unseen_call=unseen,
            unseen_start=state.unseen_start and self._given_lengths is None,
            memory=state.memory,
        )

    def _keep(
        self, info: ForwardInfo, state: SequenceState, call: GenerateCall | None, is_own: bool
    ) -> None:
        self._latest = state
        if info.sequence is not None:
            self._sequences[info.sequence] = state
        if call is not None:
            call.is_fresh = False
            call.own = state if is_own else call.own
            call.seen = [one for one in call.seen if one is not state] + [state]

    def _sequence_of(self, info: ForwardInfo, is_own: bool) -> SequenceState | None:
        """The sequence that the pass may go on with; `is_own`: that of the generate call."""
        if info.sequence is not None and info.sequence in self._sequences:
            found = self._sequences[info.sequence]
            return found if found.real.shape[0] == info.batch else None
        if info.fills_cache or (info.sequence is not None and info.past > 0):
            return None  # a new text, or one whose beginning was not seen: none of those before
        call = self._calls[-1] if self._calls else None
        if call is None:
            latest = self._latest
            known = latest is not None and latest.real.shape[0] == info.batch
            return latest if known and info.past > 0 else None
        here = [one for one in reversed(call.seen) if one.real.shape[0] == info.batch]
        if call.is_fresh:
            here = [] if self._latest is None or info.past == 0 else [self._latest]
            return next((one for one in here if one.real.shape[0] == info.batch), None)
        if info.past > 0:
            exact = [one for one in here if one.real.shape[1] == info.past]
            return next(iter(exact or here), None)
        if is_own and call.own is not None:
            return next((one for one in here if one is call.own), None)
        # Without a cache the whole sequence is run anew at each step: one that begins with the same
        # prompt. Of several, the one that has grown by a token, and waited longest.
        here = [one for one in here if one is not call.own]
        same = [one for one in here if _begins_alike(one.ids, info.input_ids)]
        grown = [one for one in same if one.real.shape[1] + 1 == info.n_new]
        return next(reversed(grown), next(iter(same), None))

    def _continues(self, info: ForwardInfo, before: SequenceState, totals: Tensor) -> bool:
        """Whether a pass goes on with its sequence, rather than starting it anew."""
        if not self._calls:
            # Outside of generate calls only the cache can tell. One token on top of it is a decode
            # step; several are taken as more of a prompt, so the prompt ends behind them.
            return info.past > 0 and info.n_new == 1
        if self._calls[-1].is_fresh:
            return False
        # Inside of a generate call every pass goes on with it, also without a cache. The exception:
        # a sequence without a cache that is shorter than the prompt was cannot be a later step;
        # somebody ran another text.
        if info.past > 0:
            return True
        return not bool((totals < before.lengths.to(totals.device)).any())

    def prompt_rows(self, batch: int) -> Tensor | None:
        """The mask of the prompt that the open generate call was given, a row for each row of the
        batch (beams repeat the rows of their prompt); None if it does not say."""
        prompt = self._calls[-1].prompt if self._calls else None
        if prompt is None or batch % prompt.shape[0]:
            return None
        return prompt.repeat_interleave(batch // prompt.shape[0], dim=0)

    def _given_for(self, batch: int) -> Tensor:
        lengths = self._given_lengths
        assert lengths is not None
        if lengths.ndim == 1 and lengths.shape[0] not in (1, batch):
            raise ArgumentError(
                f"prompt_lengths has {lengths.shape[0]} entries, but the batch has {batch} rows."
            )
        return lengths.expand(batch)

    def _real_tokens(
        self, info: ForwardInfo, before: SequenceState | None, prompt: Tensor | None
    ) -> Tensor:
        """Which tokens of the whole sequence so far are no padding, `[batch, past + n_new]`."""
        total = info.past + info.n_new
        mask = info.attention_mask
        if mask is not None and mask.ndim == 2:
            if mask.shape == (info.batch, total):
                return mask.bool()  # the usual case: the mask covers the cached tokens too
            if mask.shape == (info.batch, info.n_new):  # it covers the new tokens only
                return self._after_cached(info, before, mask.bool())
        if mask is not None:
            cache_lost = mask.ndim == 2 and info.past == 0 and mask.shape[1] > total
            hint = (
                "; the cache seems to have got lost between two steps of a generation, which is "
                "then wrong"
                if cache_lost
                else ""
            )
            raise DataError(
                f"attention_mask must have shape {(info.batch, total)} (cached tokens included), "
                f"got {tuple(mask.shape)}{hint}."
            )
        if prompt is not None:
            # The generate call knows the padding of its prompt; all else is text.
            n_rest = max(0, total - prompt.shape[1])
            rest = torch.ones(info.batch, n_rest, dtype=torch.bool, device=prompt.device)
            return torch.cat([prompt[:, :total], rest], dim=1)
        device = None if info.input_ids is None else info.input_ids.device
        new = torch.ones(info.batch, info.n_new, dtype=torch.bool, device=device)
        return self._after_cached(info, before, new)

    def _after_cached(self, info: ForwardInfo, before: SequenceState | None, new: Tensor) -> Tensor:
        """The new tokens behind those in the cache, whose padding the passes before have shown."""
        if info.past == 0:
            return new
        if before is not None and before.real.shape[1] >= info.past:
            cached = before.real[:, : info.past]  # a cache may have been cut back
        else:
            cached = torch.ones((info.batch, info.past), dtype=torch.bool)
        return torch.cat([cached.to(new.device), new], dim=1)


def _tokens_of_prompt(prompt: Tensor, real: Tensor) -> Tensor:
    """Real tokens of each row's prompt. The pass that starts a sequence may be shorter than the
    prompt (a chunk of it) or longer (an assistant's guesses behind it): count what it shows of the
    prompt, and the part of the prompt still to come."""
    seen = min(real.shape[1], prompt.shape[1])
    return real[:, :seen].sum(1) + prompt[:, seen:].to(real.device).sum(1)


def _begins_alike(first: Tensor | None, ids: Tensor | None) -> bool:
    """Whether a sequence without a cache can be a later step of the one that began with `first`;
    True where ids cannot be seen."""
    if first is None or ids is None:
        return True
    n = first.shape[1]
    return ids.shape[1] >= n and bool((ids[:, :n] == first.to(ids.device)).all())
