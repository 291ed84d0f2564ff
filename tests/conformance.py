"""What every architecture is held to, on every host that loads it: one plan, the same tokens and
log-probabilities with and without a cache, one at a time and in a padded batch, and they are those
of a torch hook written by hand."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import re
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any
from unittest import mock

import architectures
import models
import torch
from reference import padded
from torch import Tensor, nn

from expertsteer_lens.hosts import as_host
from expertsteer_lens.hosts.table import nothing_installed
from expertsteer_lens.steer.plan import SteeringPlan

USUAL = (
    "gpt2",
    "llama",
    "gemma3_vision",
    "gemma4",
    "qwen3_5",
    "deepseek_v3",
    "mamba2",
    "falcon_h1",
)
"""Tried on every host in the default run of the tests; all others on Hugging Face only."""
REFUSED = {
    ("gemma3n", "huggingface"): r"carries \(4, 2, 24, 32\)",
    ("gemma3n", "nnsight"): r"carries \(4, 2, 24, 32\)",
    ("gemma3n", "transformer_lens"): "Could not determine supported architecture",
    ("opt_350m", "transformer_lens"): "Original component not set for .*final_layer_norm",
    ("qwen2_5_vl", "transformer_lens"): "needs the optional torchvision library",
    ("opt_350m", "hooked_transformer"): "'NoneType' object has no attribute 'weight'",
    ("phi", "hooked_transformer"): "no attribute 'partial_rotary_factor'",
}
"""What cannot be steered, by architecture and host, and what the error says."""
NEEDS_TORCHVISION = ("qwen2_5_vl", "transformer_lens")
"""Refused only where that is not installed; it is none of our requirements."""
HOOKED = "gpt2 gpt_j gpt_neo gpt_neox gpt_oss opt opt_350m bloom phi phi3 llama llama_tied mistral"
HOOKED += " mixtral qwen2 qwen3"
REFUSED |= {
    (family, "hooked_transformer"): "For(CausalLM|ConditionalGeneration) is not currently supported"
    for family in architectures.CONFIGS
    if family not in HOOKED.split()
}
SIZE = 0.15
"""Weights calm enough that float32 rounds every model, unsteered too, by less than 1e-5."""
HOSTS = ("huggingface", "transformer_lens", "nnsight", "hooked_transformer")
"""The last is the `HookedTransformer` of TransformerLens 3, which has an environment of its own."""
HOOK, LAYER = "blocks.1.hook_resid_post", 1
PROMPTS = ([1, 7, 12, 30, 5, 9, 40, 41, 42], [1, 20, 21], [1, 9, 10, 11, 12, 13])
N_NEW = 4
GREEDY = {
    **models.greedy(N_NEW),
    "output_logits": True,
    "return_dict_in_generate": True,
}


@dataclass(frozen=True)
class Row:
    """What was found of one architecture on one host; log-probabilities in nats."""

    refused: str = ""
    """Why it cannot be loaded or steered; the rest is then empty."""
    ways: float = 0.0
    """Largest difference between a torch hook by hand (no cache, one prompt at a time) and the plan:
    cached, uncached, and as a padded batch."""
    moved: float = 0.0
    """Largest change by the plan."""
    same_tokens: bool = True
    """Whether all ways generate the tokens of the hook by hand."""


def plan() -> SteeringPlan:
    """One direction, from the last token of the prompt on: the rule that is most easily wrong."""
    direction = torch.randn(architectures.D, generator=torch.Generator().manual_seed(5))
    return SteeringPlan.from_vectors(
        {HOOK: direction}, coefficient=6.0, relative_to="unit", positions="generated"
    )


@torch.no_grad()
def by_hand(model: nn.Module, *, steered: bool) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy tokens and log-probabilities `[N_NEW, vocab]` of each prompt, without a cache."""
    delta = plan().vectors[0].delta
    block = model.get_submodule(as_host(model).blocks.layers[LAYER])
    tokens, rows = [], []
    for prompt in PROMPTS:
        ids, found = list(prompt), []

        def add(_: Any, __: Any, output: Any, first: int = len(prompt) - 1) -> Any:
            stream = (output[0] if isinstance(output, tuple) else output).clone()
            stream[:, first:] += delta
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        handle = block.register_forward_hook(add) if steered else None
        for _ in range(N_NEW):
            row = torch.tensor([ids])
            logits = model(
                input_ids=row, attention_mask=torch.ones_like(row), use_cache=False
            ).logits
            found.append(logits[0, -1].float().log_softmax(-1))
            ids.append(int(found[-1].argmax()))
        if handle is not None:
            handle.remove()
        tokens.append(ids[len(prompt) :])
        rows.append(torch.stack(found))
    return tokens, rows


