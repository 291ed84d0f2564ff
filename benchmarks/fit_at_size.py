"""Time and memory of the parts of a fit against their sizes, on synthetic states, and a model of
the cost that is fitted to them and tried on sizes it has not seen.

    python benchmarks/fit_at_size.py --output benchmarks/results/fit_at_size

Writes `fit_at_size.csv` (every run), `fit_at_size.md` (the tables) and `fit_at_size.html` (the
figure; `draw_pictures.py` makes the picture of the page). One thread; seconds are those of the
processor, since the machine may be shared, the fewer of two runs where these are short. Memory is
the kernel's high-water mark beyond what was resident before, inputs included.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import itertools
import math
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cost_8b
import pages
import torch
from fit_memory import peak_since_last, resident

from expertsteer_lens.align import AlignerConfig, AlignerGrid, MomentGrid, PairedMoments
from expertsteer_lens.learn import fit_rfm
from expertsteer_lens.pair import MIConfig, layer_pair_mi

MIB = 2**20
Sizes = dict[str, int]


states = partial(cost_8b.states, factors=16)


# -- the parts: each makes its inputs and gives what is to be timed -------------------------------


def maps_on_texts(n: int, d: int) -> Callable[[], Any]:
    """One layer pair, both layers decomposed."""
    expert, target = states(n, d, 1, 0), states(n, d, 1, 1)
    config = AlignerConfig(kind="anchored_autoencoder")
    return lambda: AlignerGrid(target, config).fit(expert)


def moments(n: int, d: int) -> Callable[[], Any]:
    """The moments of one layer pair, in batches of a thousand tokens."""
    expert, target = (
        states(n, d, 1, 0)["blocks.0.hook_resid_post"],
        states(n, d, 1, 1)["blocks.0.hook_resid_post"],
    )
    groups = torch.arange(n) // 10

    def run() -> PairedMoments:
        found = PairedMoments([("0", "0")], d_expert=d, d_target=d)
        for rows in torch.arange(n).split(1000):
            found.update({"0": expert[rows]}, {"0": target[rows]}, groups[rows])
        return found

    return run


def maps_on_moments(d: int) -> Callable[[], Any]:
    """One layer pair from its moments, both layers decomposed."""
    found, config = moments(500, d)(), AlignerConfig(kind="anchored_autoencoder")
    return lambda: MomentGrid(found, config).fit(found.pairs)


def layer_scores(n: int, d: int, layers: int) -> Callable[[], Any]:
    """All layer pairs, with 10 permutations and 20 bootstrap draws."""
    expert, target = states(n, d, layers, 0), states(n, d, layers, 1)
    return lambda: layer_pair_mi(expert, target, MIConfig(n_permutations=10, n_bootstrap=20))


def direction(n: int, d: int) -> Callable[[], Any]:
    """`fit_rfm` with its default search."""
    rows = states(n, d, 1, 0)["blocks.0.hook_resid_post"]
    labels = (rows[:, 0] > rows[:, 0].median()).float()
    return lambda: fit_rfm(rows, labels)


@dataclass(frozen=True)
class Part:
    """What is measured, where, and where the model of its cost is tried."""

    make: Callable[..., Callable[[], Any]]
    sweeps: tuple[Sizes, ...]
    held_out: tuple[Sizes, ...]
    not_run: str = ""
    """Sizes asked for that two cores would need many minutes for."""


def grid(**values: tuple[int, ...]) -> tuple[Sizes, ...]:
    """Every combination."""
    return tuple(
        dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())
    )


PARTS = {
    "maps, one state a text, n < d": Part(
        maps_on_texts,
        grid(n=(128, 256, 512), d=(1024, 2048, 4096)),
        ({"n": 384, "d": 3072}, {"n": 512, "d": 8192}),
        "n above 1,000 at d above 1,000 (n^3)",
    ),
    "maps, one state a text, n > d": Part(
        maps_on_texts,
        grid(n=(2000, 8000, 16000), d=(128, 256, 512)),
        ({"n": 20000, "d": 384},),
        "20,000 anchors at d = 4,096: use token pairs",
    ),
    "moments of token pairs": Part(
        moments, grid(n=(1000, 4000), d=(256, 512, 1024)), ({"n": 20000, "d": 384},)
    ),
    "maps from moments": Part(
        maps_on_moments, grid(d=(256, 512, 768)), ({"d": 1024},), "d = 4,096 and 8,192 (d^3)"
    ),
    "mutual information": Part(
        layer_scores,
        grid(n=(256, 512), d=(512, 2048), layers=(8, 16)),
        ({"n": 384, "d": 1024, "layers": 24}, {"n": 256, "d": 512, "layers": 80}),
    ),
    "direction, n < d": Part(
        direction,
        grid(n=(256, 512, 1024), d=(2048, 4096)),
        ({"n": 768, "d": 8192},),
    ),
    "direction, n > d": Part(
        direction,
        grid(n=(512, 1024, 2048), d=(128, 256)),
        ({"n": 3072, "d": 192},),
        "8,192 labelled texts (n^3; 512 MiB a kernel matrix)",
    ),
}


def measured(part: Part, sizes: Sizes) -> tuple[float, float]:
    """(processor seconds, bytes beyond what was resident before the inputs were made)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident()
    peak_since_last()
    run = part.make(**sizes)
    started = time.process_time()
    run()
    took, used = time.process_time() - started, float(peak_since_last() - before)
    if took < 4.0:  # again: what other processes do to the caches takes time too
        started = time.process_time()
        run()
        took = min(took, time.process_time() - started)
    return took, used


