"""Other people's vectors as plans: control vectors of repeng and llama.cpp, steering vectors of
steering-vectors and lm-evaluation-harness, bare tensors.

`READERS` holds the formats by name; `register_reader` adds one of yours.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens._tables import register
from expertsteer_lens.data.activations import ActivationStore, layer_of
from expertsteer_lens.errors import ArgumentError, ArtifactError, DataError, ExpertSteerError

if TYPE_CHECKING:
    from expertsteer_lens.interventions.positions import Positions

    from .plan import SteeringPlan

ForeignName = Literal["gguf", "lm_eval", "steering_vectors", "repeng", "tensors", "matrix"]
"""The formats that come with the package; `register_reader` adds others."""
Rows = Literal["blocks", "hidden_states"]
ROWS = ("blocks", "hidden_states")
Vectors = dict[str, Any]
"""What is added at strength 1, `[d]` or `[1, d]` of torch or numpy, by hook name."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One format, as `READERS` holds it."""

    matches: Callable[[Any], bool]
    """Whether this content is of the format: an object of the user's, or what is in the file."""
    read: Callable[[Any], Vectors]
    """Its vectors by hook name, strengths folded in; raises `ArgumentError` or `DataError` for
    what a plan cannot say."""


def plan_from_foreign(
    source: Any,
    *,
    format: ForeignName | str | None = None,
    layers: Sequence[int] | None = None,
    coefficient: float = 1.0,
    rows: Rows = "blocks",
    median_norms: ActivationStore | Mapping[str, float] | None = None,
    positions: Positions = "all",
) -> SteeringPlan:
    """See `SteeringPlan.from_foreign`."""
    from .plan import SteeringPlan

    check_number("coefficient", coefficient)
    check_choice("rows", rows, ROWS)
    is_file = isinstance(source, str | Path)
    content = _content(Path(source)) if is_file else source
    name = _format_of(content) if format is None else check_choice("format", format, READERS)
    if rows == "hidden_states":
        if name != "matrix":
            raise ArgumentError(f"rows='hidden_states' goes with a matrix, but this is {name!r}.")
        content = content[1:-1]
    found = READERS[name].read(content)
    vectors = {hook: _vector(hook, value) for hook, value in _chosen(found, layers).items()}
    vectors = {hook: value for hook, value in vectors.items() if bool(value.any())}
    if not vectors:
        raise ArgumentError("every vector is zero, so there is nothing to steer with.")
    norms = {hook: float(value.norm()) for hook, value in vectors.items()}
    plan = SteeringPlan.from_vectors(
        vectors,
        coefficient={hook: coefficient * norm for hook, norm in norms.items()},
        relative_to="unit",
        positions=positions,
    )
    if median_norms is not None:
        scaled = SteeringPlan.from_vectors(
            vectors, median_norms=median_norms, coefficient=coefficient, positions=positions
        )
        measured = [v.median_norm or 1.0 for v in scaled.vectors]
        plan = replace(
            scaled,
            vectors=tuple(
                replace(v, coefficient=coefficient * norms[v.hook_name] / size)
                for v, size in zip(scaled.vectors, measured, strict=True)
            ),
        )
    facts: dict[str, Any] = {"read_from": name}
    if is_file:
        facts["file"] = Path(source).name
    return replace(plan, provenance=facts)


def _format_of(content: Any) -> str:
    for name, reader in READERS.items():
        if reader.matches(content):
            return name
    raise ArgumentError(
        f"source must be a file or an object of one of {list(READERS)}, got "
        f"{type(content).__name__}; a dict {{layer: vector}} always works."
    )


def _chosen(found: Vectors, layers: Sequence[int] | None) -> Vectors:
    if layers is None:
        return found
    by_layer = {layer: [h for h in found if layer_of(h) == layer] for layer in layers}
    absent = [layer for layer, hooks in by_layer.items() if not hooks]
    if absent:
        there = sorted({layer_of(hook) for hook in found})
        raise ArgumentError(f"layers={list(layers)} asks for {absent}; there are {there}.")
    return {hook: found[hook] for hooks in by_layer.values() for hook in hooks}


def _vector(hook: str, value: Any) -> Float[Tensor, " d"]:
    tensor = torch.as_tensor(value).detach().to("cpu", torch.float64)
    if tensor.ndim == 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim != 1 or not bool(torch.isfinite(tensor).all()):
        raise DataError(
            f"the vector for {hook!r} must be finite and have one axis, got shape "
            f"{tuple(tensor.shape)}."
        )
    return tensor


def _hook(layer: Any, kind: str = "hook_resid_post") -> str:
    if int(layer) < 0:
        raise ArgumentError(f"layer {layer} counts from the end; count blocks from 0.")
    return f"blocks.{int(layer)}.{kind}"


# -- files ----------------------------------------------------------------------------------------


def _content(path: Path) -> Any:
    if not path.is_file():
        raise ArgumentError(f"there is no file {str(path)!r}.")
    readers = {
        ".gguf": _read_gguf,
        ".pt": _read_torch,
        ".pth": _read_torch,
        ".safetensors": _read_safetensors,
    }
    if path.suffix not in readers:
        raise ArgumentError(f"a file must end in one of {list(readers)}, got {path.name!r}.")
    return readers[path.suffix](path)


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path} is damaged or holds Python objects, which could run code and are not loaded; "
            "where it was made, save tensors alone: torch.save(dict(v.layer_activations), FILE)."
        ) from error
    except Exception as error:  # a damaged file is a program that may fail in any way
        raise ArtifactError(
            f"{path} is no file of torch.save ({type(error).__name__}: {error})."
        ) from error


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is no safetensors file: {error}.") from error


