"""Which settings steer best: every choice of the four steps varied alone, measured on validation
prompts only.

    python benchmarks/method_choices.py --shared ../shared --out benchmarks/results

Six problems: the four domains of the bundled benchmark, the two story models of the zoo, and the
real pair in `--shared` (left out where that folder is missing). For each, one fit with the
defaults; then one setting at a time is changed and the change of the behaviour metric is measured
at the strength the budget allows. Test prompts are not read. A second table ranks all layer pairs
by each score and compares the ranking with the measured effect."""

from __future__ import annotations

import argparse
import pathlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pages
import pandas as pd
import torch
from real_pair import load_data
from scipy.stats import spearmanr

import expertsteer_lens as esl
from expertsteer_lens import zoo
from expertsteer_lens.benchmarks import offline as bench
from expertsteer_lens.errors import ExpertSteerError
from expertsteer_lens.evaluation.methods import learner, mapped_plan
from expertsteer_lens.hosts.loading import load_model
from expertsteer_lens.measure.metrics import NeutralTexts, behaviour_and_accuracy

DEFAULT = esl.ExpertSteerConfig()


def problems(shared: pathlib.Path) -> Iterator[tuple[str, Any, Any, dict]]:
    """(name, expert, target, arguments of fit); behaviours are validation prompts, all of them used
    for choices."""
    domains = bench.world
    for domain in domains.DOMAINS:
        data = {
            "pairs": domains.contrast_pairs(domain),
            "anchors": domains.anchors(),
            "behaviour": domains.behaviour(domain, "validation"),
            "neutral": domains.neutral_texts(160),
        }
        yield (
            domain,
            domains.load(domain, "huggingface"),
            domains.load("target", "huggingface"),
            data,
        )
    stories = {
        "pairs": zoo.contrast_pairs(),
        "anchors": zoo.anchors(),
        "behaviour": zoo.behaviour().split(0.5)[0],
        "neutral": zoo.neutral_texts(120),
    }
    yield "stories", *zoo.load_pair("huggingface"), stories
    if shared.exists():
        real = load_data(shared, seed=0)
        data = {
            "pairs": real["pairs"],
            "anchors": real["anchors"],
            "behaviour": real["validation"],
            "neutral": [
                text
                for two in zip(real["calibration"], real["calibration"][::-1], strict=True)
                for text in two
            ],
        }
        expert = load_model(str(shared / "models/tinystories-ple-d160"), trust_remote_code=True)
        yield "real pair", expert, load_model(str(shared / "models/stories260k")), data


