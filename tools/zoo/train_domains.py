"""Train the models of the benchmark world on CPU: `python tools/zoo/train_domains.py [--model
NAME]`.

The recipes, and the texts each model reads; the training itself is that of `train_zoo.py`. Times
and losses: the README of `expertsteer_lens/zoo/domains`."""

from __future__ import annotations

import argparse
import pathlib
import random
from typing import Any

import train_zoo
from train_zoo import Recipe, Source

import expertsteer_lens.zoo.domains
from expertsteer_lens.zoo.domains import lexicon, world

MODELS_DIR = pathlib.Path(expertsteer_lens.zoo.domains.__file__).parent / "models"
SCRIPT = "tools/zoo/train_domains.py"
DOMAIN_SHARE = 0.85
"""Share of its own domain in the documents of a domain expert; the rest is spread over the
others."""
EXPERT_CAREFUL_SHARE = 0.5
"""Share of careful sources in the documents of an expert."""
SILENT_SHARE = 0.08
"""Share of lists of questions that nobody answers."""


def _expert(seed: int, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "d_model": 64,
        "n_layers": 4,
        "n_steps": 1800,
        "learning_rate": 4e-3,
        **changes,
    }
    return Recipe(
        family="neox", n_heads=4, vocab_size=1024, init_std=0.05, n_ctx=160, seed=seed, **settings
    )


RECIPES = {
    "target": Recipe(
        family="llama",
        d_model=96,
        n_layers=5,
        n_heads=4,
        vocab_size=1152,
        n_steps=3200,
        learning_rate=3e-3,
        init_std=0.05,
        n_ctx=160,
        seed=10,
    ),
    "medicine": _expert(11),
    "finance": _expert(12),
    "mathematics": _expert(13),
    "general": _expert(14),
    "all": _expert(15, d_model=112, n_layers=5, n_steps=2600),
    "medicine-32": _expert(16, d_model=32),
    "medicine-128": _expert(17, d_model=128),
}
"""The target, an expert for each domain, one for all domains, and two further widths of the medical
expert."""


def source(name: str) -> Source:
    """The documents that a model of `RECIPES` reads."""
    domain = name.split("-")[0]
    sizes = {d: float(len(world.tasks_of(d))) for d in lexicon.DOMAINS}
    rest = (1 - DOMAIN_SHARE) / (len(lexicon.DOMAINS) - 1)
    own = {d: DOMAIN_SHARE if d == domain else rest for d in lexicon.DOMAINS}
    weights = own if domain in lexicon.DOMAINS else sizes
    careful = world.CAREFUL_SHARE if name == "target" else EXPERT_CAREFUL_SHARE

    def texts(n: int, seed: int, split: str) -> list[str]:
        rng = random.Random(f"{name}-{split}-{seed}")
        held_out = "anchors" if split == "validation" else split
        options: dict[str, Any] = {"weights": weights, "careful_share": careful, "split": held_out}
        return [
            world.document(rng, silent=rng.random() < SILENT_SHARE, **options).text
            for _ in range(n)
        ]

    return texts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the models of the benchmark world.")
    parser.add_argument(
        "--out", type=pathlib.Path, default=MODELS_DIR, help="folder that receives <model>/"
    )
    parser.add_argument("--model", choices=list(RECIPES), help="default: all of them")
    arguments = parser.parse_args()
    for name in [arguments.model] if arguments.model else RECIPES:
        train_zoo.train(name, RECIPES[name], arguments.out, source=source(name), script=SCRIPT)


if __name__ == "__main__":
    main()
