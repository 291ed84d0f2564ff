"""Which tokens were read, which were edited and by how much: small HTML that stands by itself."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from expertsteer_lens._checks import check_choice
from expertsteer_lens.data.chat import Text, check_texts
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.hosts import TokenBatch, as_host
from expertsteer_lens.hosts.reading import read_tokens
from expertsteer_lens.interventions.arithmetic import centre, wide
from expertsteer_lens.steer.run import PlanRun

if TYPE_CHECKING:
    import pandas

    from expertsteer_lens.hosts import Host
    from expertsteer_lens.steer.plan import SteeringPlan

Colour = Literal["projection", "delta", "gate"]
UNITS = {
    "projection": "projection on the direction, before the edit",
    "delta": "length of what was added",
    "gate": "score of the gate",
}

STYLE = """
.esl-tokens{font-family:Inter,Helvetica,Arial,sans-serif;font-size:14px;
line-height:2.1;margin:10px 0}
.esl-tokens .esl-head{line-height:1.4;margin-bottom:4px;overflow-wrap:anywhere}
.esl-tokens .esl-key{line-height:1.5;font-size:12px;opacity:.85}
.esl-tokens .esl-text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:13px;
overflow-wrap:anywhere;max-height:22em;overflow-y:auto}
.esl-tokens span.t{padding:2px 0;border-radius:2px;white-space:pre-wrap;
border-bottom:3px solid transparent}
.esl-tokens span.e{border-bottom-color:#d9480f}
.esl-tokens span.r{outline:1.5px solid #2b6cb0;outline-offset:-1px}
.esl-tokens span.n{opacity:.75}
.esl-tokens .esl-new{border-left:3px solid #7c8896;padding-left:8px;margin-top:6px}
"""


@dataclass(frozen=True, eq=False)
class TokenView:
    """The tokens of one text, and what was done at one hook point; Jupyter draws it, `save` writes
    a page.

    What it does not show: whether an edit changed the behaviour; `evaluate` measures that.
    """

    tokens: tuple[str, ...]
    """Each token as text."""
    n_prompt: int
    """How many of them are prompt; the rest was generated or given as continuation."""
    hook_name: str
    rule: str
    """Name of the rule that chose the tokens, e.g. "generated"."""
    chosen: Bool[Tensor, " n"]
    """Read, or edited."""
    what: Literal["read", "edited"]
    projection: Float[Tensor, " n"] | None = None
    """x . direction before the edit, in the plan's basis."""
    delta: Float[Tensor, " n"] | None = None
    """Length of the change of the activation."""
    gate: Float[Tensor, " n"] | None = None
    """Score of the gate, in its own unit; minus its threshold."""
    gate_rule: str = ""

    def to_pandas(self) -> pandas.DataFrame:
        """One row a token."""
        import pandas as pd

        n = len(self.tokens)
        frame = pd.DataFrame(
            {
                "token": self.tokens,
                "part": ["prompt"] * self.n_prompt + ["generated"] * (n - self.n_prompt),
                self.what: self.chosen.tolist(),
            }
        )
        for name in get_args(Colour):
            if getattr(self, name) is not None:
                frame[name] = getattr(self, name).tolist()
        return frame

    def to_html(self, *, colour: Colour | None = None) -> str:
        """The tokens as a piece of HTML with its own style; nothing in it is loaded or run.

        Args:
            colour: what the background shows; default: the projection, if there is one.

        Raises:
            ArgumentError: this view holds no such number.
        """
        known: list[Colour] = [c for c in get_args(Colour) if getattr(self, c) is not None]
        if colour is not None:
            check_choice("colour", colour, get_args(Colour))
            if colour not in known:
                raise ArgumentError(f"this view holds no {colour}; it holds {known or 'none'}.")
        elif known:
            colour = known[0]
        values = None if colour is None else getattr(self, colour)
        # BOS often lies far outside of all others, and would leave them all pale.
        top = 0.0 if values is None else float(values[1:].abs().max() if len(values) > 1 else 0.0)
        pieces = [self._token(i, values, top) for i in range(len(self.tokens))]
        key = f"{'underlined' if self.what == 'edited' else 'outlined'}: {self.what}"
        if colour is not None:
            unit = UNITS[colour] if self.what == "edited" else UNITS[colour].split(",")[0]
            key += f"; blue: above 0, orange: below 0 ({unit}; strongest {top:.3g})"
        gate = f"; gate: {self.gate_rule}" if self.gate_rule else ""
        head = (
            f"{int(self.chosen.sum())} of {len(self.tokens)} tokens {self.what} at "
            f"{self.hook_name} by rule {self.rule}{gate}"
        )
        new = "".join(pieces[self.n_prompt :])
        return (
            f"<style>{STYLE}</style><div class='esl-tokens'>"
            f"<div class='esl-head'><b>{html.escape(head)}</b></div>"
            f"<div class='esl-key'>{html.escape(key)}</div>"
            "<div class='esl-key'>prompt</div>"
            f"<div class='esl-text'>{''.join(pieces[: self.n_prompt])}</div>"
            + (
                "<div class='esl-new'><div class='esl-key'>generated</div>"
                f"<div class='esl-text'>{new}</div></div>"
                if new
                else ""
            )
            + "</div>"
        )

    def _token(self, i: int, values: Tensor | None, top: float) -> str:
        chosen = bool(self.chosen[i])
        said = [f"token {i}", self.what if chosen else f"not {self.what}"]
        for name in get_args(Colour):
            value = getattr(self, name)
            if value is not None:
                said.append(f"{name} {float(value[i]):+.3g}")
        style = ""
        if values is not None and top > 0:
            share = max(-1.0, min(1.0, float(values[i]) / top))
            base = "43,108,176" if share > 0 else "217,119,6"
            style = f" style='background:rgba({base},{0.6 * abs(share):.2f})'"
        kind = {"edited": "e", "read": "r"}[self.what] if chosen else "n"
        text = html.escape(visible(self.tokens[i])) or "∅"
        return f"<span class='t {kind}'{style} title='{', '.join(said)}'>{text}</span>"

    def _repr_html_(self) -> str:
        return self.to_html()

    def __repr__(self) -> str:
        return (
            f"TokenView({int(self.chosen.sum())} of {len(self.tokens)} tokens {self.what} at "
            f"{self.hook_name}, rule {self.rule}, {self.n_prompt} of them prompt)"
        )


def visible(text: str) -> str:
    """A text with its control characters made visible.

    Example:
        >>> visible("a\\nb\\x00")
        'a⏎b␀'
    """
    out = []
    for c in text:
        code = ord(c)
        if c == "\n":
            out.append("⏎")
        elif c == "\t":
            out.append("⇥")
        elif code < 0x20:
            out.append(chr(0x2400 + code))
        elif 0x7F <= code < 0xA0 or code in _INVISIBLE or 0xD800 <= code < 0xE000:
            out.append(f"[U+{code:04X}]")
        else:
            out.append(c)
    return "".join(out)


_INVISIBLE = {*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF}
"""Characters that have no width, or turn the direction of the text around them."""


class _RecordedRun(PlanRun):
    """A plan at work that keeps what its hooks were given and what they gave back."""

    def functions(self) -> Any:
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

        def recorded(name: str, fn: Any) -> Any:
            def both(x: Tensor) -> Tensor | None:
                before = x.detach().clone()
                out = fn(x)
                self.seen[name] = (before, before if out is None else out.detach().clone())
                return None if out is None else torch.as_tensor(out)

            return both

        return {name: recorded(name, fn) for name, fn in super().functions().items()}

    def as_read(self, x: Tensor) -> Tensor:
        """Activations in the basis of the plan."""
        return centre(wide(x)) if self._centred else wide(x)


def view_edits(
    plan: SteeringPlan,
    model: Any,
    prompt: Text,
    *,
    max_new_tokens: int = 0,
    continuation: str | None = None,
    allow_mismatch: bool = False,
) -> list[TokenView]:
    """What a plan does to each token of a prompt and of what follows: one view a vector.

    The whole text is run once more, steered, with the end of its prompt said; positions are
    absolute, so that is what happened while it was generated.

    Args:
        plan: the plan.
        model: the target.
        prompt: text or chat.
        max_new_tokens: tokens to generate under the plan; 0: only the prompt is looked at.
        continuation: a text that follows instead of a generated one.
        allow_mismatch: see `SteeringPlan.hooks`.

    Raises:
        ArgumentError: both a continuation and tokens to generate.
    """
    if continuation is not None and max_new_tokens:
        raise ArgumentError("give continuation or max_new_tokens, not both.")
    host = as_host(model)
    text = check_texts("prompt", [prompt])[0]
    ids = host.tokenize([text]).input_ids[0].tolist()
    n_prompt = len(ids)
    if max_new_tokens:
        with plan.hooks(host.model, allow_mismatch=allow_mismatch):
            ids += host.generate_tokens([text], max_new_tokens=max_new_tokens)[0]
    elif continuation is not None:
        ids += host.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    run = _RecordedRun(plan, host, allow_mismatch=allow_mismatch, prompt_lengths=[n_prompt])
    with torch.no_grad(), run.installed():
        host.forward(_batch(ids, host))
    tokens = _pieces(host, ids)
    views = []
    for vector in plan.vectors:
        before, after = (x[0] for x in run.seen[vector.hook_name])
        change = wide(after) - wide(before)
        gate = vector.gate
        scores = None
        if gate is not None:
            read = run.seen[gate.hook_name or vector.hook_name][0][0]
            scores = gate.scores(run.as_read(read)).float().cpu() - gate.threshold
        direction = vector.direction.to(before.device)
        views.append(
            TokenView(
                tokens=tokens,
                n_prompt=n_prompt,
                hook_name=vector.hook_name,
                rule=repr(plan.positions),
                chosen=(before != after).any(-1).cpu(),
                what="edited",
                projection=(run.as_read(before).to(direction) @ direction).cpu(),
                delta=change.float().norm(dim=-1).cpu(),
                gate=scores,
                gate_rule="" if gate is None else repr(gate),
            )
        )
    return views


def view_reading(
    model: Any,
    text: Text,
    hook_name: str,
    *,
    positions: str | int = "answer",
    span: tuple[int, int] | None = None,
    direction: Float[Tensor, " d"] | None = None,
) -> TokenView:
    """Which tokens of a text `capture` reads, coloured by their projection on a direction.

    Args:
        model: the expert or the target.
        text: text or chat.
        hook_name: where it is read.
        positions: as in `capture`.
        span: (start, end) in characters; see `capture`.
        direction: in the model's basis, as fitted.
    """
    host = as_host(model)
    content = check_texts("text", [text])[0]
    batch = host.tokenize([content])
    chosen = read_tokens(host, [content], batch, positions, None if span is None else [span])[0]
    ids = batch.input_ids[0].tolist()
    projection = None
    if direction is not None:
        rows = host.read(batch, [hook_name], "all", None, None)[hook_name].float().cpu()
        projection = rows @ direction.float().cpu()
    return TokenView(
        tokens=_pieces(host, ids),
        n_prompt=len(ids),
        hook_name=hook_name,
        rule=repr(positions),
        chosen=chosen.cpu(),
        what="read",
        projection=projection,
    )


def _batch(ids: Sequence[int], host: Host) -> TokenBatch:
    tensor = torch.tensor([list(ids)], device=host.device)
    return TokenBatch(tensor, torch.ones_like(tensor))


def _pieces(host: Host, ids: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds: many tokenizers drop the space before a lone token."""
    out, before = [], ""
    for n, i in enumerate(ids, start=1):
        text = host.tokenizer.decode(list(ids[:n]))
        # Half a character is replaced once its other half has come: then the token stands alone.
        grown = text.startswith(before)
        out.append(text[len(before) :] if grown else host.tokenizer.decode([i]))
        before = text
    return tuple(out)
