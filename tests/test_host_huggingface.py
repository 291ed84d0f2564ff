"""Plain Hugging Face models: every shape of block, every way to generate, and what is refused.

The families, rules and paddings of the golden matrix are in `test_host_parity`.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
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
    vector,
)
from torch import Tensor, nn

from expertsteer_lens.errors import (
    ArgumentError,
    DataError,
    HookNameError,
    HostError,
    InterventionError,
)
from expertsteer_lens.hosts import as_host, capture
from expertsteer_lens.hosts.loading import load_model, wrap_model
from expertsteer_lens.steer.plan import SteeringPlan
from expertsteer_lens.steer.run import PlanRun
from expertsteer_lens.steer.vector import SteeringVector

TEXTS = ["the cat saw a dog", "once upon a time there was a big house", "sun"]
GENERATE = models.greedy(N_NEW)
LOGITS = {"output_logits": True, "return_dict_in_generate": True}
SMALL = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NARROW = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
WIDE = {**NARROW, "intermediate_size": 48, "max_position_embeddings": 64}
OTHERS: dict[
    str, Callable[[Any], Any]
] = {  # families that differ in what a block returns, where it is, or what it caches
    "bloom": lambda tf: tf.BloomConfig(hidden_size=32, n_layer=3, n_head=2, **SMALL),
    "falcon": lambda tf: tf.FalconConfig(**NARROW, **SMALL),
    "opt": lambda tf: tf.OPTConfig(
        ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32, **NARROW, **SMALL
    ),
    "mistral": lambda tf: tf.MistralConfig(
        num_key_value_heads=1, sliding_window=4, **WIDE, **SMALL
    ),
    "mixtral": lambda tf: tf.MixtralConfig(
        num_key_value_heads=1, num_local_experts=2, **WIDE, **SMALL
    ),
    "gemma3": lambda tf: tf.Gemma3TextConfig(
        num_key_value_heads=1, head_dim=16, sliding_window=4, **WIDE, **SMALL
    ),
    "mamba": lambda tf: tf.MambaConfig(hidden_size=32, num_hidden_layers=3, state_size=4, **SMALL),
}


@functools.cache
def model_of(family: str) -> Any:
    if family in models.FAMILIES:
        model = models.hf(family, size=SIZE)
    else:
        import transformers

        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(OTHERS[family](transformers)).eval()
        for parameter in model.parameters():
            parameter.data += SIZE * torch.randn_like(parameter)
    model.tokenizer = models.tokenizer()
    return model


@contextmanager
def by_hand(
    model: Any, n_prompt: list[int], obvious: Callable[[int, int], bool], v: Tensor
) -> Iterator[None]:
    """The reference for passes without a cache: row i has `n_prompt[i]` prompt tokens, its padding
    is on the left."""
    width = max(n_prompt)

    def hook(_: Any, __: Any, output: Any) -> Any:
        value = (output[0] if isinstance(output, tuple) else output).clone()
        repeats = value.shape[0] // len(n_prompt)
        for row in range(value.shape[0]):
            n = n_prompt[row // repeats]
            for column in range(width - n, value.shape[1]):
                if obvious(column - (width - n), n):
                    value[row, column] += v
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = model.get_submodule(as_host(model).blocks.layers[1]).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# -- blocks ---------------------------------------------------------------------------------------


def test_blocks_return_tensors_or_tuples_and_the_test_sees_both() -> None:
    seen = {}
    for family in OTHERS:
        model, kinds = model_of(family), set()
        block = model.get_submodule(as_host(model).blocks.layers[1])
        handle = block.register_forward_hook(
            lambda _, __, output, kinds=kinds: kinds.add(type(output))
        )
        model(torch.tensor([[1, 4]]))
        handle.remove()
        seen[family] = kinds
    assert seen["bloom"] == seen["falcon"] == {tuple}
    assert seen["opt"] == seen["gemma3"] == {Tensor}


@pytest.mark.parametrize(
    "family", [f for f in OTHERS if f != "mamba"]
)  # its hidden_states are not its residuals
def test_what_is_captured_is_what_the_model_calls_its_hidden_states(family: str) -> None:
    model = model_of(family)
    host = as_host(model)
    batch = host.tokenize(TEXTS)
    mask = batch.attention_mask.bool()
    with torch.no_grad():
        states = model(
            batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states
    store = capture(model, TEXTS, positions="all", batch_size=3)
    for i in range(host.n_layers - 1):  # the last of hidden_states is behind the final norm
        want = states[i + 1][mask]
        want = want - want.mean(-1, keepdim=True) if host.basis == "centred" else want
        torch.testing.assert_close(store[f"blocks.{i}.hook_resid_post"], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", ["generated", "last_prompt", "int", "list"])
@pytest.mark.parametrize("family", OTHERS)
def test_families_of_every_kind_are_steered_at_the_same_tokens_cached_or_not(
    family: str, rule: str
) -> None:
    model, v = model_of(family), vector("gpt2")
    plan = plan_for("gpt2", RULES[rule][0])
    ids = torch.tensor([prompt_ids()[0]])
    with by_hand(model, [ids.shape[1]], RULES[rule][1], v), torch.no_grad():
        want = model.generate(ids, use_cache=False, **GENERATE, **LOGITS)
    for cached in (True, False):
        with plan.hooks(model):
            found = model.generate(ids, use_cache=cached, **GENERATE, **LOGITS)
        torch.testing.assert_close(
            torch.stack(found.logits), torch.stack(want.logits), atol=1e-5, rtol=0
        )
        assert torch.equal(found.sequences, want.sequences)


def test_attention_and_mlp_outputs_that_do_not_add_up_are_refused() -> None:
    model = models.hf("llama")
    assert as_host(model).check_hook_names(["blocks.1.hook_mlp_out"])
    model = models.hf("llama")
    forward = type(model.model.layers[0]).forward

    def halved(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return 0.5 * forward(self, *args, **kwargs)

    for layer in model.model.layers:
        layer.forward = halved.__get__(layer)
    with pytest.raises(
        HookNameError, match="do not add up to what the block adds to the residual stream"
    ):
        as_host(model).check_hook_names(["blocks.1.hook_mlp_out"])
    assert as_host(model).check_hook_names([HOOK]) == [HOOK]


# -- ways to generate -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_beam_search_steers_every_beam_at_its_own_tokens(family: str, rule: str) -> None:
    """Reference: beams searched without a cache, edited at columns counted by hand."""
    model = model_of(family)
    ids, mask = padded(prompt_ids(), "left")
    options = {
        "attention_mask": mask,
        "num_beams": 3,
        "num_return_sequences": 2,
        "output_scores": True,
        **GENERATE,
    }
    options |= {"return_dict_in_generate": True}
    lengths = [len(row) for row in prompt_ids()]
    plain = model.generate(ids, **options)
    with by_hand(model, lengths, RULES[rule][1], vector(family)):
        want = model.generate(ids, use_cache=False, **options)
    for cached in (True, False):
        with plan_for(family, RULES[rule][0]).hooks(model):
            found = model.generate(ids, use_cache=cached, **options)
        assert torch.equal(found.sequences, want.sequences)
        torch.testing.assert_close(found.sequences_scores, want.sequences_scores, **CLOSE)
    assert (plain.sequences_scores - want.sequences_scores).abs().max() > 1e-3


ONE = {"use_cache": True}
WAYS: dict[str, tuple[bool, dict[str, Any]]] = {  # may the batch be padded, and options
    "the prompt in chunks": (True, {"prefill_chunk_size": 2, **ONE}),
    "a static cache": (True, {"cache_implementation": "static", "disable_compile": True, **ONE}),
    "guesses from the prompt": (False, {"prompt_lookup_num_tokens": 2, **ONE}),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate_whose_first_pass_is_not_the_prompt(way: str, rule: str) -> None:
    model, expected = model_of("llama"), reference("llama", rule)
    batched, options = WAYS[way]
    groups = [list(range(len(expected)))] if batched else []
    for group in groups + [[i] for i in range(len(expected))]:
        ids, mask = padded([prompt_ids()[i] for i in group], "left")
        with plan_for("llama", RULES[rule][0]).hooks(model):
            found = model.generate(ids, attention_mask=mask, **options, **GENERATE, **LOGITS)
        want = [expected[i] for i in group]
        rows = torch.stack(found.logits, dim=1)[:, :N_NEW].log_softmax(-1)
        check(found.sequences[:, -N_NEW:], rows, want)


def test_a_prompt_given_as_embeddings_and_samples_of_one_prompt() -> None:
    model, expected = model_of("llama"), reference("llama", "generated")
    plan = plan_for("llama", "generated")
    ids = torch.tensor([prompt_ids()[1]])
    with plan.hooks(model):
        found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GENERATE)
    assert found[0, -N_NEW:].tolist() == expected[1].tokens
    with plan.hooks(model) as report:
        model.generate(ids, **{**GENERATE, "do_sample": True, "num_return_sequences": 3})
    assert report.n_edited == {HOOK: 3 * n_edited(expected[1:2], cached=True)[HOOK]}


def test_a_conversation_on_one_cache() -> None:
    """The second prompt is the whole conversation, of which the cache holds all but the last
    words."""
    from transformers import DynamicCache

    model, plan = model_of("llama"), plan_for("llama", "last_prompt")
    first = torch.tensor([prompt_ids()[0]])
    with plan.hooks(model) as report:
        cache = DynamicCache(config=model.config)
        said = model.generate(first, past_key_values=cache, **GENERATE)
        second = torch.cat([said, torch.tensor([prompt_ids()[2]])], dim=1)
        found = model.generate(second, past_key_values=cache, **GENERATE)
    assert report.n_edited == {HOOK: 2}

    def obvious(p: int, n: int) -> bool:  # the cache remembers the first edit
        return p in (first.shape[1] - 1, second.shape[1] - 1)

    with by_hand(model, [second.shape[1]], obvious, vector("llama")):
        want = model.generate(second, use_cache=False, **GENERATE)
    assert torch.equal(found, want)


def test_generation_of_the_host_leaves_nothing_to_the_models_own_settings() -> None:
    model = models.hf("llama", size=SIZE)
    host = as_host(model, tokenizer=models.tokenizer())
    want = host.generate_tokens(TEXTS, max_new_tokens=4, stop_at_eos=False)
    model.generation_config.update(repetition_penalty=5.0, num_beams=2, do_sample=True, top_k=1)
    assert host.generate_tokens(TEXTS, max_new_tokens=4, stop_at_eos=False) == want


# -- what is refused ------------------------------------------------------------------------------


def test_the_host_says_what_it_is_and_why_and_what_it_looked_for() -> None:
    host = as_host(model_of("neox"))
    assert repr(host) == (
        "HuggingFaceHost('GPTNeoXForCausalLM', 3 layers, d_model=32): GPTNeoXForCausalLM, because "
        "it is a torch module with "
        "config and get_output_embeddings"
    )
    for thing in (nn.Linear(2, 2), "gpt2", None):
        with pytest.raises(
            HostError,
            match=r"no hook_dict and\s.*no nnsight model.*no config and get_output_embeddings",
        ):
            as_host(thing)


def test_models_without_a_head_without_blocks_and_with_an_encoder_are_refused() -> None:
    import transformers

    with pytest.raises(
        HostError,
        match="LlamaModel has no language-model head; load the model with AutoModelForCausalLM",
    ):
        as_host(models.hf("llama").model)
    seq2seq = transformers.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    with pytest.raises(HostError, match="is an encoder-decoder; only decoder-only"):
        as_host(transformers.T5ForConditionalGeneration(seq2seq))
    model = models.hf("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(HostError, match="no list of 7 blocks was found in LlamaForCausalLM"):
        as_host(model)


def test_a_missing_tokenizer_and_options_of_other_hosts_are_named() -> None:
    model = models.hf("llama")
    with pytest.raises(
        HostError, match=r"has no tokenizer; give it one: model.tokenizer = ..., or as_host"
    ):
        capture(model, TEXTS)
    assert as_host(model, tokenizer=models.tokenizer()).tokenize(["sun"]).lengths.tolist() == [2]
    assert capture(model, TEXTS).n == 3  # remembered
    with pytest.raises(
        ArgumentError, match="remote cannot be given for a LlamaForCausalLM; leave it out"
    ):
        as_host(model, remote=True)


@pytest.mark.parametrize("kind", ["huggingface", "transformer_lens", "nnsight"])
def test_a_token_added_beyond_the_embeddings_is_named(kind) -> None:
    from expertsteer_lens import zoo

    model = zoo.load("target", host=kind)
    tokenizer = as_host(model).tokenizer
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    capture(model, ["sun"])  # nothing is padded
    for texts in (["a", "a dog and a cat"], ["[PAD]"]):
        with pytest.raises(DataError, match=r"token 640 \('\[PAD\]'\).*resize_token_embeddings"):
            capture(model, texts)
    if kind == "huggingface":
        model.resize_token_embeddings(len(tokenizer))
        assert capture(model, ["a", "a dog and a cat"]).n == 2


def test_code_in_the_folder_of_a_model_is_not_run_unasked(tmp_path, monkeypatch) -> None:
    import transformers

    from expertsteer_lens import zoo

    shutil.copytree(zoo.model_path("target"), tmp_path / "model")
    folder, ran = tmp_path / "model", tmp_path / "ran"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a pipe might say
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder))
    with suppress(HostError):  # some versions read such a folder without its code
        capture(model.eval(), TEXTS)
    assert not ran.exists()

    load_model(str(folder), host="huggingface", device="cpu", trust_remote_code=True)
    assert ran.exists()


def test_a_tokenizer_that_is_loaded_again_for_a_bridge_runs_no_code_unasked(
    tmp_path, monkeypatch
) -> None:
    import transformers

    from expertsteer_lens import zoo

    folder = tmp_path / "model"
    shutil.copytree(zoo.model_path("target"), folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()"
    )
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    bridge = wrap_model(model, tokenizer, host="transformer_lens", name="target")
    assert capture(bridge, TEXTS).n == 3
    assert asked == []
    assert not (tmp_path / "ran").exists()
    assert "trust_remote_code" not in tokenizer.init_kwargs


def test_masks_that_hide_the_padding_and_padding_without_a_mask_are_refused() -> None:
    model, plan = model_of("llama"), plan_for("llama", "last_prompt")
    ids, _ = padded(prompt_ids()[:2], "left")
    hidden = torch.zeros(2, 1, ids.shape[1], ids.shape[1])
    with pytest.raises(
        DataError, match="the mask given does not say which tokens of the batch are padding"
    ):
        with plan.hooks(model):
            model(ids, attention_mask=hidden)
    with plan.hooks(model):
        model(ids[1:], attention_mask=hidden[1:])  # a row by itself has no padding
    for options in ({}, {"prompt_lengths": [6, 10]}):
        with pytest.raises(DataError, match="seems to be padded"):
            with plan.hooks(model, **options):
                model(ids)
    right, _ = padded(prompt_ids()[:2], "right")
    with plan.hooks(model, prompt_lengths=[6, 10]) as report:
        model(right)  # the padding is past all that matters
    assert report.n_edited == {HOOK: 2}


def test_a_part_of_the_model_run_by_itself_cannot_be_followed() -> None:
    model, x = model_of("llama"), torch.zeros(1, 4, 32)
    rotary = model.model.rotary_emb(x, torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(
        InterventionError, match="fired in no pass of 'LlamaForCausalLM' that could be followed"
    ):
        with plan_for("llama", "last_prompt").hooks(model):
            model.model.layers[1](x, position_embeddings=rotary)


def test_a_recurrent_cache_filled_before_steering_is_refused() -> None:
    model = model_of("mamba")
    ids = torch.tensor([prompt_ids()[0]])
    with torch.no_grad():
        state = model(ids, use_cache=True).cache_params
    with pytest.raises(InterventionError, match="does not say how many tokens it holds"):
        with plan_for("gpt2", "generated").hooks(model), torch.no_grad():
            model(ids[:, -1:], cache_params=state, use_cache=True)


def test_torch_hooks_of_the_user_stay_and_see_the_steered_stream_if_they_came_later() -> None:
    model, seen = models.hf("llama", size=SIZE), []
    model.tokenizer = models.tokenizer()
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda _, __, out: seen.append(("before", out.clone())))
    with plan_for("llama", "all").hooks(model), torch.no_grad():
        layer.register_forward_hook(lambda _, __, out: seen.append(("after", out.clone())))
        model(torch.tensor([prompt_ids()[0]]))
    assert [name for name, _ in seen] == ["before", "after"]
    torch.testing.assert_close(
        seen[1][1] - seen[0][1], vector("llama").expand_as(seen[0][1]), atol=1e-5, rtol=0
    )
    assert len(layer._forward_hooks) == 2


def test_two_plans_on_one_model_add_up() -> None:
    model = model_of("llama")
    ids = torch.tensor([prompt_ids()[0]])
    one = plan_for("llama", "all")
    both = SteeringPlan(vectors=one.vectors + one.vectors, positions="all")
    with torch.no_grad():
        with both.hooks(model):
            want = model(ids).logits
        with one.hooks(model), one.hooks(model):
            assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@torch.no_grad()
def test_a_model_with_adapters_is_read_and_steered_as_the_merged_one(kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = {
        "lora": lambda: peft.LoraConfig(
            target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        ),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
            task_type="CAUSAL_LM",
        ),
    }[kind]()
    adapted = peft.get_peft_model(models.hf("llama"), config).eval()
    ids = torch.tensor([[1, 4, 7, 19, 6]])
    plain = adapted(input_ids=ids).logits
    name = "blocks.1.hook_resid_post"
    v = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(0))
    plan = SteeringPlan.from_vectors(
        {name: v}, coefficient=4.0, relative_to="unit", positions="last_prompt"
    )
    with plan.hooks(adapted) as report:
        steered = adapted(input_ids=ids).logits
    states = capture(as_host(adapted, tokenizer=models.tokenizer()), ["the cat saw a dog"])
    merged = adapted.merge_and_unload().eval()
    torch.testing.assert_close(merged(input_ids=ids).logits, plain, atol=1e-4, rtol=1e-4)
    with plan.hooks(merged):
        torch.testing.assert_close(merged(input_ids=ids).logits, steered, atol=1e-4, rtol=1e-4)
    assert (steered - plain).abs().max() > 0.1
    assert report.n_edited == {name: 1}
    again = capture(as_host(merged, tokenizer=models.tokenizer()), ["the cat saw a dog"])
    assert all(torch.allclose(states[n], again[n], atol=1e-4) for n in states)
    base = capture(as_host(models.hf("llama"), tokenizer=models.tokenizer()), ["the cat saw a dog"])
    assert not torch.allclose(states[name], base[name], atol=1e-2)


@torch.no_grad()
def test_the_short_way_of_plain_additions_is_the_long_way_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where every token is edited, plain additions skip the general function; where padding is left
    out, they must not."""
    model, draw = models.hf("llama"), torch.Generator().manual_seed(0)
    names = [
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
        "blocks.1.hook_resid_post",
        "blocks.2.hook_resid_pre",
    ]
    vectors = []
    for name, coefficient in zip(names, (1.0, 2.0, -3.0, 0.0), strict=True):
        v = torch.randn(models.D_MODEL, generator=draw)
        vectors.append(SteeringVector(name, v / v.norm(), coefficient, relative_to="unit"))
    plan = SteeringPlan(vectors=tuple(vectors))
    ids, mask = padded(prompt_ids()[:3], "left")
    for batch in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1, -4:]}):
        found = []
        for long in (False, True):
            if long:
                monkeypatch.setattr(PlanRun, "_fastest", PlanRun._function)
            with plan.hooks(model) as report:
                found.append(
                    (
                        model(**batch).logits,
                        report.n_fired,
                        report.n_selected,
                        report.n_edited,
                        report.n_forwards,
                    )
                )
            with plan.hooks(model) as report:  # and step by step
                model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
            found[-1] += (report.n_fired, report.n_selected, report.n_edited)
        assert torch.equal(found[0][0], found[1][0])
        assert found[0][1:] == found[1][1:]
        assert not torch.equal(found[0][0], model(**batch).logits)
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_found_by_its_old_name_and_its_new_one(name: str) -> None:
    from transformers import DynamicCache

    from expertsteer_lens.hosts.pass_arguments import describe_pass

    cache, keys = DynamicCache(), torch.zeros(1, 2, 5, 4)
    cache.update(keys, keys, 0)
    info = describe_pass(
        ["input_ids"], (torch.ones(1, 1, dtype=torch.long),), {name: cache, "use_cache": True}, {}
    )
    assert (info.past, info.n_new) == (5, 1)


