"""Time and memory of the parts of a fit against their sizes, on synthetic states, and a model of
the cost: operations and bytes counted from the code, each with a coefficient that is fitted to the
sizes of a sweep. The model is then tried on sizes outside of the sweep, most of them far outside.

    python benchmarks/fit_at_size.py --output benchmarks/results/fit_at_size

Writes `fit_at_size.csv` (every size measured) and `fit_at_size.md` (the tables; `draw_pictures.py`
makes the picture of the page), and after each part what there is so far; `--table` reads the first,
or several, and measures nothing. One thread; seconds are those of the processor, since the machine
may be shared, and a median where a run takes less than 5 s. Memory is the kernel's high-water mark
beyond what was resident before, inputs included.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import cost_8b
import numpy as np
import pages
import torch
from fit_memory import peak_since_last, resident

from expertsteer_lens.align import AlignerConfig, AlignerGrid, MomentGrid, PairedMoments
from expertsteer_lens.learn import fit_rfm
from expertsteer_lens.pair import MIConfig, layer_pair_mi
from expertsteer_lens.show.drawing import BLUE, GREY, ORANGE, set_style

MIB = 2**20
NEAR = 0.3
"""How far off a prediction may be."""
LONG = 5.0
"""Seconds after which a run is measured once."""
Sizes = dict[str, int]


states = partial(cost_8b.states, factors=16)
LAYER = "blocks.0.hook_resid_post"


# -- the parts: each makes its inputs and gives what is to be timed -------------------------------


def maps_on_texts(n: int, d: int) -> Callable[[], Any]:
    """One layer pair, both layers decomposed."""
    expert, target = states(n, d, 1, 0), states(n, d, 1, 1)
    config = AlignerConfig(kind="anchored_autoencoder")
    return lambda: AlignerGrid(target, config).fit(expert)


def moments(n: int, d: int) -> Callable[[], Any]:
    """The moments of one layer pair, in batches of a thousand tokens."""
    expert, target = states(n, d, 1, 0)[LAYER], states(n, d, 1, 1)[LAYER]
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
    rows = states(n, d, 1, 0)[LAYER]
    labels = (rows[:, 0] > rows[:, 0].median()).float()
    return lambda: fit_rfm(rows, labels)


@dataclass(frozen=True)
class Part:
    """What is measured, where, and what its cost is made of.

    A term is a product of sizes ("n^2 d"), and stands for a number of operations or of bytes of the
    part's own code: each is there because some line does that many, none because it fits."""

    make: Callable[..., Callable[[], Any]]
    seconds: tuple[str, ...]
    memory: tuple[str, ...]
    sweep: tuple[Sizes, ...]
    held_out: tuple[Sizes, ...]
    asked: tuple[Sizes, ...] = ()
    """Predicted only: many minutes, or more memory than two cores come with."""


def grid(**values: tuple[int, ...]) -> tuple[Sizes, ...]:
    """Every combination."""
    return tuple(
        dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())
    )


PARTS = {
    # Products of the rows with themselves, a QR and the maps: n^2 d. Eigenvectors, inverses and
    # products of every training set: n^3, and n^2 for what LAPACK does column by column.
    "maps, one state a text, n < d": Part(
        maps_on_texts,
        ("1", "n^2", "n^3", "n^2 d", "n d"),
        ("1", "n^2", "n d"),
        grid(n=(512, 768, 1024), d=(2048, 4096)),
        ({"n": 512, "d": 8192}, {"n": 2048, "d": 8192}),
    ),
    # The same with the two sizes exchanged.
    "maps, one state a text, n > d": Part(
        maps_on_texts,
        ("1", "d^2", "d^3", "n d^2", "n d"),
        ("1", "d^2", "n d"),
        grid(n=(4000, 8000, 16000), d=(256, 512)),
        ({"n": 20000, "d": 384}, {"n": 20000, "d": 1024}),
        ({"n": 20000, "d": 4096},),
    ),
    # Outer products of rows, and the sums of each batch added to those before: n d^2.
    "moments of token pairs": Part(
        moments,
        ("1", "n d^2", "n d", "d^2"),
        ("1", "d^2", "n d"),
        grid(n=(4000, 8000), d=(512, 1024)),
        ({"n": 20000, "d": 2048},),
        ({"n": 20000, "d": 8192},),
    ),
    "maps from moments": Part(
        maps_on_moments,
        ("1", "d^3", "d^2"),
        ("1", "d^2"),
        grid(d=(512, 768, 1024, 1536)),
        ({"d": 2048},),
        ({"d": 4096}, {"d": 8192}),
    ),
    # Each layer is clipped (n d) and decomposed (n^2 d, n^3: n is below d); each pair of layers has
    # products of its 32 components over the rows (n), and eigenvectors of 32 x 32 matrices.
    "mutual information": Part(
        layer_scores,
        ("layers n^2 d", "layers n^3", "layers n d", "layers^2", "layers^2 n"),
        ("1", "layers n d", "layers n", "layers^2", "n d"),
        grid(n=(256, 512, 1024), d=(1024, 4096), layers=(12, 24)),
        ({"n": 384, "d": 2048, "layers": 36}, {"n": 256, "d": 512, "layers": 80}),
        ({"n": 1024, "d": 8192, "layers": 80},),
    ),
    # Products of the rows once (n^2 d); each of up to 20 rounds has products of n x n matrices and
    # a Cholesky factor (n^3), and distances and kernels entry by entry (n^2).
    "direction, n < d": Part(
        direction,
        ("1", "n^3", "n^2", "n^2 d", "n d"),
        ("1", "n^2", "n d"),
        grid(n=(512, 768, 1024), d=(2048, 4096)),
        ({"n": 2048, "d": 8192},),
        ({"n": 4096, "d": 8192},),
    ),
    # A Cholesky factor (n^3), products with rows of width d (n^2 d), the rest as above.
    "direction, n > d": Part(
        direction,
        ("1", "n^3", "n^2", "n^2 d"),
        ("1", "n^2", "n d"),
        grid(n=(768, 1024, 1536), d=(128, 256)),
        ({"n": 3072, "d": 192},),
        ({"n": 8192, "d": 1024},),
    ),
}


