"""The same tokens steered everywhere: every rule, cached and uncached, single and batched, on every TransformerLens class.

The reference is slow and obvious: a plain Hugging Face model of the same weights, no cache, one prompt at a time, and a torch
hook that adds the vector at a list of positions written out by hand.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import models
import pytest
import torch
from torch import Tensor

from expertsteer_lens.hosts import as_host
from expertsteer_lens.plan import SteeringPlan

PROMPTS = ["the cat saw a dog", "once upon a time there was a big house", "sun"]
N_NEW = 3
HOOK = "blocks.1.hook_resid_post"
RULES: dict[str, tuple[Any, Any]] = {
    "all": ("all", lambda p, n: True),
    "prompt": ("prompt", lambda p, n: p < n),
    "last_prompt": ("last_prompt", lambda p, n: p == n - 1),
    "generated": ("generated", lambda p, n: p >= n - 1),
    "int": (1, lambda p, n: p == 1),
    "slice": (slice(1, None, 2), lambda p, n: p % 2 == 1),
    "list": ([0, -1], lambda p, n: p in (0, n - 1)),
    "mask function": (lambda mask: mask.cumsum(1) % 3 == 2, lambda p, n: p % 3 == 1),
}
HOSTS = {
    "bridge": lambda family: models.bridge(family),
    "bridge compat": lambda family: models.bridge(family, compat=True),
    "hooked": lambda family: models.hooked(family),
    "hooked raw": lambda family: models.hooked(family, processed=False),
}


@functools.cache
def model_of(host: str, family: str) -> Any:
    if host.startswith("hooked") and not models.has_hooked_transformer():
        pytest.skip("HookedTransformer left TransformerLens in 4.0; this runs in the environment with 3.9")
    return HOSTS[host](family)


@functools.cache
def vector(family: str) -> Tensor:
    found = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(5))
    if family in ("gpt2", "neox"):  # their output ignores the mean
        found = found - found.mean()
    return 6.0 * found / found.norm()


def plan_for(family: str, rule: Any) -> SteeringPlan:
    v = vector(family)
    return SteeringPlan.from_vectors({HOOK: v}, coefficient=float(v.norm()), relative_to="unit", positions=rule)


@functools.cache
def prompt_ids() -> list[list[int]]:
    tokenizer = models.tokenizer()
    return [[1, *tokenizer(p, add_special_tokens=False)["input_ids"]] for p in PROMPTS]


@functools.cache
def reference(family: str, rule: str) -> list[tuple[list[int], Tensor]]:
    """For each prompt: the greedy tokens, and the log-probabilities that chose them, `[N_NEW, vocab]`."""
    hf = models.hf(family)
    inner = hf.base_model
    layer = getattr(inner, "h", None) or inner.layers
    obvious = RULES[rule][1]
    out = []
    for ids in prompt_ids():
        tokens, rows = list(ids), []
        for _ in range(N_NEW):
            touched = [p for p in range(len(tokens)) if obvious(p, len(ids))]

            def hook(_: Any, __: Any, output: Any, touched: list[int] = touched) -> Any:
                value = (output[0] if isinstance(output, tuple) else output).clone()
                for p in touched:
                    value[0, p] += vector(family)
                return (value, *output[1:]) if isinstance(output, tuple) else value

            handle = layer[1].register_forward_hook(hook)
            with torch.no_grad():
                logits = hf(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            handle.remove()
            rows.append(logits.log_softmax(-1))
            tokens.append(int(logits.argmax()))
        out.append((tokens[len(ids) :], torch.stack(rows)))
    return out


def generated(model: Any, prompts: Any, *, cached: bool) -> tuple[Tensor, Tensor]:
    """New tokens `[batch, N_NEW]` and log-probabilities `[batch, N_NEW, vocab]` of the host's own generate."""
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
CLOSE = {"atol": 1e-4, "rtol": 0.0}  # ten times the drift between these hosts without any steering


@cases
@rules
def test_generation_is_the_reference_cached_or_not_single_or_batched(host: str, family: str, rule: str) -> None:
    model, expected = model_of(host, family), reference(family, rule)
    plan = plan_for(family, RULES[rule][0])
    for cached in (True, False):
        with plan.hooks(model):
            tokens, rows = generated(model, PROMPTS, cached=cached)  # the host pads on the left
        for i, (want_tokens, want_rows) in enumerate(expected):
            torch.testing.assert_close(rows[i], want_rows, **CLOSE)
            assert tokens[i].tolist() == want_tokens
        with plan.hooks(model):  # several calls in a row, the last of a one-token prompt
            for i, ids in enumerate(prompt_ids()):
                tokens, rows = generated(model, torch.tensor([ids]), cached=cached)
                torch.testing.assert_close(rows[0], expected[i][1], **CLOSE)
                assert tokens[0].tolist() == expected[i][0]


