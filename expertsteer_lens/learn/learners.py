"""Ways to learn a direction from labelled states, by name: one line of the table is one learner.

`evaluate` compares them on the same states. To add one, write a function and register it:

>>> import torch
>>> def last_coordinate(rows, labels, *, config, seed):
...     return torch.eye(rows.shape[1])[-1]
>>> register_learner("last coordinate", last_coordinate)
>>> learn("last coordinate", torch.eye(3), torch.tensor([0, 1, 1]))
tensor([0., 0., 1.])
>>> del LEARNERS["last coordinate"]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from jaxtyping import Float, Shaped
from torch import Tensor

from expertsteer_lens._checks import check_choice
from expertsteer_lens._tables import register

from .config import RFMConfig
from .directions import logistic_probe, mean_difference, pca_direction
from .rfm import fit_rfm

LearnerName = Literal["rfm", "mean difference", "pca", "logistic probe"]


class Learner(Protocol):
    """Labelled states to a unit direction towards label 1."""

    def __call__(
        self,
        rows: Float[Tensor, "n d"],
        labels: Shaped[Tensor, " n"],
        *,
        config: RFMConfig,
        seed: int,
    ) -> Float[Tensor, " d"]:
        """Learn from rows and labels; only the RFM has settings and draws random numbers."""


def _plain(function: Callable[[Tensor, Tensor], Tensor]) -> Learner:
    """A learner that has neither settings nor random numbers."""

    def learner(rows: Tensor, labels: Tensor, *, config: RFMConfig, seed: int) -> Tensor:
        return function(rows, labels)

    return learner


def _learn_rfm(rows: Tensor, labels: Tensor, *, config: RFMConfig, seed: int) -> Tensor:
    return fit_rfm(rows, labels, config, seed=seed).direction


LEARNERS: dict[str, Learner] = {
    "rfm": _learn_rfm,
    "mean difference": _plain(mean_difference),
    # Of differences: in contrast pairs, row i of either class is the same prompt.
    "pca": _plain(lambda rows, labels: pca_direction(rows, labels, paired=True)),
    "logistic probe": _plain(logistic_probe),
}
"""The method's learner, and those of others (CAA, RepE, ITI) that it is compared with."""

_DEFAULT = RFMConfig()


def register_learner(name: str, learner: Learner) -> None:
    """Make a way to learn a direction known under `name`, to `learn`.

    Args:
        name: none that is taken.
        learner: `learner(rows, labels, *, config, seed)`, with rows `[n, d]` and labels `[n]` (1 =
            positive), gives a direction `[d]` that points to the positive class.

    Raises:
        ArgumentError: the name is taken.

    Example:
        >>> import torch
        >>> def medians(rows, labels, *, config, seed):
        ...     return rows[labels == 1].median(0).values - rows[labels == 0].median(0).values
        >>> register_learner("medians", medians)
        >>> rows = torch.tensor([[0.0, 1.0], [0.0, 2.0], [3.0, 1.0], [3.0, 2.0]])
        >>> learn("medians", rows, torch.tensor([0, 0, 1, 1]))
        tensor([3., 0.])
        >>> del LEARNERS["medians"]
    """
    register(LEARNERS, name, learner, what="a learner", made_by=learner)


def learn(
    name: LearnerName | str,
    rows: Float[Tensor, "n d"],
    labels: Shaped[Tensor, " n"],
    *,
    config: RFMConfig = _DEFAULT,
    seed: int = 0,
) -> Float[Tensor, " d"]:
    """The direction that the learner of this name finds.

    Args:
        name: a key of `LEARNERS`.
        rows: labelled states, one per prompt; for "pca", row i of either class is the same prompt.
        labels: 1 = positive.
        config: of the RFM.
        seed: of the RFM.

    Raises:
        ArgumentError: no such learner.
        DataError: see the learner.
    """
    check_choice("learner", name, LEARNERS)
    return LEARNERS[name](rows, labels, config=config, seed=seed)
