"""A whole fit on two models of the shape of 8B ones, with random weights: time and memory of every
step, beside what `cost_8b.py` expects.

    python benchmarks/end_to_end_8b.py --device cuda --output benchmarks/results/end_to_end_8b.md
    python benchmarks/end_to_end_8b.py --small                 # the same in small, on a CPU

Nothing is downloaded: the weights are drawn on the device, the tokenizer and the texts are those of
the bundled models, so what the directions are worth is not measured, only what they cost. Steps are
timed with the device's queue empty; "GPU" is the most that torch had allocated on the device within
the step, "host" the kernel's high-water mark of the process.
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import time
from dataclasses import dataclass
from typing import Any

import pages
import torch
from cost_8b import GIB, Shape, Work, memory, seconds
from fit_memory import peak_since_last

import expertsteer_lens as esl

EXPERT = Shape("expert, Llama-3-8B shape", 8.03e9, 32, 4096, 14336, 32, 8, 128_256)
TARGET = Shape("target, 28 blocks", 7.35e9, 28, 4096, 14336, 32, 8, 151_936)
SMALL = (
    Shape("expert, small", 0.4e6, 4, 64, 128, 4, 2, 1000),
    Shape("target, small", 0.4e6, 5, 64, 128, 4, 2, 1000),
)
WORDS_TO_TOKENS = 45
"""Tokens of a story of the bundled world, about; texts are made of as many stories as they need."""


@dataclass(frozen=True)
class Texts:
    """How many of what."""

    pairs: int = 256
    """512 labelled texts."""
    anchors: int = 1024
    prompts: int = 64
    tokens: int = 150


def model_of(shape: Shape, seed: int, *, device: str, dtype: torch.dtype, host: str) -> Any:
    """A Llama of this shape with random weights, made on the device."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from expertsteer_lens.hosts.loading import wrap_model

    tokenizer = AutoTokenizer.from_pretrained(str(esl.zoo.model_path("target")))
    config = LlamaConfig(
        hidden_size=shape.d,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=max(shape.vocab, len(tokenizer)),
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return wrap_model(model, tokenizer, host=host, name=shape.name)


def texts_of(size: Texts) -> tuple[Any, list[str], Any]:
    """Pairs, anchors and prompts, each text of about `size.tokens` tokens."""
    more = max(0, round(size.tokens / WORDS_TO_TOKENS) - 1)

    def longer(texts: Any, seed: int) -> list[str]:
        stories = iter(esl.zoo.anchors(more * len(texts) + 1, seed=seed))
        return [" ".join([*(next(stories) for _ in range(more)), text]) for text in texts]

    pairs, prompts = esl.zoo.contrast_pairs(size.pairs), esl.zoo.behaviour(size.prompts)
    return (
        esl.ContrastPairs.from_lists(longer(pairs.positive, 1), longer(pairs.negative, 1)),
        longer(esl.zoo.anchors(size.anchors), 2),
        esl.Behaviour(longer(prompts.prompts, 3), prompts.positive, prompts.negative),
    )


class Meter:
    """Seconds and peaks since the last step."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.device, self.rows = device, list[tuple[str, float, float, float]]()
        self.start()

    def start(self) -> None:
        """Begin a step."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        peak_since_last()
        self._started = time.perf_counter()

    def done(self, step: str) -> None:
        """End a step."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        took = time.perf_counter() - self._started
        gpu = torch.cuda.max_memory_allocated(self.device) / GIB if self.cuda else float("nan")
        self.rows.append((step, took, gpu, peak_since_last() / GIB))
        self.start()


def measure(args: argparse.Namespace, shapes: tuple[Shape, Shape], size: Texts) -> Meter:
    """Load, fit, calibrate and, if asked for, evaluate."""
    meter = Meter(args.device)
    how = {"device": args.device, "dtype": getattr(torch, args.dtype), "host": args.host}
    expert, target = (model_of(shape, i, **how) for i, shape in enumerate(shapes))
    meter.done("models made")
    pairs, anchors, behaviour = texts_of(size)
    meter.start()
    steer = esl.ExpertSteer(esl.ExpertSteerConfig(pair_tokens=args.token_pairs))
    fit = steer.fit(
        expert,
        target,
        pairs,
        anchors=anchors,
        behaviour=behaviour,
        on_step=lambda step: meter.done(step["step"]),
    )
    plan = fit.plan(coefficient=0.1 if args.no_strength else "auto")
    meter.done("strength")
    if args.evaluate:
        esl.evaluate(plan, target, fit=fit)
        meter.done("evaluation")
    return meter


def report(args: argparse.Namespace, shapes: tuple[Shape, Shape], size: Texts, meter: Meter) -> str:
    """The measured steps, and the model's."""
    expert, target = shapes
    work = Work(pairs=size.pairs, anchors=size.anchors, prompts=size.prompts, tokens=size.tokens)
    name = torch.cuda.get_device_name(args.device) if meter.cuda else platform.machine()
    lines = [
        f"`python benchmarks/end_to_end_8b.py{args.said}`: {expert.name} ({expert.layers} blocks, "
        f"d = {expert.d}) and {target.name} ({target.layers} blocks, d = {target.d}), random "
        f"weights in {args.dtype}, {args.host} host; {2 * size.pairs} labelled texts, "
        f"{size.anchors} anchors, {size.prompts} prompts, about {size.tokens} tokens each; maps on "
        f"{'token pairs' if args.token_pairs else 'one state a text'}. {name}, torch "
        f"{torch.__version__}.",
        "",
        *pages.head("step", "seconds", "GPU, GiB", "host, GiB"),
    ]
    lines += [
        f"| {step} | {took:.1f} | {'' if gpu != gpu else f'{gpu:.1f}'} | {host:.1f} |"
        for step, took, gpu, host in meter.rows
    ]
    total = sum(took for _, took, _, _ in meter.rows)
    lines += [f"| **total** | **{total:.1f}** | | |", "", "`cost_8b.py` for the same work:", ""]
    lines += pages.head("what", "expected")
    lines += [f"| {w} | {value / GIB:.2f} GiB |" for w, _, value in memory(work, expert, target)]
    lines += [f"| {w} | {value:.1f} s |" for w, _, value in seconds(work, expert, target)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> str:
    """Measure, print, and give what was printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--host", default="transformer_lens")
    parser.add_argument("--small", action="store_true", help="small models and few texts")
    parser.add_argument("--pairs", type=int, help="default 256, with --small 16")
    parser.add_argument("--anchors", type=int, help="default 1024, with --small 48")
    parser.add_argument("--prompts", type=int, help="default 64, with --small 8")
    parser.add_argument("--tokens", type=int, help="of a text, about; default 150, small 45")
    parser.add_argument(
        "--token-pairs",
        action="store_true",
        help="maps on token pairs, the default of a fit on two loaded models; at d = 4096 their "
        "moments take 15 GiB of the host's memory (docs/recipe_8b.md)",
    )
    parser.add_argument("--no-strength", action="store_true", help="leave the calibration out")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the plan too")
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args(arguments)
    given = {k: v for k, v in vars(args).items() if k != "output" and v != parser.get_default(k)}
    args.said = "".join(
        f" --{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in given.items()
    )
    usual = Texts(pairs=16, anchors=48, prompts=8, tokens=45) if args.small else Texts()
    size = Texts(
        **{k: v if getattr(args, k) is None else getattr(args, k) for k, v in vars(usual).items()}
    )
    shapes = SMALL if args.small else (EXPERT, TARGET)
    text = report(args, shapes, size, measure(args, shapes, size))
    pages.show(text, args.output)
    return text


if __name__ == "__main__":
    main()
