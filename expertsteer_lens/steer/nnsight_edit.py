"""Plans on nnsight beyond hooks: `plan.apply` inside an open run, and `plan.edit`, which may travel
to a server."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor

from expertsteer_lens.errors import HostError, InterventionError, ModelStateError
from expertsteer_lens.hosts.blocks import Blocks, Side
from expertsteer_lens.hosts.pass_arguments import is_stand_in, read_pass
from expertsteer_lens.interventions.clock import PositionClock
from expertsteer_lens.interventions.positions import PassTokens, Positions
from expertsteer_lens.interventions.vector_edit import VectorEdit

from .checks import check_model, check_overflow, check_padding

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host
    from expertsteer_lens.hosts.nnsight.host import EditHandle, NNsightHost
    from expertsteer_lens.hosts.nnsight.runs import HookCall

    from .plan import SteeringPlan
    from .run import PlanRun


def apply_plan(plan: SteeringPlan, host: Host, start: Callable[[Host], PlanRun]) -> None:
    """Steer the nnsight run whose code is executing; see `SteeringPlan.apply`.

    Args:
        plan: what to do.
        host: the model.
        start: makes the run of the plan, checked against the host.
    """
    model = _nnsight_host(
        host, "apply works inside an nnsight trace; on {kind} use `with plan.hooks(model):`."
    )
    caller = model.open_run()
    if caller is None:
        raise HostError(
            "plan.apply(model) was called outside of a trace; call it first thing inside `with "
            "model.trace(...):` or `with model.generate(...):`, or use `with plan.hooks(model):` "
            "around them."
        )
    if caller.has_joined(id(plan)):
        return  # in a loop over steps: it is at work since the first
    if caller.has_begun():
        raise InterventionError(
            "plan.apply(model) was called after the model began to run, or in a loop over later "
            "steps; call it first thing in the body, outside of loops: it steers every step, and "
            "the plan's positions say which tokens."
        )
    run = start(host)
    run.on_generate(True)  # a run is one sequence: a single pass, or one call of generate
    caller.join(run.on_forward, run.functions(), finish=run.finish, mark=id(plan))


def edit_plan(
    plan: SteeringPlan,
    host: Host,
    *,
    allow_mismatch: bool,
    prompt_lengths: int | Sequence[int] | Tensor | None,
) -> EditHandle:
    """Put the plan among the default edits of an nnsight model; see `SteeringPlan.edit`."""
    model = _nnsight_host(
        host, "edit makes an nnsight edit; on {kind} use `handle = plan.attach(model)`."
    )
    if any(vector.gate is not None for vector in plan.vectors):
        raise HostError(
            "an nnsight edit cannot hold gates; use plan.hooks(model), attach or apply."
        )
    # Weights that only a server has: nothing is loaded to look at them.
    unseen = not model.remote and not model.is_loaded
    if unseen and (plan.basis is None or ("fingerprint" in plan.target and not allow_mismatch)):
        raise ModelStateError(
            f"the weights of {host.name!r} are not loaded here, so the plan cannot be checked "
            "against them; call model.dispatch(), pass as_host(model, remote=True), or give the "
            "plan a basis and pass allow_mismatch=True."
        )
    check_model(plan, host, allow_mismatch=allow_mismatch or unseen)
    edit = PlanEdit(
        plan,
        model.blocks,
        argument_names=model.decoder_arguments(),
        centred=(plan.basis or host.basis) == "centred",
        prompt_lengths=prompt_lengths,
        pad_id=getattr(host.tokenizer, "pad_token_id", None),
    )
    # Here the counts of tokens in caches outlive a run, so that one trace can go on from the cache
    # of another.
    here = partial(edit.calls, WeakKeyDictionary())
    return model.add_edit(here, sent=edit.calls)


def _nnsight_host(host: Host, otherwise: str) -> NNsightHost:
    if host.kind != "nnsight":
        raise HostError(otherwise.format(kind=host.kind))
    return cast("NNsightHost", host)


class PlanEdit:
    """A plan as what is called at its hook points in a run, here or on a server.

    It is sent as source, with the functions and classes it uses (see `hosts.nnsight.remote.pack`),
    so it is a plain class and knows the model by paths and names only.

    Args:
        plan: without gates.
        blocks: where the hook points are.
        argument_names: of the decoder's positional arguments.
        centred: basis in which the plan works.
        prompt_lengths: tokens of each row that are prompt; None: those of the first pass of the
            run.
        pad_id: the tokenizer's, None if it has none.
    """

    def __init__(
        self,
        plan: SteeringPlan,
        blocks: Blocks,
        *,
        argument_names: Sequence[str],
        centred: bool,
        prompt_lengths: int | Sequence[int] | Tensor | None,
        pad_id: int | None,
    ) -> None:
        PositionClock(prompt_lengths)  # refuses what is no length, before anything is put on
        self._positions: Positions = plan.positions
        self._decoder = blocks.base
        self._argument_names = list(argument_names)
        self._prompt_lengths = prompt_lengths
        self._pad_id = pad_id
        # Path, side and vectors of each hook point, in the order in which a pass reaches them.
        self._places: list[tuple[str, Side, list[VectorEdit]]] = []
        for name, place in blocks.places.items():
            vectors = [v for v in plan.vectors if v.hook_name == name and v.coefficient != 0]
            if vectors:
                edits = [vector.prepared(centred=centred) for vector in vectors]
                self._places.append((place.path, place.side, edits))

    def calls(self, counts: MutableMapping[Any, int] | None = None) -> list[HookCall]:
        """The calls of one run: the decoder's arguments, which say where the pass is, then each
        hook point.

        Args:
            counts: tokens in caches that do not count them, see `read_pass`; None: none is known.
        """
        counts = WeakKeyDictionary() if counts is None else counts
        clock, positions = PositionClock(self._prompt_lengths), self._positions
        clock.generation(True)  # a run is one sequence: a single pass, or one call of generate
        current: list[PassTokens] = []

        def place(inputs: Any) -> None:
            args, kwargs = inputs
            info = read_pass(self._argument_names, args, kwargs, counts)
            if info is None:
                return
            if positions != "all":
                lengths_given = self._prompt_lengths is not None
                check_padding(
                    info, self._pad_id, positions, prompt=None, lengths_given=lengths_given
                )
            step = clock.observe(info)
            everything = positions == "all" and info.attention_mask is None
            mask = None if everything else step.mask(positions)
            current[:] = [PassTokens((info.batch, info.n_new), mask)]

        def edit_at(path: str, edits: list[VectorEdit]) -> Callable[[Any], Any]:
            def fn(x: Any) -> Any:
                if is_stand_in(x) or current[0].is_empty:
                    return None
                before = x
                for edit in edits:
                    x = edit(x, current[0].mask_on(x.device))
                if str(x.dtype) == "torch.float16":
                    check_overflow(path, before, x)
                return x

            return fn

        return [
            (self._decoder, "arguments", place),
            *((path, side, edit_at(path, edits)) for path, side, edits in self._places),
        ]
