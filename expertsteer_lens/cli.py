"""Command line: `expertsteer-lens demo | fit | show | steer | evaluate`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .errors import DataError, ExpertSteerError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Steer a language model with directions taught by another model.",
)  # fmt: skip
console = Console(highlight=False)

Out = Annotated[Path, typer.Option("--out", help="folder for the results; made if missing")]
Seed = Annotated[int, typer.Option(help="of every random choice")]
HostName = Annotated[str, typer.Option("--host", help="transformer_lens, nnsight or huggingface")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run model code that ships with the weights")]


def main() -> None:
    """Entry point: our errors end in one line and exit code 1, without a traceback."""
    try:
        app()
    except ExpertSteerError as error:
        console.print(f"[red]{type(error).__name__}[/red]: {error}", markup=True)
        raise SystemExit(1) from None


@app.command()
def demo(out: Out = Path("expertsteer-demo"), seed: Seed = 0, n_random: int = 5) -> None:
    """The four steps on the two bundled models, with controls, figures and a verdict. Under two minutes on two cores."""
    from . import zoo
    from .evaluation import evaluate
    from .pipeline import ExpertSteer

    started = time.perf_counter()
    expert, target = zoo.load_pair()
    pairs, anchors, behaviour = zoo.contrast_pairs(), zoo.anchors(), zoo.behaviour()
    console.print(f"[bold]expert[/bold] {_describe(expert)}  →  [bold]target[/bold] {_describe(target)}")
    console.print(f"{pairs}\n{len(anchors)} unlabelled anchors\n{behaviour}\n")
    fit = ExpertSteer(preset="anchored", seed=seed).fit(
        expert, target, pairs, anchors=anchors, behaviour=behaviour, on_step=_print_step
    )
    plan = fit.plan(coefficient="auto")
    for pair in fit.layer_pairs:
        console.print(f"  chosen     {pair.expert} → {pair.target}, coefficient {plan.vectors[0].coefficient:g}")
    console.print("\n[bold]the paper's preset[/bold] (reconstruction-only auto-encoder, lowest mutual information)")
    paper = ExpertSteer(preset="paper", seed=seed).fit(
        expert, target, pairs, anchors=anchors, behaviour=behaviour, on_step=_print_step
    )
    texts = _steered_texts(plan, target, zoo.prompts()[:3], plan.vectors[0].coefficient)
    _print_texts(texts)
    result = evaluate(
        plan, target, fit=fit, n_random=n_random, seed=seed, compare={"paper preset": paper.plan()}, progress=True
    )
    _write_results(out, fit, plan, result, texts)
    _print_evaluation(result)
    console.print(f"\n{time.perf_counter() - started:.0f} s; open {out / 'report.html'}")
    console.print(str(out.resolve()), soft_wrap=True)


@app.command()
def fit(
    expert: Annotated[str, typer.Option(help="folder or hub id of the model that teaches")],
    target: Annotated[str, typer.Option(help="folder or hub id of the model to steer")],
    pairs: Annotated[Path, typer.Option(help="JSON lines with fields 'positive' and 'negative'")],
    anchors: Annotated[Path | None, typer.Option(help="unlabelled texts, one a line")] = None,
    behaviour: Annotated[Path | None, typer.Option(help="JSON with 'prompts', 'positive', 'negative'")] = None,
    preset: Annotated[str, typer.Option(help="anchored or paper")] = "anchored",
    host: HostName = "transformer_lens",
    trust_remote_code: Trust = False,
    out: Out = Path("expertsteer-plan"),
    seed: Seed = 0,
) -> None:
    """Fit on your own two models and save the plan; with a behaviour, evaluate it and write the report too."""
    from .contrast import ContrastPairs
    from .evaluation import evaluate
    from .hosts.loading import load_model
    from .io import save
    from .pipeline import ExpertSteer

    contrast = ContrastPairs.from_jsonl(pairs)
    anchor_texts = (
        None if anchors is None else [t for t in anchors.read_text(encoding="utf-8").splitlines() if t.strip()]
    )
    wanted = None if behaviour is None else read_behaviour(behaviour)
    expert_model = load_model(expert, host=host, trust_remote_code=trust_remote_code)
    target_model = load_model(target, host=host, trust_remote_code=trust_remote_code)
    found = ExpertSteer(preset=preset, seed=seed).fit(
        expert_model, target_model, contrast, anchors=anchor_texts, behaviour=wanted, on_step=_print_step
    )
    plan = found.plan(coefficient="auto")
    if wanted is None:
        save(plan, out)
        console.print("no behaviour given: layers were chosen by the target's read-out, and nothing was evaluated")
    else:
        result = evaluate(plan, target_model, fit=found, seed=seed, progress=True)
        _write_results(out, found, plan, result, [])
        _print_evaluation(result)
    console.print(str(out.resolve()), soft_wrap=True)


@app.command()
def show(plan: Annotated[str, typer.Argument(help="folder or hub id of a saved plan")]) -> None:
    """Print what a saved plan does and where it comes from; loads no model."""
    from .io import load

    loaded = load(plan)
    console.print(repr(loaded))
    _print_frame(loaded.to_pandas(), "vectors")
    facts = {
        k: v for k, v in loaded.provenance.items() if k in ("expert", "target", "pairs", "anchors", "behaviour", "seed")
    }
    console.print_json(json.dumps(facts, default=str))


@app.command()
def steer(
    plan: Annotated[str, typer.Argument(help="folder or hub id of a saved plan")],
    target: Annotated[str, typer.Option(help="folder or hub id of the target")],
    prompt: Annotated[list[str], typer.Option(help="may be given several times")],
    coefficient: Annotated[float | None, typer.Option(help="default: the plan's own")] = None,
    max_new_tokens: int = 60,
    host: HostName = "transformer_lens",
    trust_remote_code: Trust = False,
    allow_mismatch: Annotated[bool, typer.Option(help="use a plan fitted on other weights")] = False,
) -> None:
    """Generate at minus, zero and plus the plan's strength, side by side."""
    from .hosts.loading import load_model
    from .io import load

    loaded = load(plan)
    model = load_model(target, host=host, trust_remote_code=trust_remote_code)
    strength = loaded.vectors[0].coefficient if coefficient is None else coefficient
    _print_texts(_steered_texts(loaded, model, prompt, strength, max_new_tokens, allow_mismatch))


