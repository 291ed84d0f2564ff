"""A plan in the weights says what the steered model says, in the model's own class."""

from __future__ import annotations

import functools

import models
import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, ArtifactError, HostError

D = models.D_MODEL
IDS = torch.tensor([[1, 7, 12, 30, 5, 9, 40, 41, 42, 43, 11, 3]])
TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {
    "hidden_size": D,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
KV = {"num_key_value_heads": 1, "head_dim": 16}
ONE_KV = {"num_key_value_heads": 1}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OPT = {
    "hidden_size": D,
    "num_hidden_layers": 3,
    "ffn_dim": 48,
    "num_attention_heads": 2,
    "word_embed_proj_dim": D,
    "max_position_embeddings": 64,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
GPT_NEO = {"attention_types": [[["global", "local"], 1], [["global"], 1]]}
THERE, BLOCK = None, True
# Class of the configuration, what it takes, the switch that is turned on, whether blocks are added.
FAMILIES = {
    "gpt2": ("GPT2Config", {"n_embd": D, "n_layer": 3, "n_head": 2, "n_positions": 64}, THERE),
    "phi": ("PhiConfig", WIDE, THERE),
    "opt_350m": ("OPTConfig", {**OPT, "do_layer_norm_before": False}, THERE),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, **WIDE, **KV}, THERE),
    "llama": ("LlamaConfig", {**WIDE, **KV}, "mlp_bias"),
    "granite": ("GraniteConfig", {"residual_multiplier": 0.22, **WIDE, **ONE_KV}, "mlp_bias"),
    "cohere": ("CohereConfig", {**WIDE, **ONE_KV}, "attention_bias"),
    "qwen2": ("Qwen2Config", {**WIDE, **ONE_KV}, THERE, BLOCK),
    "qwen3": ("Qwen3Config", {**WIDE, **KV}, "attention_bias", BLOCK),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 8, "layer_types": MIXED, "query_pre_attn_scalar": 16, **WIDE, **KV}, "attention_bias", BLOCK),
    "olmo2": ("Olmo2Config", WIDE, "attention_bias", BLOCK),
}  # fmt: skip
MORE = {
    "gpt_j": ("GPTJConfig", {"n_embd": D, "n_layer": 3, "n_head": 2, "n_positions": 64, "rotary_dim": 8}, THERE),
    "gpt_neo": ("GPTNeoConfig", {"hidden_size": D, "num_layers": 3, "num_heads": 2, "max_position_embeddings": 64, "intermediate_size": 48, **GPT_NEO}, THERE),
    "gpt_neox": ("GPTNeoXConfig", WIDE, THERE),
    "opt": ("OPTConfig", OPT, THERE),
    "bloom": ("BloomConfig", {"hidden_size": D, "n_layer": 3, "n_head": 2}, THERE),
    "starcoder2": ("Starcoder2Config", {**WIDE, **ONE_KV}, THERE),
    "falcon": ("FalconConfig", {"hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 2}, "bias"),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True, **WIDE, **KV}, "mlp_bias"),
    "nemotron": ("NemotronConfig", {**WIDE, **KV}, "mlp_bias"),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1, 0], **WIDE, **ONE_KV}, "mlp_bias"),
    "falcon_h1": ("FalconH1Config", {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8, **WIDE, **ONE_KV}, "mlp_bias"),
    "mamba": ("MambaConfig", {"hidden_size": D, "num_hidden_layers": 3, "state_size": 4}, "use_bias"),
    "mamba2": ("Mamba2Config", {"hidden_size": D, "num_hidden_layers": 3, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}, "use_bias"),
    "gemma": ("GemmaConfig", {**WIDE, **KV}, "attention_bias", BLOCK),
    "gemma2": ("Gemma2Config", {"sliding_window": 8, "query_pre_attn_scalar": 16, **WIDE, **KV}, "attention_bias", BLOCK),
    "olmo": ("OlmoConfig", WIDE, "attention_bias", BLOCK),
    "stablelm": ("StableLmConfig", {**WIDE, **ONE_KV}, "use_qkv_bias", BLOCK),
    "glm4": ("Glm4Config", {"attention_bias": True, **WIDE, **KV}, THERE, BLOCK),
    "qwen2_moe": ("Qwen2MoeConfig", {"shared_expert_intermediate_size": 16, **EXPERTS, **WIDE, **ONE_KV}, THERE, BLOCK),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, **WIDE, **KV}, "attention_bias", BLOCK),
    "deepseek_v3": ("DeepseekV3Config", {**DEEPSEEK, **WIDE}, "attention_bias", BLOCK),
    "llama4": ("Llama4TextConfig", {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1, **WIDE, **KV}, "attention_bias", BLOCK),
}  # fmt: skip
NO_PLACE = {
    "mistral": ("MistralConfig", {**WIDE, **KV}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **WIDE, **KV}),
    "phi3": ("Phi3Config", {**WIDE, **ONE_KV}),
    "mpt": ("MptConfig", {"d_model": D, "n_layers": 3, "n_heads": 2, "max_seq_len": 64, "expansion_ratio": 2}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"], **WIDE, **ONE_KV}),
    "gemma4": ("Gemma4TextConfig", {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "sliding_window": 8, "global_head_dim": 16, "layer_types": [*MIXED[1:], "full_attention"], **WIDE, **KV}),
}  # fmt: skip


