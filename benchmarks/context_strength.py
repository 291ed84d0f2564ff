"""A fixed strength against one that each token's activation decides, at one budget.

    python benchmarks/fetch_real.py --out real-models smollm2 qwen domainsteer
    python benchmarks/context_strength.py --out context_strength.csv --tasks sentiment
    python benchmarks/context_strength.py --out context_strength.csv --direction own \\
        --at blocks.13.hook_resid_post --tasks 4605

SmolLM2-135M-Instruct answers warmly, or gives a word the sense of a field of knowledge (development
fields only). Directions: "expert" is the mapped one of Qwen2.5-Coder-0.5B-Instruct; "own", the
target's own mean difference; "random", what a learnt strength gives to any direction. The direction
is learnt on some pairs, the strength on validation questions and neutral texts, and the questions
of the table are read once. Both strengths are the largest within the budget on the same held-out
calibration texts. Rows that the file has already are kept. One thread, float32.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

import pages
import pandas as pd
import torch

import expertsteer_lens as esl
from expertsteer_lens.benchmarks.transfer.tasks import DEVELOPMENT_FIELDS, read_field, shown
from expertsteer_lens.hosts import as_host
from expertsteer_lens.learn.directions import mean_difference
from expertsteer_lens.measure import fit_context_strength
from expertsteer_lens.measure.intervals import bootstrap_draws, mean_interval
from expertsteer_lens.measure.neutral import NeutralTexts
from expertsteer_lens.measure.prepared import Completions

N_WORDS, N_NEUTRAL_WORDS = 12, 24
N_PAIRS, N_VALIDATION, N_TEST = 14, 10, 20
N_CALIBRATION, N_NEUTRAL = 12, 12
KEYS = ("question", "positive", "negative")
CONFIG = esl.ExpertSteerConfig(
    mi=esl.MIConfig(n_permutations=2, n_bootstrap=5, n_components=4),
    pairing=esl.PairingConfig(n_candidates=3),
)


def short(text: str, n_words: int = N_WORDS) -> str:
    return " ".join(text.split()[:n_words])


def behaviour(rows: list[dict[str, Any]]) -> esl.Behaviour:
    """Questions with one wanted and one unwanted answer each."""
    return esl.Behaviour(
        [shown(r["question"], None, "chat") for r in rows],
        [[short(r["positive"])] for r in rows],
        [[short(r["negative"])] for r in rows],
    )


def read_task(task: str, models: pathlib.Path, shared: pathlib.Path) -> Any:
    """(name, pairs, validation, test) of "sentiment" or a field's code; rows of a question and two
    answers."""
    cut = N_PAIRS + N_VALIDATION
    if task == "sentiment":
        lines = (shared / "data/steerkit_pairs/sentiment.jsonl").read_text("utf-8").split("\n")
        found = [json.loads(line) for line in lines if line]
        names = ("prompt", "positive_response", "negative_response")
        pairs = [dict(zip(KEYS, (r[n] for n in names), strict=True)) for r in found]
        return task, pairs[:N_PAIRS], pairs[N_PAIRS:cut], pairs[cut : cut + N_TEST]
    if task not in DEVELOPMENT_FIELDS:
        raise SystemExit(f"--tasks {task}: give 'sentiment' or one of {list(DEVELOPMENT_FIELDS)}.")
    field = read_field(models / "domainsteer", task)
    pairs, tests = (
        [dict(zip(KEYS, (r.question, r.positive[0], r.negative[0]), strict=True)) for r in part]
        for part in (field.pairs, field.tests)
    )
    return f"field {task}", pairs[:N_PAIRS], pairs[N_PAIRS:cut], tests[:N_TEST]


def worked_problems(shared: pathlib.Path, n: int) -> list[esl.Chat]:
    lines = (shared / "data/gsm8k/test.jsonl").read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines[:n] if line]
    return [
        esl.Chat.ask(short(r["question"], N_NEUTRAL_WORDS), short(r["answer"], N_NEUTRAL_WORDS))
        for r in rows
    ]


def load(models: pathlib.Path, name: str) -> Any:
    return esl.load_model(str(models / name), host="huggingface", dtype="float32", device="cpu")


def own_plan(target: Any, pairs: esl.ContrastPairs, hook: str, neutral: list[esl.Chat]) -> Any:
    """The target's own mean difference of the answers' mean states."""
    states = esl.capture(
        target,
        pairs.texts,
        [hook],
        labels=pairs.labels,
        positions="answer",
        spans=pairs.answer_spans,
    )
    norms = esl.capture(target, neutral, [hook])
    return esl.SteeringPlan.from_vectors(
        {hook: mean_difference(states[hook], states.labels)}, coefficient=0.1, median_norms=norms
    )


def compared(
    kind: str, plan: Any, target: Any, data: dict[str, Any], steps: int, budget: float
) -> dict[str, Any]:
    """One row: both strengths of one direction on the test questions."""
    host, started = as_host(target), time.perf_counter()
    found = fit_context_strength(
        plan, target, data["behaviour"], data["calibration"], budget=budget, n_steps=steps
    )
    test, neutral = Completions(host, data["test_behaviour"]), NeutralTexts(host, data["neutral"])
    base = test.scores().log_odds()
    fixed, learnt = (test.scores(p).log_odds() - base for p in (found.fixed, found.learnt))
    draws = bootstrap_draws(len(base), 2000, 0)
    row: dict[str, Any] = {"direction": kind, "hook": plan.vectors[0].hook_name}
    for name, change in (("fixed", fixed), ("learnt", learnt), ("gain", learnt - fixed)):
        row[name] = float(change.mean())
        row[f"{name}_low"], row[f"{name}_high"] = mean_interval(change, draws)
    row |= {
        "fixed_coefficient": found.fixed.vectors[0].coefficient,
        "learnt_coefficient": found.learnt.vectors[0].coefficient,
        "fixed_nll": neutral.cost(found.fixed, kl=False)[0],
        "learnt_nll": neutral.cost(found.learnt, kl=False)[0],
        "validation_gain": found.gain,
        "validation_gain_se": found.gain_se,
        "kept": "learnt" if found.beats_fixed else "fixed",
        "best_step": found.best_step,
        "n_test": len(base),
        "seconds": time.perf_counter() - started,
    }
    print(found.to_pandas().to_string(), flush=True)
    return row


def markdown(table: pd.DataFrame) -> str:
    """The table as it stands in the docs."""
    lines = [
        *pages.head(
            "task",
            "direction",
            "fixed strength, nats",
            "by context, nats",
            "difference on test questions",
            "on held-out validation",
            "kept",
            "neutral NLL, fixed / by context",
        ),
    ]
    for r in table.itertuples():
        cells = [
            f"{r.task} ({r.n_test})",
            f"{r.direction}, {r.hook.split('.')[1]}",
            f"{r.fixed:+.2f} [{r.fixed_low:+.1f}, {r.fixed_high:+.1f}]",
            f"{r.learnt:+.2f} [{r.learnt_low:+.1f}, {r.learnt_high:+.1f}]",
            f"{r.gain:+.2f} [{r.gain_low:+.2f}, {r.gain_high:+.2f}]",
            f"{r.validation_gain:+.2f} ± {r.validation_gain_se:.2f}",
            r.kept,
            f"{r.fixed_nll:+.3f} / {r.learnt_nll:+.3f}",
        ]
        lines.append(pages.row(*cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=pathlib.Path, default=pathlib.Path("real-models"))
    parser.add_argument("--shared", type=pathlib.Path, default=pathlib.Path("../shared"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["sentiment", "4605", "3206"])
    parser.add_argument("--direction", choices=("expert", "own", "random"), default="expert")
    parser.add_argument("--at", metavar="HOOK", help="where, for the directions own and random")
    parser.add_argument("--anchors", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--budget", type=float, default=0.1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chats = worked_problems(args.shared, args.anchors + N_CALIBRATION + N_NEUTRAL)
    texts = {"calibration": chats[args.anchors : -N_NEUTRAL], "neutral": chats[-N_NEUTRAL:]}
    target = load(args.models, "smollm2")
    if (args.at is None) != (args.direction == "expert"):
        raise SystemExit("--at goes with --direction own and random; an expert's fit chooses it.")
    expert = load(args.models, "qwen") if args.direction == "expert" else None
    before = pd.read_csv(args.out).to_dict("records") if args.out.exists() else []
    rows: dict[tuple[str, str], dict[str, Any]] = {(r["task"], r["direction"]): r for r in before}

    def measure(kind: str, name: str, plan: Any, data: dict[str, Any]) -> None:
        row = {"task": name} | compared(kind, plan, target, data, args.steps, args.budget)
        print(row, flush=True)
        rows[name, kind] = row
        table = pd.DataFrame(list(rows.values()))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(args.out, index=False)
        pages.keep(markdown(table), args.out.with_suffix(".md"))

    for task in args.tasks:
        name, pairs, validation, test = read_task(task, args.models, args.shared)
        data = texts | {"behaviour": behaviour(validation), "test_behaviour": behaviour(test)}
        both = (
            [shown(r["question"], short(r[side]), "chat") for r in pairs]
            for side in ("positive", "negative")
        )
        labelled = esl.ContrastPairs.from_lists(*both)
        if expert is None:
            plan = own_plan(target, labelled, args.at, data["calibration"])
            if args.direction == "random":
                plan = plan.with_random_directions(seed=0)
        else:
            fit = esl.ExpertSteer(CONFIG).fit(
                expert,
                target,
                labelled,
                anchors=chats[: args.anchors],
                behaviour=data["behaviour"],
                test_behaviour=data["test_behaviour"],
                neutral=chats[args.anchors :],
                progress=True,
            )
            plan = fit.plan(coefficient=0.1)
        measure(args.direction, name, plan, data)


if __name__ == "__main__":
    main()
