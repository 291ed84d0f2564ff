"""Running only the upper blocks of a model, on a stream of the residual that was kept.

An edit at a layer leaves everything below it as it was. So the stream below is computed once and
kept, and every further strength or direction costs only the blocks above. The pass itself stays the
model's own: its masks, rotary angles and output head are computed as always; the lower blocks are
stood in for by functions that hand the kept stream on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import first_argument, first_of
from .overrides import Around, calls_through
from .scope import CHANGING_HOOKS, Scope, remove_handle, scope_or_new


@dataclass(frozen=True, eq=False)
class KeptStream:
    """The unsteered residual stream that leaves block `n_blocks - 1`, for one batch."""

    n_blocks: int
    """How many blocks need not be run again."""
    stream: Tensor
    """`[batch, pos, d_model]`, in the model's dtype."""
    in_tuple: bool
    """Whether the blocks of this model return their stream inside a tuple."""

    @property
    def n_bytes(self) -> int:
        """Memory of the stream."""
        return self.stream.numel() * self.stream.element_size()


@torch.no_grad()
def keep_stream(blocks: Sequence[nn.Module], n_blocks: int, run: Callable[[], Any]) -> KeptStream:
    """Run a pass and keep what leaves block `n_blocks - 1`, before any hook on it acts.

    Args:
        blocks: the model's blocks in order.
        n_blocks: how many blocks will not be run again, at least 1.
        run: runs the pass (it may stop early, after that block).
    """
    kept: list[KeptStream] = []
    with scope_or_new(None) as here:

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if here():
                stream = first_of(output).detach().clone()
                kept.append(KeptStream(n_blocks, stream, isinstance(output, tuple)))

        with CHANGING_HOOKS:
            handle = blocks[n_blocks - 1].register_forward_hook(keep, prepend=True)
        try:
            run()
        finally:
            remove_handle(handle)
    return kept[0]


@contextmanager
def skip_blocks(blocks: Sequence[nn.Module], kept: KeptStream) -> Iterator[None]:
    """Inside, the first `kept.n_blocks` blocks are not run; the last of them gives the stream.

    Forward hooks on the blocks fire as always, so an edit of what leaves the last of them acts.
    Other threads run all blocks meanwhile.
    """

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        stream = first_argument(args, kwargs)
        return (stream,) if kept.in_tuple else stream

    def give_kept(*_: Any, **__: Any) -> Any:
        return (kept.stream,) if kept.in_tuple else kept.stream

    skipped = blocks[: kept.n_blocks]
    with ExitStack() as stack:
        here = stack.enter_context(scope_or_new(None))
        for module in skipped[:-1]:
            stack.enter_context(calls_through(module, "forward", _in_passes_of(here, hand_on)))
        stack.enter_context(calls_through(skipped[-1], "forward", _in_passes_of(here, give_kept)))
        yield


def _in_passes_of(scope: Scope, fn: Callable[..., Any]) -> Around:
    """Stands in for a `forward` with `fn`; in passes of others the module runs as always."""

    def around(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs) if scope() else call(*args, **kwargs)

    return around


@contextmanager
def logits_only_at(head: nn.Module, where: Tensor) -> Iterator[None]:
    """Inside, the output head is applied only at `where` (`[batch, pos]`, bool): `[n, vocab]`.

    The logits of a large vocabulary cost more than the blocks of a small model; most are not read.
    Passes of other threads get all of theirs.
    """
    with scope_or_new(None) as here:

        def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return (args[0][where.to(args[0].device)], *args[1:]) if here() else None

        with CHANGING_HOOKS:
            handle = head.register_forward_pre_hook(pick)
        try:
            yield
        finally:
            remove_handle(handle)
