"""At which block a direction is best written, on real models.

    python benchmarks/fetch_real.py --out real-models smollm2 gemma3 domainsteer
    python benchmarks/write_blocks.py --models real-models --shared ../shared --target smollm2 \\
        --learnt 18 --dtype bfloat16 --out benchmarks/results/write_blocks_smollm2.md

The target's own mean difference of 30 labelled pairs, learnt at one block and written to others, in
the four development fields of the benchmark on fields of knowledge; no field that is reported
elsewhere is read. `measure.place` finds the largest strength within the budget at each block, for
each field.
"""

from __future__ import annotations

import argparse
import pathlib

import pages
import torch

import expertsteer_lens as esl
from expertsteer_lens.benchmarks.transfer.models import Side, steered
from expertsteer_lens.benchmarks.transfer.real import read_real_data
from expertsteer_lens.learn.directions import mean_difference
from expertsteer_lens.measure import place
from expertsteer_lens.measure.neutral import NeutralTexts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=pathlib.Path, default=pathlib.Path("real-models"))
    parser.add_argument("--shared", type=pathlib.Path, default=pathlib.Path("../shared"))
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--learnt", type=int, default=18)
    parser.add_argument("--blocks", type=int, nargs="*", help="default: ten, evenly")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    data = read_real_data(args.models, args.shared / "data", only=("3201",))
    model = esl.load_model(str(args.models / args.target), host="huggingface", dtype=args.dtype)
    side = Side(args.target, model, 16)
    neutral = NeutralTexts(side.host, list(data.neutral))
    n = len(side.hooks)
    blocks = args.blocks or [round(1 + i * (n - 3) / 9) for i in range(10)]
    names = [f"blocks.{b}.hook_resid_post" for b in sorted({*blocks, args.learnt})]
    own = f"blocks.{args.learnt}.hook_resid_post"
    found = []
    for task in data.development:
        states = side.states(task)
        direction = mean_difference(states[own], side.labels(task))
        norms = {name: states.median_norm(name) for name in names}
        plan = steered(side, own, direction, 0.1, norms[own])
        placed = place(
            plan,
            model,
            task.behaviour(side.form),
            neutral,
            median_norms=norms,
            budget=args.budget,
        )
        print(task.name, placed, flush=True)
        found.append({row["hook_name"]: row for row in placed.rows})
    lines = [
        f"`python benchmarks/write_blocks.py --target {args.target} --learnt {args.learnt} --dtype "
        f"{args.dtype}`: {len(found)} development fields, budget {args.budget:g} nats a token; "
        f"torch {torch.__version__}.",
        "",
        *pages.head("written to block", "effect, nats", "by field", "strength", "neutral NLL"),
    ]
    for name in names:
        rows = [of_task[name] for of_task in found]
        if not all("effect" in row for row in rows):
            lines.append(pages.row(name.split(".")[1], "over budget at any strength", "", "", ""))
            continue

        def mean(key: str, rows: list[dict[str, float]] = rows) -> float:
            return sum(row[key] for row in rows) / len(rows)

        mark = " (learnt here)" if name == own else ""
        lines.append(
            pages.row(
                name.split(".")[1] + mark,
                f"{mean('effect'):+.2f}",
                ", ".join(f"{row['effect']:+.2f}" for row in rows),
                f"{mean('coefficient'):.3g}",
                f"{mean('cost'):+.3f}",
            )
        )
    pages.show("\n".join(lines), args.out)


if __name__ == "__main__":
    main()
