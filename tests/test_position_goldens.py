"""The same tokens steered everywhere: every rule, cached and uncached, single and batched, on every
TransformerLens class.

nnsight and plain Hugging Face are held to the same reference in `test_host_parity`.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import models
import pytest
import torch
from reference import (
    CLOSE,
    N_NEW,
    PROMPTS,
    RULES,
    SIZE,
    check,
    n_edited,
    padded,
    plain,
    plan_for,
    prompt_ids,
    reference,
)
from torch import Tensor

from expertsteer_lens.hosts import as_host

HOSTS = ("bridge", "bridge compat", "hooked", "hooked raw")


@functools.cache
def model_of(host: str, family: str) -> Any:
    return models.on_host(host, family, size=SIZE)


def generated(model: Any, prompts: Any, *, cached: bool) -> tuple[Tensor, Tensor]:
    """New tokens `[batch, N_NEW]` and log-probabilities `[batch, N_NEW, vocab]` of the host's own
    generate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            prompts,
            max_new_tokens=N_NEW,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=cached,
            prepend_bos=True,
            verbose=False,
            return_type="tokens",
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[:, -N_NEW:], torch.stack(out.logits, dim=1).log_softmax(-1)


CASES = [(host, family) for host in HOSTS for family in models.FAMILIES]
cases = pytest.mark.parametrize(("host", "family"), CASES)
rules = pytest.mark.parametrize("rule", RULES)


@cases
@rules
def test_generation_is_the_reference_cached_or_not_single_or_batched(
    host: str, family: str, rule: str
) -> None:
    model, expected = model_of(host, family), reference(family, rule)
    plan = plan_for(family, RULES[rule][0])
    for cached in (True, False):
        with plan.hooks(model) as report:
            check(*generated(model, PROMPTS, cached=cached), expected)  # the host pads on the left
        assert report.n_edited == n_edited(expected, cached=cached)
        with plan.hooks(model) as report:  # several calls in a row, the last of a one-token prompt
            for ids, want in zip(prompt_ids(), expected, strict=True):
                check(*generated(model, torch.tensor([ids]), cached=cached), [want])
        assert report.n_edited == n_edited(expected, cached=cached)
        assert plan.last_run is report


@cases
@rules
def test_scoring_padded_completions_is_the_reference(host: str, family: str, rule: str) -> None:
    """Prompt and completion in one pass with `prompt_lengths`, padded on the right, and on the left
    with a mask."""
    model, expected = model_of(host, family), reference(family, rule)
    rows = [ids + want.tokens[:-1] for ids, want in zip(prompt_ids(), expected, strict=True)]
    lengths = [len(ids) for ids in prompt_ids()]
    for side in ("right", "left"):
        ids, mask = padded(rows, side)
        with (
            plan_for(family, RULES[rule][0]).hooks(model, prompt_lengths=lengths) as report,
            torch.no_grad(),
        ):
            logits = model(ids, attention_mask=mask, return_type="logits")
        for i, want in enumerate(expected):
            real = logits[i][mask[i].bool()].log_softmax(-1)
            torch.testing.assert_close(real[lengths[i] - 1 :], want.rows, **CLOSE)
        assert report.n_edited == n_edited(expected, cached=True)


@cases
def test_unsteered_hosts_agree_with_the_reference_so_the_tolerance_means_something(
    host: str, family: str
) -> None:
    model = model_of(host, family)
    ids = torch.tensor([prompt_ids()[1]])
    with torch.no_grad():
        exact = plain(family)(ids).logits.log_softmax(-1)
        drift = (model(ids, return_type="logits").log_softmax(-1) - exact).abs().max()
        with plan_for(family, "last_prompt").hooks(model):
            effect = (model(ids, return_type="logits").log_softmax(-1) - exact)[0, -1].abs().max()
    assert drift < 4e-6
    assert effect > 0.1


