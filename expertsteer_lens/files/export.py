"""Plans for other programs: lm-evaluation-harness (a `.pt` file) and llama.cpp (a GGUF control
vector, which repeng reads too).

Both formats know one thing: a vector added after a block, at every token. A plan that does anything
else is refused. The strength is folded in, so the vector in the file is in the unit of the target's
activations and a scale of 1 is the plan."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, ExpertSteerError
from expertsteer_lens.interventions.edits import centre
from expertsteer_lens.steer.plan import SteeringPlan

FORMATS = ("lm_eval", "gguf")
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
    """
    if not (isinstance(plan.positions, str) and plan.positions == "all"):
        raise ArgumentError(
            f"positions={plan.positions!r} cannot be exported: these formats steer every token; "
            "use "
            "plan.with_positions('all') if that is what you want."
        )
    out: dict[int, Tensor] = {}
    for v in plan.vectors:
        for what, unexpected, remedy in (
            (f"edit={v.edit!r}", v.edit != "add", "only 'add' is a constant vector"),
            ("preserve_norm=True", v.preserve_norm, "what is added then depends on the activation"),
            (f"the gate {v.gate!r}", v.gate is not None, "these formats have no conditions"),
        ):
            if unexpected:
                raise ArgumentError(f"{what} at {v.hook_name!r} cannot be exported: {remedy}.")
        found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", v.hook_name)
        if not found:
            raise ArgumentError(
                f"hook {v.hook_name!r} cannot be exported: these formats add after a block, which "
                "is "
                "'blocks.{layer}.hook_resid_post'."
            )
        if v.coefficient != 0:
            delta = centre(v.delta) if plan.basis == "centred" else v.delta
            layer = int(found.group(1))
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
    found = added_vectors(plan)
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
        for layer, vector in found.items()
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
    found = added_vectors(plan)
    if 0 in found:
        raise ArgumentError(
            "a GGUF control vector cannot steer block 0; leave 'blocks.0.hook_resid_post' out of "
            "the plan."
        )
    try:
        import gguf
    except ImportError as error:
        raise ExpertSteerError(
            "GGUF files need gguf; install it with: pip install 'expertsteer-lens[export]'"
        ) from error
    writer = gguf.GGUFWriter(str(path), "controlvector")
    writer.add_string("controlvector.model_hint", model_hint)
    writer.add_uint32("controlvector.layer_count", len(found))
    writer.add_description(UNIT)
    for layer, vector in found.items():
        writer.add_tensor(f"direction.{layer}", vector.cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _blocks_below_base(model: Any) -> str:
    from expertsteer_lens.hosts.blocks import find_blocks

    found = find_blocks(model)
    first = found.layers[0].removesuffix(".0")
    return first.removeprefix(f"{found.base}.") if found.base else first
