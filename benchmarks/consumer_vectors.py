"""Vectors to and from steering-vectors and repeng, in the programs themselves.

Both want an environment of their own (transformers < 5, numpy < 2):

    python -m venv vectors
    vectors/bin/pip install torch "numpy<2" "transformers<5" steering-vectors==0.12.2 repeng==0.4.0
    python benchmarks/consumer_vectors.py --python vectors/bin/python

There: a plan goes over as GGUF (repeng) and as tensors (steering-vectors), and each program steers
a tiny Llama with it, in a pass and in generation. Back: a vector that the program made is
saved there, read here by `SteeringPlan.from_foreign`, and steers as it did there. Writes
`benchmarks/results/consumer_vectors.json`.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import tempfile

import pages
import torch

import expertsteer_lens as esl
from expertsteer_lens.hosts import as_host

INSIDE = """
import sys
from importlib.metadata import version
import torch
from transformers import AutoModelForCausalLM
from repeng import ControlModel, ControlVector
from steering_vectors import SteeringVector
folder, work = sys.argv[1:]
load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids, mask = torch.load(work + "/ids.pt")
how = dict(max_new_tokens=8, do_sample=False, eos_token_id=2**31 - 1, pad_token_id=0)

@torch.no_grad()
def seen(model):
    found = model.generate(input_ids=ids, attention_mask=mask, **how)
    return model(input_ids=ids, attention_mask=mask).logits, found

out = {"plain": seen(load())}
vector = ControlVector.import_gguf(work + "/plan.gguf")
model = ControlModel(load(), list(vector.directions))
model.set_control(vector, 1.0)
out["repeng"] = seen(model)
model = load()
with SteeringVector(layer_activations=torch.load(work + "/plan.pt")).apply(model):
    out["steering-vectors"] = seen(model)

# Vectors of their own, and what they do there.
generator = torch.Generator().manual_seed(7)
width = model.config.hidden_size
own = {i: 3.0 * torch.randn(width, generator=generator) for i in (1, 2)}
theirs = ControlVector("llama", {i: v.numpy() for i, v in own.items()})
theirs.export_gguf(work + "/repeng.gguf")
model = ControlModel(load(), list(own))
model.set_control(theirs, 1.0)
out["from repeng"] = seen(model)
theirs = SteeringVector(layer_activations=own)
torch.save(dict(theirs.layer_activations), work + "/steering-vectors.pt")
model = load()
with theirs.apply(model):
    out["from steering-vectors"] = seen(model)
names = ("repeng", "steering-vectors", "transformers", "torch", "numpy")
torch.save({"out": out, "versions": {n: version(n) for n in names}}, work + "/out.pt")
"""


@torch.no_grad()
def seen(model, ids, mask):
    """Logits of a pass, and greedy tokens, as the programs give them."""
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2**31 - 1, "pad_token_id": 0}
    found = model.generate(input_ids=ids, attention_mask=mask, **how)
    return model(input_ids=ids, attention_mask=mask).logits, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of the environment with both programs")
    python = parser.parse_args().python
    model = esl.zoo.load("target", host="huggingface")
    host = as_host(model)
    batch = host.tokenize(["Once upon a time, Anna"])  # repeng takes one prompt at a time
    ids, mask = batch.input_ids, batch.attention_mask
    generator = torch.Generator().manual_seed(0)
    vectors = {
        f"blocks.{i}.hook_resid_post": torch.randn(host.d_model, generator=generator)
        for i in (1, 3)
    }
    plan = esl.SteeringPlan.from_vectors(vectors, coefficient=12.0, relative_to="unit")
    with tempfile.TemporaryDirectory() as work:
        folder = pathlib.Path(work)
        esl.export.to_gguf(plan, folder / "plan.gguf", model_hint="llama")
        torch.save(dict(esl.export.added_vectors(plan)), folder / "plan.pt")
        torch.save((ids, mask), folder / "ids.pt")
        args = [str(esl.zoo.model_path("target")), work]
        subprocess.run([python, "-c", INSIDE, *args], check=True)
        got = torch.load(folder / "out.pt")
        plans = {
            "repeng": plan,
            "steering-vectors": plan,
            "from repeng": esl.SteeringPlan.from_foreign(folder / "repeng.gguf"),
            "from steering-vectors": esl.SteeringPlan.from_foreign(folder / "steering-vectors.pt"),
        }
    plain = seen(model, ids, mask)
    real = mask.bool()
    rows = {}
    for name, one in plans.items():
        with one.hooks(model):
            logits, tokens = seen(model, ids, mask)
        theirs = got["out"][name]
        rows[name] = {
            "max_difference_logits": float((theirs[0] - logits)[real].abs().max()),
            "max_effect_logits": float((logits - plain[0])[real].abs().max()),
            "same_tokens": bool(torch.equal(theirs[1], tokens)),
            "tokens_moved": not torch.equal(tokens, plain[1]),
        }
    theirs = got["out"]["plain"]
    unsteered = float((theirs[0] - plain[0])[real].abs().max())
    result = {"unsteered_difference": unsteered, **rows, "versions": got["versions"]}
    pages.show_numbers(result, "consumer_vectors")


if __name__ == "__main__":
    main()
