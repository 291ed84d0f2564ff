"""A model from a GGUF file: the same weights, said to be dequantised."""

from __future__ import annotations

import re

import pytest
import tiny_gguf
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, HostError
from expertsteer_lens.hosts import loading


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ArgumentError, match=r"there is no GGUF file .*no\.gguf"):
        esl.load_model(str(tmp_path / "no.gguf"))


def test_without_the_package_that_reads_it_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(HostError, match=r"needs the package gguf; install .*lens\[export\]"):
        esl.load_model(str(tmp_path / "a.gguf"))


def test_what_can_be_no_hub_id_is_not_asked_for_there(tmp_path):
    """That takes minutes without a network, and its error does not say what was asked for."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("a")
    for name, said in {
        "./nowhere": "there is no such folder, and a hub id has the form owner/name",
        str(tmp_path / "nowhere"): "there is no such folder",
        "one/two/three": "there is no such folder",
        str(tmp_path / "empty"): "the folder holds no config.json",
        str(tmp_path / "notes.txt"): "it is a file",
    }.items():
        with pytest.raises(ArgumentError, match=f"no model in '{re.escape(name)}': {said}"):
            esl.load_model(name)


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


def test_a_misspelt_folder_beside_others_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "results" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match="there is a folder 'results'"):
        esl.load_model("results/lama")
