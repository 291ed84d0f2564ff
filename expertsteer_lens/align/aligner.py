"""What a fitted aligner is: two maps, how well they fit, and the settings they come from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._html import repr_html
from expertsteer_lens.errors import ArgumentError, WidthError

if TYPE_CHECKING:
    from .config import AlignerConfig


@runtime_checkable
class RowMap(Protocol):
    """Any map of rows to rows, which need not be affine: what `Aligner.encoder` and `.decoder` may
    be.

    A map is frozen data: it takes no gradient, and the same rows give the same result."""

    @property
    def d_in(self) -> int:
        """Width of the rows that go in."""
        ...

    @property
    def d_out(self) -> int:
        """Width of the rows that come out."""
        ...

    def __call__(self, x: Tensor, /) -> Tensor:
        """Map rows `[n, d_in]`, float32 or float64, to `[n, d_out]` in the same dtype and on the
        same device."""
        ...

    def to(self, *args: Any, **kwargs: Any) -> RowMap:
        """A copy with its tensors moved as by `torch.Tensor.to`."""
        ...


@dataclass(frozen=True, eq=False)
class AffineMap:
    """`x -> x @ weight.T + bias`, the weight kept as a product of thin factors where that is
    smaller.

    >>> double = AffineMap((2.0 * torch.eye(2),), torch.tensor([1.0, 0.0]))
    >>> double(torch.tensor([[1.0, 1.0]])), double.linear(torch.tensor([[1.0, 1.0]]))
    (tensor([[3., 2.]]), tensor([[2., 2.]]))
    """

    factors: tuple[Tensor, ...]
    """weight = factors[0] @ factors[1] @ ..., float32; no factor means the identity."""
    bias: Float[Tensor, " d_out"]

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "factors",
            tuple(f.detach().to(torch.float32).clone().contiguous() for f in self.factors),
        )
        object.__setattr__(self, "bias", self.bias.detach().to(torch.float32).clone().contiguous())

    @property
    def d_in(self) -> int:
        """Width of the rows that go in."""
        return (self.factors[-1] if self.factors else self.bias).shape[-1]

    @property
    def d_out(self) -> int:
        """Width of the rows that come out."""
        return self.bias.shape[0]

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix, multiplied out; a copy."""
        if not self.factors:
            return torch.eye(self.bias.shape[0], device=self.bias.device)
        product = self.factors[0].clone()
        for factor in self.factors[1:]:
            product = product @ factor
        return product

    def __call__(self, x: Tensor) -> Tensor:
        """Map the last axis; computed in float32 (float64 for float64 input), returned in the dtype
        of `x`."""
        out = self._multiply(x)
        return (out + self.bias.to(out)).to(x.dtype)

    def linear(self, x: Tensor) -> Tensor:
        """The same without the bias: the image of a displacement."""
        return self._multiply(x).to(x.dtype)

    def _multiply(self, x: Tensor) -> Tensor:
        out = x.to(torch.promote_types(x.dtype, torch.float32))
        for factor in reversed(self.factors):
            out = out @ factor.to(out).T
        return out

    def to(self, *args: Any, **kwargs: Any) -> AffineMap:
        """A copy with its tensors moved as by `torch.Tensor.to` (they stay float32)."""
        factors = tuple(f.to(*args, **kwargs) for f in self.factors)
        return AffineMap(factors, self.bias.to(*args, **kwargs))


@dataclass(frozen=True)
class AlignerQuality:
    """How well the map fits, out of fold. None of these says that a mapped direction steers: only
    behaviour does."""

    n_anchors: int
    """Paired rows used."""
    r2: float | None
    """Held-out R^2 of `encode` against the target's states, pooled over folds and coordinates
    (variance-weighted, against the training mean; in standardised coordinates if `standardise`). <=
    0: no better than the mean. None: no target in the fit."""
    reconstruction_fvu: float | None
    """Held-out fraction of expert variance lost by `decode(encode(h))`; 0 = nothing. None: the
    kind has no decoder."""
    effective_rank: float
    """Participation ratio of the covariance of the encoded anchors: about how many axes the code
    uses."""
    n_components: int | None
    """Rank of the fitted map (as asked, or less where the anchors span less); None where the map
    has none (it is not affine)."""
    ridge: float | None = None
    """Ridge used, in units of the mean variance per expert coordinate; None where the kind has
    none."""
    ridge_path: tuple[tuple[float, float], ...] | None = None
    """(ridge, held-out R^2) of every candidate, if the ridge was chosen by cross-validation."""


