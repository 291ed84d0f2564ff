"""How much each expert layer and each target layer say about each other, over the same texts.

States of distinct prompts are deterministic functions of the prompt, so the mutual information of
the states themselves is the entropy of the prompt set, whatever the layers. What is measured here
is a **geometry score in nats**: the mutual information of the joint Gaussian (or, for "ksg", of a
smooth density) with the observed co-variation of a few principal components. It ranks layer pairs
by how linearly predictable one is from the other; it does not say that a pair steers. The paper
(arXiv 2505.12313) chooses pairs of lowest mutual information and does not publish its estimator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from expertsteer_lens._checks import check_matrix, check_paired
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.linalg.clipping import clip_massive

from .estimators import (
    KSG,
    CrossFittedCCA,
    DebiasedCKA,
    Estimator,
    GaussianMI,
    parallel_map,
    principal_scores,
)
from .result import (
    DEFAULT_COMPONENTS,
    DEFAULT_FOLDS,
    DEFAULT_NEIGHBORS,
    DEFAULT_SHRINKAGE,
    LayerPairMI,
    MIConfig,
)

__all__ = ["LayerPairMI", "MIConfig", "layer_pair_mi"]

_DEFAULT = MIConfig()


def layer_pair_mi(
    expert_states: Sequence[Tensor] | Mapping[str, Tensor],
    target_states: Sequence[Tensor] | Mapping[str, Tensor],
    config: MIConfig = _DEFAULT,
    *,
    seed: int = 0,
    progress: bool = False,
) -> LayerPairMI:
    """Score every (expert layer, target layer) pair on the same texts; see the module for what the
    score means.

    Each layer alone: clip, standardise, PCA, whiten, on all rows (marginal steps, blind to the
    other model, and unchanged by a permutation of rows). Everything that looks at both models is
    fitted and scored by the estimator. For "cca" directions come from the training folds and
    correlations from the held-out fold; PCA and marginal steps in float64 (Gram matrices in the
    input's dtype), the null in float32. Cost O(L n^2 d) for the layers; per permutation one matrix
    product (L_E k x n)(n x L_T k) and L_E L_T n_folds eigenproblems of size k.

    Args:
        expert_states: `[n, d]` per layer: a list, or a mapping by hook name (`ActivationStore`).
        target_states: the same for the target, rows paired with the expert's. Widths may differ
            everywhere.
        config: estimator and settings.
        seed: draws folds, permutations and bootstrap weights.
        progress: show a bar over permutations.

    Raises:
        DataError: NaN or Inf (naming the hook and row), unpaired or too few rows, a constant layer.
        ArgumentError: more components than a layer has.
    """
    sides = {"expert": _named("expert", expert_states), "target": _named("target", target_states)}
    labels = {
        f"{role}_states[{name!r}]": rows
        for role, side in sides.items()
        for name, rows in side.items()
    }
    first_label, first = next(iter(labels.items()))
    for label, rows in labels.items():
        check_matrix(label, rows)
        check_paired(first, rows, first_label, label)
    n = first.shape[0]
    _check_samples(n, config)
    folds, orders, weights = _draws(n, config, seed, first.device)
    jobs = [(role, name, rows) for role, side in sides.items() for name, rows in side.items()]
    with parallel_map(first.device) as run:
        layers = list(run(lambda job: _prepare(job[0], job[1], job[2], config), jobs))
        estimator, k = _build(layers, len(sides["expert"]), config, folds)
        matrix, draws = next(iter(run(lambda e: (e.observed(), e.bootstrap(weights)), [estimator])))
        null = list(
            tqdm(
                run(estimator.permuted, orders),
                f"null ({config.estimator})",
                len(orders),
                disable=not progress,
            )
        )
    clipped: dict[str, dict[str, Any]] = {"expert": {}, "target": {}}
    for (role, name, _), layer in zip(jobs, layers, strict=True):
        if layer.clipped:
            clipped[role][name] = layer.clipped
    return LayerPairMI(
        matrix=matrix,
        interval=_interval(matrix, draws, config),
        null=torch.stack(null) if null else matrix.new_zeros((0, *matrix.shape)),
        expert_hook_names=tuple(sides["expert"]),
        target_hook_names=tuple(sides["target"]),
        n_samples=n,
        n_components=k,
        clipped=clipped,
        config=config,
        seed=seed,
    )


def _named(role: str, states: Sequence[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """States by hook name; a list gets names that carry the index as the layer."""
    if isinstance(states, Mapping):
        named = {name: states[name] for name in states}
    else:
        named = {f"{role}.{i}.states": rows for i, rows in enumerate(states)}
    if not named:
        raise DataError(f"{role}_states is empty; give at least one layer.")
    return named


def _draws(
    n: int, config: MIConfig, seed: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Folds, permutations and bootstrap weights, each from its own stream: how many of one never
    moves another."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator).to(device)
    streams = [
        torch.Generator().manual_seed(int(s))
        for s in torch.randint(2**62, (2,), generator=generator)
    ]
    orders = [
        torch.randperm(n, generator=streams[0]).to(device) for _ in range(config.n_permutations)
    ]
    drawn = torch.randint(n, (config.n_bootstrap, n), generator=streams[1])
    weights = torch.stack([torch.bincount(row, minlength=n) for row in drawn]).to(
        device=device, dtype=torch.float64
    )
    return list(order.tensor_split(config.n_folds or DEFAULT_FOLDS)), orders, weights


def _check_samples(n: int, config: MIConfig) -> None:
    if config.estimator == "cca":
        folds = config.n_folds or DEFAULT_FOLDS
        if n < 2 * folds:
            raise DataError(
                f"mutual information with n_folds={folds} needs at least {2 * folds} samples, got "
                f"{n}."
            )
    elif config.estimator == "ksg":
        neighbors = config.n_neighbors or DEFAULT_NEIGHBORS
        if n <= neighbors:
            raise DataError(
                f"mutual information with n_neighbors={neighbors} needs more than {neighbors} "
                f"samples, got {n}."
            )
    elif config.estimator == "gaussian":
        k = config.n_components or 1
        if n <= 2 * k + 1:
            raise DataError(
                f"mutual information with n_components={k} needs more than {2 * k + 1} samples, "
                f"got {n}."
            )
    elif n < 4:
        raise DataError(f"debiased CKA needs at least 4 samples, got {n}.")


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer ready for an estimator."""

    label: str
    features: Tensor
    """`[n, d]` clipped, centred, standardised ("cka"), else `[n, k]` whitened principal
    components."""
    variances: Tensor
    rank: int
    clipped: dict[str, Any]


def _prepare(role: str, name: str, rows: Tensor, config: MIConfig) -> _Layer:
    """Clip, centre, standardise and (but for "cka") whiten one layer, float64 for float64 input and
    float32 otherwise."""
    x = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    clipped: dict[str, Any] = {}
    if config.clip is not None:
        found = clip_massive(x, config.clip)
        clipped = dict(found.summary()) if found.coordinates else {}
        x = found.rows
    x = x - x.mean(0)
    scale = x.square().mean(0).sqrt()
    label = f"{role}_states[{name!r}]"
    if not float(scale.max()) > 0.0:
        raise DataError(f"{label} is the same in every row; look at the texts and positions.")
    if config.standardise:
        x = x / torch.where(scale > 0, scale, torch.ones_like(scale))
    if config.estimator == "cka":
        return _Layer(label, x, scale, x.shape[1], clipped)
    asked = config.n_components
    found_pca = principal_scores(
        x, _default_components(x.shape[0], config) if asked is None else asked
    )
    if asked is not None and found_pca.rank < asked:
        raise ArgumentError(
            f"n_components={asked} exceeds the rank {found_pca.rank} of {label} ({x.shape[0]} "
            f"rows, width {x.shape[1]}); lower it."
        )
    return _Layer(label, found_pca.scores, found_pca.variances, found_pca.rank, clipped)


def _default_components(n: int, config: MIConfig) -> int:
    return min(DEFAULT_COMPONENTS[config.estimator], max(1, n // 4))


def _build(
    layers: list[_Layer], n_expert: int, config: MIConfig, folds: Sequence[Tensor]
) -> tuple[Estimator, int | None]:
    """The estimator asked for, on its features, and the number of components used."""
    if config.estimator == "cka":
        features = [layer.features for layer in layers]
        return DebiasedCKA(features[:n_expert], features[n_expert:]), None
    k = min(layer.features.shape[1] for layer in layers)
    scores = [layer.features[:, :k] for layer in layers]
    if config.estimator == "gaussian":
        return GaussianMI(scores[:n_expert], scores[n_expert:]), k
    if config.estimator == "ksg":
        return KSG(scores[:n_expert], scores[n_expert:], config.n_neighbors or DEFAULT_NEIGHBORS), k
    share = DEFAULT_SHRINKAGE if config.shrinkage is None else config.shrinkage
    shrunk = [
        s * _shrink(layer.variances[:k], share) for s, layer in zip(scores, layers, strict=True)
    ]
    return CrossFittedCCA(shrunk[:n_expert], shrunk[n_expert:], folds), k


def _shrink(variances: Tensor, share: float) -> Tensor:
    """What multiplies unit-variance scores when whitening with `(1 - share) * variance + share *
    mean variance`."""
    return (variances / ((1.0 - share) * variances + share * variances.mean())).sqrt()


def _interval(matrix: Tensor, draws: Tensor, config: MIConfig) -> Tensor:
    """Estimate plus the quantiles of the centred draws (their own upward bias removed); "cca" stays
    at or above 0."""
    tail = torch.tensor(
        [(1.0 - config.confidence) / 2.0, (1.0 + config.confidence) / 2.0], dtype=draws.dtype
    )
    bounds = matrix + torch.quantile(draws - draws.mean(0), tail.to(draws.device), dim=0)
    if config.estimator == "cca":
        bounds = bounds.clamp(min=0.0)
    return torch.movedim(bounds, 0, -1)
