"""The table of hosts: which objects each of them takes, and how a model becomes such an object."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from .base import Host


@dataclass(frozen=True, kw_only=True)
class HostEntry:
    """One host, as `HOSTS` holds it; its module is imported when it is used."""

    module: str
    """Of this folder, with a dot in front."""
    name: str
    """Of its class in that module."""
    claims: Callable[[Any], bool]
    """Whether a model is one of its own. The first host of the table that says so has it."""
    because: str
    """What it sees in such a model, in words."""
    options: tuple[str, ...] = ()
    """Of `tokenizer` and `remote` those that it takes."""
    wrap: Callable[[Any, Any, str, bool], Any] | None = None
    """(Hugging Face model, tokenizer, name, trust_remote_code) -> an object of this host; None: no
    model is loaded into it."""

    def cls(self) -> Callable[..., Host]:
        """Its class."""
        found: Callable[..., Host] = getattr(
            importlib.import_module(self.module, __package__), self.name
        )
        return found


# -- which objects ---------------------------------------------------------------------------------


def _is_transformer_lens(model: Any) -> bool:
    cfg = getattr(model, "cfg", None)
    reads_tokens = (
        hasattr(cfg, "d_model") and getattr(cfg, "d_vocab", -1) > 0
    )  # vision and audio bridges do not
    return not _is_nnsight(model) and hasattr(model, "hook_dict") and reads_tokens


def _is_nnsight(model: Any) -> bool:
    return any(base.__module__.split(".")[0] == "nnsight" for base in type(model).__mro__)


def _is_hooked_module(model: Any) -> bool:
    return isinstance(model, torch.nn.Module) and isinstance(
        getattr(model, "hook_dict", None), dict
    )


def _is_huggingface(model: Any) -> bool:
    return (
        isinstance(model, torch.nn.Module)
        and hasattr(model, "config")
        and callable(getattr(model, "get_output_embeddings", None))
    )


# -- how a model becomes one -----------------------------------------------------------------------


def _as_bridge(model: Any, tokenizer: Any, name: str, trust_remote_code: bool) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    from .cache_names import agree_on_cache_name

    # TransformerLens loads the tokenizer once more from these, and would ask on the terminal.
    loads_with = getattr(tokenizer, "init_kwargs", {})
    if trust_remote_code:
        loads_with["trust_remote_code"] = True
    said = "trust_remote_code" in loads_with
    loads_with.setdefault("trust_remote_code", False)
    with nothing_installed():
        bridge = TransformerBridge.boot_transformers(
            name,  # only a label, as model and tokenizer are given
            hf_model=model,
            tokenizer=tokenizer,
            device=str(next(model.parameters()).device),
            trust_remote_code=trust_remote_code,
        )
    if not said:  # else `save_pretrained` would write it into the tokenizer's files
        del loads_with["trust_remote_code"]
    agree_on_cache_name(bridge, bridge.original_model)  # before anybody generates with it
    return bridge


def _as_nnsight(model: Any, tokenizer: Any, name: str, trust_remote_code: bool) -> Any:
    from nnsight import TransformersModel

    return TransformersModel(model, tokenizer=tokenizer)


def _as_itself(model: Any, tokenizer: Any, name: str, trust_remote_code: bool) -> Any:
    model.tokenizer = tokenizer
    return model


@contextmanager
def nothing_installed() -> Iterator[None]:
    """Inside, TransformerLens installs no package.

    Where a multimodal model's processor cannot be loaded it runs `pip install torchvision`, which
    brings a torch of its own choice in place of the one that is running. Without torchvision the
    Bridge has no processor, as it has none where the installation fails.
    """
    try:
        from transformer_lens.model_bridge.sources.transformers import helpers
    except ImportError:  # an older TransformerLens
        yield
        return
    installs = getattr(helpers, "_ensure_torchvision", None)
    if installs is None:
        yield
        return
    helpers._ensure_torchvision = lambda: find_spec("torchvision") is not None
    try:
        yield
    finally:
        helpers._ensure_torchvision = installs


# -- the table -------------------------------------------------------------------------------------

HOSTS: dict[str, HostEntry] = {
    "transformer_lens": HostEntry(
        module=".transformer_lens",
        name="TransformerLensHost",
        claims=_is_transformer_lens,
        because="it has hook_dict and cfg.d_vocab",
        wrap=_as_bridge,
    ),
    "nnsight": HostEntry(
        module=".nnsight",
        name="NNsightHost",
        claims=_is_nnsight,
        because="its class is nnsight's",
        options=("tokenizer", "remote"),
        wrap=_as_nnsight,
    ),
    "hooked_module": HostEntry(
        module=".hooked_module",
        name="HookedModuleHost",
        claims=_is_hooked_module,
        because="it has hook_dict, and no vocabulary",
    ),
    "huggingface": HostEntry(
        module=".huggingface",
        name="HuggingFaceHost",
        claims=_is_huggingface,
        because="it is a torch module with config and get_output_embeddings",
        options=("tokenizer",),
        wrap=_as_itself,
    ),
}
"""Every host by the name it has as `Host.kind`, in the order in which they are asked."""
