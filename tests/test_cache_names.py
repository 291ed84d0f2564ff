"""A Bridge generates with its cache what it generates without one, also where transformers and
TransformerLens call the cache by different names (transformers from 5.24 on)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import architectures
import models
import pytest
import torch
import transformers
from torch import nn

from expertsteer_lens.hosts import as_host
from expertsteer_lens.hosts.cache_names import agree_on_cache_name

IDS = torch.tensor([[1, 7, 12, 30, 5]])
# One of each way in which TransformerLens takes a cache: attention of its own (q, k and v apart or
# joined, with and without rotary angles), latent attention, a delta rule, a state, attention that
# is left to transformers.
FAMILIES = ("gpt2", "llama", "mpt", "deepseek_v3", "qwen3_5", "mamba", "gpt_j")


def booted(model: nn.Module) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerBridge.boot_transformers(
            "tiny", hf_model=model, tokenizer=models.tokenizer(), device="cpu"
        )


def of_family(family: str) -> Any:
    return booted(architectures.built(family, attn_implementation="eager"))


def by_transformers(model: Any, *, cached: bool) -> list[int]:
    how = models.greedy(6)
    out = model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=cached, **how)
    return out[0, -6:].tolist()


def by_lens(bridge: Any, *, cached: bool) -> list[int]:
    how = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    out = bridge.generate(IDS, return_type="tokens", use_past_kv_cache=cached, **how)
    return out[0, -6:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_is_uncached_in_each_way_of_attending(family: str) -> None:
    bridge = of_family(family)
    as_host(bridge)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        want = by_transformers(bridge.original_model, cached=False)
        assert by_transformers(bridge.original_model, cached=True) == want
        assert by_lens(bridge, cached=True) == want
        assert by_lens(copy.deepcopy(bridge), cached=True) == want
    assert by_lens(bridge, cached=False) == want


def encoder_decoder() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    config.architectures = ["T5ForConditionalGeneration"]
    return transformers.T5ForConditionalGeneration(config)


def sparse_attention() -> nn.Module:
    options = {**architectures.DEEPSEEK, **architectures.WIDE, **architectures.TOKENS}
    config = transformers.GlmMoeDsaConfig(
        n_shared_experts=1, index_n_heads=2, index_head_dim=16, index_topk=4,
        **options,
    )  # fmt: skip
    config.architectures = ["GlmMoeDsaForCausalLM"]
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("make", [encoder_decoder, sparse_attention])
def test_cached_is_uncached_in_blocks_that_are_patched_or_sparse(
    make: Callable[[], nn.Module],
) -> None:
    model = make().eval()
    for parameter in model.parameters():
        parameter.data += 0.25 * torch.randn_like(parameter)
    bridge = booted(model)
    agree_on_cache_name(bridge, bridge.original_model)
    want = by_transformers(bridge.original_model, cached=False)
    assert len(set(want)) > 1
    assert by_transformers(bridge.original_model, cached=True) == want


class TakesNew(nn.Module):
    """A decoder as transformers writes it from 5.24 on, with attention of TransformerLens."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor, cache: Any = None) -> Any:
        return self.attention._update_kv_cache(x, x, cache=cache)


class TakesOld(TakesNew):
    """The same before."""

    def forward(self, x: torch.Tensor, past_key_values: Any = None) -> Any:
        return self.attention._update_kv_cache(x, x, past_key_values=past_key_values)


def n_hooks(module: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) for part in module.modules())


@pytest.mark.parametrize("decoder", [TakesNew, TakesOld])
def test_keys_reach_the_cache_by_either_name_and_hooks_are_put_on_once(decoder: Any) -> None:
    attention = models.bridge("llama").blocks[1].attn
    attention.__dict__.pop("_update_kv_cache", None)
    model = decoder(attention)
    before = n_hooks(model)
    for _ in range(2):
        agree_on_cache_name(model, model)
    assert n_hooks(model) - before == (1 if decoder is TakesNew else 0)
    copied = copy.deepcopy(model)
    agree_on_cache_name(copied, copied)
    assert n_hooks(copied) == n_hooks(model)
    cache, other = transformers.DynamicCache(), transformers.DynamicCache()
    x = torch.randn(1, 2, 5, 4)
    for one, its in ((model, cache), (copied, other)):
        one(x, past_key_values=its)
        keys, _ = one(x, past_key_values=its)
        assert keys.shape[2] == 10
