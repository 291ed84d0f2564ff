"""Step 1, align: maps from the expert's space to the target's."""

from __future__ import annotations

from .aligner import AffineMap, Aligner, AlignerConfig, AlignerQuality
from .fit import fit_aligner, fit_aligner_grid

__all__ = [
    "AffineMap",
    "Aligner",
    "AlignerConfig",
    "AlignerQuality",
    "fit_aligner",
    "fit_aligner_grid",
]
