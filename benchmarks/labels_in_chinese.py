"""Labels in a language that the target reads badly: what does an expert that reads it add?

    python benchmarks/fetch_real.py --out real-models smollm2 gemma3 qwen reviews-zh
    python benchmarks/labels_in_chinese.py --models real-models --shared ../shared \\
        --out benchmarks/results/labels_in_chinese.csv

Labelled: n pairs of Chinese reviews, good and bad. Unlabelled: English answers to everyday
questions, warm and cold. Test: other such questions. The expert labels the English answers from the
Chinese pairs (`score_states`, the core of `label_texts`), and the target's own mean difference is
taken on these labels. Beside it, from the same pairs: the target as its own labeller, the target's
own direction from the Chinese pairs, random directions of equal norm, shuffled labels; and as the
ceiling the true labels of the English answers. All are written to the same block at the same
strength, chosen beforehand. The effect is the rise of (mean log-probability per token of the warm
answer minus that of the cold one), mean over the test questions, nats per token.

The models' weights were 4-bit before they were made float32. The intervals are over draws of
labelled pairs, for one behaviour and these test questions.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import time

import numpy as np
import pages
import pandas as pd
import torch
from sklearn.metrics import accuracy_score

import expertsteer_lens as esl
from expertsteer_lens.data.spans import content
from expertsteer_lens.hosts import as_host, capture
from expertsteer_lens.hosts.loading import load_model
from expertsteer_lens.learn.directions import mean_difference, random_direction
from expertsteer_lens.measure.neutral import neutral_nll
from expertsteer_lens.measure.prepared import Completions
from expertsteer_lens.pipeline.labelling import best_cut, score_states

BLOCKS = {"smollm2": 11, "gemma3": 8}
"""Where the targets are steered: the blocks of earlier experiments on other texts."""
COEFFICIENT = 0.1
N_WORDS = 24
SKIPPED = 100
"""Reviews of either side that the method was developed on; the pairs are drawn from those after."""
POOL = 100


def shown(model: str, question: str, answer: str | None) -> esl.Chat | str:
    """A question, and its answer, as this model is shown them."""
    if model == "gemma3":  # a base model has no template
        return f"Question: {question}\nAnswer:" + ("" if answer is None else f" {answer}")
    return esl.Chat.ask(question) if answer is None else esl.Chat.ask(question, answer)


def read_data(models: pathlib.Path, shared: pathlib.Path) -> dict:
    """Chinese reviews `zh` (good, bad, good, ...), English rows for heap and test, neutral texts."""
    rng = random.Random(0)
    sides = []
    for name in ("pos", "neg"):
        text = (models / "reviews-zh" / f"{name}.txt").read_text(encoding="utf-8")
        lines = [line.strip() for line in text.split("\n")]
        lines = [line for line in lines if 80 <= len(line) <= 200]
        rng.shuffle(lines)
        sides.append(lines[SKIPPED : SKIPPED + POOL])
    folder = shared / "data" / "steerkit_pairs"
    rows = [json.loads(line) for line in (folder / "sentiment.jsonl").open(encoding="utf-8")]
    english = [
        (
            r["prompt"],
            " ".join(r["positive_response"].split()[:N_WORDS]),
            " ".join(r["negative_response"].split()[:N_WORDS]),
        )
        for r in rows
    ]
    asked = [json.loads(line) for line in (shared / "data/gsm8k/test.jsonl").open(encoding="utf-8")]
    return {
        "zh": [text for pair in zip(*sides, strict=True) for text in pair],
        "heap": english[:40],
        "test": english[40:],
        "neutral": [r["question"] for r in asked[:12]],
    }


def states_of(name: str, model, data: dict, hooks: list[str] | None = None):
    """States of the Chinese reviews, of the English answers, and the layers' median norms."""
    host = as_host(model)
    hooks = host.hook_names()[1:-1] if hooks is None else hooks
    texts, spans = [], []
    for question, warm, cold in data["heap"]:
        for answer in (warm, cold):
            text = shown(name, question, answer)
            texts.append(text)
            whole = content(text)
            spans.append((len(whole) - len(answer), len(whole)))
    chinese = capture(model, data["zh"], hooks, positions="answer")
    english = capture(model, texts, hooks, positions="answer", spans=spans)
    return chinese, english


