"""Plans for other programs: lm-evaluation-harness and hotwire for vLLM (`.pt` files), llama.cpp (a
GGUF control vector, which repeng reads too), TransformerLens' remote bridges (specs), and every
program that runs a checkpoint (merged weights).

All know one thing: a vector added after a block, at every token. A plan that does anything else is
refused. The coefficient is folded in, so the vector in the file is in the unit of the target's
activations and a scale of 1 is the plan. `SteeringPlan.from_foreign` reads these files back.

steering-vectors takes `SteeringVector(layer_activations=added_vectors(plan))`. Neither it (it wants
transformers < 5) nor repeng (numpy < 2) can be installed beside this package: take the vectors to
their environment as a file.

`FORMATS` holds the formats by name; `register_format` adds one of yours.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from expertsteer_lens._atomic import named, write_file, write_folder
from expertsteer_lens._checks import check_choice, shown
from expertsteer_lens._tables import register
from expertsteer_lens.errors import ArgumentError, ExpertSteerError
from expertsteer_lens.steer.constant import constant_additions
from expertsteer_lens.steer.plan import SteeringPlan

UNIT = (
    "strength folded in: the unit is that of the target's residual stream, a scale of 1 is the plan"
)


def added_vectors(plan: SteeringPlan) -> dict[int, Float[Tensor, " d"]]:
    """What the plan adds after each block, float32 by 0-based layer; several vectors at one layer
    are summed. What enters block i + 1 is what leaves block i.

    In the plan's basis: mean-free for a plan in centred coordinates. A coefficient of 0 adds
    nothing and is left out.

    Raises:
        ArgumentError: the plan is not a constant vector added after blocks at every token, adds
            nothing, or steers a layer its target does not have.

    Example:
        >>> import torch
        >>> vectors = {"blocks.1.hook_resid_post": torch.tensor([3.0, 4.0])}
        >>> added_vectors(SteeringPlan.from_vectors(vectors, coefficient=10.0, relative_to="unit"))
        {1: tensor([6., 8.])}
    """
    out: dict[int, Tensor] = {}
    for name, delta in constant_additions(plan).items():
        block = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", name)
        if not block:
            raise ArgumentError(
                f"hook {name!r} cannot be exported: these formats add after a block, which "
                "is 'blocks.{layer}.hook_resid_post'."
            )
        out[int(block.group(1))] = delta
    n_layers = plan.target.get("n_layers")
    if isinstance(n_layers, int) and max(out) >= n_layers:
        raise ArgumentError(
            f"the plan steers layer {max(out)}, but its target has {n_layers} layers (0 to "
            f"{n_layers - 1})."
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

    The harness also adds the vector to padding, which attention ignores. It puts a BOS token before
    a prompt only where the tokenizer does so by itself; this package does wherever the tokenizer
    has one. `add_bos_token=True` in `model_args` makes both alike. The number type is the
    checkpoint's unless `dtype=` says another.

    Raises:
        ArgumentError: the plan cannot be expressed (see `added_vectors`), or the ending is another.
        ArtifactError: the file cannot be written; what was there is as it was.
        HostError: no blocks are found in `model`.
    """
    path = FORMATS["lm_eval"].check_place(path)
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
    write_file(path, lambda file: _save(content, file))
    return path