@cases
@rules
def test_scoring_padded_completions_is_the_reference(host: str, family: str, rule: str) -> None:
    """Prompt and completion in one pass with `prompt_lengths`, padded on the right, and on the left with a mask."""
    model, expected = model_of(host, family), reference(family, rule)
    rows = [ids + want[0][:-1] for ids, want in zip(prompt_ids(), expected, strict=True)]
    width = max(map(len, rows))
    lengths = [len(ids) for ids in prompt_ids()]
    for side in ("right", "left"):
        ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[i, where], mask[i, where] = torch.tensor(row), 1
        with plan_for(family, RULES[rule][0]).hooks(model, prompt_lengths=lengths), torch.no_grad():
            logits = model(ids, attention_mask=mask, return_type="logits")
        for i, (_, want) in enumerate(expected):
            real = logits[i][mask[i].bool()].log_softmax(-1)
            torch.testing.assert_close(real[lengths[i] - 1 :], want, **CLOSE)


@cases
def test_unsteered_hosts_agree_with_the_reference_so_the_tolerance_means_something(host: str, family: str) -> None:
    model = model_of(host, family)
    ids = torch.tensor([prompt_ids()[1]])
    with torch.no_grad():
        plain = models.hf(family)(ids).logits.log_softmax(-1)
        drift = (model(ids, return_type="logits").log_softmax(-1) - plain).abs().max()
        with plan_for(family, "last_prompt").hooks(model):
            effect = (model(ids, return_type="logits").log_softmax(-1) - plain)[0, -1].abs().max()
    assert drift < 1e-5
    assert effect > 0.1


@pytest.mark.parametrize("host", HOSTS)
def test_a_plain_list_of_hooks_selects_the_same_tokens_for_scoring(host: str) -> None:
    model, expected = model_of(host, "llama"), reference("llama", "generated")
    ids = prompt_ids()[1]
    plan = plan_for("llama", "generated")
    row = torch.tensor([ids + expected[1][0][:-1]])
    with torch.no_grad():
        logits = model.run_with_hooks(row, fwd_hooks=plan.fwd_hooks(model, prompt_lengths=len(ids)))
    torch.testing.assert_close(logits[0].log_softmax(-1)[len(ids) - 1 :], expected[1][1], **CLOSE)


@pytest.mark.parametrize("host", HOSTS)
def test_a_plain_list_of_hooks_follows_cached_generation(host: str) -> None:
    model, expected = model_of(host, "gpt2"), reference("gpt2", "generated")
    with model.hooks(fwd_hooks=plan_for("gpt2", "generated").fwd_hooks(model)):
        tokens, rows = generated(model, torch.tensor([prompt_ids()[0]]), cached=True)
    torch.testing.assert_close(rows[0], expected[0][1], **CLOSE)
    assert tokens[0].tolist() == expected[0][0]


def test_the_extra_pass_of_return_cache_is_steered_like_the_generation() -> None:
    model = model_of("bridge", "gpt2")
    ids = torch.tensor([prompt_ids()[0]])
    plan = plan_for("gpt2", "generated")
    last = f"blocks.{models.N_LAYERS - 1}.hook_resid_post"
    with plan.hooks(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens, cache = model.generate(
            ids, max_new_tokens=N_NEW, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens",
            return_cache=True, names_filter=last,
        )  # fmt: skip
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
        [c.reshape(1, -1) for c in m.generate_stream(ids, use_past_kv_cache=cached, verbose=False, **OURS)], dim=1
    ),
}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate_with_a_bridge_is_noticed(way: str, cached: bool) -> None:
    model, expected = model_of("bridge", "llama"), reference("llama", "generated")
    with plan_for("llama", "generated").hooks(model) as report, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = WAYS[way](model, torch.tensor([prompt_ids()[1]]), cached)
    assert tokens[0, -N_NEW:].tolist() == expected[1][0]
    assert report.n_forwards == N_NEW
    assert "generate" not in model.original_model.__dict__