def power_law(rows: list[tuple[Sizes, float]]) -> dict[str, float]:
    """`{"": log of the factor, name: exponent}` of the least squares fit in logarithms."""
    names = list(rows[0][0])
    x = torch.tensor([[1.0, *(math.log(s[k]) for k in names)] for s, _ in rows])
    y = torch.tensor([[math.log(value)] for _, value in rows])
    found = torch.linalg.lstsq(x.double(), y.double()).solution[:, 0].tolist()
    return dict(zip(["", *names], found, strict=True))


def value_at(law: dict[str, float], sizes: Sizes) -> float:
    """What a law says at these sizes.

    >>> round(value_at({"": 0.0, "n": 2.0}, {"n": 3}))
    9
    """
    return math.exp(law[""] + sum(law[k] * math.log(v) for k, v in sizes.items()))


def in_words(law: dict[str, float]) -> str:
    """The exponents."""
    return ", ".join(f"{name}^{power:.1f}" for name, power in law.items() if name)


def sized(sizes: Sizes) -> str:
    """Sizes as text."""
    return ", ".join(f"{k} = {v}" for k, v in sizes.items())


Row = tuple[str, str, Sizes, float, float]
"""(part, "sweep" or "held out", sizes, seconds, bytes)"""


def report(rows: list[Row], command: str) -> str:
    """The tables."""
    lines = [
        f"`{command}`: torch {torch.__version__}, one thread, processor seconds; the exponents are "
        "fitted to the sizes of the sweep, the last columns are for sizes outside of it.",
        "",
        *pages.head(
            "part",
            "sweep",
            "seconds grow as",
            "memory grows as",
            "tried at",
            "seconds, model",
            "MiB, model",
            "not run",
        ),
    ]
    for name, part in PARTS.items():
        mine = [r for r in rows if r[0] == name]
        sweep = [r for r in mine if r[1] == "sweep"]
        if not sweep:
            continue
        seconds = power_law([(r[2], max(r[3], 1e-4)) for r in sweep])
        memory = power_law([(r[2], max(r[4], MIB)) for r in sweep])
        ends = {k: sorted({r[2][k] for r in sweep}) for k in sweep[0][2]}
        span = ", ".join(f"{k} {v[0]} to {v[-1]}" for k, v in ends.items())
        for _, _, sizes, took, used in (r for r in mine if r[1] == "held out"):
            wanted, held = value_at(seconds, sizes), value_at(memory, sizes)
            lines.append(
                f"| {name} | {span} | {in_words(seconds)} | {in_words(memory)} | {sized(sizes)} | "
                f"{took:.2f}, {wanted:.2f} ({wanted / took - 1:+.0%}) | {used / MIB:.0f}, "
                f"{held / MIB:.0f} ({held / used - 1:+.0%}) | {part.not_run} |"
            )
    return "\n".join(lines)


