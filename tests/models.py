"""A zoo of tiny random-weight models and a tiny tokenizer, built in memory: nothing is downloaded.

Every factory is seeded, so two calls with the same arguments give the same weights. Booting a
TransformerBridge rewrites the Hugging Face module it is given, so `bridge` always builds a fresh
one."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from expertsteer_lens.hosts.cache_names import agree_on_cache_name

FAMILIES = ("gpt2", "llama", "neox", "gemma2")
D_MODEL, N_LAYERS, N_CTX, D_VOCAB = 32, 3, 64, 96
_WORDS = """
the a an cat dog boy girl tree house sun moon rain snow run ran walk walked saw see look happy sad glad angry
big small red blue green old new good bad day night once upon time there was is and or but not very so then
they he she it we you in on under with from to of for my your his her friend mother father played said went
home smiled cried
""".split()  # noqa: SIM905


def edit_parameters(edit: str, d: int = D_MODEL) -> dict[str, Any]:
    """What a vector of this edit must bring besides its direction: strengths of either sign."""
    if edit != "add_contextual":
        return {}
    weights = 0.2 * torch.randn(d, generator=torch.Generator().manual_seed(11))
    return {"weights": weights, "bias": 0.4}


@functools.cache
def tokenizer_folder(*, pad: bool = True, bos: bool = True) -> str:
    """A folder with a word-level tokenizer: ids 0..3 are <pad>, <s>, </s>, <unk> (those asked
    for)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *_WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    if pad:
        special["pad_token"] = "<pad>"
    if bos:
        special["bos_token"] = "<s>"
    folder = tempfile.mkdtemp(prefix="tiny-tokenizer-")
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return folder


def tokenizer(*, pad: bool = True, bos: bool = True) -> Any:
    """A fresh tokenizer object; hosts mutate the one they are given."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder(pad=pad, bos=bos))


def hf(
    family: str = "gpt2",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    n_layers: int = N_LAYERS,
    size: float = 0.25,
) -> nn.Module:
    """A Hugging Face causal model of the family, in eval mode, with weights large enough to matter.

    `size` is the standard deviation of the matrices: the larger, the larger the logits, and what
    float32 rounds off them."""
    import transformers as tf

    common = {"vocab_size": D_VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    wide = {
        "hidden_size": D_MODEL,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": N_CTX,
    }
    if family == "gpt2":
        config = tf.GPT2Config(
            n_embd=D_MODEL, n_layer=n_layers, n_head=2, n_positions=N_CTX, **common
        )
    elif family == "llama":
        config = tf.LlamaConfig(num_key_value_heads=1, head_dim=16, **wide, **common)
    elif family == "neox":
        config = tf.GPTNeoXConfig(rotary_pct=0.5, **wide, **common)
    elif family == "gemma2":
        config = tf.Gemma2Config(
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=N_CTX,
            **wide,
            **common,
        )
    else:
        raise ValueError(f"unknown family {family!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            scale = size if parameter.ndim > 1 else 0.1
            parameter.data += scale * torch.randn_like(parameter)
    return model.to(dtype).eval()


def bridge(
    family: str = "gpt2",
    *,
    compat: bool = False,
    pad: bool = True,
    bos: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    n_layers: int = N_LAYERS,
    size: float = 0.25,
) -> Any:
    """A TransformerBridge over a fresh `hf(family)`; `compat` switches on the weight processing of
    HookedTransformer."""
    from transformer_lens.model_bridge import TransformerBridge

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = TransformerBridge.boot_transformers(
            f"tiny-{family}",
            hf_model=hf(family, seed=seed, dtype=dtype, n_layers=n_layers, size=size),
            tokenizer=tokenizer(pad=pad, bos=bos),
            device="cpu",
            dtype=dtype,
        )
        if compat:
            model.enable_compatibility_mode(disable_warnings=True)
    agree_on_cache_name(model, model.original_model)  # as `load_model` does
    return model


def has_hooked_transformer() -> bool:
    """Whether this TransformerLens still ships HookedTransformer (3.x does, 4.x does not)."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


_OFFICIAL = {"gpt2": "gpt2", "neox": "pythia-14m", "llama": "gpt2", "gemma2": "gemma-2-2b"}


def hooked(
    family: str = "gpt2", *, processed: bool = True, seed: int = 0, size: float = 0.25
) -> Any:
    """A HookedTransformer with the weights of `hf(family)`: `processed` = its default weight
    processing."""
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    model = hf(family, seed=seed, size=size)
    loader = (
        HookedTransformer.from_pretrained
        if processed
        else HookedTransformer.from_pretrained_no_processing
    )
    with _config_from(loading, model.config, type(model).__name__), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return loader(_OFFICIAL[family], hf_model=model, tokenizer=tokenizer(), device="cpu")


def on_host(kind: str, family: str = "gpt2", *, size: float = 0.25) -> Any:
    """The model on a host: "bridge", "bridge compat", "hooked" (processed), "hooked raw",
    "huggingface", "nnsight" or "NNsight"; a test on a host that is not here is skipped."""
    import pytest

    if kind.startswith("bridge"):
        return bridge(family, compat=kind.endswith("compat"), size=size)
    if kind.startswith("hooked"):
        if not has_hooked_transformer():
            pytest.skip(
                "HookedTransformer left TransformerLens in 4.0; this runs in the environment with "
                "3.9"
            )
        return hooked(family, processed=kind == "hooked", size=size)
    module = hf(family, size=size)
    if kind == "huggingface":
        module.tokenizer = tokenizer()
        return module
    nnsight = pytest.importorskip("nnsight")
    if kind == "NNsight":
        return nnsight.NNsight(module)
    return nnsight.TransformersModel(module, tokenizer=tokenizer())


def greedy(n_tokens: int) -> dict[str, Any]:
    """What transformers' `generate` is told: the likeliest token, exactly so many times."""
    return {
        "max_new_tokens": n_tokens,
        "do_sample": False,
        "eos_token_id": 2**31 - 1,
        "pad_token_id": 0,
    }


@contextlib.contextmanager
def _config_from(loading: Any, config: Any, architecture: str) -> Iterator[None]:
    """Let TransformerLens read `config` instead of asking a model hub for it, or a table of known
    sizes (gemma2)."""
    auto, convert = loading.AutoConfig.from_pretrained, loading.convert_hf_model_config
    config.n_ctx, config.architectures = N_CTX, [architecture]
    sizes = {
        "d_model": D_MODEL,
        "d_head": 16,
        "n_heads": 2,
        "d_mlp": 48,
        "n_layers": config.num_hidden_layers,
        "n_ctx": N_CTX,
        "d_vocab": D_VOCAB,
        "n_key_value_heads": 1,
        "window_size": N_CTX,
        "attn_types": ["local", "global", "local"],
    }
    loading.AutoConfig.from_pretrained = lambda *a, **k: config
    if architecture == "Gemma2ForCausalLM":
        loading.convert_hf_model_config = lambda *a, **k: {**convert(*a, **k), **sizes}
    try:
        yield
    finally:
        loading.AutoConfig.from_pretrained, loading.convert_hf_model_config = auto, convert


def temporary_folder() -> pathlib.Path:
    """A folder of its own for one test."""
    return pathlib.Path(tempfile.mkdtemp(prefix="expertsteer-"))