LIBC = ctypes.CDLL("libc.so.6")
AT_ONCE, IN_USE = 2**16, 2**25
"""Bytes from which on a tensor's memory goes back to the system at once: for memory, so that what
glibc keeps of tensors that are gone is not counted; and for seconds, what glibc comes to by itself
in a process that has freed large tensors."""


def give_back_from(n_bytes: int) -> None:
    """See above; threads share one heap."""
    LIBC.mallopt(-8, 1)  # M_ARENA_MAX of malloc.h
    LIBC.mallopt(-3, n_bytes)  # M_MMAP_THRESHOLD
    LIBC.malloc_trim(0)


def measured(part: Part, sizes: Sizes) -> tuple[float, float]:
    """(processor seconds, bytes beyond what was resident before the inputs were made). The first
    run shows the memory, and the seconds if it is long; else these are the median of further
    runs."""
    gc.collect()
    give_back_from(AT_ONCE)
    before = resident()
    peak_since_last()
    run = part.make(**sizes)

    def seconds() -> float:
        started = time.process_time()
        run()
        return time.process_time() - started

    first, used = seconds(), float(peak_since_last() - before)
    if first >= LONG:
        return first, used
    give_back_from(IN_USE)
    return statistics.median(seconds() for _ in range(3)), used


def term_value(term: str, sizes: Sizes) -> float:
    """A term at these sizes.

    >>> term_value("n^2 d", {"n": 3, "d": 2}), term_value("1", {})
    (18.0, 1.0)
    """
    powers = [part.partition("^") for part in term.split() if part != "1"]
    return math.prod(
        (float(sizes[name]) ** int(power or 1) for name, _, power in powers), start=1.0
    )


Model = dict[str, float]
"""What each term costs, in seconds or bytes."""


def fitted(terms: Sequence[str], rows: list[tuple[Sizes, float]]) -> Model:
    """The coefficients, none negative, of the least sum of squared *relative* errors: a second is
    as much at one second as a minute is at a minute."""
    from scipy.optimize import nnls

    values = np.array([[term_value(term, s) / cost for term in terms] for s, cost in rows])
    scale = values.max(0)  # the terms differ by ten orders of magnitude
    found, _ = nnls(values / scale, np.ones(len(rows)))
    return dict(zip(terms, (found / scale).tolist(), strict=True))


def value_at(model: Model, sizes: Sizes) -> float:
    """What a model says at these sizes.

    >>> value_at({"1": 1.0, "n^2": 2.0}, {"n": 3})
    19.0
    """
    return sum(each * term_value(term, sizes) for term, each in model.items())


def exponents(rows: list[tuple[Sizes, float]]) -> str:
    """The exponent of each size, by least squares in logarithms."""
    names = list(rows[0][0])
    x = np.array([[1.0, *(math.log(s[k]) for k in names)] for s, _ in rows])
    found = np.linalg.lstsq(x, np.array([math.log(cost) for _, cost in rows]), rcond=None)[0]
    return ", ".join(f"{k}^{power:.1f}" for k, power in zip(names, found[1:], strict=True))


