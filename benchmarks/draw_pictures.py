"""Draw the pictures of `docs/` that show a measured table: `make pictures`, or

    python benchmarks/draw_pictures.py

Nothing is measured: the tables are those of `benchmarks/results`. Needs kaleido and Chrome. The
pictures of notebooks come from the notebooks (`make notebooks-stored`), the others from the command
that stands beside them."""

from __future__ import annotations

import pathlib
from types import SimpleNamespace
from typing import Any

import fit_at_size
import method_choices
import pandas as pd
import real_fields_overview

from expertsteer_lens.benchmarks.transfer import TransferBench
from expertsteer_lens.show.plots import plot_bench

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def figures() -> dict[str, Any]:
    """Each picture's name and its figure."""
    bench = pd.read_csv(RESULTS / "bench" / "bench.csv")
    choices = pd.read_csv(RESULTS / "method_choices.csv").fillna({"value": ""})
    fields = [TransferBench.read(RESULTS / f"real_fields_{t}") for t in ("smollm2", "gemma3")]
    names = real_fields_overview.SHORT
    rows = [
        {**row, "expert": names[row["expert"]], "target": names[row["target"]]}
        for run in fields
        for row in run.rows
    ]
    return {
        "real_fields": TransferBench(rows).plot(),
        "bench": plot_bench(SimpleNamespace(to_pandas=lambda: bench)),
        "method_choices": method_choices.figure(choices),
        "fit_at_size": fit_at_size.figure(fit_at_size.read_rows(RESULTS / "fit_at_size.csv")),
    }


if __name__ == "__main__":
    for name, figure in figures().items():
        figure.write_image(ROOT / "docs" / f"{name}.png")
        print(f"docs/{name}.png: {figure.layout.title.text}")