def label(chinese, english, pairs: torch.Tensor) -> torch.Tensor:
    """Labels of the English answers from some of the Chinese pairs."""
    rows = torch.stack([2 * pairs, 2 * pairs + 1], 1).flatten()
    signs = torch.tensor([1.0, 0.0]).repeat(len(pairs))
    few, many = [chinese[h][rows] for h in chinese], [english[h] for h in english]
    scores = score_states(few, signs, many)
    return (scores > best_cut(scores)).long()


class Target:
    """Measures directions at one block of a target; the same direction is measured once."""

    def __init__(self, name: str, model, data: dict, norm: float) -> None:
        self.name, self.model, self.host, self.norm = name, model, as_host(model), norm
        self.hook = self.host.hook_names()[BLOCKS[name]]
        self.neutral = data["neutral"]
        self.completions = Completions(
            self.host,
            esl.Behaviour(
                [shown(name, question, None) for question, _, _ in data["test"]],
                [[self.lead + warm] for _, warm, _ in data["test"]],
                [[self.lead + cold] for _, _, cold in data["test"]],
            ),
        )
        self.base = self.completions.scores()
        self.base_nll = self.nll(None)
        self.known: dict[bytes, dict[str, float]] = {}

    @property
    def lead(self) -> str:
        """A base model's answer begins with a space, a chat's does not."""
        return " " if self.name == "gemma3" else ""

    def plan(self, direction: torch.Tensor) -> esl.SteeringPlan:
        return esl.SteeringPlan.from_vectors(
            {self.hook: direction},
            coefficient=COEFFICIENT,
            median_norms={self.hook: self.norm},
            basis=self.host.facts()["basis"],
        )

    def nll(self, plan: esl.SteeringPlan | None) -> float:
        """Of the neutral texts, nats per token."""
        sums = neutral_nll(self.host, self.neutral, plan=plan).sum(0)
        return float(sums[0] / sums[1])

    def measure(self, direction: torch.Tensor, *, cost: bool = False) -> dict[str, float]:
        """Effect, and with `cost` the rise of neutral NLL, which takes as long."""
        key = direction.numpy().round(5).tobytes()
        if key not in self.known:
            plan = self.plan(direction)
            scores = self.completions.scores(plan)
            change = scores.margin_per_token() - self.base.margin_per_token()
            self.known[key] = {
                "effect": float(change.mean()),
                "wrong_way": float((change < 0).double().mean()),
                "accuracy": float(scores.correct(per_token=True).mean()),
            }
        if cost and "nll_rise" not in self.known[key]:
            self.known[key]["nll_rise"] = self.nll(self.plan(direction)) - self.base_nll
        return self.known[key]


