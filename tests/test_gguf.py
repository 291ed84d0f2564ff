"""A model from a GGUF file: the same weights, said to be dequantised."""

from __future__ import annotations

import pytest
import tiny_gguf
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ArgumentError, match=r"there is no GGUF file .*no\.gguf"):
        esl.load_model(str(tmp_path / "no.gguf"))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, tiny_gguf.write(path)


def test_weights_are_those_of_the_file_and_the_name_says_what_they_are(gguf_file, tmp_path):
    path, model = gguf_file
    loaded = esl.load_model(str(path), host="huggingface")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert esl.as_host(loaded).name == "tiny.gguf (dequantised)"
    assert not loaded.training
    loaded.save_pretrained(tmp_path / "plain")  # a plain folder, which loads without the file
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, loaded(ids).logits)
