"""Hosts: one way to read, steer and run a TransformerLens, nnsight or Hugging Face model.

A host is chosen by what the object can do, never by its class, and nothing is imported for a host
that is not used. The single primitive is `Host.intervene`: capture, steering and gradients are all
built on it."""

from __future__ import annotations

from typing import Any

from expertsteer_lens.errors import ArgumentError, HostError

from .base import Host
from .compiled import uncompiled
from .facts import fingerprints_match
from .hooked_module import capture_tensors
from .parts import EditFn, Observer, Registration, TokenBatch
from .reading import capture, texts_sha256
from .table import HOSTS


def as_host(model: Any, *, tokenizer: Any = None, remote: bool | str = False) -> Host:
    """The host for `model`: a TransformerBridge, HookedTransformer, nnsight model or Hugging Face
    causal model.

    Another network with TransformerLens hook points (vision, audio, a `HookedRootModule` of yours)
    gets a host that can be captured (`capture_tensors`) and steered, but takes no texts.

    Cheap: what a host measures (basis, fingerprint) is remembered per model for as long as its
    weights stay the same. `repr` of the host says which it is and why.

    Args:
        model: the model, or a host, which is returned as it is.
        tokenizer: for a Hugging Face or nnsight model that has none; remembered for this model.
        remote: for an nnsight model that runs on a server: True, "local" (nnsight's rehearsal) or
            an address.

    Raises:
        HostError: the object is none of these; the message says what was looked for.
        ArgumentError: `tokenizer` or `remote` on a host that cannot use it.

    Example:
        >>> from expertsteer_lens import zoo
        >>> host = as_host(zoo.load("target", host="huggingface"))
        >>> host.kind, host.n_layers, host.d_model
        ('huggingface', 5, 96)
    """
    if isinstance(model, Host):
        return model
    model = uncompiled(model)
    if any(base.__name__ == "RemoteBridge" for base in type(model).__mro__):
        raise HostError(
            f"a {type(model).__name__} runs its model elsewhere, where no function of this machine "
            "can act; load the model here, or steer with the bridge's own `intervene=`."
        )
    options = {
        name: value for name, value in (("tokenizer", tokenizer), ("remote", remote)) if value
    }
    for entry in HOSTS.values():
        if entry.claims(model):
            for name in set(options) - set(entry.options):
                raise ArgumentError(
                    f"{name} cannot be given for a {type(model).__name__}; leave it out."
                )
            host: Host = entry.cls()(model, **options)
            host.reason = f"{type(model).__name__}, because {entry.because}"
            return host
    raise HostError(
        f"cannot steer a {type(model).__module__}.{type(model).__name__}: it is no TransformerLens "
        "model (no hook_dict and "
        "cfg), no nnsight model, no Hugging Face causal model (no config and "
        "get_output_embeddings), and no other network with "
        "hook points (no hook_dict). Pass a TransformerBridge, HookedTransformer, nnsight model or "
        "AutoModelForCausalLM."
    )


__all__ = [
    "EditFn",
    "Host",
    "Observer",
    "Registration",
    "TokenBatch",
    "as_host",
    "capture",
    "capture_tensors",
    "fingerprints_match",
    "texts_sha256",
]
