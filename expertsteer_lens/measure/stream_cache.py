"""Unsteered streams of batches, kept so that a further strength or direction costs only the blocks
above the layer that is steered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from expertsteer_lens.steer.run import PlanRun

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host, TokenBatch
    from expertsteer_lens.hosts.resume import KeptStream
    from expertsteer_lens.interventions.vector_edit import VectorEdit
    from expertsteer_lens.steer.plan import SteeringPlan

CACHE_BYTES = 2**29
"""Most memory for kept streams (512 MiB), unless the caller says otherwise."""


class StreamCache:
    """Runs batches under plans, from the lowest steered layer where the host can.

    One layer's streams are held at a time: `n_tokens * d_model` numbers in the model's dtype for
    all batches together. Batches beyond `cache_bytes` are run in full; so is every batch on a host
    that cannot run from a layer (see `Host.keep_stream`).
    """

    def __init__(self, host: Host, cache_bytes: int = CACHE_BYTES) -> None:
        self.host, self.cache_bytes = host, cache_bytes
        self._n_blocks = 0
        self._kept: dict[int, tuple[TokenBatch, KeptStream]] = {}

    @property
    def n_bytes(self) -> int:
        """Memory of the streams held now."""
        return sum(kept.n_bytes for _, kept in self._kept.values())

    @contextmanager
    def steered(
        self,
        batch: TokenBatch,
        plan: SteeringPlan | None,
        prompt_lengths: Sequence[int] | Tensor | None = None,
        vector_edits: Sequence[VectorEdit] | None = None,
    ) -> Iterator[None]:
        """Inside, a pass over `batch` is steered by `plan` (None: not at all).

        Args:
            batch: the same object each time, so that it is known again.
            plan: what is steered.
            prompt_lengths: see `SteeringPlan.hooks`.
            vector_edits: see `PlanRun`.
        """
        with ExitStack() as stack:
            if plan is not None:
                kept = self._stream(batch, plan)
                # The plan first: it may measure the model, which takes full passes of other tokens.
                run = PlanRun(
                    plan, self.host, prompt_lengths=prompt_lengths, vector_edits=vector_edits
                )
                stack.enter_context(run.run())
                if kept is not None:
                    stack.enter_context(self.host.resume(kept))
            yield

    @contextmanager
    def unsteered(self, batch: TokenBatch) -> Iterator[None]:
        """Inside, a pass over `batch` runs no block again, only what follows the last one."""
        with ExitStack() as stack:
            kept = self._stream_at(batch, self.host.n_layers)
            if kept is not None:
                stack.enter_context(self.host.resume(kept))
            yield

    def _stream(self, batch: TokenBatch, plan: SteeringPlan) -> KeptStream | None:
        n_blocks = self.host.n_blocks_below(plan.hook_names_read)
        return self._stream_at(batch, n_blocks) if n_blocks else None

    def _stream_at(self, batch: TokenBatch, n_blocks: int) -> KeptStream | None:
        if n_blocks != self._n_blocks:
            self._kept.clear()
            self._n_blocks = n_blocks
        if id(batch) not in self._kept:
            size = batch.input_ids.numel() * self.host.d_model * self.host.dtype.itemsize
            if self.n_bytes + size > self.cache_bytes:
                return None
            kept = self.host.keep_stream(batch, n_blocks)
            if kept is None:
                return None
            self._kept[id(batch)] = (batch, kept)  # the batch too, so that its id is not given anew
        return self._kept[id(batch)][1]