@dataclass(frozen=True, eq=False)
class Aligner:
    """A fitted map from the expert's residual stream to the target's, and back.

    The maps of the built-in kinds are affine (`AffineMap`: `aligner.encoder.weight`, `.bias`; their
    tensors are clones, nothing moves them later). A registered kind may put any `RowMap` here. What
    then cannot be done: `encode_direction` (a map that is not affine has no linear part), `decode`
    where the kind fits no decoder, and saving the aligner or a fit that holds it; each raises
    `ArgumentError`. Fitting, plans from the fit, and saved plans need none of these.
    """

    encoder: RowMap
    decoder: RowMap | None
    quality: AlignerQuality
    config: AlignerConfig
    seed: int

    @property
    def d_expert(self) -> int:
        """Width of the expert's states."""
        return self.encoder.d_in

    @property
    def d_target(self) -> int:
        """Width of the target's states."""
        return self.encoder.d_out

    def encode(self, h: Float[Tensor, "*batch d_expert"]) -> Float[Tensor, "*batch d_target"]:
        """Expert states in the target's space; dtype and device of `h`.

        Raises:
            WidthError: `h` is not `d_expert` wide.
        """
        return _map_rows(self.encoder, self._check_width(h, self.d_expert))

    def decode(self, h: Float[Tensor, "*batch d_target"]) -> Float[Tensor, "*batch d_expert"]:
        """Target-space states back in the expert's space.

        Raises:
            WidthError: `h` is not `d_target` wide.
            ArgumentError: the kind fits no decoder.
        """
        self._check_width(h, self.d_target)
        if self.decoder is None:
            raise ArgumentError(
                f"aligner kind={self.config.kind!r} maps one way only: it has no decoder."
            )
        return _map_rows(self.decoder, h)

    def encode_direction(
        self, v: Float[Tensor, "*batch d_expert"]
    ) -> Float[Tensor, "*batch d_target"]:
        """Image of a displacement: the linear part alone, no offset; not renormalised.

        For differences of states (a mean difference). An AGOP eigenvector is a gradient, not a
        displacement: fit RFM on encoded states instead of mapping it.

        Raises:
            WidthError: `v` is not `d_expert` wide.
            ArgumentError: the map is not affine, so that the image depends on where one starts.
        """
        self._check_width(v, self.d_expert)
        if not isinstance(self.encoder, AffineMap):
            raise ArgumentError(
                f"aligner kind={self.config.kind!r} is not affine, so a direction has no image of "
                "its own; encode both states and take their difference."
            )
        return self.encoder.linear(v)

    def _check_width(self, h: Tensor, width: int) -> Tensor:
        if h.shape[-1] != width:
            raise WidthError(
                f"aligner maps d_expert={self.d_expert} to d_target={self.d_target}, but the "
                f"activations have width {h.shape[-1]}; this side takes {width}."
            )
        return h

    def to(self, *args: Any, **kwargs: Any) -> Aligner:
        """A copy with its tensors moved as by `torch.Tensor.to` (they stay float32)."""
        decoder = None if self.decoder is None else self.decoder.to(*args, **kwargs)
        return replace(self, encoder=self.encoder.to(*args, **kwargs), decoder=decoder)

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        q = self.quality
        r2 = "" if q.r2 is None else f", held-out R²={q.r2:.3f}"
        lost = "" if q.reconstruction_fvu is None else f", FVU={q.reconstruction_fvu:.3f}"
        ridge = "" if q.ridge is None else f", ridge={q.ridge:.2g}"
        return (
            f"Aligner({self.config.kind}, {self.d_expert} → {self.d_target}, "
            f"n_anchors={q.n_anchors}{r2}{lost}, effective rank={q.effective_rank:.1f}{ridge}, "
            f"seed={self.seed})"
        )


def _map_rows(row_map: RowMap, h: Tensor) -> Tensor:
    """Apply a map of `[n, d]` rows to the last axis of `h`, in float32 or wider; dtype of `h`."""
    rows = h.to(torch.promote_types(h.dtype, torch.float32)).reshape(-1, h.shape[-1])
    out = row_map(rows)
    if out.shape != (rows.shape[0], row_map.d_out):
        raise WidthError(
            f"{type(row_map).__name__} says d_out={row_map.d_out} and returned "
            f"{tuple(out.shape)} for {tuple(rows.shape)}."
        )
    return out.to(h.dtype).reshape(*h.shape[:-1], row_map.d_out)
