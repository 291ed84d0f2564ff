"""Kind "procrustes": PCA of both sides, one rotation and one scale between them."""

from __future__ import annotations

import torch

from .moment_kind import MomentKind, Problem, Solution


def fit_rotation(problem: Problem) -> Solution:
    """One rotation and one scale between the leading principal components of both sides
    (Schönemann 1966)."""
    pair, axes = problem.paired, problem.paired.target_axes
    assert axes is not None
    k = min(problem.rank, axes.shape[1])
    q = axes[:, :k]
    left, sigma, right = torch.linalg.svd(q.T @ pair.cross[:, :k])
    scale = sigma.sum() / problem.expert.values[:k].sum()
    rotation = q @ left @ right
    return scale * rotation, rotation.T / scale


PROCRUSTES = MomentKind(
    settings=("n_components", "standardise", "n_folds"),
    largest_rank=min,
    needs_target_axes=True,
    solve=fit_rotation,
)
