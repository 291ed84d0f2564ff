"""Which setting of a search is kept: rounds scored on rows that are not fitted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from expertsteer_lens.errors import DataError, SolveError

from .config import RFMConfig, RFMRound, search_grid
from .recursion import Round, Setting, run_rounds
from .rows import Fold


class FittedRound(NamedTuple):
    """A round, and its line of the history."""

    round: Round
    record: RFMRound


def label_offset(config: RFMConfig, target: Tensor) -> float:
    """What is subtracted from 0/1 labels before the regression and added to predictions."""
    return float(target.mean()) if config.targets == "centred" else 0.0


def split_rows(target: Tensor, fraction: float, seed: int, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Row indices to train and to validate on, stratified by label; a group is never divided.

    Args:
        target: 0/1 labels, `[n]`.
        fraction: share of the groups to validate on.
        seed: of the division.
        groups: the group of each row, `[n]`, in integers of any order.

    Raises:
        DataError: a part would lack a class.
    """
    from sklearn.model_selection import train_test_split

    member: dict[int, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        member.setdefault(group, []).append(row)
    rows = list(member.values())
    # One label a group: of most of its rows, since one text may be on both sides of several pairs.
    label = [int(float(target[of].mean()) >= 0.5) for of in rows]
    counts = [label.count(c) for c in (0, 1)]
    n_held = math.ceil(fraction * len(rows))
    parts: list[list[int]] = []
    # Groups that hold both classes (the two texts of a pair) need no stratifying.
    mixed = len(rows) >= 4 and all(len(set(target[of].tolist())) == 2 for of in rows)
    if mixed or (n_held >= 2 and min(counts) >= 2):
        split = train_test_split(
            list(range(len(rows))),
            test_size=n_held,
            stratify=None if mixed else label,
            random_state=seed,
        )
        parts = [[row for group in part for row in rows[group]] for part in split]
    if not parts or any(len(set(target[part].tolist())) < 2 for part in parts):
        kind = "rows" if len(rows) == len(target) else "distinct rows (or groups)"
        raise DataError(
            f"activations are too few for validation_fraction={fraction:g}: {counts[0]} negative "
            f"and {counts[1]} positive {kind} do not give both parts both classes; pass "
            "validation=(rows, labels), raise the fraction, or set it to 0 and give single values."
        )
    train, held = (torch.tensor(sorted(part), device=target.device) for part in parts)
    return train, held


def search_settings(
    fold: Fold, target: Tensor, config: RFMConfig, history: list[RFMRound]
) -> FittedRound:
    """The best round of the best setting on the fold's held-out rows; every round goes to
    `history`."""
    best: FittedRound | None = None
    failure: SolveError | None = None
    for bandwidth, center in search_grid(config):
        n_done = 0
        try:
            for fitted in run_setting(fold, target, config, bandwidth, center, config.n_rounds):
                history.append(fitted.record)
                n_done = fitted.round.number
                if best is None or _score(fitted.record) > _score(best.record):
                    best = fitted
        except SolveError as error:
            failure, nan = error, math.nan
            history.append(
                RFMRound("search", bandwidth, center, n_done + 1, nan, nan, nan, nan, str(error))
            )
    if best is None:
        assert failure is not None  # there is at least one setting
        raise failure
    return best


def _score(record: RFMRound) -> tuple[float, float]:
    return record.validation_auc, -record.validation_error


def run_setting(
    fold: Fold, target: Tensor, config: RFMConfig, bandwidth: float, center: bool, n_rounds: int
) -> Iterator[FittedRound]:
    """Rounds of one setting with their lines of the history; `target` has training rows first,
    held-out rows after."""
    n, offset = fold.n, label_offset(config, target[: fold.n])
    setting = Setting(
        kernel=config.kernel,
        bandwidth=bandwidth,
        relative=config.bandwidth_unit == "median_distance",
        ridge=config.ridge,
        n_rounds=n_rounds,
        center=center,
        normalise=config.normalise,
    )
    for fitted in run_rounds(fold, (target[:n] - offset).to(fold.represented.dtype), setting):
        error = auc = math.nan
        if len(target) > n:
            error = float((fitted.predictions + offset - target[n:]).square().mean())
            auc = _auc(target[n:], fitted.predictions)
        record = RFMRound(
            stage="fit" if len(target) == n else "search",
            bandwidth=bandwidth,
            center_gradients=center,
            round=fitted.number,
            length=fitted.length,
            # (K + ridge I) alpha = y, so the residual y - K alpha is ridge * alpha.
            train_error=float((config.ridge * fitted.alpha).square().mean()),
            validation_error=error,
            validation_auc=auc,
            status="ok",
        )
        yield FittedRound(fitted, record)


def _auc(labels: Tensor, scores: Tensor) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels.cpu().numpy(), scores.cpu().numpy()))
