"""What reading states costs: `capture` beside bare forward passes of the same batches, and beside
the recipes people write by hand.

    python benchmarks/capture_speed.py --output benchmarks/results/capture_speed.md \\
        --models ../shared/models/stories260k ../shared/models/tinystories-ple-d160 \\
        real-models/smollm2

Texts are questions of a file of JSON lines, whole and cut after their first sentence in turn, so
that lengths are mixed. All ways run in one process, in turn, `--repeats` times; the table has
medians. "bare" is the host's own pass over our batches without a hook, its output head applied to
one token; "bare, all logits" applies it to all of them, as `model(...)` does. Both are given the
tokens, while `capture` and the recipes tokenise. `capture` reads every layer's output. The recipes
pad all texts to the longest: `output_hidden_states=True` on Hugging Face, `run_with_cache` of the
same hook points on a TransformerBridge, and then take the last token. With steering-vectors
installed (`pip install --no-deps steering-vectors`), how it reads texts stands beside them, in its
default batches of one pair and in batches of eight pairs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pages
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import HostError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.hosts.batching import TOKENS_PER_PASS, length_batches
from expertsteer_lens.hosts.parts import TokenBatch


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", required=True, help="folders of models")
    parser.add_argument("--texts", default="../shared/data/gsm8k/test.jsonl")
    parser.add_argument("--n", type=int, nargs="+", default=[96], help="texts, of each model")
    parser.add_argument("--hosts", nargs="+", default=["huggingface", "transformer_lens"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--tokens-per-pass", type=int, default=TOKENS_PER_PASS)
    parser.add_argument("--output", type=pathlib.Path)
    return parser.parse_args()


def mixed_texts(path: str, n: int) -> list[str]:
    with open(path, encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in file][:n]
    return [q if i % 2 else q.split(". ")[0] + "." for i, q in enumerate(questions)]


def one_padded_batch(model: Any, host: Any, texts: list[str]) -> Callable[[], Any]:
    def run() -> Any:
        batch = host.tokenize(texts)
        last = batch.lengths - 1
        rows = torch.arange(len(texts), device=last.device)
        if host.kind == "huggingface":
            out = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                output_hidden_states=True,
                use_cache=False,
            )
            return [h[rows, last].float().cpu() for h in out.hidden_states[1:]]
        _, cache = model.run_with_cache(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            names_filter=lambda name: name.endswith("hook_resid_post"),
        )
        return [cache[name][rows, last].float().cpu() for name in host.hook_names()]

    return run


def by_steering_vectors(model: Any, host: Any, texts: list[str]) -> dict[str, Callable[[], Any]]:
    """How that package reads the last token of pairs, if it is installed: two passes a batch."""
    if host.kind != "huggingface" or importlib.util.find_spec("steering_vectors") is None:
        return {}
    from steering_vectors.train_steering_vector import extract_activations

    version = importlib.metadata.version("steering-vectors")
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    return {
        f"steering-vectors {version}, `batch_size={n}`": partial(
            extract_activations, model, host.tokenizer, pairs, move_to_cpu=True, batch_size=n
        )
        for n in (1, 8)
    }


def bare(host: Any, passes: list[TokenBatch], *, all_logits: bool) -> Callable[[], Any]:
    def run() -> None:
        for batch in passes:
            if all_logits:
                host.forward(batch)
                continue
            one = torch.zeros_like(batch.input_ids, dtype=torch.bool)
            one[0, 0] = True
            host.logits_at(batch, one)

    return run


def measured(ways: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, Any]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):  # the first is not counted: caches, lazy imports
        for name, run in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: tuple(statistics.median(t[i] for t in found) for i in (0, 1))
        for name, found in times.items()
    }


@torch.no_grad()
def rows_of(args: argparse.Namespace, folder: str, n: int, kind: str) -> list[str]:
    try:
        model = esl.load_model(
            folder,
            host=kind,
            dtype=args.dtype,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
        )
    except (ValueError, HostError) as error:  # TransformerLens does not know every architecture
        reason = str(error).split(".")[0][:80]
        return [f"| {pathlib.Path(folder).name} | {kind} | not loaded: {reason} | | | | | |"]
    host, texts = as_host(model), mixed_texts(args.texts, n)
    tokens = host.tokenize(texts)
    batches = length_batches(
        tokens.lengths.tolist(), batch_size=None, tokens_per_pass=args.tokens_per_pass
    )
    passes = []
    for index in batches:
        width = int(tokens.lengths[index].max())
        passes.append(
            TokenBatch(tokens.input_ids[index, :width], tokens.attention_mask[index, :width])
        )

    def captured(positions: str) -> Callable[[], Any]:
        return lambda: esl.capture(
            model, texts, positions=positions, tokens_per_pass=args.tokens_per_pass
        )

    ways = {
        "bare": bare(host, passes, all_logits=False),
        "bare, all logits": bare(host, passes, all_logits=True),
        "`capture`, last token": captured("last"),
        "`capture`, mean over tokens": captured("mean"),
        "`capture`, `batch_size=16`": lambda: esl.capture(model, texts, batch_size=16),
        "one padded batch by hand": one_padded_batch(model, host, texts),
    }
    ways |= by_steering_vectors(model, host, texts)
    found = measured(ways, args.repeats, args.device)
    real, padded = int(tokens.lengths.sum()), sum(b.input_ids.numel() for b in passes)
    most = len(texts) * int(tokens.lengths.max())
    clock = 1 if args.device == "cpu" else 0
    return [
        f"| {pathlib.Path(folder).name} | {host.kind} | {name} | {cpu:.3f} | {wall:.3f} | "
        f"{real / (cpu if clock else wall):.0f} | "
        f"{found['bare'][clock] / (cpu if clock else wall):.2f} | "
        f"{'' if name.startswith('steering') else most if 'hand' in name else padded} |"
        for name, (wall, cpu) in found.items()
    ]


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    sizes = args.n if len(args.n) == len(args.models) else args.n[:1] * len(args.models)
    rows = [
        row
        for folder, n in zip(args.models, sizes, strict=True)
        for kind in args.hosts
        for row in rows_of(args, folder, n, kind)
    ]
    names = " ".join(pathlib.Path(m).name for m in args.models)
    where = "cuda: " + torch.cuda.get_device_name() if args.device != "cpu" else platform.machine()
    lines = [
        f"`python benchmarks/capture_speed.py --models {names} --n {' '.join(map(str, sizes))} "
        f"--repeats {args.repeats} --threads {args.threads} --device {args.device}`: texts of mixed "
        f"length, {args.dtype}, all layers; at most {args.tokens_per_pass} tokens a pass; medians; "
        f"torch {torch.__version__}, {where}, load average before the run {load:.1f}.",
        "",
        *pages.head(
            "model",
            "host",
            "way",
            "CPU s",
            "wall s",
            f"tokens a {'CPU ' if args.device == 'cpu' else ''}second",
            "speed / bare",
            "tokens run, padding included",
        ),
        *rows,
    ]
    pages.show("\n".join(lines), args.output)


if __name__ == "__main__":
    main()
