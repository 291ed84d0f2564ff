"""Position rules and the clock, on shapes and masks alone (no model)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, DataError, InterventionError
from expertsteer_lens.interventions.clock import ForwardInfo, PositionClock
from expertsteer_lens.interventions.positions import (
    Step,
    check_positions,
    positions_from_json,
    positions_to_json,
)

LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
RULES: dict[
    str, tuple[Any, Any]
] = {  # rule, and the obvious definition on (position, prompt length)
    "all": ("all", lambda p, n: True),
    "prompt": ("prompt", lambda p, n: p < n),
    "last_prompt": ("last_prompt", lambda p, n: p == n - 1),
    "generated": ("generated", lambda p, n: p >= n - 1),
    "int": (1, lambda p, n: p == 1),
    "negative int": (-2, lambda p, n: p == n - 2),
    "slice": (slice(1, 6, 2), lambda p, n: p in (1, 3, 5)),
    "open slice": (slice(2, None), lambda p, n: p >= 2),
    "negative slice": (slice(-2, None), lambda p, n: p >= n - 2),
    "slice to negative": (slice(None, -1), lambda p, n: p < n - 1),
    "list": ([0, 2, -1], lambda p, n: p in (0, 2, n - 1)),
    "mask function": (lambda mask: mask.cumsum(1) % 2 == 0, lambda p, n: p % 2 == 1),
}


def passes(mask: Tensor, *, n_generated: int, cached: bool) -> list[ForwardInfo]:
    """The passes of a generation: the prompt, then one token each."""
    batch, prompt = mask.shape
    out = [ForwardInfo(batch, prompt, 0, mask)]
    for i in range(1, n_generated + 1):
        full = torch.cat([mask, torch.ones(batch, i, dtype=mask.dtype)], dim=1)
        out.append(
            ForwardInfo(batch, 1, prompt + i - 1, full)
            if cached
            else ForwardInfo(batch, prompt + i, 0, full)
        )
    return out


def selected(rule: Any, infos: list[ForwardInfo], *, generate: bool = True) -> list[Step]:
    clock = PositionClock()
    clock.generation(generate)
    return [clock.observe(info) for info in infos]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("name", RULES)
def test_rule_selects_the_obvious_absolute_positions(name: str, mask: Tensor, cached: bool) -> None:
    rule, obvious = RULES[name]
    rule = check_positions(rule)
    prompt = mask.sum(1).tolist()
    touched: list[set[int]] = [set(), set()]
    for step in selected(rule, passes(mask, n_generated=3, cached=cached)):
        chosen = step.mask(rule)
        assert chosen.shape == step.index.shape
        assert not bool(chosen[step.index < 0].any())  # padding is never edited
        for row in range(2):
            touched[row] |= set(step.index[row][chosen[row]].tolist())
    for row in range(2):
        assert touched[row] == {p for p in range(prompt[row] + 3) if obvious(p, prompt[row])}


@pytest.mark.parametrize("name", RULES)
def test_uncached_passes_select_the_same_earlier_tokens_every_time(name: str) -> None:
    rule = check_positions(RULES[name][0])
    masks = [s.mask(rule) for s in selected(rule, passes(LEFT, n_generated=3, cached=False))]
    for shorter, longer in pairwise(masks):
        assert torch.equal(longer[:, :-1], shorter)


def test_a_pass_on_its_own_is_all_prompt() -> None:
    clock = PositionClock()
    for length in (4, 5, 1, 1):  # outside generate, a longer or a one-token pass is a new sequence
        step = clock.observe(ForwardInfo(1, length))
        assert not step.continues
        assert step.prompt_lengths.tolist() == [length]
        assert step.index.tolist() == [list(range(length))]


def test_one_token_prompts_in_a_row_start_again_at_every_generate_call() -> None:
    clock = PositionClock()
    for _ in range(2):
        clock.generation(True)
        steps = [clock.observe(ForwardInfo(1, 1, past)) for past in (0, 1, 2)]
        clock.generation(False)
        assert [s.index.item() for s in steps] == [0, 1, 2]
        assert [s.prompt_lengths.item() for s in steps] == [1, 1, 1]
        assert [s.continues for s in steps] == [False, True, True]


def test_a_generate_call_begins_a_new_sequence_whatever_ran_before() -> None:
    clock = PositionClock()
    clock.observe(ForwardInfo(1, 3))
    clock.generation(True)
    assert clock.observe(ForwardInfo(1, 4)).prompt_lengths.tolist() == [4]
    assert clock.observe(ForwardInfo(1, 5)).prompt_lengths.tolist() == [4]
    clock.generation(False)
    assert clock.observe(ForwardInfo(1, 6)).prompt_lengths.tolist() == [6]


def test_nested_generate_calls_are_one_generation() -> None:
    clock = PositionClock()
    clock.generation(True)
    clock.generation(True)
    clock.observe(ForwardInfo(1, 3))
    clock.generation(False)
    step = clock.observe(ForwardInfo(1, 4))
    assert step.continues
    assert step.prompt_lengths.tolist() == [3]
    clock.generation(False)
    assert not clock.observe(ForwardInfo(1, 5)).continues


def test_a_shorter_or_differently_sized_batch_inside_generate_is_a_new_sequence() -> None:
    clock = PositionClock()
    clock.generation(True)
    clock.observe(ForwardInfo(2, 5))
    assert clock.observe(ForwardInfo(2, 4)).prompt_lengths.tolist() == [4, 4]
    assert clock.observe(ForwardInfo(3, 5)).prompt_lengths.tolist() == [5, 5, 5]


def test_on_a_cache_one_token_is_generated_and_several_are_more_prompt() -> None:
    clock = PositionClock()
    clock.observe(ForwardInfo(1, 4))
    more = clock.observe(ForwardInfo(1, 3, past=4))
    assert (more.index.tolist(), more.prompt_lengths.tolist()) == ([[4, 5, 6]], [7])
    new = clock.observe(ForwardInfo(1, 1, past=7))
    assert (new.index.tolist(), new.prompt_lengths.tolist(), new.continues) == ([[7]], [7], True)


def test_padding_is_remembered_when_a_cached_step_brings_no_mask() -> None:
    clock = PositionClock()
    clock.observe(ForwardInfo(2, 5, 0, LEFT))
    step = clock.observe(ForwardInfo(2, 1, past=5))
    assert step.index.tolist() == [[3], [5]]
    assert clock.observe(
        ForwardInfo(2, 1, past=6, attention_mask=torch.ones(2, 1))
    ).index.tolist() == [[4], [6]]


def test_prompt_lengths_given_decide_what_is_prompt() -> None:
    step = PositionClock([2, 4]).observe(ForwardInfo(2, 5, 0, RIGHT))
    assert step.mask("generated").tolist() == [
        [False, True, True, False, False],
        [False, False, False, True, True],
    ]
    assert PositionClock(2).observe(ForwardInfo(2, 5)).mask("prompt").sum(1).tolist() == [2, 2]
    with pytest.raises(
        ArgumentError, match="prompt_lengths has 3 entries, but the batch has 2 rows"
    ):
        PositionClock([1, 2, 3]).observe(ForwardInfo(2, 5))
    with pytest.raises(ArgumentError, match="prompt_lengths must be a positive int"):
        PositionClock(0)


def test_a_negative_position_before_the_first_token_is_an_error() -> None:
    step = PositionClock().observe(ForwardInfo(2, 5, 0, LEFT))
    assert step.mask(-3).sum(1).tolist() == [1, 1]
    with pytest.raises(
        DataError, match="position -4 is before the first token of row 0, whose prompt has 3 tokens"
    ):
        step.mask(-4)


def test_a_mask_function_must_return_a_boolean_mask_and_be_causal_in_generation() -> None:
    def last_so_far(mask: Tensor) -> Tensor:
        return mask.cumsum(1) == mask.sum(1, keepdim=True)

    first, second = selected(last_so_far, passes(LEFT, n_generated=1, cached=True))
    assert first.mask(last_so_far).sum().item() == 2  # a prompt on its own may use the end
    with pytest.raises(InterventionError, match="not causal"):
        second.mask(last_so_far)
    with pytest.raises(
        InterventionError, match=r"bool tensor of shape \(2, 5\), got torch.int64 \(2, 5\)"
    ):
        first.mask(lambda mask: mask.long())
    with pytest.raises(InterventionError, match="got list"):
        first.mask(lambda mask: [True])


def test_a_mask_function_cannot_change_the_clock() -> None:
    def vandal(mask: Tensor) -> Tensor:
        return mask.fill_(False)

    step = PositionClock().observe(ForwardInfo(1, 3))
    assert not step.mask(vandal).any()
    assert step.real.all()


def test_a_mask_of_another_shape_is_an_error() -> None:
    with pytest.raises(
        DataError,
        match=r"attention_mask must have shape \(2, 6\) \(cached tokens included\), got \(2, 4\)",
    ):
        PositionClock().observe(ForwardInfo(2, 1, 5, torch.ones(2, 4)))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("lastprompt", "closest: 'last_prompt'"),
        (True, "got True"),
        ([], "got \\[\\]"),
        ([1, "2"], "got \\[1, '2'\\]"),
        (1.5, "got 1.5"),
        (slice(0, 4, -1), "positive step"),
        (slice(0, 1.5), "slice of ints"),
    ],
)
def test_an_invalid_rule_is_refused_with_what_arrived(bad: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        check_positions(bad)


def test_rules_go_to_json_and_back_and_functions_are_refused() -> None:
    for rule, _ in RULES.values():
        if not callable(rule):
            assert positions_from_json(positions_to_json(rule)) == check_positions(rule)
    with pytest.raises(ArgumentError, match="is a function, which cannot be saved"):
        positions_to_json(lambda mask: mask)


# -- what a generate call says about its prompt ---------------------------------------------------


def told(prompt: Tensor, infos: list[ForwardInfo]) -> list[Step]:
    clock = PositionClock()
    clock.generation(True, prompt)
    return [clock.observe(info) for info in infos]


def chunks(mask: Tensor, sizes: list[int]) -> list[ForwardInfo]:
    """Passes over a cache, of the sizes given; the mask of the prompt goes on with ones."""
    out, past = [], 0
    for size in sizes:
        full = torch.cat(
            [
                mask,
                torch.ones(mask.shape[0], max(0, past + size - mask.shape[1]), dtype=mask.dtype),
            ],
            dim=1,
        )
        out.append(ForwardInfo(mask.shape[0], size, past, full[:, : past + size]))
        past += size
    return out


@pytest.mark.parametrize("sizes", [[2, 2, 1, 1, 1, 1], [7, 1], [5, 3], [1] * 8], ids=str)
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("name", RULES)
def test_however_the_passes_are_cut_the_prompt_is_what_the_call_was_given(
    name: str, mask: Tensor, sizes: list[int]
) -> None:
    """In chunks, with guesses in the first pass, or several tokens at a time; with masks seen or
    hidden from the passes."""
    rule, obvious = check_positions(RULES[name][0]), RULES[name][1]
    seen = chunks(mask, sizes)
    hidden = [ForwardInfo(i.batch, i.n_new, i.past, opaque_mask=True) for i in seen]
    for infos in (seen, hidden):
        touched: list[set[int]] = [set(), set()]
        for step in told(mask, infos):
            chosen = step.mask(rule)
            for row in range(2):
                touched[row] |= set(step.index[row][chosen[row]].tolist())
        for row, n in enumerate(mask.sum(1).tolist()):
            assert touched[row] == {p for p in range(n + 3) if obvious(p, n)}


def test_beams_repeat_the_rows_of_their_prompt() -> None:
    steps = told(
        LEFT,
        [
            ForwardInfo(6, 5, 0, LEFT.repeat_interleave(3, 0)),
            ForwardInfo(6, 1, 5, opaque_mask=True),
        ],
    )
    assert [step.prompt_lengths.tolist() for step in steps] == [[3, 3, 3, 5, 5, 5]] * 2
    assert steps[1].index[:, 0].tolist() == [3, 3, 3, 5, 5, 5]


def test_a_prompt_told_is_forgotten_when_the_call_ends_and_when_it_is_only_what_is_new() -> None:
    clock = PositionClock()
    clock.generation(True, torch.ones(1, 4))
    assert clock.observe(ForwardInfo(1, 6)).prompt_lengths.tolist() == [4]
    assert clock.prompt_rows(1) is not None
    clock.generation(False)
    assert clock.prompt_rows(1) is None
    assert clock.observe(ForwardInfo(1, 6)).prompt_lengths.tolist() == [6]
    clock.generation(True, torch.ones(1, 2))  # two new tokens, on a cache of five
    assert clock.observe(ForwardInfo(1, 2, past=5)).prompt_lengths.tolist() == [7]
    assert clock.prompt_rows(1) is None


@pytest.mark.parametrize("name", RULES)
def test_several_tokens_on_a_cache_hide_an_untold_prompt_from_the_rules_that_need_it(
    name: str,
) -> None:
    rule = check_positions(RULES[name][0])
    first, second = selected(rule, chunks(LEFT, [3, 2]))
    assert not first.guessed_prompt
    assert second.guessed_prompt
    if name in ("all", "int", "slice", "open slice", "mask function"):
        second.mask(rule)
    else:
        with pytest.raises(
            InterventionError, match=r"depends on where the prompt ends.*pass prompt_lengths="
        ):
            second.mask(rule)
    clock = PositionClock([3, 5])
    clock.generation(True)
    assert not any(clock.observe(info).guessed_prompt for info in chunks(LEFT, [3, 2]))


def test_a_cache_that_got_lost_between_two_steps_is_noticed():
    """What a host does that is not served its cache by the model: one new token, and the mask of
    the whole sequence."""
    clock = PositionClock()
    clock.generation(True)
    clock.observe(ForwardInfo(1, 6, 0, torch.ones(1, 6)))
    with pytest.raises(
        DataError,
        match=r"must have shape \(1, 1\) .*got \(1, 7\); the cache seems to have got lost",
    ):
        clock.observe(ForwardInfo(1, 1, 0, torch.ones(1, 7)))
