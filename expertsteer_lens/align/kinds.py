"""The table of aligner kinds, and how to add one."""

from __future__ import annotations

from typing import Literal

from expertsteer_lens._tables import register

from .anchored import ANCHORED_AUTOENCODER
from .autoencoder import AUTOENCODER
from .identity import IDENTITY
from .kind import Kind
from .procrustes import PROCRUSTES
from .ridge import RIDGE

AlignerKind = Literal["anchored_autoencoder", "ridge", "procrustes", "autoencoder", "identity"]
"""The built-in kinds; registered ones have names of their own."""

KINDS: dict[str, Kind] = {
    "anchored_autoencoder": ANCHORED_AUTOENCODER,
    "ridge": RIDGE,
    "procrustes": PROCRUSTES,
    "autoencoder": AUTOENCODER,
    "identity": IDENTITY,
}
"""Every kind by the name it has in `AlignerConfig.kind`."""


def register_aligner(name: str, kind: Kind) -> None:
    """Make a kind known under `name`: `AlignerConfig(kind=name)` then works wherever a
    configuration of an aligner is taken. Once per process, and before a configuration that names it
    is loaded from a file.

    Args:
        name: of the kind; none that is taken.
        kind: a `RowKind` (any map fitted on paired rows), a `MomentKind` (a closed form of second
            moments), or a `Kind` of your own.

    Raises:
        ArgumentError: the name is taken by another kind.

    Example:
        A map that is not affine: the mean of the target's states, weighted by how near the anchors
        are to the state that is mapped (Nadaraya and Watson, 1964).

        >>> from dataclasses import dataclass
        >>> import torch
        >>> from expertsteer_lens.align import AlignerConfig, RowKind, fit_aligner
        >>> @dataclass(frozen=True)
        ... class NearAnchors:
        ...     expert: torch.Tensor
        ...     target: torch.Tensor
        ...     width: float
        ...     d_in = property(lambda self: self.expert.shape[1])
        ...     d_out = property(lambda self: self.target.shape[1])
        ...     def __call__(self, x):
        ...         near = -torch.cdist(x, self.expert.to(x)) / self.width
        ...         return near.softmax(1) @ self.target.to(x)
        ...     def to(self, *args, **kwargs):
        ...         moved = [t.to(*args, **kwargs) for t in (self.expert, self.target)]
        ...         return NearAnchors(*moved, self.width)
        >>> def fit_near_anchors(expert, target, config, seed):
        ...     return NearAnchors(expert, target, config.option("width")), None
        >>> kind = RowKind(fit_rows=fit_near_anchors, options={"width": 0.1})
        >>> register_aligner("near_anchors", kind)
        >>> angle = torch.linspace(0.0, 6.0, 200)[:, None]
        >>> config = AlignerConfig(kind="near_anchors", options={"width": 0.05})
        >>> fit_aligner(angle, torch.cat([angle.sin(), angle.cos()], 1), config).quality.r2 > 0.95
        True
        >>> del KINDS["near_anchors"]  # only here, so that the example leaves nothing behind
    """
    made_by = getattr(kind, "fit_rows", None) or type(kind)
    register(KINDS, name, kind, what="an aligner kind", made_by=made_by)


def applicable_kinds(d_expert: int, d_target: int) -> tuple[str, ...]:
    """The kinds that can be fitted between layers of these widths, registered ones included.

    >>> applicable_kinds(8, 6)
    ('anchored_autoencoder', 'ridge', 'procrustes', 'autoencoder')
    """
    equal = d_expert == d_target
    return tuple(name for name, kind in KINDS.items() if equal or not kind.needs_equal_widths)
