"""Time of `layer_pair_mi` on states of the size of a large model: all layer pairs, permutation null
and intervals included.

    python benchmarks/mi_speed.py --layers 32 --n 512 --d 4096 --repeats 3 --out benchmarks/results

States are random with 64 shared latent axes (time does not depend on what they hold). Prints
markdown with medians; "CPU" is processor time over all threads, which a busy machine disturbs less
than the time on the clock."""

from __future__ import annotations

import argparse
import pathlib
import platform
import statistics
import time

import pages
import torch

from expertsteer_lens.pair.mutual_information import MIConfig, layer_pair_mi

CASES = {
    "cca (default: 3 folds)": {},
    "cca, 5 folds": {"n_folds": 5},
    "cca, 16 components": {"n_components": 16},
    "gaussian": {"estimator": "gaussian"},
    "cka": {"estimator": "cka"},
}


def states(args: argparse.Namespace) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(args.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    latent = normal(args.n, 64)
    expert, target = (
        [
            latent @ normal(64, args.d) * 0.05 + 0.3 * normal(args.n, args.d)
            for _ in range(args.layers)
        ]
        for _ in range(2)
    )
    return expert, target


def measure(expert: list, target: list, config: MIConfig, repeats: int) -> tuple[float, float]:
    wall, cpu = [], []
    for _ in range(repeats):
        started, spent = time.perf_counter(), time.process_time()
        layer_pair_mi(expert, target, config)
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - spent)
    return statistics.median(wall), statistics.median(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--permutations", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    expert, target = states(args)
    layer_pair_mi(expert[:2], target[:2], MIConfig(n_permutations=2))
    lines = [
        "# Speed of layer_pair_mi",
        "",
        f"`python benchmarks/mi_speed.py --layers {args.layers} --n {args.n} --d {args.d} "
        f"--permutations {args.permutations} --repeats {args.repeats} --threads {args.threads}`: "
        f"{args.layers} x {args.layers} layer pairs, n={args.n} texts, d={args.d}, "
        f"{args.permutations} permutations, "
        f"200 bootstrap draws; median of {args.repeats}; torch {torch.__version__}, {args.threads} "
        "threads, "
        f"{platform.machine()}.",
        "",
        *pages.head("case", "seconds", "CPU seconds"),
    ]
    for name in args.cases:
        wall, cpu = measure(
            expert, target, MIConfig(n_permutations=args.permutations, **CASES[name]), args.repeats
        )
        lines.append(f"| {name} | {wall:.1f} | {cpu:.1f} |")
        print(lines[-1], flush=True)
    pages.show("\n".join(lines), args.out / "mi_speed.md")


if __name__ == "__main__":
    main()
