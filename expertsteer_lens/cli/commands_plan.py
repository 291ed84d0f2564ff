"""Commands on what was saved: `show`, `steer`, `evaluate`, `export`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from expertsteer_lens.errors import ArgumentError, DataError

from .as_json import print_json, rows_of, tables_as_json
from .inputs import check_saved, load_saved, read_behaviour, read_texts
from .options import AsJson, BehaviourFile, ModelOptions, NRandom, PlanName, Seed, TargetName
from .results import EVALUATION_FILES, check_out, steered_texts, write_evaluation
from .stopped import Stopped
from .terminal import print_evaluation, print_frame, print_texts, say, say_json


def show(
    saved: Annotated[
        str,
        typer.Argument(
            metavar="SAVED", help="folder or hub id of a saved plan, fit, evaluation, ..."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Print what was saved, without a model.

    What a plan does and where it comes from; the steps and pairs of a fit; the rows of an
    evaluation."""
    from expertsteer_lens.evaluation.result import Evaluation
    from expertsteer_lens.files.io import load
    from expertsteer_lens.pipeline import ExpertSteering
    from expertsteer_lens.steer.plan import SteeringPlan

    loaded = load(saved)
    if as_json:
        found: dict[str, Any] = {"kind": type(loaded).__name__, "text": repr(loaded)}
        if hasattr(loaded, "to_pandas"):
            found["rows"] = rows_of(loaded.to_pandas())
        for name in ("provenance", "verdict"):
            if hasattr(loaded, name):
                found[name] = getattr(loaded, name)
        print_json(found)
    elif isinstance(loaded, ExpertSteering):
        _show_fit(loaded)
    elif isinstance(loaded, Evaluation):
        print_evaluation(loaded)
    elif isinstance(loaded, SteeringPlan):
        _show_plan(loaded)
    else:
        say(repr(loaded))
        if hasattr(loaded, "to_pandas"):
            print_frame(loaded.to_pandas().head(20), type(loaded).__name__)


def _show_fit(fit: Any) -> None:
    from expertsteer_lens.show.drawing import layer_label

    say(fit.summary())
    short = {
        "mutual_information": "MI",
        "aligner_r2": "aligner R²",
        "rfm_validation_auc": "RFM AUC",
    }
    frame = fit.to_pandas()
    shown = frame.head(10).rename(columns=short)
    for column in ("expert", "target"):  # short: a terminal has 80 columns
        shown[column] = shown[column].map(layer_label)
    shown = shown.rename(columns={"expert": "expert layer", "target": "target layer"})
    print_frame(shown, f"the first of {len(frame)} fitted pairs")


def _show_plan(plan: Any) -> None:
    say(repr(plan))
    frame = plan.to_pandas().rename(
        columns={
            "coefficient": "coeff.",
            "relative_to": "unit",
            "median_norm": "median norm",
            "preserve_norm": "keeps norm",
        }
    )
    # What says nothing is left out, so that the names fit into a terminal.
    silent = [c for c in ("keeps norm", "gate", "parameters") if not frame[c].astype(bool).any()]
    print_frame(frame.drop(columns=["layer", *silent]), "vectors", names=True)
    names = ("expert", "target", "pairs", "anchors", "behaviour", "seed")
    facts = {k: v for k, v in plan.provenance.items() if k in names}
    say_json(facts)


