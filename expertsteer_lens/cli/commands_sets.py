"""`bench` runs the offline benchmark; `benchmarks` lists the public sets that `fit` can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from expertsteer_lens.errors import ArgumentError

from .as_json import print_json, rows_of, tables_as_json
from .options import AsJson, ModelOptions, Out, Seed
from .stopped import goes_on_from
from .terminal import print_frame, say

REAL = "On real models instead"
"""Group of the options that go with `--real`."""

TRANSFERS = ("qwen:smollm2", "smollm2:gemma3", "qwen:gemma3")


def bench(
    out: Out = Path("expertsteer-bench"),
    domains: Annotated[
        list[str] | None, typer.Option("--domain", help="default: all four; may be repeated")
    ] = None,
    studies: Annotated[
        bool, typer.Option(help="also the width and the domain of the expert")
    ] = True,
    n_random: Annotated[
        int | None,
        typer.Option(
            min=2, help="random directions; default 5, with --real 10", show_default=False
        ),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    real: Annotated[
        Path | None,
        typer.Option(
            help="the folder that benchmarks/fetch_real.py made, with models and domainsteer",
            rich_help_panel=REAL,
        ),
    ] = None,
    data: Annotated[
        Path,
        typer.Option(help="folder with gsm8k, truthfulqa and steerkit_pairs", rich_help_panel=REAL),
    ] = Path("data"),
    transfers: Annotated[
        list[str] | None,
        typer.Option(
            "--transfer",
            help="EXPERT:TARGET, folders in it or hub ids; may be repeated",
            rich_help_panel=REAL,
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", help="default all 18; may be repeated", rich_help_panel=REAL),
    ] = None,
    n_pairs: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="numbers of labelled pairs; may be repeated", rich_help_panel=REAL
        ),
    ] = None,
    n_draws: Annotated[
        int | None,
        typer.Option(
            min=1, help="draws of the labelled pairs", show_default="20", rich_help_panel=REAL
        ),
    ] = None,
    few_labels: Annotated[
        bool,
        typer.Option(
            help="also directions from few labelled pairs, which take most of the time; a run "
            "without them can be given them later",
            rich_help_panel=REAL,
        ),
    ] = True,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="of the weights, e.g. bfloat16", show_default="float32", rich_help_panel=REAL
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="e.g. cuda:1", rich_help_panel=REAL)] = None,
) -> None:
    """The offline benchmark: 15 tasks on bundled models.

    Four domains, every method under the same choices and budget. Under 15 minutes on two cores.

    With --real: real models and tasks from local folders, effect against the number of labelled
    pairs. Hours on two cores; a run that was stopped goes on from OUT."""
    if real is not None:
        if domains or not studies:
            raise ArgumentError(
                "--domain and --no-studies have no meaning with --real; use --task."
            )
        if not few_labels and (n_pairs or n_draws is not None):
            raise ArgumentError(
                "--no-few-labels leaves out what --n-pairs and --n-draws are for; give one of them."
            )
        given = {"n_pairs": tuple(n_pairs or ()), "n_draws": n_draws, "n_random": n_random}
        options = ModelOptions(host="huggingface", dtype=dtype or "float32", device=device)
        _bench_real(real, data, transfers, tasks, given, few_labels, options, out, seed, as_json)
        return
    beside_real = transfers or tasks or n_pairs or dtype or device or not few_labels
    if beside_real or n_draws is not None:
        raise ArgumentError(
            "--transfer, --task, --n-pairs, --n-draws, --no-few-labels, --dtype and --device go "
            "with --real FOLDER."
        )
    from expertsteer_lens.benchmarks.offline import run_bench
    from expertsteer_lens.zoo.domains import DOMAINS

    with tables_as_json(as_json):
        result = run_bench(
            domains=tuple(domains) if domains else DOMAINS,
            studies=studies,
            n_random=5 if n_random is None else n_random,
            seed=seed,
            on_progress=lambda line: say(f"  {line}"),
        )
    result.save(out)
    if as_json:
        print_json(
            {"seconds": result.seconds, "rows": rows_of(result.to_pandas()), "out": str(out)}
        )
        return
    table = result.by_domain().drop(columns="effect").mul(100)
    print_frame(
        table.round(0).astype(int).reset_index(), "right answer likeliest, % of test prompts"
    )
    say(
        f"\n{result.seconds:.0f} s; tables with effects and intervals in {out / 'bench.md'}, "
        f"figure in {out / 'bench.html'}"
    )
    say(str(out.resolve()))


def _bench_real(
    folder: Path,
    data: Path,
    transfers: list[str] | None,
    tasks: list[str] | None,
    given: Mapping[str, Any],
    few_labels: bool,
    options: ModelOptions,
    out: Path,
    seed: int,
    as_json: bool,
) -> None:
    import pandas as pd

    from expertsteer_lens.benchmarks.transfer import TransferConfig, bench_transfer
    from expertsteer_lens.benchmarks.transfer.real import read_real_data

    options.check()
    pairs = [tuple(pair.split(":")) for pair in transfers or TRANSFERS]
    wrong = [pair for pair in pairs if len(pair) != 2 or not all(pair)]
    if wrong:
        raise ArgumentError(f"--transfer {':'.join(wrong[0])!r} must be EXPERT:TARGET.")
    found = read_real_data(folder, data, only=None if tasks is None else tuple(tasks))
    said = {name: value for name, value in given.items() if value not in (None, ())}
    config = replace(TransferConfig(seed=seed), **said)
    if not few_labels:
        config = replace(config, n_pairs=())
    models = {}
    with tables_as_json(as_json), goes_on_from(out):
        for name in dict.fromkeys(name for pair in pairs for name in pair):
            here = folder / name
            say(f"loading {name}")
            models[name] = options.load(str(here) if here.is_dir() else name)
        result = bench_transfer(
            models,
            [(expert, target) for expert, target in pairs],
            found.tasks,
            development=found.development,
            anchors=found.anchors,
            neutral=found.neutral,
            config=config,
            out=out,
            on_progress=lambda line: say(f"  {line}"),
        )
    result.save(out)
    if as_json:
        print_json({"rows": rows_of(result.summary()), "out": str(out)})
        return
    gains = result.differences()
    shown = pd.DataFrame(
        {
            "models": gains.expert + " → " + gains.target,
            "pairs": gains.n_pairs,
            "difference": gains.difference,
            "nats per token": [
                f"{r.effect:+.3f} [{r.low:+.3f}, {r.high:+.3f}]" for r in gains.itertuples()
            ],
        }
    )
    print_frame(shown, f"paired differences over {gains.tasks.max()} tasks")
    say(str(out.resolve()))


def benchmarks(
    domain: Annotated[
        str | None, typer.Option(help="medicine, finance, mathematics or general")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the public benchmarks that `fit --benchmark` takes."""
    import pandas as pd

    from expertsteer_lens.benchmarks import public

    rows = [
        {
            "name": b.name,
            "domain": b.domain,
            "hub": b.hub_id,
            "split": b.split,
            "licence": b.licence,
        }
        for b in map(public.get, public.names(domain))
    ]
    if as_json:
        print_json({"benchmarks": rows})
        return
    print_frame(pd.DataFrame(rows), f"{len(rows)} benchmarks", names=True)
