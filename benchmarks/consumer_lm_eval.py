"""The steering file in lm-evaluation-harness itself: its log-likelihoods beside `plan.hooks`.

The harness wants an environment of its own:

    python -m venv lm && lm/bin/pip install torch lm-eval==0.4.13 transformers accelerate
    python benchmarks/consumer_lm_eval.py --python lm/bin/python

Runs the bundled target; writes `benchmarks/results/consumer_lm_eval.json`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import tempfile

import pages
import torch

import expertsteer_lens as esl

INSIDE = """
import json, sys
from importlib.metadata import version
from lm_eval.api.instance import Instance
from lm_eval.models.hf_steered import SteeredModel
from lm_eval.models.huggingface import HFLM
model, steer, rows, out = sys.argv[1:]
rows = json.load(open(rows))
ask = [Instance("loglikelihood", {}, tuple(r), i) for i, r in enumerate(rows)]
how = dict(pretrained=model, device="cpu", dtype="float32", batch_size=8, add_bos_token=True)
got = {"steered": [x[0] for x in SteeredModel(steer_path=steer, **how).loglikelihood(ask)],
       "plain": [x[0] for x in HFLM(**how).loglikelihood(ask)],
       "versions": {n: version(n) for n in ("lm_eval", "transformers", "torch")}}
json.dump(got, open(out, "w"))
"""


@torch.no_grad()
def log_likelihoods(model, tokenizer, rows) -> torch.Tensor:
    out = []
    for prompt, completion in rows:
        whole = [
            tokenizer.bos_token_id,
            *tokenizer(prompt + completion, add_special_tokens=False).input_ids,
        ]
        n = 1 + len(tokenizer(prompt, add_special_tokens=False).input_ids)
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        out.append(sum(float(logits[i - 1, whole[i]]) for i in range(n, len(whole))))
    return torch.tensor(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of the environment with the harness")
    python = parser.parse_args().python
    model = esl.zoo.load("target", host="huggingface")
    tokenizer, folder = esl.as_host(model).tokenizer, esl.zoo.model_path("target")
    generator = torch.Generator().manual_seed(0)
    vectors = {
        f"blocks.{i}.hook_resid_post": torch.randn(model.config.hidden_size, generator=generator)
        for i in (1, 3)
    }
    plan = esl.SteeringPlan.from_vectors(vectors, coefficient=40.0, relative_to="unit")
    texts = [t for t in esl.zoo.neutral_texts(60) if len(t.split()) > 8]
    rows = [(" ".join(t.split()[:5]), " " + " ".join(t.split()[5:9])) for t in texts]
    plain = log_likelihoods(model, tokenizer, rows)
    with plan.hooks(model):
        steered = log_likelihoods(model, tokenizer, rows)
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        esl.export.to_lm_eval(plan, work / "steer.pt", model=model)
        (work / "rows.json").write_text(json.dumps(rows))
        args = [
            str(folder),
            str(work / "steer.pt"),
            str(work / "rows.json"),
            str(work / "out.json"),
        ]
        subprocess.run([python, "-c", INSIDE, *args], check=True)
        got = json.loads((work / "out.json").read_text())
    result = {
        "n_log_likelihoods": len(rows),
        "max_difference_nats_steered": float((torch.tensor(got["steered"]) - steered).abs().max()),
        "max_difference_nats_plain": float((torch.tensor(got["plain"]) - plain).abs().max()),
        "max_effect_nats": float((steered - plain).abs().max()),
        "versions": got["versions"],
    }
    pages.show_numbers(result, "consumer_lm_eval")


if __name__ == "__main__":
    main()
