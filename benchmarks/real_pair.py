"""Transfer between two real trained models of different width, family and tokenizer: every
direction at every layer pair.

    python benchmarks/real_pair.py --shared ../shared --out benchmarks/results

Expert: a TinyStories decoder (d=160, 6 layers, byte-level BPE 4096). Target: stories260k (Llama,
d=64, 5 layers, SentencePiece 512). For each direction and layer pair, the coefficient is the
largest on the grid that keeps the rise of neutral NLL within the budget on calibration texts. The
layer pair is chosen by the effect on validation prompts; the effect reported is on test prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import random
import re
import time
from dataclasses import replace

import pages
import pandas as pd
import torch
from scipy.stats import spearmanr

import expertsteer_lens as esl
from expertsteer_lens.align import AlignerConfig, fit_aligner_grid
from expertsteer_lens.hosts import as_host, capture
from expertsteer_lens.hosts.loading import load_model
from expertsteer_lens.learn.directions import mean_difference, random_direction
from expertsteer_lens.learn.rfm import RFMConfig, fit_rfm
from expertsteer_lens.measure.metrics import behaviour_gradient, behaviour_metric, neutral_nll
from expertsteer_lens.pair.mutual_information import MIConfig, layer_pair_mi

ALIGNERS = ("autoencoder", "ridge", "procrustes", "anchored_autoencoder")


def load_data(shared: pathlib.Path, seed: int) -> dict:
    """Pairs, anchors and prompts; every part disjoint from the others."""
    rng = random.Random(seed)
    words = json.loads((shared / "data/tinystories_mood_templates.json").read_text())
    fill = {"names": words["names"], "things": words["things"], "nouns": words["nouns"]}

    def filled(templates: list[str]) -> list[str]:
        texts = {
            t.format(n=n, t=x, a=a)
            for t, n, x, a in itertools.product(
                templates, fill["names"], fill["things"], fill["nouns"]
            )
        }
        return sorted(texts)

    positive, negative = filled(words["positive"]), filled(words["negative"])
    rng.shuffle(positive)
    rng.shuffle(negative)
    prompts = filled(words["evaluation_prompts"])
    rng.shuffle(prompts)
    stories = json.loads((shared / "data/tinystories_1000/clean.json").read_text())
    sentences = sorted(
        {
            s.strip()
            for t in stories
            for s in re.split(r"(?<=[.!?])\s+", t)
            if 20 <= len(s.strip()) <= 120
        }
    )
    rng.shuffle(sentences)
    behaviour = {
        part: esl.Behaviour(
            prompts=tuple(chunk),
            positive=tuple(words["positive_completions"]),
            negative=tuple(words["negative_completions"]),
        )
        for part, chunk in (("validation", prompts[:50]), ("test", prompts[50:100]))
    }
    return {
        "pairs": esl.ContrastPairs.from_lists(positive[:250], negative[:250]),
        "anchors": sentences[:700],
        "calibration": sentences[700:800],
        "neutral_test": sentences[800:900],
        **behaviour,
    }


class Bench:
    """Measures directions written to one target layer."""

    def __init__(self, model, data: dict, anchors, budget: float) -> None:
        self.model, self.host, self.data, self.budget = model, as_host(model), data, budget
        self.anchors = anchors
        self.base = {
            part: behaviour_metric(self.host, data[part]) for part in ("validation", "test")
        }
        self.base_nll = self.nll()

    def nll(self) -> float:
        totals = neutral_nll(self.host, self.data["neutral_test"])
        return float(totals[:, 0].sum() / totals[:, 1].sum())

    def measure(self, hook: str, direction: torch.Tensor) -> dict:
        plan = esl.SteeringPlan.from_vectors(
            {hook: direction}, coefficient=0.1, median_norms=self.anchors
        )
        plan = replace(plan, basis=self.host.basis)
        found = esl.measure.calibrate(
            plan, self.model, self.data["calibration"], budget=self.budget, curve=False
        )
        out = {"coefficient": found.coefficient}
        with plan.with_coefficient(found.coefficient).hooks(self.model):
            for part in ("validation", "test"):
                out[part] = float(
                    (behaviour_metric(self.host, self.data[part]) - self.base[part]).mean()
                )
            out["nll_rise"] = self.nll() - self.base_nll
        return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=pathlib.Path, default=pathlib.Path("../shared"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    parser.add_argument("--budget", type=float, default=0.10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-random", type=int, default=5)
    parser.add_argument(
        "--gauges", type=int, default=5, help="bases of the reconstruction-only auto-encoder"
    )
    parser.add_argument(
        "--standardise", default=None, help="RFMConfig.standardise; default: the library's"
    )
    parser.add_argument(
        "--center-gradients",
        choices=("default", "both"),
        default="default",
        help="RFMConfig.center_gradients: the library's default, or both tried on RFM's validation rows",
    )
    args = parser.parse_args()
    torch.set_num_threads(
        1
    )  # tiny models gain nothing from more, and lose much where other processes run
    started = time.perf_counter()

    expert = load_model(str(args.shared / "models/tinystories-ple-d160"), trust_remote_code=True)
    target = load_model(str(args.shared / "models/stories260k"))
    data = load_data(args.shared, args.seed)
    labels = data["pairs"].labels
    e_anchors, t_anchors = capture(expert, data["anchors"]), capture(target, data["anchors"])
    e_pairs, t_pairs = capture(expert, data["pairs"].texts), capture(target, data["pairs"].texts)
    bench = Bench(target, data, t_anchors, args.budget)
    changes: dict = {} if args.standardise is None else {"standardise": args.standardise}
    rfm = RFMConfig(
        **changes,
        **({"center_gradients": (True, False)} if args.center_gradients == "both" else {}),
    )
    targets, experts = t_pairs.hook_names, e_pairs.hook_names
    print(f"captured after {time.perf_counter() - started:.0f} s", flush=True)

    jobs: list[tuple[str, int, str, str, torch.Tensor]] = []
    for hook in targets:
        jobs.append(
            ("native mean difference", 0, "-", hook, mean_difference(t_pairs[hook], labels))
        )
        jobs.append(
            (
                "native RFM",
                0,
                "-",
                hook,
                fit_rfm(t_pairs[hook], labels, rfm, seed=args.seed).direction,
            )
        )
        for s in range(args.n_random):
            jobs.append(("random", s, "-", hook, random_direction(t_pairs[hook].shape[1], seed=s)))
    for kind in ALIGNERS:
        for gauge in range(args.gauges if kind == "autoencoder" else 1):
            config, seed = AlignerConfig(kind=kind), args.seed + gauge
            for (e, t), aligner in fit_aligner_grid(
                e_anchors, t_anchors, config, seed=seed
            ).items():
                mapped = aligner.encode(e_pairs[e])
                jobs.append(
                    (f"{kind} + mean difference", gauge, e, t, mean_difference(mapped, labels))
                )
                jobs.append(
                    (
                        f"{kind} + RFM",
                        gauge,
                        e,
                        t,
                        fit_rfm(mapped, labels, rfm, seed=args.seed).direction,
                    )
                )
    print(f"{len(jobs)} directions after {time.perf_counter() - started:.0f} s", flush=True)

    gradients = behaviour_gradient(bench.host, data["validation"], targets)
    mi = layer_pair_mi(e_anchors, t_anchors, MIConfig(), seed=args.seed)
    rows = []
    for method, draw, e, t, direction in jobs:
        predicted = t_anchors.median_norm(t) * float(gradients[t] @ direction.double())
        row = {
            "method": method,
            "draw": draw,
            "expert": e,
            "target": t,
            "attribution": predicted,
            **bench.measure(t, direction),
        }
        if e in experts:
            row["mi"] = float(mi.matrix[experts.index(e), targets.index(t)])
        rows.append(row)
    frame = pd.DataFrame(rows)
    print(f"measured after {time.perf_counter() - started:.0f} s", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(args.out / "real_pair.csv", index=False, float_format="%.5g")
    text = summary(frame, args, time.perf_counter() - started)
    pages.show(text, args.out / "real_pair.md")


def summary(frame: pd.DataFrame, args: argparse.Namespace, seconds: float) -> str:
    """The table: the pair chosen on validation, reported on test, beside the range over all
    pairs."""
    lines = [
        *pages.head(
            "direction",
            "pair chosen on validation",
            "coefficient",
            "test effect, nats",
            "over all pairs: min … mean … max",
            "neutral NLL",
        ),
    ]
    for method, part in frame.groupby("method", sort=False):
        spread = f"{part.test.min():+.2f} … {part.test.mean():+.2f} … {part.test.max():+.2f}"
        if method == "random":
            mean, sd = part.test.mean(), part.test.std()
            lines.append(
                f"| random unit vectors ({len(part)}) | all layers | | {mean:+.2f} ± {sd:.2f} | "
                f"{spread} | |"
            )
            lucky = part.loc[
                part.validation.idxmax()
            ]  # what choosing among as many directions is worth by itself
            lines.append(
                f"| the best of these on validation | {layer(lucky.target)} | "
                f"{lucky.coefficient:g} | **{lucky.test:+.2f}** | "
                f"| {lucky.nll_rise:+.3f} |"
            )
            continue
        chosen = part.loc[part.groupby("draw").validation.idxmax()]
        if len(chosen) > 1:
            lines.append(
                f"| {method} ({len(chosen)} gauges) | each its own | "
                f"{chosen.coefficient.mean():.2g} | **{chosen.test.mean():+.2f}** ± "
                f"{chosen.test.std():.2f} | {spread} | {chosen.nll_rise.mean():+.3f} |"
            )
            continue
        best = chosen.iloc[0]
        pair = (
            f"{layer(best.expert)} → {layer(best.target)}"
            if best.expert != "-"
            else layer(best.target)
        )
        lines.append(
            f"| {method} | {pair} | {best.coefficient:g} | **{best.test:+.2f}** | {spread} | "
            f"{best.nll_rise:+.3f} |"
        )
    lines += [
        "",
        "Rank correlation (Spearman) over the layer pairs with the measured test effect, and the "
        "effect of the pair ranked first:",
        "",
        *pages.head(
            "direction", "attribution", "its first pair", "MI", "lowest-MI pair", "highest-MI pair"
        ),
    ]
    for method, part in frame[frame.expert.str.startswith("blocks")].groupby("method", sort=False):
        found = [
            (
                spearmanr(one.attribution, one.test).statistic,
                one.loc[one.attribution.idxmax()].test,
                spearmanr(one.mi, one.test).statistic,
                one.loc[one.mi.idxmin()].test,
                one.loc[one.mi.idxmax()].test,
            )
            for _, one in part.groupby("draw")
        ]
        name = method if len(found) == 1 else f"{method} (mean of {len(found)} gauges)"
        lines.append(
            f"| {name} | "
            + " | ".join(f"{sum(v) / len(v):+.2f}" for v in zip(*found, strict=True))
            + " |"
        )
    command = f"python benchmarks/real_pair.py --budget {args.budget:g} --seed {args.seed} --n-random {args.n_random} --gauges {args.gauges}"
    command += (
        "" if args.center_gradients == "default" else f" --center-gradients {args.center_gradients}"
    )
    lines += [
        "",
        f"Command: `{command}` ({seconds:.0f} s on two cores; torch {torch.__version__}).",
    ]
    return "\n".join(lines) + "\n"


def layer(hook_name: str) -> str:
    return hook_name.split(".")[1]


if __name__ == "__main__":
    main()
