"""The overview of the committed runs of `expertsteer-lens bench --real`, and their tables:

    python benchmarks/real_fields_overview.py

Copies of the runs lie in `benchmarks/results/real_fields_*/run.json`; nothing is measured here.
"""

from __future__ import annotations

import pathlib
from typing import Any

import pages

from expertsteer_lens.benchmarks.transfer import TransferBench
from expertsteer_lens.benchmarks.transfer.tables import overview

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
NAMES = {
    "qwen": "Qwen2.5-Coder-0.5B-Instruct",
    "smollm2": "SmolLM2-135M-Instruct",
    "gemma3": "Gemma 3 270M base",
}
SHORT = {"qwen": "Qwen 0.5B", "smollm2": "SmolLM2 135M", "gemma3": "Gemma 3 270M base"}


SHOWN = ("smollm2", "gemma3")
"""Runs of all 15 fields, with few labels."""
FURTHER = ("written_smollm2", "cost_gemma3")
"""Runs with what each direction costs; SmolLM2's at the block that a direction is best written
to."""
COLUMNS = ("written_smollm2", *SHOWN)
"""Runs of the table for README."""
BOTH_HAVE = (
    ("prompting", 0),
    ("expert as labeller", 0),
    ("native", 30),
    ("self, mapped", 30),
    ("expert, mapped", 30),
)
"""Rows that both runs of SmolLM2 have: method, number of labelled pairs."""


def table(run: str) -> str:
    """The tables of one run, with the models' full names."""
    out: str = TransferBench.read(RESULTS / f"real_fields_{run}").to_markdown()
    for name, full in NAMES.items():
        out = out.replace(name, full)
    return out


def overview_table() -> str:
    """The runs of all fields in one table, each with the block that was written."""
    runs = [TransferBench.read(RESULTS / f"real_fields_{name}") for name in COLUMNS]
    blocks = []
    for run in runs:
        target = run.transfers[0][1]
        steering = run.choices[f"steering of {target}"]
        written = (steering.get("written") or steering["hook"]).split(".")[1]
        blocks.append(f", block {written}")
    return overview(runs, SHORT, blocks)


def written_table() -> str:
    """Where the target's own direction was tried on the development fields, each time at the
    largest strength within the budget."""
    run = TransferBench.read(RESULTS / "real_fields_written_smollm2")
    steering, budget = run.choices["steering of smollm2"], run.settings["config"]["budget"]
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in steering["tried"]:
        if row["nll_rise"] <= budget:
            key = row["hook"], row["written"]
            if key not in best or row["effect"] > best[key]["effect"]:
                best[key] = row
    lines = pages.head(
        "learnt at block", "written to block", "strength", "effect, nats a token", "neutral NLL"
    )
    for (learnt, written), row in best.items():
        chosen = (learnt, written) == (steering["hook"], steering["written"])
        lines.append(
            pages.row(
                learnt.split(".")[1],
                written.split(".")[1] + (" (chosen)" if chosen else ""),
                f"{row['coefficient']:g}",
                f"{row['effect']:+.3f}",
                f"{row['nll_rise']:+.3f}",
            )
        )
    return "\n".join(lines) + "\n"


def blocks_table() -> str:
    """SmolLM2's directions where they were learnt and at the block that was chosen, on the fields
    that both runs have."""
    runs = [TransferBench.read(RESULTS / f"real_fields_{name}") for name in ("smollm2", FURTHER[0])]
    tasks = [run.by_task().set_index(["method", "n_pairs", "task"]).sort_index() for run in runs]
    shared = sorted(set.intersection(*(set(t.index.get_level_values("task")) for t in tasks)))
    written = [run.choices["steering of smollm2"] for run in runs]
    blocks = [(s.get("written") or s["hook"]).split(".")[1] for s in written]
    heads = [f"{what}, block {b}" for what in ("effect", "right answer likelier") for b in blocks]
    lines = pages.head("labelled pairs", "direction", *heads)
    for method, n in BOTH_HAVE:
        parts = [t.loc[method, n].loc[shared] for t in tasks]
        effects = [f"{part.effect.mean():+.3f}" for part in parts]
        shares = [f"{part.accuracy.mean():.0%}" for part in parts]
        lines.append(pages.row(str(n), method, *effects, *shares))
    return "\n".join(lines) + f"\n\n{len(shared)} fields: {', '.join(shared)}.\n"


if __name__ == "__main__":
    for run in (*SHOWN, *FURTHER):
        (RESULTS / f"real_fields_{run}" / "bench.md").write_text(table(run), encoding="utf-8")
    (RESULTS / "real_fields.md").write_text(overview_table(), encoding="utf-8")
    (RESULTS / "real_fields_written.md").write_text(written_table(), encoding="utf-8")
    (RESULTS / "real_fields_blocks.md").write_text(blocks_table(), encoding="utf-8")
    print(overview_table())
