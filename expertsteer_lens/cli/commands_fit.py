"""Commands that fit: `demo`, `label`, `fit`, `reproduce`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .as_json import print_json, rows_of, tables_as_json
from .inputs import (
    check_experts,
    lines_named,
    load_saved,
    load_states_or_model,
    read_behaviour,
    read_config,
    read_texts,
    texts_to_fit,
)
from .options import (
    SETTINGS,
    AsJson,
    BehaviourFile,
    ModelOptions,
    NRandom,
    Out,
    Seed,
    TextOptions,
)
from .results import (
    FIT_FILES,
    calibrated,
    check_out,
    steered_texts,
    write_pairs,
    write_results,
    write_table,
)
from .stopped import Stopped
from .terminal import describe, print_evaluation, print_step, print_texts, say


def demo(
    out: Out = Path("expertsteer-demo"),
    seed: Seed = 0,
    n_random: NRandom = 5,
    as_json: AsJson = False,
) -> None:
    """The four steps on two bundled models, with controls.

    Under two minutes on two cores; nothing is downloaded."""
    with tables_as_json(as_json):
        result = _demonstrated(out, seed, n_random)
    if as_json:
        print_json({"out": str(out.resolve()), "verdict": result.verdict, **result.to_dict()})


def _demonstrated(out: Path, seed: int, n_random: int) -> Any:
    """The evaluation of the demo, written to `out` and told as it goes."""
    import torch

    from expertsteer_lens import zoo
    from expertsteer_lens.evaluation.run import evaluate
    from expertsteer_lens.pipeline import ExpertSteer, ExpertSteerConfig

    # Tiny models gain nothing from more threads, and lose much where other processes run.
    torch.set_num_threads(1)
    started = time.perf_counter()
    check_out(out, files=FIT_FILES, saved={"plan": "SteeringPlan"})
    expert, target = zoo.load_pair()
    pairs, anchors, behaviour = zoo.contrast_pairs(), zoo.anchors(), zoo.behaviour()
    say(f"expert {describe(expert)}  →  target {describe(target)}", style="bold")
    say(f"{pairs}\n{len(anchors)} unlabelled anchors\n{behaviour}\n")
    fit = ExpertSteer(preset="anchored", seed=seed).fit(
        expert, target, pairs, anchors=anchors, behaviour=behaviour, on_step=print_step
    )
    plan, curve = calibrated(fit)
    coefficient = plan.vectors[0].coefficient
    for pair in fit.layer_pairs:
        say(f"  chosen     {pair.expert} → {pair.target}, coefficient {coefficient:g}")
    say(
        "\nthe paper's preset (reconstruction-only auto-encoder, lowest mutual information)",
        style="bold",
    )
    steps = ExpertSteerConfig.preset("paper")
    paper = fit.refit(
        aligner=steps.aligner,
        pairing=steps.pairing,
        align_on_pairs=steps.align_on_pairs,
        mi_on=steps.mi_on,
    )
    for step in paper.steps:
        print_step(step)
    texts = steered_texts(plan, target, zoo.prompts()[:3], coefficient)
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
    write_results(out, fit, plan, result, curve, pairs)
    print_evaluation(result)
    say(f"\n{time.perf_counter() - started:.0f} s; open {out / 'report.html'}")
    say(str(out.resolve()))
    return result


def label(
    model: Annotated[str, typer.Option(help="folder or hub id of the model that labels")],
    texts: Annotated[
        Path,
        typer.Option(help="unlabelled texts, one a line (.jsonl: texts or lists of messages)"),
    ],
    models: ModelOptions,
    pairs: Annotated[
        Path | None, typer.Option(help="a few labelled pairs: JSON lines as for `fit --pairs`")
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            help="what one would write to get the positive texts: those that it makes likelier "
            "are positive; needs no labelled pair"
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="what one would write to get the others; default: nothing")
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(help="asked of every text, answered by Yes or No: needs no labelled pair"),
    ] = None,
    flatten: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="leading axes of variation to shrink, see esl.label_texts; default 1, with an "
            "instruction or a question 6",
            show_default=False,
        ),
    ] = None,
    n_rounds: Annotated[
        int | None,
        typer.Option(
            min=0, help="rounds of self-training; default 4, with a question 1", show_default=False
        ),
    ] = None,
    out: Out = Path("labelled-texts"),
) -> None:
    """Label texts by a few pairs, an instruction or a question.

    OUT/pairs.jsonl is for `fit --pairs`, OUT/scores.csv holds every text with its score."""
    from expertsteer_lens.data.contrast import ContrastPairs
    from expertsteer_lens.errors import ArgumentError
    from expertsteer_lens.pipeline import label_texts

    if pairs is None and instruction is None and question is None:
        raise ArgumentError(
            "give --pairs, --instruction or --question; nothing says what is positive."
        )
    if against is not None and instruction is None:
        raise ArgumentError("--against goes with --instruction, which says what is positive.")
    check_out(out, files=("scores.csv", "pairs.jsonl"))
    few = None if pairs is None else ContrastPairs.from_jsonl(pairs)
    unlabelled = read_texts(texts)
    labelled = label_texts(
        models.load(model),
        few,
        unlabelled,
        instruction=instruction,
        against=against,
        question=question,
        n_rounds=n_rounds,
        flatten=flatten,
        progress=True,
    )
    found = labelled.pairs()
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / "scores.csv", labelled.to_pandas())
    write_pairs(out / "pairs.jsonl", found)
    say(f"{labelled!r}\n{found!r}\n{out.resolve()}")


ExpertTokens = Annotated[
    Path | None,
    typer.Option(
        help="what `capture --tokens` left, with an --expert that is states: maps are then "
        "fitted on tokens",
        rich_help_panel=SETTINGS,
    ),
]


def fit(
    expert: Annotated[
        list[str],
        typer.Option(
            help="folder or hub id of the model that teaches, or what `capture` saved of it; "
            "may be repeated: layers are then chosen among those of all experts"
        ),
    ],
    target: Annotated[str, typer.Option(help="folder or hub id of the model to steer")],
    texts: TextOptions,
    models: ModelOptions,
    behaviour: BehaviourFile = None,
    preset: Annotated[
        str, typer.Option(help="anchored or paper", rich_help_panel=SETTINGS)
    ] = "anchored",
    config: Annotated[
        Path | None,
        typer.Option(
            help="JSON with fields of ExpertSteerConfig, over the preset's",
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    expert_tokens: ExpertTokens = None,
    place: Annotated[
        bool,
        typer.Option(
            "--place",
            help="look for the block of the target where the direction is best written, on half "
            "of the behaviour's prompts; else it is written where it was learnt",
        ),
    ] = False,
    n_random: NRandom = 5,
    save_fit: Annotated[
        bool,
        typer.Option(help="also save the whole fit to OUT/fit, for `evaluate --fit` and esl.load"),
    ] = False,
    out: Out = Path("expertsteer-plan"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit on two models of yours and save the plan.

    The plan is OUT/plan; with --behaviour (or --benchmark) it is evaluated too, and OUT/report.html
    shows how well it works. Where it is stopped (Ctrl-C), what is finished is kept in OUT/stopped,
    and the same command goes on from there."""
    with tables_as_json(as_json):
        found, result = _fitted(
            expert,
            target,
            texts,
            models,
            behaviour,
            preset,
            config,
            expert_tokens,
            place,
            n_random,
            save_fit,
            out,
            seed,
        )
    if as_json:
        print_json(
            {
                "plan": str((out / "plan").resolve()),
                "steps": list(found.steps),
                "pairs": rows_of(found.to_pandas()),
                "evaluation": None
                if result is None
                else {"verdict": result.verdict, **result.to_dict()},
            }
        )