def to_hotwire(
    plan: SteeringPlan, path: str | Path, *, n_layers: int | None = None, model: Any = None
) -> Path:
    """Write the matrix `[n_layers, d_model]` that hotwire (vLLM) loads from `HOTWIRE_VECTORS`.

    Row i is added after block i; rows the plan does not steer are 0. Hotwire steers the layers that
    a request names, so a plan of several layers takes an entry for each, at scale 1:
    `{"hotwire": '[{"id": FILE_STEM, "layer": 5, "scale": 1.0}, ...]'}`.

    Args:
        plan: what to export.
        path: ends in `.pt`; its stem is the id by which requests name it.
        n_layers: of the target; default: what the plan says of its target.
        model: the target itself, in place of `n_layers`.

    Raises:
        ArgumentError: the plan cannot be expressed (see `added_vectors`), the ending is another, or
            nothing says how many layers there are.
        ArtifactError: the file cannot be written; what was there is as it was.
    """
    import torch

    path = FORMATS["hotwire"].check_place(path)
    vectors = added_vectors(plan)
    if model is not None:
        from expertsteer_lens.hosts import as_host

        n_layers = as_host(model).n_layers
    n_layers = plan.target.get("n_layers") if n_layers is None else n_layers
    if not isinstance(n_layers, int) or n_layers <= max(vectors):
        raise ArgumentError(
            f"n_layers must say how many layers the target has, more than {max(vectors)}; got "
            f"{n_layers!r}."
        )
    matrix = torch.zeros(n_layers, next(iter(vectors.values())).shape[0])
    for layer, vector in vectors.items():
        matrix[layer] = vector
    write_file(path, lambda file: _save(matrix, file))
    return path


def to_specs(plan: SteeringPlan) -> dict[str, dict[str, Any]]:
    """The plan as TransformerLens says interventions to its remote bridges (vLLM, Inspect):
    `bridge.forward(ids, intervene=specs)`. Values are lists of `d_model` numbers, added at every
    token.

    Raises:
        ArgumentError: the plan cannot be expressed, see `added_vectors`.

    Example:
        >>> import torch
        >>> vectors = {"blocks.1.hook_resid_post": torch.tensor([3.0, 4.0])}
        >>> to_specs(SteeringPlan.from_vectors(vectors, coefficient=10.0, relative_to="unit"))
        {'blocks.1.hook_out': {'op': 'add', 'value': [6.0, 8.0]}}
    """
    return {
        f"blocks.{layer}.hook_out": {"op": "add", "value": vector.tolist()}
        for layer, vector in added_vectors(plan).items()
    }


def to_merged(
    plan: SteeringPlan, path: str | Path, *, model: Any = None, allow_mismatch: bool = False
) -> Path:
    """Write a checkpoint of the target with the plan in its weights, and its tokenizer: for vLLM,
    SGLang, or plain transformers. See `SteeringPlan.bake` for the models that can hold one.

    Args:
        plan: what to export.
        path: a folder, new or empty.
        model: the target, a causal model of transformers.
        allow_mismatch: bake into a model other than the one the plan was made for.

    Raises:
        ArgumentError: the plan cannot be expressed, no model is given, or something is at `path`.
        ArtifactError: the folder cannot be written.
        HostError: the model cannot hold it.
    """
    path = Path(path)
    if model is None:
        raise ArgumentError("format 'merged' needs model=, the target whose weights take the plan.")

    def check(there: Path) -> None:
        if there.exists() and (not there.is_dir() or any(there.iterdir())):
            raise ArgumentError(f"{path} exists and is not an empty folder; choose another.")

    with named(path):
        check(path)
    baked = plan.bake(model, allow_mismatch=allow_mismatch)
    from expertsteer_lens.hosts import as_host

    def write(folder: Path) -> None:
        from safetensors import SafetensorError

        try:
            baked.save_pretrained(folder)
        except SafetensorError as error:  # its name for a full disk
            raise OSError(str(error)) from error
        tokenizer = as_host(baked).tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        # safetensors makes files that nobody else may read, whatever this process's umask says.
        for file in folder.glob("*.safetensors"):
            shutil.copymode(folder / "config.json", file)

    write_folder(path, write, ours=(), check=check)
    return path