@dataclass(frozen=True)
class _ControlVector:
    """The tensors of a GGUF control vector."""

    directions: dict[int, Tensor]


def _read_gguf(path: Path) -> _ControlVector:
    try:
        import gguf
    except ImportError as error:
        raise ExpertSteerError(
            "GGUF files need gguf; install it with: pip install 'expertsteer-lens[export]'"
        ) from error
    try:
        tensors = gguf.GGUFReader(str(path)).tensors
    except Exception as error:  # of a damaged file gguf believes every offset and size
        raise ArtifactError(
            f"{path} is no GGUF file ({type(error).__name__}: {str(error)[:200]})."
        ) from error
    directions: dict[int, Tensor] = {}
    for tensor in tensors:
        match = re.fullmatch(r"direction\.(\d{1,6})", tensor.name)
        if match is None:
            raise ArtifactError(
                f"{path} is no control vector: it holds a tensor {tensor.name!r}, not "
                "'direction.N'."
            )
        try:
            data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError, TypeError) as error:
            raise ArtifactError(
                f"{path}: {tensor.name} cannot be read ({type(error).__name__}: {error})."
            ) from error
        directions[int(match[1])] = torch.tensor(data)
    return _ControlVector(directions)


# -- contents -------------------------------------------------------------------------------------


def _from_directions(content: Any) -> Vectors:
    """llama.cpp and repeng add `direction.N` after block N, counted from 0."""
    return {_hook(layer): value for layer, value in sorted(content.directions.items())}


_KINDS = {"decoder_block": "hook_resid_post", "self_attn": "hook_attn_out", "mlp": "hook_mlp_out"}


def _from_steering_vectors(content: Any) -> Vectors:
    fields: Mapping[str, Any] = content if isinstance(content, Mapping) else vars(content)
    kind = fields.get("layer_type", "decoder_block")
    check_choice("layer_type of a steering vector", kind, _KINDS)
    layers: Mapping[int, Any] = fields["layer_activations"]
    return {_hook(layer, _KINDS[kind]): value for layer, value in sorted(layers.items())}


def _from_lm_eval(content: Any) -> Vectors:
    out: Vectors = {}
    for name, entry in content.items():
        for key, allowed, reason in (
            ("action", "add", "it sets a projection, which no edit of a plan does"),
            ("head_index", None, "plans steer no single head"),
            ("bias", None, "the harness has it for 'clamp' only"),
        ):
            if entry.get(key, allowed) != allowed:
                raise ArgumentError(f"{key}={entry[key]!r} at {name!r} cannot be read: {reason}.")
        vector = torch.as_tensor(entry["steering_vector"]).double()
        out[_hook_from_path(name)] = vector * float(entry.get("steering_coefficient", 1.0))
    return out


_PARTS = {
    "": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "self_attn": "hook_attn_out",
    "attn": "hook_attn_out",
    "attention": "hook_attn_out",
}


def _hook_from_path(path: str) -> str:
    match = re.fullmatch(r"(?:.*\.)?(\d+)(?:\.([a-z_]+))?", path)
    if match is None or (match[2] or "") not in _PARTS:
        raise ArgumentError(
            f"{path!r} names no block, nor its attention or MLP; a plan adds there only."
        )
    return _hook(match[1], _PARTS[match[2] or ""])


def _from_tensors(content: Any) -> Vectors:
    return {
        name
        if isinstance(name, str) and ".hook_" in name
        else _hook(name)
        if isinstance(name, int)
        else _hook_from_path(str(name)): value
        for name, value in content.items()
    }


def _from_matrix(content: Any) -> Vectors:
    """Row i is added after block i."""
    matrix = torch.as_tensor(content)
    if matrix.ndim != 2:
        raise DataError(
            f"a matrix has a row a block, [n_layers, d]; got shape {tuple(matrix.shape)}. Give one "
            "vector as {layer: vector}."
        )
    return {_hook(layer): row for layer, row in enumerate(matrix) if bool(row.any())}


def _is_dict_of(content: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(map(check, content.values()))


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


READERS: dict[str, Reader] = {
    "gguf": Reader(matches=lambda x: isinstance(x, _ControlVector), read=_from_directions),
    "steering_vectors": Reader(
        matches=lambda x: (
            hasattr(x, "layer_activations") or (isinstance(x, Mapping) and "layer_activations" in x)
        ),
        read=_from_steering_vectors,
    ),
    "repeng": Reader(
        matches=lambda x: isinstance(getattr(x, "directions", None), Mapping),
        read=_from_directions,
    ),
    "lm_eval": Reader(
        matches=lambda x: _is_dict_of(
            x, lambda entry: isinstance(entry, Mapping) and "steering_vector" in entry
        ),
        read=_from_lm_eval,
    ),
    "tensors": Reader(matches=lambda x: _is_dict_of(x, _is_array), read=_from_tensors),
    "matrix": Reader(matches=_is_array, read=_from_matrix),
}
"""Every format by name, in the order in which they are tried; add to it with `register_reader`."""


def register_reader(name: str, reader: Reader) -> None:
    """Let `SteeringPlan.from_foreign` read a format of yours.

    Raises:
        ArgumentError: the name is taken by another reader.

    Example:
        >>> class Push:
        ...     layer, vector = 1, torch.tensor([3.0, 4.0])
        >>> register_reader(
        ...     "push",
        ...     Reader(
        ...         matches=lambda x: isinstance(x, Push),
        ...         read=lambda x: {f"blocks.{x.layer}.hook_resid_post": x.vector},
        ...     ),
        ... )
        >>> plan_from_foreign(Push()).vectors
        (blocks.1.hook_resid_post: add +5, d=2,)
        >>> del READERS["push"]
    """
    register(READERS, name, reader, what="a reader", made_by=reader.read)
