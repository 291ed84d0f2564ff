"""What every kind of aligner says about itself; the kinds stand in the table of `kinds.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from expertsteer_lens._checks import Scalar, check_matrix
from expertsteer_lens.errors import DataError

if TYPE_CHECKING:
    from .aligner import Aligner
    from .config import AlignerConfig


def resolve_nothing(config: AlignerConfig) -> Mapping[str, Any]:
    """Nothing to refuse, and None is a value of its own in every field."""
    return {}


@dataclass(frozen=True, eq=False)
class FitContext:
    """What all fits of one grid share."""

    config: AlignerConfig
    seed: int
    folds: tuple[Tensor, ...]
    """Row indices of each fold; empty for kinds without cross-validation."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind(ABC):
    """One way to fit an aligner. Use `MomentKind` for closed forms of second moments, `RowKind` for
    any map fitted on rows.

    A grid prepares every layer once and then fits pairs: `prepare_expert` and `prepare_target` turn
    the rows of one layer into whatever `fit` takes."""

    settings: tuple[str, ...]
    """The fields of `AlignerConfig` that mean something for this kind; all others must keep their
    defaults. With "n_folds" the quality is measured on held-out folds."""
    options: Mapping[str, Scalar] = field(default_factory=dict)
    """Settings that only this kind has, in `AlignerConfig.options`, and their defaults."""
    resolve: Callable[[AlignerConfig], Mapping[str, Any]] = resolve_nothing
    """Refuses settings that do not go together, and says what fields left at None stand for."""
    uses_target: bool = True
    """False: the fit looks at the expert alone, and takes no target states."""
    needs_equal_widths: bool = False
    """True: only between layers of equal width."""

    @property
    def is_cross_validated(self) -> bool:
        """Whether the anchors are split into folds."""
        return "n_folds" in self.settings

    @abstractmethod
    def prepare_expert(self, name: str, rows: Tensor, context: FitContext) -> Any:
        """One expert layer, from its rows `[n, d_expert]`; `name` is for error messages."""

    @abstractmethod
    def prepare_target(self, name: str, rows: Tensor, context: FitContext) -> Any:
        """One target layer, from its rows `[n, d_target]`."""

    @abstractmethod
    def fit(self, expert: Any, target: Any | None, d_target: int, context: FitContext) -> Aligner:
        """The aligner of two prepared layers; `target` is None for kinds that use none."""


def check_rows(name: str, rows: Tensor, context: FitContext) -> None:
    """Raise unless `rows` is a finite matrix with one row for each row in the folds.

    Raises:
        DataError: it is not.
    """
    check_matrix(name, rows)
    n = sum(fold.shape[0] for fold in context.folds)
    if context.folds and rows.shape[0] != n:
        raise DataError(f"{name} has {rows.shape[0]} rows, the others have {n}.")
