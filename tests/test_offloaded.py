"""A model whose weights wait in memory or on disk is read and steered as the model itself."""

from __future__ import annotations

import pathlib
from typing import Any

import models
import pytest
import torch
from test_ways_to_run import alone, llama, plan_at

import expertsteer_lens as esl
from expertsteer_lens.hosts import as_host
from expertsteer_lens.hosts.facts import weights_digest

accelerate = pytest.importorskip("accelerate")
TEXTS = ["the cat saw a dog", "sun"]
PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2"]
END = {"model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "disk"}


def offloaded(way: str, folder: pathlib.Path) -> Any:
    model = llama()
    if way == "cpu_offload":
        return accelerate.cpu_offload(model)
    if way == "disk_offload":
        return accelerate.disk_offload(model, folder)
    n_here = int(way.removesuffix(" parts here"))
    places = {part: "cpu" if i < n_here else "disk" for i, part in enumerate(PARTS)} | END
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "0 parts here", "2 parts here"])
def test_weights_that_are_brought_for_each_pass(way: str, tmp_path: pathlib.Path) -> None:
    whole, plan = llama(), plan_at("generated")
    model = offloaded(way, tmp_path)
    assert any(p.device.type == "meta" for p in model.parameters())
    host = as_host(model)
    assert host.device.type == "cpu"
    assert host.fingerprint == as_host(whole).fingerprint
    assert weights_digest(model) == weights_digest(whole) is not None
    assert all(p.device.type == "meta" or way != "cpu_offload" for p in model.parameters())
    want, got = (esl.capture(m, TEXTS)["blocks.2.hook_resid_post"] for m in (whole, model))
    assert torch.equal(want, got)
    assert alone(model, plan) == alone(whole, plan) != alone(whole, None) == alone(model, None)


def test_weights_that_are_nowhere_are_refused() -> None:
    with torch.device("meta"):
        model = models.hf("llama")
    model.tokenizer = models.tokenizer()
    with pytest.raises(esl.errors.ModelStateError, match=r"weights of .* are not loaded"):
        esl.capture(model, TEXTS)
    with pytest.raises(esl.errors.ModelStateError, match=r"weights of .* are not loaded"):
        plan_at().attach(model)
