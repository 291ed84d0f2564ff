"""The settings of an aligner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from expertsteer_lens._checks import (
    Scalar,
    check_choice,
    check_number,
    complete_options,
    find_option,
)
from expertsteer_lens.errors import ArgumentError

from .autoencoder import SOLVERS, SolverName
from .kind import Kind
from .kinds import KINDS, AlignerKind


@dataclass(frozen=True, kw_only=True)
class AlignerConfig:
    """Which map is fitted, and how. A field that means nothing for the chosen kind must keep its
    default; a field left at None takes the default of the kind when the configuration is made, so
    that a saved configuration says what was used.

    Raises:
        ArgumentError: an unknown kind, a value out of range, or a field that has no effect.

    >>> AlignerConfig(kind="anchored_autoencoder").anchor_weight
    1.0
    """

    kind: AlignerKind | str = "ridge"
    """"ridge": regression of target on expert states. "procrustes": PCA, one rotation, one scale.
    "anchored_autoencoder": the paper's reconstruction loss plus agreement with the target.
    "autoencoder": reconstruction only, as in the paper: its basis in the target's space is
    arbitrary (the seed draws it). "identity": no map, for models of one family. Others can be added
    with `register_aligner`."""
    n_components: int | None = None
    """Rank of the map, >= 1: principal components of the expert (and of the target for
    "procrustes") kept, or the bottleneck. None = min(d_expert, d_target), for "ridge" all; never
    more than the anchors span."""
    ridge: float | None = None
    """>= 0, in units of the mean variance per expert coordinate. None = chosen by cross-validation
    over `RIDGE_PATH`, for "anchored_autoencoder" on its regression term."""
    anchor_weight: float | None = None
    """Weight > 0 of the unexplained fraction of target variance beside the unexplained fraction of
    expert variance in "anchored_autoencoder"; 1 if None is given."""
    standardise: bool = False
    """Scale every coordinate of both sides to unit variance before fitting (the map is scaled
    back): all coordinates count equally, in the loss and in the reported R^2, instead of a few
    massive ones."""
    n_folds: int = 5
    """Disjoint folds of the cross-validation, >= 2."""
    solver: SolverName | str = "closed_form"
    """"autoencoder" only: "closed_form" (the global optimum) or "adam" (trained, for comparison
    with the paper)."""
    n_steps: int | None = None
    """Steps of "adam", >= 1; 2000 if None is given."""
    learning_rate: float | None = None
    """Initial learning rate of "adam", > 0, decayed linearly to 0; 0.01 if None is given."""
    options: Mapping[str, Scalar] | tuple[tuple[str, Scalar], ...] = ()
    """Settings of a registered kind, given as a dict of numbers, texts and booleans. Kept as sorted
    pairs, the kind's defaults included; read them with `option`."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("solver", self.solver, SOLVERS)
        check_number("n_folds", self.n_folds, low=2, integer=True)
        for name, low, low_open, integer in (
            ("n_components", 1, False, True),
            ("ridge", 0.0, False, False),
            ("anchor_weight", 0.0, True, False),
            ("n_steps", 1, False, True),
            ("learning_rate", 0.0, True, False),
        ):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=low, low_open=low_open, integer=integer)
        if not isinstance(self.standardise, bool):
            raise ArgumentError(f"standardise must be a bool, got {self.standardise!r}.")
        kind = KINDS[self.kind]
        self._refuse_idle_fields(kind)
        for name, default in kind.resolve(self).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        options = complete_options(self.options, kind.options, f"kind={self.kind!r}")
        object.__setattr__(self, "options", options)

    def _refuse_idle_fields(self, kind: Kind) -> None:
        for field in fields(self):
            if field.name in ("kind", "options", *kind.settings):
                continue
            value = getattr(self, field.name)
            if value != field.default:
                takers = [name for name, other in KINDS.items() if field.name in other.settings]
                raise ArgumentError(
                    f"{field.name}={value!r} has no effect for kind={self.kind!r} (it applies to "
                    f"{', '.join(takers)}); leave it at {field.default!r}."
                )

    def option(self, name: str) -> Any:
        """The value of one of the kind's own options.

        Raises:
            ArgumentError: the kind has no such option.
        """
        return find_option(self.options, name, f"kind={self.kind!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)