@pytest.mark.parametrize("rule", ["generated", "list", "mask function"])
@pytest.mark.parametrize("host", ["hooked", "hooked raw"])
def test_a_loop_of_ones_own_over_a_cache_is_the_reference(host: str, rule: str) -> None:
    model, expected = model_of(host, "llama"), reference("llama", rule)
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache as Cache

    with plan_for("llama", RULES[rule][0]).hooks(model), torch.no_grad():
        for ids, want in zip(prompt_ids(), expected, strict=True):
            cache = Cache.init_cache(model.cfg, "cpu", 1)
            new, tokens, rows = torch.tensor([ids]), [], []
            for _ in range(N_NEW):
                rows.append(
                    model(new, past_kv_cache=cache, return_type="logits")[0, -1].log_softmax(-1)
                )
                new = rows[-1].argmax()[None, None]
                tokens.append(int(new))
            check(torch.tensor([tokens]), torch.stack(rows)[None], [want])


@pytest.mark.parametrize("host", HOSTS)
def test_a_plain_list_of_hooks_selects_the_same_tokens_for_scoring(host: str) -> None:
    model, expected = model_of(host, "llama"), reference("llama", "generated")
    ids = prompt_ids()[1]
    plan = plan_for("llama", "generated")
    row = torch.tensor([ids + expected[1].tokens[:-1]])
    with torch.no_grad():
        logits = model.run_with_hooks(row, fwd_hooks=plan.fwd_hooks(model, prompt_lengths=len(ids)))
    torch.testing.assert_close(logits[0].log_softmax(-1)[len(ids) - 1 :], expected[1].rows, **CLOSE)


@pytest.mark.parametrize("host", HOSTS)
def test_a_plain_list_of_hooks_follows_cached_generation(host: str) -> None:
    model, expected = model_of(host, "gpt2"), reference("gpt2", "generated")
    with model.hooks(fwd_hooks=plan_for("gpt2", "generated").fwd_hooks(model)):
        check(*generated(model, torch.tensor([prompt_ids()[0]]), cached=True), expected[:1])


def test_the_extra_pass_of_return_cache_is_steered_like_the_generation() -> None:
    model = model_of("bridge", "gpt2")
    ids = torch.tensor([prompt_ids()[0]])
    plan = plan_for("gpt2", "generated")
    last = f"blocks.{models.N_LAYERS - 1}.hook_resid_post"
    with plan.hooks(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens, cache = model.generate(
            ids,
            max_new_tokens=N_NEW,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            return_type="tokens",
            return_cache=True,
            names_filter=last,
        )
    with plan.hooks(model, prompt_lengths=ids.shape[1]), torch.no_grad():
        seen: list[Tensor] = []
        with as_host(model).intervene({last: lambda x: seen.append(x.clone())}):
            model(tokens, return_type="logits")
    torch.testing.assert_close(cache[last], seen[0], atol=1e-5, rtol=0)


GREEDY = {"max_new_tokens": N_NEW, "do_sample": False}
OURS = {**GREEDY, "stop_at_eos": False, "return_type": "tokens"}
WAYS: dict[str, Any] = {
    "hf_generate": lambda m, ids, cached: m.hf_generate(ids, use_past_kv_cache=cached, **OURS),
    "the model inside": lambda m, ids, cached: m.original_model.generate(
        ids, use_cache=cached, eos_token_id=95, **GREEDY
    ),
    "generate_stream": lambda m, ids, cached: torch.cat(
        [
            c.reshape(1, -1)
            for c in m.generate_stream(ids, use_past_kv_cache=cached, verbose=False, **OURS)
        ],
        dim=1,
    ),
}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate_with_a_bridge_is_noticed(way: str, cached: bool) -> None:
    model, expected = model_of("bridge", "llama"), reference("llama", "generated")
    with plan_for("llama", "generated").hooks(model) as report, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = WAYS[way](model, torch.tensor([prompt_ids()[1]]), cached)
    assert tokens[0, -N_NEW:].tolist() == expected[1].tokens
    assert report.n_forwards == N_NEW
    assert "generate" not in model.original_model.__dict__
