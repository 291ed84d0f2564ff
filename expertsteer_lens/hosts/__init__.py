"""Hosts: one way to read, steer and run a TransformerLens, nnsight or Hugging Face model.

A host is chosen by what the object can do, never by its class, and nothing is imported for a host that is not used.
The single primitive is `Host.intervene`: capture, steering and gradients are all built on it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from expertsteer_lens.errors import HostError

from ._base import EditFn, HostBase, Observer, Registration, TokenBatch
from ._capture import capture
from ._measure import fingerprints_match


class Host(Protocol):
    """What the rest of the package knows about a model."""

    kind: ClassVar[str]
    """ "transformer_lens", "nnsight" or "huggingface"."""
    model: Any
    """The object the user gave."""
    name: str
    """Label of the model, for messages and files."""
    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int | None
    """Context length, None if the configuration does not say."""
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where inputs go."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""

    @property
    def basis(self) -> str:
        """ "centred" if a constant added to the residual leaves the output alone (measured), else "raw"."""

    @property
    def fingerprint(self) -> str:
        """How the model behaves on a fixed input; compare with `fingerprints_match`, not `==`."""

    def check_ready(self) -> None:
        """Raise `ModelStateError` if dropout is on."""

    def hook_names(self, kind: str = "hook_resid_post") -> list[str]:
        """`blocks.{i}.{kind}` for every layer that has it, in layer order."""

    def check_hook_names(self, names: Sequence[str], *, steering: bool = False) -> list[str]:
        """The names, or `HookNameError` (closest name; layer out of range; not steerable and why)."""

    def place(self, hook_name: str) -> Any:
        """What stands at a hook name; equal for two names of one hook point."""

    def tokenize(
        self, prompts: Sequence[str], *, prepend_bos: bool | None = None, max_length: int | None = None
    ) -> TokenBatch:
        """Right-padded ids and mask; None prepends BOS iff the tokenizer has one."""

    def forward(self, batch: TokenBatch, *, stop_at_layer: int | None = None) -> Tensor:
        """Logits `[batch, pos, vocab]`; with `stop_at_layer=k < n_layers` blocks 0..k-1 run and the value is not logits."""

    def intervene(self, fns: Mapping[str, EditFn]) -> AbstractContextManager[Registration]:
        """Inside the block, each `fn(activation [batch, pos, d])` is called at its hook point on every pass.

        A tensor returned replaces the activation (same shape, dtype and device, else `InterventionError`); None leaves
        it. Names are resolved before anything is registered, and exactly these hooks are removed at the end, whatever
        happens inside.
        """

    def watch(self, observer: Observer) -> AbstractContextManager[None]:
        """Inside the block, tell `observer` where each forward pass is in its sequence, and about generate calls."""

    def quiet(self) -> AbstractContextManager[None]:
        """Inside the block, hooks of others are out of action."""

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        prepend_bos: bool | None = None,
        stop_at_eos: bool = True,
    ) -> list[str]:
        """The continuation of each prompt, without the prompt; greedy at temperature 0. Works under steering."""

    def generate_tokens(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        prepend_bos: bool | None = None,
        stop_at_eos: bool = True,
    ) -> list[list[int]]:
        """The new token ids of each prompt."""


def as_host(model: Any) -> Host:
    """The host for `model`: a TransformerBridge, HookedTransformer, nnsight model or Hugging Face causal model.

    Cheap: what a host measures (basis, fingerprint) is remembered per model for as long as its weights stay the same.

    Raises:
        HostError: the object is none of these; the message says what was looked for.
    """
    if isinstance(model, HostBase):
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
    "HostBase",
    "Observer",
    "Registration",
    "TokenBatch",
    "as_host",
    "capture",
    "fingerprints_match",
]