def interval(values, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over draws."""
    draws = np.random.default_rng(seed).choice(np.asarray(values), (5000, len(values))).mean(1)
    return tuple(np.quantile(draws, [0.025, 0.975]))


def run(expert: str, target: str, args, data: dict, states: dict, models: dict) -> list[dict]:
    chinese_e, english_e = states[expert]
    chinese_t, english_t = states[target]
    hook = list(as_host(models[target]).hook_names())[BLOCKS[target]]
    measured = Target(target, models[target], data, english_t.median_norm(hook))
    rows: list[dict] = []
    truth = torch.tensor([1, 0]).repeat(len(data["heap"]))

    def add(method: str, n: int, draw: int, direction, labels=None) -> None:
        agreement = None if labels is None else accuracy_score(truth, labels)
        facts = {"method": method, "n_pairs": n, "draw": draw, "label_agreement": agreement}
        found = measured.measure(direction, cost=not method.startswith("native"))
        rows.append({"expert": expert, "target": target, **facts, **found})

    own = english_t[hook]
    add("ceiling: true labels of the English answers", 0, 0, mean_difference(own, truth))
    for seed in range(args.random):
        add("random", 0, seed, random_direction(own.shape[1], seed=seed))
        g = torch.Generator().manual_seed(seed)
        shuffled = truth[torch.randperm(len(truth), generator=g)]
        add("shuffled labels", 0, seed, mean_difference(own, shuffled), shuffled)
    for n in args.pairs:
        for draw in range(args.draws):
            g = torch.Generator().manual_seed(1000 * n + draw)
            # Of single pairs there are no more than the pool holds: each once.
            pairs = torch.tensor([draw]) if n == 1 else torch.randperm(POOL, generator=g)[:n]
            for method, (zh, en) in {
                "expert as labeller": (chinese_e, english_e),
                "self as labeller": (chinese_t, english_t),
            }.items():
                labels = label(zh, en, pairs)
                add(method, n, draw, mean_difference(own, labels), labels)
            if draw >= args.native_draws:
                continue
            both = torch.stack([2 * pairs, 2 * pairs + 1], 1).flatten()
            signs = torch.tensor([1, 0]).repeat(n)
            add("native, Chinese pairs", n, draw, mean_difference(chinese_t[hook][both], signs))
        print(summarise(pd.DataFrame(rows)).round(3).to_string(index=False), flush=True)
    return rows


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Means per method and number of pairs; for the expert also the paired differences."""
    out = []
    for (expert, target, n, method), part in rows.groupby(
        ["expert", "target", "n_pairs", "method"], sort=False
    ):
        low, high = interval(part.effect)
        line = {"expert": expert, "target": target, "n_pairs": n, "method": method}
        line |= {"draws": len(part), "effect": part.effect.mean(), "low": low, "high": high}
        for name in ("label_agreement", "accuracy", "wrong_way", "nll_rise"):
            line[name] = part[name].astype(float).mean()
        out.append(line)
    for (expert, target, n), part in rows[rows.n_pairs > 0].groupby(
        ["expert", "target", "n_pairs"]
    ):
        table = part.pivot(index="draw", columns="method", values="effect")
        for other in ("self as labeller", "native, Chinese pairs"):
            difference = (table["expert as labeller"] - table[other]).dropna()
            low, high = interval(difference)
            out.append(
                {
                    "expert": expert,
                    "target": target,
                    "n_pairs": n,
                    "method": f"expert as labeller minus {other}",
                    "draws": len(difference),
                    "effect": difference.mean(),
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(out)


def markdown(table: pd.DataFrame, command: str) -> str:
    """The table as it stands in the docs."""
    lines = [
        *pages.head(
            "Chinese pairs",
            "direction (draws)",
            "effect, nats per token",
            "labels right",
            "warm answer likelier",
            "neutral NLL",
        ),
    ]

    def shown(value: float, form: str) -> str:
        return "" if pd.isna(value) else format(value, form)

    for row in table.itertuples():
        interval = f" [{row.low:+.3f}, {row.high:+.3f}]" if row.draws > 1 else ""
        cells = [
            str(row.n_pairs) if row.n_pairs else "",
            f"{row.method} ({row.draws})",
            f"{row.effect:+.3f}{interval}",
            shown(row.label_agreement, ".0%"),
            shown(row.accuracy, ".0%"),
            shown(row.nll_rise, "+.3f"),
        ]
        lines.append(pages.row(*cells))
    return "\n".join([*lines, "", f"Command: `{command}`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=pathlib.Path, default=pathlib.Path("real-models"))
    parser.add_argument("--shared", type=pathlib.Path, default=pathlib.Path("../shared"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--draws", type=int, default=POOL)
    parser.add_argument("--native-draws", type=int, default=20, help="each is a new direction")
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--dtype", default="float32", help="of the models; bfloat16 is faster")
    parser.add_argument("--transfers", nargs="+", default=["qwen:smollm2"])
    args = parser.parse_args()
    data = read_data(args.models, args.shared)
    transfers = [tuple(t.split(":")) for t in args.transfers]
    models, states = {}, {}
    for name in dict.fromkeys(name for pair in transfers for name in pair):
        started = time.perf_counter()
        models[name] = load_model(
            str(args.models / name), host="huggingface", dtype=args.dtype, device="cpu"
        )
        states[name] = states_of(name, models[name], data)
        print(f"{name} read in {time.perf_counter() - started:.0f} s", flush=True)
        if name not in [target for _, target in transfers]:
            del models[name]
    rows = [r for e, t in transfers for r in run(e, t, args, data, states, models)]
    table = summarise(pd.DataFrame(rows))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(args.out, index=False)
    command = f"python benchmarks/labels_in_chinese.py --dtype {args.dtype} --out {args.out}"
    pages.keep(markdown(table, command), args.out.with_suffix(".md"))
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