@app.command()
def evaluate(
    plan: Annotated[str, typer.Argument(help="folder or hub id of a saved plan")],
    target: Annotated[str, typer.Option(help="folder or hub id of the target")],
    behaviour: Annotated[Path, typer.Option(help="JSON with 'prompts', 'positive', 'negative'")],
    neutral: Annotated[Path, typer.Option(help="neutral texts, one a line; half calibrate the controls, half test")],
    n_random: int = 5,
    host: HostName = "transformer_lens",
    trust_remote_code: Trust = False,
    seed: Seed = 0,
) -> None:
    """A saved plan against random directions on your prompts (no native ceiling: that needs the fit)."""
    from .evaluation import evaluate as run
    from .hosts.loading import load_model
    from .io import load

    texts = [t for t in neutral.read_text(encoding="utf-8").splitlines() if t.strip()]
    model = load_model(target, host=host, trust_remote_code=trust_remote_code)
    result = run(
        load(plan), model, behaviour=read_behaviour(behaviour), neutral=texts[1::2], calibration_texts=texts[::2],
        n_random=n_random, seed=seed, progress=True,
    )  # fmt: skip
    _print_evaluation(result)


def read_behaviour(path: Path) -> Any:
    """A `Behaviour` from a JSON file with the keys prompts, positive and negative."""
    from .contrast import Behaviour

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error.msg}, line {error.lineno}).") from error
    missing = [k for k in ("prompts", "positive", "negative") if k not in data]
    if missing:
        raise DataError(f"{path} lacks {missing[0]!r}; a behaviour file holds 'prompts', 'positive' and 'negative'.")
    return Behaviour(prompts=data["prompts"], positive=data["positive"], negative=data["negative"])


def _steered_texts(
    plan: Any, model: Any, prompts: list[str], strength: float, max_new_tokens: int = 40, allow_mismatch: bool = False
) -> list[Any]:
    from .hosts import as_host
    from .report import SteeredText

    host = as_host(model)
    out = []
    for prompt in prompts:
        texts = {}
        for coefficient in (-strength, 0.0, strength):
            with plan.with_coefficient(coefficient).hooks(model, allow_mismatch=allow_mismatch):
                texts[coefficient] = host.generate([prompt], max_new_tokens=max_new_tokens)[0]
        out.append(SteeredText(prompt, texts))
    return out


def _write_results(out: Path, fit: Any, plan: Any, result: Any, texts: list[Any]) -> None:
    from .io import save
    from .plots import plot_dose_response, plot_evaluation, plot_layer_pair_mi, plot_layer_pairs
    from .report import write_report

    out.mkdir(parents=True, exist_ok=True)
    curve = fit.calibrate(plan, negative=True)
    figures = {
        "layer_pair_mi": plot_layer_pair_mi(fit.layer_pair_mi, layer_pairs=fit.layer_pairs),
        "layer_pairs": plot_layer_pairs(fit.layer_pairs),
        "dose_response": plot_dose_response(curve),
        "comparison": plot_evaluation(result),
    }
    for (
        name,
        figure,
    ) in figures.items():  # "directory": the figures share one plotly.min.js beside them and open offline
        figure.write_html(out / f"{name}.html", include_plotlyjs="directory")
    result.to_pandas(collapse=False).to_csv(out / "comparison.csv", index=False)
    fit.to_pandas().to_csv(out / "layer_pairs.csv", index=False)
    (out / "evaluation.json").write_text(json.dumps(result.to_dict(), indent=1, default=str), encoding="utf-8")
    save(plan, out / "plan")
    write_report(out / "report.html", fit, result, curve, texts)


def _describe(model: Any) -> str:
    from .hosts import as_host

    host = as_host(model)
    return f"{host.name} (d={host.d_model}, {host.n_layers} layers)"


def _print_step(step: dict[str, Any]) -> None:
    figures = "  ".join(f"{k} {v}" for k, v in step.items() if k not in ("step", "seconds"))
    console.print(f"  [green]{step['step']:<10}[/green] {step['seconds']:5.1f} s  {figures}")


def _print_texts(texts: list[Any]) -> None:
    for item in texts:
        table = Table(title=f"“{item.prompt} …”", title_justify="left", show_lines=False, expand=True)
        strengths = sorted(item.texts)
        for s in strengths:
            table.add_column("unsteered" if s == 0 else f"coefficient {s:+.3g}", ratio=1)
        table.add_row(*(item.texts[s] for s in strengths))
        console.print()
        console.print(table)


def _print_evaluation(result: Any) -> None:
    from .report import table_for_people

    console.print()
    _print_frame(
        table_for_people(result), f"effect on held-out prompts; budget: neutral NLL ≤ +{result.budget:g} nats/token"
    )
    console.print(f"\n[bold]{result.verdict}[/bold]")


def _print_frame(frame: Any, title: str) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(frame.columns):
        table.add_column(str(column), justify="left" if i == 0 else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*(str(v) for v in row))
    console.print(table)


if __name__ == "__main__":
    main()
