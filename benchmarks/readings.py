"""Which state should stand for a labelled text? The target's own directions, and an expert's mapped
ones, from the same texts read in several ways.

    python benchmarks/fetch_real.py --out real-models smollm2 qwen domainsteer
    python benchmarks/readings.py --models real-models --shared ../shared \\
        --target smollm2 --expert qwen --block 18 --expert-block 12 --coefficient 0.1 \\
        --out benchmarks/results/readings_smollm2.csv

Tasks are the four development fields of the benchmark on fields of knowledge, and sentiment; no
field that is reported elsewhere is read. All directions are written to one block at one strength,
so what differs is how the texts were read. Block and strength are those that the benchmark chose on
the same four fields for means over the answer, which favours "answer" if anything. The readings
`-2` and `last` are the tokens that the template puts after an answer: among such tokens
arXiv 2602.00333 takes the one that attends most to the words that carry the concept; the last line
of the table's notes says which it would be here."""

from __future__ import annotations

import argparse
import pathlib
import time
from typing import Any

import pages
import pandas as pd
import torch
from torch import Tensor

import expertsteer_lens as esl
from expertsteer_lens.benchmarks.transfer.models import Maps, Meter, Side
from expertsteer_lens.benchmarks.transfer.real import read_real_data
from expertsteer_lens.benchmarks.transfer.tasks import Form, TransferTask
from expertsteer_lens.hosts.reading import read_tokens
from expertsteer_lens.learn.directions import mean_difference, random_direction

READINGS: tuple[str | int, ...] = ("answer", "attention", "mean", "last", -2)


def load(folder: pathlib.Path) -> Any:
    return esl.load_model(str(folder), host="huggingface", dtype="float32", device="cpu")


def states(side: Side, task: TransferTask, form: Form, hook: str) -> dict[str | int, Tensor]:
    """One row a text of the task's pairs, by reading; what `capture` gives, from two passes."""
    pairs = task.contrast_pairs(form)
    options = {"batch_size": side.batch_size}
    tokens = side.host.tokenize(pairs.texts)
    every = esl.capture(side.model, pairs.texts, [hook], positions="all", **options)[hook]
    parts = every.split(tokens.lengths.tolist())
    inside = read_tokens(side.host, pairs.texts, tokens, "answer", pairs.answer_spans).cpu()
    by_attention = esl.capture(
        side.model,
        pairs.texts,
        [hook],
        positions="attention",
        spans=pairs.answer_spans,
        **options,
    )
    answers = [x[mask[: len(x)]].mean(0) for x, mask in zip(parts, inside, strict=True)]
    return {
        "answer": torch.stack(answers),
        "attention": by_attention[hook],
        "mean": torch.stack([x.mean(0) for x in parts]),
        "last": torch.stack([x[-1] for x in parts]),
        -2: torch.stack([x[-2] for x in parts]),
    }


