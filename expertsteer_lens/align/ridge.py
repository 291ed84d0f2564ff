"""Kind "ridge": regression of the target's states on the expert's.

`W = C_TE (C_EE + lambda I)^-1`, `encode(h) = W (h - m_E) + m_T`, lambda = `ridge * tr(C_EE) /
d_expert`; with `n_components` on that many principal components of the expert."""

from __future__ import annotations

from .moment_kind import MomentKind, Problem, Solution, best_decoder


def fit_ridge_map(problem: Problem) -> Solution:
    """Principal-component ridge regression of the target on the expert, and the decoder that suits
    it."""
    k, expert = problem.rank, problem.expert
    w = problem.paired.cross[:, :k] / (expert.values[:k] + problem.ridge * expert.unit)
    return w, best_decoder(w, expert, problem.ridge)


RIDGE = MomentKind(
    settings=("n_components", "ridge", "standardise", "n_folds"),
    largest_rank=lambda d_expert, d_target: d_expert,
    ridge_axes=lambda rank, axes: rank,
    solve=fit_ridge_map,
)
