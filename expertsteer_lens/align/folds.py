"""Which row of the anchors belongs to which fold; rows of one text are never parted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from expertsteer_lens.errors import DataError


def draw_folds(
    n: int,
    n_folds: int,
    seed: int,
    *,
    groups: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, ...]:
    """Row indices of each fold: a permutation drawn by `seed` and cut into equal parts, or, with
    `groups`, all rows of a group in the fold that `fold_of_groups` says.

    Raises:
        DataError: fewer than two rows a fold, groups that are not one integer per row, or a fold
            without a group.
    """
    check_row_count(n, n_folds)
    if groups is None:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)
        return order.tensor_split(n_folds)
    folds = fold_of_groups(check_groups(groups, n), n_folds, seed)
    rows = [(folds == fold).nonzero()[:, 0].to(device) for fold in range(n_folds)]
    check_no_empty_fold([len(r) for r in rows])
    return tuple(rows)


def fold_of_groups(groups: Int[Tensor, " n"], n_folds: int, seed: int) -> Int[Tensor, " n"]:
    """The fold of each row, decided by its group and the seed alone: however rows are batched, a
    group is always in the same fold.

    Of every `n_folds` groups in a row (0 to 4, 5 to 9, ... for five folds) each goes to another
    fold, in an order that a hash of the seed draws: groups numbered without gaps give folds of
    nearly equal numbers of groups.

    >>> import torch
    >>> fold_of_groups(torch.tensor([0, 0, 1, 2, 3]), 2, seed=0).tolist()
    [1, 1, 0, 0, 1]
    """
    groups = groups.cpu().long()
    blocks, place = groups.div(n_folds, rounding_mode="floor"), groups.remainder(n_folds)
    orders = {b: _shuffle_folds(b, n_folds, seed) for b in set(blocks.tolist())}
    folds = [orders[b][p] for b, p in zip(blocks.tolist(), place.tolist(), strict=True)]
    return torch.tensor(folds, dtype=torch.long)


def _shuffle_folds(block: int, n_folds: int, seed: int) -> list[int]:
    def drawn(fold: int) -> bytes:
        """What the fold is sorted by: the same for the same seed and block, on every machine."""
        return hashlib.sha256(f"{seed}:{block}:{fold}".encode()).digest()

    return sorted(range(n_folds), key=drawn)


def check_groups(groups: Tensor, n: int) -> Tensor:
    """Return `groups` if it is one integer per row.

    Raises:
        DataError: it is not.
    """
    groups = torch.as_tensor(groups)
    integers = not (groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool)
    if groups.shape != (n,) or not integers:
        raise DataError(
            f"groups must be one integer per row (the text a row comes from): expected shape "
            f"({n},), got {tuple(groups.shape)}, {groups.dtype}."
        )
    return groups


def check_row_count(n: int, n_folds: int) -> None:
    """Raise `DataError` unless every fold can have two rows."""
    if n < 2 * n_folds:
        raise DataError(
            f"an aligner with n_folds={n_folds} needs at least {2 * n_folds} anchors "
            f"(two a fold), got {n}; add anchors or lower n_folds."
        )


def check_no_empty_fold(counts: Sequence[int]) -> None:
    """Raise `DataError` if a fold has no row."""
    empty = [fold for fold, count in enumerate(counts) if not count]
    if empty:
        raise DataError(
            f"groups: no group falls into fold {empty[0]} of {len(counts)}; number the groups 0, "
            "1, 2, ... without gaps, use more of them, or lower n_folds."
        )
