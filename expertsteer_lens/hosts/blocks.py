"""Where the hook points of a Hugging Face model are, found in its module tree rather than looked up
by architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from expertsteer_lens.errors import HostError

KINDS = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
"""In the order in which a block reaches them."""

_ATTENTION = ("attn", "self_attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
# Norms between a branch and the residual stream: where they exist, what is added to the stream
# comes out of them.
_ATTENTION_POST = ("post_self_attn_layernorm", "post_attention_layernorm")
_MLP_POST = ("post_mlp_layernorm", "post_feedforward_layernorm")


Side = Literal["input", "output"]


@dataclass(frozen=True)
class Place:
    """One hook point: a module, and which side of it."""

    path: str
    """Dotted path from the causal model."""
    side: Side
    """ "input" (first argument) or "output" (first of the outputs)."""


@dataclass(frozen=True)
class Blocks:
    """The hook points of one model."""

    places: dict[str, Place]
    """By hook name, in the order in which a forward pass reaches them."""
    layers: tuple[str, ...]
    """Path of each block."""
    base: str
    """Path of the decoder that every forward pass goes through ("" for the model itself): the
    module that holds the list of blocks. `base_model` need not be run: the heads of some models
    call the decoder inside it."""


def find_blocks(model: nn.Module) -> Blocks:
    """The blocks of a model: the outermost list of as many modules as its configuration has layers.

    The text decoder is searched first, so the vision half of a multimodal model is never taken for
    it.

    Raises:
        HostError: there is no such list.
    """
    n_layers = text_config(model).num_hidden_layers
    path = next(
        (name for root in _roots(model) if (name := _list_in(model, root, n_layers)) is not None),
        None,
    )
    if path is None:
        raise HostError(
            f"no list of {n_layers} blocks was found in {type(model).__name__}; only models made "
            "of a list of blocks can be "
            "read and steered."
        )
    places: dict[str, Place] = {}
    layers = tuple(f"{path}.{i}" for i in range(n_layers))
    for i, layer in enumerate(layers):
        here = {"hook_resid_pre": Place(layer, "input"), "hook_resid_post": Place(layer, "output")}
        here.update(_branches(layer, dict(model.get_submodule(layer).named_children())))
        places.update({f"blocks.{i}.{kind}": here[kind] for kind in KINDS if kind in here})
    return Blocks(places, layers, path.rpartition(".")[0])


def text_config(model: nn.Module) -> Any:
    """The configuration of the language half."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _roots(model: nn.Module) -> list[nn.Module]:
    decoder = getattr(model, "get_decoder", None)
    candidates = [
        decoder() if callable(decoder) else None,
        getattr(model, "base_model", None),
        model,
    ]
    return [module for module in candidates if isinstance(module, nn.Module)]


def _list_in(model: nn.Module, root: nn.Module, n_layers: int) -> str | None:
    inside = {id(module) for module in root.modules()}
    lists = [
        name
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    return min(lists, key=lambda name: name.count("."), default=None)


def _branches(layer: str, children: dict[str, nn.Module]) -> dict[str, Place]:
    """What attention and MLP add to the stream. Whether they do add up to the block's output is
    measured, not assumed."""
    attention = next((name for name in _ATTENTION if name in children), None)
    mlp = next((name for name in _MLP if name in children), None)
    if attention is None or mlp is None:
        return {}
    mlp_post = next((name for name in _MLP_POST if name in children), None)
    if mlp_post is not None:  # else `post_attention_layernorm` is the norm before the MLP
        mlp = mlp_post
        attention = next((name for name in _ATTENTION_POST if name in children), attention)
    return {
        "hook_attn_out": Place(f"{layer}.{attention}", "output"),
        "hook_mlp_out": Place(f"{layer}.{mlp}", "output"),
    }


def first_of(output: Any) -> Any:
    """The activation in a module's output: a tensor, or the first of a tuple (older transformers,
    attention)."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, value: Tensor) -> Any:
    """`output` with its activation replaced."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


def first_argument(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The activation that goes into a block: its first argument, however it is passed."""
    return args[0] if args else next(iter(kwargs.values()), None)


def with_first_argument(
    args: Sequence[Any], kwargs: dict[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the activation replaced."""
    if args:
        return (value, *args[1:]), kwargs
    name = next(iter(kwargs))
    return (), {**kwargs, name: value}
