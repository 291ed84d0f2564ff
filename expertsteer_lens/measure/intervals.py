"""How far a mean over prompts, or over tasks, would move with others: percentile bootstrap, widened
for small samples."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEVEL = 0.95
FEWEST = 5
"""Below so many values their resamples have too few means: Student's t is taken."""


def bootstrap_draws(n: int, n_bootstrap: int, seed: int) -> Int[Tensor, "n_bootstrap n"]:
    """Indices of `n_bootstrap` resamples of n things, drawn with replacement; the same seed pairs
    the resamples of several methods."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(n, (n_bootstrap, n), generator=generator)


def mean_interval(
    values: Float[Tensor, " n"], draws: Int[Tensor, "n_bootstrap n"]
) -> tuple[float, float]:
    """Bounds of a 95 % interval of the mean of `values`, in their unit.

    A percentile bootstrap of few values is too narrow: of the intervals of six values 86 % cover
    the mean. So the percentiles are taken further out, as far as Student's t is wider than the
    normal distribution with the spread of the resamples ("expanded percentile interval",
    Hesterberg 2015, doi:10.1080/00031305.2015.1089789). Of fewer than five values the interval is
    Student's t; of a single one, that value.

    It covers the choice of what was drawn (prompts), and nothing else: not the fit, not the seed.

    Example:
        >>> low, high = mean_interval(torch.arange(100.0), bootstrap_draws(100, 1000, seed=0))
        >>> 40 < low < 49.5 < high < 60
        True
    """
    n = len(values)
    if n < FEWEST:
        mean = float(values.double().mean())
        spread = float(values.double().std()) / math.sqrt(n) if n > 1 else 0.0
        half = student(n) * spread if n > 1 else 0.0
        return mean - half, mean + half
    outside = _tail(n)
    means = values[draws].double().mean(1)
    low, high = (float(means.quantile(q)) for q in (outside, 1 - outside))
    return low, high


@lru_cache
def student(n: int) -> float:
    """The 97.5 % quantile of Student's t of a mean of n values."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, n - 1))


@lru_cache
def _tail(n: int) -> float:
    """Share of the resamples' means below the interval."""
    from scipy.stats import norm

    return float(norm.cdf(-math.sqrt(n / (n - 1)) * student(n)))