def steer(
    plan: PlanName,
    target: TargetName,
    models: ModelOptions,
    prompt: Annotated[list[str] | None, typer.Option(help="may be given several times")] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="each prompt is what a user says to a chat model"),
    ] = False,
    interactive: Annotated[
        bool,
        typer.Option("--interactive", help="ask for prompts until an empty line or end of input"),
    ] = False,
    coefficient: Annotated[float | None, typer.Option(help="default: the plan's own")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate, at most")] = 60,
    allow_mismatch: Annotated[
        bool, typer.Option(help="use a plan fitted on other weights")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Generate at minus, zero and plus the plan's strength."""
    if not prompt and not interactive:
        raise ArgumentError("give --prompt TEXT (several times, if you like), or --interactive.")
    loaded = load_saved(plan, "SteeringPlan")
    model = models.load(target)
    if coefficient is None:
        coefficient = max((v.coefficient for v in loaded.vectors), key=abs)

    def answer(prompts: list[str]) -> None:
        asked: list[Any] = [[{"role": "user", "content": p}] if chat else p for p in prompts]
        texts = steered_texts(loaded, model, asked, coefficient, max_new_tokens, allow_mismatch)
        texts = [replace(t, prompt=p) for t, p in zip(texts, prompts, strict=True)]
        if as_json:
            for text in texts:
                print_json({"prompt": text.prompt, "texts": dict(text.texts)})
        else:
            print_texts(texts)

    if prompt:
        answer(prompt)
    while interactive:
        try:
            asked = input("prompt> " if sys.stdin.isatty() else "")
        except EOFError:
            break
        if not asked.strip():
            break
        answer([asked])


def evaluate(
    plan: PlanName,
    target: TargetName,
    models: ModelOptions,
    fit: Annotated[
        Path | None,
        typer.Option(
            "--fit", help="the fit it came from, which gives the native ceiling, prompts and texts"
        ),
    ] = None,
    behaviour: BehaviourFile = None,
    neutral: Annotated[
        Path | None,
        typer.Option(
            help="texts on which steering should change nothing, one a line: every other one "
            "calibrates, the rest test; default: kept by the fit"
        ),
    ] = None,
    n_random: NRandom = 5,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder for figure and tables; default: none are written"),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure a saved plan beside random directions.

    With `--fit` also beside shuffled labels and the native ceiling: what the target can do with
    its own direction. Where it is stopped (Ctrl-C), the rows that are finished are kept in
    OUT/stopped (expertsteer-evaluation/stopped without --out), and the same command goes on from
    there."""
    from expertsteer_lens.data.parts import halves
    from expertsteer_lens.evaluation.finished import FinishedRows
    from expertsteer_lens.evaluation.run import evaluate as run

    if fit is None and (behaviour is None or neutral is None):
        raise ArgumentError("give --behaviour and --neutral, or --fit, which holds some of both.")
    if out is not None:
        check_out(out, files=EVALUATION_FILES)
    loaded = load_saved(plan, "SteeringPlan")
    if fit is not None:
        check_saved(str(fit), "ExpertSteering")
    prompts = None if behaviour is None else read_behaviour(behaviour)
    texts = None if neutral is None else read_texts(neutral)
    calibrates, tests = halves(texts or [])
    if texts is not None and not tests:
        raise DataError(
            f"{neutral} holds 1 text (equal ones count once); give at least 2, half to calibrate "
            "and half to test."
        )
    model = models.load(target)
    with tables_as_json(as_json):
        stopped = Stopped(out or Path("expertsteer-evaluation"))
        with stopped.kept_as("rows") as rows:
            result = run(
                loaded,
                model,
                fit=None if fit is None else load_saved(str(fit), "ExpertSteering", target=model),
                behaviour=prompts,
                neutral=None if texts is None else tests,
                calibration_texts=None if texts is None else calibrates,
                n_random=n_random,
                seed=seed,
                progress=True,
                finished=rows,
            )
            if out is not None:
                stopped.finished["rows"] = FinishedRows.of(result)
                out.mkdir(parents=True, exist_ok=True)
                write_evaluation(out, result)
        stopped.clear()
    if as_json:
        print_json({"verdict": result.verdict, **result.to_dict()})
    else:
        print_evaluation(result)


def export(
    plan: PlanName,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="lm_eval (steered model of lm-evaluation-harness), gguf (llama.cpp, repeng), "
            "hotwire (vLLM), or merged (a checkpoint with the plan in its weights)",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="to write: a .pt file for lm_eval and hotwire, .gguf, a folder for merged"
        ),
    ],
    models: ModelOptions,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="folder or hub id of the target: merged needs it; lm_eval and hotwire read the "
            "names and number of its layers off it",
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(help='lm_eval: path of the blocks below the base model; default "layers"'),
    ] = None,
    model_hint: Annotated[
        str | None, typer.Option(help="gguf: architecture noted in the file")
    ] = None,
    n_layers: Annotated[
        int | None, typer.Option(min=1, help="hotwire: of the target; default: as the plan says")
    ] = None,
    allow_mismatch: Annotated[
        bool,
        typer.Option("--allow-mismatch", help="merged: into other weights than it was made for"),
    ] = False,
) -> None:
    """Write a saved plan in another program's format.

    Coefficients are folded in. A model is loaded only if one is given with `--target`, as plain
    Hugging Face (`--host` is of no matter)."""
    from expertsteer_lens._checks import check_choice
    from expertsteer_lens.files.export import FORMATS, export_plan

    chosen = FORMATS[check_choice("--format", format, FORMATS)]
    if "model" in chosen.required and target is None:
        raise ArgumentError(
            f"--format {format} needs --target, the model whose weights take the plan."
        )
    given = {
        "blocks": blocks,
        "model_hint": model_hint,
        "n_layers": n_layers,
        "allow_mismatch": allow_mismatch or None,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if target is not None:
        options["model"] = target
    for name in options:
        check_choice(f"an option of --format {format}", name, chosen.options)
    loaded = load_saved(plan, "SteeringPlan")
    chosen.check(loaded)
    try:
        chosen.check_place(out)
    except ArgumentError as error:
        said = str(error).removeprefix("path ")
        raise ArgumentError(f"--out {said} (--format {format})") from None
    if target is not None:
        options["model"] = replace(models, host="huggingface").load(target)
    say(str(export_plan(loaded, out, format=format, **options).resolve()))
