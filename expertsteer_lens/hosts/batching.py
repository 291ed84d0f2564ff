"""Which texts share a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from expertsteer_lens._checks import check_number

TOKENS_PER_PASS = 2048
"""Padding included. Chosen by `benchmarks/capture_speed.py --budgets`."""


def length_batches(
    lengths: Sequence[int] | Tensor,
    *,
    batch_size: int | None,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> list[list[int]]:
    """Texts of similar length together, the longest first (a pass that is too large for the memory
    is then the first one); within a length in the order given.

    Args:
        lengths: tokens of each text.
        batch_size: most texts in a pass; None: as many as `tokens_per_pass` allows.
        tokens_per_pass: most tokens in a pass, padding included; a longer text is a pass of its
            own.

    Raises:
        ArgumentError: a number below 1.

    Example:
        >>> length_batches([2, 5, 1, 2], batch_size=None, tokens_per_pass=6)
        [[1], [0, 3, 2]]
    """
    check_number("tokens_per_pass", tokens_per_pass, low=1, integer=True)
    if batch_size is not None:
        check_number("batch_size", batch_size, low=1, integer=True)
    sizes = [int(length) for length in lengths]
    batches: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        last = batches[-1] if batches else []
        # The first text of a batch is its longest, and as wide as the pass.
        full = not last or (len(last) + 1) * sizes[last[0]] > tokens_per_pass
        if full or len(last) == batch_size:
            batches.append([i])
        else:
            last.append(i)
    return batches
