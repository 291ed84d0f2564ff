"""Kind "anchored_autoencoder": the paper's reconstruction loss plus agreement with the target."""

from __future__ import annotations

import torch

from .moment_kind import MomentKind, Problem, Solution, best_decoder


def fit_anchored(problem: Problem) -> Solution:
    """Global minimum over (W, D) of `||h - D W h||^2 / tr C_EE + anchor_weight ||W h - t||^2 / tr
    C_TT`, W of rank k.

    With S^2 = e + ridge, B = C_TE S^-1 and w = anchor_weight tr C_EE / tr C_TT, the optimal W given
    its row space P (a projector of rank k in whitened coordinates) is B P S^-1, and the objective
    is a constant minus tr(P (S^2 + w B^T B)): P is the top-k eigenspace of S^2 + w B^T B. No
    iteration. w -> 0 gives PCA, with the target deciding only the basis; w -> infinity gives
    (reduced-rank) ridge regression. If B P has rank below k (the target explains fewer axes), the
    minimum is only approached, by codes of vanishing size; B P S^-1 is then the solution without
    those."""
    expert, pair, weight = problem.expert, problem.paired, problem.config.anchor_weight
    assert weight is not None
    k = min(problem.rank, pair.cross.shape[0])
    e = expert.values + problem.ridge * expert.unit
    b = pair.cross / e.sqrt()
    if k < e.shape[0]:
        w = weight * expert.values.sum() / pair.target_variance
        vectors = torch.linalg.eigh(torch.diag(e) + w * (b.T @ b)).eigenvectors[:, -k:]
        b = (b @ vectors) @ vectors.T
    encode = b / e.sqrt()
    return encode, best_decoder(encode, expert, problem.ridge)


ANCHORED_AUTOENCODER = MomentKind(
    settings=("n_components", "ridge", "anchor_weight", "standardise", "n_folds"),
    resolve=lambda config: {"anchor_weight": 1.0},
    largest_rank=min,
    ridge_axes=lambda rank, axes: axes,
    solve=fit_anchored,
)
