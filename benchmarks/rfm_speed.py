"""Time, memory and agreement of `fit_rfm` against xRFM on one problem; prints a Markdown table.

    python benchmarks/rfm_speed.py --output benchmarks/results/rfm_speed.md

Every implementation runs in a process of its own, on the same rows, with the same bandwidth, ridge
and number of rounds (Laplace kernel, raw rows, AGOP divided by its largest entry). Time is one
`fit`: ours includes the eigenvector, xRFM's does not. CPU time (all threads) is shown because it
suffers less from other work on the machine. Memory is the rise of the peak resident set over the
level just before the fit, with libraries and data loaded. The cosine is between our direction and
the top eigenvector of xRFM's metric after the last round."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import pages
import torch

OURS, DEFAULT = "expertsteer_lens", "expertsteer_lens, default search"
XRFM = {"xRFM 'l2'": "l2", "xRFM 'l2_high_dim'": "l2_high_dim"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=512, help="rows")
    parser.add_argument("--d", type=int, default=4096, help="width")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--bandwidth",
        type=float,
        default=100.0,
        help="absolute; the rows' distances are about sqrt(2 d)",
    )
    parser.add_argument("--ridge", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed fits of ours and of 'l2_high_dim'"
    )
    parser.add_argument(
        "--repeats-l2",
        type=int,
        default=1,
        help="timed fits of xRFM 'l2' (minutes each at d = 4096)",
    )
    parser.add_argument("--output", type=pathlib.Path, help="also write the table to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--vector", help=argparse.SUPPRESS)
    return parser.parse_args()


def problem(args: argparse.Namespace, n: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian rows; labels from a noisy curved rule in a few directions."""
    generator = torch.Generator().manual_seed(args.seed)
    rows = torch.randn(n or args.n, args.d, generator=generator)
    axes = torch.randn(2, args.d, generator=generator) / args.d**0.5
    first, second = (rows @ axes.T).unbind(1)
    noise = 0.3 * torch.randn(len(rows), generator=generator)
    return rows, (first + 0.5 * second.square() + noise > 0.5).float()


def our_fit(
    args: argparse.Namespace, search: bool
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    from expertsteer_lens.learn.rfm import RFMConfig, fit_rfm

    config = RFMConfig(
        bandwidth=args.bandwidth,
        bandwidth_unit="absolute",
        ridge=args.ridge,
        n_rounds=args.rounds,
        center_gradients=False,
        normalise="max",
        standardise="none",
        targets="zero_one",
        validation_fraction=0.0,
    )
    return lambda rows, labels: fit_rfm(rows, labels, RFMConfig() if search else config).direction


def xrfm_fit(
    args: argparse.Namespace, kernel: str
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    from xrfm.rfm_src import RFM

    def fit(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        model = RFM(
            kernel=kernel,
            bandwidth=args.bandwidth,
            device="cpu",
            verbose=False,
            tuning_metric="mse",
        )
        data = (rows, labels[:, None])
        held = (rows[:2], labels[:2, None])
        model.fit(
            data,
            held,
            iters=args.rounds,
            reg=args.ridge,
            return_best_params=False,
            early_stop_rfm=False,
        )
        return model.M

    return fit


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1024.0**2 if sys.platform == "darwin" else 1024.0
    )


def reset_peak() -> float:
    """Forget earlier peaks where the system allows it (Linux), and return the level to measure
    from, in MiB."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        status = pathlib.Path("/proc/self/status").read_text()
        return (
            next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
            / 1024.0
        )
    except OSError:
        return peak_mib()


def high_water() -> float:
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        return (
            next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
            / 1024.0
        )
    except OSError:
        return peak_mib()


def child(args: argparse.Namespace) -> None:
    """Run one implementation; the result goes to stdout as JSON and the direction to a file."""
    torch.set_num_threads(args.threads)
    ours = args.child in (OURS, DEFAULT)
    fit = our_fit(args, args.child == DEFAULT) if ours else xrfm_fit(args, XRFM[args.child])
    warm = argparse.Namespace(**{**vars(args), "d": 64})
    fit(*problem(warm, 48))
    rows, labels = problem(args)
    repeats = args.repeats_l2 if XRFM.get(args.child) == "l2" else args.repeats
    times, cpu, rises = [], [], []
    for _ in range(repeats):
        base, start, busy = reset_peak(), time.perf_counter(), time.process_time()
        result = fit(rows, labels)
        times.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
        rises.append(high_water() - base)
    vector = (
        result
        if result.ndim == 1
        else torch.lobpcg(result.double(), k=1, niter=500, tol=1e-10)[1][:, 0]
    )
    torch.save(vector.double(), args.vector)
    print(json.dumps({"times": times, "cpu": cpu, "rise": max(rises)}))


def machine(args: argparse.Namespace) -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    load = (
        f", load average before the run {os.getloadavg()[0]:.1f}"
        if hasattr(os, "getloadavg")
        else ""
    )
    return (
        f"{model}, {os.cpu_count()} cores, {args.threads} threads{load}; {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, xRFM {xrfm_version()}"
    )


def xrfm_version() -> str:
    from importlib.metadata import version

    return version("xrfm")


def main() -> None:
    args = parse()
    if args.child:
        child(args)
        return
    head, results = machine(args), {}
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate([OURS, DEFAULT, *reversed(XRFM)]):
            path = os.path.join(folder, f"{index}.pt")
            command = [sys.executable, __file__, *sys.argv[1:], "--child", name, "--vector", path]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[name] = json.loads(done.stdout.splitlines()[-1])
            results[name]["vector"] = torch.load(path)
    ours = results[OURS]
    our_time = statistics.median(ours["times"])
    lines = [
        f"`fit_rfm` against xRFM: n = {args.n}, d = {args.d}, {args.rounds} rounds, Laplace "
        "kernel, bandwidth "
        f"{args.bandwidth:g}, ridge {args.ridge:g}, float32 rows.",
        "",
        f"    python benchmarks/rfm_speed.py {' '.join(sys.argv[1:])}".rstrip(),
        "",
        f"Machine: {head}.",
        "",
        *pages.head(
            "implementation",
            "fits timed",
            "median s",
            "min s",
            "max s",
            "time / ours",
            "CPU time / ours",
            "peak memory added, MiB",
            "memory / ours",
            "abs cosine with ours",
        ),
    ]
    for name, result in results.items():
        times, median = result["times"], statistics.median(result["times"])
        cosine = abs(
            torch.nn.functional.cosine_similarity(result["vector"], ours["vector"], dim=0).item()
        )
        same = name != DEFAULT
        lines.append(
            f"| {name} | {len(times)} | {median:.3f} | {min(times):.3f} | {max(times):.3f} | "
            f"{median / our_time:.1f} "
            f"| {statistics.median(result['cpu']) / statistics.median(ours['cpu']):.1f} "
            f"| {result['rise']:.0f} | {result['rise'] / ours['rise']:.1f} | "
            f"{f'{cosine:.6f}' if same else 'other settings'} |"
        )
    lines += [
        "",
        "The default search fits three bandwidths on 80 % of the rows, five rounds each, and the "
        "best of them on all rows; it is "
        "listed for its cost only. xRFM's times do not include the eigenvector of its metric; ours "
        "does.",
    ]
    pages.show("\n".join(lines), args.output)


if __name__ == "__main__":
    main()
