"""A plan at work on a model: which tokens of which pass get which edit, and whether it all
happened."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, HookNameError, InterventionError
from expertsteer_lens.hosts.scope import Scope
from expertsteer_lens.interventions.arithmetic import centre, wide
from expertsteer_lens.interventions.clock import (
    ForwardInfo,
    PositionClock,
    SequenceState,
    SequenceToken,
)
from expertsteer_lens.interventions.positions import PassTokens, needs_prompt_length, packed_refusal
from expertsteer_lens.interventions.vector_edit import VectorEdit

from .attached import SteeringHandle
from .attached import detach as detach
from .checks import (
    check_half_precision,
    check_model,
    check_outcome,
    check_overflow,
    check_padding,
    check_present,
)
from .recompute import Repeated, check_reentrant
from .report import RunReport

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host, Registration

    from .plan import SteeringPlan

Function = Callable[[Tensor], Tensor | None]


class PlanRun:
    """One use of a plan on one model. Built (and checked) on entry, thrown away at the end.

    It is the `Observer` of the model's passes: `on_forward` works out the tokens of a pass before
    its first block runs (`_pass`), and the function at each hook point edits them."""

    def __init__(
        self,
        plan: SteeringPlan,
        host: Host,
        *,
        allow_mismatch: bool = False,
        prompt_lengths: int | Sequence[int] | Tensor | None = None,
        row_coefficients: Sequence[float] | Tensor | None = None,
        everywhere: bool = False,
        vector_edits: Sequence[VectorEdit] | None = None,
    ) -> None:
        """See `SteeringPlan.hooks`.

        Args:
            plan: what is done.
            host: the model.
            allow_mismatch: see `SteeringPlan.hooks`.
            prompt_lengths: see `SteeringPlan.hooks`.
            row_coefficients: see `SteeringPlan.hooks`.
            everywhere: steer every thread.
            vector_edits: used in place of the plan's own, one a vector: of the same kind, with
                parameters that gradients reach.
        """
        self.plan = plan
        self.host = host
        self.report = RunReport()
        self.scope = Scope(everywhere=everywhere)
        self._prompt_lengths = prompt_lengths
        self._row_coefficients = _check_rows(row_coefficients)
        host.check_ready()
        check_model(plan, host, allow_mismatch=allow_mismatch)
        self._centred = (plan.basis or host.basis) == "centred"
        self._edits = list(vector_edits or plan.prepared(centred=self._centred))
        # Every token of every pass, wherever it stands in its sequence: then there is nothing to
        # find out about a pass but its shape.
        self._edits_everything = plan.positions == "all" and all(
            vector.gate is None for vector in plan.vectors
        )
        # What was seen of each sequence, by what stands for it: a cache may go from one thread to
        # another.
        self._sequences: weakref.WeakKeyDictionary[SequenceToken, SequenceState] = (
            weakref.WeakKeyDictionary()
        )
        self._here = _Here()
        # Several threads may count at once.
        self._counting = threading.Lock()
        # The hooks, while they are on, and the handle that takes them off (see `SteeringHandle`).
        self._registration: Registration | None = None
        self._was_installed = False
        # Generate calls and streams that are open, in whichever thread.
        self._n_generating = 0
        self._repeated = Repeated()
        self.handle: SteeringHandle | None = None
        plan._last[:] = [self.report]

    # -- installing -------------------------------------------------------------------------------

    @contextmanager
    def run(self) -> Iterator[RunReport]:
        """Steer inside the block; see `SteeringPlan.hooks`."""
        with self.installed() as registration:
            yield self.report
            lost = registration.lost()
        check_outcome(
            self.report,
            lost,
            model=self.host.name,
            positions=self.plan.positions,
            n_elsewhere=self.scope.n_elsewhere,
        )

    @contextmanager
    def installed(self) -> Iterator[Registration]:
        """Steer inside the block, without a check at its end."""
        with ExitStack() as stack:
            scope = stack.enter_context(self.scope.opened())
            registration = stack.enter_context(self.host.intervene(self.functions(), scope=scope))
            stack.enter_context(self.host.watch(self, scope=scope))
            self._registration, self._was_installed = registration, True
            stack.callback(setattr, self, "_registration", None)
            yield registration
        if self._n_generating > 0:
            raise InterventionError(_ENDED_EARLY)

    def finish(self) -> None:
        """Check what `run` checks at its end, where a host knows the end of its own run."""
        check_outcome(self.report, [], model=self.host.name, positions=self.plan.positions)

    # -- the observer: called before the first block of every pass --------------------------------

    def on_generate(self, entering: bool, prompt: Tensor | None = None) -> None:
        """See `Observer`."""
        self._clock(None).generation(entering, prompt)
        with self._counting:
            self._n_generating += 1 if entering else -1
        if not entering and self._was_installed and self._registration is None:
            raise InterventionError(_ENDED_EARLY)

    def on_prepare(self) -> None:
        """See `Observer`."""
        self._clock(None).prepare()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """See `Observer`."""
        clock = self._clock(None)
        calls = clock.set_aside()
        try:
            yield
        finally:
            # A stream may be taken up by another thread than the one that set it aside: then the
            # calls go with it.
            self._clock(None).take_up(calls)

    def on_packed(self, options: Mapping[str, Any], kept: Any = None) -> None:
        """See `Observer`."""
        if not self.host.packs_requests:
            raise InterventionError(
                f"the attention of {self.host.name!r} takes the several requests of a row for one "
                "sequence (continuous batching), steered or not; use model.generate, or the "
                "Hugging Face model before it is wrapped."
            )
        rule = self.plan.positions
        if callable(rule) or needs_prompt_length(rule):
            raise InterventionError(packed_refusal(rule))
        if any(v.gate is not None and v.gate.per == "row" for v in self.plan.vectors):
            raise InterventionError(
                "a gate per row decides at the last prompt token, which a row of several requests "
                "does not show (continuous batching); gate per token, or use model.generate."
            )
        config = options.get("continuous_batching_config")
        shares = getattr(config, "allow_block_sharing", None) is not False
        kept_shares = kept is not None and (
            getattr(getattr(kept, "continuous_batching_config", None), "allow_block_sharing", None)
            is not False
        )
        if kept_shares or (options.get("persistent_manager") and shares):
            raise InterventionError(
                "a manager of continuous batching that is kept (persistent_manager=True) gives the "
                "cache of one request to the next that begins alike, whether it is steered or not; "
                "leave persistent_manager out, after model.destroy_cached_continuous_batching_"
                "manager(), or pass ContinuousBatchingConfig(allow_block_sharing=False)."
            )
        if self.host.device.type == "cuda" and getattr(config, "use_cuda_graph", None) is not False:
            raise InterventionError(
                "continuous batching on CUDA records graphs, which would run on without the hooks; "
                "pass continuous_batching_config=ContinuousBatchingConfig(use_cuda_graph=False)."
            )

    def on_half_precision(self, states: Tensor, mask: Tensor | None) -> None:
        """See `Observer`."""
        check_half_precision(states, mask)

    def on_forward(self, info: ForwardInfo) -> None:
        """See `Observer`."""
        if self._registration is not None:  # before the first block: nothing runs half steered
            check_present(self._registration.lost(thorough=False))
        check_reentrant()
        self._here.has_graph = torch.is_grad_enabled()
        with self._counting:
            self.report.n_forwards += 1
        if self.plan.positions != "all":
            check_padding(
                info,
                getattr(self.host.tokenizer, "pad_token_id", None),
                self.plan.positions,
                prompt=self._clock(None).prompt_rows(info.batch),
                lengths_given=self._prompt_lengths is not None,
            )
        self._place(info)

    def _clock(self, hook_name: str | None) -> PositionClock:
        clocks = self._here.clocks
        if hook_name not in clocks:
            # The hook points of a bare list share no sequences: each sees every pass.
            shared = self._sequences if hook_name is None else None
            clocks[hook_name] = PositionClock(self._prompt_lengths, shared)
        return clocks[hook_name]

    def _place(self, info: ForwardInfo, hook_name: str | None = None) -> PassTokens:
        """Work out which tokens of the pass are edited; `hook_name` in a bare list of functions,
        where every hook point places the pass for itself."""
        shape, given = (info.batch, info.n_new), info.attention_mask
        is_whole = given is None or given.shape == (info.batch, info.past + info.n_new)
        if self._edits_everything and is_whole and hook_name is None:
            mask = None if given is None else given[:, info.past :].bool()
            return self._now(PassTokens(shape, mask))
        step = self._clock(hook_name).observe(info)
        gates = self._here.gates if hook_name is not None else step.memory
        for i, vector in enumerate(self.plan.vectors):
            gate = vector.gate
            if gate is None or hook_name not in (None, gate.hook_name or vector.hook_name):
                continue
            # A decision of an earlier pass must not be taken for one of this pass; a decision per
            # row holds as long as its sequence.
            if gate.per == "token" or not step.continues:
                gates.pop(i, None)
        self._here.gates = gates
        selects_all = self.plan.positions == "all" and given is None
        mask = None if selects_all else step.mask(self.plan.positions)
        return self._now(PassTokens(shape, mask, step))

    def _now(self, tokens: PassTokens) -> PassTokens:
        self._here.tokens = tokens
        return tokens

    # -- the functions at the hook points ---------------------------------------------------------

    def functions(self) -> dict[str, Function]:
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

    def _followed(self, fn: Function) -> Function:
        """`fn`, which may be called once more in a backward pass; see `recompute`."""
        here, grad_is_on = self._here, torch.is_grad_enabled

        def switch(known: tuple[PassTokens | None, dict[Any, Any]]) -> Any:
            before = here.tokens, here.gates
            here.tokens, here.gates = known
            return before

        def is_on() -> bool:
            return self._registration is not None

        def followed(x: Tensor) -> Tensor | None:
            if not (grad_is_on() or here.has_graph):
                return fn(x)
            return self._repeated.run(
                fn,
                x,
                now=(here.tokens, here.gates),
                switch=switch,
                is_on=is_on if self._was_installed else None,
            )

        return followed

    def _fastest(self, name: str, reading: list[int], acting: list[int]) -> Function:
        """`_function`, with a way past it for what is commonest: plain additions in a pass of which
        every token is edited.

        It has as few lines as it can: between two calls the weights of a block have gone through
        the processor's caches, so what such a call costs is the fetching of its code."""
        general = self._followed(self._function(name, reading, acting))
        only_adds = (
            not reading
            and self._row_coefficients is None
            and all(self._edits[i].adds_delta and self._is_free(i) for i in acting)
        )
        adding = [self._edits[i] for i in acting if self.plan.vectors[i].coefficient != 0]
        if not only_adds or not adding:
            return general
        fired, here, counting = self.report.n_fired, self._here, self._counting
        grad_is_on = torch.is_grad_enabled
        selected, edited = self.report._selected[name], self.report._edited[name]
        ready: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}

        def fn(x: Tensor) -> Tensor | None:
            shape, tokens = x.shape, here.tokens
            if tokens is None or tokens.mask is not None or shape[:2] != tokens.shape:
                return general(x)
            if grad_is_on() or here.has_graph:
                return general(x)
            dtype = x.dtype
            deltas = ready.get((dtype, x.device))
            if deltas is None:
                deltas = ready[dtype, x.device] = tuple(one.delta(x) for one in adding)
            n = shape[0] * shape[1]
            with counting:
                fired[name] += 1
                selected[0] += n
                edited[0] += n * len(deltas)
            before = x
            for delta in deltas:
                x = x + delta
            if dtype is torch.float16:
                check_overflow(name, before, x)
            return x

        return fn

    def _is_free(self, i: int) -> bool:
        return self.plan.vectors[i].gate is None

    def _function(self, name: str, reading: list[int], acting: list[int]) -> Function:
        def fn(x: Tensor) -> Tensor | None:
            tokens = self._check_pass(name, x)
            for i in reading:
                self._read_gate(i, x, tokens)
            if not acting:
                return None
            tokens.mask_on(x.device)
            with self._counting:
                self.report.n_fired[name] += 1
                _count(self.report._selected[name], tokens.n_selected(), x)
            out = x
            for i in acting:
                gate = self.plan.vectors[i].gate
                if gate is not None and gate.hook_name in (None, name):
                    self._read_gate(i, out, tokens)
                out = self._apply_vector(i, out, tokens)
            if x.dtype is torch.float16 and out is not x:
                check_overflow(name, x, out)
            return None if out is x else out

        return fn

    def _check_pass(self, name: str, x: Tensor) -> PassTokens:
        tokens = self._here.tokens
        if tokens is None:
            raise InterventionError(
                f"hook {name!r} fired in no pass of {self.host.name!r} that could be followed, so "
                "the tokens cannot be told; run the whole model, not a part of it."
            )
        if tokens.shape != tuple(x.shape[:2]):
            raise InterventionError(
                f"hook {name!r} carries {tuple(x.shape[:2])} tokens, but the pass has "
                f"{tokens.shape}; steer at a hook point that sees every token of the pass."
            )
        return tokens

    def _read_gate(self, i: int, x: Tensor, tokens: PassTokens) -> None:
        """Note which tokens gate `i` lets through, `[batch, pos]`; a decision per row is kept for
        the whole sequence."""
        gate, step = self.plan.vectors[i].gate, tokens.step
        assert gate is not None
        assert step is not None  # a plan with gates does not edit everything
        gates = self._here.gates
        if gate.per == "row" and step.continues and i in gates:
            return
        opened = gate.is_open(centre(wide(x)) if self._centred else x)
        if gate.per == "row":
            deciding = step.mask("last_prompt").to(x.device)
            if not bool(deciding.any(dim=1).all()):
                raise InterventionError(
                    "a gate per row decides at the last prompt token, which is not in this pass; "
                    "start steering before the prompt is run."
                )
            opened = (opened & deciding).any(dim=1, keepdim=True)
        gates[i] = opened

    def _apply_vector(self, i: int, x: Tensor, tokens: PassTokens) -> Tensor:
        vector, mask = self.plan.vectors[i], tokens.mask
        if vector.coefficient == 0:
            return x
        rows = self._rows_of(x)
        if vector.gate is not None:
            if i not in self._here.gates:
                raise InterventionError(
                    f"the gate of {vector.hook_name!r} was not reached in this pass "
                    f"({vector.gate}); run the model from its first layer, or gate at the vector's "
                    "own hook point."
                )
            # The gate may have been read on another device.
            opened = self._here.gates[i].to(x.device).expand(x.shape[:2])
            mask = opened if mask is None else mask & opened
        if rows is not None:
            on = (rows != 0)[:, None].expand(x.shape[:2])
            mask = on if mask is None else mask & on
        if tokens.is_empty:
            return x
        if mask is tokens.mask:
            n_edited = tokens.n_selected()
        else:
            assert mask is not None
            n_edited = mask.sum()
        out = self._edits[i](x, mask, rows)
        with self._counting:
            _count(self.report._edited[vector.hook_name], n_edited, x)
        return out

    def _rows_of(self, x: Tensor) -> Tensor | None:
        rows = self._row_coefficients
        if rows is None:
            return None
        if rows.shape[0] != x.shape[0]:
            raise ArgumentError(
                f"row_coefficients has {rows.shape[0]} entries, but the batch has {x.shape[0]} "
                "rows."
            )
        return rows.to(x.device)

    # -- a bare list of functions -----------------------------------------------------------------

    def listed_functions(
        self, attention_mask: Tensor | None
    ) -> list[tuple[str, Callable[..., Tensor | None]]]:
        """See `SteeringPlan.fwd_hooks`: nobody watches the model, so each hook point keeps its own
        clock, moved by the shapes it sees."""
        return [
            (name, self._listed(name, fn, attention_mask)) for name, fn in self.functions().items()
        ]

    def _listed(
        self, name: str, fn: Function, attention_mask: Tensor | None
    ) -> Callable[..., Tensor | None]:
        edits_everything = self._edits_everything and attention_mask is None
        last: PassTokens | None = None

        def place(batch: int, n_new: int) -> PassTokens:
            if edits_everything:
                return self._now(PassTokens((batch, n_new)))
            cached = 0
            if n_new == 1 and last is not None and last.step is not None:
                known = last.step.real
                cached = known.shape[1] if known.shape[0] == batch else 0
            given = None if cached else attention_mask
            return self._place(ForwardInfo(batch, n_new, cached, given), name)

        def hook_fn(tensor: Tensor, hook: Any = None) -> Tensor | None:
            nonlocal last
            if tensor.ndim != 3:
                raise HookNameError(
                    f"hook {name!r} carries {tuple(tensor.shape)}; steering needs [batch, pos, d]."
                )
            last = place(tensor.shape[0], tensor.shape[1])
            out = fn(tensor)
            self.report.n_forwards = max(self.report.n_fired.values())
            return out

        return hook_fn


