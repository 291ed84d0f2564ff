"""How reliable are layer-pair scores: from one state a text, and from pairs of tokens of the texts?

    python benchmarks/fetch_real.py --out real-models smollm2 gemma3 domainsteer
    python benchmarks/layer_pair_reliability.py --models real-models --shared ../shared \\
        --out benchmarks/results/layer_pair_reliability.md

Two real models read the same texts once. The scores of all layer pairs are computed from each half
of the texts, for several divisions: what they say is reliable if both halves order the layer pairs
in the same way (rank correlation of the two matrices).
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import statistics
import time
from collections.abc import Mapping

import pages
import torch
from torch import Tensor

import expertsteer_lens as esl
from expertsteer_lens.benchmarks.transfer.real import read_real_data
from expertsteer_lens.hosts import as_host
from expertsteer_lens.hosts.side_by_side import TokenSample, capture_side_by_side

Layers = dict[str, Tensor]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, over all entries."""
    ranks = [x.flatten().argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def rows_of(layers: Mapping[str, Tensor], rows: Tensor, every: int) -> Layers:
    """Some rows of every so-manieth layer."""
    return {name: layers[name][rows] for name in list(layers)[1:-1:every]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=pathlib.Path, default=pathlib.Path("real-models"))
    parser.add_argument("--shared", type=pathlib.Path, default=pathlib.Path("../shared"))
    parser.add_argument("--expert", default="smollm2")
    parser.add_argument("--target", default="gemma3")
    parser.add_argument("--texts", type=int, default=120)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--divisions", type=int, default=5)
    parser.add_argument("--every", type=int, default=2, help="take every so-manieth layer")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = read_real_data(args.models, args.shared / "data", only=("3201",))
    texts = list(data.anchors)[: args.texts]
    hosts = tuple(
        as_host(esl.load_model(str(args.models / name), host="huggingface", dtype="float32"))
        for name in (args.expert, args.target)
    )
    names = tuple(host.hook_names() for host in hosts)
    sample = TokenSample(max(args.rows), len(texts), names)
    one_a_text = capture_side_by_side(
        hosts,
        texts,
        names,
        ([], []),
        lambda *_: None,
        positions="mean",
        sample=sample,
    )
    by_token = sample.stores([{}, {}], range(len(texts)))
    groups = torch.tensor(by_token[0].provenance["groups"])
    config = esl.MIConfig(n_bootstrap=50, n_permutations=20)
    ways: dict[str, tuple[tuple[Layers, Layers], Tensor]] = {}
    everything = torch.arange(len(texts))
    e, t = (rows_of(store, everything, args.every) for store in one_a_text)
    ways["one state a text (mean over tokens)"] = (e, t), everything
    for n in args.rows:
        most = max(1, round(n / len(texts)))
        place = torch.cat([torch.arange(int(k)) for k in groups.bincount() if k])
        count = groups.bincount()[groups]
        kept = (place * most // count != (place - 1) * most // count) | (place == 0)
        rows = kept.nonzero()[:, 0]
        e, t = (rows_of(store, rows, args.every) for store in by_token)
        ways[f"{len(rows)} token pairs"] = (e, t), groups[rows]
    lines = [
        f"`python benchmarks/layer_pair_reliability.py --expert {args.expert} --target "
        f"{args.target} --texts {args.texts} --rows {' '.join(map(str, args.rows))} --divisions "
        f"{args.divisions} --every {args.every}`: {len(e)} x {len(t)} layer pairs, "
        f"{len(texts)} texts; torch {torch.__version__}, {platform.machine()}, one thread.",
        "",
        *pages.head(
            "compared on",
            "rank correlation of the halves, median (lowest)",
            "largest score, nats",
            "mean of the null",
            "width of the 95 % interval",
            "CPU s",
        ),
    ]
    for name, ((e, t), of_text) in ways.items():
        started = time.process_time()
        grouped = None if len(of_text) == len(texts) else of_text
        whole = esl.layer_pair_mi(e, t, config, groups=grouped)
        took = time.process_time() - started
        found = []
        for seed in range(args.divisions):
            order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
            matrices = []
            for half in order.tensor_split(2):
                mine = torch.isin(of_text, half).nonzero()[:, 0]
                part = [{n: x[mine] for n, x in side.items()} for side in (e, t)]
                few = esl.MIConfig(n_permutations=0, n_bootstrap=2)
                its_groups = None if grouped is None else of_text[mine]
                matrices.append(esl.layer_pair_mi(*part, few, groups=its_groups).matrix)
            found.append(rank_correlation(*matrices))
        width = float((whole.interval[..., 1] - whole.interval[..., 0]).mean())
        lines.append(
            f"| {name} | {statistics.median(found):.2f} ({min(found):.2f}) | "
            f"{float(whole.matrix.max()):.1f} | {float(whole.null.mean()):.2f} | {width:.2f} | "
            f"{took:.1f} |"
        )
        print(lines[-1], flush=True)
    pages.show("\n".join(lines), args.out)


if __name__ == "__main__":
    main()
