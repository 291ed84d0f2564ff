"""`bench` runs the offline benchmark; `benchmarks` lists the public sets that `fit` can read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .as_json import print_json, rows_of, tables_as_json
from .io import print_frame, say
from .options import AsJson, NRandom, Out, Seed


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
    as_json: AsJson = False,
) -> None:
    """Run the offline benchmark: 15 tasks in four domains on bundled models, every method under the
    same choices and budget. Under 15 minutes on two cores."""
    from expertsteer_lens.benchmarks.offline import run_bench
    from expertsteer_lens.zoo.domains import DOMAINS

    with tables_as_json(as_json):
        result = run_bench(
            domains=tuple(domains) if domains else DOMAINS,
            studies=studies,
            n_random=n_random,
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


def benchmarks(
    domain: Annotated[
        str | None, typer.Option(help="medicine, finance, mathematics or general")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the public benchmarks that `fit --benchmark` takes; reads nothing."""
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