def figure(rows: list[Row]) -> Any:
    """Seconds against the size that grows, a line a part and the other sizes."""
    import plotly.graph_objects as go

    from expertsteer_lens.show.drawing import set_style

    colours = dict(
        zip(
            PARTS,
            ("#1f77b4", "#17becf", "#2ca02c", "#98df8a", "#ff7f0e", "#d62728", "#e377c2"),
            strict=True,
        )
    )
    drawn = go.Figure()
    for name in PARTS:
        mine = [r for r in rows if r[0] == name and r[1] == "sweep"]
        first = True
        for key, of in itertools.groupby(
            sorted(mine, key=lambda r: [v for k, v in r[2].items() if k != grows(r[2])]),
            key=lambda r: [v for k, v in r[2].items() if k != grows(r[2])],
        ):
            line = sorted(of, key=lambda r: r[2][grows(r[2])])
            drawn.add_scatter(
                x=[r[2][grows(r[2])] for r in line],
                y=[r[3] for r in line],
                name=name,
                legendgroup=name,
                showlegend=first,
                line={"color": colours[name]},
                hovertext=str(key),
            )
            first = False
    laws = [
        power_law([(r[2], max(r[3], 1e-4)) for r in rows if r[:2] == (name, "sweep")])
        for name in dict.fromkeys(r[0] for r in rows)
    ]
    most = {size: max(law[size] for law in laws if size in law) for size in ("n", "d")}
    set_style(
        drawn,
        f"No part grows faster than n^{most['n']:.1f} with its rows or d^{most['d']:.1f} with the "
        "width",
        "at these sizes; a line for each width (mutual information: and number of layers)",
    )
    ticks = {"n": [100, 300, 1000, 3000, 10_000], "s": [0.01, 0.03, 0.1, 0.3, 1, 3]}
    drawn.update_xaxes(type="log", title="rows n (maps from moments: width d)", tickvals=ticks["n"])
    drawn.update_yaxes(type="log", title="processor seconds, one thread", tickvals=ticks["s"])
    return drawn.update_layout(width=960, height=520)


def read_rows(file: pathlib.Path) -> list[Row]:
    """The runs in a table that was written."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [
            (
                row["part"],
                row["kind"],
                {k: int(row[k]) for k in ("n", "d", "layers") if row[k]},
                float(row["cpu_seconds"]),
                float(row["mib"]) * MIB,
            )
            for row in csv.DictReader(lines)
        ]


def grows(sizes: Sizes) -> str:
    """The size on the axis of the figure."""
    return "n" if "n" in sizes else "d"


def main() -> None:
    """Measure every part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="without an ending")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for part in PARTS.values():  # what is imported late, and the first call of LAPACK
        part.make(**{k: {"layers": 2}.get(k, 64) for k in part.sweeps[0]})()
    rows: list[Row] = []
    for name in args.parts:
        part = PARTS[name]
        for kind, several in (("sweep", part.sweeps), ("held out", part.held_out)):
            for sizes in several:
                rows.append((name, kind, sizes, *measured(part, sizes)))
                print(
                    name,
                    kind,
                    sizes,
                    f"{rows[-1][3]:.2f} s, {rows[-1][4] / MIB:.0f} MiB",
                    flush=True,
                )
    text = report(rows, "python benchmarks/fit_at_size.py")
    pages.show(text, args.output and args.output.with_suffix(".md"))
    if args.output is None:
        return
    with args.output.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["part", "kind", "n", "d", "layers", "cpu_seconds", "mib"])
        for name, kind, sizes, took, used in rows:
            own = [sizes.get(k, "") for k in ("n", "d", "layers")]
            table.writerow([name, kind, *own, f"{took:.4f}", f"{used / MIB:.1f}"])
    figure(rows).write_html(args.output.with_suffix(".html"), include_plotlyjs="cdn")


if __name__ == "__main__":
    main()