def variations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(choice, value, changes of the config); the default of each choice is among its values as
    {}."""
    yield "default", "", {}
    for kind in ("ridge", "procrustes", "autoencoder"):
        yield "aligner", kind, {"aligner": esl.AlignerConfig(kind=kind)}
    yield "aligner", "fitted on anchors and pairs", {"align_on_pairs": True}
    for rule in ("min_mi", "max_mi", "depth", "random"):
        yield "pairing rule", rule, {"pairing": esl.PairingConfig(rule=rule)}
    yield "pairing rule", "attribution, any AUC", {"pairing": esl.PairingConfig(min_auc=0.0)}
    for n in (2, 3):
        yield "number of pairs", str(n), {"pairing": esl.PairingConfig(n_pairs=n)}
    for value in ("none", "coordinate"):
        yield "RFM standardise", value, {"rfm": esl.RFMConfig(standardise=value)}
    for value in (0.25, 0.5, 1.0, 2.0, 4.0):
        yield "RFM bandwidth", f"{value:g} x median", {"rfm": esl.RFMConfig(bandwidth=value)}
    yield "RFM centring", "centred", {"rfm": esl.RFMConfig(center_gradients=True)}
    yield "RFM centring", "both searched", {"rfm": esl.RFMConfig(center_gradients=(True, False))}
    for n in (1, 3, 8):
        yield "RFM rounds", str(n), {"rfm": esl.RFMConfig(n_rounds=n)}
    yield "RFM as in the reference", "", {"rfm": esl.RFMConfig.reference()}


def measured(fit: Any, plan: Any, neutral: NeutralTexts) -> dict[str, float]:
    found = esl.measure.calibrate(
        plan,
        fit.target.model,
        neutral,
        budget=fit.config.budget,
        unit=fit.config.budget_unit,
        curve=False,
    )
    host, behaviour = fit.target, fit.validation_behaviour
    base, _ = behaviour_and_accuracy(host, behaviour)
    steered, correct = behaviour_and_accuracy(
        host, behaviour, plan=plan.with_coefficient(found.coefficient)
    )
    return {
        "coefficient": found.coefficient,
        "effect": float((steered - base).mean()),
        "accuracy": float(correct.mean()),
    }


def study(
    name: str, expert: Any, target: Any, data: dict, say: Any
) -> tuple[list[dict], list[dict]]:
    keywords = {
        "anchors": data["anchors"],
        "behaviour": data["behaviour"],
        "test_behaviour": data["behaviour"],
        "neutral": data["neutral"],
        "progress": False,
    }
    settings = {} if name == "real pair" else {"budget_unit": "kl"}
    config = esl.ExpertSteerConfig(**settings)
    fit = esl.ExpertSteer(config).fit(expert, target, data["pairs"], **keywords)
    neutral = NeutralTexts(fit.target, fit.calibration_texts)
    rows = []

    def note(choice: str, value: str, plan: Any, of: Any = fit) -> None:
        rows.append(
            {"problem": name, "choice": choice, "value": value, **measured(of, plan, neutral)}
        )

    for choice, value, changes in variations():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = fit.refit(**changes) if changes else fit
                note(choice, value, found.plan(coefficient=0.1), found)
            except ExpertSteerError as error:
                say(f"  {name}: {choice} {value}: {error}")
    for how in ("mean difference", "PCA", "logistic probe"):
        note("direction", how, mapped_plan(fit, fit.plan(coefficient=0.1), learner(how, fit)))
    mean = esl.ExpertSteer(esl.ExpertSteerConfig(reading="mean", **settings))
    found = mean.fit(expert, target, data["pairs"], **keywords)
    note("token read", "mean of all", found.plan(coefficient=0.1), found)
    for n in (50, 150):
        found = esl.ExpertSteer(config).fit(
            expert,
            target,
            data["pairs"],
            **{**keywords, "anchors": data["anchors"][:: len(data["anchors"]) // n][:n]},
        )
        note("number of anchors", str(n), found.plan(coefficient=0.1), found)
    say(f"  {name}: {len(rows)} settings")

    ranked = []
    effects = {
        key: measured(fit, fit.plan(layer_pairs=[key], coefficient=0.1), neutral)["effect"]
        for key in fit.rfms
    }
    keys = list(effects)
    scores = {"attribution": [fit.predicted_effect(t, fit.direction(e, t)) for e, t in keys]}
    for estimator in ("cca", "gaussian", "ksg", "cka"):
        mi = esl.layer_pair_mi(
            fit.data.expert_anchor_states,
            fit.target_anchors,
            esl.MIConfig(estimator=estimator, n_permutations=0),
        )
        at = [(mi.expert_hook_names.index(e), mi.target_hook_names.index(t)) for e, t in keys]
        scores[f"mutual information, {estimator}"] = [float(mi.matrix[i, j]) for i, j in at]
    scores["expert AUC"] = [fit.rfms[key].validation_auc or 0.0 for key in keys]
    for score, values in scores.items():
        first, last = (
            keys[pick]
            for pick in (int(torch.tensor(values).argmax()), int(torch.tensor(values).argmin()))
        )
        ranked.append(
            {
                "problem": name,
                "score": score,
                "pairs": len(keys),
                "rho": float(spearmanr(values, list(effects.values())).statistic),
                "effect of its largest": effects[first],
                "effect of its smallest": effects[last],
                "best of all": max(effects.values()),
            }
        )
    say(f"  {name}: {len(keys)} layer pairs ranked")
    return rows, ranked


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=pathlib.Path, default=pathlib.Path("../shared"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    parser.add_argument("--problem", nargs="*", help="only these")
    parser.add_argument(
        "--summarise",
        nargs="*",
        type=pathlib.Path,
        help="measure nothing: join these folders into --out",
    )
    args = parser.parse_args()
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s{text}", flush=True)

    if args.summarise:
        parts = [
            [
                pd.read_csv(f / n).assign(value=lambda d: d["value"].fillna(""))
                if n[0] == "m"
                else pd.read_csv(f / n)
                for f in args.summarise
            ]
            for n in ("method_choices.csv", "layer_pair_scores.csv")
        ]
        write(
            args.out,
            *(pd.concat(part) for part in parts),
            "`, its problems shared between two processes",
        )
        return
    rows: list[dict] = []
    ranked: list[dict] = []
    for name, expert, target, data in problems(args.shared):
        if args.problem and name not in args.problem:
            continue
        one, two = study(name, expert, target, data, say)
        rows += one
        ranked += two
        tail = f"` ({time.perf_counter() - started:.0f} s"
        write(
            args.out,
            pd.DataFrame(rows),
            pd.DataFrame(ranked),
            tail + f"; torch {torch.__version__})",
        )
    print((args.out / "method_choices.md").read_text())


def write(out: pathlib.Path, frame: pd.DataFrame, ranked: pd.DataFrame, tail: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "method_choices.csv", index=False, float_format="%.5g")
    ranked.to_csv(out / "layer_pair_scores.csv", index=False, float_format="%.5g")
    command = "Command: `python benchmarks/method_choices.py" + tail
    pages.keep(summary(frame, ranked, command), out / "method_choices.md")
    figure(frame).write_html(out / "method_choices.html", include_plotlyjs="directory")


def relative(frame: pd.DataFrame) -> pd.DataFrame:
    """Effect of each setting as a share of the default's, by problem."""
    wide = frame.assign(
        setting=[f"{c}: {v}" if v else c for c, v in zip(frame.choice, frame.value, strict=True)]
    )
    wide = wide.pivot(index="setting", columns="problem", values="effect")
    order = list(
        dict.fromkeys(
            f"{c}: {v}" if v else c for c, v in zip(frame.choice, frame.value, strict=True)
        )
    )
    return wide.loc[order, list(dict.fromkeys(frame.problem))]


