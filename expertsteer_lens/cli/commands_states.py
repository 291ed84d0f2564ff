"""Commands that read states into a folder: `capture`, `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertsteer_lens.errors import ArgumentError

from .inputs import read_texts, texts_to_fit
from .options import ModelOptions, Out, Seed, TextOptions, parse_reading, parse_shard
from .stopped import goes_on_from
from .terminal import say


def capture(
    model: Annotated[str, typer.Option(help="folder or hub id of the model that teaches")],
    texts: TextOptions,
    models: ModelOptions,
    reading: Annotated[
        str | None,
        typer.Option(
            help="what stands for a text: answer, mean, last, attention, or the index of a token",
            show_default="answer",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="texts per forward pass")] = 16,
    out: Out = Path("expert-states"),
    shard: Annotated[
        str | None,
        typer.Option(
            help="which share to read, I/N from 0/N to (N-1)/N, or auto: as torchrun, accelerate "
            "or MPI say; then `merge OUT`"
        ),
    ] = None,
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens",
            help="instead of one state a text every token at a few layers, for `fit "
            "--expert-tokens`; 4 bytes times tokens times layers times width",
        ),
    ] = False,
    seed: Seed = 0,
) -> None:
    """Read the expert into a folder, for a fit without it.

    For `fit --expert OUT` on another machine, or where both models do not fit in memory. States are
    written as they are read: the same command goes on where one that was stopped or killed left
    off. With --shard several processes share the work."""
    from expertsteer_lens.data.states_shards import shard_folder, shard_of
    from expertsteer_lens.pipeline import ExpertSteer, ExpertSteerConfig

    if tokens and reading is not None:
        raise ArgumentError(
            "--reading says what stands for a text, but --tokens keeps every token; leave one of "
            "them out."
        )
    its_share = shard_of(parse_shard(shard))
    folder = out if its_share is None else shard_folder(out, its_share)
    read_as = parse_reading("answer" if reading is None else reading)
    config = ExpertSteerConfig(reading=read_as, batch_size=batch_size)
    contrast, _ = texts_to_fit(texts, seed)
    anchors = None if texts.anchors is None else read_texts(texts.anchors)
    loaded = models.load(model)
    with goes_on_from(folder):
        states = ExpertSteer(config, seed=seed).capture(
            loaded,
            contrast,
            anchors=anchors,
            progress=True,
            store=out,
            shard=its_share,
            tokens=tokens,
        )
    say(repr(states))
    say(str(folder.resolve()))


def merge(
    states: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="the --out of `capture --shard`; the shards lie beside it"
        ),
    ],
) -> None:
    """Put the shares of `capture --shard` together.

    DIR becomes what one process would have written. A merge that was stopped goes on; the shards
    may be removed afterwards."""
    from expertsteer_lens.data.activations import ActivationStore

    with goes_on_from(states):
        whole = ActivationStore.merge(states)
    say(repr(whole))
    say(str(states.resolve()))
