"""Plans for other programs: lm-evaluation-harness (a `.pt` file) and llama.cpp (a GGUF control
vector, which repeng reads too).

Both formats know one thing: a vector added after a block, at every token. A plan that does anything
else is refused. The coefficient is folded in, so the vector in the file is in the unit of the
target's activations and a scale of 1 is the plan.

`FORMATS` holds the formats by name; `register_format` adds one of yours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._checks import check_choice
from expertsteer_lens.errors import ArgumentError, ExpertSteerError
from expertsteer_lens.interventions.edits import centre, find_edit
from expertsteer_lens.steer.plan import SteeringPlan

UNIT = (
    "strength folded in: the unit is that of the target's residual stream, a scale of 1 is the plan"
)


def added_vectors(plan: SteeringPlan) -> dict[int, Float[Tensor, " d"]]:
    """What the plan adds after each block, float32 by 0-based layer; several vectors at one layer
    are summed.

    In the plan's basis: mean-free for a plan in centred coordinates. A coefficient of 0 adds
    nothing and is left out.

    Raises:
        ArgumentError: the plan is not a constant vector added after blocks at every token, or it
            adds nothing.

    Example:
        >>> import torch
        >>> vectors = {"blocks.1.hook_resid_post": torch.tensor([3.0, 4.0])}
        >>> added_vectors(SteeringPlan.from_vectors(vectors, coefficient=10.0, relative_to="unit"))
        {1: tensor([6., 8.])}
    """
    if not (isinstance(plan.positions, str) and plan.positions == "all"):
        raise ArgumentError(
            f"positions={plan.positions!r} cannot be exported: these formats steer every token; "
            "use plan.with_positions('all') if that is what you want."
        )
    out: dict[int, Tensor] = {}
    for v in plan.vectors:
        edit = find_edit(v.edit)
        for setting, is_beyond, reason in (
            (f"edit={v.edit!r}", not edit.is_constant, "only 'add' is a constant vector"),
            ("preserve_norm=True", v.preserve_norm, "what is added then depends on the activation"),
            (f"the gate {v.gate!r}", v.gate is not None, "these formats have no conditions"),
        ):
            if is_beyond:
                raise ArgumentError(f"{setting} at {v.hook_name!r} cannot be exported: {reason}.")
        block = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", v.hook_name)
        if not block:
            raise ArgumentError(
                f"hook {v.hook_name!r} cannot be exported: these formats add after a block, which "
                "is 'blocks.{layer}.hook_resid_post'."
            )
        if v.coefficient != 0:
            constant = edit.delta(v.direction, v.scale)
            delta = centre(constant) if plan.basis == "centred" else constant
            layer = int(block.group(1))
            out[layer] = out[layer] + delta if layer in out else delta
    if not out:
        raise ArgumentError(
            "every coefficient of the plan is 0, so there is nothing to export; see "
            "plan.with_coefficient."
        )
    return dict(sorted(out.items()))


def to_lm_eval(
    plan: SteeringPlan, path: str | Path, *, blocks: str = "layers", model: Any = None
) -> Path:
    """Write the steering file of lm-evaluation-harness: `lm_eval --model steered --model_args
    pretrained=...,steer_path=...`.

    Args:
        plan: what to export.
        path: ends in `.pt` or `.pth`.
        blocks: where the blocks are below the model's `base_model`: "layers" (Llama, Mistral, Qwen,
            Gemma, GPT-NeoX), "h" (GPT-2, GPT-J, Falcon), "decoder.layers" (OPT). A wrong one makes
            the harness stop with an error.
        model: the Hugging Face model itself, from which `blocks` is then read.

    The harness also adds the vector to padding, which attention ignores.

    Raises:
        ArgumentError: the plan cannot be expressed (see `added_vectors`), or the ending is another.
        HostError: no blocks are found in `model`.
    """
    import torch

    path = Path(path)
    if path.suffix not in (".pt", ".pth"):
        raise ArgumentError(
            "path must end in .pt or .pth, which is how the harness knows the format; got "
            f"{str(path)!r}."
        )
    vectors = added_vectors(plan)
    if model is not None:
        blocks = _blocks_below_base(model)
    content = {
        f"{blocks}.{layer}": {
            "steering_vector": vector.clone(),
            "steering_coefficient": 1.0,
            "action": "add",
            "bias": None,
            "head_index": None,
            "unit": UNIT,
        }
        for layer, vector in vectors.items()
    }
    torch.save(content, path)
    return path


def to_gguf(plan: SteeringPlan, path: str | Path, *, model_hint: str = "unknown") -> Path:
    """Write a GGUF control vector: `llama-cli --control-vector FILE`, or
    `repeng.ControlVector.import_gguf(FILE)`.

    llama.cpp adds the tensor `direction.N` after its block N, counted from 0, and has no place for
    block 0: N is our layer. For a target that llama.cpp runs in another numerical format
    (quantised), the plan's calibration is only approximate.

    Args:
        plan: what to export.
        path: the file to write.
        model_hint: architecture noted in the file (e.g. "llama"); llama.cpp does not check it.

    Raises:
        ArgumentError: the plan cannot be expressed (see `added_vectors`), or steers block 0.
        ExpertSteerError: the package gguf is not installed.
    """
    vectors = _vectors_for_gguf(plan)
    try:
        import gguf
    except ImportError as error:
        raise ExpertSteerError(
            "GGUF files need gguf; install it with: pip install 'expertsteer-lens[export]'"
        ) from error
    writer = gguf.GGUFWriter(str(path), "controlvector")
    writer.add_string("controlvector.model_hint", model_hint)
    writer.add_uint32("controlvector.layer_count", len(vectors))
    writer.add_description(UNIT)
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector.cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _vectors_for_gguf(plan: SteeringPlan) -> dict[int, Float[Tensor, " d"]]:
    vectors = added_vectors(plan)
    if 0 in vectors:
        raise ArgumentError(
            "a GGUF control vector cannot steer block 0; leave 'blocks.0.hook_resid_post' out of "
            "the plan."
        )
    return vectors


def _blocks_below_base(model: Any) -> str:
    """Path of the list of blocks from the model's `base_model`, where the harness begins."""
    from expertsteer_lens.hosts.blocks import find_blocks

    blocks = find_blocks(model).layers[0].removesuffix(".0")
    base = next((n for n, module in model.named_modules() if module is model.base_model), "")
    return blocks.removeprefix(f"{base}.") if base else blocks


