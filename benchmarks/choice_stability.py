"""What else a fit would have chosen: the same fit with its anchors in another order, other batch
sizes, part of the anchors or of the pairs, in float32 and in bfloat16.

    python benchmarks/choice_stability.py --output benchmarks/results/choice_stability.md

On the bundled pair. The last columns are what each fit says itself, in its step "stability".
"""

from __future__ import annotations

import argparse
import pathlib
import random
from collections.abc import Iterator
from typing import Any

import pages
import torch

import expertsteer_lens as esl

N_PAIRS, N_ANCHORS, N_PROMPTS = 60, 160, 30
QUICK_MI = esl.MIConfig(n_permutations=2, n_bootstrap=4, n_components=4)
"""Mutual information chooses nothing here."""


def changes(n_draws: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what is changed, arguments of the fit)."""
    pairs, anchors = esl.zoo.contrast_pairs(N_PAIRS), esl.zoo.anchors(N_ANCHORS)
    yield "nothing", {"pairs": pairs, "anchors": anchors}
    for batch_size in (1, 8, 32):
        yield (
            f"batch_size={batch_size}",
            {
                "pairs": pairs,
                "anchors": anchors,
                "batch_size": batch_size,
            },
        )
    for i in range(n_draws):
        order = random.Random(i).sample(anchors, len(anchors))
        yield f"anchors in another order, {i}", {"pairs": pairs, "anchors": order}
    for i in range(n_draws):
        part = random.Random(i).sample(anchors, len(anchors) // 2)
        yield f"half of the anchors, {i}", {"pairs": pairs, "anchors": part}
    for i in range(n_draws):
        part = random.Random(i).sample(range(N_PAIRS), N_PAIRS // 2)
        half = esl.ContrastPairs.from_lists(
            [pairs.positive[j] for j in part], [pairs.negative[j] for j in part]
        )
        yield f"half of the pairs, {i}", {"pairs": half, "anchors": anchors}


def fit(dtype: torch.dtype, pairs: Any, anchors: list[str], batch_size: int = 16) -> Any:
    """A fit with the defaults on the bundled pair."""
    expert, target = (model.to(dtype) for model in esl.zoo.load_pair(host="huggingface"))
    config = esl.ExpertSteerConfig(batch_size=batch_size, mi=QUICK_MI)
    behaviour = esl.zoo.behaviour(N_PROMPTS)
    return esl.ExpertSteer(config).fit(
        expert, target, pairs, anchors=anchors, behaviour=behaviour, progress=False
    )


def rows(n_draws: int) -> Iterator[str]:
    """A line of the table for every fit."""
    first: dict[str, torch.Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for what, arguments in changes(n_draws):
            found = fit(dtype, **arguments)
            (key,) = found.layer_pairs.keys()
            direction = found.direction(*key)
            first.setdefault(key[1], direction)  # by target layer: others are not comparable
            step = next(s for s in found.steps if s["step"] == "stability")
            layers = " → ".join(name.split(".")[1] for name in key)
            cosine = float(direction @ first[key[1]])
            yield (
                f"| {str(dtype).removeprefix('torch.')} | {what} | {layers} | {cosine:.3f} | "
                f"{step['pairs_again']} | {step['targets_again']} | "
                f"{step['runner_up'].split(', ')[1].removesuffix(' of the score')} |"
            )


def main() -> None:
    """Print the table, line by line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"`python benchmarks/choice_stability.py --draws {args.draws}`: the bundled pair, "
        f"{N_PAIRS} pairs, {N_ANCHORS} anchors, {N_PROMPTS} prompts, the default settings; torch "
        f"{torch.__version__}. Cosine: of the direction with the first one at the same target layer.",
        "",
        *pages.head(
            "weights",
            "changed",
            "layers chosen",
            "cosine",
            "same pair, of 10 halves",
            "same target layer, of 10",
            "runner-up",
        ),
    ]
    print("\n".join(lines), flush=True)
    for line in rows(args.draws):
        lines.append(line)
        print(line, flush=True)
    pages.keep("\n".join(lines), args.output)


if __name__ == "__main__":
    main()
