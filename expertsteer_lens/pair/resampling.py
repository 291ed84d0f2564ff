"""Folds, permutations and bootstrap weights of rows, of which those of one group stay together.

The unit that is drawn is the group: one text, of which a row is a token. Tokens of one text
resemble each other in both models, so as evidence they count for far fewer than their number: rows
that are shuffled or redrawn one by one make the null and the interval too narrow, and independent
layers look dependent. Rows without groups are groups of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertsteer_lens._checks import check_groups as one_integer_per_row
from expertsteer_lens.errors import DataError

from .config import MIConfig

GROUPS_PER_STRATUM = 20
"""Groups among which rows are exchanged, at least (if there are so many). Chosen by us: more keep
groups of less equal size together; fewer would pair a group with itself in more than one draw of
twenty, and the null would hold some of the dependence that it is to be without."""


@dataclass(frozen=True, eq=False)
class Resamples:
    """What is drawn by the seed."""

    folds: tuple[Tensor, ...]
    """Row indices of each fold; a single one of all rows where the estimator needs none."""
    orders: tuple[Tensor, ...]
    """Row indices of the null draws, `[n]` each: row i of the expert meets row `order[i]` of the
    target. Permutations, unless groups differ in size (then some rows repeat)."""
    weights: Tensor
    """`[n_bootstrap, n]`, float64; each row sums to n."""


def check_groups(groups: Tensor | Sequence[int] | None, n: int, config: MIConfig) -> Tensor:
    """The group of each row as an integer tensor `[n]`; without groups every row is its own.

    Raises:
        DataError: not one integer per row, or too few groups.
    """
    if groups is None:
        return torch.arange(n)
    given = one_integer_per_row("groups", groups, n)
    found, least = len(torch.unique(given)), 2 * (config.n_folds or 1)
    if found < least:
        raise DataError(
            f"groups must hold at least {least} groups (texts) for these settings, got {found}; "
            "give more texts."
        )
    return given


def draw_resamples(
    groups: Tensor, config: MIConfig, seed: int, device: torch.device | str = "cpu"
) -> Resamples:
    """Folds, permutations and bootstrap weights, each from its own stream: how many of one never
    moves another.

    Folds: groups in random order, cut into `n_folds` parts of as many groups each.
    Null draws: see `_Exchange`.
    Bootstrap: as many groups as there are, drawn with replacement; a row weighs as often as its
    group was drawn, times what makes the weights sum to n.

    Example:
        >>> got = draw_resamples(torch.tensor([7, 7, 7, 4, 4, 9, 9]), MIConfig(), seed=0)
        >>> [fold.tolist() for fold in got.folds]
        [[5, 6], [3, 4], [0, 1, 2]]
        >>> got.orders[0].tolist()  # texts 7 and 9 changed places, 4 kept its own
        [5, 6, 6, 3, 4, 0, 2]
    """
    rows, member = _rows_of(groups)
    n, n_groups = len(groups), len(rows)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n_groups, generator=generator)
    streams = [
        torch.Generator().manual_seed(int(s))
        for s in torch.randint(2**62, (2,), generator=generator)
    ]
    folds = tuple(
        _filled(rows[part]).to(device) for part in order.tensor_split(config.n_folds or 1)
    )
    exchange = _Exchange.of(rows)
    orders = tuple(exchange.draw(streams[0]).to(device) for _ in range(config.n_permutations))
    drawn = torch.randint(n_groups, (config.n_bootstrap, n_groups), generator=streams[1])
    counts = torch.stack([torch.bincount(row, minlength=n_groups) for row in drawn])
    weights = counts[:, member].double()
    weights *= n / weights.sum(1, keepdim=True)
    return Resamples(folds, orders, weights.to(device))


@dataclass(frozen=True, eq=False)
class _Exchange:
    """Random re-pairing of whole groups: each group of the expert meets the target rows of another
    group, stretched or squeezed evenly to as many rows.

    If all groups are of one size, every draw is an exchange of texts and the test is exact. Where
    they differ, no permutation of rows would do: a run of rows that meets the ends of two others is
    cut in two, and a null of cut runs is too narrow (with 20 texts of 3 to 9 tokens 8 % to 30 % of
    independent pairs had p <= 0.05, by estimator). So row i of m meets row (i + 1/2) m' / m of the
    other group's m', rounded down: every run stays whole, rows repeat or drop out evenly, and a row
    meets one from about the same place in another text, so that what both models know of the place
    alone is part of the null. To stretch little, groups of similar size are exchanged: sorted by
    size they are cut into strata of at least `GROUPS_PER_STRATUM`.
    """

    own: Tensor
    """`[n_groups, longest]` rows of each group, stratum after stratum, -1 where a group is
    shorter."""
    strata: list[int]
    """Groups per stratum."""

    @classmethod
    def of(cls, rows: Tensor) -> _Exchange:
        sizes = (rows >= 0).sum(1)
        by_size = torch.argsort(sizes, stable=True)
        n_strata = min(len(torch.unique(sizes)), max(1, len(rows) // GROUPS_PER_STRATUM))
        return cls(rows[by_size], [len(s) for s in by_size.tensor_split(n_strata)])

    def draw(self, generator: torch.Generator) -> Tensor:
        """Row i of the expert meets row `order[i]` of the target, `[n]`."""
        met = torch.cat(
            [
                stratum[torch.randperm(len(stratum), generator=generator)]
                for stratum in torch.split(self.own, self.strata)
            ]
        )
        here = self.own >= 0
        size, met_size = (side.sum(1, keepdim=True) for side in (here, met >= 0))
        place = (2 * torch.arange(self.own.shape[1]) + 1) * met_size // (2 * size)
        order = torch.empty(int(here.sum()), dtype=torch.long)
        order[self.own[here]] = met.gather(1, place.clamp(max=self.own.shape[1] - 1))[here]
        return order


def _rows_of(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of each group in their order, `[n_groups, longest]`, -1 where a group is shorter; and
    the group (0, 1, ... by label) of each row, `[n]`."""
    _, member = torch.unique(groups, return_inverse=True)
    sizes = torch.bincount(member)
    by_group = torch.argsort(member, stable=True)
    place = torch.arange(len(groups)) - (sizes.cumsum(0) - sizes)[member[by_group]]
    rows = torch.full((len(sizes), int(sizes.max())), -1)
    rows[member[by_group], place] = by_group
    return rows, member


def _filled(rows: Tensor) -> Tensor:
    return rows[rows >= 0]