def _fitted(
    expert: list[str],
    target: str,
    texts: TextOptions,
    models: ModelOptions,
    behaviour: Path | None,
    preset: str,
    config: Path | None,
    expert_tokens: Path | None,
    place: bool,
    n_random: int,
    save_fit: bool,
    out: Path,
    seed: int,
) -> tuple[Any, Any]:
    """The fit and its evaluation (None without a behaviour), written to `out`."""
    from expertsteer_lens.errors import ArgumentError
    from expertsteer_lens.evaluation.finished import FinishedRows
    from expertsteer_lens.evaluation.run import evaluate
    from expertsteer_lens.files.io import save
    from expertsteer_lens.pipeline import ExpertSteer

    check_experts(expert)
    saved = {"plan": "SteeringPlan"} | ({"fit": "ExpertSteering"} if save_fit else {})
    check_out(out, files=FIT_FILES, saved=saved)
    contrast, prompts = texts_to_fit(texts, seed)
    prompts = prompts if behaviour is None else read_behaviour(behaviour)
    anchors = None if texts.anchors is None else read_texts(texts.anchors)
    if place and prompts is None:
        raise ArgumentError(
            "--place compares blocks on the prompts of a behaviour; give --behaviour, or leave it "
            "out."
        )
    steer = ExpertSteer(read_config(config, preset), seed=seed)
    tokens = None if expert_tokens is None else load_saved(str(expert_tokens), "ActivationStore")
    models.check()
    expert_models = [load_states_or_model(one, models) for one in expert]
    target_model = models.load(target)
    stopped = Stopped(out)
    with stopped.kept_as("states") as states, lines_named(pairs=texts.pairs, anchors=texts.anchors):
        found = steer.fit(
            expert_models,
            target_model,
            contrast,
            anchors=anchors,
            behaviour=prompts,
            progress=True,
            on_step=print_step,
            finished=states,
            expert_tokens=tokens,
        )
    result = None
    with stopped.kept_as("rows", states=found.data) as rows:
        if save_fit:
            save(found, out / "fit")  # first: whatever happens next, nothing has to be read again
        plan, curve = calibrated(found, place=place)
        if prompts is not None:
            result = evaluate(
                plan,
                target_model,
                fit=found,
                n_random=n_random,
                seed=seed,
                progress=True,
                finished=rows,
            )
            stopped.finished["rows"] = FinishedRows.of(result)
            write_results(out, found, plan, result, curve, contrast)
        else:
            out.mkdir(parents=True, exist_ok=True)
            save(plan, out / "plan")
    if result is None:
        say(
            "no behaviour given: layers were chosen by the target's read-out, and nothing was "
            "evaluated"
        )
    else:
        print_evaluation(result)
        say(f"\nopen {out / 'report.html'}")
    stopped.clear()
    say(str((out / "plan").resolve()))
    return found, result


