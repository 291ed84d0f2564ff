"""Conversations that stand wherever a text does, and are shown to each model in its own chat
template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertsteer_lens._checks import check_list
from expertsteer_lens.errors import DataError

from .texts import check_text

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Chat:
    """A conversation: anywhere a text is taken, a list of messages is taken too and becomes one of
    these.

    Expert and target render it with their own tokenizer's template, so a conversation means the
    same to both. If the last message is the assistant's, the text ends with its last word, the turn
    left open; else it ends where the assistant's turn begins. `chat + text` lets the assistant say
    (or go on saying) the text; `text + chat` puts the text in front of what the user says first.

    Raises:
        DataError: no message, no user's message, an unknown role, an empty content.

    Example:
        >>> chat = Chat(({"role": "user", "content": "Was it good?"},))
        >>> chat == Chat.ask("Was it good?")
        True
        >>> (chat + " Yes.").messages
        (('user', 'Was it good?'), ('assistant', 'Yes.'))
    """

    messages: tuple[tuple[str, str], ...]
    """(role, content) of each message; roles are "system" (first only), "user" and "assistant"."""
    template: tuple[tuple[str, Any], ...] = ()
    """What else the chat template is told, as (name, value) or a dict, for instance
    `{"enable_thinking": False}`. A template that does not know a name ignores it."""

    def __post_init__(self) -> None:
        given = check_list("messages", self.messages, of="messages")
        messages = tuple(_check_message(m, i) for i, m in enumerate(given))
        if not messages:
            raise DataError("a chat needs at least one message.")
        roles = [role for role, _ in messages]
        if "system" in roles[1:] or "user" not in roles:
            raise DataError(
                "a chat needs a user's message, and a system message only in front, got roles "
                f"{roles}."
            )
        object.__setattr__(self, "messages", messages)
        object.__setattr__(self, "template", _check_template(self.template))

    @classmethod
    def ask(
        cls,
        question: str,
        answer: str | None = None,
        *,
        system: str | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Chat:
        """A question, with the answer if one is given.

        Example:
            >>> Chat.ask("Why?", template={"enable_thinking": False}).template
            (('enable_thinking', False),)
        """
        given = (("system", system), ("user", question), ("assistant", answer))
        messages = tuple((role, content) for role, content in given if content is not None)
        return cls(messages, _check_template(template or ()))

    def render(self, tokenizer: Any) -> str:
        """The text that a model with this tokenizer is shown.

        Raises:
            DataError: the tokenizer has no chat template, or its template refuses the roles.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template, "
                "so it cannot show a chat; set "
                "tokenizer.chat_template, or give plain texts."
            )
        answering = self.messages[-1][0] == "assistant"
        try:
            shown = tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in self.messages],
                tokenize=False,
                add_generation_prompt=not answering,
                continue_final_message=answering,
                **dict(self.template),
            )
        except (
            Exception
        ) as error:  # a template is a program of the model's authors, which may raise anything
            roles = [role for role, _ in self.messages]
            raise DataError(
                f"the chat template refuses a chat with roles {roles}: {error}"
            ) from error
        return str(shown)

    def encode(self) -> bytes:
        """Bytes that are equal for equal chats, for hashes."""
        said = [self.messages, self.template] if self.template else self.messages
        return json.dumps(said, ensure_ascii=False).encode()

    def __add__(self, text: str) -> Chat:
        if not isinstance(text, str):
            return NotImplemented
        role, content = self.messages[-1]
        if role == "assistant":
            return Chat((*self.messages[:-1], (role, content + text)), self.template)
        # Templates put their own space before a turn.
        return Chat((*self.messages, ("assistant", text.lstrip())), self.template)

    def __radd__(self, text: str) -> Chat:
        if not isinstance(text, str):
            return NotImplemented
        first = next(i for i, (role, _) in enumerate(self.messages) if role == "user")
        changed = ("user", text + self.messages[first][1])
        return Chat((*self.messages[:first], changed, *self.messages[first + 1 :]), self.template)

    def __len__(self) -> int:
        return sum(len(content) for _, content in self.messages)

    def __str__(self) -> str:
        return "\n".join(f"{role}: {content}" for role, content in self.messages)


Text = str | Chat
"""What a model can be shown."""


def as_text(value: Any) -> Any:
    """A list of messages as a `Chat`; anything else as it is."""
    messages = isinstance(value, Sequence) and not isinstance(value, str) and value
    return Chat(tuple(value)) if messages and all(isinstance(m, Mapping) for m in value) else value


def check_texts(name: str, texts: Iterable[Any], *, chats: bool = True) -> list[Any]:
    """Return texts as a list, lists of messages among them as `Chat`s.

    Raises:
        DataError: no list (a str, a dict, a set), an empty list, an empty text, or something that
            is no text (naming its index); a chat without `chats`.
    """
    out = [as_text(text) for text in check_list(name, texts)]
    if not out:
        raise DataError(f"{name} is empty; give at least one text.")
    for i, text in enumerate(out):
        if isinstance(text, Chat) and chats:
            continue
        if not isinstance(text, str):
            hint = "; wrap one conversation in a list" if isinstance(text, Mapping) else ""
            raise DataError(
                f"{name}[{i}] must be a str{' or a list of messages' if chats else ''}, got "
                f"{type(text).__name__}{hint}."
            )
        check_text(f"{name}[{i}]", text)
    return out


_OURS = ("tokenize", "add_generation_prompt", "continue_final_message", "conversation")


def _check_template(given: Any) -> tuple[tuple[str, Any], ...]:
    """Arguments of a chat template, in order of their names."""
    try:
        named = dict(given)
        json.dumps(named)
    except (TypeError, ValueError):
        named = {"": None}
    if not all(isinstance(name, str) and name.isidentifier() for name in named):
        raise DataError(f"template must be a dict of JSON values by name, got {given!r}.")
    if any(name in _OURS for name in named):
        raise DataError(f"template may not say {', '.join(_OURS)}, which a chat says itself.")
    return tuple(
        (name, tuple(value) if isinstance(value, list) else value)
        for name, value in sorted(named.items())
    )


def _check_message(message: Any, index: int) -> tuple[str, str]:
    if isinstance(message, Mapping):
        if set(message) != {"role", "content"}:
            raise DataError(
                f"messages[{index}] must have 'role' and 'content' only, got {sorted(message)}."
            )
        message = (message["role"], message["content"])
    if not isinstance(message, Sequence) or isinstance(message, str) or len(message) != 2:
        raise DataError(
            f"messages[{index}] must be a dict with 'role' and 'content', got {message!r}."
        )
    role, content = message
    if role not in ROLES:
        raise DataError(f"messages[{index}] has role {role!r}; roles are {', '.join(ROLES)}.")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"messages[{index}] ({role}) must have a text as content, got {content!r}.")
    check_text(f"messages[{index}]", content)
    return role, content


def readable(text: Text) -> str:
    """A text for a table; a chat with who says what.

    Example:
        >>> readable("Hello."), readable(Chat.ask("Why?"))
        ('Hello.', 'user: Why?')
    """
    if isinstance(text, str):
        return text
    return "\n".join(f"{role}: {said}" for role, said in text.messages)
