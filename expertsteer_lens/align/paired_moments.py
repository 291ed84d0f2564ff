"""Fit a grid of aligners on more paired rows than can be held: second moments, fold by fold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Int, Real
from torch import Tensor

from expertsteer_lens._checks import check_number, check_paired, unknown_hook
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.linalg.moments import Moments, RunningMoments, check_weights

from .folds import check_groups, check_no_empty_fold, check_row_count, fold_of_groups


class PairedMoments:
    """Accumulates, for chosen pairs of an expert and a target layer, all that `fit_aligner_grid`
    needs of paired rows; any chunking of the rows gives the same result.

    Kept in float64, per fold: the count, the means, C_EE of each expert layer, C_TT of each target
    layer and C_TE of each pair. Memory in bytes, whatever the number of rows: `8 * n_folds * (sum
    of d_e^2 over expert layers + sum of d_t^2 over target layers + sum of d_e * d_t over pairs)`;
    at d = 4096, 5 folds and one pair that is 2 GB. Updates cost O(n) times the same numbers.

    Args:
        pairs: (expert hook, target hook) pairs that will be fitted.
        d_expert: width of the expert's rows, or of each expert hook.
        d_target: the same for the target.
        n_folds: of the cross-validation, as in `AlignerConfig`.
        seed: draws the fold of each group.
        device: where the sums are kept and computed.

    Raises:
        ArgumentError: no pair, or a width or number of folds out of range.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> expert = torch.randn(60, 4, generator=generator)
        >>> target = expert @ torch.randn(4, 3, generator=generator)
        >>> text = torch.arange(60) // 3  # three tokens of each of twenty texts
        >>> moments = PairedMoments([("a", "b")], d_expert=4, d_target=3)
        >>> for e, t, g in zip(expert.split(7), target.split(7), text.split(7)):
        ...     _ = moments.update({"a": e}, {"b": t}, g)
        >>> moments
        PairedMoments(n=60, n_folds=5, pairs=1, seed=0)
        >>> from expertsteer_lens.align import fit_aligner_grid_from_moments
        >>> streamed = fit_aligner_grid_from_moments(moments)["a", "b"]
        >>> torch.allclose(streamed.encode(expert), target, atol=1e-3)
        True
    """

    def __init__(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        d_expert: int | Mapping[str, int],
        d_target: int | Mapping[str, int],
        n_folds: int = 5,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.pairs = tuple(dict.fromkeys(pairs))
        if not self.pairs:
            raise ArgumentError("pairs must name at least one (expert hook, target hook) pair.")
        check_number("n_folds", n_folds, low=2, integer=True)
        self.n_folds, self.seed = n_folds, seed
        self.d_expert = _widths("d_expert", d_expert, [e for e, _ in self.pairs])
        self.d_target = _widths("d_target", d_target, [t for _, t in self.pairs])
        widths = {expert_key(e): d for e, d in self.d_expert.items()}
        widths |= {target_key(t): d for t, d in self.d_target.items()}
        blocks = [(key, key) for key in widths]
        blocks += [(target_key(t), expert_key(e)) for e, t in self.pairs]
        self._folds = [RunningMoments(widths, blocks, device=device) for _ in range(n_folds)]

    @property
    def n(self) -> int:
        """Rows seen so far; those of weight 0 do not count."""
        return sum(fold.n for fold in self._folds)

    def update(
        self,
        expert: Mapping[str, Tensor],
        target: Mapping[str, Tensor],
        groups: Int[Tensor, " n"],
        weights: Real[Tensor, " n"] | None = None,
    ) -> PairedMoments:
        """Add paired rows (row `i` of every layer of both models); returns self. Zero rows are
        allowed; layers that no pair names are passed over.

        Args:
            expert: `[n, d_expert]` by hook name.
            target: `[n, d_target]` by hook name.
            groups: one integer per row, the text it comes from, numbered 0, 1, 2, ...; it decides
                the fold (see `fold_of_groups`).
            weights: of each row, `>= 0`, for instance 1 / tokens of its text so that long texts do
                not rule; a row of weight 2 counts as that row twice. None = 1.

        Raises:
            HookNameError: a layer of the pairs is missing.
            DataError: NaN or Inf, unequal numbers of rows, bad groups or weights.
            WidthError: a width other than the declared one.
        """
        rows: dict[str, Tensor] = {}
        for states, widths, key_of, side in (
            (expert, self.d_expert, expert_key, "expert"),
            (target, self.d_target, target_key, "target"),
        ):
            for hook in widths:
                if hook not in states:
                    raise unknown_hook(hook, list(states), f"the {side} states")
                rows[key_of(hook)] = states[hook]
        first, *others = rows
        for other in others:
            check_paired(rows[first], rows[other], first, other)
        n = rows[first].shape[0]
        folds = fold_of_groups(check_groups(groups, n), self.n_folds, self.seed)
        if weights is not None:
            weights = check_weights(weights, n).cpu()
        for fold, moments in enumerate(self._folds):
            here = (folds == fold).nonzero()[:, 0]
            part = {key: x[here.to(x.device)] for key, x in rows.items()}
            moments.update(part, None if weights is None else weights[here])
        return self

    def merge(self, other: PairedMoments) -> PairedMoments:
        """Add everything `other` has seen; returns self and leaves `other` as it is.

        Raises:
            ArgumentError: `other` has other folds.
            WidthError: `other` has other layers, widths or pairs.
        """
        if (self.n_folds, self.seed) != (other.n_folds, other.seed):
            raise ArgumentError(
                f"merge needs the same folds: this has n_folds={self.n_folds}, seed={self.seed}, "
                f"the other n_folds={other.n_folds}, seed={other.seed}."
            )
        for mine, theirs in zip(self._folds, other._folds, strict=True):
            mine.merge(theirs)
        return self

    @property
    def n_bytes(self) -> int:
        """Memory of the sums."""
        d_e, d_t = self.d_expert, self.d_target
        cells = sum(d * d for d in (*d_e.values(), *d_t.values()))
        cells += sum(d_e[e] * d_t[t] for e, t in self.pairs)
        return 8 * self.n_folds * cells

    def state(self) -> dict[str, Any]:
        """Everything that was accumulated, for a file; `from_state` reads it back."""
        return {
            "pairs": self.pairs,
            "d_expert": self.d_expert,
            "d_target": self.d_target,
            "n_folds": self.n_folds,
            "seed": self.seed,
            "folds": [fold.state() for fold in self._folds],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PairedMoments:
        """The moments whose `state` this was."""
        moments = cls(
            [(e, t) for e, t in state["pairs"]],
            d_expert=state["d_expert"],
            d_target=state["d_target"],
            n_folds=state["n_folds"],
            seed=state["seed"],
        )
        for fold, kept in zip(moments._folds, state["folds"], strict=True):
            fold.restore(kept)
        return moments

    def folds(self) -> tuple[Moments, ...]:
        """The moments of each fold so far; later updates do not move them.

        Raises:
            DataError: fewer than two rows a fold, or a fold without rows.
        """
        return tuple(fold.result() for fold in self.running_folds())

    def running_folds(self) -> tuple[RunningMoments, ...]:
        """The sums of each fold themselves, no copies, for who reads a few blocks of them.

        Raises:
            DataError: fewer than two rows a fold, or a fold without rows.
        """
        check_row_count(self.n, self.n_folds)
        check_no_empty_fold([fold.n for fold in self._folds])
        return tuple(self._folds)

    def __repr__(self) -> str:
        return (
            f"PairedMoments(n={self.n}, n_folds={self.n_folds}, pairs={len(self.pairs)}, "
            f"seed={self.seed})"
        )


def _widths(name: str, given: int | Mapping[str, int], hooks: list[str]) -> dict[str, int]:
    hooks = list(dict.fromkeys(hooks))
    if isinstance(given, Mapping):
        missing = [hook for hook in hooks if hook not in given]
        if missing:
            raise ArgumentError(f"{name} says no width for {missing[0]!r}.")
        widths = {hook: given[hook] for hook in hooks}
    else:
        widths = dict.fromkeys(hooks, given)
    for width in widths.values():
        check_number(name, width, low=1, integer=True)
    return widths


def expert_key(hook_name: str) -> str:
    """How the moments call a layer of the expert."""
    return f"expert[{hook_name!r}]"


def target_key(hook_name: str) -> str:
    """How the moments call a layer of the target."""
    return f"target[{hook_name!r}]"
