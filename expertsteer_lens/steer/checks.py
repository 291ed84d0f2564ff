"""What steering refuses on entry, in a pass, and at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from expertsteer_lens._checks import explained_at
from expertsteer_lens.data.activations import layer_or_none
from expertsteer_lens.errors import (
    ArtifactError,
    DataError,
    HookNameError,
    InterventionError,
    ModelStateError,
    WidthError,
)
from expertsteer_lens.hosts import fingerprints_match
from expertsteer_lens.interventions.clock import ForwardInfo
from expertsteer_lens.interventions.positions import Positions

from .report import RunReport

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host

    from .plan import SteeringPlan


def check_model(plan: SteeringPlan, host: Host, *, allow_mismatch: bool) -> None:
    """Raise unless the plan can be applied to the model as it is now; see `SteeringPlan.hooks`."""
    host.check_ready()
    host.check_hook_names([v.hook_name for v in plan.vectors], steering=True)
    _check_distinct(plan, host)
    for vector in plan.vectors:
        width = vector.direction.shape[0]
        if "hook_resid" in vector.hook_name and width != host.d_model:
            raise WidthError(
                f"the vector at {vector.hook_name!r} has width {width}, but {host.name!r} has "
                f"d_model={host.d_model}."
            )
        if vector.gate is not None and vector.gate.hook_name is not None:
            host.check_hook_names([vector.gate.hook_name])
            reads, acts = layer_or_none(vector.gate.hook_name), layer_or_none(vector.hook_name)
            # Names without a layer do not say which comes first; a gate that is not reached before
            # its vector acts is an error of the pass.
            if reads is not None and acts is not None and reads > acts:
                raise HookNameError(
                    f"the gate of {vector.hook_name!r} is read at {vector.gate.hook_name!r}, after "
                    "it; read it at the same layer or before."
                )
    if allow_mismatch:
        return
    fitted = plan.target.get("fingerprint")
    if fitted is not None and not fingerprints_match(fitted, host.fingerprint):
        raise ArtifactError(
            f"this plan was fitted on fingerprint {fitted} ({plan.target.get('name', '?')}), the "
            "model given "
            f"({host.name}) has {host.fingerprint}; pass allow_mismatch=True to use it anyway."
        )
    if plan.basis == "centred" and host.basis == "raw":
        raise ModelStateError(
            f"this plan is in the centred basis, but the output of {host.name!r} changes when a "
            "constant is added to "
            "its residual stream, so centring is not allowed there; refit, or pass "
            "allow_mismatch=True."
        )


def _check_distinct(plan: SteeringPlan, host: Host) -> None:
    seen: dict[Any, str] = {}
    for name in dict.fromkeys(v.hook_name for v in plan.vectors):
        place = host.place(name)
        if place in seen:
            raise HookNameError(
                f"hooks {seen[place]!r} and {name!r} are one and the same hook point; use one name "
                "for both, so that "
                "the order of the edits is the order of the plan."
            )
        seen[place] = name


def check_padding(
    info: ForwardInfo,
    pad_id: Any,
    positions: Positions,
    *,
    prompt: Tensor | None,
    lengths_given: bool,
) -> None:
    """Without a mask that says so, padding would be counted as tokens: refuse a batch that looks
    padded, or hides it.

    Args:
        info: the pass.
        pad_id: the id of padding, as the tokenizer has it; None if it has none.
        positions: for the message.
        prompt: the mask of the prompt, where a `generate` call says it.
        lengths_given: prompt lengths are known, so padding on the right is past all that matters.
    """
    ids = info.input_ids
    if info.attention_mask is not None or info.past or info.batch < 2:
        return
    if info.opaque_mask and prompt is None:
        raise DataError(
            "the mask given does not say which tokens of the batch are padding, so "
            f"positions={positions!r} cannot be told; "
            "pass attention_mask=[batch, pos] with 0 at padding, or one prompt at a time."
        )
    if (
        ids is None
        or not isinstance(pad_id, int)
        or (prompt is not None and not bool(prompt.all()))
    ):
        return
    right = (ids[:, -1] == pad_id).any() & (not lengths_given)
    left = ((ids[:, 0] == pad_id) & (ids[:, min(1, ids.shape[1] - 1)] == pad_id)).any()
    if bool(right | left):
        raise DataError(
            f"the batch seems to be padded (pad id {pad_id}) and came without an attention mask, "
            f"so positions={positions!r} cannot be told; pass ids with attention_mask=..., or one "
            "prompt at a time."
        )


def check_present(lost: list[str]) -> None:
    """Raise `InterventionError` if hooks that should be on are gone."""
    if lost:
        raise InterventionError(
            f"steering at {lost} was removed while it was on (reset_hooks, clear_edits, or an SAE "
            "put on the hook point?); "
            "what runs since then is not steered. Install steering after that, or leave the hooks "
            "alone until the block ends." + explained_at("hooks-removed")
        )


def check_overflow(hook_name: str, before: Tensor, after: Tensor) -> None:
    """Raise `InterventionError` if an edit made float16 activations infinite (above 65504) that
    were not so before; the tokens after that would be NaN."""
    if bool((before.isfinite() & ~after.isfinite()).any()):
        raise InterventionError(
            f"steering at {hook_name!r} takes float16 activations above 65504, the largest number "
            "that float16 holds; use a smaller coefficient, or run the model in bfloat16."
        )


def check_half_precision(states: Tensor, mask: Tensor | None) -> None:
    """Raise `InterventionError` if the last block's float16 states of real tokens are no finite
    numbers: an edit that float16 held may take a later block above 65504."""
    broken = ~states.isfinite().all(-1)
    if mask is not None and mask.shape[0] == broken.shape[0]:
        broken = broken & mask[:, -broken.shape[1] :].bool()  # what stands at padding is of no use
    if bool(broken.any()):
        raise InterventionError(
            "float16 activations of the steered model are above 65504, the largest number that "
            "float16 holds, in a block after the steered one; use a smaller coefficient, or run "
            "the model in bfloat16."
        )


def check_outcome(
    report: RunReport,
    lost: list[str],
    *,
    model: str,
    positions: Positions,
    n_elsewhere: int = 0,
) -> None:
    """Raise `InterventionError` if steering did not happen where it should have."""
    check_present(lost)
    if report.n_forwards == 0 and not any(report.n_fired.values()) and n_elsewhere:
        raise InterventionError(
            f"the model {model!r} was run {n_elsewhere} times inside the block, but by threads or "
            "tasks that were not started in it, which are not steered; open the block where the "
            "model is run, or use plan.attach(model), which steers every thread."
        )
    if report.n_forwards == 0 and not any(report.n_fired.values()):
        raise InterventionError(
            f"the model {model!r} was not run inside the block, so nothing was steered; run the "
            "object given to hooks(), "
            "or use plan.attach(model) for an open end." + explained_at("not-run")
        )
    silent = [hook for hook, count in report.n_fired.items() if count == 0]
    if silent:
        raise InterventionError(
            f"steering at {silent} never fired in {report.n_forwards} forward passes of {model!r}; "
            "did every pass stop "
            "before that layer (stop_at_layer)?" + explained_at("never-fired")
        )
    untouched = [hook for hook, count in report.n_selected.items() if count == 0]
    if untouched:
        raise InterventionError(
            f"positions={positions!r} selected no token at {untouched} in {report.n_forwards} "
            "forward passes; positions "
            "are absolute token positions, BOS included." + explained_at("no-token-selected")
        )
