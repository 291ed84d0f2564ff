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
from typing import Any

import torch
from torch import Tensor

from expertsteer_lens._checks import check_matrix, check_paired
from expertsteer_lens._progress import progress_bar
from expertsteer_lens.errors import DataError

from .config import MIConfig
from .estimators import find_estimator
from .parallel import parallel_map
from .preparation import prepare_layer
from .resampling import check_groups, draw_resamples
from .result import LayerPairMI

__all__ = ["LayerPairMI", "MIConfig", "layer_pair_mi"]

_DEFAULT = MIConfig()


def layer_pair_mi(
    expert_states: Sequence[Tensor] | Mapping[str, Tensor],
    target_states: Sequence[Tensor] | Mapping[str, Tensor],
    config: MIConfig = _DEFAULT,
    *,
    groups: Tensor | Sequence[int] | None = None,
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
        groups: integer per row, `[n]`: the text that a token's state comes from. Rows of one group
            stay in one fold, and null and interval exchange and redraw whole groups, since tokens
            of one text are no independent evidence (see `resampling`). Keep the rows of a group in
            the order of its tokens. The estimate itself is not corrected for it: compare it with
            its null. None: every row is independent of the others.
        seed: draws folds, permutations and bootstrap weights.
        progress: show a bar over permutations.

    Raises:
        DataError: NaN or Inf (naming the hook and row), unpaired or too few rows, a constant layer,
            unusable groups.
        ArgumentError: more components than a layer has.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(200, 4, generator=generator)
        >>> noise = torch.randn(200, 6, generator=generator)
        >>> got = layer_pair_mi([x], [2 * x, noise], MIConfig(n_permutations=20))
        >>> got.matrix.shape, got.unit
        (torch.Size([1, 2]), 'nats')
        >>> got.argmax()
        ('expert.0.states', 'target.0.states')
        >>> bool(got.p_values[0, 0] < 0.05 < got.p_values[0, 1])
        True
    """
    sides = {"expert": _named("expert", expert_states), "target": _named("target", target_states)}
    jobs = [
        (role, name, f"{role}_states[{name!r}]") for role, side in sides.items() for name in side
    ]
    # Layer by layer: states in a folder are never all in memory.
    first_label, first = jobs[0][2], sides["expert"][jobs[0][1]]
    for role, name, label in jobs:
        rows = sides[role][name]
        check_matrix(label, rows)
        check_paired(first, rows, first_label, label)
    n = first.shape[0]
    estimator = find_estimator(config.estimator)
    estimator.check_rows(n, config)
    drawn = draw_resamples(check_groups(groups, n, config), config, seed, first.device)
    default_k = estimator.defaults.get("n_components")
    with parallel_map(first.device) as run:
        layers = list(
            run(lambda job: prepare_layer(job[2], sides[job[0]][job[1]], config, default_k), jobs)
        )
        k, features = None, layers
        if default_k is not None:
            k = min(layer.features.shape[1] for layer in layers)
            features = [layer.leading(k) for layer in layers]
        n_expert = len(sides["expert"])
        statistic = estimator(features[:n_expert], features[n_expert:], config, drawn.folds)
        matrix, draws = next(
            iter(run(lambda s: (s.observed(), s.bootstrap(drawn.weights)), [statistic]))
        )
        null = list(
            progress_bar(
                run(statistic.permuted, drawn.orders),
                f"null ({config.estimator})",
                total=len(drawn.orders),
                progress=progress,
                unit="permutation",
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
        n_groups=None if groups is None else len(torch.unique(torch.as_tensor(groups))),
    )


def _named(role: str, states: Sequence[Tensor] | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """States by hook name; a list gets names that carry the index as the layer."""
    named = states
    if not isinstance(named, Mapping):
        named = {f"{role}.{i}.states": rows for i, rows in enumerate(named)}
    if not named:
        raise DataError(f"{role}_states is empty; give at least one layer.")
    return named


def _interval(matrix: Tensor, draws: Tensor, config: MIConfig) -> Tensor:
    """Estimate plus the quantiles of the centred draws (their own upward bias removed), `[L_E, L_T,
    2]`; not below what the estimator can read."""
    tail = torch.tensor(
        [(1.0 - config.confidence) / 2.0, (1.0 + config.confidence) / 2.0], dtype=draws.dtype
    )
    bounds = matrix + torch.quantile(draws - draws.mean(0), tail.to(draws.device), dim=0)
    lowest = find_estimator(config.estimator).lowest
    if lowest is not None:
        bounds = bounds.clamp(min=lowest)
    return torch.movedim(bounds, 0, -1)
