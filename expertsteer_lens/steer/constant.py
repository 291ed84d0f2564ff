"""The part of a plan that is a constant: what other programs, and weights, can hold."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.interventions.arithmetic import centre
from expertsteer_lens.interventions.edits import find_edit

if TYPE_CHECKING:
    from .plan import SteeringPlan


def constant_additions(
    plan: SteeringPlan, *, can: str = "exported", they: str = "these formats"
) -> dict[str, Float[Tensor, " d"]]:
    """What the plan adds at each hook point, float32 and in the plan's basis; several vectors at
    one hook point are summed, those of coefficient 0 left out.

    What enters block i > 0 is what leaves block i - 1, and is named so.

    Args:
        plan: what is to be exported or baked.
        can: what cannot be done with other plans, for messages.
        they: who cannot, for messages.

    Raises:
        ArgumentError: the plan is not a constant vector at every token, or it adds nothing.
    """
    if not (isinstance(plan.positions, str) and plan.positions == "all"):
        raise ArgumentError(
            f"positions={plan.positions!r} cannot be {can}: {they} steer every token; "
            "use plan.with_positions('all') if that is what you want."
        )
    out: dict[str, Tensor] = {}
    for v in plan.vectors:
        edit = find_edit(v.edit)
        why_not = "only 'add' is a constant vector"
        if edit.adds_along:
            why_not += f", here the strength depends on the activation, which {they} do not read"
        for setting, is_beyond, reason in (
            (f"edit={v.edit!r}", not edit.is_constant, why_not),
            ("preserve_norm=True", v.preserve_norm, "what is added then depends on the activation"),
            (f"the gate {v.gate!r}", v.gate is not None, f"{they} have no conditions"),
        ):
            if is_beyond:
                raise ArgumentError(f"{setting} at {v.hook_name!r} cannot be {can}: {reason}.")
        if v.coefficient != 0:
            constant = edit.delta(v.direction, v.scale)
            delta = centre(constant) if plan.basis == "centred" else constant
            name = _as_output(v.hook_name)
            out[name] = out[name] + delta if name in out else delta
    if not out:
        raise ArgumentError(
            f"every coefficient of the plan is 0, so there is nothing to be {can}; see "
            "plan.with_coefficient."
        )
    return out


def _as_output(hook_name: str) -> str:
    block = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", hook_name)
    if block is None or int(block[1]) == 0:
        return hook_name
    return f"blocks.{int(block[1]) - 1}.hook_resid_post"
