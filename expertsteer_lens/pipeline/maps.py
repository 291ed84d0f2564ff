"""The maps of a fit: of all candidate layer pairs, on token pairs or on one state a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from expertsteer_lens.align import Aligner, AlignerConfig, AlignerGrid, MomentGrid
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.pair.rules import allowed_targets

from .config import ExpertSteerConfig
from .fit_data import FitData, PairKey


def fit_maps(
    config: ExpertSteerConfig, seed: int, data: FitData, aligner: AlignerConfig | None = None
) -> Iterator[dict[PairKey, Aligner]]:
    """The maps of every candidate layer pair, one expert layer at a time: those whose token pairs
    were read, or else all allowed ones.

    Args:
        config: settings of the fit.
        seed: of folds and gauges.
        data: what was read.
        aligner: in place of `config.aligner`.

    Raises:
        ArgumentError: the maps were fitted on token pairs and these are not here any more.
    """
    aligner = aligner or config.aligner
    if data.maps_on == "tokens":
        moments = data.token_moments
        if moments is None:
            raise ArgumentError(
                "the maps of this fit were fitted on token pairs, whose moments were too large to "
                "be saved with it; run ExpertSteer(...).fit again to fit other maps."
            )
        maps = MomentGrid(moments, aligner, seed=seed)
        for hook in dict.fromkeys(e for e, _ in moments.pairs):
            yield maps.fit([pair for pair in moments.pairs if pair[0] == hook])
        return
    names_t = list(data.target_pair_states)
    allowed = [names_t[j] for j in allowed_targets(len(names_t), config.pairing)]
    expert_rows, target_rows = rows_to_align(config, data)
    grid = AlignerGrid(target_rows, aligner, seed=seed)
    for hook in data.expert_pair_states:
        yield grid.fit(expert_rows, pairs=[(hook, t) for t in allowed])


def rows_to_align(
    config: ExpertSteerConfig, data: FitData
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Paired states that the maps are fitted on, expert and target."""
    sides = (
        (data.expert_anchor_states, data.expert_pair_states),
        (data.target_anchor_states, data.target_pair_states),
    )
    if not config.align_on_pairs:
        return sides[0][0], sides[1][0]
    expert, target = (_Stacked(*parts) for parts in sides)
    return expert, target


class _Stacked(Mapping[str, Tensor]):
    """The rows of two stores under one another, put together when a layer is asked for: never all
    layers twice in memory."""

    def __init__(self, *parts: Mapping[str, Tensor]) -> None:
        self._parts = parts

    def __getitem__(self, hook_name: str) -> Tensor:
        return torch.cat([part[hook_name] for part in self._parts])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0])

    def __len__(self) -> int:
        return len(self._parts[0])

    def __contains__(self, hook_name: object) -> bool:
        return hook_name in self._parts[0]  # the inherited one would put rows together
