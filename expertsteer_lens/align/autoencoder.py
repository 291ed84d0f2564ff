"""Kind "autoencoder": reconstruction only, as in the paper (arXiv 2505.12313).

`encode(h) = R V_k^T (h - m_E)`, V_k the top eigenvectors of C_EE: the global optimum of the paper's
loss by Eckart-Young. The loss is blind to the target, so the basis in which expert states arrive is
arbitrary: R is a random isometry drawn by the seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from expertsteer_lens.errors import ArgumentError

from .fold_sums import ExpertFold
from .moment_kind import MomentKind, Problem, Solution

if TYPE_CHECKING:
    from .config import AlignerConfig

SolverName = Literal["closed_form", "adam"]
SOLVERS: tuple[str, ...] = get_args(SolverName)
ADAM_DEFAULTS = {"n_steps": 2000, "learning_rate": 0.01}


def resolve_solver(config: AlignerConfig) -> Mapping[str, int | float]:
    """What None stands for in the settings of the trained solver, which the closed form has not.

    Raises:
        ArgumentError: they are given.
    """
    if config.solver == "adam":
        return ADAM_DEFAULTS
    if config.n_steps is not None or config.learning_rate is not None:
        raise ArgumentError(
            "n_steps and learning_rate have no effect for solver='closed_form'; leave them at None."
        )
    return {}


def fit_reconstruction(problem: Problem) -> Solution:
    """The optimum of the reconstruction loss in the basis that the seed draws."""
    config, expert, k = problem.config, problem.expert, problem.rank
    generator = torch.Generator().manual_seed(problem.seed)
    if config.solver == "adam":
        assert config.n_steps is not None
        assert config.learning_rate is not None
        return train_autoencoder(
            expert,
            problem.basis,
            problem.d_target,
            k,
            config.n_steps,
            config.learning_rate,
            generator,
        )
    isometry = draw_isometry(problem.d_target, k, generator, problem.basis)
    # An eigenvector routine may return either sign; the gauge is the seed's, not the processor's.
    gauge = isometry * largest_entry_signs(problem.basis @ expert.vectors[:, :k])
    return gauge, gauge.T


def largest_entry_signs(axes: Tensor) -> Tensor:
    """`[k]`, ±1: the sign of the entry of largest size in each column."""
    return axes.gather(0, axes.abs().argmax(0, keepdim=True))[0].sign()


def draw_isometry(d_target: int, k: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """`[d_target, k]` with orthonormal columns, uniform (Haar): the arbitrary basis of a
    reconstruction-only encoder."""
    q, r = torch.linalg.qr(torch.randn(d_target, k, generator=generator, dtype=torch.float64))
    isometry: Tensor = (q * r.diagonal().sign()).to(like)
    return isometry


def train_autoencoder(
    expert: ExpertFold,
    basis: Tensor,
    d_target: int,
    k: int,
    n_steps: int,
    learning_rate: float,
    generator: torch.Generator,
) -> Solution:
    """Train a linear auto-encoder by Adam on the full-batch reconstruction loss, float32, learning
    rate decayed to 0.

    The loss depends on the anchors only through their covariance, so it is computed on a square
    root of it in the original coordinates (Adam is not rotation-invariant). Bottleneck `k` columns
    inside `d_target`."""
    axes = basis @ expert.vectors
    factor = (expert.values.sqrt()[:, None] * axes.T / expert.unit.sqrt()).to(torch.float32)
    total, d = factor.square().sum(), factor.shape[1]
    start = [torch.randn(s, generator=generator) / s[1] ** 0.5 for s in ((k, d), (d, k))]
    w, v = (p.to(factor.device).requires_grad_() for p in start)
    optimiser = torch.optim.Adam([w, v], lr=learning_rate)
    with torch.enable_grad():
        for step in range(n_steps):
            optimiser.param_groups[0]["lr"] = learning_rate * (1.0 - step / n_steps)
            optimiser.zero_grad()
            ((factor - factor @ w.T @ v.T).square().sum() / total).backward()
            optimiser.step()
    place = torch.eye(d_target, k, dtype=torch.float64, device=basis.device)
    return place @ (w.detach().double() @ axes), (axes.T @ v.detach().double()) @ place.T


AUTOENCODER = MomentKind(
    settings=("n_components", "standardise", "n_folds", "solver", "n_steps", "learning_rate"),
    resolve=resolve_solver,
    uses_target=False,
    largest_rank=min,
    solve=fit_reconstruction,
)
