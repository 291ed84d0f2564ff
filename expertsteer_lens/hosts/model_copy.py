"""A copy of a Hugging Face model in its own class: with biases that its configuration can switch
on, and with blocks that do nothing yet."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import blocks as known
from .blocks import find_blocks


class CannotHoldError(Exception):
    """One way of baking is not open to this model; the message says why."""


def copied(
    model: Any,
    *,
    switch: str | None = None,
    after: Sequence[int] = (),
    check: Callable[[nn.Module], None] = lambda skeleton: None,
) -> Any:
    """A copy in the model's own class, on its device (on the CPU if it is on several).

    Args:
        model: the Hugging Face model.
        switch: a switch of its configuration that is turned on: the biases it brings are 0.
        after: layers; a block that adds nothing is put after each.
        check: sees the copy without its weights, and raises `CannotHoldError` to spare them.

    Raises:
        CannotHoldError: the class does not take the weights with that configuration.
    """
    config, state = copy.deepcopy(model.config), dict(model.state_dict())
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if switch is not None:
        setattr(text, switch, True)
    if after:
        blocks = find_blocks(model).layers
        state = _with_empty_blocks(state, blocks[0].rpartition(".")[0], after)
        _count_blocks(text, len(blocks), after)
    made = _build(model, config, state, check)
    made.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return made


def _build(
    model: Any, config: Any, state: dict[str, Tensor], check: Callable[[nn.Module], None]
) -> Any:
    kind = type(model)
    with torch.device("meta"):
        skeleton = kind(config)
    wanted = skeleton.state_dict()
    strange = sorted(set(state) - set(wanted)) + [
        name
        for name, value in state.items()
        if name in wanted and wanted[name].shape != value.shape
    ]
    missing = sorted(name for name in wanted if name not in state)
    if strange or any(not name.endswith("bias") for name in missing):
        first = (strange + [name for name in missing if not name.endswith("bias")])[0]
        raise CannotHoldError(f"{kind.__name__} has another shape then ({first})")
    check(skeleton)
    state = {name: value.detach().clone() for name, value in state.items()}
    state.update({name: torch.zeros(wanted[name].shape, dtype=model.dtype) for name in missing})
    with no_progress_bar():
        made = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=model.dtype,
            attn_implementation=getattr(model.config, "_attn_implementation", None),
        )
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if name in state and tensor.dtype != state[name].dtype:  # some keep parts in float32
            tensor.data = state[name]
    if len(getattr(model, "hf_device_map", None) or {}) < 2:
        made.to(model.device)
    return made.eval()


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """A block in which transformers shows no bars of its own."""
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()


def _with_empty_blocks(
    state: Mapping[str, Tensor], path: str, after: Sequence[int]
) -> dict[str, Tensor]:
    """Blocks counted anew, with an empty one after each layer of `after`."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.startswith(f"{path}."):
            out[name] = value
            continue
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        layer = int(number)
        new = moved(layer, after)
        out[f"{path}.{new}.{rest}"] = value
        if layer in after:
            out[f"{path}.{new + 1}.{rest}"] = _emptied(rest, value)
    return out


def moved(layer: int, after: Sequence[int]) -> int:
    """Where block `layer` stands once there is an additional block after each layer of `after`."""
    return layer + sum(1 for other in set(after) if other < layer)


def _emptied(name: str, value: Tensor) -> Tensor:
    """No map and no bias leads anywhere; norms stay, and a scale of the whole block is 1."""
    if value.numel() == 1 and "scal" in name:
        return torch.ones_like(value)
    if value.ndim > 1 or name.endswith("bias"):
        return torch.zeros_like(value)
    return value.clone()


def _count_blocks(config: Any, n_layers: int, after: Sequence[int]) -> None:
    """As many layers as there are now, and every list that has an entry a layer."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == n_layers:
            longer = [
                entry
                for layer, entry in enumerate(value)
                for _ in range(2 if layer in after else 1)
            ]
            setattr(config, name, longer)
    if isinstance(first := getattr(config, "first_k_dense_replace", None), int):
        config.first_k_dense_replace = moved(first, after)
    if isinstance(mixed := getattr(config, "moe_layers", None), list):
        config.moe_layers = [
            new
            for layer in mixed
            for new in range(moved(layer, after), moved(layer, after) + 1 + (layer in after))
        ]
    config.num_hidden_layers = n_layers + len(set(after))


def attention_of(block: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """Attention of a block, its last map, and the norm between it and the stream if there is one.

    Raises:
        CannotHoldError: it has none, or none whose parts are known.
    """
    children = dict(block.named_children())
    name = next((n for n in known._ATTENTION if n in children), None)
    if name is None:
        raise CannotHoldError("the block has no attention, which could hold a constant")
    attention = children[name]
    last = next(
        (m for n, m in attention.named_modules() if n in ("o_proj", "dense", "out_proj", "c_proj")),
        None,
    )
    if last is None:
        raise CannotHoldError("the last map of its attention is not known")
    place = known._branches("", children).get("hook_attn_out")
    path = "" if place is None else place.path.removeprefix(".")
    norm = children[path] if path and path != name else None
    return attention, last, norm
