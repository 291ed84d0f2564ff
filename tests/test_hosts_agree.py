"""The same weights through every host: equal captures, equal steered logits, equal texts, nothing left behind."""

from __future__ import annotations

import models
import pytest
import torch

from expertsteer_lens.hosts import as_host, capture
from expertsteer_lens.plan import SteeringPlan

TEXTS = ["the cat ran home", "once upon a time there was a big dog", "she was sad"]
HOOKS = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]


def build(kind: str, family: str):
    if kind == "transformer_lens":
        return models.bridge(family)
    model = models.hf(family)
    if kind == "huggingface":
        model.tokenizer = models.tokenizer()
        return model
    nnsight = pytest.importorskip("nnsight")
    return nnsight.TransformersModel(model, tokenizer=models.tokenizer())


def plan(model, positions) -> SteeringPlan:
    generator = torch.Generator().manual_seed(4)
    vectors = {name: torch.randn(models.D_MODEL, generator=generator) for name in HOOKS[:1]}
    return SteeringPlan.from_vectors(
        vectors, coefficient=3.0, relative_to="unit", positions=positions, basis=as_host(model).basis
    )


@pytest.fixture(scope="module", params=models.FAMILIES)
def trio(request):
    return {kind: build(kind, request.param) for kind in ("transformer_lens", "huggingface", "nnsight")}


def test_every_host_says_what_it_is(trio):
    assert {kind: as_host(model).kind for kind, model in trio.items()} == {kind: kind for kind in trio}
    assert len({as_host(model).basis for model in trio.values()}) == 1


def test_captures_are_equal(trio):
    stores = {kind: capture(model, TEXTS, HOOKS) for kind, model in trio.items()}
    for kind in ("huggingface", "nnsight"):
        for name in HOOKS:
            torch.testing.assert_close(stores[kind][name], stores["transformer_lens"][name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["all", "last_prompt", 1])
def test_steered_log_probabilities_are_equal_and_differ_from_unsteered(trio, positions):
    steered, base = {}, {}
    for kind, model in trio.items():
        host = as_host(model)
        batch = host.tokenize(TEXTS)
        mask = batch.attention_mask.bool()
        lengths = batch.attention_mask.sum(1).tolist()
        with torch.no_grad():
            base[kind] = host.forward(batch).float().log_softmax(-1)[mask]
            with plan(model, positions).hooks(model, prompt_lengths=lengths):
                steered[kind] = host.forward(batch).float().log_softmax(-1)[mask]
            after = host.forward(batch).float().log_softmax(-1)[mask]
        assert torch.equal(after, base[kind])
    for kind in ("huggingface", "nnsight"):
        torch.testing.assert_close(steered[kind], steered["transformer_lens"], atol=1e-3, rtol=1e-3)
        assert float((steered[kind] - base[kind]).abs().max()) > 0.05


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_greedy_continuations_are_equal(trio, positions):
    texts = {}
    for kind, model in trio.items():
        host = as_host(model)
        with plan(model, positions).hooks(model):
            texts[kind] = host.generate_tokens(TEXTS[:2], max_new_tokens=4, stop_at_eos=False)
    assert texts["huggingface"] == texts["transformer_lens"]
    assert texts["nnsight"] == texts["transformer_lens"]