def to_gguf(plan: SteeringPlan, path: str | Path, *, model_hint: str = "unknown") -> Path:
    """Write a GGUF control vector: `llama-cli --control-vector FILE`, or
    `repeng.ControlVector.import_gguf(FILE)`, whose layers are `list(vector.directions)`.

    llama.cpp adds the tensor `direction.N` after its block N, counted from 0, and has no place for
    block 0: N is our layer. For a target that llama.cpp runs in another numerical format
    (quantised), the plan's calibration is only approximate.

    Args:
        plan: what to export.
        path: the file to write.
        model_hint: architecture noted in the file (e.g. "llama"); llama.cpp does not check it.

    Raises:
        ArgumentError: the plan cannot be expressed (see `added_vectors`), or steers block 0.
        ArtifactError: the file cannot be written; what was there is as it was.
        ExpertSteerError: the package gguf is not installed.
    """
    vectors = _vectors_for_gguf(plan)
    try:
        import gguf
    except ImportError as error:
        raise ExpertSteerError(
            "GGUF files need gguf; install it with: pip install 'expertsteer-lens[export]'"
        ) from error

    path = FORMATS["gguf"].check_place(path)

    def write(file: Path) -> None:
        writer = gguf.GGUFWriter(str(file), "controlvector")
        writer.add_string("controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", len(vectors))
        writer.add_description(UNIT)
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector.cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_file(path, write)
    return path


def _save(content: Any, file: Path) -> None:
    """`torch.save`, whose own writer names no error of the disk."""
    import torch

    made = io.BytesIO()
    torch.save(content, made)
    file.write_bytes(made.getvalue())


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

FormatName = Literal["lm_eval", "gguf", "hotwire", "merged"]
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
    required: tuple[str, ...] = ()
    """Those that must be given."""
    endings: tuple[str, ...] = ()
    """Of the name of the file that it writes; none: whatever is given, or a folder."""
    is_folder: bool = False
    """Whether it writes a folder."""

    def check_place(self, path: str | Path) -> Path:
        """The path, where this can be written.

        Raises:
            ArgumentError: a name with another ending, by which its reader would not know it, a
                folder in the place of a file, or a folder that holds something.
        """
        out = Path(path)
        if self.endings and out.suffix not in self.endings:
            raise ArgumentError(
                f"path must end in {' or '.join(self.endings)}, got {shown(str(out))}."
            )
        if not self.is_folder and out.is_dir():
            raise ArgumentError(f"path {shown(str(out))} is a folder; give a file.")
        if self.is_folder and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ArgumentError(
                f"path {shown(str(out))} exists and is not an empty folder; choose another."
            )
        return out


FORMATS: dict[str, ExportFormat] = {
    "lm_eval": ExportFormat(
        write=to_lm_eval, check=added_vectors, options=("blocks", "model"), endings=(".pt", ".pth")
    ),
    "gguf": ExportFormat(
        write=to_gguf, check=_vectors_for_gguf, options=("model_hint",), endings=(".gguf",)
    ),
    "hotwire": ExportFormat(
        write=to_hotwire, check=added_vectors, options=("n_layers", "model"), endings=(".pt",)
    ),
    "merged": ExportFormat(
        write=to_merged,
        check=lambda plan: constant_additions(plan, can="baked", they="weights"),
        options=("model", "allow_mismatch"),
        required=("model",),
        is_folder=True,
    ),
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
    register(FORMATS, name, format, what="a format", made_by=format.write)


def export_plan(
    plan: SteeringPlan, path: str | Path, *, format: FormatName | str, **options: Any
) -> Path:
    """Write the plan in a format of `FORMATS`; nothing is written if the format cannot hold it.

    Args:
        plan: what to export.
        path: the file to write.
        format: "lm_eval", "gguf", or one that was registered.
        options: keywords of that format: those of `to_lm_eval`, `to_gguf`, `to_hotwire`,
            `to_merged`.

    Raises:
        ArgumentError: unknown format or option, one that the format needs is missing, or a plan
            that the format cannot hold.
    """
    chosen = FORMATS[check_choice("format", format, FORMATS)]
    for name in options:
        check_choice(f"option of {format!r}", name, chosen.options)
    chosen.check(plan)
    chosen.check_place(path)
    for name in chosen.required:
        if options.get(name) is None:
            raise ArgumentError(f"format={format!r} needs {name}=, which was not given.")
    return chosen.write(plan, path, **options)
