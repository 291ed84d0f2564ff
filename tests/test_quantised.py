"""Quantised models are steered as a torch hook written by hand steers them, and read."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import transformers
from test_ways_to_run import GREEDY, PROMPTS, llama, plan_at

import expertsteer_lens as esl
from expertsteer_lens.hosts import as_host

ROW = torch.tensor([PROMPTS[0]])


@functools.cache
def folder() -> str:
    name = tempfile.mkdtemp(prefix="quantised-")
    llama().save_pretrained(name)
    return name


def _loaded(config: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder(), quantization_config=config, device_map="cpu"
    )


def dynamic_int8() -> Any:
    return torch.ao.quantization.quantize_dynamic(llama(), {torch.nn.Linear}, dtype=torch.qint8)


def torchao_int8() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return _loaded(transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig()))


def torchao_in_place() -> Any:
    quantization, model = pytest.importorskip("torchao.quantization"), llama()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def bitsandbytes_8_bit() -> Any:
    pytest.importorskip("bitsandbytes")
    return _loaded(transformers.BitsAndBytesConfig(load_in_8bit=True))


def bitsandbytes_4_bit() -> Any:
    pytest.importorskip("bitsandbytes")
    model = _loaded(transformers.BitsAndBytesConfig(load_in_4bit=True))
    for module in model.modules():
        # On processors with AVX512-BF16 bitsandbytes packs rows of 64 numbers, and these have 32.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


KINDS = (dynamic_int8, torchao_int8, torchao_in_place, bitsandbytes_8_bit, bitsandbytes_4_bit)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_quantised_model_is_steered_as_by_hand(make: Callable[[], Any]) -> None:
    model = make()
    model.tokenizer = models.tokenizer()
    plan, host = plan_at("generated"), as_host(model)
    fingerprint = host.fingerprint
    delta = plan.vectors[0].delta

    def add(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        out = output.clone()
        out[:, -1] += delta.to(out.dtype)
        return out

    plain = model(ROW).logits
    with plan.hooks(model):
        found = model(ROW).logits
        tokens = model.generate(ROW, attention_mask=torch.ones_like(ROW), **GREEDY)
    handle = model.model.layers[1].register_forward_hook(add)
    want = model(ROW).logits
    cached = model.generate(ROW, attention_mask=torch.ones_like(ROW), **GREEDY)
    handle.remove()
    assert torch.equal(found, want)
    assert torch.equal(tokens, cached)  # with a cache the last token is the only new one
    assert torch.equal(model(ROW).logits, plain)
    assert float((found - plain).abs().max()) > 0.1
    assert host.fingerprint == fingerprint
    assert esl.capture(model, ["the cat saw a dog"])["blocks.1.hook_resid_post"].shape == (1, 32)


def test_a_changed_scale_of_a_quantised_weight_is_noticed() -> None:
    model = torchao_in_place()
    host = as_host(model)
    before = host.fingerprint
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.scale.mul_(-3.0)
    assert not esl.hosts.fingerprints_match(host.fingerprint, before)
