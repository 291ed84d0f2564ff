"""The same weights through every host: the same activations, the same steered logits, the same
tokens.

TransformerBridge and HookedTransformer are held to the reference in `test_position_goldens`; here
are nnsight (each way of steering it) and plain Hugging Face, and the activations of all three."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import models
import pytest
import torch
from reference import (
    CLOSE,
    HOOK,
    N_NEW,
    RULES,
    SIZE,
    check,
    n_edited,
    padded,
    plan_for,
    prompt_ids,
    reference,
)
from torch import Tensor

from expertsteer_lens.hosts import as_host, capture
from expertsteer_lens.hosts.blocks import KINDS
from expertsteer_lens.steer.plan import SteeringPlan

WAYS = ("huggingface", "nnsight hooks", "nnsight apply", "nnsight edit")
families = pytest.mark.parametrize("family", models.FAMILIES)
# A bare NNsight wrapper differs from a TransformersModel in how it is run, not in the model: one
# family will do.
cases = pytest.mark.parametrize(
    ("way", "family"),
    [*((way, family) for way in WAYS for family in models.FAMILIES), ("NNsight hooks", "llama")],
)
TEXTS = ["the cat saw a dog", "once upon a time there was a big house", "sun"]


@functools.cache
def model_of(way: str, family: str) -> Any:
    if way == "bridge":
        return models.bridge(family, size=SIZE)
    if way == "huggingface":
        model = models.hf(family, size=SIZE)
        model.tokenizer = models.tokenizer()
        return model
    from nnsight import NNsight, TransformersModel

    if way.startswith("NNsight"):
        return NNsight(models.hf(family, size=SIZE))
    return TransformersModel(models.hf(family, size=SIZE), tokenizer=models.tokenizer())


@contextmanager
def steered(way: str, model: Any, plan: SteeringPlan, **options: Any) -> Iterator[None]:
    """Steering that is installed outside of the run; `apply` is called inside, see `run`."""
    if way.endswith("edit"):
        handle = plan.edit(model, **options)
        yield
        handle.remove()
    else:
        with nullcontext() if way.endswith("apply") else plan.hooks(model, **options):
            yield


def generated(
    way: str, model: Any, plan: SteeringPlan, rows: list[list[int]], *, cached: bool
) -> tuple[Tensor, Tensor]:
    """New tokens and their log-probabilities; rows of unequal length are padded on the left."""
    ids, mask = padded(rows, "left")
    options = {
        "input_ids": ids,
        "attention_mask": mask,
        "use_cache": cached,
        **models.greedy(N_NEW),
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with steered(way, model, plan):
        if way.endswith("apply"):
            with model.generate(**options) as tracer:
                plan.apply(model)
                out = tracer.result.save()
        elif way.startswith("NNsight"):
            out = model.trace(**options, fn="generate", trace=False)
        else:
            out = model.generate(**options)
    return out.sequences[:, -N_NEW:], torch.stack(out.logits, dim=1).log_softmax(-1)


def one_pass(
    way: str, model: Any, plan: SteeringPlan, lengths: list[int] | None = None, **options: Any
) -> Any:
    """The output of one pass of the model."""
    with torch.no_grad():
        if not way.startswith(("nnsight", "NNsight")):
            return model(**options)
        with model.trace(**options):
            if way.endswith("apply"):
                plan.apply(model, prompt_lengths=lengths)
            out = model.output.save()
        return out


def places_of(mask: Tensor) -> Tensor:
    """Position ids by hand: plain models do not place padded tokens by themselves."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@cases
@pytest.mark.parametrize("rule", RULES)
def test_steered_generation_is_the_reference(way: str, family: str, rule: str) -> None:
    model, expected, plan = (
        model_of(way, family),
        reference(family, rule),
        plan_for(family, RULES[rule][0]),
    )
    for cached in (True, False):
        check(*generated(way, model, plan, prompt_ids(), cached=cached), expected)
        if not way.endswith("edit"):  # an edit lives inside nnsight and reports nothing
            assert plan.last_run is not None
            assert plan.last_run.n_edited == n_edited(expected, cached=cached)
        check(
            *generated(way, model, plan, prompt_ids()[-1:], cached=cached), expected[-1:]
        )  # one token


@cases
@pytest.mark.parametrize("rule", RULES)
def test_steered_scores_of_padded_completions_are_the_reference(
    way: str, family: str, rule: str
) -> None:
    model, expected, plan = (
        model_of(way, family),
        reference(family, rule),
        plan_for(family, RULES[rule][0]),
    )
    rows = [ids + want.tokens[:-1] for ids, want in zip(prompt_ids(), expected, strict=True)]
    lengths = [len(ids) for ids in prompt_ids()]
    for side in ("right", "left"):
        ids, mask = padded(rows, side)
        with steered(way, model, plan, prompt_lengths=lengths):
            options = {"input_ids": ids, "attention_mask": mask, "position_ids": places_of(mask)}
            logits = one_pass(way, model, plan, lengths, **options).logits
        for i, want in enumerate(expected):
            found = logits[i][mask[i].bool()].log_softmax(-1)
            torch.testing.assert_close(found[lengths[i] - 1 :], want.rows, **CLOSE)


