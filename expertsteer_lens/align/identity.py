"""Kind "identity": no map at all, for models of one family whose residual streams agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertsteer_lens._checks import check_matrix
from expertsteer_lens.errors import WidthError
from expertsteer_lens.linalg.row_space import smaller_gram

from .aligner import AffineMap, Aligner, AlignerQuality
from .kind import FitContext, Kind


@dataclass(frozen=True, kw_only=True, eq=False)
class IdentityKind(Kind):
    """Fits nothing, so there is nothing to hold out: R^2 is that of the expert's own states."""

    def prepare_expert(self, name: str, rows: Tensor, context: FitContext) -> Tensor:
        """The rows."""
        return check_matrix(name, rows, min_rows=2).detach().double()

    def prepare_target(self, name: str, rows: Tensor, context: FitContext) -> Tensor:
        """The rows."""
        return check_matrix(name, rows, min_rows=2).detach().double()

    def fit(
        self, expert: Tensor, target: Tensor | None, d_target: int, context: FitContext
    ) -> Aligner:
        """Measure how far the states agree as they are."""
        if target is None or expert.shape[1] != d_target:
            raise WidthError(
                f"aligner kind='identity' maps d_expert={expert.shape[1]} to d_target={d_target}, "
                "which must be equal; use 'ridge' or another kind."
            )
        gram = smaller_gram(expert - expert.mean(0))
        spread = (target - target.mean(0)).square().sum()
        quality = AlignerQuality(
            n_anchors=expert.shape[0],
            r2=float(1.0 - (target - expert).square().sum() / spread),
            reconstruction_fvu=0.0,
            effective_rank=float(gram.diagonal().sum() ** 2 / gram.square().sum()),
            n_components=d_target,
        )
        zero = torch.zeros(d_target, device=expert.device)
        maps = AffineMap((), zero), AffineMap((), zero)
        return Aligner(*maps, quality, context.config, context.seed)


IDENTITY = IdentityKind(settings=(), needs_equal_widths=True)
