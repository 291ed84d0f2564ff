"""Command line: `expertsteer-lens demo | capture | fit | show | steer | evaluate | export | bench |
benchmarks`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from expertsteer_lens.errors import ArgumentError, DataError, ExpertSteerError

from .io import (
    calibrated,
    console,
    describe,
    print_evaluation,
    print_frame,
    print_step,
    print_texts,
    read_behaviour,
    read_config,
    read_texts,
    say,
    steered_texts,
    texts_to_fit,
    write_evaluation,
    write_results,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Steer a language model with directions taught by another model.",
)

Out = Annotated[Path, typer.Option("--out", help="folder for the results; made if missing")]
Seed = Annotated[int, typer.Option(help="of every random choice")]
NRandom = Annotated[
    int, typer.Option("--n-random", help="random directions behind the floor, at least 2")
]
HostName = Annotated[str, typer.Option("--host", help="transformer_lens, nnsight or huggingface")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="run model code that ships with the weights")
]
Dtype = Annotated[str, typer.Option("--dtype", help="of the weights, e.g. bfloat16")]
Device = Annotated[
    str | None, typer.Option("--device", help="e.g. cuda:1; default: cuda where there is one")
]
Pairs = Annotated[
    Path | None,
    typer.Option(
        help="JSON lines with fields 'positive' and 'negative': texts, or lists of messages"
    ),
]
Benchmark = Annotated[str | None, typer.Option(help="instead of --pairs: a name from `benchmarks`")]
BenchmarkPath = Annotated[Path | None, typer.Option(help="its local file; default: the hub")]
Limit = Annotated[int | None, typer.Option(help="most rows of the benchmark, drawn by the seed")]
AsChat = Annotated[
    bool,
    typer.Option(
        "--chat", help="benchmark questions and answers as conversations, in each model's template"
    ),
]
Anchors = Annotated[
    Path | None,
    typer.Option(help="unlabelled texts, one a line (.jsonl: texts or lists of messages)"),
]
PlanName = Annotated[str, typer.Argument(help="folder or hub id of a saved plan")]
TargetName = Annotated[str, typer.Option("--target", help="folder or hub id of the target")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: our errors, and files that cannot be read, end in one line and exit code 1,
    without a traceback."""
    try:
        app(None if arguments is None else list(arguments))
    except (ExpertSteerError, OSError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{type(error).__name__}: {text}", file=sys.stderr)
        raise SystemExit(1) from None


def _version(wanted: bool) -> None:
    if wanted:
        from expertsteer_lens import __version__

        typer.echo(f"expertsteer-lens {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and exit")
    ] = False,
) -> None:
    """Steer a language model with directions taught by another model."""


@app.command()
def demo(out: Out = Path("expertsteer-demo"), seed: Seed = 0, n_random: NRandom = 5) -> None:
    """The four steps on the two bundled models, with controls, figures and a verdict. Under two
    minutes on two cores."""
    import torch

    from expertsteer_lens import zoo
    from expertsteer_lens.evaluation.run import evaluate
    from expertsteer_lens.pipeline.expert_steer import ExpertSteer, ExpertSteerConfig

    torch.set_num_threads(
        1
    )  # tiny models gain nothing from more, and lose much where other processes run
    started = time.perf_counter()
    expert, target = zoo.load_pair()
    pairs, anchors, behaviour = zoo.contrast_pairs(), zoo.anchors(), zoo.behaviour()
    say(f"expert {describe(expert)}  →  target {describe(target)}", style="bold")
    say(f"{pairs}\n{len(anchors)} unlabelled anchors\n{behaviour}\n")
    fit = ExpertSteer(preset="anchored", seed=seed).fit(
        expert, target, pairs, anchors=anchors, behaviour=behaviour, on_step=print_step
    )
    plan, curve = calibrated(fit)
    for pair in fit.layer_pairs:
        say(
            f"  chosen     {pair.expert} → {pair.target}, coefficient "
            f"{plan.vectors[0].coefficient:g}"
        )
    say(
        "\nthe paper's preset (reconstruction-only auto-encoder, lowest mutual information)",
        style="bold",
    )
    paper = fit.refit(ExpertSteerConfig.preset("paper"))
    for step in paper.steps:
        print_step(step)
    texts = steered_texts(plan, target, zoo.prompts()[:3], plan.vectors[0].coefficient)
    print_texts(texts)
    result = evaluate(
        plan,
        target,
        fit=fit,
        n_random=n_random,
        seed=seed,
        compare={"paper preset": paper.plan(coefficient=0.1)},
        progress=True,
    )
    write_results(out, fit, plan, result, curve, texts)
    print_evaluation(result)
    say(f"\n{time.perf_counter() - started:.0f} s; open {out / 'report.html'}")
    say(str(out.resolve()))


