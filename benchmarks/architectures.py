"""Every architecture on every host: `make architectures`.

A tiny random model of each, built from its configuration in code, is steered from the last token of
the prompt on (`tests/conformance.py`). Stops at the first that is not exact; else writes
`benchmarks/results/architectures.md`, and `benchmarks/fill_readme.py` puts it into the docs.

HookedTransformer is in TransformerLens 3 only, whose environment is another: there, with `--hooked
FILE`, its cells are tried and written to a file; with the same option they are then read here.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import sys
from importlib.metadata import version

import pages

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import architectures  # noqa: E402
import conformance  # noqa: E402

PACKAGES = ("torch", "transformers", "transformer-lens", "nnsight")
HEAD = (
    *("architecture", "class", "Hugging Face", "TransformerBridge", "nnsight"),
    *("HookedTransformer", "moved by"),
)


def cell(row: conformance.Row) -> str:
    if row.refused:
        kind, _, why = row.refused.partition(": ")
        return f"refused ({kind}: {why.split(';')[0].split('. ')[0]})"
    return f"{row.ways:.0e}"


def tried(family: str) -> list[conformance.Row]:
    """On the hosts of this environment."""
    return [
        conformance.check(family, host) for host in conformance.HOSTS if conformance.can_try(host)
    ]


def write_hooked(path: pathlib.Path) -> None:
    cells = {family: cell(tried(family)[0]) for family in architectures.CONFIGS}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": version("transformer-lens"), "cells": cells}, indent=1))
    print(f"{path}: {sum('refused' not in c for c in cells.values())} of {len(cells)} steered")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hooked", type=pathlib.Path, required=True, metavar="FILE")
    path = parser.parse_args().hooked
    if conformance.can_try("hooked_transformer"):
        write_hooked(path)
        return
    hooked = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for family in architectures.CONFIGS:
        rows = tried(family)
        moved = max(row.moved for row in rows)
        kind = type(architectures.made(family)).__name__
        cells = [*map(cell, rows), hooked["cells"][family], f"{moved:.1f}" if moved else ""]
        lines.append(pages.row(f"`{family}`", kind, *cells))
        print(lines[-1], flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    versions += f"; HookedTransformer of transformer-lens {hooked['version']}"
    title = f"# `make architectures`: Python {platform.python_version()}, {versions}"
    page = "\n".join([title, "", *pages.head(*HEAD), *lines])
    pages.keep(page, pages.RESULTS / "architectures.md")


if __name__ == "__main__":
    main()