def test_the_tokens_in_a_cache_of_another_kind_are_counted_where_that_can_be() -> None:
    """A decoder with code of its own may keep keys and values in tuples, or in who knows what."""
    from expertsteer_lens.hosts.pass_arguments import describe_pass

    keys, ids = torch.zeros(1, 2, 5, 4), torch.ones(1, 1, dtype=torch.long)
    for cache, past in ((((keys, keys),), 5), ((), 0), (object(), 0)):
        for name in ("input_ids", "tokens"):  # of whatever name, the first tensor is the tokens
            info = describe_pass([name, "past_key_values"], (ids, cache), {}, {})
            assert (info.past, info.n_new) == (past, 1)
    assert describe_pass(["input_ids"], (None,), {}, {}) is None


def test_a_cache_that_cannot_be_referred_to_weakly_says_nothing_of_its_sequence() -> None:
    from expertsteer_lens.hosts.pass_tracking import watch_causal_module
    from expertsteer_lens.hosts.scope import Scope

    class Slotted:
        __slots__ = ("n",)

        def get_seq_length(self) -> int:
            return self.n

    class Decoder(nn.Module):
        def forward(self, input_ids: Tensor, past_key_values: Any = None) -> Tensor:
            return input_ids

    seen: list[Any] = []
    observer: Any = SimpleNamespace(on_forward=seen.append)
    decoder, cache = Decoder(), Slotted()
    cache.n = 4
    with watch_causal_module(decoder, observer, root=decoder, scope=Scope(everywhere=True)):
        decoder(torch.ones(2, 3, dtype=torch.long), past_key_values=cache)
    assert [(info.past, info.n_new, info.sequence) for info in seen] == [(4, 3, None)]