# -- the table ------------------------------------------------------------------------------------

FormatName = Literal["lm_eval", "gguf"]
"""The formats that come with the package; `register_format` adds others."""


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """One way to write a plan for another program, as `FORMATS` holds it."""

    write: Callable[..., Path]
    """`write(plan, path, **options)` writes the file and returns its path."""
    check: Callable[[SteeringPlan], object]
    """Raises `ArgumentError` for a plan that the format cannot hold; what it returns is of no
    matter."""
    options: tuple[str, ...] = ()
    """Keywords that `write` takes."""


FORMATS: dict[str, ExportFormat] = {
    "lm_eval": ExportFormat(write=to_lm_eval, check=added_vectors, options=("blocks", "model")),
    "gguf": ExportFormat(write=to_gguf, check=_vectors_for_gguf, options=("model_hint",)),
}
"""Every format by name; add to it with `register_format`."""


def register_format(name: str, format: ExportFormat) -> None:
    """Make a format of your own known under `name`, to `export_plan` and the command line alike.

    Args:
        name: a plain word.
        format: how to write it, and what it cannot hold.

    Raises:
        ArgumentError: the name is taken by another format, or `format` is no `ExportFormat`.

    Example:
        >>> import json, pathlib, tempfile, torch
        >>> def to_json(plan, path):
        ...     vectors = {layer: v.tolist() for layer, v in added_vectors(plan).items()}
        ...     _ = pathlib.Path(path).write_text(json.dumps(vectors))
        ...     return pathlib.Path(path)
        >>> register_format("json", ExportFormat(write=to_json, check=added_vectors))
        >>> vectors = {"blocks.1.hook_resid_post": torch.tensor([3.0, 4.0])}
        >>> plan = SteeringPlan.from_vectors(vectors, coefficient=10.0, relative_to="unit")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_plan(plan, f"{folder}/plan.json", format="json").read_text()
        '{"1": [6.0, 8.0]}'
        >>> del FORMATS["json"]
    """
    if not isinstance(format, ExportFormat):
        raise ArgumentError(
            f"format must be an ExportFormat(write=..., check=...), got {format!r}."
        )
    if FORMATS.get(name, format) != format:
        raise ArgumentError(f"there is already a format {name!r}; choose another name.")
    FORMATS[name] = format


def export_plan(
    plan: SteeringPlan, path: str | Path, *, format: FormatName | str, **options: Any
) -> Path:
    """Write the plan in a format of `FORMATS`; nothing is written if the format cannot hold it.

    Args:
        plan: what to export.
        path: the file to write.
        format: "lm_eval", "gguf", or one that was registered.
        options: keywords of that format: those of `to_lm_eval` and `to_gguf`.

    Raises:
        ArgumentError: unknown format or option, or a plan that the format cannot hold.
    """
    chosen = FORMATS[check_choice("format", format, FORMATS)]
    for name in options:
        check_choice(f"option of {format!r}", name, chosen.options)
    chosen.check(plan)
    return chosen.write(plan, path, **options)
