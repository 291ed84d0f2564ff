"""Gates from validation pairs to steering, on every host: neutral texts come out bit for bit, in
any batch."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from reference import CLOSE, HOOK, SIZE, padded
from torch import Tensor

from expertsteer_lens.hosts import as_host, capture
from expertsteer_lens.interventions.gates import fit_gate
from expertsteer_lens.steer.plan import SteeringPlan

HOSTS = ("bridge", "bridge compat", "hooked", "hooked raw", "huggingface", "nnsight")
READ = "blocks.0.hook_resid_pre"
"""Where the gate reads: the embedding, which tells words apart. The vector acts two blocks
later."""
STARTS = [
    "the cat was",
    "a dog is",
    "she said he was",
    "once upon a time the boy was",
    "my friend is",
    "they said the girl was so",
    "it was not",
    "we saw her father and he was very",
    "in the big house you is",
    "the old tree was",
    "his mother was",
]
OTHERS = ["sad", "home", "moon", "glad", "red", "the"]
TRAIN, VALIDATION = STARTS[:6], STARTS[6:]
NEW_POSITIVE = ["the little boy and her friend ran and was happy", "on a good day she is happy"]
NEW_NEUTRAL = [
    "the girl played in the garden of her mother",
    "my friend ran home",
    "they saw the moon",
]


@functools.cache
def model_of(kind: str) -> Any:
    return models.on_host(kind, "llama", size=SIZE)


@functools.cache
def gated(kind: str, per: str) -> SteeringPlan:
    """Direction from some texts; threshold from other texts, with neutral ones among them: every
    token is an example."""
    model = model_of(kind)
    train = {
        word: capture(model, [f"{start} {word}" for start in TRAIN], [READ])[READ]
        for word in ["happy", *OTHERS]
    }
    direction = train["happy"].mean(0) - torch.cat([train[word] for word in OTHERS]).mean(0)
    texts = [f"{start} {word}" for start in VALIDATION for word in ["happy", *OTHERS]]
    is_happy = (
        torch.cat([torch.tensor(row) for row in rows_of(model, texts)])
        == rows_of(model, ["happy"])[0][-1]
    )
    held_out = capture(model, texts, [READ], positions="all")[READ]
    gate = fit_gate(held_out, is_happy.long(), direction=direction, hook_name=READ, per=per)
    v = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(0))
    return SteeringPlan.from_vectors({HOOK: v}, coefficient=4.0, relative_to="unit", gate=gate)


def rows_of(model: Any, texts: list[str]) -> list[list[int]]:
    batch = as_host(model).tokenize(texts)
    return [
        ids[:n].tolist() for ids, n in zip(batch.input_ids, batch.lengths.tolist(), strict=True)
    ]


def logits(model: Any, rows: list[list[int]], side: str = "right") -> list[Tensor]:
    """Logits at the real tokens of each row of one padded pass."""
    ids, mask = padded(rows, side)
    kind = as_host(model).kind
    options: dict[str, Any] = {"attention_mask": mask}
    if kind != "transformer_lens":
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        if kind == "nnsight":
            out = model.trace(input_ids=ids, trace=False, **options).logits
        else:
            out = model(ids, **options)
            out = out if isinstance(out, Tensor) else out.logits
    return [out[i][mask[i].bool()] for i in range(len(rows))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("per", ["row", "token"])
@pytest.mark.parametrize("kind", HOSTS)
def test_neutral_texts_are_bit_equal_and_positive_ones_are_steered_alone_and_in_a_batch(
    kind: str, per: str, side: str
) -> None:
    model, plan = model_of(kind), gated(kind, per)
    neutral, positive = rows_of(model, NEW_NEUTRAL), rows_of(model, NEW_POSITIVE)
    mixed = [neutral[0], positive[0], neutral[1], positive[1], neutral[2]]
    plain, plain_mixed = [logits(model, [row])[0] for row in mixed], logits(model, mixed, side)
    with plan.hooks(model) as report:
        alone = [logits(model, [row])[0] for row in mixed]
        by_itself = report.n_edited[HOOK]
        together = logits(model, mixed, side)
    for i in (0, 2, 4):
        assert torch.equal(alone[i], plain[i])
        assert torch.equal(together[i], plain_mixed[i])
    for i in (1, 3):
        assert (alone[i] - plain[i])[-1].abs().max() > 0.1
        torch.testing.assert_close(together[i], alone[i], **CLOSE)
    assert report.n_edited == {HOOK: 2 * by_itself}
    # A row's gate opens for all of its tokens, a token's for the one word that opens it.
    assert by_itself == (sum(map(len, positive)) if per == "row" else 2)


@pytest.mark.parametrize("per", ["row", "token"])
@pytest.mark.parametrize("kind", HOSTS)
def test_neutral_texts_are_continued_as_without_steering(kind: str, per: str) -> None:
    model, host = model_of(kind), as_host(model_of(kind))
    plain = host.generate_tokens(NEW_NEUTRAL + NEW_POSITIVE, max_new_tokens=4, stop_at_eos=False)
    with gated(kind, per).hooks(model):
        steered = host.generate_tokens(
            NEW_NEUTRAL + NEW_POSITIVE, max_new_tokens=4, stop_at_eos=False
        )
    assert steered[:3] == plain[:3]
    assert steered[3:] != plain[3:]


@pytest.mark.parametrize("kind", HOSTS)
def test_the_same_gate_inside_out_does_not_leave_neutral_texts_alone(kind: str) -> None:
    """Negative control: what keeps neutral texts as they are is the gate that was fitted, not
    gating as such."""
    model, plan = model_of(kind), gated(kind, "row")
    vector = plan.vectors[0]
    assert vector.gate is not None
    wrong = SteeringPlan(vectors=(replace(vector, gate=replace(vector.gate, opens="below")),))
    neutral, positive = rows_of(model, NEW_NEUTRAL), rows_of(model, NEW_POSITIVE)
    plain = [logits(model, [row])[0] for row in neutral + positive]
    with wrong.hooks(model):
        found = [logits(model, [row])[0] for row in neutral + positive]
    assert not any(torch.equal(found[i], plain[i]) for i in range(3))
    assert all(torch.equal(found[i], plain[i]) for i in (3, 4))
