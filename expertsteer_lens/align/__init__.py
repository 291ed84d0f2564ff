"""Step 1, align: maps from the expert's space to the target's."""

from __future__ import annotations

from .aligner import AffineMap, Aligner, AlignerQuality, RowMap
from .config import AlignerConfig
from .fit import AlignerGrid, fit_aligner, fit_aligner_grid
from .kind import Kind
from .kinds import KINDS, AlignerKind, applicable_kinds, register_aligner
from .moment_grid import MomentGrid, fit_aligner_grid_from_moments
from .moment_kind import RIDGE_PATH, MomentKind
from .paired_moments import PairedMoments
from .row_kind import RowKind

__all__ = [
    "KINDS",
    "RIDGE_PATH",
    "AffineMap",
    "Aligner",
    "AlignerConfig",
    "AlignerGrid",
    "AlignerKind",
    "AlignerQuality",
    "Kind",
    "MomentGrid",
    "MomentKind",
    "PairedMoments",
    "RowKind",
    "RowMap",
    "applicable_kinds",
    "fit_aligner",
    "fit_aligner_grid",
    "fit_aligner_grid_from_moments",
    "register_aligner",
]
