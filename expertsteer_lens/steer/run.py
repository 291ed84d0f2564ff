"""A plan at work on a model: which tokens of which pass get which edit, and whether it all
happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, HookNameError, InterventionError, WidthError
from expertsteer_lens.interventions import edits
from expertsteer_lens.interventions.positions import ForwardInfo, PositionClock, Step

from .checks import RunReport, check_model, check_outcome, check_padding, check_present

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host, Registration

    from .plan import SteeringPlan, SteeringVector

Function = Callable[[Tensor], Tensor | None]


class Steering:
    """One use of a plan on one model. Built (and checked) on entry, thrown away at the end."""

    def __init__(
        self,
        plan: SteeringPlan,
        host: Host,
        *,
        allow_mismatch: bool = False,
        prompt_lengths: int | Sequence[int] | Tensor | None = None,
        row_coefficients: Sequence[float] | Tensor | None = None,
    ) -> None:
        self.plan = plan
        self.host = host
        self.report = RunReport()
        self._prompt_lengths = prompt_lengths
        self._clocks: dict[str | None, PositionClock] = {}
        self._rows = (
            None
            if row_coefficients is None
            else torch.as_tensor(row_coefficients, dtype=torch.float32)
        )
        if self._rows is not None and (
            self._rows.ndim != 1 or not bool(torch.isfinite(self._rows).all())
        ):
            raise ArgumentError(
                "row_coefficients must be a list of finite numbers, one per row of the batch."
            )
        self._registration: Registration | None = None
        # Every token of every pass, wherever it stands in its sequence: there is nothing to find
        # out about a pass.
        self._everywhere = plan.positions == "all" and all(
            vector.gate is None for vector in plan.vectors
        )
        self._shape: tuple[int, int] | None = (
            None  # rows and tokens of the pass; None: no pass is known
        )
        self._unfollowed = False  # nobody tells where a pass is, and it does not matter
        self._step: Step | None = None
        self._mask: Tensor | None = None  # None: every token of the pass
        self._nothing = False  # no token of the pass
        self._mask_total: Tensor | None = None
        self._open: dict[int, Tensor] = {}
        self._deltas: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        host.check_ready()
        check_model(plan, host, allow_mismatch=allow_mismatch)
        self._centred = (plan.basis or host.basis) == "centred"
        plan._last[:] = [self.report]

    # -- installing -------------------------------------------------------------------------------

    @contextmanager
    def run(self) -> Iterator[RunReport]:
        """Steer inside the block; see `SteeringPlan.hooks`."""
        with self._installed() as registration:
            yield self.report
            lost = registration.lost()
        check_outcome(self.report, lost, model=self.host.name, positions=self.plan.positions)

    @contextmanager
    def _installed(self) -> Iterator[Any]:
        with ExitStack() as stack:
            registration = stack.enter_context(self.host.intervene(self._functions()))
            stack.enter_context(self.host.watch(self))
            self._registration = registration
            stack.callback(setattr, self, "_registration", None)
            yield registration

    def run_functions(self) -> dict[str, Function]:
        """The function of each hook point, for a host that puts them into a run of its own; see
        `finish`."""
        return self._functions()

    def finish(self) -> None:
        """Check what `run` checks at its end, where a host knows the end of its own run."""
        check_outcome(self.report, [], model=self.host.name, positions=self.plan.positions)

    # -- the observer: called before the first block of every pass --------------------------------

    def on_generate(self, entering: bool, prompt: Tensor | None = None) -> None:
        """See `Observer`."""
        self._clock(None).generation(entering, prompt)

    def on_forward(self, info: ForwardInfo) -> None:
        """See `Observer`."""
        if self._registration is not None:
            check_present(
                self._registration.lost(thorough=False)
            )  # before the first block: nothing runs half steered
        self.report.n_forwards += 1
        if self.plan.positions != "all":
            told, given = self._clock(None).told(info.batch), self._prompt_lengths is not None
            check_padding(
                info, self.host.tokenizer, self.plan.positions, prompt=told, lengths_given=given
            )
        self._place(info)

    def _clock(self, hook_name: str | None) -> PositionClock:
        return self._clocks.setdefault(hook_name, PositionClock(self._prompt_lengths))

    def _place(self, info: ForwardInfo, hook_name: str | None = None) -> None:
        self._shape, given = (info.batch, info.n_new), info.attention_mask
        told = hook_name is None  # a bare list is not: it has to count the tokens itself
        if (
            self._everywhere
            and told
            and (given is None or given.shape == (info.batch, info.past + info.n_new))
        ):
            self._select(None if given is None else given[:, info.past :].bool())
            return
        self._step = self._clock(hook_name).observe(info)
        for i, vector in enumerate(self.plan.vectors):
            gate = vector.gate
            if gate is None or hook_name not in (None, gate.hook_name or vector.hook_name):
                continue
            if (
                gate.per == "token" or not self._step.continues
            ):  # an older decision must not be taken for this one
                self._open.pop(i, None)
        everything = self.plan.positions == "all" and given is None
        self._select(None if everything else self._step.mask(self.plan.positions))

    def _select(self, mask: Tensor | None) -> None:
        """Note the tokens of this pass, `[batch, pos]`, that are to be edited (None: every one)."""
        self._mask_total, self._nothing = None, False
        if (
            mask is not None and mask.device.type == "cpu"
        ):  # on an accelerator, looking would wait for it
            if bool(mask.all()):
                mask = None
            else:
                self._nothing = not bool(mask.any())
        self._mask = mask

    # -- the functions at the hook points ---------------------------------------------------------

    def _functions(self) -> dict[str, Function]:
        """One function per hook point: gates that are read there first, then its vectors in the
        plan's order."""
        acting: dict[str, list[int]] = {}
        reading: dict[str, list[int]] = {}
        for i, vector in enumerate(self.plan.vectors):
            acting.setdefault(vector.hook_name, []).append(i)
            if vector.gate is not None and vector.gate.hook_name not in (None, vector.hook_name):
                reading.setdefault(str(vector.gate.hook_name), []).append(i)
        for counts in (self.report._selected, self.report._edited):
            counts.update({name: [0] for name in acting})
        self.report.n_fired.update(dict.fromkeys(acting, 0))
        order = [name for name in reading if name not in acting] + list(acting)
        return {
            name: self._fastest(name, reading.get(name, []), acting.get(name, [])) for name in order
        }

    def _fastest(self, name: str, reading: list[int], acting: list[int]) -> Function:
        """`_function`, with a way past it for what is commonest: plain additions in a pass of which
        every token is edited.

        It has as few lines as it can: between two calls the weights of a block have gone through
        the processor's caches, so what such a call costs is the fetching of its code."""
        whole = self._function(name, reading, acting)
        adding = [i for i in acting if self.plan.vectors[i].coefficient != 0]
        plain = (
            not reading and self._rows is None and all(_adds(self.plan.vectors[i]) for i in acting)
        )
        if not plain or not adding:
            return whole
        fired, selected, edited = (
            self.report.n_fired,
            self.report._selected[name],
            self.report._edited[name],
        )
        dtype: torch.dtype | None = None
        device: torch.device | None = None
        deltas: tuple[Tensor, ...] = ()

        def fn(x: Tensor) -> Tensor | None:
            nonlocal dtype, device, deltas
            shape = x.shape
            if self._mask is not None or self._nothing or shape[:2] != self._shape:
                return whole(x)
            if x.dtype is not dtype or x.device != device:
                for i in adding:
                    self._check_width(i, x)
                dtype, device, deltas = x.dtype, x.device, tuple(self._delta(i, x) for i in adding)
            fired[name] += 1
            n = shape[0] * shape[1]
            selected[0] += n
            edited[0] += n * len(deltas)
            for delta in deltas:
                x = x + delta
            return x

        return fn

    def _function(self, name: str, reading: list[int], acting: list[int]) -> Function:
        def fn(x: Tensor) -> Tensor | None:
            self._check_pass(name, x)
            for i in reading:
                self._read_gate(i, x)
            if not acting:
                return None
            self.report.n_fired[name] += 1
            mask = self._mask = None if self._mask is None else self._mask.to(x.device)
            self._count(self.report._selected[name], mask, x)
            out = x
            for i in acting:
                gate = self.plan.vectors[i].gate
                if gate is not None and gate.hook_name in (None, name):
                    self._read_gate(i, out)
                out = self._edited(i, out, mask)
            return None if out is x else out

        return fn

    def _check_pass(self, name: str, x: Tensor) -> None:
        if self._unfollowed:
            return
        if self._shape is None:
            raise InterventionError(
                f"hook {name!r} fired in no pass of {self.host.name!r} that could be followed, so "
                "the tokens cannot be told; "
                "run the whole model, not a part of it."
            )
        if self._shape != tuple(x.shape[:2]):
            raise InterventionError(
                f"hook {name!r} carries {tuple(x.shape[:2])} tokens, but the pass has "
                f"{self._shape}; "
                "steer at a hook point that sees every token of the pass."
            )

    def _read_gate(self, i: int, x: Tensor) -> None:
        """Note which tokens gate `i` lets through, `[batch, pos]`; a decision per row is kept for
        the whole sequence."""
        gate, step = self.plan.vectors[i].gate, self._step
        assert gate is not None
        assert step is not None
        if gate.per == "row" and step.continues and i in self._open:
            return
        opened = gate.is_open(edits.centre(edits.wide(x)) if self._centred else x)
        if gate.per == "row":
            deciding = step.mask("last_prompt").to(x.device)
            if not bool(deciding.any(dim=1).all()):
                raise InterventionError(
                    "a gate per row decides at the last prompt token, which is not in this pass; "
                    "start steering before the "
                    "prompt is run."
                )
            opened = (opened & deciding).any(dim=1, keepdim=True)
        self._open[i] = opened

    def _edited(self, i: int, x: Tensor, mask: Tensor | None) -> Tensor:
        vector = self.plan.vectors[i]
        if vector.coefficient == 0:
            return x
        self._check_width(i, x)
        rows = self._row_coefficients(x)
        if vector.gate is not None:
            if i not in self._open:
                raise InterventionError(
                    f"the gate of {vector.hook_name!r} was not reached in this pass "
                    f"({vector.gate}); run the model from its "
                    "first layer, or gate at the vector's own hook point."
                )
            opened = self._open[i].to(x.device)  # the gate may have been read on another device
            mask = opened.expand(x.shape[:2]) if mask is None else mask & opened
        if rows is not None:
            on = (rows != 0)[:, None].expand(x.shape[:2])
            mask = on if mask is None else mask & on
        if self._nothing:
            return x
        self._count(self.report._edited[vector.hook_name], mask, x)
        if _adds(vector):
            delta = self._delta(i, x)
            return edits.add(
                x, delta if rows is None else rows.to(x)[:, None, None] * delta, mask=mask
            )
        before = edits.centre(edits.wide(x)) if self._centred else edits.wide(x)
        after = _apply(
            vector, before, self._delta(i, before), None if rows is None else rows[:, None]
        )
        out = (edits.wide(x) + (after - before)).to(x.dtype)
        return out if mask is None else torch.where(mask[..., None], out, x)

    def _check_width(self, i: int, x: Tensor) -> None:
        vector = self.plan.vectors[i]
        if vector.direction.shape[0] != x.shape[-1]:
            raise WidthError(
                f"the vector at {vector.hook_name!r} has width {vector.direction.shape[0]}, but "
                "the activations there have "
                f"width {x.shape[-1]}."
            )

    def _delta(self, i: int, x: Tensor) -> Tensor:
        key = (i, x.dtype, x.device)
        if key not in self._deltas:
            delta = self.plan.vectors[i].delta
            self._deltas[key] = (edits.centre(delta) if self._centred else delta).to(x)
        return self._deltas[key]

    def _row_coefficients(self, x: Tensor) -> Tensor | None:
        if self._rows is None:
            return None
        if self._rows.shape[0] != x.shape[0]:
            raise ArgumentError(
                f"row_coefficients has {self._rows.shape[0]} entries, but the batch has "
                f"{x.shape[0]} rows."
            )
        return self._rows.to(x.device)

    def _count(self, parts: list[Any], mask: Tensor | None, x: Tensor) -> None:
        """Add to `parts`: a number, and tensors that nobody has waited for yet."""
        if mask is None:
            parts[0] += x.shape[0] * x.shape[1]
        elif mask is self._mask:
            self._mask_total = mask.sum() if self._mask_total is None else self._mask_total
            parts.append(self._mask_total)
        else:
            parts.append(mask.sum())
        if len(parts) > 512:
            parts[1:] = [sum(p.to(x.device) for p in parts[1:])]

    # -- a bare list of functions -----------------------------------------------------------------

    def functions(
        self, attention_mask: Tensor | None
    ) -> list[tuple[str, Callable[..., Tensor | None]]]:
        """See `SteeringPlan.fwd_hooks`: each hook point keeps its own clock, moved by the shapes it
        sees."""
        self._unfollowed = self._everywhere and attention_mask is None
        return [
            (name, self._listed(name, fn, attention_mask)) for name, fn in self._functions().items()
        ]

    def _listed(
        self, name: str, fn: Function, attention_mask: Tensor | None
    ) -> Callable[..., Tensor | None]:
        seen: list[Step] = []

        def hook_fn(tensor: Tensor, hook: Any = None) -> Tensor | None:
            if tensor.ndim != 3:
                raise HookNameError(
                    f"hook {name!r} carries {tuple(tensor.shape)}; steering needs [batch, pos, d]."
                )
            batch, n_new = tensor.shape[:2]
            if self._unfollowed:
                self._shape = (batch, n_new)
                out = fn(tensor)
                self.report.n_forwards = max(self.report.n_fired.values())
                return out
            follows = n_new == 1 and bool(seen) and seen[0].real.shape[0] == batch
            past = seen[0].real.shape[1] if follows else 0
            self._place(ForwardInfo(batch, n_new, past, None if past else attention_mask), name)
            assert self._step is not None
            seen[:] = [self._step]
            out = fn(tensor)
            self.report.n_forwards = max(self.report.n_fired.values())
            return out

        return hook_fn


