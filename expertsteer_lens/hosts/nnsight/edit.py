"""A plan as a plain torch function that nnsight can run anywhere, a server without this package
included.

This says again, in nested functions that name nothing but torch and nnsight, what
`positions.Step.mask`, `edits` and `steering.Steering` say: those cannot travel. The two are held
together by the tests of the hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from expertsteer_lens.hosts.blocks import Blocks
from expertsteer_lens.hosts.pass_tracking import is_stand_in
from expertsteer_lens.interventions.edits import centre
from expertsteer_lens.interventions.positions import Positions, needs_prompt_length
from expertsteer_lens.steer.plan import SteeringPlan, SteeringVector

from .runs import Body, Stop, location


class PlainPlan:
    """What steers every pass of a run: as a body that can be sent, and as stops for a run on this
    machine.

    Args:
        plan: without gates.
        blocks: where the hook points are.
        arguments: names of the positional arguments of the decoder.
        centred: basis in which the plan works.
        prompt_lengths: tokens of each row that are prompt; None: those of the first pass of the
            run.
    """

    def __init__(
        self,
        plan: SteeringPlan,
        blocks: Blocks,
        *,
        arguments: Sequence[str],
        centred: bool,
        prompt_lengths: Any,
    ) -> None:
        self._base = blocks.base
        self._place = _placer(list(arguments), plan.positions, prompt_lengths)
        order = {name: i for i, name in enumerate(blocks.places)}
        vectors = sorted(
            plan.vectors, key=lambda v: order[v.hook_name]
        )  # stable: the plan's order at one hook point
        self._sites = [
            (blocks.places[v.hook_name].path, blocks.places[v.hook_name].side, _changer(v, centred))
            for v in vectors
            if v.coefficient != 0
        ]

    def stops(self, model: Any) -> list[Stop]:
        """The stops of one run: the decoder's arguments, which say where the pass is, then each
        hook point."""
        seen: dict[str, Any] = {}
        mask: list[Any] = [None]

        def note(inputs: Any) -> None:
            if not any(
                isinstance(v, Tensor) and is_stand_in(v) for v in (*inputs[0], *inputs[1].values())
            ):
                mask[0] = self._place(inputs, seen)

        def stop(change: Callable[..., Tensor]) -> Callable[[Tensor], Tensor | None]:
            return lambda x: None if is_stand_in(x) else change(x, mask[0])

        decoder = model.get(self._base) if self._base else model
        out: list[Stop] = [(location(decoder, "arguments"), "arguments", note)]
        for path, side, change in self._sites:
            out.append((location(model.get(path), side), side, stop(change)))
        return out

    def body(self) -> Body:
        """The same for a worker that can be sent to a server."""
        base, place, sites = self._base, self._place, self._sites

        def body(model: Any) -> None:
            from nnsight.intervention.interleaver import OutOfOrderError
            from nnsight.intervention.iterator import Iterations

            seen: dict[str, Any] = {}
            decoder = model.get(base) if base else model
            modules = [(model.get(path), side, change) for path, side, change in sites]
            try:
                for _ in Iterations()[:]:
                    mask = place(decoder.inputs, seen)
                    for module, side, change in modules:
                        if side == "input":
                            module.input = change(module.input, mask)
                        else:
                            output = module.output
                            pair = isinstance(output, tuple)
                            value = change(output[0] if pair else output, mask)
                            module.output = (value, *output[1:]) if pair else value
            except OutOfOrderError:  # the run is over
                return

        return body


def _placer(
    arguments: list[str], positions: Positions, prompt_lengths: Any
) -> Callable[..., Tensor | None]:
    """Which tokens of a pass to change (None: every one), from the decoder's arguments; `seen`
    holds what earlier passes of the run said."""
    given_lengths = (
        None if prompt_lengths is None else torch.as_tensor(prompt_lengths).reshape(-1, 1)
    )
    select, matters = _selector(positions), positions != "all"
    needs_prompt = given_lengths is None and needs_prompt_length(positions)

    def place(inputs: Any, seen: dict[str, Any]) -> Any:
        import torch

        given = dict(zip(arguments, inputs[0], strict=False))
        given.update(inputs[1])
        tokens = given.get("input_ids")
        tokens = given["inputs_embeds"] if tokens is None else tokens
        batch, new = tokens.shape[:2]
        cache = next(
            (given[name] for name in ("past_key_values", "cache") if given.get(name) is not None),
            None,
        )
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0  # type: ignore[union-attr]
        mask = given.get("attention_mask")
        if hasattr(mask, "shape") and tuple(mask.shape) == (batch, past + new):  # type: ignore[union-attr]
            real = mask.bool()  # type: ignore[union-attr]
        elif mask is not None and batch > 1 and past == 0 and matters:
            raise ValueError(
                "the mask given does not say which tokens are padding, so positions cannot be told."
            )
        else:
            real = torch.ones(batch, past + new, dtype=torch.bool, device=tokens.device)
        if not matters:
            return some(real[:, past:])
        totals = real.sum(1, keepdim=True)
        lengths = seen.get("lengths")
        if lengths is None or lengths.shape[0] != batch or bool((totals < lengths).any()):
            lengths = seen["lengths"] = totals
        elif needs_prompt and past > 0 and new > 1:
            raise ValueError(
                "several tokens on top of a cache hide where the prompt ends; pass "
                "prompt_lengths=..."
            )
        if given_lengths is not None:
            lengths = given_lengths.to(totals.device).expand(batch, 1)
        index = (real.long().cumsum(1) - 1).masked_fill(~real, -1)[:, past:]
        return some((index >= 0) & select(index, lengths, real))

    def some(chosen: Tensor) -> Any:
        return (
            None if chosen.device.type == "cpu" and bool(chosen.all()) else chosen
        )  # elsewhere, looking would wait

    return place


def _selector(positions: Positions) -> Callable[..., Tensor]:
    """The tokens that the rule selects, given the absolute index of each, the prompt lengths and
    the real tokens."""

    def select(index: Tensor, lengths: Tensor, real: Tensor) -> Tensor:
        import torch

        if isinstance(positions, str):
            rules = {
                "all": index >= 0,
                "prompt": index < lengths,
                "last_prompt": index == lengths - 1,
            }
            rules["generated"] = index >= lengths - 1
            return rules[positions]
        if isinstance(positions, slice):
            first, last, step = positions.start or 0, positions.stop, positions.step or 1
            start = (
                torch.full_like(lengths, first) if first >= 0 else (lengths + first).clamp(min=0)
            )
            chosen = (index >= start) & ((index - start) % step == 0)
            if last is None:
                return chosen
            return chosen & (
                index
                < (torch.full_like(lengths, last) if last >= 0 else (lengths + last).clamp(min=0))
            )
        if callable(positions):
            return positions(real.clone())[:, -index.shape[1] :]
        wanted = [positions] if isinstance(positions, int) else list(positions)
        out = torch.zeros_like(index, dtype=torch.bool)
        for position in wanted:
            absolute = torch.full_like(lengths, position) if position >= 0 else lengths + position
            if bool((absolute < 0).any()):
                raise ValueError(f"position {position} is before the first token of a prompt.")
            out = out | (index == absolute)
        return out

    return select


def _changer(vector: SteeringVector, centred: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The edit of one vector on the tokens of a mask (None: all); everything it needs is a number
    or a tensor."""
    edit, keep = vector.edit, vector.preserve_norm
    strength, scale = float(vector.coefficient), float(vector.scale)
    direction, delta = vector.direction, centre(vector.delta) if centred else vector.delta

    def change(x: Tensor, mask: Any) -> Tensor:
        import torch

        mask = None if mask is None else mask.to(x.device)[..., None]
        if edit == "add" and not keep:
            return x + delta.to(x) if mask is None else torch.where(mask, x + delta.to(x), x)
        whole = x if x.dtype == torch.float64 else x.float()
        before = whole - whole.mean(-1, keepdim=True) if centred else whole
        unit = direction.to(before)
        unit = unit / unit.norm()
        along = before @ unit
        if edit == "add":
            after = before + delta.to(before)
        elif edit == "clamp":
            bound = along.clamp(min=scale) if scale > 0 else along.clamp(max=scale)
            after = before + (bound - along)[..., None] * unit
        else:
            factor = -strength if edit == "ablate" else strength
            after = before + (factor * along)[..., None] * unit
        if keep:
            tiny = torch.finfo(torch.float32).tiny
            after = after * (
                before.norm(dim=-1, keepdim=True) / after.norm(dim=-1, keepdim=True).clamp(min=tiny)
            )
        after = (whole + (after - before)).to(x.dtype)
        return after if mask is None else torch.where(mask, after, x)

    return change
