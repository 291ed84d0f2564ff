"""What a fit and its evaluation cost on real models, beside one bare pass of both models.

    python benchmarks/fetch_real.py --out real-models smollm2 qwen
    python benchmarks/real_costs.py --models real-models --shared ../shared \\
        --out benchmarks/results/real_costs.md

The bare pass is `model(**batch)` with all its logits, once over every text that the model reads in
the fit and in the evaluation, in the batches that reading makes. Times are CPU seconds of the
process, all in one run, so that ratios hold on a busy machine. 40 labelled pairs of sentiment, 350
worked problems as anchors (a tenth of them held out), 20 prompts with one warm and one cold answer.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import resource
import time
from collections.abc import Sequence
from typing import Any

import pages
import torch

import expertsteer_lens as esl
from expertsteer_lens.hosts import Host, as_host
from expertsteer_lens.hosts.batching import length_batches
from expertsteer_lens.hosts.parts import TokenBatch


def read_data(shared: pathlib.Path, n_pairs: int, n_anchors: int, n_prompts: int) -> dict[str, Any]:
    """Pairs, anchors and prompts, as conversations."""
    lines = (shared / "data/steerkit_pairs/sentiment.jsonl").read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    lines = (shared / "data/gsm8k/test.jsonl").read_text("utf-8").split("\n")
    worked = [json.loads(line) for line in lines[:n_anchors] if line]
    labelled, asked = rows[:n_pairs], rows[n_pairs : n_pairs + n_prompts]
    return {
        "pairs": esl.ContrastPairs.from_lists(
            [esl.Chat.ask(r["prompt"], r["positive_response"]) for r in labelled],
            [esl.Chat.ask(r["prompt"], r["negative_response"]) for r in labelled],
        ),
        "anchors": [esl.Chat.ask(r["question"], r["answer"]) for r in worked],
        "behaviour": esl.Behaviour(
            [esl.Chat.ask(r["prompt"]) for r in asked],
            [[r["positive_response"]] for r in asked],
            [[r["negative_response"]] for r in asked],
        ),
    }


def asked_texts(behaviour: esl.Behaviour) -> list[Any]:
    """Every prompt with every completion."""
    return [
        prompt + completion
        for i, prompt in enumerate(behaviour.prompts)
        for side in behaviour.completions(i)
        for completion in side
    ]


@torch.no_grad()
def bare_pass(host: Host, texts: Sequence[Any]) -> tuple[float, int]:
    """(CPU seconds, tokens) of one pass over the texts, all logits included."""
    tokens = host.tokenize(list(texts))
    started = time.process_time()
    for index in length_batches(tokens.lengths.tolist(), batch_size=None):
        width = int(tokens.lengths[index].max())
        host.forward(
            TokenBatch(tokens.input_ids[index, :width], tokens.attention_mask[index, :width])
        )
    return time.process_time() - started, int(tokens.lengths.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=pathlib.Path, default=pathlib.Path("real-models"))
    parser.add_argument("--shared", type=pathlib.Path, default=pathlib.Path("../shared"))
    parser.add_argument("--expert", default="qwen")
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--anchors", type=int, default=350)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = read_data(args.shared, args.pairs, args.anchors, args.prompts)
    expert, target = (
        as_host(
            esl.load_model(
                str(args.models / name), host="huggingface", dtype=args.dtype, device=args.device
            )
        )
        for name in (args.expert, args.target)
    )
    read = [*data["pairs"].texts, *data["anchors"]]
    bare_e, n_e = bare_pass(expert, read)
    bare_t, n_t = bare_pass(target, [*read, *asked_texts(data["behaviour"])])
    bare = bare_e + bare_t
    rows = [
        ("bare pass, expert", bare_e, f"{n_e} tokens"),
        ("bare pass, target", bare_t, f"{n_t} tokens"),
    ]
    started = last = time.process_time()

    def step(figures: dict[str, Any]) -> None:
        nonlocal last
        now = time.process_time()
        rows.append((f"fit: {figures['step']}", now - last, ""))
        print(figures, f"{now - last:.1f} CPU s", flush=True)
        last = now

    fit = esl.ExpertSteer().fit(expert, target, **data, on_step=step)
    plan = fit.plan()
    rows.append(("fit: calibration", time.process_time() - last, ""))
    rows.append(("**fit with calibration**", time.process_time() - started, ""))
    started = time.process_time()
    result = esl.evaluate(plan, target, fit=fit)
    rows.append(("**evaluate**", time.process_time() - started, f"{len(result.rows)} rows"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [
        f"`python benchmarks/real_costs.py --expert {args.expert} --target {args.target} --pairs "
        f"{args.pairs} --anchors {args.anchors} --prompts {args.prompts} --dtype {args.dtype} "
        f"--threads {args.threads}`: torch {torch.__version__}, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}; peak memory {peak:.1f} GiB.",
        "",
        *pages.head("part", "CPU s", "bare passes of both models", ""),
        *(f"| {name} | {s:.1f} | {s / bare:.2f} | {note} |" for name, s, note in rows),
        "",
        result.verdict,
    ]
    pages.show("\n".join(lines), args.out)


if __name__ == "__main__":
    main()
