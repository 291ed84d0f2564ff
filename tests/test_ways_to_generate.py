"""Whatever `generate` does inside, and whoever calls it, the same tokens are steered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from test_ways_to_run import GREEDY, PROMPTS, alone, llama, plan_at, rules, run

from expertsteer_lens.errors import InterventionError
from expertsteer_lens.hosts import as_host

PROMPT = PROMPTS[0]
ROW = torch.tensor([PROMPT])


def assistant() -> Any:
    return models.hf("llama", seed=3, n_layers=1)


WAYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "an assistant": lambda model: {"assistant_model": assistant()},
    "itself as assistant": lambda model: {"assistant_model": model},
    "early exit": lambda model: {"assistant_early_exit": 2},
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "a static cache": lambda model: {"cache_implementation": "static"},
    "a prompt in chunks": lambda model: {"prefill_chunk_size": 2},
    "no cache": lambda model: {"use_cache": False},
    "embeddings": lambda model: {"inputs_embeds": model.get_input_embeddings()(ROW)},
}


@rules
@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_are_those_of_greedy_generation(way: str, rule: Any) -> None:
    model, plan = llama(), plan_at(rule)
    want = alone(model, plan)[0]
    with torch.no_grad():
        options = WAYS[way](model)
    ids = {} if "inputs_embeds" in options else {"input_ids": ROW}
    with plan.hooks(model):
        out = model.generate(**ids, attention_mask=torch.ones_like(ROW), **GREEDY, **options)
    assert out[0, -GREEDY["max_new_tokens"] :].tolist() == want


@rules
@pytest.mark.parametrize("around", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_whatever_becomes_of_gradients(rule: Any, around: Any) -> None:
    model, plan = llama(), plan_at(rule)
    want = alone(model, plan)[0]
    with plan.hooks(model), around():
        assert run(model, PROMPT) == want


@rules
def test_a_pipeline_generates_what_the_model_does(rule: Any) -> None:
    from transformers import pipeline

    model, plan = llama(), plan_at(rule)
    text = "the cat saw a dog"
    pipe = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    how = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    with plan.hooks(model):
        want = as_host(model).generate([text], max_new_tokens=6, prepend_bos=False)
        assert [pipe(text, **how)[0]["generated_text"]] == want
    assert pipe(text, **how)[0]["generated_text"] != want[0]


@rules
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True}], ids=str)
def test_every_sequence_that_is_returned_is_steered(rule: Any, how: dict[str, Any]) -> None:
    """Scored anew without a cache, from where the prompt is known to end."""
    model, plan, n = llama(), plan_at(rule), len(PROMPT)
    options = {**GREEDY, "num_return_sequences": 3, "return_dict_in_generate": True, **how}
    options |= {"output_scores": True, "length_penalty": 1.0}
    with plan.hooks(model):
        out = model.generate(
            ROW, attention_mask=torch.ones_like(ROW), output_logits=True, **options
        )
    assert out.sequences.shape == (3, n + 6)
    with plan.hooks(model, prompt_lengths=n), torch.no_grad():
        again = model(out.sequences, use_cache=False).logits[:, n - 1 : -1].log_softmax(-1)
    rows = torch.stack(out.logits, dim=1).log_softmax(-1)
    if "num_beams" not in how:
        torch.testing.assert_close(rows, again, atol=1e-4, rtol=0)
        return
    chosen = again.gather(-1, out.sequences[:, n:, None])[..., 0].sum(-1)
    torch.testing.assert_close(out.sequences_scores, chosen / 6, atol=1e-4, rtol=0)


@rules
@pytest.mark.parametrize("cached", [True, False])
def test_a_method_taken_from_the_model_before_the_block(rule: Any, cached: bool) -> None:
    model, plan = llama(), plan_at(rule)
    want, generate = alone(model, plan)[0], model.generate
    options = {"attention_mask": torch.ones_like(ROW), "use_cache": cached, **GREEDY}
    if isinstance(rule, str) and rule != "all":  # its first pass need not be the whole prompt
        with pytest.raises(InterventionError, match=r"call model\.generate inside the block"):
            with plan.hooks(model):
                generate(ROW, **options)
    else:
        with plan.hooks(model):
            assert generate(ROW, **options)[0, len(PROMPT) :].tolist() == want
    with plan.hooks(model, prompt_lengths=len(PROMPT)):
        assert generate(ROW, **options)[0, len(PROMPT) :].tolist() == want


TAKEN: dict[str, dict[str, Any]] = {
    "chunks": {"prefill_chunk_size": 4},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", TAKEN)
@pytest.mark.parametrize("rule", ["prompt", "last_prompt", "generated", -2], ids=str)
def test_a_taken_method_that_cuts_its_prompt_or_guesses_behind_it_is_refused(
    rule: Any, way: str
) -> None:
    model, plan = llama(), plan_at(rule)
    row = torch.tensor([PROMPT if way == "chunks" else [1, 5, 6, 7, 8, 9, 5, 6, 7]])
    generate = model.generate
    with (
        pytest.raises(InterventionError, match=r"call model\.generate inside the block"),
        plan.hooks(model),
    ):
        generate(row, attention_mask=torch.ones_like(row), **GREEDY, **TAKEN[way])


@rules
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}], ids=str)
@pytest.mark.parametrize("whose", ["adapter", "inner"])
def test_generate_of_what_the_steered_model_wraps(
    whose: str, options: dict[str, Any], rule: Any
) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, plan = get_peft_model(llama(), config).eval(), plan_at(rule)
    inner = model.base_model if whose == "adapter" else model.base_model.model
    with plan.hooks(inner.model if whose == "adapter" else inner):
        want = run(inner, PROMPT)
    with plan.hooks(model):
        assert run(inner, PROMPT, **options) == want


@rules
def test_autocast_steers_as_a_hook_by_hand_does(rule: Any) -> None:
    model, plan = llama(), plan_at(rule)
    delta, n = plan.vectors[0].delta, len(PROMPT)
    touched = {"all": slice(0, n), "prompt": slice(0, n), 2: slice(2, 3)}.get(rule, slice(n - 1, n))

    def add(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        out = output.clone()
        out[:, touched] += delta.to(out.dtype)
        return out

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with plan.hooks(model):
            found = model(ROW).logits
        handle = model.model.layers[1].register_forward_hook(add)
        want = model(ROW).logits
        handle.remove()
        assert torch.equal(found, want)
        assert not torch.equal(found, model(ROW).logits)


@rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_in_a_batch_is_half_precision_alone_up_to_rounding(
    rule: Any, dtype: torch.dtype
) -> None:
    """What the plan changes is the same in a padded batch, up to what batching changes by itself."""
    from reference import padded

    model, plan = models.hf("llama", dtype=dtype, size=0.15), plan_at(rule, size=12.0)
    prompts = [PROMPTS[0], PROMPTS[2]]
    ids, mask = padded(prompts, "left")

    @torch.no_grad()
    def last(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        places = (mask.cumsum(1) - 1).clamp(min=0)
        return model(ids, attention_mask=mask, position_ids=places).logits[:, -1].float()

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        single = [last(torch.tensor([p]), torch.ones(1, len(p), dtype=torch.long)) for p in prompts]
        return torch.cat(single), last(ids, mask)

    plain_single, plain_batch = both()
    with plan.hooks(model):
        single, batch = both()
    rounding = float((plain_batch - plain_single).abs().max())
    effect = float((single - plain_single).abs().max())
    eps = torch.finfo(dtype).eps * float(single.abs().max())
    assert float((batch - single).abs().max()) <= 4 * max(rounding, eps)
    assert effect > 10 * max(rounding, eps)


@rules
def test_a_quantised_cache_steers_as_a_hook_by_hand_does(rule: Any) -> None:
    pytest.importorskip("hqq", reason="a quantised cache needs a library for it, such as hqq")
    model, plan, n = llama(), plan_at(rule, size=30.0), len(PROMPT)
    delta, seen = plan.vectors[0].delta, [0]
    touched = {
        "all": lambda p: True,
        "prompt": lambda p: p < n,
        "last_prompt": lambda p: p == n - 1,
        "generated": lambda p: p >= n - 1,
        2: lambda p: p == 2,
    }[rule]

    def add(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        out, width = output.clone(), output.shape[1]
        for column in range(width):
            if touched(seen[0] + column):
                out[:, column] += delta
        seen[0] += width
        return out

    cache = {"backend": "hqq", "nbits": 4, "q_group_size": 16, "residual_length": 2}
    options = {"cache_implementation": "quantized", "cache_config": cache, "output_logits": True}

    def logits() -> torch.Tensor:
        out = model.generate(
            ROW,
            attention_mask=torch.ones_like(ROW),
            return_dict_in_generate=True,
            **options,
            **GREEDY,
        )
        return torch.stack(out.logits)

    with plan.hooks(model):
        found = logits()
    handle = model.model.layers[1].register_forward_hook(add)
    want = logits()
    handle.remove()
    assert torch.equal(found, want)
    assert not torch.equal(found, logits())