def summary(frame: pd.DataFrame, ranked: pd.DataFrame, command: str) -> str:
    wide = relative(frame)
    share = wide.div(wide.loc["default"]).mean(axis=1)
    lines = [
        "Effect on validation prompts, nats, one setting changed at a time; last column: mean "
        "share of the default's.",
        "",
        *pages.head("setting", *wide.columns, "mean share"),
    ]
    for setting, row in wide.iterrows():
        cells = ["" if pd.isna(v) else f"{v:+.2f}" for v in row]
        lines.append(pages.row(setting, *cells, f"{share[setting]:.2f}"))
    lines += [
        "",
        "<details><summary>Layer pairs ranked by a score: Spearman's rank correlation with the "
        "measured effect, and the effect "
        "of the pair with the largest and with the smallest score (best of all pairs "
        "last)</summary>",
        "",
        *pages.head("problem", "score", "rho", "largest", "smallest", "best"),
    ]
    for row in ranked.itertuples(index=False):
        problem, score, _, rho, first, last, best = row
        shown = "all equal" if pd.isna(rho) else f"{rho:+.2f}"
        lines.append(
            f"| {problem} | {score} | {shown} | {first:+.2f} | {last:+.2f} | {best:+.2f} |"
        )
    lines += ["", "</details>", "", command + "."]
    return "\n".join(lines)


def figure(frame: pd.DataFrame) -> Any:
    """Each setting's effect as a share of the default's, a point a problem."""
    import plotly.express as px

    from expertsteer_lens.show.drawing import set_style

    wide = relative(frame)
    shares = wide.div(wide.loc["default"])
    long = shares.reset_index().melt(id_vars="setting", var_name="problem", value_name="share")
    drawn = px.scatter(
        long,
        x="share",
        y="setting",
        color="problem",
        labels={"share": "effect on validation prompts / effect with the defaults", "setting": ""},
    )
    set_style(
        drawn,
        _finding(shares.mean(axis=1)),
        "one setting changed at a time; dashed: the defaults; in the title: the worst setting's "
        "mean over problems",
    )
    drawn.update_traces(marker={"size": 8}).add_vline(x=1.0, line={"dash": "dash"})
    drawn.update_yaxes(autorange="reversed")
    return drawn.update_layout(width=1000, height=280 + 22 * len(wide), margin={"l": 290})


def _finding(means: pd.Series) -> str:
    """What a choice costs at worst: the two that cost most, and all settings of RFM together."""
    worst = means.groupby(means.index.str.split(": ").str[0]).min().sort_values()
    rfm = worst[worst.index.str.startswith("RFM ")].min()
    first, second = worst.index[:2]
    return (
        f"A bad {first} leaves {worst[first]:.0%} of the effect, a bad {second} "
        f"{worst[second]:.0%}; RFM's settings at least {rfm:.0%}"
    )


if __name__ == "__main__":
    main()
