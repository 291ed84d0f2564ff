"""Gradients of what steering is for: to first order, what adding a vector at a hook point does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.chat import Text
from expertsteer_lens.errors import ArgumentError

from .completions import metric_of, score_batches

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host


def behaviour_gradient(
    host: Host,
    behaviour: Behaviour,
    hook_names: Sequence[str],
    *,
    batch_size: int = 128,
    progress: bool | None = False,
) -> dict[str, Float[Tensor, " d_model"]]:
    """Mean over prompts of the sum over token positions of dm/dh at each hook point.

    First-order effect of adding `delta` at every position: `gradient[hook] @ delta` nats
    (attribution patching). One forward and one backward pass per batch, whatever the number of hook
    points."""

    def objective() -> Iterator[Tensor]:
        for batch in score_batches(host, behaviour, batch_size, None, progress):
            yield torch.stack([metric_of(*sides) for sides in batch]).sum() / len(behaviour)

    return _gradients(host, hook_names, objective)


def readout_gradient(
    host: Host,
    texts: Sequence[Text],
    readout: Float[Tensor, " d_model"],
    hook_names: Sequence[str],
    *,
    batch_size: int = 128,
) -> dict[str, Float[Tensor, " d_model"]]:
    """As `behaviour_gradient`, for the metric "last-token state of the last layer, projected on
    `readout`".

    The metric used where no completions are given: `readout` is the target's own mean difference at
    its last layer."""
    last = host.hook_names()[-1]
    unit = readout / readout.norm()

    def objective() -> Iterator[Tensor]:
        for start in range(0, len(texts), batch_size):
            batch = host.tokenize(list(texts[start : start + batch_size]))
            seen: list[Tensor] = []
            with host.intervene({last: seen.append}):
                host.forward(batch)
            state = seen[0].float()
            lengths = batch.attention_mask.sum(1) - 1
            picked = state[
                torch.arange(state.shape[0], device=state.device), lengths.to(state.device)
            ]
            yield (picked @ unit.to(picked)).sum() / len(texts)

    return _gradients(host, hook_names, objective)


def _gradients(
    host: Host, hook_names: Sequence[str], objective: Callable[[], Iterator[Tensor]]
) -> dict[str, Float[Tensor, " d_model"]]:
    """d objective / d h summed over batch and positions; padding contributes nothing because
    nothing attends to it."""
    names = list(hook_names)
    totals: dict[str, Tensor] = {}
    live: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[Tensor], Tensor]:
        def fn(h: Tensor) -> Tensor:
            # A zero that requires grad makes the graph start here even if every parameter is
            # frozen.
            probe = torch.zeros_like(h, requires_grad=True)
            live[name] = probe
            return h + probe

        return fn

    with torch.enable_grad(), host.intervene({name: watch(name) for name in names}):
        for value in objective():
            probes = [live[name] for name in names]
            grads = torch.autograd.grad(value, probes, allow_unused=True)
            for name, grad in zip(names, grads, strict=True):
                if grad is None:
                    continue
                flat = grad.detach().double().reshape(-1, grad.shape[-1]).sum(0).cpu()
                totals[name] = totals.get(name, torch.zeros_like(flat)) + flat
    silent = [name for name in names if name not in totals]
    if silent:
        raise ArgumentError(
            f"the metric does not depend on hook {silent[0]!r}; steering there cannot act on it."
        )
    return totals
