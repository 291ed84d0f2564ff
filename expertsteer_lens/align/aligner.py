"""What a fitted aligner is: its configuration, its quality and the affine maps themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens.errors import ArgumentError, ArtifactError, WidthError

KINDS = ("ridge", "autoencoder", "procrustes", "anchored_autoencoder", "identity")
_APPLIES = {
    "n_components": ("ridge", "autoencoder", "procrustes", "anchored_autoencoder"),
    "ridge": ("ridge", "anchored_autoencoder"),
    "anchor_weight": ("anchored_autoencoder",),
    "standardise": ("ridge", "autoencoder", "procrustes", "anchored_autoencoder"),
    "n_folds": ("ridge", "autoencoder", "procrustes", "anchored_autoencoder"),
    "solver": ("autoencoder",),
    "n_steps": ("autoencoder",),
    "learning_rate": ("autoencoder",),
}


@dataclass(frozen=True, kw_only=True)
class AlignerConfig:
    """Which map is fitted, and how. A field that means nothing for the chosen kind must keep its
    default."""

    kind: str = "ridge"
    """"ridge": regression of target on expert states. "procrustes": PCA, one rotation, one scale.
    "anchored_autoencoder": the paper's reconstruction loss plus agreement with the target.
    "autoencoder": reconstruction only, as in the paper: its basis in the target's space is
    arbitrary (the seed draws it). "identity": no map, for models of one family."""
    n_components: int | None = None
    """Rank of the map, >= 1: principal components of the expert (and of the target for
    "procrustes") kept, or the bottleneck. None = min(d_expert, d_target), for "ridge" all; never
    more than the anchors span."""
    ridge: float | None = None
    """>= 0, in units of the mean variance per expert coordinate. None = chosen by cross-validation
    over `RIDGE_PATH`, for "anchored_autoencoder" on its regression term."""
    anchor_weight: float | None = None
    """Weight > 0 of the unexplained fraction of target variance beside the unexplained fraction of
    expert variance in "anchored_autoencoder". None = 1."""
    standardise: bool = False
    """Scale every coordinate of both sides to unit variance before fitting (the map is scaled
    back): all coordinates count equally, in the loss and in the reported R^2, instead of a few
    massive ones."""
    n_folds: int = 5
    """Disjoint folds of the cross-validation, >= 2."""
    solver: str = "closed_form"
    """"autoencoder" only: "closed_form" (the global optimum) or "adam" (trained, for comparison
    with the paper)."""
    n_steps: int | None = None
    """Steps of "adam", >= 1. None = 2000."""
    learning_rate: float | None = None
    """Initial learning rate of "adam", > 0, decayed linearly to 0. None = 0.01."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("solver", self.solver, ("closed_form", "adam"))
        check_number("n_folds", self.n_folds, low=2, integer=True)
        for name, low, low_open, integer in (
            ("n_components", 1, False, True),
            ("ridge", 0.0, False, False),
            ("anchor_weight", 0.0, True, False),
            ("n_steps", 1, False, True),
            ("learning_rate", 0.0, True, False),
        ):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=low, low_open=low_open, integer=integer)
        if not isinstance(self.standardise, bool):
            raise ArgumentError(f"standardise must be a bool, got {self.standardise!r}.")
        for field in fields(self):
            value, kinds = getattr(self, field.name), _APPLIES.get(field.name, KINDS)
            if value != field.default and self.kind not in kinds:
                raise ArgumentError(
                    f"{field.name}={value!r} has no effect for kind={self.kind!r} (it applies to "
                    f"{', '.join(kinds)}); "
                    f"leave it at {field.default!r}."
                )
        if self.solver != "adam" and (self.n_steps is not None or self.learning_rate is not None):
            raise ArgumentError(
                "n_steps and learning_rate have no effect for solver='closed_form'; leave them at "
                "None."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


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
    reconstruction_fvu: float
    """Held-out fraction of expert variance lost by `decode(encode(h))`; 0 = nothing."""
    effective_rank: float
    """Participation ratio of the covariance of the encoded anchors: about how many axes the code
    uses."""
    n_components: int
    """Rank of the fitted map (as asked, or less where the anchors span less)."""
    ridge: float | None = None
    """Ridge used, in units of the mean variance per expert coordinate; None where the kind has
    none."""
    ridge_path: tuple[tuple[float, float], ...] | None = None
    """(ridge, held-out R^2) of every candidate, if the ridge was chosen by cross-validation."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """`x -> x @ weight.T + bias`, the weight kept as a product of thin factors where that is
    smaller."""

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
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix, multiplied out."""
        if not self.factors:
            return torch.eye(self.bias.shape[0], device=self.bias.device)
        product = self.factors[0].clone()
        for factor in self.factors[1:]:
            product = product @ factor
        return product

    def __call__(self, x: Tensor, *, linear: bool = False) -> Tensor:
        """Map the last axis; computed in float32 (float64 for float64 input), returned in the dtype
        of `x`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        out = x.to(dtype)
        for factor in reversed(self.factors):
            out = out @ factor.to(device=x.device, dtype=dtype).T
        return (out if linear else out + self.bias.to(device=x.device, dtype=dtype)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Aligner:
    """A fitted affine map between two residual streams and back. Tensors are clones: nothing moves
    them later."""

    encoder: AffineMap
    decoder: AffineMap
    quality: AlignerQuality
    config: AlignerConfig
    seed: int

    @property
    def d_expert(self) -> int:
        """Width of the expert's states."""
        return self.decoder.bias.shape[0]

    @property
    def d_target(self) -> int:
        """Width of the target's states."""
        return self.encoder.bias.shape[0]

    @property
    def encode_weight(self) -> Float[Tensor, "d_target d_expert"]:
        """Matrix of `encode`: `encode(h) = h @ encode_weight.T + encode_bias`."""
        return self.encoder.weight

    @property
    def encode_bias(self) -> Float[Tensor, " d_target"]:
        """Offset of `encode`."""
        return self.encoder.bias.clone()

    @property
    def decode_weight(self) -> Float[Tensor, "d_expert d_target"]:
        """Matrix of `decode`."""
        return self.decoder.weight

    @property
    def decode_bias(self) -> Float[Tensor, " d_expert"]:
        """Offset of `decode`."""
        return self.decoder.bias.clone()

    def encode(self, h: Float[Tensor, "*batch d_expert"]) -> Float[Tensor, "*batch d_target"]:
        """Expert states in the target's space; dtype and device of `h`.

        Raises:
            WidthError: `h` is not `d_expert` wide.
        """
        return self.encoder(self._checked(h, self.d_expert))

    def decode(self, h: Float[Tensor, "*batch d_target"]) -> Float[Tensor, "*batch d_expert"]:
        """Target-space states back in the expert's space.

        Raises:
            WidthError: `h` is not `d_target` wide.
        """
        return self.decoder(self._checked(h, self.d_target))

    def encode_direction(
        self, v: Float[Tensor, "*batch d_expert"]
    ) -> Float[Tensor, "*batch d_target"]:
        """Image of a displacement: the linear part alone, no offset; not renormalised.

        For differences of states (a mean difference). An AGOP eigenvector is a gradient, not a
        displacement: fit RFM on encoded states instead of mapping it.

        Raises:
            WidthError: `v` is not `d_expert` wide.
        """
        return self.encoder(self._checked(v, self.d_expert), linear=True)

    def _checked(self, h: Tensor, width: int) -> Tensor:
        if h.shape[-1] != width:
            raise WidthError(
                f"aligner maps d_expert={self.d_expert} to d_target={self.d_target}, but the "
                "activations have width "
                f"{h.shape[-1]}; this side takes {width}."
            )
        return h

    def to(self, *args: Any, **kwargs: Any) -> Aligner:
        """A copy with its tensors moved as by `torch.Tensor.to` (they stay float32)."""
        maps = [
            AffineMap(tuple(f.to(*args, **kwargs) for f in m.factors), m.bias.to(*args, **kwargs))
            for m in (self.encoder, self.decoder)
        ]
        return replace(self, encoder=maps[0], decoder=maps[1])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name and a JSON-able dict; `from_state` inverts it."""
        tensors: dict[str, Tensor] = {}
        for side, affine in (("encode", self.encoder), ("decode", self.decoder)):
            tensors[f"{side}_bias"] = affine.bias.clone()
            tensors |= {f"{side}_factor_{i}": f.clone() for i, f in enumerate(affine.factors)}
        return tensors, {
            "config": self.config.to_dict(),
            "quality": asdict(self.quality),
            "seed": self.seed,
        }

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Aligner:
        """Rebuild an aligner from `state()`, also after a trip through JSON.

        Raises:
            ArtifactError: tensors or fields are missing, unknown, or of shapes that do not fit
                together.
        """
        try:
            maps = [_map_from_state(tensors, side) for side in ("encode", "decode")]
            quality = dict(meta["quality"])
            if quality["ridge_path"] is not None:
                quality["ridge_path"] = tuple(
                    (float(a), float(b)) for a, b in quality["ridge_path"]
                )
            out = cls(
                maps[0],
                maps[1],
                AlignerQuality(**quality),
                AlignerConfig(**meta["config"]),
                int(meta["seed"]),
            )
            shapes_fit = (
                out.encode_weight.shape == (out.d_target, out.d_expert) == out.decode_weight.T.shape
            )
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ArtifactError(
                f"this is not the state of an Aligner: {error}. Save it again with Aligner.state()."
            ) from error
        if not shapes_fit:
            raise ArtifactError(
                f"this is not the state of an Aligner: encode is {tuple(out.encode_weight.shape)} "
                "and decode "
                f"{tuple(out.decode_weight.shape)} for widths {out.d_expert} and {out.d_target}."
            )
        return out

    def __repr__(self) -> str:
        q = self.quality
        r2 = "" if q.r2 is None else f", held-out R²={q.r2:.3f}"
        ridge = "" if q.ridge is None else f", ridge={q.ridge:.2g}"
        return (
            f"Aligner({self.config.kind}, {self.d_expert} → {self.d_target}, "
            f"n_anchors={q.n_anchors}{r2}, "
            f"FVU={q.reconstruction_fvu:.3f}, effective rank={q.effective_rank:.1f}{ridge}, "
            f"seed={self.seed})"
        )


def _map_from_state(tensors: Mapping[str, Tensor], side: str) -> AffineMap:
    count = sum(name.startswith(f"{side}_factor_") for name in tensors)
    return AffineMap(
        tuple(tensors[f"{side}_factor_{i}"] for i in range(count)), tensors[f"{side}_bias"]
    )