class Row(NamedTuple):
    """One size that was measured."""

    part: str
    kind: str
    """ "sweep" or "held out"."""
    sizes: Sizes
    seconds: float
    bytes: float


class Tried(NamedTuple):
    """A size that no coefficient was fitted to."""

    part: str
    sizes: Sizes
    seconds: tuple[float, float]
    """Measured, predicted."""
    bytes: tuple[float, float]


def off(measured_and_predicted: tuple[float, float]) -> float:
    """How far a prediction is off, relative to what was measured."""
    return measured_and_predicted[1] / measured_and_predicted[0] - 1.0


def models_of(rows: Sequence[Row], name: str) -> tuple[Model, Model]:
    """Of seconds and bytes of a part."""
    sweep = [r for r in rows if r.part == name and r.kind == "sweep"]
    return (
        fitted(PARTS[name].seconds, [(r.sizes, r.seconds) for r in sweep]),
        fitted(PARTS[name].memory, [(r.sizes, r.bytes) for r in sweep]),
    )


def tried(rows: Sequence[Row]) -> list[Tried]:
    """Every size held out, beside what its part's models say."""
    out = []
    for r in rows:
        if r.kind == "held out":
            seconds, memory = (value_at(model, r.sizes) for model in models_of(rows, r.part))
            out.append(Tried(r.part, r.sizes, (r.seconds, seconds), (r.bytes, memory)))
    return out


def finding(rows: Sequence[Row]) -> tuple[str, str]:
    """What the measurements say: title and subtitle of the figure."""
    found = tried(rows)
    seconds, memory = (
        sum(abs(off(getattr(t, what))) <= NEAR for t in found) for what in ("seconds", "bytes")
    )
    return (
        f"Counted operations predict the seconds of {seconds} of {len(found)} larger sizes within "
        f"{NEAR:.0%}",
        f"counted shapes the memory of {memory}; coefficients fitted to the small sizes only "
        f"(circles); dotted: {NEAR:.0%} off",
    )


def sized(sizes: Sizes) -> str:
    """Sizes as text."""
    return ", ".join(f"{k} = {v:,}" for k, v in sizes.items())


def in_words(model: Model) -> str:
    """The terms that cost something."""
    return " + ".join(f"{each:.2g} · {term}" for term, each in model.items() if each > 0)


def report(rows: Sequence[Row]) -> str:
    """The tables."""
    lines = [
        f"`python benchmarks/fit_at_size.py`: torch {torch.__version__}, one thread, processor "
        "seconds. Coefficients (none negative, least squares of relative errors) and exponents are "
        "fitted to the sizes of the sweep only.",
        "",
        *pages.head(
            "tried at a size outside of the sweep",
            "sizes",
            "seconds: measured, predicted",
            "MiB: measured, predicted",
        ),
    ]
    for t in tried(rows):
        (took, wanted), (used, held) = t.seconds, t.bytes
        lines.append(
            pages.row(
                t.part,
                sized(t.sizes),
                f"{took:.2f}, {wanted:.2f} ({off(t.seconds):+.0%})",
                f"{used / MIB:.0f}, {held / MIB:.0f} ({off(t.bytes):+.0%})",
            )
        )
    lines += [
        "",
        *pages.head(
            "part",
            "sweep",
            "seconds",
            "bytes",
            "seconds grow as",
            "bytes grow as",
            "largest miss inside of the sweep",
        ),
    ]
    for name in dict.fromkeys(r.part for r in rows):
        sweep = [r for r in rows if r.part == name and r.kind == "sweep"]
        seconds, memory = models_of(rows, name)
        ends = {k: sorted({r.sizes[k] for r in sweep}) for k in sweep[0].sizes}
        span = ", ".join(f"{k} {v[0]:,} to {v[-1]:,}" for k, v in ends.items())
        misses = [
            max(abs(value_at(model, r.sizes) / cost(r) - 1.0) for r in sweep)
            for model, cost in (
                (seconds, lambda r: r.seconds),
                (memory, lambda r: r.bytes),
            )
        ]
        lines.append(
            pages.row(
                name,
                span,
                in_words(seconds),
                in_words(memory),
                exponents([(r.sizes, r.seconds) for r in sweep]),
                exponents([(r.sizes, r.bytes) for r in sweep]),
                ", ".join(f"{miss:.0%}" for miss in misses),
            )
        )
    lines += ["", *pages.head("predicted, not measured", "sizes", "minutes", "GiB")]
    for name in dict.fromkeys(r.part for r in rows):
        seconds, memory = models_of(rows, name)
        lines += [
            pages.row(
                name,
                sized(sizes),
                f"{value_at(seconds, sizes) / 60:.1f}",
                f"{value_at(memory, sizes) / MIB / 1024:.1f}",
            )
            for sizes in PARTS[name].asked
        ]
    return "\n".join(lines)