@app.command()
def capture(
    model: Annotated[str, typer.Option(help="folder or hub id of the model that teaches")],
    pairs: Pairs = None,
    benchmark: Benchmark = None,
    benchmark_path: BenchmarkPath = None,
    limit: Limit = None,
    chat: AsChat = False,
    anchors: Anchors = None,
    positions: Annotated[
        str, typer.Option(help="token that stands for a text: last, mean, or an index")
    ] = "last",
    batch_size: Annotated[int, typer.Option(help="texts per forward pass")] = 16,
    host: HostName = "transformer_lens",
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: Trust = False,
    out: Out = Path("expert-states"),
    seed: Seed = 0,
) -> None:
    """Read the expert's states and save them for `fit --expert OUT`: elsewhere, or where both
    models do not fit in memory."""
    from expertsteer_lens.files.io import save
    from expertsteer_lens.hosts import capture as read
    from expertsteer_lens.hosts.loading import load_model

    contrast, _ = texts_to_fit(pairs, benchmark, benchmark_path, limit, seed, chat)
    texts = [*contrast.texts, *([] if anchors is None else read_texts(anchors))]
    loaded = load_model(
        model, host=host, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    where = int(positions) if positions.lstrip("-").isdigit() else positions
    states = read(loaded, texts, positions=where, batch_size=batch_size, progress=True)
    say(repr(states))
    say(str(save(states, out).resolve()))


@app.command()
def fit(
    expert: Annotated[
        str,
        typer.Option(
            help="folder or hub id of the model that teaches, or what `capture` saved of it"
        ),
    ],
    target: Annotated[str, typer.Option(help="folder or hub id of the model to steer")],
    pairs: Pairs = None,
    benchmark: Benchmark = None,
    benchmark_path: BenchmarkPath = None,
    limit: Limit = None,
    chat: AsChat = False,
    anchors: Anchors = None,
    behaviour: Annotated[
        Path | None, typer.Option(help="JSON with 'prompts', 'positive', 'negative'")
    ] = None,
    preset: Annotated[str, typer.Option(help="anchored or paper")] = "anchored",
    config: Annotated[
        Path | None, typer.Option(help="JSON with fields of ExpertSteerConfig, over the preset's")
    ] = None,
    host: HostName = "transformer_lens",
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: Trust = False,
    n_random: NRandom = 5,
    save_fit: Annotated[
        bool,
        typer.Option(help="also save the whole fit to OUT/fit, for `evaluate --fit` and esl.load"),
    ] = False,
    out: Out = Path("expertsteer-plan"),
    seed: Seed = 0,
) -> None:
    """Fit on your own two models and save the plan to OUT/plan; with a behaviour, evaluate it and
    write the report too."""
    from expertsteer_lens.evaluation.run import evaluate
    from expertsteer_lens.files.io import kind_of_saved, load, save
    from expertsteer_lens.hosts.loading import load_model
    from expertsteer_lens.pipeline.expert_steer import ExpertSteer

    contrast, wanted = texts_to_fit(pairs, benchmark, benchmark_path, limit, seed, chat)
    wanted = wanted if behaviour is None else read_behaviour(behaviour)
    anchor_texts = None if anchors is None else read_texts(anchors)
    settings = read_config(config, preset)
    model_options: dict[str, Any] = {
        "host": host,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    captured = kind_of_saved(Path(expert)) == "ActivationStore"
    expert_model = load(expert) if captured else load_model(expert, **model_options)
    target_model = load_model(target, **model_options)
    found = ExpertSteer(settings, seed=seed).fit(
        expert_model,
        target_model,
        contrast,
        anchors=anchor_texts,
        behaviour=wanted,
        on_step=print_step,
    )
    if save_fit:
        save(found, out / "fit")  # first: whatever happens next, nothing has to be read again
    plan, curve = calibrated(found)
    if wanted is None:
        out.mkdir(parents=True, exist_ok=True)
        save(plan, out / "plan")
        say(
            "no behaviour given: layers were chosen by the target's read-out, and nothing was "
            "evaluated"
        )
    else:
        result = evaluate(
            plan, target_model, fit=found, n_random=n_random, seed=seed, progress=True
        )
        write_results(out, found, plan, result, curve, [])
        print_evaluation(result)
    say(str((out / "plan").resolve()))


@app.command()
def show(
    plan: Annotated[
        str, typer.Argument(help="folder or hub id of a saved plan, fit, evaluation, ...")
    ],
) -> None:
    """Print what was saved: what a plan does and where it comes from, the steps and pairs of a fit;
    loads no model."""
    from expertsteer_lens.evaluation.run import Evaluation
    from expertsteer_lens.files.io import load
    from expertsteer_lens.pipeline.fitted import ExpertSteering
    from expertsteer_lens.steer.plan import SteeringPlan

    loaded = load(plan)
    if isinstance(loaded, ExpertSteering):
        say(loaded.summary())
        short = {
            "mutual_information": "MI",
            "aligner_r2": "aligner R²",
            "rfm_validation_auc": "RFM AUC",
        }
        frame = loaded.to_pandas()
        print_frame(
            frame.head(10).rename(columns=short),
            f"the first of {len(frame)} fitted pairs",
            names=True,
        )
        return
    if isinstance(loaded, Evaluation):
        print_evaluation(loaded)
        return
    say(repr(loaded))
    if not isinstance(loaded, SteeringPlan):
        if hasattr(loaded, "to_pandas"):
            print_frame(loaded.to_pandas().head(20), type(loaded).__name__)
        return
    print_frame(loaded.to_pandas(), "vectors")
    facts = {
        k: v
        for k, v in loaded.provenance.items()
        if k in ("expert", "target", "pairs", "anchors", "behaviour", "seed")
    }
    console.print_json(json.dumps(facts, default=str))


@app.command()
def steer(
    plan: PlanName,
    target: TargetName,
    prompt: Annotated[list[str], typer.Option(help="may be given several times")],
    coefficient: Annotated[float | None, typer.Option(help="default: the plan's own")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate, at most")] = 60,
    host: HostName = "transformer_lens",
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: Trust = False,
    allow_mismatch: Annotated[
        bool, typer.Option(help="use a plan fitted on other weights")
    ] = False,
) -> None:
    """Generate at minus, zero and plus the plan's strength, side by side."""
    from expertsteer_lens.files.io import load
    from expertsteer_lens.hosts.loading import load_model

    loaded = load(plan)
    model = load_model(
        target, host=host, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    strength = (
        max((v.coefficient for v in loaded.vectors), key=abs)
        if coefficient is None
        else coefficient
    )
    print_texts(steered_texts(loaded, model, prompt, strength, max_new_tokens, allow_mismatch))


@app.command()
def evaluate(
    plan: PlanName,
    target: TargetName,
    fit: Annotated[
        Path | None,
        typer.Option(
            "--fit", help="the fit it came from, which gives the native ceiling, prompts and texts"
        ),
    ] = None,
    behaviour: Annotated[
        Path | None,
        typer.Option(help="JSON with 'prompts', 'positive', 'negative'; default: kept by the fit"),
    ] = None,
    neutral: Annotated[
        Path | None,
        typer.Option(
            help="neutral texts, one a line: half calibrate, half test; default: kept by the fit"
        ),
    ] = None,
    n_random: NRandom = 5,
    host: HostName = "transformer_lens",
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: Trust = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder for figure and tables; default: none are written"),
    ] = None,
    seed: Seed = 0,
) -> None:
    """A saved plan against random directions; with `--fit` also against shuffled labels and the
    native ceiling."""
    from expertsteer_lens.evaluation.run import evaluate as run
    from expertsteer_lens.files.io import load
    from expertsteer_lens.hosts.loading import load_model

    if fit is None and (behaviour is None or neutral is None):
        raise ArgumentError("give --behaviour and --neutral, or --fit, which holds some of both.")
    loaded = load(plan)
    wanted = None if behaviour is None else read_behaviour(behaviour)
    texts = None if neutral is None else read_texts(neutral)
    if texts is not None and len(texts) < 2:
        raise DataError(
            f"{neutral} holds {len(texts)} texts; give at least 2, half to calibrate and half to "
            "test."
        )
    model = load_model(
        target, host=host, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    result = run(
        loaded,
        model,
        fit=None if fit is None else load(fit, target=model),
        behaviour=wanted,
        neutral=None if texts is None else texts[1::2],
        calibration_texts=None if texts is None else texts[::2],
        n_random=n_random,
        seed=seed,
        progress=True,
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_evaluation(out, result)
    print_evaluation(result)


@app.command()
def export(
    plan: PlanName,
    format: Annotated[
        str,
        typer.Option("--format", help="lm_eval (steered model of lm-evaluation-harness) or gguf"),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="file to write: .pt for lm_eval, .gguf for gguf")
    ],
    blocks: Annotated[
        str, typer.Option(help="lm_eval: path of the blocks below the base model")
    ] = "layers",
    model_hint: Annotated[
        str, typer.Option(help="gguf: architecture noted in the file")
    ] = "unknown",
) -> None:
    """Write a saved plan in another program's format, strengths folded in; loads no model."""
    from expertsteer_lens._checks import check_choice
    from expertsteer_lens.files.export import FORMATS, export_plan
    from expertsteer_lens.files.io import load

    check_choice("--format", format, FORMATS)
    given = {"blocks": blocks, "model_hint": model_hint}
    options = {name: given[name] for name in FORMATS[format].options if name in given}
    path = export_plan(load(plan), out, format=format, **options)
    say(str(path.resolve()))


@app.command()
def bench(
    out: Out = Path("expertsteer-bench"),
    domains: Annotated[
        list[str] | None, typer.Option("--domain", help="default: all four; may be repeated")
    ] = None,
    studies: Annotated[
        bool, typer.Option(help="also the width and the domain of the expert")
    ] = True,
    n_random: NRandom = 5,
    seed: Seed = 0,
) -> None:
    """15 tasks in four domains on bundled models: every method, same choices and budget. Under 15
    minutes on two cores."""
    from expertsteer_lens.benchmarks.offline import run_bench
    from expertsteer_lens.zoo.domains import DOMAINS

    result = run_bench(
        domains=tuple(domains) if domains else DOMAINS,
        studies=studies,
        n_random=n_random,
        seed=seed,
        on_progress=lambda line: say(f"  {line}"),
    )
    result.save(out)
    table = result.by_domain().drop(columns="effect").mul(100)
    print_frame(
        table.round(0).astype(int).reset_index(), "right answer likeliest, % of test prompts"
    )
    say(
        f"\n{result.seconds:.0f} s; tables with effects and intervals in {out / 'bench.md'}, "
        f"figure in {out / 'bench.html'}"
    )
    say(str(out.resolve()))


@app.command()
def benchmarks(
    domain: Annotated[
        str | None, typer.Option(help="medicine, finance, mathematics or general")
    ] = None,
) -> None:
    """List the public benchmarks that `fit --benchmark` takes; reads nothing."""
    import pandas as pd

    from expertsteer_lens.benchmarks import public as presets

    found = [presets.get(name) for name in presets.names(domain)]
    rows = [
        {
            "name": p.name,
            "domain": p.domain,
            "hub": p.hub_id,
            "split": p.split,
            "licence": p.licence,
        }
        for p in found
    ]
    print_frame(pd.DataFrame(rows), f"{len(rows)} benchmarks", names=True)


if __name__ == "__main__":
    main()
