"""Whether what a block's attention and MLP are said to add to the stream is what they add."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertsteer_lens.data.activations import layer_of
from expertsteer_lens.errors import HookNameError

from .facts import facts, probe_batch
from .parts import EditFn

if TYPE_CHECKING:
    from .base import Host

BRANCHES = ("hook_attn_out", "hook_mlp_out")
_PARTS = ("hook_resid_pre", *BRANCHES, "hook_resid_post")

Put = Callable[[Mapping[str, EditFn]], AbstractContextManager[Any]]


def check_branches(host: Host, names: Sequence[str], put: Put) -> None:
    """Refuse outputs of attention and MLP that do not add up to what their block adds.

    Measured once for each set of weights, in one pass over all blocks.

    Args:
        host: the model.
        names: hook names of the model.
        put: puts functions at hook points that are known to exist.

    Raises:
        HookNameError: one of the names is such an output.
    """
    branches = [name for name in names if name.endswith(BRANCHES)]
    if not branches:
        return
    known = facts(host._weights)
    if "branches" not in known:
        known["branches"] = ",".join(map(str, _blocks_that_do_not_add_up(host, put)))
    wrong = {int(layer) for layer in known["branches"].split(",") if layer}
    for name in branches:
        if layer_of(name) in wrong:
            raise HookNameError(
                f"hook {name!r} cannot be used on {host.name!r} ({host.kind}): the outputs of "
                "attention and MLP there do not add up to what the block adds to the residual "
                "stream (a scale, a norm or a third branch comes between); use hook_resid_pre or "
                "hook_resid_post."
            )


@torch.no_grad()
def _blocks_that_do_not_add_up(host: Host, put: Put) -> list[int]:
    """Layers in which `resid_pre + attn_out + mlp_out` is not `resid_post`, to rounding."""
    exact = host.dtype in (torch.float32, torch.float64)
    there = set(host.all_hook_names())
    wrong: list[int] = []
    seen: dict[str, Tensor] = {}
    fns: dict[str, EditFn] = {}

    def keep(layer: int, part: str) -> EditFn:
        def fn(x: Tensor) -> None:
            seen[part] = x.detach().cpu().double()
            if part != _PARTS[-1]:
                return
            shapes = {seen[one].shape if one in seen else None for one in _PARTS}
            # One did not fire, or is of experts that work on a list of tokens.
            if None in shapes or len(shapes) > 1:
                wrong.append(layer)
                seen.clear()
                return
            before, attention, mlp, after = (seen.pop(one) for one in _PARTS)
            error = (before + attention + mlp - after).norm() / after.norm()
            if float(error) > (1e-4 if exact else 3e-2):
                wrong.append(layer)

        return fn

    for layer in range(host.n_layers):
        names = [f"blocks.{layer}.{part}" for part in _PARTS]
        if there.issuperset(names):
            fns.update({name: keep(layer, name.rpartition(".")[2]) for name in names})
    with host.quiet(), put(fns):
        host.forward(probe_batch(host))
    return wrong
