"""The slow and obvious reference that every host is held to.

A plain Hugging Face model in float64, no cache, one prompt at a time, and a torch hook that adds
the vector at a list of positions written out by hand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import models
import torch
from torch import Tensor

from expertsteer_lens.steer.plan import SteeringPlan

PROMPTS = ["the cat saw a dog", "once upon a time there was a big house", "sun", ""]
"""With BOS the last is a prompt of one token: the one a clock is most easily wrong about."""
N_NEW = 3
HOOK = "blocks.1.hook_resid_post"
SIZE = 0.15
"""Weights calm enough that float32 rounds log-probabilities (of size 7) at 2e-6 on the way through
three blocks."""
CLOSE = {"atol": 1e-5, "rtol": 0.0}
"""Unsteered float32 hosts differ from the float64 reference by 1e-6 to 2e-6, padded batches
included."""
RULES: dict[
    str, tuple[Any, Any]
] = {  # rule, and the obvious definition on (position, prompt length)
    "all": ("all", lambda p, n: True),
    "prompt": ("prompt", lambda p, n: p < n),
    "last_prompt": ("last_prompt", lambda p, n: p == n - 1),
    "generated": ("generated", lambda p, n: p >= n - 1),
    "int": (1, lambda p, n: p == 1),
    "slice": (slice(1, None, 2), lambda p, n: p % 2 == 1),
    "list": ([0, -1], lambda p, n: p in (0, n - 1)),
    "mask function": (lambda mask: mask.cumsum(1) % 3 == 2, lambda p, n: p % 3 == 1),
}


class Expected(NamedTuple):
    """What one prompt must give."""

    tokens: list[int]
    """Greedy continuation, N_NEW ids."""
    rows: Tensor
    """The log-probabilities that chose them, `[N_NEW, vocab]`, float32."""
    n_cached: int
    """Positions edited if each is computed once."""
    n_uncached: int
    """Positions edited if every pass computes the whole sequence."""


@functools.cache
def vector(family: str) -> Tensor:
    """What is added, `[d]`, of norm 6."""
    found = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(5))
    if family in ("gpt2", "neox"):  # their output ignores the mean
        found = found - found.mean()
    return 6.0 * found / found.norm()


def plan_for(family: str, rule: Any) -> SteeringPlan:
    """The plan that adds `vector(family)` where the rule says."""
    v = vector(family)
    return SteeringPlan.from_vectors(
        {HOOK: v}, coefficient=float(v.norm()), relative_to="unit", positions=rule
    )


@functools.cache
def prompt_ids() -> list[list[int]]:
    tokenizer = models.tokenizer()
    return [[1, *tokenizer(p, add_special_tokens=False)["input_ids"]] for p in PROMPTS]


@functools.cache
def plain(family: str) -> Any:
    """The model of the reference."""
    return models.hf(family, size=SIZE, dtype=torch.float64)


@functools.cache
def reference(family: str, rule: str) -> list[Expected]:
    """One entry per prompt."""
    model, obvious, out = plain(family), RULES[rule][1], []
    layer = getattr(model.base_model, "h", None) or model.base_model.layers
    for ids in prompt_ids():
        tokens, rows, counts = list(ids), [], []
        for _ in range(N_NEW):
            touched = [p for p in range(len(tokens)) if obvious(p, len(ids))]

            def hook(_: Any, __: Any, output: Any, touched: list[int] = touched) -> Any:
                value = (output[0] if isinstance(output, tuple) else output).clone()
                for p in touched:
                    value[0, p] += vector(family)
                return (value, *output[1:]) if isinstance(output, tuple) else value

            handle = layer[1].register_forward_hook(hook)
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            handle.remove()
            rows.append(logits.log_softmax(-1).float())
            tokens.append(int(logits.argmax()))
            counts.append(len(touched))
        out.append(Expected(tokens[len(ids) :], torch.stack(rows), counts[-1], sum(counts)))
    return out


def n_edited(expected: Sequence[Expected], *, cached: bool) -> dict[str, int]:
    """What the report of a run over these prompts must say."""
    return {HOOK: sum(one.n_cached if cached else one.n_uncached for one in expected)}


def padded(rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask `[rows, pos]`, padded with 0."""
    width = max(map(len, rows))
    ids, mask = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    return ids, mask


def check(tokens: Tensor, rows: Tensor, expected: Sequence[Expected]) -> None:
    """Assert that tokens `[batch, N_NEW]` and log-probabilities `[batch, N_NEW, vocab]` are the
    expected ones."""
    for i, want in enumerate(expected):
        torch.testing.assert_close(rows[i].float(), want.rows, **CLOSE)
        assert tokens[i].tolist() == want.tokens


def kl_per_token(host: Any, texts: list[str], plan: Any) -> Tensor:
    """Per text, one at a time: summed KL(unsteered || steered) of the next-token distribution in
    nats, and the number of positions; `[n_texts, 2]`. A text counts as prompt up to its middle."""
    rows = []
    for text in texts:
        batch = host.tokenize([text])
        n = int(batch.attention_mask.sum())
        with torch.no_grad():
            base = host.forward(batch).double().log_softmax(-1)
            with plan.hooks(host.model, prompt_lengths=[max(1, n // 2)]):
                steered = host.forward(batch).double().log_softmax(-1)
        rows.append([float((base.exp() * (base - steered)).sum()), float(n)])
    return torch.tensor(rows, dtype=torch.float64)
