"""How much each expert layer and each target layer say about each other, over the same texts.

States of distinct prompts are deterministic functions of the prompt, so the mutual information of the states themselves is
the entropy of the prompt set, whatever the layers. What is measured here is a **geometry score in nats**: the mutual
information of the joint Gaussian (or, for "ksg", of a smooth density) with the observed co-variation of a few principal
components. It ranks layer pairs by how linearly predictable one is from the other; it does not say that a pair steers.
The paper (arXiv 2505.12313) chooses pairs of lowest mutual information and does not publish its estimator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ._checks import check_matrix
from .errors import ArgumentError, DataError
from .mi_estimators import KSG, CrossFittedCCA, DebiasedCKA, Estimator, GaussianMI, principal_scores
from .mi_result import (
    DEFAULT_COMPONENTS,
    DEFAULT_FOLDS,
    DEFAULT_NEIGHBORS,
    DEFAULT_SHRINKAGE,
    LayerPairMI,
    MIConfig,
)
from .moments import check_paired, clip_massive

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
    """Score every (expert layer, target layer) pair on the same texts; see the module for what the score means.

    Each layer alone: clip, standardise, PCA, whiten, on all rows (marginal steps, blind to the other model, and unchanged by a
    permutation of rows). Everything that looks at both models is fitted and scored by the estimator. For "cca" directions
    come from the training folds and correlations from the held-out fold; PCA and marginal steps in float64 (Gram matrices
    in the input's dtype), the null in float32. Cost O(L n^2 d) for the layers; per permutation one matrix product
    (L_E k x n)(n x L_T k) and L_E L_T n_folds eigenproblems of size k.

    Args:
        expert_states: `[n, d]` per layer: a list, or a mapping by hook name (`ActivationStore`).
        target_states: the same for the target, rows paired with the expert's. Widths may differ everywhere.
        config: estimator and settings.
        seed: draws folds, permutations and bootstrap weights.
        progress: show a bar over permutations.

    Raises:
        DataError: NaN or Inf (naming the hook and row), unpaired or too few rows, a constant layer.
        ArgumentError: more components than a layer has.
    """
    sides = {"expert": _named("expert", expert_states), "target": _named("target", target_states)}
    labels = {f"{role}_states[{name!r}]": rows for role, side in sides.items() for name, rows in side.items()}
    first_label, first = next(iter(labels.items()))
    for label, rows in labels.items():
        check_matrix(label, rows)
        check_paired(first, rows, first_label, label)
    n = first.shape[0]
    _check_samples(n, config)
    generator = torch.Generator().manual_seed(seed)
    clipped: dict[str, dict[str, Any]] = {"expert": {}, "target": {}}
    features = {
        role: [_features(role, name, rows, config, clipped) for name, rows in side.items()]
        for role, side in sides.items()
    }
    estimator, k = _build(features["expert"], features["target"], list(labels), config, generator)
    matrix = estimator.observed()
    orders = [torch.randperm(n, generator=generator).to(first.device) for _ in range(config.n_permutations)]
    null = [estimator.permuted(o) for o in tqdm(orders, desc=f"null ({config.estimator})", disable=not progress)]
    drawn = torch.multinomial(torch.ones(config.n_bootstrap, n), n, replacement=True, generator=generator)
    weights = torch.zeros(config.n_bootstrap, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape).double()
    )
    return LayerPairMI(
        matrix=matrix,
        interval=_interval(matrix, estimator.bootstrap(weights.to(first.device)), config),
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


def _check_samples(n: int, config: MIConfig) -> None:
    if config.estimator == "cca":
        folds = config.n_folds or DEFAULT_FOLDS
        if n < 2 * folds:
            raise DataError(f"mutual information with n_folds={folds} needs at least {2 * folds} samples, got {n}.")
    elif config.estimator == "ksg":
        neighbors = config.n_neighbors or DEFAULT_NEIGHBORS
        if n <= neighbors:
            raise DataError(
                f"mutual information with n_neighbors={neighbors} needs more than {neighbors} samples, got {n}."
            )
    elif config.estimator == "gaussian":
        k = config.n_components or 1
        if n <= 2 * k + 1:
            raise DataError(f"mutual information with n_components={k} needs more than {2 * k + 1} samples, got {n}.")
    elif n < 4:
        raise DataError(f"debiased CKA needs at least 4 samples, got {n}.")


def _features(role: str, name: str, rows: Tensor, config: MIConfig, clipped: dict[str, dict[str, Any]]) -> Tensor:
    """Clip, centre and standardise one layer, `[n, d]`, in float64 for float64 input and float32 otherwise."""
    x = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    if config.clip is not None:
        found = clip_massive(x, config.clip)
        if int(found.n_clipped.sum()):
            clipped[role][name] = found.summary()
        x = found.rows
    x = x - x.mean(0)
    scale = x.square().mean(0).sqrt()
    if not float(scale.max()) > 0.0:
        raise DataError(f"{role}_states[{name!r}] is the same in every row; look at the texts and positions.")
    if config.standardise:
        x = x / torch.where(scale > 0, scale, torch.ones_like(scale))
    return x


def _build(
    expert: list[Tensor], target: list[Tensor], labels: list[str], config: MIConfig, generator: torch.Generator
) -> tuple[Estimator, int | None]:
    """The estimator asked for, on its features, and the number of components used."""
    if config.estimator == "cka":
        return DebiasedCKA(expert, target), None
    n = expert[0].shape[0]
    asked = config.n_components
    k = min(DEFAULT_COMPONENTS[config.estimator], max(1, n // 4)) if asked is None else asked
    layers = [principal_scores(x, k) for x in (*expert, *target)]
    for label, x, layer in zip(labels, (*expert, *target), layers, strict=True):
        if asked is not None and layer.rank < asked:
            raise ArgumentError(
                f"n_components={asked} exceeds the rank {layer.rank} of {label} ({n} rows, width {x.shape[1]}); lower it."
            )
    k = min(k, *(layer.rank for layer in layers))
    scores = [layer.scores[:, :k] for layer in layers]
    left, right = scores[: len(expert)], scores[len(expert) :]
    if config.estimator == "gaussian":
        return GaussianMI(left, right), k
    if config.estimator == "ksg":
        return KSG(left, right, config.n_neighbors or DEFAULT_NEIGHBORS), k
    share = DEFAULT_SHRINKAGE if config.shrinkage is None else config.shrinkage
    shrunk = [s * _shrink(layer.variances[:k], share) for s, layer in zip(scores, layers, strict=True)]
    folds = torch.randperm(n, generator=generator).to(expert[0].device).tensor_split(config.n_folds or DEFAULT_FOLDS)
    return CrossFittedCCA(shrunk[: len(expert)], shrunk[len(expert) :], folds), k


def _shrink(variances: Tensor, share: float) -> Tensor:
    """What multiplies unit-variance scores when whitening with `(1 - share) * variance + share * mean variance`."""
    return (variances / ((1.0 - share) * variances + share * variances.mean())).sqrt()


def _interval(matrix: Tensor, draws: Tensor, config: MIConfig) -> Tensor:
    """Estimate plus the quantiles of the centred draws (their own upward bias removed); "cca" stays at or above 0."""
    tail = torch.tensor([(1.0 - config.confidence) / 2.0, (1.0 + config.confidence) / 2.0], dtype=draws.dtype)
    bounds = matrix + torch.quantile(draws - draws.mean(0), tail.to(draws.device), dim=0)
    if config.estimator == "cca":
        bounds = bounds.clamp(min=0.0)
    return torch.movedim(bounds, 0, -1)
