"""Load a model by name or folder into one of the hosts; used by the command line and the
notebooks."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from expertsteer_lens._checks import check_choice
from expertsteer_lens._progress import is_shown
from expertsteer_lens.errors import ArgumentError, HostError

from .model_copy import no_progress_bar
from .table import HOSTS

LoadedAs = Literal["transformer_lens", "nnsight", "huggingface"]
"""The hosts of this package that a model can be loaded into."""
LOADABLE = {name: host.wrap for name, host in HOSTS.items() if host.wrap is not None}
"""Every such host by name, and how a Hugging Face model becomes one of its objects."""


def load_model(
    name_or_path: str,
    *,
    host: LoadedAs = "transformer_lens",
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A model from a local folder, a GGUF file or a hub id, in evaluation mode, with its tokenizer
    attached.

    Args:
        name_or_path: folder, or hub id (the only case in which anything may be downloaded); or a
            `.gguf` file, whose weights are dequantised to `dtype`. Such a model is called by the
            name of its file and "dequantised", in results too: it is not the model that the file
            was made from.
        host: "transformer_lens" (TransformerBridge), "nnsight" (TransformersModel) or "huggingface"
            (the plain model, with the tokenizer as attribute `tokenizer`).
        dtype: a torch dtype by name.
        device: default "cuda" where available, else "cpu".
        trust_remote_code: passed to transformers; runs code that ships with the model.

    Raises:
        ArgumentError: an unknown host or dtype, or a folder or GGUF file that is not there or holds
            no model.
        HostError: a GGUF file, and the package gguf is not installed.

    Example:
        >>> import tempfile
        >>> from expertsteer_lens import zoo
        >>> small = zoo.load("target", host="huggingface")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     small.save_pretrained(folder)
        ...     _ = small.tokenizer.save_pretrained(folder)
        ...     model = load_model(folder, host="huggingface", dtype="bfloat16")
        >>> next(model.parameters()).dtype
        torch.bfloat16
    """
    check_choice("host", host, LOADABLE)
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype):
        raise ArgumentError(
            f"dtype must name a torch dtype such as 'float32' or 'bfloat16', got {dtype!r}."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = name_or_path
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    # A folder's own name, not where it lies on this machine.
    label = Path(name_or_path).name if Path(name_or_path).is_dir() else name_or_path
    if name_or_path.endswith(".gguf"):
        file = Path(name_or_path)
        if not file.is_file():
            raise ArgumentError(f"name_or_path: there is no GGUF file {name_or_path!r}.")
        if find_spec("gguf") is None:
            raise HostError(
                "a GGUF file needs the package gguf; install it with: pip install "
                "'expertsteer-lens[export]'"
            )
        where, label = str(file.parent), f"{file.name} (dequantised)"
        options["gguf_file"] = file.name
    else:
        _check_place(name_or_path)
    # The loader's own bars know no log files.
    with nullcontext() if is_shown(None) else no_progress_bar():
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch_dtype, **options)
    if "gguf_file" in options:
        _forget_quantisation(model)
        model.config.name_or_path = label
    model = model.to(device).eval()
    return wrap_model(model, tokenizer, host=host, name=label, trust_remote_code=trust_remote_code)


def _check_place(name: str) -> None:
    """Raise `ArgumentError` for a folder without a model, and for a path to nothing: the loader
    would take that for a hub id, ask the hub several times, and not say what was asked for."""
    place = Path(name)
    if place.is_dir():
        configs = ("config.json", "adapter_config.json")
        if not any((place / config).is_file() for config in configs):
            raise ArgumentError(
                f"no model in {name!r}: the folder holds no config.json; give the one that "
                "`save_pretrained` wrote."
            )
    elif place.exists():
        raise ArgumentError(
            f"no model in {name!r}: it is a file; give a folder, a .gguf file or a hub id."
        )
    elif name.startswith((".", "~", "/")) or place.is_absolute() or name.count("/") > 1:
        raise ArgumentError(
            f"no model in {name!r}: there is no such folder, and a hub id has the form owner/name."
        )
    elif "/" in name and place.parent.is_dir():
        raise ArgumentError(
            f"no model in {name!r}: there is no such folder, but there is a folder "
            f"{str(place.parent)!r}, so the name is not asked for at the hub; correct the path, or "
            "run from another folder if a hub id is meant."
        )


def _forget_quantisation(model: Any) -> None:
    """The weights are plain now; what is left of the format would stop `save_pretrained`."""
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def wrap_model(
    model: Any,
    tokenizer: Any,
    *,
    host: LoadedAs | str,
    name: str,
    trust_remote_code: bool = False,
) -> Any:
    """A Hugging Face model as an object of the host asked for.

    Args:
        model: on its device, in evaluation mode. TransformerLens works on it in place.
        tokenizer: its tokenizer; "huggingface" keeps it as the attribute `tokenizer`.
        host: "transformer_lens" (TransformerBridge, raw weights), "nnsight" (TransformersModel) or
            "huggingface" (the model itself).
        name: what TransformerLens calls the model.
        trust_remote_code: whether the tokenizer may run code that ships with it.

    Raises:
        ArgumentError: unknown host.
    """
    check_choice("host", host, LOADABLE)
    return LOADABLE[host](model, tokenizer, name, trust_remote_code)
