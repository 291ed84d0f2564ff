"""What would fail after an hour of reading, found out before: the steps on random states.

Every step is asked, on random numbers with as many rows as will be read, whether its settings can
work. So each refusal comes in the words of the step that would have made it later, and nothing is
said twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertsteer_lens._checks import check_number
from expertsteer_lens.align import fit_aligner
from expertsteer_lens.errors import ArgumentError, DataError, SolveError, WidthError
from expertsteer_lens.learn.rfm import fit_rfm
from expertsteer_lens.pair.mutual_information import layer_pair_mi
from expertsteer_lens.pair.rules import select_layer_pairs

from .config import ExpertSteerConfig
from .fit_data import FitTexts

if TYPE_CHECKING:
    from expertsteer_lens.data.behaviour import Behaviour
    from expertsteer_lens.data.chat import Text
    from expertsteer_lens.hosts import Host

MOST_ROWS = 500
"""With more rows nothing fails for want of them, and a rehearsal would take seconds."""


def check_seed(seed: int) -> None:
    """Raise `ArgumentError` unless every step can use the seed."""
    check_number("seed", seed, low=0, high=2**32 - 1, integer=True)


def rehearse(
    config: ExpertSteerConfig,
    seed: int,
    *,
    expert_hook_names: Sequence[str],
    target_hook_names: Sequence[str],
    n_anchors: int,
    labels: Tensor,
    same_width: bool,
) -> None:
    """Refuse settings that cannot work on that many layers, anchors and pairs.

    Args:
        config: the settings.
        seed: the fit's.
        expert_hook_names: hook points of the expert that will be read.
        target_hook_names: hook points of the target that will be read.
        n_anchors: anchors that the maps will be fitted on.
        labels: of the texts of the contrast pairs, `[2 n_pairs]`.
        same_width: whether both models' states have the same width (or it is not known).

    Raises:
        ArgumentError, DataError, WidthError: as the step would, with the part of the config named.
    """
    generator = torch.Generator().manual_seed(0)

    def states(n: int, d: int) -> Tensor:
        return torch.randn(n, d, generator=generator)

    free = torch.zeros(len(expert_hook_names), len(target_hook_names), dtype=torch.float64)
    _try(
        "pairing",
        select_layer_pairs,
        expert_hook_names,
        target_hook_names,
        config.pairing,
        scores=free,
        seed=seed,
    )
    if n_anchors <= MOST_ROWS:
        # As wide as there are rows: the rank is then what the number of rows allows.
        layer = states(n_anchors, n_anchors)
        few_draws = replace(config.mi, n_permutations=0, n_bootstrap=2)
        _try("mi", layer_pair_mi, {"expert": layer}, {"target": layer}, few_draws, seed=seed)
        one, other = states(n_anchors, 4), states(n_anchors, 4 if same_width else 3)
        _try("aligner", fit_aligner, one, other, config.aligner, seed=seed)
    if len(labels) <= MOST_ROWS:
        one_round = replace(config.rfm, n_rounds=1)
        _try("rfm", fit_rfm, states(len(labels), 4), labels, one_round, seed=seed)


def check_lengths(
    experts: Sequence[Host],
    target: Host,
    texts: FitTexts,
    *,
    behaviour: Behaviour | None,
    neutral: Sequence[Text] | None,
) -> None:
    """Have every text tokenised by each model that will be shown it, before any of them is run.

    Args:
        experts: those that are models.
        target: the model to be steered.
        texts: divided.
        behaviour: as it was given; of its prompts a fit reads those for validation.
        neutral: as it was given.

    Raises:
        DataError: a text is too long for a model, or has no tokens; it is named by its argument
            and its place there.
    """
    pairs, given = texts.pairs, list(texts.anchors or ())
    labelled = [
        (f"pairs.{side}[{i}]", text)
        for side in ("positive", "negative")
        for i, text in enumerate(getattr(pairs, side))
    ]
    anchors = [(f"anchors[{i}]", text) for i, text in enumerate(given)]
    fitted = set(texts.fit_texts)
    for host in experts:
        _check_tokens(host, [*labelled, *(both for both in anchors if both[1] in fitted)])
    more = [(f"neutral[{i}]", text) for i, text in enumerate(neutral or ())]
    if behaviour is not None and texts.validation_behaviour is not None:
        more += [
            (f"behaviour.prompts[{i}] with its completion", prompt + completion)
            for i, prompt in enumerate(behaviour.prompts)
            if prompt in texts.validation_behaviour.prompts
            for side in behaviour.completions(i)
            for completion in side
        ]
    _check_tokens(target, [*labelled, *anchors, *more])


def _check_tokens(host: Host, named: Sequence[tuple[str, Text]]) -> None:
    for start in range(0, len(named), 256):
        some = named[start : start + 256]
        try:
            host.tokenize([text for _, text in some])
        except DataError as error:
            for name, text in some:
                try:
                    host.tokenize([text])
                except DataError as reason:
                    said = str(reason).removeprefix("prompts[0] ")
                    raise DataError(f"{name} {said} The model is {host.name!r}.") from error
            raise


def _try(part: str, step: Callable[..., Any], *args: Any, **keywords: Any) -> None:
    """Run a step for its refusals; what depends on the numbers themselves is not to be judged."""
    try:
        step(*args, **keywords)
    except (ArgumentError, DataError, WidthError) as error:
        raise type(error)(
            f"config.{part} cannot work on this fit, and no model was run: {error}"
        ) from error
    except SolveError:
        return