def rfm(rows: Tensor, labels: Tensor) -> Tensor:
    """The RFM direction; the two texts of a pair are on one side of its validation split."""
    return esl.fit_rfm(rows, labels, seed=0, groups=torch.arange(len(labels)) // 2).direction


@torch.no_grad()
def attention_to_answers(side: Side, task: TransferTask, form: Form, hook: str) -> dict[int, float]:
    """How much of their attention the last two tokens of the wanted texts pay to the answer: mean
    over heads and texts, at the block of the hook point."""
    host, layer = side.host, int(hook.split(".")[1])
    pairs = task.contrast_pairs(form)
    wanted = slice(0, None, 2)
    texts, spans = pairs.texts[wanted], pairs.answer_spans[wanted]
    tokens = host.tokenize(texts)
    inside = read_tokens(host, texts, tokens, "answer", spans)
    total: dict[int, float] = dict.fromkeys((-2, -1), 0.0)
    for i in range(len(texts)):
        part = tokens.part([i])
        n = int(part.lengths[0])

        def note(_: int, weights: Tensor, n: int = n, i: int = i) -> None:
            mass = weights[0, :, :, :n].float().mean(0) @ inside[i, :n].float()
            for place in total:
                total[place] += float(mass[n + place]) / len(texts)

        with host.attention_at([layer], note):
            host.forward(part, stop_at_layer=layer + 1)
    return total


def measure(args: argparse.Namespace, say: Any, done: Any) -> None:
    """All rows so far go to `done` after every task."""
    data = read_real_data(args.models, args.shared / "data", only=("sentiment",))
    tasks = (*data.development, *data.tasks)[: args.tasks]
    sides = {
        name: Side(name, load(args.models / name), 8)
        for name in (args.target, args.expert)
        if name is not None
    }
    target = sides[args.target]
    expert = None if args.expert is None else sides[args.expert]
    form: Form = "chat" if all(s.form == "chat" for s in sides.values()) else "plain"
    hook = f"blocks.{args.block}.hook_resid_post"
    there = f"blocks.{args.expert_block}.hook_resid_post"
    maps = None
    if expert is not None:
        maps = Maps(expert, target, data.anchors[: args.anchors], [there], hook, form, 0)
    rows, mass = [], {}
    for task in tasks:
        meter = Meter(target, task, hook, args.coefficient, list(data.neutral))
        labels = target.labels(task)
        if target.form == "chat":
            mass[task.name] = attention_to_answers(target, task, target.form, hook)
        aligner = None if maps is None else maps.fit([there], task)[there]
        own = states(target, task, target.form, hook)
        of_expert = {} if expert is None else states(expert, task, form, there)
        usual = mean_difference(own["answer"], labels)
        for reading in READINGS:
            directions = {
                "own mean difference": mean_difference(own[reading], labels),
                "own RFM": rfm(own[reading], labels),
            }
            if aligner is not None:
                mapped = aligner.encode(of_expert[reading])
                directions["expert, mapped mean difference"] = mean_difference(mapped, labels)
            for method, direction in directions.items():
                row = {"task": task.name, "reading": str(reading), "method": method}
                row |= meter.effect(direction)
                row["cosine"] = float(torch.cosine_similarity(direction, usual, dim=0))
                rows.append(row)
            say(
                f"{task.name}, {reading}: "
                + ", ".join(f"{r['effect']:+.3f}" for r in rows[-len(directions) :])
            )
        for seed in range(args.random):
            found = meter.effect(random_direction(target.host.d_model, seed=seed))
            row = {"task": task.name, "reading": "none", "method": "random", **found}
            rows.append(row)
        done(rows, mass)


def markdown(table: pd.DataFrame, mass: dict[str, dict[int, float]], command: str) -> str:
    """The table as it stands in the docs: means over tasks, with the smallest and largest."""
    methods = [m for m in dict.fromkeys(table["method"]) if m != "random"]
    shown = ["own mean difference", "beats 'answer'", *methods[1:], "cosine to 'answer'"]
    lines = pages.head("reading", *shown)
    of = {
        (method, reading): group.set_index("task")
        for (method, reading), group in table.groupby(["method", "reading"])
    }
    for reading in map(str, READINGS):
        cells = []
        for method in methods:
            found = of[method, reading]["effect"]
            cells.append(f"{found.mean():+.3f} [{found.min():+.3f}, {found.max():+.3f}]")
            if method == methods[0]:
                usual = of[method, "answer"]["effect"]
                won = int((found > usual).sum())
                cells.append("" if reading == "answer" else f"{won} of {len(found)}")
        cells.append(f"{of[methods[0], reading]['cosine'].mean():.2f}")
        lines.append(pages.row(reading, *cells))
    floor = table[table["method"] == "random"]["effect"]
    lines += [
        "",
        f"Effect: nats per answer token, wanted minus unwanted, mean over {table.task.nunique()} "
        f"tasks [smallest, largest]. {len(floor)} random directions of equal norm: mean "
        f"{floor.mean():+.3f}, from {floor.min():+.3f} to {floor.max():+.3f}.",
    ]
    if mass:
        share = {p: sum(m[p] for m in mass.values()) / len(mass) for p in (-2, -1)}
        most = max(share, key=share.__getitem__)
        n_most = sum(max(m, key=m.__getitem__) == most for m in mass.values())
        lines += [
            "",
            "Attention to the answer, mean over heads, texts and tasks: "
            f"{share[-2]:.3f} by token -2, {share[-1]:.3f} by the last. The rule of arXiv "
            f"2602.00333, asked of these two, reads token {most} in {n_most} of {len(mass)} tasks.",
        ]
    return "\n".join([*lines, "", f"Command: `{command}`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=pathlib.Path, default=pathlib.Path("real-models"))
    parser.add_argument("--shared", type=pathlib.Path, default=pathlib.Path("../shared"))
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--expert", help="its mapped direction is measured too")
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("--expert-block", type=int, default=0)
    parser.add_argument("--coefficient", type=float, default=0.1, help="in median norms")
    parser.add_argument("--anchors", type=int, default=40)
    parser.add_argument("--tasks", type=int, default=5, help="the first so many")
    parser.add_argument("--random", type=int, default=2, help="directions a task")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)

    with_expert = (
        ""
        if args.expert is None
        else (f" --expert {args.expert} --expert-block {args.expert_block}")
    )
    command = (
        f"python benchmarks/readings.py --target {args.target}{with_expert} --block {args.block} "
        f"--coefficient {args.coefficient:g} --tasks {args.tasks} --out {args.out}"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def done(rows: list[dict], mass: dict[str, dict[int, float]]) -> None:
        table = pd.DataFrame(rows)
        table.to_csv(args.out, index=False, float_format="%.5g")
        pages.keep(markdown(table, mass, command), args.out.with_suffix(".md"))

    measure(args, say, done)
    print(args.out.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
