"""Fit affine maps from the expert's residual stream to the target's on anchor texts run through
both models.

The paper (arXiv 2505.12313) trains one reconstruction-only auto-encoder per expert layer:
`kind="autoencoder"`. Its loss is blind to the target, so the basis in which expert states arrive is
arbitrary. The other kinds are ours and tie the map to the target's states of the same texts. All
are closed forms of second moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from expertsteer_lens._checks import check_matrix, check_number, check_paired, unknown_hook
from expertsteer_lens.errors import ArgumentError, DataError, WidthError
from expertsteer_lens.linalg.moments import Moments, RunningMoments

from . import solvers
from .aligner import KINDS, AffineMap, Aligner, AlignerConfig, AlignerQuality
from .solvers import RIDGE_PATH, ExpertSplit, PairSplit, Side

__all__ = [
    "KINDS",
    "RIDGE_PATH",
    "AffineMap",
    "Aligner",
    "AlignerConfig",
    "AlignerQuality",
    "fit_aligner",
    "fit_aligner_from_moments",
    "fit_aligner_grid",
]

_DEFAULT = AlignerConfig()


def fit_aligner(
    expert: Float[Tensor, "n d_expert"],
    target: Float[Tensor, "n d_target"] | None = None,
    config: AlignerConfig = _DEFAULT,
    *,
    seed: int = 0,
    d_target: int | None = None,
) -> Aligner:
    """Fit the map from expert states to target states of the same texts, row by row.

    With covariances C (divisor n) about the means m, all in float64: ridge `W = C_TE (C_EE + lambda
    I)^-1`, `encode(h) = W (h - m_E) + m_T`, lambda = `ridge * tr(C_EE) / d_expert`; autoencoder
    `encode(h) = R V_k^T (h - m_E)`, V_k the top eigenvectors of C_EE, R a random isometry drawn by
    `seed` (the global optimum of the paper's loss by Eckart-Young; the seed is a gauge the loss
    cannot see); procrustes and anchored_autoencoder: see `aligner_solvers`. Cost O(n min(n, d)
    (d_expert + d_target)) plus eigendecompositions of size min(n, d); nothing d x d when n < d.

    Args:
        expert: anchor states of the expert, `[n, d_expert]`.
        target: states of the target for the same texts in the same order. None for "autoencoder"
            only, which ignores it.
        config: kind and settings.
        seed: draws the folds, and the gauge (or initial weights) of "autoencoder".
        d_target: width of the target where `target` is None.

    Raises:
        DataError: NaN or Inf, unpaired rows, constant states, a missing target, or fewer than two
            anchors per fold.
        WidthError: "identity" with unequal widths, or `d_target` contradicting `target`.
        ArgumentError: `n_components` larger than the widths allow.
    """
    width = _target_width(target, config, d_target)
    if target is not None:
        check_paired(expert, target)
    if config.kind == "identity":
        return _identity(expert, target, config, seed, width)
    check_matrix("expert", expert)
    folds = _folds(expert.shape[0], config, seed, expert.device)
    prepared = _prepare(solvers.side_from_rows("expert", expert, folds, config.standardise), config)
    if target is None or config.kind == "autoencoder":
        return _fit(prepared, None, None, config, seed, width)
    side = solvers.side_from_rows("target", target, folds, config.standardise)
    return _fit(prepared, side, solvers.cross_sums(prepared.side, side), config, seed, width)


def fit_aligner_grid(
    expert: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    config: AlignerConfig = _DEFAULT,
    *,
    seed: int = 0,
    pairs: Iterable[tuple[str, str]] | None = None,
    progress: bool = False,
    decomposed: dict[str, Side] | None = None,
) -> dict[tuple[str, str], Aligner]:
    """`fit_aligner` for many (expert hook, target hook) pairs, decomposing every layer once; same
    numbers as one by one.

    Args:
        expert: anchor states by hook name, `[n, d_expert]` each (an `ActivationStore` or a dict).
        target: the same for the target; rows paired with the expert's.
        config: one configuration for all pairs.
        seed: as in `fit_aligner`, the same for every pair (so "autoencoder" uses one gauge for all
            layers).
        pairs: which pairs; default all, expert-major. An aligner holds about `4 * rank * (d_expert
            + d_target) * 2` bytes.
        progress: show a bar over expert layers.
        decomposed: a dict that keeps the target's decomposed layers, filled here and used again by
            the next call: about half the time of a grid that is fitted one expert layer at a time.
            Only for calls with the same target states, config and seed.

    Raises:
        HookNameError: a pair names a hook that is not in the mappings.
        DataError, WidthError, ArgumentError: as `fit_aligner`, naming the hook.
    """
    wanted = [(e, t) for e in expert for t in target] if pairs is None else list(pairs)
    for e, t in wanted:
        for name, states, side in ((e, expert, "expert"), (t, target, "target")):
            if name not in states:
                raise unknown_hook(name, list(states), f"the {side} states")
        check_paired(expert[e], target[t], f"expert[{e!r}]", f"target[{t!r}]")
    if config.kind == "identity":
        return {(e, t): fit_aligner(expert[e], target[t], config, seed=seed) for e, t in wanted}
    if not wanted:
        return {}
    first = expert[wanted[0][0]]
    folds = _folds(first.shape[0], config, seed, first.device)
    blind = config.kind == "autoencoder"
    sides = {} if decomposed is None else decomposed
    for t in () if blind else dict.fromkeys(t for _, t in wanted):
        if t not in sides:
            sides[t] = _side("target", t, target[t], folds, config)
    out: dict[tuple[str, str], Aligner] = {}
    for e in tqdm(
        dict.fromkeys(e for e, _ in wanted), desc=f"aligners ({config.kind})", disable=not progress
    ):
        prepared = _prepare(_side("expert", e, expert[e], folds, config), config)
        by_width: dict[int, Aligner] = {}
        for t in (t for e2, t in wanted if e2 == e):
            width = target[t].shape[1]
            if not blind:
                cross = solvers.cross_sums(prepared.side, sides[t])
                out[e, t] = _fit(prepared, sides[t], cross, config, seed, width)
                continue
            if width not in by_width:
                by_width[width] = _fit(prepared, None, None, config, seed, width)
            out[e, t] = by_width[width]
    return {pair: out[pair] for pair in wanted}


def fit_aligner_from_moments(
    folds: Sequence[Moments | RunningMoments],
    config: AlignerConfig = _DEFAULT,
    *,
    seed: int = 0,
    d_target: int | None = None,
) -> Aligner:
    """`fit_aligner` from streamed moments, one per fold, so that anchors are never held at once.

    Send each batch of anchors to one of `config.n_folds` `RunningMoments` (for instance in turn);
    the folds of the cross-validation are then these. Costs O((d_expert + d_target)^2) memory per
    fold.

    Raises:
        ArgumentError: not `config.n_folds` parts, or kind "identity" (which needs no moments).
        DataError, WidthError: empty or unequal parts, a missing target, constant states.
    """
    if config.kind == "identity":
        raise ArgumentError(
            "kind='identity' fits nothing; use fit_aligner on a few paired rows to measure it."
        )
    if len(folds) != config.n_folds:
        raise ArgumentError(
            f"folds must hold config.n_folds={config.n_folds} moments, got {len(folds)}."
        )
    parts = [f.result() if isinstance(f, RunningMoments) else f for f in folds]
    if len({(p.d_expert, p.d_target) for p in parts}) > 1:
        raise WidthError(
            "folds must share widths, got "
            f"{sorted({(p.d_expert, p.d_target) for p in parts}, key=str)}."
        )
    _check_count(sum(p.n for p in parts), config)
    if parts[0].d_target is None and config.kind != "autoencoder":
        raise DataError(
            f"target: kind={config.kind!r} needs target states; these moments have none."
        )
    width = d_target if parts[0].d_target is None else parts[0].d_target
    if width is None:
        raise ArgumentError("d_target is needed where the moments have no target.")
    expert, target, cross = solvers.sides_from_moments(parts, config.standardise)
    if config.kind == "autoencoder":
        target = cross = None
    return _fit(_prepare(expert, config), target, cross, config, seed, width)


def _target_width(target: Tensor | None, config: AlignerConfig, d_target: int | None) -> int:
    if d_target is not None:
        check_number("d_target", d_target, low=1, integer=True)
    if target is not None:
        check_matrix("target", target)
        if d_target is not None and target.shape[1] != d_target:
            raise WidthError(f"d_target={d_target}, but target has width {target.shape[1]}.")
        return target.shape[1]
    if config.kind != "autoencoder":
        raise DataError(
            f"target: kind={config.kind!r} needs target states of the same texts; got None."
        )
    if d_target is None:
        raise ArgumentError(
            "d_target is needed where target is None: the width of the target's residual stream."
        )
    return d_target


def _check_count(n: int, config: AlignerConfig) -> None:
    if n < 2 * config.n_folds:
        raise DataError(
            f"an aligner with n_folds={config.n_folds} needs at least {2 * config.n_folds} anchors "
            f"(two a fold), got {n}; "
            "add anchors or lower n_folds."
        )


def _folds(n: int, config: AlignerConfig, seed: int, device: torch.device) -> list[Tensor]:
    _check_count(n, config)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)
    return list(order.tensor_split(config.n_folds))


def _side(
    role: str, hook_name: str, rows: Tensor, folds: list[Tensor], config: AlignerConfig
) -> Side:
    name = f"{role}[{hook_name!r}]"
    check_matrix(name, rows)
    if rows.shape[0] != sum(f.shape[0] for f in folds):
        raise DataError(
            f"{name} has {rows.shape[0]} rows, the others have {sum(f.shape[0] for f in folds)}."
        )
    return solvers.side_from_rows(name, rows, folds, config.standardise)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """One expert layer, diagonalised on every training set: shared among all target layers."""

    side: Side
    folds: list[ExpertSplit]
    full: ExpertSplit
    axes: Tensor
    """`[d, r]` principal axes of all anchors in the (scaled) original coordinates."""


def _prepare(side: Side, config: AlignerConfig) -> _Prepared:
    folds = [solvers.expert_split(side, i) for i in range(config.n_folds)]
    full = solvers.expert_split(side, None)
    return _Prepared(side, folds, full, side.basis @ full.vectors)


def _rank(config: AlignerConfig, d_expert: int, d_target: int) -> int:
    limit = d_expert if config.kind == "ridge" else min(d_expert, d_target)
    if config.n_components is not None and config.n_components > limit:
        raise ArgumentError(
            f"n_components={config.n_components} exceeds {limit}, the largest rank of "
            f"kind={config.kind!r} between "
            f"d_expert={d_expert} and d_target={d_target}."
        )
    return limit if config.n_components is None else config.n_components


def _fit(
    expert: _Prepared,
    target: Side | None,
    cross: Tensor | None,
    config: AlignerConfig,
    seed: int,
    d_target: int,
) -> Aligner:
    """Cross-validate, refit on all anchors, and express the map in the original coordinates."""
    k = _rank(config, expert.side.d, d_target)
    pairs: list[PairSplit] = []
    full: PairSplit | ExpertSplit = expert.full
    if target is not None and cross is not None:
        pairs = [
            solvers.pair_split(s, expert.side, target, cross, i) for i, s in enumerate(expert.folds)
        ]
        full = solvers.pair_split(expert.full, expert.side, target, cross, None)
    ridge, fold_ridges, path = _choose_ridge(pairs, config, k)
    splits: Sequence[PairSplit | ExpertSplit] = pairs or expert.folds
    solved = [
        _solve(s, expert.side, config, r, k, seed, d_target)
        for s, r in zip(splits, fold_ridges, strict=True)
    ]
    lost = sum(
        solvers.reconstruction_error(w, d, s)
        for (w, d), s in zip(solved, expert.folds, strict=True)
    )
    missed = sum(solvers.encode_error(w, p) for (w, _), p in zip(solved, pairs, strict=False))
    w, d = _solve(full, expert.side, config, ridge, k, seed, d_target)
    quality = AlignerQuality(
        n_anchors=int(expert.side.counts.sum()),
        r2=float(1.0 - missed / sum(p.held_target for p in pairs)) if pairs else None,
        reconstruction_fvu=float(lost / sum(s.held_trace for s in expert.folds)),
        effective_rank=solvers.effective_rank(w, expert.full),
        n_components=int(min(w.shape[1], k)),
        ridge=ridge if config.kind in ("ridge", "anchored_autoencoder") else None,
        ridge_path=path,
    )
    return _express(w, d, expert, target, quality, config, seed, d_target)


def _choose_ridge(
    pairs: list[PairSplit], config: AlignerConfig, k: int
) -> tuple[float, list[float], tuple[tuple[float, float], ...] | None]:
    """The ridge of the final fit, the ridge of each fold (chosen on the other folds), and the path.

    A fold's own errors take no part in the choice of the ridge it is scored with, so the R^2
    reported is out of fold in the ridge too."""
    if config.kind not in ("ridge", "anchored_autoencoder"):
        return 0.0, [0.0] * config.n_folds, None
    if config.ridge is not None:
        return float(config.ridge), [float(config.ridge)] * config.n_folds, None
    k = k if config.kind == "ridge" else pairs[0].expert.values.shape[0]
    path = torch.tensor(RIDGE_PATH, dtype=torch.float64, device=pairs[0].cross.device)
    errors = torch.stack([solvers.ridge_path_errors(p, path, k) for p in pairs])
    others = errors.sum(0) - errors
    r2 = 1.0 - errors.sum(0) / torch.stack([p.held_target for p in pairs]).sum()
    chosen = [RIDGE_PATH[int(i)] for i in others.argmin(dim=1)]
    return (
        RIDGE_PATH[int(errors.sum(0).argmin())],
        chosen,
        tuple(zip(RIDGE_PATH, r2.tolist(), strict=True)),
    )


def _solve(
    split: PairSplit | ExpertSplit,
    side: Side,
    config: AlignerConfig,
    ridge: float,
    k: int,
    seed: int,
    d_target: int,
) -> tuple[Tensor, Tensor]:
    """Encode `[r_target, k]` and decode `[k, r_target]` in the expert's eigenvectors of one
    training set."""
    if isinstance(split, ExpertSplit):
        generator = torch.Generator().manual_seed(seed)
        k = min(k, split.values.shape[0])
        if config.solver == "adam":
            steps, rate = config.n_steps or 2000, config.learning_rate or 0.01
            return solvers.train_autoencoder(split, side.basis, d_target, k, steps, rate, generator)
        gauge = solvers.random_isometry(d_target, k, generator, side.basis) * solvers.signs(
            side.basis @ split.vectors[:, :k]
        )
        return gauge, gauge.T
    if config.kind == "procrustes":
        return solvers.solve_procrustes(split, k)
    k = min(k, split.expert.values.shape[0])
    if config.kind == "ridge":
        return solvers.solve_ridge(split, ridge, k)
    return solvers.solve_anchored(
        split, ridge, min(k, split.cross.shape[0]), config.anchor_weight or 1.0
    )


def _express(
    w: Tensor,
    d: Tensor,
    expert: _Prepared,
    target: Side | None,
    quality: AlignerQuality,
    config: AlignerConfig,
    seed: int,
    d_target: int,
) -> Aligner:
    """Undo eigenvectors, row space and scaling; keep two thin factors where they are smaller than
    the matrix."""
    e, k = expert.side, w.shape[1]
    axes = expert.axes[:, :k]
    right, back = axes.T / e.scale, e.scale[:, None] * axes
    if target is None:
        left, forth, mean = w, d, torch.zeros(d_target, dtype=w.dtype, device=w.device)
    else:
        left = target.scale[:, None] * (target.basis @ w)
        forth, mean = d @ (target.basis.T / target.scale), target.mean
    thin = k * (e.d + d_target) < e.d * d_target
    encoder = AffineMap((left, right) if thin else (left @ right,), mean - left @ (right @ e.mean))
    decoder = AffineMap((back, forth) if thin else (back @ forth,), e.mean - back @ (forth @ mean))
    return Aligner(encoder, decoder, quality, config, seed)


def _identity(
    expert: Tensor, target: Tensor | None, config: AlignerConfig, seed: int, width: int
) -> Aligner:
    check_matrix("expert", expert, min_rows=2)
    if target is None or expert.shape[1] != width:
        raise WidthError(
            f"aligner kind='identity' maps d_expert={expert.shape[1]} to d_target={width}, which "
            "must be equal; "
            "use 'ridge' or another kind."
        )
    e, t = expert.detach().double(), target.detach().double()
    centred = e - e.mean(0)
    gram = centred @ centred.T if e.shape[0] < width else centred.T @ centred
    quality = AlignerQuality(
        n_anchors=e.shape[0],
        r2=float(1.0 - (t - e).square().sum() / (t - t.mean(0)).square().sum()),
        reconstruction_fvu=0.0,
        effective_rank=float(gram.diagonal().sum() ** 2 / gram.square().sum()),
        n_components=width,
    )
    zero = torch.zeros(width, device=expert.device)
    return Aligner(AffineMap((), zero), AffineMap((), zero), quality, config, seed)
