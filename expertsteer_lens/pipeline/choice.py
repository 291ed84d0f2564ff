"""How firm the choice of layers is: the same choice from halves of the labelled pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from expertsteer_lens.align import Aligner
from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.errors import DataError, SolveError
from expertsteer_lens.learn.rfm import RFM, fit_rfm
from expertsteer_lens.pair.rules import (
    LayerPairs,
    PairingConfig,
    find_rule,
    select_layer_pairs,
)

from .fit_data import PairKey, labels_of

N_DIVISIONS = 5
"""Each gives two halves. Chosen by us: ten choices tell "always" from "half of the time"."""
N_RIVALS = 3
"""Pairs considered beside the chosen ones, by their score. Chosen by us: a pair further behind is
hardly ever chosen, and every one costs a direction a half."""
MOST_PAIRS = 512
"""Labelled pairs that are divided, at most, so that the cost has a bound."""


def choose_on_halves(
    states: ActivationStore,
    chosen: LayerPairs,
    aligners: Mapping[PairKey, Aligner],
    rfms: Mapping[PairKey, RFM],
    units: Mapping[str, Tensor],
    config: PairingConfig,
    seed: int,
) -> dict[str, Any]:
    """The choice by effect, made again from halves of the labelled pairs: what the step
    "stability" says.

    The maps, the gradient and each direction's settings are those of the whole fit, so what other
    anchors, other prompts or another search would do is not in it; and a half says less than the
    whole, so the whole is firmer than the halves are. Costs less than one search of an RFM a pair
    considered.

    Args:
        states: the expert's on the labelled texts, rows of a pair one after the other.
        chosen: the choice, with the scores of all candidates.
        aligners: of the candidates.
        rfms: of the candidates.
        units: the gradient of the behaviour a unit of the coefficient, by target hook point.
        config: the rule, and how many pairs.
        seed: of the divisions.

    Returns:
        `halves`: how many; `pairs_again`: in how many the same layer pairs were chosen;
        `targets_again`: in how many the same target layers; `others`: what else was chosen, most
        often first; `cosine`: lowest and highest of the chosen direction learnt from a half with
        that of the whole; `runner_up`: the best score of another pair, as a share of the best.
    """
    keys = _considered(chosen)
    labels = labels_of(states)
    directions: list[dict[PairKey, Tensor]] = []
    mapped = {key: aligners[key].encode(states[key[0]]) for key in keys}
    for rows in _halves(len(labels) // 2, seed):
        try:
            directions.append(
                {
                    key: _as_before(mapped[key][rows], labels[rows], rfms[key], seed).direction
                    for key in keys
                }
            )
        except (DataError, SolveError) as error:
            return {"halves": 0, "because": f"a half cannot be learnt from: {error}"}
    if not directions:
        return {"halves": 0, "because": f"{len(labels) // 2} labelled pairs are too few to halve"}
    wanted = chosen.keys()
    found = [_choose(half, units, chosen, config) for half in directions]
    others = Counter(_words(pairs) for pairs in found if set(pairs) != set(wanted))
    targets = {t for _, t in wanted}
    cosines = [float(half[key] @ rfms[key].direction) for half in directions for key in wanted]
    return {
        "halves": len(found),
        "pairs_again": sum(set(pairs) == set(wanted) for pairs in found),
        "targets_again": sum({t for _, t in pairs} == targets for pairs in found),
        "others": "; ".join(f"{words} ({n})" for words, n in others.most_common()) or "none",
        "cosine": f"{min(cosines):.2f} to {max(cosines):.2f}",
        "runner_up": _runner_up(chosen),
    }


def _halves(n_pairs: int, seed: int) -> list[Tensor]:
    """Rows of both halves of some divisions of the pairs; none where a half has one pair."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(N_DIVISIONS):
        order = torch.randperm(n_pairs, generator=generator)[:MOST_PAIRS]
        for part in order.chunk(2):
            if len(part) < 2:
                return []
            pairs = part.sort().values
            out.append(torch.stack([2 * pairs, 2 * pairs + 1], dim=1).flatten())
    return out


def _as_before(rows: Tensor, labels: Tensor, whole: RFM, seed: int) -> RFM:
    """An RFM with the setting and round that were kept for all rows; nothing is searched."""
    kept = whole.chosen
    config = replace(
        whole.config,
        bandwidth=kept.bandwidth,
        center_gradients=kept.center_gradients,
        n_rounds=kept.round,
        validation_fraction=0.0,
    )
    return fit_rfm(rows, labels, config, seed=seed)


def _considered(chosen: LayerPairs) -> list[PairKey]:
    """The chosen pairs and their closest rivals."""
    wanted = chosen.keys()
    rest = [key for key, _ in _ranked(chosen) if key not in wanted]
    return [*wanted, *rest[:N_RIVALS]]


def _ranked(chosen: LayerPairs) -> list[tuple[PairKey, float]]:
    """Every pair with a score, best first."""
    names_e, names_t, scores = chosen.expert_hook_names, chosen.target_hook_names, chosen.scores
    known = [tuple(place) for place in (~scores.isnan()).nonzero().tolist()]
    sign = 1.0 if find_rule(chosen.rule).lowest_first else -1.0
    known.sort(key=lambda place: sign * float(scores[place]))
    return [((names_e[i], names_t[j]), float(scores[i, j])) for i, j in known]


def _choose(
    directions: Mapping[PairKey, Tensor],
    units: Mapping[str, Tensor],
    chosen: LayerPairs,
    config: PairingConfig,
) -> list[PairKey]:
    """As the rule chose, among the pairs considered."""
    names_e, names_t = chosen.expert_hook_names, chosen.target_hook_names
    effects = torch.full(tuple(chosen.scores.shape), torch.nan, dtype=torch.float64)
    for (e, t), direction in directions.items():
        effects[names_e.index(e), names_t.index(t)] = float(units[t] @ direction.double())
    return select_layer_pairs(names_e, names_t, config, scores=effects).keys()


def _runner_up(chosen: LayerPairs) -> str:
    """The best pair that was not chosen, and what of the lowest chosen score it reaches."""
    wanted = chosen.keys()
    lowest = min(pair.score for pair in chosen)
    for key, score in _ranked(chosen):
        if key not in wanted:
            share = f"{score / lowest:.0%} of the score" if lowest > 0 else f"score {score:+.3f}"
            return f"{_words([key])}, {share}"
    return "none"


def _words(pairs: Sequence[PairKey]) -> str:
    return ", ".join(f"{e} → {t}" for e, t in pairs)
