"""The estimators by name, and how to add one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

from expertsteer_lens._checks import check_choice
from expertsteer_lens._tables import register
from expertsteer_lens.errors import ArgumentError

from .base import Estimator
from .cca import CrossFittedCCA
from .cka import DebiasedCKA
from .gaussian import GaussianMI
from .ksg import KSG

EstimatorName = Literal["cca", "gaussian", "ksg", "cka"]
"""The estimators of this package."""

ESTIMATORS: dict[str, type[Estimator]] = {
    "cca": CrossFittedCCA,
    "gaussian": GaussianMI,
    "ksg": KSG,
    "cka": DebiasedCKA,
}
"""Name in `MIConfig.estimator`, and the class that computes it."""

_E = TypeVar("_E", bound=type[Estimator])


def register_estimator(name: str) -> Callable[[_E], _E]:
    """Class decorator: make an `Estimator` of your own available as `MIConfig(estimator=name)`.

    A file that was saved with it loads where it has been registered before.

    Raises:
        ArgumentError: the name is taken, or the class lacks a method.

    Example:
        >>> import torch
        >>> from expertsteer_lens.pair import ESTIMATORS, Estimator, MIConfig
        >>> from expertsteer_lens.pair import layer_pair_mi, register_estimator
        >>> @register_estimator("first_component")
        ... class FirstComponent(Estimator):
        ...     "Absolute correlation of the first principal components."
        ...     unit, quantity = "correlation", "first_component"
        ...     defaults = {"n_components": 1}
        ...
        ...     def __init__(self, expert, target, config, folds):
        ...         self.x, self.y = (
        ...             torch.stack([layer.features[:, 0] for layer in side])  # [L, n]
        ...             for side in (expert, target)
        ...         )
        ...
        ...     def observed(self):
        ...         return (self.x @ self.y.T / self.x.shape[1]).abs()
        ...
        ...     def permuted(self, order):
        ...         return (self.x @ self.y[:, order].T / self.x.shape[1]).abs()
        ...
        ...     def bootstrap(self, weights):
        ...         means = torch.einsum("bn,in,jn->bij", weights, self.x, self.y)
        ...         return means.abs() / self.x.shape[1]
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> got = layer_pair_mi([x, x.flip(0)], [2 * x], MIConfig(estimator="first_component"))
        >>> round(float(got.matrix[0, 0]), 6), got.unit, float(got.p_values[0, 0]) < 0.05
        (1.0, 'correlation', True)
        >>> del ESTIMATORS["first_component"]
    """

    def add(estimator: _E) -> _E:
        for method in ("observed", "permuted", "bootstrap"):
            if getattr(estimator, method, None) in (None, getattr(Estimator, method)):
                raise ArgumentError(f"{estimator.__name__} must define {method}(); see Estimator.")
        register(ESTIMATORS, name, estimator, what="an estimator", made_by=estimator)
        return estimator

    return add


def find_estimator(name: str) -> type[Estimator]:
    """The estimator of this name.

    Raises:
        ArgumentError: there is none (the message names the closest).
    """
    return ESTIMATORS[check_choice("estimator", name, ESTIMATORS)]
