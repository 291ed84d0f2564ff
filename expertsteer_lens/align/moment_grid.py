"""Fit a grid of aligners from streamed second moments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import torch
from torch import Tensor

from expertsteer_lens._checks import unknown_hook
from expertsteer_lens._progress import progress_bar
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.linalg.moments import RunningMoments

from .aligner import Aligner
from .config import AlignerConfig
from .fit import DEFAULT_CONFIG
from .fold_sums import (
    FoldSums,
    TargetLayer,
    cross_sums_from_moments,
    expert_layer,
    sums_from_moments,
    target_layer,
)
from .kind import FitContext
from .kinds import KINDS
from .moment_kind import MomentKind
from .paired_moments import PairedMoments, expert_key, target_key


def fit_aligner_grid_from_moments(
    moments: PairedMoments,
    config: AlignerConfig = DEFAULT_CONFIG,
    *,
    seed: int | None = None,
    pairs: Iterable[tuple[str, str]] | None = None,
    progress: bool = False,
) -> dict[tuple[str, str], Aligner]:
    """The aligners that `fit_aligner_grid` fits on the same rows with the same `groups` and `seed`,
    up to rounding, from streamed moments. Costs eigendecompositions d x d, `n_folds + 2` a layer.

    Args:
        moments: what was accumulated.
        config: one configuration for all pairs, of a kind that is a closed form of second moments
            (`MomentKind`: all built-in kinds but "identity").
        seed: draws the gauge of "autoencoder"; default: the seed of the folds.
        pairs: which pairs; default all that were accumulated.
        progress: show a bar over expert layers.

    Raises:
        ArgumentError: the kind needs rows, or another number of folds than was accumulated.
        HookNameError: a pair that was not accumulated.
        DataError: too few rows, a fold without rows, constant states.
    """
    grid = MomentGrid(moments, config, seed=seed)
    return grid.fit(moments.pairs if pairs is None else pairs, progress=progress)


class MomentGrid:
    """`fit_aligner_grid_from_moments` in several calls, one expert layer at a time: the target's
    layers are prepared once, and of the moments no more is copied than the layer at hand needs.

    Args:
        moments: what was accumulated.
        config: as there.
        seed: as there.

    Raises:
        ArgumentError, DataError: as there.
    """

    def __init__(
        self,
        moments: PairedMoments,
        config: AlignerConfig = DEFAULT_CONFIG,
        *,
        seed: int | None = None,
    ) -> None:
        kind = KINDS[config.kind]
        if not isinstance(kind, MomentKind):
            raise ArgumentError(
                f"kind={config.kind!r} is fitted on rows, not on moments; use fit_aligner_grid on "
                "rows that can be held."
            )
        if config.n_folds != moments.n_folds:
            raise ArgumentError(
                f"n_folds={config.n_folds}, but the moments were accumulated in "
                f"{moments.n_folds} folds; use that number."
            )
        self.moments, self.config, self._kind = moments, config, kind
        self._folds = moments.running_folds()
        self._context = FitContext(config, moments.seed if seed is None else seed, ())
        self._targets: dict[str, TargetLayer] = {}

    def fit(
        self, pairs: Iterable[tuple[str, str]], *, progress: bool = False
    ) -> dict[tuple[str, str], Aligner]:
        """The aligners of these pairs.

        Raises:
            HookNameError: a pair that was not accumulated.
            DataError: constant states.
        """
        wanted = list(pairs)
        for pair in wanted:
            if pair not in self.moments.pairs:
                known = [" → ".join(p) for p in self.moments.pairs]
                raise unknown_hook(" → ".join(pair), known, "an accumulated pair")
        out: dict[tuple[str, str], Aligner] = {}
        experts = dict.fromkeys(e for e, _ in wanted)
        for e in progress_bar(experts, f"aligners ({self.config.kind})", progress=progress):
            expert = expert_layer(self._sums(expert_key(e)))
            for t in (t for its_expert, t in wanted if its_expert == e):
                target, cross = self._target(t), None
                if target is not None:
                    cross = cross_sums_from_moments(
                        expert.sums,
                        target.sums,
                        self._means(expert_key(e)),
                        self._means(target_key(t)),
                        _Covariances(self._folds, target_key(t), expert_key(e)),
                    )
                width = self.moments.d_target[t]
                out[e, t] = self._kind.fit_sums(expert, target, cross, width, self._context)
        return {pair: out[pair] for pair in wanted}

    def _target(self, hook_name: str) -> TargetLayer | None:
        if not self._kind.uses_target:
            return None
        if hook_name not in self._targets:
            sums = self._sums(target_key(hook_name))
            self._targets[hook_name] = target_layer(sums, with_axes=self._kind.needs_target_axes)
        return self._targets[hook_name]

    def _means(self, key: str) -> Tensor:
        return torch.stack([fold.mean(key) for fold in self._folds])

    def _sums(self, key: str) -> FoldSums:
        means = self._means(key)
        weights = [fold.weight for fold in self._folds]
        return sums_from_moments(
            key,
            sum(fold.n for fold in self._folds),
            torch.tensor(weights, dtype=means.dtype, device=means.device),
            means,
            _Covariances(self._folds, key, key),
            self.config.standardise,
        )


class _Covariances(Sequence[Tensor]):
    """A covariance fold by fold, each made when it is asked for: never all folds at once."""

    def __init__(self, folds: Sequence[RunningMoments], a: str, b: str) -> None:
        self._folds, self._block = folds, (a, b)

    @overload
    def __getitem__(self, fold: int) -> Tensor: ...
    @overload
    def __getitem__(self, fold: slice) -> list[Tensor]: ...
    def __getitem__(self, fold: int | slice) -> Tensor | list[Tensor]:
        """Of one fold, or of several."""
        if isinstance(fold, slice):
            return [part.covariance(*self._block) for part in self._folds[fold]]
        return self._folds[fold].covariance(*self._block)

    def __len__(self) -> int:
        return len(self._folds)
