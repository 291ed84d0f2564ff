"""nnsight 0.8: `TransformersModel` (and the deprecated `LanguageModel`), or `NNsight` around a
Hugging Face model.

Steering is a default edit of nnsight's own kind, put in front of what the user writes in a trace,
so the steered layer's `.output` shows the steered value, as everything after it does. While no
trace is running (somebody calls the wrapped module itself) a torch hook does the same. Both are
gone at the end, and the user's edits and hooks are not touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expertsteer_lens.errors import HostError, InterventionError, ModelStateError
from expertsteer_lens.hosts.base import Host
from expertsteer_lens.hosts.facts import facts, measure_basis, measure_fingerprint
from expertsteer_lens.hosts.huggingface import (
    HuggingFaceHost,
    TorchHooks,
    generate_options,
    no_cache,
)
from expertsteer_lens.hosts.parts import EditFn, Observer, TokenBatch, guarded
from expertsteer_lens.hosts.pass_tracking import forward_info, is_stand_in, parameter_names

from . import remote as remotely
from . import runs

if TYPE_CHECKING:
    from expertsteer_lens.steer.plan import SteeringPlan
    from expertsteer_lens.steer.run import Steering


class NNsightHost(Host):
    """An nnsight model that can be read and steered.

    With `remote` (True, "local" or the address of a server, as nnsight takes it) the model is run
    there: it is captured, measured and generated from without its weights ever being loaded here,
    and steered with `plan.edit(model)`."""

    kind = "nnsight"

    def __init__(self, model: Any, *, tokenizer: Any = None, remote: bool | str = False) -> None:
        _check_root(model)
        self.remote = remote
        self.inner = inner = HuggingFaceHost(model._module, tokenizer=tokenizer)
        super().__init__(
            model,
            parameters=model._module,
            tokenizer=tokenizer or getattr(model, "tokenizer", None) or inner.tokenizer,
            name=inner.name
            if inner.name != type(model._module).__name__
            else str(getattr(model, "repo_id", None) or inner.name),
            n_layers=inner.n_layers,
            d_model=inner.d_model,
            d_vocab=inner.d_vocab,
            n_ctx=inner.n_ctx,
        )

    # -- the weights, which nnsight may not have loaded yet ---------------------------------------

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are on this machine; nnsight loads them at the first run that is not
        remote."""
        return bool(getattr(self.model, "dispatched", True))

    def _local(self) -> HuggingFaceHost:
        """The wrapped module as a host, with its weights."""
        if not self.is_loaded:
            self.model.dispatch()
        if self.inner.model is not self.model._module:
            self.inner, self._weights = HuggingFaceHost(self.model._module), self.model._module
        return self.inner

    def _in_training(self) -> bool:
        # Before the weights are loaded the flag is that of an empty shell; of a remote model it
        # says nothing about the server.
        return self.is_loaded and not self.remote and super()._in_training()

    @contextmanager
    def _standing_down(self) -> Iterator[HuggingFaceHost]:
        """Inside, the wrapped module runs as if no trace were in progress."""
        inner, interleaver = self._local(), self.model.interleaver
        before, interleaver.interleaving = interleaver.interleaving, False
        try:
            yield inner
        finally:
            interleaver.interleaving = before

    @property
    def device(self) -> torch.device:
        """See `Host.device`; the CPU while the weights are not loaded."""
        found = super().device
        return torch.device("cpu") if found.type == "meta" else found

    @property
    def basis(self) -> str:
        """See `Host.basis`; measured on the wrapped module, so nobody's edits take part."""
        if self.remote:
            return self._measured("basis", measure_basis)
        with self._standing_down() as inner:
            return inner.basis

    @property
    def fingerprint(self) -> str:
        """See `Host.fingerprint`; measured on the wrapped module."""
        if self.remote:
            return self._measured("fingerprint", measure_fingerprint)
        with self._standing_down() as inner:
            return inner.fingerprint

    def _measured(self, what: str, measure: Callable[[Host], str]) -> str:
        known = facts(self._weights)
        if what not in known:
            known[what] = measure(self)
        return known[what]

    def all_hook_names(self) -> list[str]:
        """See `HuggingFaceHost.all_hook_names`."""
        return self.inner.all_hook_names()

    def check_hook_names(self, names: Any, *, steering: bool = False) -> list[str]:
        """See `HuggingFaceHost.check_hook_names`; what it measures is not measured on weights that
        are elsewhere."""
        if self.remote or not self.is_loaded:
            return super().check_hook_names(names, steering=steering)
        with self._standing_down() as inner:
            return inner.check_hook_names(names, steering=steering)

    # -- running ----------------------------------------------------------------------------------

    def forward(self, batch: TokenBatch, *, stop_at_layer: int | None = None) -> Tensor:
        """Logits, or the residual entering `stop_at_layer`, where nnsight stops the run. The user's
        edits take part."""
        self.check_ready()
        options = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            **no_cache(self.model._module),
        }
        if self.remote:
            return remotely.logits(self.model, options, remote=self.remote)
        if stop_at_layer is None or stop_at_layer >= self.n_layers:
            return self.model.trace(**options, trace=False).logits
        kept: list[Tensor] = []
        with self._edited(
            [runs.worker(self.model, runs.stopping(self.inner.blocks.layers[stop_at_layer], kept))]
        ):
            self.model.trace(**options, trace=False)
        return kept[0]

    def read_remotely(
        self, batch: TokenBatch, names: list[str], positions: str | int
    ) -> dict[str, Tensor]:
        """The rows that `positions` picks at each hook point, from one run on the server; only they
        travel back."""
        options = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            **no_cache(self.model._module),
        }
        places = {
            name: self.inner.blocks.places[name]
            for name in self.inner.blocks.places
            if name in names
        }
        return remotely.rows(self.model, options, places, positions, remote=self.remote)

    def _generate_ids(
        self, ids: Tensor, *, max_new_tokens: int, temperature: float, eos: int | None
    ) -> Tensor:
        options = generate_options(
            max_new_tokens=max_new_tokens, temperature=temperature, eos=eos, pad=self.pad_id
        )
        options |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.remote:
            out = remotely.generated(self.model, options, remote=self.remote)
        elif callable(getattr(type(self.model), "generate", None)):
            out = self.model.generate(**options)
        else:
            # A bare NNsight has no `generate` of its own: it would hand out the module's, which no
            # edit reaches.
            out = self.model.trace(**options, fn="generate", trace=False)
        return out[:, ids.shape[1] :]

    # -- interventions ----------------------------------------------------------------------------

    @contextmanager
    def intervene(self, fns: Mapping[str, EditFn]) -> Iterator[_Registered]:
        """An edit per hook point for traces, a torch hook for calls outside of them; removed
        exactly.

        A remote model runs the functions on its server: they must be nested functions of torch
        operations alone."""
        self.check_hook_names(list(fns))
        if self.remote:
            places = self.inner.blocks.places
            sent = [
                runs.following(places[name].path, places[name].side, fn) for name, fn in fns.items()
            ]
            with self._edited([runs.worker(self.model, body) for body in sent]) as edits:
                yield _Registered(self.model, dict(zip(fns, edits, strict=True)), TorchHooks())
            return
        checked = {name: _unless_scanned(guarded(name, fn)) for name, fn in fns.items()}
        outside = self._local().torch_hooks(
            checked, active=lambda: not runs.run_in_progress(self.model)
        )
        with self._edited(self._stations(checked)) as edits, outside as hooks:
            yield _Registered(self.model, dict(zip(fns, edits, strict=True)), hooks)

    def _stations(self, fns: Mapping[str, EditFn]) -> list[runs.Station]:
        stops = []
        for name, fn in fns.items():
            place = self.inner.blocks.places[name]
            stops.append((runs.location(self.model.get(place.path), place.side), place.side, fn))
        return [runs.Station(lambda stop=stop: [stop]) for stop in stops]  # type: ignore[misc]

    @contextmanager
    def _edited(self, edits: Sequence[Any]) -> Iterator[Sequence[Any]]:
        with ExitStack() as stack:
            for edit in edits:
                self.model._edits.append(edit)
                stack.callback(discard_edit, self.model, edit)
            yield edits

    def watch(self, observer: Observer) -> AbstractContextManager[None]:
        """See `Host.watch`: hooks on the wrapped module, which runs inside traces and outside."""
        if self.remote:
            raise HostError(
                "a remote model cannot be watched from here; steer it with `handle = "
                "plan.edit(model)`."
            )
        return self._local().watch(observer)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """See `Host.quiet`: torch hooks and edits."""
        edits, self.model._edits = self.model._edits, []
        try:
            with self.inner.quiet():
                yield
        finally:
            self.model._edits = edits

    # -- plans ------------------------------------------------------------------------------------

    def apply_plan(self, plan: SteeringPlan, make: Callable[[Host], Steering]) -> None:
        """Steer the run whose code is executing; see `SteeringPlan.apply`."""
        caller, base = runs.current_run(), self.inner.blocks.base
        if caller is None:
            raise HostError(
                "plan.apply(model) was called outside of a trace; call it first thing inside `with "
                "model.trace(...):` or "
                "`with model.generate(...):`, or use `with plan.hooks(model):` around them."
            )
        if runs.has_joined(caller, id(plan)):
            return  # in a loop over steps: it is at work since the first
        reached = caller.occurrence(
            f"{self.model.get(base).path if base else self.model.path}.input"
        )
        if reached or caller.iteration not in (0, None):
            raise InterventionError(
                "plan.apply(model) was called after the model began to run, or in a loop over "
                "later steps; call it first thing "
                "in the body, outside of loops: it steers every step, and the plan's positions say "
                "which tokens."
            )
        steering = make(self)
        steering.on_generate(True)  # a run is one sequence: a single pass, or one call of generate
        names = parameter_names(self.model._module.get_submodule(base))

        def note(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
            info = forward_info(names, *inputs)
            if info is not None:
                steering.on_forward(info)

        watcher = runs.worker(
            self.model, runs.following(base, "arguments", note, finish=steering.finish)
        )
        checked = {
            name: _unless_scanned(guarded(name, fn))
            for name, fn in steering.run_functions().items()
        }
        runs.join(caller, [watcher, *self._stations(checked)], id(plan))

    def edit_plan(
        self, plan: SteeringPlan, *, allow_mismatch: bool, prompt_lengths: Any
    ) -> EditHandle:
        """Put the plan among the model's default edits; see `SteeringPlan.edit`."""
        from expertsteer_lens.steer.checks import check_model

        from .edit import PlainPlan

        if any(vector.gate is not None for vector in plan.vectors):
            raise HostError(
                "an nnsight edit cannot hold gates; use plan.hooks(model), attach or apply."
            )
        unseen = (
            not self.remote and not self.is_loaded
        )  # weights that only a server has: nothing is loaded to look at them
        if unseen and (plan.basis is None or ("fingerprint" in plan.target and not allow_mismatch)):
            raise ModelStateError(
                f"the weights of {self.name!r} are not loaded here, so the plan cannot be checked "
                "against them; call "
                "model.dispatch(), pass as_host(model, remote=True), or give the plan a basis and "
                "pass allow_mismatch=True."
            )
        check_model(plan, self, allow_mismatch=allow_mismatch or unseen)
        plain = PlainPlan(
            plan,
            self.inner.blocks,
            arguments=parameter_names(self.model._module.get_submodule(self.inner.blocks.base)),
            centred=(plan.basis or self.basis) == "centred",
            prompt_lengths=prompt_lengths,
        )
        edit = runs.Station(
            lambda: plain.stops(self.model), twin=runs.worker(self.model, plain.body())
        )
        self.model._edits.append(edit)
        return EditHandle(self.model, edit)


def _check_root(model: Any) -> None:
    module = getattr(model, "_module", None)
    if not isinstance(module, nn.Module) or not isinstance(getattr(model, "_edits", None), list):
        raise HostError(
            f"a {type(model).__name__} of this nnsight is not supported; wrap the model with "
            "nnsight 0.8."
        )
    if model.parent is not None:
        raise HostError(f"{model.path!r} is a part of an nnsight model; pass the whole model.")
    if not hasattr(module, "config") or not callable(
        getattr(module, "get_output_embeddings", None)
    ):
        raise HostError(
            f"this nnsight model wraps a {type(module).__name__}, which is no Hugging Face "
            "language model; wrap an "
            "AutoModelForCausalLM, or pass the wrapped model itself."
        )


def _unless_scanned(fn: EditFn) -> EditFn:
    """`fn`, except on the stand-ins of `model.scan`, which have shapes and no values."""
    return lambda x: None if is_stand_in(x) else fn(x)


class _Registered:
    """The edits and hooks of one `intervene` call."""

    def __init__(self, model: Any, edits: dict[str, Any], hooks: TorchHooks) -> None:
        self.model, self.edits, self.hooks = model, edits, hooks

    def lost(self, *, thorough: bool = True) -> list[str]:
        """Hook names whose edit (`clear_edits`) or torch hook someone else removed."""
        present, gone = {id(edit) for edit in self.model._edits}, set(self.hooks.lost())
        return [
            name for name, edit in self.edits.items() if id(edit) not in present or name in gone
        ]


class EditHandle:
    """A plan among the default edits of an nnsight model; `.remove()` takes off this one and no
    other."""

    def __init__(self, model: Any, edit: Any) -> None:
        self._model, self._edit = model, edit

    def remove(self) -> None:
        """Take the edit off; nothing happens the second time, or after `clear_edits`."""
        discard_edit(self._model, self._edit)


def discard_edit(model: Any, edit: Any) -> None:
    """Take this edit off and no other; harmless if it is gone."""
    model._edits[:] = [one for one in model._edits if one is not edit]
