"""A tiny random model of every architecture that is claimed, built from its configuration in code:
nothing is downloaded."""

from __future__ import annotations

import functools
from typing import Any

import models
import torch
from torch import nn

D = models.D_MODEL
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
LINEAR = ["linear_attention", "linear_attention", "full_attention"]
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
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
    "num_key_value_heads": 2,
    "moe_intermediate_size": 16,
}
GPT_NEO = {"attention_types": [[["global", "local"], 1], [["global"], 1]]}
SSM = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 2,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
GEMMA3 = {"sliding_window": 8, "layer_types": MIXED, "query_pre_attn_scalar": 16, **WIDE, **KV}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": D,
    "patch_size": 4,
    "fullatt_block_indexes": [0],
}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_embd": D, "n_layer": 3, "n_head": 2, "n_positions": 64}),
    "gpt_j": ("GPTJConfig", {"n_embd": D, "n_layer": 3, "n_head": 2, "n_positions": 64, "rotary_dim": 8}),
    "gpt_neo": ("GPTNeoConfig", {"hidden_size": D, "num_layers": 3, "num_heads": 2, "max_position_embeddings": 64, **GPT_NEO}),
    "gpt_neox": ("GPTNeoXConfig", WIDE),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, **WIDE, **KV}),
    "opt": ("OPTConfig", OPT),
    "opt_350m": ("OPTConfig", {**OPT, "do_layer_norm_before": False}),
    "bloom": ("BloomConfig", {"hidden_size": D, "n_layer": 3, "n_head": 2}),
    "mpt": ("MptConfig", {"d_model": D, "n_layers": 3, "n_heads": 2, "max_seq_len": 64, "expansion_ratio": 2}),
    "falcon": ("FalconConfig", {"hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 2}),
    "phi": ("PhiConfig", WIDE),
    "phi3": ("Phi3Config", {**WIDE, **ONE_KV}),
    "starcoder2": ("Starcoder2Config", {**WIDE, **ONE_KV}),
    "stablelm": ("StableLmConfig", {**WIDE, **ONE_KV}),
    "nemotron": ("NemotronConfig", {**WIDE, **KV}),
    "cohere": ("CohereConfig", {**WIDE, **ONE_KV}),
    "granite": ("GraniteConfig", {"residual_multiplier": 0.22, **WIDE, **ONE_KV}),
    "glm4": ("Glm4Config", {"attention_bias": True, **WIDE, **KV}),
    "llama": ("LlamaConfig", {**WIDE, **KV}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True, **WIDE, **KV}),
    "llama4": ("Llama4TextConfig", {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1, **WIDE, **KV}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1, 0], **WIDE, **ONE_KV}),
    "olmo": ("OlmoConfig", WIDE),
    "olmo2": ("Olmo2Config", WIDE),
    "mistral": ("MistralConfig", {"sliding_window": 8, **WIDE, **KV}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **WIDE, **KV}),
    "deepseek_v3": ("DeepseekV3Config", {**DEEPSEEK, **WIDE}),
    "gemma": ("GemmaConfig", {**WIDE, **KV}),
    "gemma2": ("Gemma2Config", {"sliding_window": 8, "query_pre_attn_scalar": 16, **WIDE, **KV}),
    "gemma3": ("Gemma3TextConfig", GEMMA3),
    "gemma3_vision": ("Gemma3Config", {"text_config": GEMMA3, "vision_config": VISION, "mm_tokens_per_image": 4}),
    "gemma3n": ("Gemma3nTextConfig", {**PER_LAYER, "sliding_window": 8, "laurel_rank": 4, "num_kv_shared_layers": 0, "layer_types": MIXED, "activation_sparsity_pattern": [0.0] * 3, **WIDE, **KV}),
    "gemma4": ("Gemma4TextConfig", {**PER_LAYER, "sliding_window": 8, "global_head_dim": 16, "layer_types": [*MIXED[1:], "full_attention"], **WIDE, **KV}),
    "qwen2": ("Qwen2Config", {**WIDE, **ONE_KV}),
    "qwen2_moe": ("Qwen2MoeConfig", {"shared_expert_intermediate_size": 16, **EXPERTS, **WIDE, **ONE_KV}),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", {"text_config": {"rope_parameters": ROPE, **WIDE, **ONE_KV}, "vision_config": QWEN_VISION}),
    "qwen3": ("Qwen3Config", {**WIDE, **KV}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, **WIDE, **KV}),
    "qwen3_next": ("Qwen3NextConfig", {"layer_types": LINEAR, "shared_expert_intermediate_size": 16, **DELTA, **EXPERTS, **WIDE, **KV}),
    "qwen3_5": ("Qwen3_5TextConfig", {"layer_types": LINEAR, **DELTA, **WIDE, **KV}),
    "mamba": ("MambaConfig", {"hidden_size": D, "num_hidden_layers": 3, "state_size": 4}),
    "mamba2": ("Mamba2Config", {"hidden_size": D, "num_hidden_layers": 3, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"], **WIDE, **ONE_KV}),
    "falcon_h1": ("FalconH1Config", {**SSM, **WIDE, **ONE_KV}),
}  # fmt: skip
"""Class of the configuration, and what it takes, by the name used in tests."""


def config_of(family: str) -> Any:
    """The tiny configuration of an architecture."""
    import transformers

    name, options = CONFIGS[family]
    kind = getattr(transformers, name)
    if "text_config" not in options:
        return kind(**options, **TOKENS)
    made = kind(**{**options, "text_config": {**options["text_config"], **TOKENS}})
    made.pad_token_id, made.bos_token_id, made.eos_token_id = 0, 1, 2
    return made


def built(
    family: str, dtype: torch.dtype = torch.float32, *, size: float = 0.25, **options: Any
) -> nn.Module:
    """A fresh random model, the same at every call; `size` is the standard deviation of what is
    added to its matrices, so that they are large enough to matter."""
    import transformers as tf

    config = config_of(family)
    kind = tf.AutoModelForImageTextToText if "text_config" in CONFIGS[family][1] else None
    kind = kind or tf.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_config(config, **options)
        for parameter in model.parameters():
            scale = size if parameter.ndim > 1 else 0.1
            parameter.data += scale * torch.randn_like(parameter)
    model.config.architectures = [type(model).__name__]  # as in every saved configuration
    return model.to(dtype).eval()


@functools.cache
def made(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`built`, once; nobody changes it."""
    return built(family, dtype)