@pytest.mark.parametrize(
    "way", ["huggingface", "nnsight hooks"]
)  # apply and edit begin anew with every run
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("rule", RULES)
def test_a_loop_of_ones_own_over_a_cache_is_the_reference_padded_on_either_side(
    way: str, family: str, rule: str
) -> None:
    """Greedy decoding by hand; padded on the right, the padding lies between the prompt and what is
    generated."""
    from transformers import DynamicCache

    model, expected, plan = (
        model_of(way, family),
        reference(family, rule),
        plan_for(family, RULES[rule][0]),
    )
    for side in ("left", "right"):
        new, mask = padded(prompt_ids(), side)
        last = (
            mask.shape[1] - 1 - mask.flip(1).argmax(1)
        )  # the column of each row's last real token
        cache, tokens, rows = (
            DynamicCache(config=as_host(model_of("huggingface", family)).model.config),
            [],
            [],
        )
        with plan.hooks(model) as report:
            for _ in range(N_NEW):
                options = {"past_key_values": cache, "use_cache": True, "attention_mask": mask}
                out = one_pass(
                    way,
                    model,
                    plan,
                    input_ids=new,
                    position_ids=places_of(mask)[:, -new.shape[1] :],
                    **options,
                )
                rows.append(out.logits[torch.arange(len(last)), last].log_softmax(-1))
                new, last = rows[-1].argmax(-1, keepdim=True), torch.zeros_like(last)
                tokens.append(new)
                mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        check(torch.cat(tokens, dim=1), torch.stack(rows, dim=1), expected)
        assert report.n_edited == n_edited(expected, cached=True)


@families
@pytest.mark.parametrize("kind", KINDS)
def test_captured_activations_are_equal_on_every_host(kind: str, family: str) -> None:
    names = [f"blocks.{i}.{kind}" for i in range(models.N_LAYERS)]
    want = capture(model_of("bridge", family), TEXTS, names, positions="all", batch_size=2)
    for way in ("huggingface", "nnsight hooks"):
        found = capture(model_of(way, family), TEXTS, names, positions="all", batch_size=2)
        assert found.provenance["basis"] == want.provenance["basis"]
        for name in names:
            torch.testing.assert_close(found[name], want[name], atol=2e-5, rtol=0)


@families
def test_the_fingerprint_is_that_of_the_weights_on_every_host(family: str) -> None:
    hosts = [as_host(model_of(way, family)) for way in ("bridge", "huggingface", "nnsight hooks")]
    assert [host.kind for host in hosts] == ["transformer_lens", "huggingface", "nnsight"]
    assert len({host.fingerprint for host in hosts}) == 1


@pytest.mark.parametrize("kind", KINDS)
@families
def test_steering_another_site_is_the_same_on_every_host(kind: str, family: str) -> None:
    vector = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(3))
    plan = SteeringPlan.from_vectors(
        {f"blocks.1.{kind}": vector}, coefficient=40.0, relative_to="unit", positions="generated"
    )
    tokens = {}
    for way in ("bridge", "huggingface", "nnsight hooks", "nnsight edit"):
        model = model_of(way, family)
        plain = as_host(model).generate_tokens(TEXTS, max_new_tokens=4, stop_at_eos=False)
        with steered(way, model, plan):
            tokens[way] = as_host(model).generate_tokens(TEXTS, max_new_tokens=4, stop_at_eos=False)
        assert tokens[way] != plain
    assert all(found == tokens["bridge"] for found in tokens.values())


@pytest.mark.parametrize(
    "edit", ["add", "add_relative", "add_contextual", "ablate", "clamp", "rescale"]
)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])  # one in the centred basis, one in the raw
def test_every_edit_that_travels_is_the_edit_that_stays(edit: str, keep: bool, family: str) -> None:
    """`plan.edit` says the mathematics of steering a second time; the two must be one."""
    generator = torch.Generator().manual_seed(4)
    vectors = {
        f"blocks.{i}.hook_resid_{side}": torch.randn(32, generator=generator)
        for i, side in ((0, "post"), (2, "pre"))
    }
    strength = 3.0 if edit in ("add", "clamp") else 0.8
    for sign in (strength, -strength):
        plan = SteeringPlan.from_vectors(
            vectors,
            coefficient=sign,
            relative_to="unit",
            edit=edit,
            preserve_norm=keep,
            positions=slice(1, None),
            parameters=dict.fromkeys(vectors, models.edit_parameters(edit)),
        )
        ids = {"input_ids": torch.tensor([prompt_ids()[1]])}
        model, plain = model_of("nnsight edit", family), model_of("huggingface", family)
        with torch.no_grad():
            with plan.hooks(plain):
                want = plain(**ids).logits
            with steered("nnsight edit", model, plan):
                found = model.trace(**ids, trace=False).logits
            assert (want - plain(**ids).logits).abs().max() > 0.1
        torch.testing.assert_close(found, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["huggingface", "nnsight hooks", "nnsight edit"])
def test_half_precision_models_are_captured_in_float32_and_steered_in_their_own(
    way: str, dtype: torch.dtype
) -> None:
    from nnsight import TransformersModel

    hf = models.hf("llama", dtype=dtype, size=SIZE)
    hf.tokenizer = models.tokenizer()
    model = hf if way == "huggingface" else TransformersModel(hf, tokenizer=models.tokenizer())
    store = capture(model, TEXTS)
    whole = capture(model_of("huggingface", "llama"), TEXTS)
    assert store["blocks.1.hook_resid_post"].dtype == torch.float32
    for name in store:
        assert torch.cosine_similarity(store[name], whole[name]).min() > 0.99
    plan, host = plan_for("llama", "all"), as_host(model)
    batch, seen = host.tokenize(TEXTS), []
    with host.intervene({HOOK: lambda x: seen.append(x.clone())}):
        before = host.forward(batch)
        with steered(way, model, plan), host.intervene({HOOK: lambda x: seen.append(x.clone())}):
            after = host.forward(batch)
    assert after.dtype == dtype
    assert not torch.equal(before, after)
    real = batch.attention_mask.bool()
    assert torch.equal(seen[-1][real], (seen[0] + plan.vectors[0].delta.to(dtype))[real])
    assert torch.equal(host.forward(batch), before)
