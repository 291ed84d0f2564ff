"""nnsight 0.8: `TransformersModel` (and the deprecated `LanguageModel`), or `NNsight` around a
Hugging Face model.

Steering is a default edit of nnsight's own kind, put in front of what the user writes in a trace,
so the steered layer's `.output` shows the steered value, as everything after it does. While no
trace is running (somebody calls the wrapped module itself) a torch hook does the same. Both are
gone at the end, and the user's edits and hooks are not touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from expertsteer_lens.errors import HostError
from expertsteer_lens.hosts.attention import OTHERS, TakeWeights
from expertsteer_lens.hosts.base import Host
from expertsteer_lens.hosts.blocks import Blocks
from expertsteer_lens.hosts.facts import facts, measure_basis, measure_fingerprint
from expertsteer_lens.hosts.huggingface import (
    HuggingFaceHost,
    TorchHooks,
    generate_options,
    no_cache,
)
from expertsteer_lens.hosts.parts import EditFn, Observer, TokenBatch, guarded
from expertsteer_lens.hosts.pass_arguments import is_stand_in, parameter_names
from expertsteer_lens.hosts.row_picker import TokenRows
from expertsteer_lens.hosts.scope import Scope, scope_or_new

from . import remote as remotely
from . import runs
from .open_run import OpenRun


class NNsightHost(Host):
    """An nnsight model that can be read and steered.

    With `remote` (True, "local" or the address of a server, as nnsight takes it) the model is run
    there: it is captured, measured and generated from without its weights ever being loaded here,
    and steered with `plan.edit(model)`."""

    kind = "nnsight"

    def __init__(self, model: Any, *, tokenizer: Any = None, remote: bool | str = False) -> None:
        _check_root(model)
        self.remote = remote
        self.reads_norms = not remote
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
        device = super().device
        return torch.device("cpu") if device.type == "meta" else device

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

    def _measured(self, fact: str, measure: Callable[[Host], str]) -> str:
        known = facts(self._weights)
        if fact not in known:
            known[fact] = measure(self)
        return known[fact]

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
            logits: Tensor = self.model.trace(**options, trace=False).logits
            return logits
        kept: list[Tensor] = []
        with self._edited(
            [runs.worker(self.model, runs.stopping(self.blocks.layers[stop_at_layer], kept))]
        ):
            self.model.trace(**options, trace=False)
        return kept[0]

    @torch.no_grad()
    def read(
        self,
        batch: TokenBatch,
        names: Sequence[str],
        positions: str | int,
        tokens: Tensor | None = None,
        norms: dict[str, list[Tensor]] | None = None,
        *,
        basis: str | None = None,
        also: Sequence[TokenRows] = (),
    ) -> dict[str, Tensor]:
        """See `Host.read`; from a server only the rows travel back, and no norms; each of
        `also` is a request of its own."""
        if not self.remote or positions == "attention":
            return super().read(batch, names, positions, tokens, norms, basis=basis, also=also)
        for one in also:
            one.rows |= self.read(batch, one.names, "all", one.mask, basis=basis)
        options = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            **no_cache(self.model._module),
        }
        places = {name: place for name, place in self.blocks.places.items() if name in names}
        rows = remotely.rows(
            self.model, options, places, positions, tokens=tokens, remote=self.remote
        )
        centred = (basis or self.basis) == "centred"
        return {name: self._in_basis(rows[name], centred) for name in names}

    def attention_at(
        self, layers: Sequence[int], take: TakeWeights
    ) -> AbstractContextManager[None]:
        """See `Host.attention_at`: hooks on the wrapped module, which runs inside traces and
        outside.

        Raises:
            HostError: the model is remote.
        """
        if self.remote:
            raise HostError(
                f"the attention weights of a remote model stay on its server; {OTHERS}, or read "
                "the model on this machine."
            )
        return self._local().attention_at(layers, take)

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
    def intervene(
        self, fns: Mapping[str, EditFn], *, scope: Scope | None = None
    ) -> Iterator[_Registered]:
        """An edit per hook point for traces, a torch hook for calls outside of them; removed
        exactly.

        A remote model runs the functions on its server: they must be nested functions of torch
        operations alone."""
        self.check_hook_names(list(fns))
        if self.remote:
            bodies = [runs.following(runs.one_call(*call)) for call in self._calls_at(fns)]
            with self._edited([runs.worker(self.model, body) for body in bodies]) as edits:
                yield _Registered(self.model, dict(zip(fns, edits, strict=True)), TorchHooks())
            return
        inside = runs.current_worker() is not None
        with scope_or_new(scope) as acts, runs.one_at_a_time(self.model):
            checked = self._checked(fns, acts)
            workers = [
                runs.HookWorker(self.model, runs.one_call(*call))
                for call in self._calls_at(checked)
            ]
            outside = self._local().torch_hooks(
                checked, active=lambda: acts() and not runs.is_in_run(self.model, unknown=inside)
            )
            with self._edited(workers) as edits, outside as hooks:
                yield _Registered(self.model, dict(zip(fns, edits, strict=True)), hooks)

    @staticmethod
    def _checked(
        fns: Mapping[str, EditFn], acts: Callable[[], bool] = lambda: True
    ) -> dict[str, EditFn]:
        """Checked, and called neither in runs of which `acts` says that they are somebody else's,
        nor on the stand-ins of `model.scan`, which have no values."""

        def checked(name: str, fn: EditFn) -> EditFn:
            strict = guarded(name, fn)
            return lambda x: None if is_stand_in(x) or not acts() else strict(x)

        return {name: checked(name, fn) for name, fn in fns.items()}

    def _calls_at(self, fns: Mapping[str, EditFn]) -> list[runs.HookCall]:
        places = self.blocks.places
        return [(places[name].path, places[name].side, fn) for name, fn in fns.items()]

    @contextmanager
    def _edited(self, edits: Sequence[Any]) -> Iterator[Sequence[Any]]:
        with ExitStack() as stack:
            for edit in edits:
                self.model._edits.append(edit)
                stack.callback(discard_edit, self.model, edit)
            yield edits

    def watch(
        self, observer: Observer, *, scope: Scope | None = None
    ) -> AbstractContextManager[None]:
        """See `Host.watch`: hooks on the wrapped module, which runs inside traces and outside."""
        if self.remote:
            raise HostError(
                "a remote model cannot be watched from here; steer it with `handle = "
                "plan.edit(model)`."
            )
        return self._local().watch(observer, scope=scope)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """See `Host.quiet`: torch hooks and edits."""
        edits, self.model._edits = self.model._edits, []
        try:
            with self.inner.quiet():
                yield
        finally:
            self.model._edits = edits

    # -- the user's own runs, and edits that stay --------------------------------------------------

    @property
    def blocks(self) -> Blocks:
        """Where the hook points are."""
        return self.inner.blocks

    def decoder_arguments(self) -> list[str]:
        """Names of the positional arguments of the module that every pass goes through."""
        return parameter_names(self.model._module.get_submodule(self.blocks.base))

    def open_run(self) -> OpenRun | None:
        """The run whose code is executing now; None outside of a trace."""
        caller = runs.current_worker()
        return None if caller is None else OpenRun(self, caller)

    def add_edit(
        self,
        calls: Callable[[], Sequence[runs.HookCall]],
        *,
        sent: Callable[[], Sequence[runs.HookCall]],
    ) -> EditHandle:
        """Put calls among the model's default edits: they are made in every later run, wherever it
        runs.

        Args:
            calls: makes the calls of a run on this machine.
            sent: makes those of a run on a server; what it needs of this package is sent with it,
                see `remote.pack`.
        """

        def remote_form() -> Any:
            unpack = remotely.unpacker(remotely.pack(sent))
            return runs.worker(self.model, runs.following(remotely.called(unpack)))

        edit = runs.HookWorker(self.model, calls, remote_form=remote_form)
        stack = ExitStack()
        stack.enter_context(runs.one_at_a_time(self.model, for_edits=True))
        self.model._edits.append(edit)
        stack.callback(discard_edit, self.model, edit)
        return EditHandle(edit, stack)


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

    def __init__(self, edit: Any, stack: ExitStack) -> None:
        self._edit, self._stack = edit, stack

    def remove(self) -> None:
        """Take the edit off; nothing happens the second time, or after `clear_edits`."""
        self._stack.close()


def discard_edit(model: Any, edit: Any) -> None:
    """Take this edit off and no other; harmless if it is gone."""
    model._edits[:] = [one for one in model._edits if one is not edit]