def test_a_text_without_any_token_is_refused() -> None:
    from tokenizers import normalizers

    tokenizer = models.tokenizer(bos=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    host = as_host(models.hf("llama"), tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"prompts\[1\] has no tokens; give it a text"):
        host.tokenize(["cat", "~"])


def test_a_model_loaded_in_inference_mode_is_measured_and_steered_as_any() -> None:
    with torch.inference_mode():
        model = models.hf("llama", size=SIZE)
    model.tokenizer = models.tokenizer()
    assert all(p.is_inference() for p in model.parameters())
    usual = models.hf("llama", size=SIZE)
    assert as_host(model).fingerprint == as_host(usual, tokenizer=models.tokenizer()).fingerprint
    plan, ids = plan_for("llama", "all"), torch.tensor([[1, 4, 7]])
    with torch.no_grad(), plan.hooks(model), plan.hooks(usual):
        assert torch.equal(model(ids).logits, usual(ids).logits)


def test_a_generation_that_is_given_no_prompt_has_bos_for_one() -> None:
    model, plan = models.hf("llama", size=SIZE), plan_for("llama", "generated")
    model.tokenizer = models.tokenizer()
    begin = torch.tensor([[model.config.bos_token_id]])
    with plan.hooks(model) as report:
        want = model.generate(begin, attention_mask=torch.ones_like(begin), **GENERATE)
        n_edited = dict(report.n_edited)
        assert torch.equal(model.generate(**GENERATE), want)
    assert dict(report.n_edited) == {name: 2 * n for name, n in n_edited.items()}
