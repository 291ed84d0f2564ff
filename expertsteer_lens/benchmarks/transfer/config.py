"""Settings of the benchmark on real models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from expertsteer_lens._checks import check_list, check_number


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Settings of the benchmark on real models."""

    n_pairs: tuple[int, ...] = (1, 4)
    """Numbers of labelled pairs, beside all of them; a task with no more pairs has no such rows.
    None, `()`: all pairs and no labelled pair alone, in a fraction of the time."""
    n_draws: int = 20
    """Draws of the labelled pairs, for each number."""
    n_random: int = 10
    """Random directions of equal norm: the floor."""
    n_shuffles: int = 5
    """Directions from shuffled labels."""
    target_depths: tuple[float, ...] = (0.35, 0.45, 0.6)
    """Candidates for the block that directions are learnt at, in shares of the target's depth."""
    write_depths: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35)
    """Candidates for the block that they are written to, beside the one they are learnt at; none:
    that one alone."""
    coefficients: tuple[float, ...] = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3)
    """Candidates for the strength, in median norms of the block that is written."""
    budget: float = 0.10
    """Largest rise of the NLL of neutral texts, nats per token, that a strength may cost."""
    expert_depths: tuple[float, ...] = (0.5, 0.65)
    """Candidates for the block that the expert's direction is mapped from."""
    labelling: tuple[tuple[int, int], ...] = ((1, 0), (1, 1), (1, 4), (3, 4), (6, 1), (6, 4))
    """Candidates for (`flatten`, `n_rounds`) of `label_texts`, each with the question asked and
    without; each labeller gets its best."""
    batch_size: int = 16
    """Texts a pass when states are read."""
    seed: int = 0
    """Of draws, folds and random directions."""

    def __post_init__(self) -> None:
        for name in ("n_draws", "n_random", "n_shuffles", "batch_size"):
            check_number(name, getattr(self, name), low=1, integer=True)
        for name in ("target_depths", "write_depths", "expert_depths"):
            for share in check_list(name, getattr(self, name), of="shares"):
                check_number(name, share, low=0.0, high=1.0)
        for flatten, n_rounds in check_list("labelling", self.labelling, of="pairs of numbers"):
            check_number("labelling", flatten, low=1, integer=True)
            check_number("labelling", n_rounds, low=0, integer=True)
        for n in check_list("n_pairs", self.n_pairs, of="numbers"):
            check_number("n_pairs", n, low=1, integer=True)
        for c in check_list("coefficients", self.coefficients, of="numbers"):
            check_number("coefficients", c, low=0.0, low_open=True)
        check_number("budget", self.budget, low=0.0, low_open=True)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)
