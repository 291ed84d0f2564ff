"""Methods of one object that are called through functions of ours."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from expertsteer_lens.hosts.overrides import calls_through, is_stream


class Speaker:
    """Has a method that returns, and one that yields."""

    def __init__(self, name: str = "a") -> None:
        self.name = name

    def say(self, word: str, *, times: int = 1) -> str:
        """Say it."""
        return f"{self.name} {word * times}"

    def spell(self, word: str) -> Iterator[str]:
        """Letter by letter."""
        yield from word


def marked(mark: str) -> Callable[..., Any]:
    def around(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return f"{mark}({call(*args, **kwargs)})"

    return around


class Counter:
    """An around that several blocks share."""

    def __init__(self) -> None:
        self.n = 0

    def count(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Count the call."""
        self.n += 1
        return call(*args, **kwargs)


def test_the_one_added_last_is_called_first_and_nothing_stays():
    speaker = Speaker()
    with calls_through(speaker, "say", marked("x")):
        with calls_through(speaker, "say", marked("y")):
            assert speaker.say("b", times=2) == "y(x(a bb))"
        assert speaker.say("b") == "x(a b)"
        assert Speaker("c").say("b") == "c b"
    assert vars(speaker) == {"name": "a"}


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)])
def test_blocks_may_end_in_any_order(order: tuple[int, ...]):
    speaker, stacks, on = Speaker(), [ExitStack() for _ in range(3)], ["x", "y", "z"]
    for stack, mark in zip(stacks, on, strict=True):
        stack.enter_context(calls_through(speaker, "say", marked(mark)))
    for i in order:
        stacks[i].close()
        on.remove("xyz"[i])
        want = "a b"
        for mark in on:
            want = f"{mark}({want})"
        assert speaker.say("b") == want
    assert vars(speaker) == {"name": "a"}


def test_what_several_blocks_add_is_called_once_until_the_last_of_them_has_ended():
    speaker, counter, first = Speaker(), Counter(), ExitStack()
    first.enter_context(calls_through(speaker, "say", counter.count))
    with calls_through(speaker, "say", counter.count):
        speaker.say("b")
        assert counter.n == 1
        first.close()
        speaker.say("b")
        assert counter.n == 2
    speaker.say("b")
    assert counter.n == 2


def test_an_exception_in_the_block_leaves_nothing():
    speaker = Speaker()
    with pytest.raises(KeyError), calls_through(speaker, "say", marked("x")):
        raise KeyError
    assert vars(speaker) == {"name": "a"}


def test_a_function_that_was_there_before_is_there_again():
    speaker = Speaker()
    speaker.say = before = lambda word: f"mine {word}"  # type: ignore[method-assign]
    with calls_through(speaker, "say", marked("x")):
        assert speaker.say("b") == "x(mine b)"
    assert vars(speaker)["say"] is before


def test_a_function_that_somebody_puts_over_it_stays_and_calls_pass_through():
    speaker = Speaker()
    with calls_through(speaker, "say", marked("x")):
        ours = speaker.say
        speaker.say = theirs = lambda word: f"mine {ours(word)}"  # type: ignore[method-assign]
        assert speaker.say("b") == "mine x(a b)"
        with calls_through(speaker, "say", marked("y")):
            assert speaker.say("b") == "y(mine x(a b))"
        assert vars(speaker)["say"] is theirs
    assert speaker.say("b") == "mine a b"


def test_a_method_of_the_class_that_is_replaced_meanwhile_is_called(monkeypatch):
    speaker = Speaker()
    with calls_through(speaker, "say", marked("x")):
        monkeypatch.setattr(Speaker, "say", lambda self, word: f"new {word}")
        assert speaker.say("b") == "x(new b)"


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"]
)
def test_a_copy_has_the_method_as_it_was(again: Callable[[Any], Any]):
    speaker = Speaker()
    with calls_through(speaker, "say", marked("x")):
        other, method = again(speaker), again(speaker.say)
        other.name = "c"
        assert other.say("b") == "c b"
        assert other.say.__self__ is other
        assert method("b") == "a b"
        assert method.__self__ is not speaker
        assert speaker.say("b") == "x(a b)"
        with calls_through(other, "say", marked("y")):
            assert other.say("b") == "y(c b)"
    assert speaker.say("b") == "a b"


def shouted(word: str) -> str:
    """Stands over a method."""
    return word.upper()


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"]
)
def test_a_copy_has_the_function_that_was_over_the_method(again: Callable[[Any], Any]):
    speaker = Speaker()
    speaker.say = shouted  # type: ignore[assignment, method-assign]
    with calls_through(speaker, "say", marked("x")):
        assert again(speaker).say is shouted


def test_it_looks_like_the_method():
    speaker = Speaker()
    want = [str(inspect.signature(getattr(speaker, name))) for name in ("say", "spell")]
    with (
        calls_through(speaker, "say", marked("x")),
        calls_through(speaker, "spell", marked("x")),
        calls_through(speaker, "say", marked("y")),
    ):
        found = [speaker.say, speaker.spell]
        assert [str(inspect.signature(method)) for method in found] == want
        assert [f.__name__ for f in found] == ["say", "spell"]
        assert speaker.say.__doc__ == "Say it."
        assert [is_stream(speaker, name) for name in ("say", "spell")] == [False, True]


def test_a_stream_goes_through_those_who_are_there_at_its_first_step():
    def doubled(call: Callable[..., Any], /, *args: Any) -> Iterator[str]:
        for letter in call(*args):
            yield letter * 2

    speaker = Speaker()
    before = speaker.spell("ab")
    with calls_through(speaker, "spell", doubled):
        assert list(before) == ["a", "b"]  # the method's own, asked for before the block
        late, begun = speaker.spell("ab"), speaker.spell("ab")
        assert next(begun) == "aa"
    assert list(late) == ["a", "b"]
    assert list(begun) == ["bb"]
    assert vars(speaker) == {"name": "a"}