def reproduce(
    saved: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="folder of a saved fit, or what `fit --save-fit` wrote (its OUT)"
        ),
    ],
    expert: Annotated[
        list[str],
        typer.Option(
            help="the model that taught, or the states that `capture` read of it; repeated where "
            "there were several"
        ),
    ],
    target: Annotated[str, typer.Option(help="the model that was steered")],
    texts: TextOptions,
    models: ModelOptions,
    expert_tokens: ExpertTokens = None,
    as_json: AsJson = False,
) -> None:
    """Make a saved fit again and compare.

    From its settings, its seed and the same texts: bit by bit on the same kind of machine, else by
    the directions' cosines. Exit code 1 if it differs."""
    from expertsteer_lens.pipeline import reproduce as run_again
    from expertsteer_lens.pipeline.reproduce import check_texts_of

    with tables_as_json(as_json):
        check_experts(expert)
        folder = saved / "fit" if (saved / "fit" / "config.json").is_file() else saved
        fit = load_saved(str(folder), "ExpertSteering")
        contrast, _ = texts_to_fit(texts, fit.seed)
        anchors = None if texts.anchors is None else read_texts(texts.anchors)
        check_texts_of(fit, contrast, anchors)
        given = expert_tokens
        tokens = None if given is None else load_saved(str(given), "ActivationStore")
        models.check()
        found = run_again(
            fit,
            [load_states_or_model(one, models) for one in expert],
            models.load(target),
            contrast,
            anchors=anchors,
            progress=True,
            on_step=print_step,
            expert_tokens=tokens,
        )
        say(repr(found))
    if as_json:
        print_json(
            {
                "reproduced": found.reproduced,
                "bit_equal": found.bit_equal,
                "same_machine": found.same_machine,
                "verdict": found.verdict,
                "differences": list(found.differences),
                "pairs": rows_of(found.to_pandas()),
            }
        )
    if not found.reproduced:
        raise typer.Exit(1)