def _built(family: str) -> nn.Module:
    return architectures.built(family, size=SIZE, attn_implementation="eager")


def can_try(host: str) -> bool:
    """Whether the host is in this environment: TransformerLens is there in version 3 or 4."""
    return models.has_hooked_transformer() == (host == "hooked_transformer")


def loaded(family: str, host: str) -> tuple[Any, Any]:
    """A model on a host, and the object whose `generate` is called."""
    model = _built(family)
    if host == "hooked_transformer":
        from transformer_lens import HookedTransformer, loading_from_pretrained

        names = mock.patch.object(loading_from_pretrained, "get_official_model_name", str)
        with tempfile.TemporaryDirectory(prefix="tiny-") as folder, names:
            model.config.save_pretrained(folder)
            if family == "gpt2":  # as in the published ones
                _also_say(folder, n_ctx=model.config.n_positions)
            hooked = HookedTransformer.from_pretrained_no_processing(
                folder, hf_model=model, tokenizer=models.tokenizer(), device="cpu"
            )
        hooked.tokenizer.padding_side = "left"  # ids are taken for padded where the tokenizer pads
        return hooked, hooked
    if host == "huggingface":
        return model, model
    if host == "nnsight":
        from nnsight import TransformersModel

        lens = TransformersModel(model, tokenizer=models.tokenizer())
        return lens, lens
    from transformer_lens.model_bridge import TransformerBridge

    with nothing_installed():  # it installs torchvision, and another torch, for images
        bridge = TransformerBridge.boot_transformers(
            f"tiny-{family}", hf_model=model, tokenizer=models.tokenizer(), device="cpu"
        )
    return bridge, bridge.original_model


def _also_say(folder: str, **facts: Any) -> None:
    path = pathlib.Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def generated(
    model: Any, rows: list[list[int]], *, cached: bool
) -> tuple[list[list[int]], list[Tensor]]:
    """As `by_hand`, of prompts padded on the left."""
    ids, mask = padded(rows, "left")
    if not hasattr(model, "config"):  # a HookedTransformer, which tells the padding by its id
        options = {"max_new_tokens": N_NEW, "do_sample": False, "stop_at_eos": False}
        out = model.generate(
            ids,
            use_past_kv_cache=cached,
            prepend_bos=True,  # it is there
            verbose=False,
            return_type="tokens",
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        logits = torch.stack(out.logits, dim=1).float().log_softmax(-1)
        return out.sequences[:, -N_NEW:].tolist(), list(logits)
    out = model.generate(input_ids=ids, attention_mask=mask, use_cache=cached, **GREEDY)
    logits = torch.stack(out.logits, dim=1).float().log_softmax(-1)
    return out.sequences[:, -N_NEW:].tolist(), list(logits)


def row(family: str, host: str) -> Row:
    """Try one architecture on one host."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, runs = loaded(family, host)
            as_host(model).check_hook_names([HOOK])
        except Exception as error:
            return Row(refused=_short(error))
        reference = _built(family)
        try:
            with plan().hooks(model):
                ways = [
                    *([generated(runs, [p], cached=c) for p in PROMPTS] for c in (True, False)),
                    [generated(runs, list(PROMPTS), cached=True)],
                ]
        except Exception as error:
            return Row(refused=_short(error))
        tokens, rows = by_hand(reference, steered=True)
        _, plain = by_hand(reference, steered=False)
    found = [
        ([t for one in way for t in one[0]], [r for one in way for r in one[1]]) for way in ways
    ]
    return Row(
        ways=max(
            float((a - b).abs().max()) for _, w in found for a, b in zip(w, rows, strict=True)
        ),
        moved=max(float((a - b).abs().max()) for a, b in zip(rows, plain, strict=True)),
        same_tokens=all(way[0] == tokens for way in found),
    )


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def check(family: str, host: str) -> Row:
    """Assert that the architecture is exact on the host, or refused as `REFUSED` says."""
    with contextlib.redirect_stdout(io.StringIO()):  # HookedTransformer tells what it has loaded
        found = row(family, host)
    wanted = REFUSED.get((family, host))
    if wanted is not None:
        assert re.search(wanted, found.refused), found
        return found
    assert not found.refused, found
    assert found.same_tokens, found
    assert found.ways < 1e-5, found
    assert found.moved > 0.1, found
    return found
