"""Reading by attention: a text's state is the mean of its tokens' states, weighted by the attention
that its last token pays to each of them in the same layer."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from expertsteer_lens.data.activations import layer_of
from expertsteer_lens.errors import ArgumentError, DataError, HostError

from .pass_tracking import is_copy
from .scope import CHANGING_HOOKS, remove_handle, scope_or_new

TakeWeights = Callable[[int, Tensor], None]
"""Given a layer and its attention weights `[batch, heads, pos, pos]` (query, then key)."""

OTHERS = "read with 'answer', 'mean' or 'last'"


def attention_weights(
    pattern: Float[Tensor, "batch heads pos pos"],
    attention_mask: Shaped[Tensor, "batch pos"],
    looked_at: Shaped[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos"]:
    """What each token counts for in the state of its text: the attention of the text's last real
    token, averaged over heads, on the tokens looked at, divided by its sum; float32.

    The first token of a text counts only where it is the only one looked at: heads with nothing to
    look for rest there (arXiv 2309.17453), so it would outweigh the text and be the same in every
    text. A text whose tokens looked at get no attention (they lie outside of a sliding window) has
    weights zero.

    Which tokens are weighted, by whose attention, and that the first is left out is chosen by us;
    arXiv 2602.00333 uses the mean over heads to choose one token, see docs/paper_and_ours.md.

    Example:
        >>> pattern = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.6, 0.3, 0.1]]])[None]
        >>> real = torch.tensor([[True, True, True]])
        >>> [round(x, 2) for x in attention_weights(pattern, real, real)[0].tolist()]
        [0.0, 0.75, 0.25]
    """
    real = attention_mask.to(pattern.device).bool()
    last = real.long().sum(1) - 1  # right padded
    rows = torch.arange(len(last), device=pattern.device)
    weights = pattern[rows, :, last].float().mean(1)
    counted = looked_at.to(pattern.device).bool().clone()
    counted[:, 0] &= counted.sum(1) == 1
    weights = weights * counted
    total = weights.sum(1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)  # NaN stays, and is named as such


class UnattendedError(DataError):
    """A text of a pass gets no attention; whoever knows which text that is says so."""

    def __init__(self, row: int, layer: int) -> None:
        super().__init__(row, layer)
        self.row, self.layer = row, layer

    def said_of(self, text: int) -> DataError:
        """The error of the text with this number."""
        return DataError(
            f"the last token of prompts[{text}] pays no attention in layer {self.layer} to any "
            "token that is looked at (a sliding window ends before them); name other hook points, "
            f"give spans nearer to the end, or {OTHERS}."
        )


class AttendedRows:
    """The rows of one pass: each activation is weighted as soon as the weights of its layer are
    there, and only the weights `[batch, pos]` outlive the layer.

    An activation that comes before the attention of its block (`hook_resid_pre`) is kept until
    then.

    Args:
        hook_names: where rows are wanted.
        attention_mask: `[batch, pos]`, right padded.
        looked_at: `[batch, pos]`.

    Raises:
        ArgumentError: a hook point outside of the blocks, which has no attention.
    """

    def __init__(
        self, hook_names: Sequence[str], attention_mask: Tensor, looked_at: Tensor
    ) -> None:
        self.layers = layers_of(hook_names)
        self._real, self._looked_at = attention_mask, looked_at
        self._weights: dict[int, Tensor] = {}
        self._waiting: dict[int, list[tuple[str, Tensor]]] = {}
        self._rows: dict[str, Tensor] = {}

    def weigh(self, layer: int, pattern: Tensor) -> None:
        """Take the weights `[batch, heads, pos, pos]` of one layer; the first of a pass count, and
        what has another shape is something else that attention gives."""
        batch, pos = self._real.shape
        if layer in self._weights or pattern.shape != (batch, pattern.shape[1], pos, pos):
            return
        weights = attention_weights(pattern.detach(), self._real, self._looked_at)
        self._weights[layer] = weights
        for name, activation in self._waiting.pop(layer, []):
            self._rows[name] = _weighted(weights, activation)

    def take(self, hook_name: str, activation: Tensor) -> None:
        """Take an activation `[batch, pos, d]`."""
        layer = layer_of(hook_name)
        if layer in self._weights:
            self._rows[hook_name] = _weighted(self._weights[layer], activation)
        else:
            self._waiting.setdefault(layer, []).append((hook_name, activation.clone()))

    def rows(self, model: str) -> dict[str, Tensor]:
        """Float32 rows `[n, d]` by hook name, after the pass.

        Args:
            model: its name, for the message.

        Raises:
            HostError: the model gave no weights in a layer.
            UnattendedError: a text gets none.
        """
        missing = [layer for layer in self.layers if layer not in self._weights]
        if missing:
            some = sorted(self._weights)
            where = f"name hook points of layers {some}, or " if some else ""
            raise HostError(
                f"the model {model!r} gives no attention weights in layers {missing}: they have "
                "none (Mamba, linear attention, convolutions), or a fused kernel keeps them to "
                "itself (loaded with attn_implementation='eager' the model may give them); "
                f"{where}{OTHERS}."
            )
        for name, rows in self._rows.items():
            layer = layer_of(name)
            # Of states that are NaN: some models then give zeros for weights. Theirs is the fault.
            without = (self._weights[layer] == 0).all(1).to(rows.device) & rows.isfinite().all(1)
            if bool(without.any()):
                raise UnattendedError(int(without.nonzero()[0]), layer)
        return self._rows


def layers_of(hook_names: Sequence[str]) -> list[int]:
    """The layers of these hook points, each once, in order.

    Raises:
        ArgumentError: one is outside of the blocks.
    """
    for name in hook_names:
        if re.match(r"blocks\.\d+\.", name) is None:
            raise ArgumentError(
                f"hook_names holds {name!r}, which is in no block and has no attention of its "
                f"own; give hook points of blocks, or {OTHERS}."
            )
    return sorted({layer_of(name) for name in hook_names})


def _weighted(weights: Tensor, activation: Tensor) -> Tensor:
    """Means `[n, d]` of `[batch, pos, d]`, where the activation is."""
    return torch.bmm(weights.to(activation.device)[:, None], activation.float())[:, 0]


# -- attention modules of Hugging Face models ------------------------------------------------------


@contextmanager
def weights_of_modules(
    blocks: Sequence[tuple[int, nn.Module]], take: TakeWeights
) -> Iterator[None]:
    """Inside the block, `take` is called with the weights of each block in every pass of this
    thread: the second output of the module inside it that gives a tensor
    `[batch, heads, pos, pos]`."""
    with scope_or_new(None) as here:

        def listener(layer: int, own: nn.Module) -> Callable[..., None]:
            def after(module: nn.Module, _: Any, output: Any) -> None:
                if not here() or is_copy(module, own) or not isinstance(output, tuple):
                    return
                weights = output[1] if len(output) > 1 else None
                if isinstance(weights, Tensor) and weights.ndim == 4:
                    take(layer, weights)

            return after

        handles = []
        try:
            with CHANGING_HOOKS:
                for layer, block in blocks:
                    for module in block.modules():
                        # Attention has projections inside; leaves and the block itself are passed.
                        if module is not block and next(module.children(), None) is not None:
                            hook = listener(layer, module)
                            handles.append(module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                remove_handle(handle)


_running_eager: Counter[int] = Counter()
_before: dict[int, list[tuple[Any, Any]]] = {}
_SWITCHING = threading.RLock()


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Inside the block, the model computes attention in the way that has weights to give; then as
    before, whatever happens. What it cannot change it leaves.

    Fused attention adds up in another order: states read inside differ from those read outside by
    what float arithmetic rounds off (1e-6 of a row in float32). In other threads the model runs the
    same way meanwhile.
    """
    key, can = id(model), getattr(model, "_can_set_attn_implementation", None)
    if can is None or not can():
        yield
        return
    try:
        with _SWITCHING:
            _running_eager[key] += 1
            if _running_eager[key] == 1:
                _before[key] = [(c, c._attn_implementation_internal) for c in _configs(model)]
                if any(name != "eager" for _, name in _before[key]):
                    model.set_attn_implementation("eager")  # type: ignore[operator]
        yield
    finally:
        with _SWITCHING:
            _running_eager[key] -= 1
            if _running_eager[key] == 0:
                del _running_eager[key]
                for config, name in _before.pop(key):
                    config._attn_implementation_internal = name


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration that says how a part of the model computes attention."""
    found: dict[int, Any] = {}
    waiting = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(found.values())
