"""What can be saved: one line of the table `KINDS` is one kind of thing, with how it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from expertsteer_lens._tables import register
from expertsteer_lens.errors import ArgumentError, ArtifactError

from .card import plan_card, result_card
from .codec import class_of, decode, encode
from .plan_file import check_fields, plan_class, read_plan, write_plan


@dataclass(frozen=True)
class SavedContent:
    """What a folder holds of a thing."""

    fields: dict[str, Any]
    """JSON-able, for `config.json`."""
    tensors: dict[str, Tensor]
    where: str = ""
    """Path of `config.json`, for messages; empty before it is written."""


ModelOf = Callable[[dict[str, Any]], Any]
"""What stands for a model of which only the facts are known."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of thing that `save` takes."""

    name: str
    """Of its class, and in files."""
    locate: Callable[[], type]
    """Gives the class; called when it is needed."""
    tensor_file: str
    write: Callable[[Any], SavedContent]
    read: Callable[[SavedContent, ModelOf], Any]
    """Raises `ArtifactError` for content that it does not understand."""
    card: Callable[[Any], str]
    """README.md of the folder."""
    takes_target: bool = False
    """Whether `load(..., target=model)` makes sense."""


def result_kind(name: str, *, takes_target: bool = False) -> Kind:
    """A kind that is written as `codec` says, by the name of a class registered there."""
    return Kind(
        name=name,
        locate=lambda: class_of(name),
        tensor_file="tensors.safetensors",
        write=_write_result,
        read=lambda content, model: _read_result(name, content, model),
        card=result_card,
        takes_target=takes_target,
    )


def register_kind(kind: Kind) -> None:
    """Let `save` and `load` take a kind of thing of yours.

    Raises:
        ArgumentError: the name is taken.

    >>> from dataclasses import dataclass
    >>> from expertsteer_lens.files.codec import CLASSES, register_class
    >>> @dataclass(frozen=True)
    ... class Probe:
    ...     weight: Tensor
    >>> register_class(Probe)
    >>> register_kind(result_kind("Probe"))
    >>> del KINDS["Probe"], CLASSES["Probe"]
    """
    register(KINDS, kind.name, kind, what="a kind", made_by=kind.locate())


def kind_of(thing: Any) -> Kind:
    """The kind of a thing.

    Raises:
        ArgumentError: it is of none.
    """
    kind = KINDS.get(type(thing).__name__)
    if kind is None or not isinstance(thing, kind.locate()):
        raise ArgumentError(
            f"a {type(thing).__name__} cannot be saved; save takes {', '.join(KINDS)}."
        )
    return kind


def _write_result(thing: Any) -> SavedContent:
    tensors: dict[str, Tensor] = {}
    return SavedContent({"content": encode(thing, tensors)}, tensors)


def _read_result(name: str, saved: SavedContent, model: ModelOf) -> Any:
    check_fields(saved.fields, {"content"}, saved.where)
    try:
        thing = decode(saved.fields["content"], saved.tensors, model)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{saved.where}: {error}") from error
    if type(thing).__name__ != name:
        raise ArtifactError(f"{saved.where} says it holds a saved {name}, but it does not.")
    return thing


_PLAN = Kind(
    name="SteeringPlan",
    locate=plan_class,
    tensor_file="vectors.safetensors",
    write=lambda plan: SavedContent(*write_plan(plan)),
    read=lambda content, model: read_plan(content.fields, content.tensors, content.where),
    card=plan_card,
)
KINDS = {
    kind.name: kind
    for kind in (
        _PLAN,
        result_kind("ActivationStore"),
        result_kind("Aligner"),
        result_kind("Calibration"),
        result_kind("Evaluation"),
        result_kind("ExpertSteering", takes_target=True),
        result_kind("FinishedReadings"),
        result_kind("FinishedRows"),
        result_kind("FitData"),
        result_kind("LayerPairMI"),
        result_kind("LayerPairs"),
        result_kind("RFM"),
    )
}
"""What `save` takes, by the name of its class."""