def figure(rows: Sequence[Row]) -> Any:
    """Predicted against measured: the sizes that were fitted, and those that were not."""
    from plotly.subplots import make_subplots

    panels = ("processor seconds, one thread", "MiB")
    drawn = make_subplots(1, 2, subplot_titles=panels, horizontal_spacing=0.1)
    for column, (what, unit) in enumerate((("seconds", 1.0), ("bytes", float(MIB))), start=1):
        fits = {name: models_of(rows, name) for name in PARTS}
        points = {
            kind: [
                (
                    getattr(r, what) / unit,
                    value_at(fits[r.part][column - 1], r.sizes) / unit,
                    f"{r.part}: {sized(r.sizes)}",
                )
                for r in rows
                if r.kind == kind
            ]
            for kind in ("sweep", "held out")
        }
        both = [x for kind in points.values() for x, *_ in kind]
        ends = [0.7 * min(both), 1.4 * max(both)]
        for factor, dash in ((1.0, "solid"), (1 + NEAR, "dot"), (1 - NEAR, "dot")):
            drawn.add_scatter(
                x=ends,
                y=[factor * x for x in ends],
                mode="lines",
                line={"color": GREY, "width": 1, "dash": dash},
                name="equal" if factor == 1.0 else f"{NEAR:.0%} off",
                showlegend=column == 1 and factor >= 1.0,
                row=1,
                col=column,
            )
        for kind, colour, label in (
            ("sweep", BLUE, "fitted"),
            ("held out", ORANGE, "held out"),
        ):
            drawn.add_scatter(
                x=[x for x, *_ in points[kind]],
                y=[y for _, y, _ in points[kind]],
                hovertext=[text for *_, text in points[kind]],
                mode="markers",
                marker={
                    "color": colour,
                    "size": 7 if kind == "sweep" else 11,
                    "symbol": "circle-open" if kind == "sweep" else "diamond",
                },
                name=label,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        drawn.update_xaxes(type="log", dtick=1, title="measured", row=1, col=column)
        drawn.update_yaxes(type="log", dtick=1, title="predicted", row=1, col=column)
    set_style(drawn, *finding(rows))
    return drawn.update_layout(width=1000, height=520)


COLUMNS = ("part", "kind", "n", "d", "layers", "cpu_seconds", "mib")


def read_rows(file: pathlib.Path) -> list[Row]:
    """The sizes in a table that was written."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [
            Row(
                row["part"],
                row["kind"],
                {k: int(row[k]) for k in ("n", "d", "layers") if row[k]},
                float(row["cpu_seconds"]),
                float(row["mib"]) * MIB,
            )
            for row in csv.DictReader(lines)
        ]


def write(rows: Sequence[Row], output: pathlib.Path) -> None:
    """The table of all sizes, and the report."""
    with output.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for r in rows:
            own = [r.sizes.get(k, "") for k in ("n", "d", "layers")]
            table.writerow([r.part, r.kind, *own, f"{r.seconds:.4f}", f"{r.bytes / MIB:.1f}"])
    pages.keep(report(rows), output.with_suffix(".md"))


def measure(names: Sequence[str], output: pathlib.Path | None) -> list[Row]:
    """Every size of these parts."""
    torch.set_num_threads(1)
    for name in names:  # what is imported late, and the first call of LAPACK
        part = PARTS[name]
        part.make(**{k: {"layers": 2}.get(k, 64) for k in part.sweep[0]})()
    rows: list[Row] = []
    for name in names:
        part = PARTS[name]
        for kind, several in (("sweep", part.sweep), ("held out", part.held_out)):
            for sizes in several:
                rows.append(Row(name, kind, sizes, *measured(part, sizes)))
                took, used = rows[-1].seconds, rows[-1].bytes / MIB
                print(f"{name} ({kind}): {sized(sizes)}: {took:.2f} s, {used:.0f} MiB", flush=True)
        if output is not None:
            write(rows, output)
    return rows


def main() -> None:
    """Measure every part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="without an ending")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--table", type=pathlib.Path, nargs="*", help="what was measured; measure nothing"
    )
    args = parser.parse_args()
    if args.table is None:
        rows = measure(args.parts, args.output)
    else:
        rows = [row for file in args.table for row in read_rows(file)]
        if args.output is not None:
            write(rows, args.output)
    print(report(rows))


if __name__ == "__main__":
    main()
