"""Which texts share a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from expertsteer_lens._checks import check_number

TOKENS_PER_PASS = 2048
"""Padding included."""

MOST_PADDING = 1 / 8
"""Share of padding from which a text begins a pass of its own..."""
LEAST_SHARE = 1 / 4
"""...if the one before has this share of `tokens_per_pass`: small passes cost more than padding.
Both chosen by us; what they cost is in the table of `benchmarks/capture_speed.py`."""


def length_batches(
    lengths: Sequence[int] | Tensor,
    *,
    batch_size: int | None,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> list[list[int]]:
    """Texts of similar length together, the longest first (a pass that is too large for the memory
    is then the first one); within a length in the order given. A pass has at most
    `tokens_per_pass` tokens; one with a quarter of them takes no text that makes more than an
    eighth of it padding.

    Args:
        lengths: tokens of each text.
        batch_size: most texts in a pass; None: as many as `tokens_per_pass` allows.
        tokens_per_pass: most tokens in a pass, padding included; a longer text is a pass of its
            own.

    Raises:
        ArgumentError: a number below 1.

    Example:
        >>> length_batches([2, 5, 1, 2], batch_size=None, tokens_per_pass=6)
        [[1], [0, 3], [2]]
    """
    check_number("tokens_per_pass", tokens_per_pass, low=1, integer=True)
    if batch_size is not None:
        check_number("batch_size", batch_size, low=1, integer=True)
    sizes = [int(length) for length in lengths]
    batches: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        last = batches[-1] if batches else []
        if last and len(last) != batch_size and _fits(sizes, last, i, tokens_per_pass):
            last.append(i)
        else:
            batches.append([i])
    return batches


def _fits(sizes: list[int], batch: list[int], i: int, tokens_per_pass: int) -> bool:
    # The first text of a batch is its longest, and as wide as the pass.
    n_tokens = (len(batch) + 1) * sizes[batch[0]]
    padding = n_tokens - sum(sizes[j] for j in batch) - sizes[i]
    wasteful = n_tokens > LEAST_SHARE * tokens_per_pass and padding > MOST_PADDING * n_tokens
    return n_tokens <= tokens_per_pass and not wasteful
