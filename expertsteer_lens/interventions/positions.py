"""Which tokens an intervention touches: position rules, and the clock that knows where in the
sequence a pass is.

Positions are absolute token positions of the sequence (BOS included, padding never counted), so the
same rule selects the same tokens with and without a key-value cache, for one prompt or a batch, and
whatever the padding side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from expertsteer_lens._checks import check_choice
from expertsteer_lens.errors import ArgumentError, DataError, InterventionError

Positions = str | int | slice | Sequence[int] | Callable[[Tensor], Tensor]
"""`"all"`, `"prompt"`, `"last_prompt"`, `"generated"`, an int, a slice, a list of ints, or a
callable on a mask.

`"generated"` starts at the last prompt token: the position that predicts the first new token.
Negative numbers count back from the end of the *prompt* (-1 is `"last_prompt"`), so that they do
not wander while text is generated. A slice without a stop goes on into the generated tokens. A
callable receives the boolean mask of real tokens `[batch, total]` of the whole sequence so far and
returns a boolean tensor of that shape; for generation it must be causal (its value at a token may
not depend on later tokens). """

NAMED = ("all", "prompt", "last_prompt", "generated")


def check_positions(positions: Positions) -> Positions:
    """Return `positions` (a list as a tuple) if it is a valid rule, else raise `ArgumentError`."""
    if isinstance(positions, str):
        return check_choice("positions", positions, NAMED)
    if isinstance(positions, slice):
        parts = (positions.start, positions.stop, positions.step)
        if (
            any(p is not None and (not isinstance(p, int) or isinstance(p, bool)) for p in parts)
            or (positions.step or 1) < 1
        ):
            raise ArgumentError(
                f"positions must be a slice of ints with a positive step, got {positions!r}."
            )
        return positions
    if isinstance(positions, int) and not isinstance(positions, bool):
        return positions
    if callable(positions):
        return positions
    try:
        items = tuple(positions)  # type: ignore[arg-type]
    except TypeError:
        items = ()
    if not items or not all(isinstance(i, int) and not isinstance(i, bool) for i in items):
        raise ArgumentError(
            f"positions must be one of {NAMED}, an int, a slice, a list of ints or a callable on a "
            f"mask, got {positions!r}."
        )
    return items


def positions_to_json(positions: Positions) -> Any:
    """A JSON value for `positions`; `positions_from_json` reads it back.

    Raises:
        ArgumentError: `positions` is a callable, which no file can hold.
    """
    positions = check_positions(positions)
    if isinstance(positions, slice):
        return {"slice": [positions.start, positions.stop, positions.step]}
    if callable(positions):
        raise ArgumentError(
            "positions is a function, which cannot be saved; use a name, an int, a slice or a list."
        )
    return list(positions) if isinstance(positions, tuple) else positions


def positions_from_json(value: Any) -> Positions:
    """The rule that `positions_to_json` wrote."""
    if isinstance(value, dict) and set(value) == {"slice"} and len(value["slice"]) == 3:
        return check_positions(slice(*value["slice"]))
    return check_positions(value)


@dataclass(frozen=True, eq=False)
class ForwardInfo:
    """What a host knows about one forward pass before the first block runs."""

    batch: int
    """Rows."""
    n_new: int
    """Tokens per row in this pass (1 for a cached decode step)."""
    past: int = 0
    """Tokens per row already in the key-value cache."""
    attention_mask: Tensor | None = None
    """`[batch, past + n_new]`, nonzero at real tokens; None when the host was given none."""
    input_ids: Tensor | None = None
    """`[batch, n_new]`, when the host can see them."""
    opaque_mask: bool = False
    """A mask was given, but in a form that does not say which tokens are padding (four axes, or one
    per kind of layer)."""


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass, placed in the sequence."""

    index: Int[Tensor, "batch new"]
    """Absolute position of each token; -1 at padding."""
    prompt_lengths: Int[Tensor, " batch"]
    """Real tokens in each row's prompt."""
    real: Bool[Tensor, "batch total"]
    """Real tokens of the whole sequence so far; its last columns are this pass."""
    continues: bool = False
    """Whether this pass continues a sequence (a later step of a generation) rather than starting
    one."""
    guessed_prompt: bool = False
    """Whether this pass shows that the first pass of the generation need not have been the prompt:
    it adds several tokens to a cache, as a prompt run in chunks does, or decoding with an
    assistant, and nobody said how long the prompt is."""

    def mask(self, positions: Positions) -> Bool[Tensor, "batch new"]:
        """The tokens of this pass that `positions` selects.

        Raises:
            DataError: a negative position lies before the first token of a row.
            InterventionError: a callable returns a wrong shape, or is not causal while text is
                generated; or the rule depends on where the prompt ends and that cannot be known.
        """
        if self.guessed_prompt and needs_prompt_length(positions):
            raise InterventionError(
                f"positions={positions!r} depends on where the prompt ends, and several tokens on "
                "top of a cache (a prompt in "
                "chunks, or decoding with an assistant) hide that; pass prompt_lengths=..."
            )
        index = self.index
        real = index >= 0
        if isinstance(positions, str):
            return self._named(check_choice("positions", positions, NAMED), real)
        if isinstance(positions, slice):
            return real & self._in_slice(positions)
        if callable(positions):
            return real & self._from_callable(positions)
        wanted = [positions] if isinstance(positions, int) else list(positions)
        out = torch.zeros_like(real)
        for position in wanted:
            out |= index == self._absolute(position)
        return real & out

    def _named(self, positions: str, real: Tensor) -> Tensor:
        if positions == "all":
            return real
        lengths = self.prompt_lengths[:, None]
        if positions == "prompt":
            return real & (self.index < lengths)
        return real & (
            self.index == lengths - 1 if positions == "last_prompt" else self.index >= lengths - 1
        )

    def _absolute(self, position: int) -> Tensor:
        lengths = self.prompt_lengths[:, None]
        if position >= 0:
            return torch.full_like(lengths, position)
        absolute = lengths + position
        if bool((absolute < 0).any()):
            row = int((absolute[:, 0] < 0).nonzero()[0])
            raise DataError(
                f"position {position} is before the first token of row {row}, whose prompt has "
                f"{int(lengths[row])} tokens; "
                "negative positions count back from the end of the prompt."
            )
        return absolute

    def _in_slice(self, positions: slice) -> Tensor:
        lengths = self.prompt_lengths[:, None]

        def bound(value: int) -> Tensor:
            return torch.full_like(lengths, value) if value >= 0 else (lengths + value).clamp(min=0)

        start = bound(positions.start or 0)
        chosen = (self.index >= start) & ((self.index - start) % (positions.step or 1) == 0)
        return chosen if positions.stop is None else chosen & (self.index < bound(positions.stop))

    def _from_callable(self, rule: Callable[[Tensor], Tensor]) -> Tensor:
        def ask(real: Tensor) -> Tensor:
            answer = rule(real.clone())
            if (
                not isinstance(answer, Tensor)
                or answer.shape != real.shape
                or answer.dtype != torch.bool
            ):
                got = (
                    f"{answer.dtype} {tuple(answer.shape)}"
                    if isinstance(answer, Tensor)
                    else type(answer).__name__
                )
                raise InterventionError(
                    "the positions callable must return a bool tensor of shape "
                    f"{tuple(real.shape)}, got {got}."
                )
            return answer

        full, n_new = ask(self.real), self.index.shape[1]
        added = (
            n_new if n_new < self.real.shape[1] else 1
        )  # a pass without a cache has grown by one token
        if self.continues and not torch.equal(full[:, :-added], ask(self.real[:, :-added])):
            raise InterventionError(
                "the positions callable is not causal: its answer for earlier tokens changed when "
                "a token was added, so cached "
                "and uncached generation would differ. Use 'last_prompt', a negative position, or "
                "a rule on earlier tokens."
            )
        return full[:, -self.index.shape[1] :]


