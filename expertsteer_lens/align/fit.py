"""Fit maps from the expert's residual stream to the target's on anchor texts run through both
models.

The paper (arXiv 2505.12313) trains one reconstruction-only auto-encoder per expert layer:
`kind="autoencoder"`. Its loss is blind to the target, so the basis in which expert states arrive is
arbitrary. The other kinds are ours and tie the map to the target's states of the same texts. Every
kind is one file, and they all stand in the table of `kinds.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from expertsteer_lens._checks import check_matrix, check_number, check_paired, unknown_hook
from expertsteer_lens._progress import progress_bar
from expertsteer_lens.errors import ArgumentError, DataError, WidthError

from .aligner import Aligner
from .config import AlignerConfig
from .folds import check_groups, draw_folds
from .kind import FitContext
from .kinds import KINDS

DEFAULT_CONFIG = AlignerConfig()


def fit_aligner(
    expert: Float[Tensor, "n d_expert"],
    target: Float[Tensor, "n d_target"] | None = None,
    config: AlignerConfig = DEFAULT_CONFIG,
    *,
    seed: int = 0,
    d_target: int | None = None,
    groups: Int[Tensor, " n"] | None = None,
) -> Aligner:
    """Fit the map from expert states to target states of the same texts, row by row.

    With covariances C (divisor n) about the means m, all in float64; the formula of each kind is in
    its file (`align/ridge.py`, ...). Cost of the built-in kinds O(n min(n, d) (d_expert +
    d_target)) plus eigendecompositions of size min(n, d); nothing d x d when n < d.

    Args:
        expert: anchor states of the expert, `[n, d_expert]`.
        target: states of the target for the same texts in the same order. None for "autoencoder"
            only, which ignores it.
        config: kind and settings.
        seed: draws the folds, and the gauge (or initial weights) of "autoencoder".
        d_target: width of the target where `target` is None.
        groups: one integer per row, the text it comes from, numbered 0, 1, 2, ...; rows of one
            group are never on both sides of a fold. For states of several tokens of a text, which
            are alike: without groups the held-out R^2 would be too good. None = every row is a
            text of its own.

    Raises:
        DataError: NaN or Inf, unpaired rows, constant states, a missing target, or fewer than two
            anchors per fold.
        WidthError: "identity" with unequal widths, or `d_target` contradicting `target`.
        ArgumentError: `n_components` larger than the widths allow.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> expert = torch.randn(50, 4, generator=generator)
        >>> target = expert @ torch.randn(4, 3, generator=generator) + 1.0
        >>> aligner = fit_aligner(expert, target)
        >>> aligner
        Aligner(ridge, 4 → 3, n_anchors=50, held-out R²=1.000, FVU=0.220, effective rank=2.3, \
ridge=1e-06, seed=0)
        >>> torch.allclose(aligner.encode(expert), target, atol=1e-3)
        True
    """
    kind = KINDS[config.kind]
    width = _target_width(target, config, d_target)
    if target is not None:
        check_paired(expert, target)
    check_matrix("expert", expert)
    context = _share_context(expert, config, seed, groups)
    prepared = kind.prepare_expert("expert", expert, context)
    if target is None or not kind.uses_target:
        return kind.fit(prepared, None, width, context)
    return kind.fit(prepared, kind.prepare_target("target", target, context), width, context)


def fit_aligner_grid(
    expert: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    config: AlignerConfig = DEFAULT_CONFIG,
    *,
    seed: int = 0,
    pairs: Iterable[tuple[str, str]] | None = None,
    groups: Int[Tensor, " n"] | None = None,
    progress: bool = False,
) -> dict[tuple[str, str], Aligner]:
    """`fit_aligner` for many (expert hook, target hook) pairs, preparing every layer once; same
    numbers as one by one.

    Args:
        expert: anchor states by hook name, `[n, d_expert]` each (an `ActivationStore` or a dict).
        target: the same for the target; rows paired with the expert's.
        config: one configuration for all pairs.
        seed: as in `fit_aligner`, the same for every pair (so "autoencoder" uses one gauge for all
            layers).
        pairs: which pairs; default all, expert-major. An aligner holds about `4 * rank * (d_expert
            + d_target) * 2` bytes.
        groups: as in `fit_aligner`.
        progress: show a bar over expert layers.

    Raises:
        HookNameError: a pair names a hook that is not in the mappings.
        DataError, WidthError, ArgumentError: as `fit_aligner`, naming the hook.

    Example:
        >>> import torch
        >>> rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
        >>> list(fit_aligner_grid({"a": rows, "b": rows + 1}, {"c": 2 * rows}))
        [('a', 'c'), ('b', 'c')]
    """
    grid = AlignerGrid(target, config, seed=seed, groups=groups)
    return grid.fit(expert, pairs=pairs, progress=progress)


class AlignerGrid:
    """Aligners from any expert layer to the layers of one target, whose states are prepared once
    and kept between calls of `fit`: for grids that are fitted one expert layer at a time, so that
    not all maps are held at once.

    Args:
        target: anchor states by hook name, `[n, d_target]` each.
        config: one configuration for all pairs.
        seed: as in `fit_aligner`, the same for every pair.
        groups: as in `fit_aligner`.

    Example:
        >>> import torch
        >>> rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
        >>> grid = AlignerGrid({"c": 2 * rows})
        >>> [list(grid.fit({name: rows + shift})) for name, shift in (("a", 0), ("b", 1))]
        [[('a', 'c')], [('b', 'c')]]
    """

    def __init__(
        self,
        target: Mapping[str, Tensor],
        config: AlignerConfig = DEFAULT_CONFIG,
        *,
        seed: int = 0,
        groups: Int[Tensor, " n"] | None = None,
    ) -> None:
        self.target, self.config, self.seed, self.groups = target, config, seed, groups
        self._context: FitContext | None = None
        self._prepared: dict[str, Any] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def fit(
        self,
        expert: Mapping[str, Tensor],
        *,
        pairs: Iterable[tuple[str, str]] | None = None,
        progress: bool = False,
    ) -> dict[tuple[str, str], Aligner]:
        """The aligners of these expert layers, see `fit_aligner_grid`.

        Raises:
            HookNameError: a pair names a hook that is not in the mappings.
            DataError, WidthError, ArgumentError: as `fit_aligner`, naming the hook.
        """
        wanted = [(e, t) for e in expert for t in self.target] if pairs is None else list(pairs)
        for e, t in wanted:
            for name, states, side in ((e, expert, "expert"), (t, self.target, "target")):
                if name not in states:
                    raise unknown_hook(name, list(states), f"the {side} states")
        by_expert: dict[str, list[str]] = {}
        for e, t in wanted:
            by_expert.setdefault(e, []).append(t)
        # Each layer is asked for as seldom as can be: a store in a folder reads it then.
        for t in dict.fromkeys(t for _, t in wanted):
            if t not in self._sizes:
                n, width = self.target[t].shape
                self._sizes[t] = n, width
        for e, its_targets in by_expert.items():
            rows = expert[e]
            for t in its_targets:
                as_many = rows.new_empty(self._sizes[t][0], 0)
                check_paired(rows, as_many, f"expert[{e!r}]", f"target[{t!r}]")
            if self._context is None:
                self._context = _share_context(rows, self.config, self.seed, self.groups)
        if self._context is None:
            return {}
        kind, context = KINDS[self.config.kind], self._context
        targets = {t: self._prepare_target(t, context) for t in dict.fromkeys(t for _, t in wanted)}
        out: dict[tuple[str, str], Aligner] = {}
        bar = progress_bar(by_expert.items(), f"aligners ({self.config.kind})", progress=progress)
        for e, its_targets in bar:
            prepared = kind.prepare_expert(f"expert[{e!r}]", expert[e], context)
            by_width: dict[int, Aligner] = {}
            for t in its_targets:
                width = self._sizes[t][1]
                if kind.uses_target:
                    out[e, t] = kind.fit(prepared, targets[t], width, context)
                    continue
                # One map serves all target layers of a width.
                if width not in by_width:
                    by_width[width] = kind.fit(prepared, None, width, context)
                out[e, t] = by_width[width]
        return {pair: out[pair] for pair in wanted}

    def _prepare_target(self, hook_name: str, context: FitContext) -> Any:
        kind = KINDS[self.config.kind]
        if not kind.uses_target:
            return None
        if hook_name not in self._prepared:
            self._prepared[hook_name] = kind.prepare_target(
                f"target[{hook_name!r}]", self.target[hook_name], context
            )
        return self._prepared[hook_name]


def _share_context(
    rows: Tensor, config: AlignerConfig, seed: int, groups: Tensor | None
) -> FitContext:
    n = rows.shape[0]
    if not KINDS[config.kind].is_cross_validated:
        if groups is not None:
            check_groups(groups, n)
        return FitContext(config, seed, ())
    folds = draw_folds(n, config.n_folds, seed, groups=groups, device=rows.device)
    return FitContext(config, seed, folds)


def _target_width(target: Tensor | None, config: AlignerConfig, d_target: int | None) -> int:
    if d_target is not None:
        check_number("d_target", d_target, low=1, integer=True)
    if target is not None:
        check_matrix("target", target)
        if d_target is not None and target.shape[1] != d_target:
            raise WidthError(f"d_target={d_target}, but target has width {target.shape[1]}.")
        return target.shape[1]
    if KINDS[config.kind].uses_target:
        raise DataError(
            f"target: kind={config.kind!r} needs target states of the same texts; got None."
        )
    if d_target is None:
        raise ArgumentError(
            "d_target is needed where target is None: the width of the target's residual stream."
        )
    return d_target