_ENDED_EARLY = (
    "steering ended in the middle of a generate call or a stream, whose later tokens are not "
    "steered; wait for it to end (join its thread, read or close the stream) before the block "
    "ends or handle.remove() is called."
)


class _Here(threading.local):
    """Of each thread that runs the model: its clocks, the pass that is running, and what each gate
    lets through of it, `[batch, pos]` or `[batch, 1]`, by number of vector.

    A bare list of functions has a clock per hook point (by its name); otherwise the passes of the
    model move one clock (None)."""

    def __init__(self) -> None:
        self.clocks: dict[str | None, PositionClock] = {}
        self.tokens: PassTokens | None = None
        self.has_graph = False
        """Whether gradients were on when the pass began."""
        self.gates: dict[Any, Any] = {}


Steering = PlanRun
"""The old name, until the release after the next."""


def _check_rows(row_coefficients: Sequence[float] | Tensor | None) -> Tensor | None:
    if row_coefficients is None:
        return None
    rows = torch.as_tensor(row_coefficients, dtype=torch.float32)
    if rows.ndim != 1 or not bool(torch.isfinite(rows).all()):
        raise ArgumentError(
            "row_coefficients must be a list of finite numbers, one per row of the batch."
        )
    return rows


def _count(parts: list[Any], n: Tensor | int, x: Tensor) -> None:
    """Add to `parts`: a number, and tensors that nobody has waited for yet."""
    if isinstance(n, int):
        parts[0] += n
    else:
        parts.append(n)
    if len(parts) > 512:
        parts[1:] = [sum(part.to(x.device) for part in parts[1:])]