def _adds(vector: SteeringVector) -> bool:
    """Whether all that the vector ever does is to add its delta."""
    return vector.edit == "add" and not vector.preserve_norm and vector.gate is None


def _apply(vector: SteeringVector, x: Tensor, delta: Tensor, rows: Tensor | None) -> Tensor:
    """The edit on float32 activations in the plan's basis; `rows` `[batch, 1]` multiplies the
    coefficient."""
    keep, factor = vector.preserve_norm, 1.0 if rows is None else rows
    if vector.edit == "add":
        return edits.add(x, delta if rows is None else rows[..., None] * delta, preserve_norm=keep)
    if vector.edit == "ablate":
        return edits.ablate(
            x, vector.direction, strength=vector.coefficient * factor, preserve_norm=keep
        )
    if vector.edit == "rescale":
        return edits.rescale(
            x, vector.direction, factor=1.0 + vector.coefficient * factor, preserve_norm=keep
        )
    bound = torch.as_tensor(vector.scale * factor, device=x.device)
    infinite = torch.full_like(bound, torch.inf)
    low, high = torch.where(bound > 0, bound, -infinite), torch.where(bound < 0, bound, infinite)
    return edits.clamp(x, vector.direction, low=low, high=high, preserve_norm=keep)


class SteeringHandle:
    """Steering without an end; `.remove()` ends it, once or many times."""

    def __init__(self, steering: Steering) -> None:
        self.report = steering.report
        self._stack = ExitStack()
        self._stack.enter_context(steering._installed())

    def remove(self) -> None:
        """Take the hooks off; nothing happens the second time."""
        self._stack.close()

    def __repr__(self) -> str:
        return f"SteeringHandle({self.report!r})"