@functools.cache
def made(family: str, dtype: torch.dtype = torch.float32):
    """A random model with weights large enough to matter; nobody changes it."""
    import transformers

    name, options, *_ = {**FAMILIES, **MORE, **NO_PLACE}[family]
    config = getattr(transformers, name)(**options, **TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            size = 0.25 if parameter.ndim > 1 else 0.1
            parameter.data += size * torch.randn_like(parameter)
    return model.to(dtype).eval()


def plan_of(*hook_names: str, coefficient: float = 3.5, **options) -> esl.SteeringPlan:
    generator = torch.Generator().manual_seed(4)
    names = hook_names or ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")
    vectors = {name: torch.randn(D, generator=generator) for name in names}
    return esl.SteeringPlan.from_vectors(
        vectors, coefficient=coefficient, relative_to="unit", **options
    )


@torch.no_grad()
def log_probs(model) -> torch.Tensor:
    return model(input_ids=IDS).logits.float().log_softmax(-1)


def steered(plan, model) -> torch.Tensor:
    with plan.hooks(model):
        return log_probs(model)


def check(family: str, folder) -> None:
    """Equal to hooks to 1e-5, in the own class, and again after saving and loading without us."""
    import transformers

    model, plan = made(family), plan_of()
    plain, wanted = log_probs(model), steered(plan, model)
    assert float((wanted - plain).abs().max()) > 0.1, "the plan does nothing here"
    baked = plan.bake(model)
    torch.testing.assert_close(log_probs(baked), wanted, atol=1e-5, rtol=0)
    assert type(baked) is type(model)
    _, _, switch, *adds_block = {**FAMILIES, **MORE}[family]
    assert baked.config.num_hidden_layers == (5 if adds_block else 3)
    assert {note["switch"] for note in baked.config.expertsteer_lens["baked"]} == {switch}
    baked.save_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(log_probs(loaded), wanted, atol=1e-5, rtol=0)
    assert torch.equal(log_probs(model), plain)  # the model itself is left as it was


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_says_what_the_steered_model_says_and_loads_without_us(family, tmp_path):
    check(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE)
def test_it_does_in_other_families(family, tmp_path):
    check(family, tmp_path)


@pytest.mark.parametrize("family", ["mistral", "gemma4", "lfm2"])
def test_a_class_without_a_place_is_refused_with_the_reason(family):
    with pytest.raises(HostError, match=r"no place for the vector \(as a bias of the block: ther"):
        plan_of().bake(made(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "phi3", "mpt"])
def test_others_without_a_place_are_refused(family):
    with pytest.raises(HostError, match="no place for the vector"):
        plan_of().bake(made(family))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_it_generates_the_same_with_a_cache_in_padded_batches_and_compiled(family):
    model, plan = made(family), plan_of()
    baked = plan.bake(model)
    ids = torch.tensor([[0, 0, 1, 7, 12], [1, 9, 30, 41, 5]])
    how = {"attention_mask": (ids != 0).long(), "max_new_tokens": 12, "do_sample": False}
    how["eos_token_id"] = None
    with plan.hooks(model):
        wanted = model.generate(ids, **how)
    assert torch.equal(baked.generate(ids, **how), wanted)
    assert not torch.equal(model.generate(ids, **how), wanted)
    if family != "gemma3":  # compiling takes seconds; once is enough
        return
    compiled = torch.compile(baked, backend="eager")
    torch.testing.assert_close(log_probs(compiled), steered(plan, model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "names",
    [
        ("blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"),
        ("blocks.2.hook_resid_pre",),
        ("blocks.1.hook_attn_out",),
    ],
)
def test_other_hook_points_of_a_block(names):
    model, plan = made("gpt2"), plan_of(*names)
    wanted = steered(plan, model)
    torch.testing.assert_close(log_probs(plan.bake(model)), wanted, atol=1e-5, rtol=0)


def test_the_last_block_and_neighbours_of_a_class_that_needs_more_blocks():
    names = [f"blocks.{layer}.hook_resid_post" for layer in (2, 0, 1)]
    model, plan = made("gemma3"), plan_of(*names)
    wanted, baked = steered(plan, model), plan.bake(model)
    torch.testing.assert_close(log_probs(baked), wanted, atol=1e-5, rtol=0)
    blocks = [note["additional_block"] for note in baked.config.expertsteer_lens["baked"]]
    assert blocks == [5, 1, 3]
    assert baked.config.layer_types == [kind for kind in MIXED for _ in range(2)]


def test_the_text_half_of_a_multimodal_model():
    import transformers as tf

    text = tf.Gemma3TextConfig(**FAMILIES["gemma3"][1], **TOKENS)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8, "patch_size": 4}  # fmt: skip
    torch.manual_seed(0)
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = tf.Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    plan = plan_of()
    wanted, baked = steered(plan, model), plan.bake(model)
    torch.testing.assert_close(log_probs(baked), wanted, atol=1e-5, rtol=0)
    assert baked.config.text_config.num_hidden_layers == 5


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_in_half_precision_it_is_as_near_as_rounding_allows(family):
    model, plan = made(family, torch.bfloat16), plan_of()
    wanted, plain, baked = steered(plan, model), log_probs(model), plan.bake(model)
    assert {p.dtype for p in baked.parameters()} == {torch.bfloat16}
    effect = float((wanted - plain).abs().mean())
    assert float((log_probs(baked) - wanted).abs().mean()) < 0.05 * effect


def test_a_second_plan_joins_the_first():
    one, two = plan_of("blocks.0.hook_resid_post"), plan_of("blocks.1.hook_resid_post")
    model = made("llama")
    twice = two.bake(one.bake(model))
    both = esl.SteeringPlan(vectors=(*one.vectors, *two.vectors))
    torch.testing.assert_close(log_probs(twice), steered(both, model), atol=1e-5, rtol=0)
    assert len(twice.config.expertsteer_lens["baked"]) == 2


def test_hooks_on_the_model_are_not_taken_along():
    model, plan = made("llama"), plan_of()
    wanted = steered(plan, model)
    with plan.hooks(model):
        log_probs(model)
        baked = plan_of("blocks.0.hook_resid_post", "blocks.2.hook_resid_post").bake(model)
    torch.testing.assert_close(log_probs(baked), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "generated"}, r"positions='generated' cannot be baked: weights steer every"),
        ({"edit": "clamp"}, "edit='clamp' at .* cannot be baked: only 'add' is a constant vector"),
        ({"preserve_norm": True}, "preserve_norm=True at .* cannot be baked"),
        ({"coefficient": 0.0}, "nothing to be baked"),
    ],
)
def test_plans_that_are_no_constant_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        plan_of(**options).bake(made("llama"))


