"""Hosts: one way to read, steer and run a TransformerLens, nnsight or Hugging Face model.

A host is chosen by what the object can do, never by its class, and nothing is imported for a host that is not used.
The single primitive is `Host.intervene`: capture, steering and gradients are all built on it.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from expertsteer_lens.errors import HostError

from ._base import Host
from ._capture import capture
from ._measure import fingerprints_match
from ._parts import EditFn, Observer, Registration, TokenBatch


def as_host(model: Any) -> Host:
    """The host for `model`: a TransformerBridge, HookedTransformer, nnsight model or Hugging Face causal model.

    Cheap: what a host measures (basis, fingerprint) is remembered per model for as long as its weights stay the same.

    Raises:
        HostError: the object is none of these; the message says what was looked for.
    """
    if isinstance(model, Host):
        return model
    for module, cls, claims in (
        (".transformer_lens", "TransformerLensHost", _is_transformer_lens),
        (".nnsight", "NNsightHost", _is_nnsight),
        (".huggingface", "HuggingFaceHost", _is_huggingface),
    ):
        if claims(model):
            return getattr(importlib.import_module(module, __name__), cls)(model)
    raise HostError(
        f"cannot steer a {type(model).__module__}.{type(model).__name__}: it is no TransformerLens model (no hook_dict and "
        "cfg), no nnsight model, and no Hugging Face causal model (no config and get_output_embeddings). "
        "Pass a TransformerBridge, HookedTransformer, nnsight model or AutoModelForCausalLM."
    )


def _is_transformer_lens(model: Any) -> bool:
    return not _is_nnsight(model) and hasattr(model, "hook_dict") and hasattr(getattr(model, "cfg", None), "d_model")


def _is_nnsight(model: Any) -> bool:
    return any(base.__module__.split(".")[0] == "nnsight" for base in type(model).__mro__)


def _is_huggingface(model: Any) -> bool:
    return (
        isinstance(model, torch.nn.Module)
        and hasattr(model, "config")
        and callable(getattr(model, "get_output_embeddings", None))
    )


__all__ = [
    "EditFn",
    "Host",
    "Observer",
    "Registration",
    "TokenBatch",
    "as_host",
    "capture",
    "fingerprints_match",
]
