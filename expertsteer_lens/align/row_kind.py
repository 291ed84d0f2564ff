"""Kinds fitted on rows: any map, affine or not. What users register is usually one of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.linalg.row_space import smaller_gram

from .aligner import AffineMap, Aligner, AlignerQuality, RowMap
from .kind import FitContext, Kind, check_rows

if TYPE_CHECKING:
    from .config import AlignerConfig

FitRows = Callable[[Tensor, Tensor, "AlignerConfig", int], tuple[RowMap, RowMap | None]]
"""(expert rows `[n, d_expert]`, target rows `[n, d_target]`, config, seed) to encoder and decoder;
the rows are float64, the decoder may be None."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowKind(Kind):
    """A kind given by one function that fits the map to paired rows.

    The package holds out each fold in turn, fits on the others, and measures the held-out R^2 and
    the reconstruction: n_folds + 1 fits a layer pair. A grid keeps the rows of every target layer.
    See `register_aligner` for an example."""

    fit_rows: FitRows
    settings: tuple[str, ...] = ("n_folds",)

    def __post_init__(self) -> None:
        if "n_folds" not in self.settings or not self.uses_target:
            raise ArgumentError(
                "a RowKind is fitted to target rows and measured on held-out folds: keep "
                f"uses_target=True and 'n_folds' in settings, got {self.settings}."
            )

    def prepare_expert(self, name: str, rows: Tensor, context: FitContext) -> Tensor:
        """The rows, checked."""
        check_rows(name, rows, context)
        return rows.detach()

    def prepare_target(self, name: str, rows: Tensor, context: FitContext) -> Tensor:
        """The rows, checked."""
        return self.prepare_expert(name, rows, context)

    def fit(
        self, expert: Tensor, target: Tensor | None, d_target: int, context: FitContext
    ) -> Aligner:
        """Fit on all but each fold, measure on the fold, and fit on all rows."""
        assert target is not None
        e, t = expert.double(), target.double()
        missed = lost = target_spread = expert_spread = 0.0
        has_decoder = True
        for held in context.folds:
            train = torch.ones(e.shape[0], dtype=torch.bool, device=e.device)
            train[held] = False
            encoder, decoder = self.fit_rows(e[train], t[train], context.config, context.seed)
            code = encoder(e[held])
            missed += _square_sum(t[held] - code)
            target_spread += _square_sum(t[held] - t[train].mean(0))
            has_decoder = decoder is not None
            if decoder is not None:
                lost += _square_sum(e[held] - decoder(code))
                expert_spread += _square_sum(e[held] - e[train].mean(0))
        encoder, decoder = self.fit_rows(e, t, context.config, context.seed)
        code = encoder(e)
        gram = smaller_gram(code - code.mean(0))
        rank = encoder.weight if isinstance(encoder, AffineMap) else None
        quality = AlignerQuality(
            n_anchors=e.shape[0],
            r2=1.0 - missed / target_spread,
            reconstruction_fvu=lost / expert_spread if has_decoder else None,
            effective_rank=float(gram.diagonal().sum() ** 2 / gram.square().sum()),
            n_components=None if rank is None else int(torch.linalg.matrix_rank(rank)),
        )
        return Aligner(encoder, decoder, quality, context.config, context.seed)


def _square_sum(rows: Tensor) -> float:
    return float(rows.square().sum())
