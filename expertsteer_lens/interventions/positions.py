"""Which tokens an intervention touches: position rules, and what they select in a pass whose place
in the sequence is known (see `clock`).

Positions are absolute token positions of the sequence (BOS included, padding never counted), so the
same rule selects the same tokens with and without a key-value cache, for one prompt or a batch, and
whatever the padding side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from expertsteer_lens._checks import check_choice, shown
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

NamedPositions = Literal["all", "prompt", "last_prompt", "generated"]
NAMED = ("all", "prompt", "last_prompt", "generated")


def check_positions(positions: Positions) -> Positions:
    """Return `positions` (a list as a tuple) if it is a valid rule, else raise `ArgumentError`.

    Example:
        >>> check_positions([0, -1])
        (0, -1)
    """
    if isinstance(positions, str):
        return check_choice("positions", positions, NAMED)
    if isinstance(positions, slice):
        parts = (positions.start, positions.stop, positions.step)
        if (
            any(p is not None and (not isinstance(p, int) or isinstance(p, bool)) for p in parts)
            or (positions.step or 1) < 1
        ):
            raise ArgumentError(
                f"positions must be a slice of ints with a positive step, got {shown(positions)}."
            )
        _check_farthest(p for p in parts if p is not None)
        return positions
    if isinstance(positions, int) and not isinstance(positions, bool):
        _check_farthest([positions])
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
            f"mask, got {shown(positions)}."
        )
    _check_farthest(items)
    return items


def _check_farthest(positions: Iterable[int]) -> None:
    """Raise `ArgumentError` for what is no index of a tensor: it has 64 bits."""
    for position in positions:
        if abs(position) >= 2**63:
            raise ArgumentError(
                f"positions holds {shown(position)}, which is beyond the end of every text; give "
                "the index of a token."
            )


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


class Step:
    """One forward pass, placed in the sequence. A plain class: it is sent to servers as source, see
    `clock`.

    Attributes:
        index: absolute position of each token `[batch, new]`; -1 at padding.
        prompt_lengths: real tokens in each row's prompt, `[batch]`.
        real: real tokens of the whole sequence so far, `[batch, total]`; its last columns are this
            pass.
        continues: whether this pass continues a sequence (a later step of a generation) rather than
            starting one.
        guessed_prompt: whether this pass shows that the first pass of the generation need not have
            been the prompt: it adds several tokens to a cache, as a prompt run in chunks does, or
            decoding with an assistant, and nobody said how long the prompt is.
        packed: whether the row is made of several sequences, whose prompts nobody knows.
        unseen_call: whether this is a step without a cache of a generate call whose beginning was
            not seen, so that it cannot be told from a prompt.
        unseen_start: whether the sequence was first seen at one token on top of a cache, so that
            its prompt was run before anybody watched, or in other rows.
        memory: kept with the sequence from pass to pass, for whoever wants to.
    """

    def __init__(
        self,
        index: Int[Tensor, "batch new"],
        prompt_lengths: Int[Tensor, " batch"],
        real: Bool[Tensor, "batch total"],
        continues: bool = False,
        guessed_prompt: bool = False,
        packed: bool = False,
        unseen_call: bool = False,
        unseen_start: bool = False,
        memory: dict[Any, Any] | None = None,
    ) -> None:
        self.packed = packed
        self.unseen_start = unseen_start
        self.unseen_call = unseen_call
        self.memory: dict[Any, Any] = {} if memory is None else memory
        self.index = index
        self.prompt_lengths = prompt_lengths
        self.real = real
        self.continues = continues
        self.guessed_prompt = guessed_prompt

    def mask(self, positions: Positions) -> Bool[Tensor, "batch new"]:
        """The tokens of this pass that `positions` selects.

        Raises:
            DataError: a negative position lies before the first token of a row.
            InterventionError: a callable returns a wrong shape, or is not causal while text is
                generated; or the rule depends on where the prompt ends and that cannot be known.
        """
        if self.packed and (callable(positions) or needs_prompt_length(positions)):
            raise InterventionError(packed_refusal(positions))
        if self.unseen_call and needs_prompt_length(positions):
            raise InterventionError(
                f"positions={positions!r} depends on where the prompt ends, and this generate call "
                "was not seen to begin: its method was taken from the model before steering was "
                "on; call model.generate inside the block, or pass prompt_lengths=..."
            )
        if self.unseen_start and needs_prompt_length(positions):
            raise InterventionError(
                f"positions={positions!r} depends on where the prompt ends, and this sequence was "
                "first seen at one token on top of a cache that was filled before steering was on, "
                "or whose rows were repeated or selected since; pass prompt_lengths=..., or start "
                "steering before the prompt is run."
            )
        if self.guessed_prompt and needs_prompt_length(positions):
            raise InterventionError(
                f"positions={positions!r} depends on where the prompt ends, and several tokens on "
                "top of a cache (a prompt in "
                "chunks, or decoding with an assistant) hide that; pass prompt_lengths=..."
            )
        index = self.index
        real = index >= 0
        if isinstance(positions, str):
            return self._in_named(check_choice("positions", positions, NAMED), real)
        if isinstance(positions, slice):
            return real & self._in_slice(positions)
        if callable(positions):
            return real & self._from_callable(positions)
        out = torch.zeros_like(real)
        for position in [positions] if isinstance(positions, int) else positions:
            out |= index == self._absolute(position)
        return real & out

    def _in_named(self, positions: str, real: Tensor) -> Tensor:
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


def packed_refusal(positions: Positions) -> str:
    """Why this rule cannot be followed where several sequences stand in one row."""
    return (
        f"positions={positions!r} depends on the prompt or on the whole sequence, but the row is "
        "made of several sequences (continuous batching, or padding-free packing), which does not "
        "say where each prompt ends; use positions='all' or non-negative positions, or generate "
        "with model.generate, whose batches are exact."
    )


def needs_prompt_length(positions: Positions) -> bool:
    """Whether the tokens a rule selects depend on where the prompt ends."""
    if isinstance(positions, str):
        return positions != "all"
    if callable(positions):
        return False
    if isinstance(positions, slice):
        return any(bound is not None and bound < 0 for bound in (positions.start, positions.stop))
    return any(p < 0 for p in ([positions] if isinstance(positions, int) else positions))


class PassTokens:
    """The tokens of one forward pass that are to be edited; a plain class, like `Step`.

    Args:
        shape: rows and tokens of the pass.
        mask: the tokens, `[batch, pos]`; None: every one.
        step: where the pass is in its sequence; None where that is of no interest.
    """

    def __init__(
        self, shape: tuple[int, int], mask: Tensor | None = None, step: Step | None = None
    ) -> None:
        self.shape = shape
        self.step = step
        self.mask = mask
        """None: every token of the pass is edited."""
        self.is_empty = False
        """Whether no token is; False also where looking would have to wait for an accelerator."""
        self._n_selected: Tensor | None = None
        if mask is not None and mask.device.type == "cpu":
            if bool(mask.all()):
                self.mask = None
            else:
                self.is_empty = not bool(mask.any())

    def mask_on(self, device: torch.device) -> Tensor | None:
        """The mask, moved once to where the activations are."""
        if self.mask is not None:
            self.mask = self.mask.to(device)
        return self.mask

    def n_selected(self) -> Tensor | int:
        """How many tokens are selected: counted once for all hook points, and not waited for."""
        if self.mask is None:
            return self.shape[0] * self.shape[1]
        if self._n_selected is None:
            self._n_selected = self.mask.sum()
        return self._n_selected
