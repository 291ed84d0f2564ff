"""Percentile bootstrap: how far a mean over prompts would move with other prompts."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

QUANTILES = (0.025, 0.975)
"""Of the 95 % interval."""


def bootstrap_draws(n: int, n_bootstrap: int, seed: int) -> Int[Tensor, "n_bootstrap n"]:
    """Indices of `n_bootstrap` resamples of n things, drawn with replacement; the same seed pairs
    the resamples of several methods."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(n, (n_bootstrap, n), generator=generator)


def mean_interval(
    values: Float[Tensor, " n"], draws: Int[Tensor, "n_bootstrap n"]
) -> tuple[float, float]:
    """Bounds of the 95 % percentile interval of the mean of `values`, in their unit.

    It covers the choice of what was drawn (prompts), and nothing else: not the fit, not the seed.

    Example:
        >>> low, high = mean_interval(torch.arange(100.0), bootstrap_draws(100, 1000, seed=0))
        >>> 40 < low < 49.5 < high < 60
        True
    """
    means = values[draws].mean(1)
    low, high = (float(means.quantile(q)) for q in QUANTILES)
    return low, high
