"""The four steps between two real language models: expert, self, floor, native ceiling.

    python benchmarks/fetch_real.py --out real-models smollm2 qwen
    python benchmarks/real_sentiment.py --models real-models --shared ../shared \\
        --out benchmarks/results/real_sentiment.csv

Qwen2.5-Coder-0.5B-Instruct teaches SmolLM2-135M-Instruct to answer warmly. 30 labelled pairs, 10
validation questions, 20 test questions (other questions, read once), each with a warm and a cold
answer of at most 24 words; anchors are worked problems. The weights were 4-bit before they were
made float32 or bfloat16. "Self" is the target as its own expert through the same steps.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import pages
import pandas as pd

import expertsteer_lens as esl

N_WORDS = 24


def short(text: str) -> str:
    return " ".join(text.split()[:N_WORDS])


def read_data(shared: pathlib.Path, n_anchors: int) -> dict:
    """Pairs, anchors, neutral texts, validation and test prompts; no text is in two of them."""
    lines = (shared / "data/steerkit_pairs/sentiment.jsonl").read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    lines = (shared / "data/gsm8k/test.jsonl").read_text("utf-8").split("\n")
    worked = [json.loads(line) for line in lines[: n_anchors + 24] if line]
    chats = [esl.Chat.ask(r["question"], r["answer"]) for r in worked]

    def behaviour(part: list[dict]) -> esl.Behaviour:
        return esl.Behaviour(
            [esl.Chat.ask(r["prompt"]) for r in part],
            [[short(r["positive_response"])] for r in part],
            [[short(r["negative_response"])] for r in part],
        )

    return {
        "pairs": esl.ContrastPairs.from_lists(
            [esl.Chat.ask(r["prompt"], short(r["positive_response"])) for r in rows[:30]],
            [esl.Chat.ask(r["prompt"], short(r["negative_response"])) for r in rows[:30]],
        ),
        "anchors": chats[:n_anchors],
        "neutral": chats[n_anchors:],
        "behaviour": behaviour(rows[30:40]),
        "test_behaviour": behaviour(rows[40:]),
    }


def markdown(table: pd.DataFrame, verdict: str, command: str) -> str:
    """The table as it stands in the docs."""
    lines = [
        *pages.head(
            "direction",
            "coefficient",
            "effect, nats",
            "per completion token",
            "warm answer likelier",
            "wrong way",
            "neutral NLL",
        ),
    ]
    for row in table.itertuples():
        spread = (
            f" ± {row.sd:.2f} ({row.n})" if row.n > 1 else f" [{row.low:+.1f}, {row.high:+.1f}]"
        )
        cells = [
            row.method,
            f"{row.coefficient:g}",
            f"{row.effect:+.2f}" + ("" if row.role == "base" else spread),
            f"{row.effect_per_token:+.3f}",
            f"{row.accuracy:.0%}",
            f"{row.wrong_way:.0%}",
            f"{row.nll_rise:+.3f}",
        ]
        lines.append(pages.row(*cells))
    return "\n".join([*lines, "", verdict, "", f"Command: `{command}`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=pathlib.Path, default=pathlib.Path("real-models"))
    parser.add_argument("--shared", type=pathlib.Path, default=pathlib.Path("../shared"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--anchors", type=int, default=60)
    parser.add_argument("--random", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    data = read_data(args.shared, args.anchors)
    target, expert = (
        esl.load_model(str(args.models / name), host="huggingface", dtype=args.dtype, device="cpu")
        for name in ("smollm2", "qwen")
    )
    started = time.perf_counter()
    fit = esl.ExpertSteer().fit(expert, target, **data)
    print(fit.summary(), f"\n{time.perf_counter() - started:.0f} s", flush=True)
    del expert
    own = esl.ExpertSteer().fit(target, target, **data)
    plan = fit.plan()
    result = esl.evaluate(
        plan, target, fit=fit, compare={"self": own.plan()}, n_random=args.random, n_shuffles=2
    )
    print(result.verdict, f"\n{time.perf_counter() - started:.0f} s")
    table: pd.DataFrame = result.to_pandas()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False)
    command = f"python benchmarks/real_sentiment.py --dtype {args.dtype} --out {args.out}"
    pages.show(markdown(table, result.verdict, command), args.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