def needs_prompt_length(positions: Positions) -> bool:
    """Whether the tokens a rule selects depend on where the prompt ends."""
    if isinstance(positions, str):
        return positions != "all"
    if callable(positions):
        return False
    if isinstance(positions, slice):
        return any(bound is not None and bound < 0 for bound in (positions.start, positions.stop))
    return any(p < 0 for p in ([positions] if isinstance(positions, int) else positions))


class PositionClock:
    """Places every forward pass in its sequence.

    What counts as the prompt, in this order: `prompt_lengths` if given; inside a `generate` call
    the tokens that the call was given, if it can be seen, else those of its first pass; otherwise
    every token of a pass that starts a sequence. A pass on top of a cache belongs to the sequence
    before it: one new token counts as generated, several as more prompt."""

    def __init__(self, prompt_lengths: int | Sequence[int] | Tensor | None = None) -> None:
        self._given = (
            None if prompt_lengths is None else torch.as_tensor(prompt_lengths, dtype=torch.long)
        )
        if self._given is not None and (self._given.ndim > 1 or bool((self._given < 1).any())):
            raise ArgumentError(
                f"prompt_lengths must be a positive int or one per row, got {prompt_lengths!r}."
            )
        self._depth = 0
        self._real: Tensor | None = None
        self._lengths: Tensor | None = None
        self._prompt: Tensor | None = None
        self._fresh = True

    def generation(self, entering: bool, prompt: Tensor | None = None) -> None:
        """Note that a `generate` call begins or ends; calls may nest (a host's own generate may
        call another's).

        Args:
            entering: begins, or ends.
            prompt: the mask of the prompt's real tokens `[rows, pos]`, if the call says. The first
                pass need not be the prompt: it may be a chunk of it, or hold an assistant's guesses
                too. Rows may be repeated (beams).
        """
        if self._depth == 0:
            self._fresh, self._prompt = True, None
        if entering and self._fresh and prompt is not None:
            self._prompt = prompt.bool()
        self._depth = max(0, self._depth + (1 if entering else -1))
        if self._depth == 0:
            self._prompt = None

    def observe(self, info: ForwardInfo) -> Step:
        """Place one forward pass.

        Raises:
            ArgumentError: `prompt_lengths` has another number of rows than the batch.
            DataError: the attention mask does not cover the tokens.
        """
        told = self._prompt
        if (
            self._fresh
            and told is not None
            and info.past > 0
            and told.shape[1] < info.past + info.n_new
        ):
            self._prompt = None  # only what is new was given, on top of a cache filled before
        real = self._real_tokens(info)
        totals = real.sum(1)
        same = self._lengths is not None and self._lengths.shape[0] == info.batch
        shorter = same and bool((totals < self._lengths.to(totals.device)).any())  # type: ignore[union-attr]
        if self._depth:
            continues = same and not self._fresh and not (shorter and info.past == 0)
        else:
            continues = same and info.past > 0 and info.n_new == 1
        if not continues:
            self._lengths = self._prompt_tokens(info, real)
        self._fresh = False
        self._real = real
        lengths = totals if self._lengths is None else self._lengths
        if self._given is not None:
            lengths = self._given_for(info.batch)
        index = (real.long().cumsum(1) - 1).masked_fill(~real, -1)[:, info.past :]
        several = continues and info.past > 0 and info.n_new > 1
        guessed = several and self._given is None and self._prompt is None
        return Step(index, lengths.to(real.device), real, continues, guessed)

    def _prompt_tokens(self, info: ForwardInfo, real: Tensor) -> Tensor:
        """Real tokens of each row's prompt, in a pass that starts a sequence."""
        told = self.told(info.batch)
        if told is None:
            return real.sum(1)
        seen = min(real.shape[1], told.shape[1])
        return real[:, :seen].sum(1) + told[:, seen:].to(real.device).sum(1)

    def told(self, batch: int) -> Tensor | None:
        """The mask of the prompt, a row for each row of the batch (beams repeat the rows of their
        prompt)."""
        if self._prompt is None or batch % self._prompt.shape[0]:
            return None
        return self._prompt.repeat_interleave(batch // self._prompt.shape[0], dim=0)

    def _given_for(self, batch: int) -> Tensor:
        assert self._given is not None
        if self._given.ndim == 1 and self._given.shape[0] not in (1, batch):
            raise ArgumentError(
                f"prompt_lengths has {self._given.shape[0]} entries, but the batch has {batch} "
                "rows."
            )
        return self._given.expand(batch)

    def _real_tokens(self, info: ForwardInfo) -> Tensor:
        total = info.past + info.n_new
        mask = info.attention_mask
        if mask is not None and mask.ndim == 2 and mask.shape == (info.batch, total):
            return mask.bool()
        if mask is not None and (mask.ndim != 2 or mask.shape != (info.batch, info.n_new)):
            lost = mask.ndim == 2 and info.past == 0 and mask.shape[1] > total
            hint = (
                "; the cache seems to have got lost between two steps of a generation, which is "
                "then wrong"
                if lost
                else ""
            )
            raise DataError(
                f"attention_mask must have shape {(info.batch, total)} (cached tokens included), "
                f"got {tuple(mask.shape)}{hint}."
            )
        device = (
            mask.device
            if mask is not None
            else None
            if info.input_ids is None
            else info.input_ids.device
        )
        new = (
            torch.ones(info.batch, info.n_new, dtype=torch.bool, device=device)
            if mask is None
            else mask.bool()
        )
        told = self.told(info.batch) if mask is None else None
        if told is not None:
            rest = torch.ones(
                info.batch, max(0, total - told.shape[1]), dtype=torch.bool, device=told.device
            )
            return torch.cat([told[:, :total], rest], dim=1)
        if info.past == 0:
            return new
        known = self._real is not None and self._real.shape == (info.batch, info.past)
        before = self._real if known else torch.ones(info.batch, info.past, dtype=torch.bool)
        assert before is not None
        return torch.cat([before.to(new.device), new], dim=1)