def test_models_that_cannot_be_copied_whole_are_refused():
    plan = plan_of()
    with pytest.raises(
        HostError, match=r"only a Hugging Face model can be baked, got a Transformer"
    ):
        plan.bake(models.bridge("gpt2"))
    model = models.hf("llama")
    model.hf_quantizer = object()
    with pytest.raises(HostError, match="is quantised; bake the full weights"):
        plan.bake(model)
    with pytest.raises(HostError, match=r"hook 'blocks\.0\.hook_resid_pre' cannot be baked"):
        plan_of("blocks.0.hook_resid_pre").bake(made("llama"))


def test_an_adapter_is_to_be_merged_first():
    peft = pytest.importorskip("peft")
    model = models.hf("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    with pytest.raises(HostError, match="carries an adapter; merge_and_unload"):
        plan_of().bake(adapted)


def test_a_plan_for_another_model_is_refused():
    import dataclasses

    plan = dataclasses.replace(plan_of(), target={"fingerprint": f"3x{D}-{0:064x}"})
    with pytest.raises(ArtifactError, match="allow_mismatch=True"):
        plan.bake(made("llama"))
    plan.bake(made("llama"), allow_mismatch=True)


def test_a_copy_that_says_something_else_is_refused(monkeypatch):
    from expertsteer_lens.steer import bake as module

    kept = module._put_in_bias

    def half(host, hook_name, delta):
        return kept(host, hook_name, delta / 2)

    monkeypatch.setattr(module, "_put_in_bias", half)
    with pytest.raises(HostError, match=r"differs from the steered model by .* nats"):
        plan_of().bake(made("llama"))
