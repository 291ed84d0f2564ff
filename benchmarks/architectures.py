"""Every architecture on every host: `make architectures`.

A tiny random model of each, built from its configuration in code, is steered from the last token of
the prompt on (`tests/conformance.py`). Stops at the first that is not exact; else writes
`benchmarks/results/architectures.md`, and `benchmarks/fill_readme.py` puts it into the docs.
"""

from __future__ import annotations

import pathlib
import platform
import sys
from importlib.metadata import version

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import architectures  # noqa: E402
import conformance  # noqa: E402

PACKAGES = ("torch", "transformers", "transformer-lens", "nnsight")
HEAD = ("architecture", "class", "Hugging Face", "TransformerBridge", "nnsight", "moved by")


def cell(row: conformance.Row) -> str:
    if row.refused:
        kind, _, why = row.refused.partition(": ")
        return f"refused ({kind}: {why.split(';')[0].split('. ')[0]})"
    return f"{row.ways:.0e}"


def line(family: str) -> str:
    rows = [conformance.check(family, host) for host in conformance.HOSTS]
    moved = max(row.moved for row in rows)
    kind = type(architectures.made(family)).__name__
    effect = f"{moved:.1f}" if moved else ""
    return " | ".join(["", f"`{family}`", kind, *map(cell, rows), effect, ""]).strip()


def main() -> None:
    lines = []
    for family in architectures.CONFIGS:
        lines.append(line(family))
        print(lines[-1], flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    title = f"# `make architectures`: Python {platform.python_version()}, {versions}"
    head = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    path = ROOT / "benchmarks" / "results" / "architectures.md"
    path.write_text("\n".join([title, "", *head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
