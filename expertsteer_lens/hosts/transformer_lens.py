"""TransformerLens: `TransformerBridge` (3.x, 4.x) and `HookedTransformer` (3.x), told apart by
capability.

No class is imported: either may be absent from the installed version. Interventions go through
`model.hook_dict[name]`, so they take their place among the user's own hooks in the order of
registration."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from expertsteer_lens.interventions.clock import ForwardInfo

from .attention import TakeWeights, eager_attention
from .base import Host
from .branches import check_branches
from .cache_names import agree_on_cache_name
from .facts import hooks_suspended, training_noise
from .generate_calls import watch_generate
from .hook_points import HookPoints, functions_at
from .parts import EditFn, Observer, TokenBatch, guarded
from .pass_tracking import (
    is_copy,
    measuring,
    n_measuring,
    watch_causal_module,
)
from .resume import logits_only_at
from .scope import CHANGING_HOOKS, Scope, remove_handle, scope_or_new
from .turns import turns_of


class TransformerLensHost(Host):
    """A TransformerLens model that can be read and steered."""

    kind = "transformer_lens"
    packs_requests = False  # a Bridge's attention takes such a row for one sequence, steered or not

    def __init__(self, model: Any) -> None:
        cfg = model.cfg
        inner = _underlying(model)
        self.is_bridge = inner is not None
        if inner is not None:
            agree_on_cache_name(model, inner)
        super().__init__(
            model,
            parameters=model,
            tokenizer=model.tokenizer,
            name=str(getattr(cfg, "model_name", None) or type(model).__name__),
            n_layers=int(cfg.n_layers),
            d_model=int(cfg.d_model),
            d_vocab=int(cfg.d_vocab),
            n_ctx=getattr(cfg, "n_ctx", None),
        )

    def all_hook_names(self) -> list[str]:
        """Canonical names and aliases."""
        return list(self.model.hook_dict)

    def place(self, hook_name: str) -> int:
        """The hook point itself: on a Bridge `hook_resid_post` is another name of `hook_out`."""
        return id(self.model.hook_dict[hook_name])

    def _in_training(self) -> bool:
        # HookedTransformer has no dropout and is in "training mode" as it comes; its flag means
        # nothing.
        inner = _underlying(self.model)
        return inner is not None and training_noise(inner)

    def check_hook_names(self, names: Any, *, steering: bool = False) -> list[str]:
        """See `Host.check_hook_names`; on a Bridge also refuses attention and MLP outputs that are
        not what the block adds up."""
        known = super().check_hook_names(names, steering=steering)
        if self.is_bridge:
            check_branches(self, known, lambda fns: functions_at(self.model, fns))
        return known

    def _unsteerable(self, hook_name: str) -> str | None:
        if hook_name.endswith("hook_resid_mid") and self.is_bridge:
            return (
                "on a TransformerBridge it is the input of the MLP branch alone, so an edit would "
                "miss the skip path; "
                "steer at hook_resid_post (this block) or hook_resid_pre."
            )
        return None

    def _missing_hint(self, hook_name: str) -> str:
        wrapped = f"{hook_name}.hook_sae_output"
        if wrapped in self.model.hook_dict:
            return (
                f" An SAE sits on it: steer at {wrapped!r}, or take the SAE off first (reset_saes)."
            )
        return ""

    def forward(self, batch: TokenBatch, *, stop_at_layer: int | None = None) -> Tensor:
        """Logits `[batch, pos, vocab]`, or the residual entering `stop_at_layer`. Gradients are the
        caller's choice."""
        self.check_ready()
        # At k >= n_layers HookedTransformer returns the last residual and a Bridge logits: never
        # pass it.
        stop = (
            stop_at_layer if stop_at_layer is not None and stop_at_layer < self.n_layers else None
        )
        options: dict[str, Any] = {} if stop is None else {"stop_at_layer": stop}
        if hasattr(getattr(_underlying(self.model), "config", None), "use_cache"):
            options["use_cache"] = False  # a Bridge would keep keys and values that nobody asks for
        options |= {"attention_mask": batch.attention_mask, "return_type": "logits"}
        with self._turns_kept():
            out: Tensor = self.model(batch.input_ids, **options)
        return out

    def logits_at(self, batch: TokenBatch, where: Tensor) -> Tensor:
        """See `Host.logits_at`; the output head of a Bridge is applied at these positions only,
        unless somebody listens there, who would see other shapes."""
        find: Any = getattr(_underlying(self.model), "get_output_embeddings", lambda: None)
        head = find()
        if not isinstance(head, nn.Module) or any(part._forward_hooks for part in head.modules()):
            return super().logits_at(batch, where)
        with logits_only_at(head, where):
            return self.forward(batch)

    @contextmanager
    def attention_at(self, layers: Sequence[int], take: TakeWeights) -> Iterator[None]:
        """See `Host.attention_at`: what passes `hook_pattern`, with the model's own eager
        attention inside a Bridge."""
        there, inner = self.model.hook_dict, _underlying(self.model)
        names = {i: f"blocks.{i}.attn.hook_pattern" for i in layers}
        fns = {name: partial(take, i) for i, name in names.items() if name in there}
        with ExitStack() as stack:
            if inner is not None:
                stack.enter_context(eager_attention(inner))
            stack.enter_context(functions_at(self.model, fns))
            yield

    def intervene(
        self, fns: Mapping[str, EditFn], *, scope: Scope | None = None
    ) -> AbstractContextManager[HookPoints]:
        """Put each function at its hook point, in order; names are resolved before anything is
        registered."""
        self.check_hook_names(list(fns))
        checked = {name: guarded(name, fn) for name, fn in fns.items()}
        return functions_at(self.model, checked, scope=scope)

    @contextmanager
    def watch(self, observer: Observer, *, scope: Scope | None = None) -> Iterator[None]:
        """Tell `observer` about every forward pass and every generate call, until the end of the
        block."""
        inner = _underlying(self.model)
        with ExitStack() as stack:
            stack.enter_context(self._turns_kept())
            acts = stack.enter_context(scope_or_new(scope))
            if inner is not None:
                decoder = self._watched()
                stack.enter_context(watch_causal_module(decoder, observer, root=inner, scope=acts))
                stack.enter_context(watch_generate([self.model, inner], observer, scope=acts))
            else:
                stack.enter_context(_watch_blocks(self.model, observer, acts))
                stack.enter_context(watch_generate([self.model], observer, scope=acts))
            yield

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """See `Host.quiet`: hook points, and whoever watches the passes."""
        inner = _underlying(self.model)
        # A thread whose turn it is may want to change hooks: its turn comes first.
        turn = nullcontext() if inner is None else turns_of(self.model, inner).taken()
        with (
            self._turns_kept(),
            turn,
            measuring(self._watched()),
            hooks_suspended(list(self.model.hook_dict.values())),
        ):
            yield

    def _turns_kept(self) -> AbstractContextManager[None]:
        """Inside, several threads run a Bridge in turn; a HookedTransformer keeps nothing of a run
        on the model."""
        inner = _underlying(self.model)
        return nullcontext() if inner is None else turns_of(self.model, inner).kept()

    def _watched(self) -> nn.Module:
        """What every pass goes through: the module inside a Bridge that holds the list of
        blocks."""
        inner = _underlying(self.model)
        if inner is None:
            return self._weights
        blocks = getattr(self.model, "blocks", None)
        for module in inner.modules():
            if any(child is blocks for child in module.children()):
                return module
        return getattr(inner, "base_model", inner)

    def _generate_ids(
        self, ids: Tensor, *, max_new_tokens: int, temperature: float, eos: int | None
    ) -> Tensor:
        with self._turns_kept():
            out: Tensor = self.model.generate(
                ids,
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature or 1.0,
                stop_at_eos=eos is not None,
                return_type="tokens",
                verbose=False,
                **({} if eos is None else {"eos_token_id": eos}),
            )
        return out[:, ids.shape[1] :]


def _underlying(model: Any) -> nn.Module | None:
    """The Hugging Face (or native) module inside a Bridge; None for a HookedTransformer."""
    inner = getattr(model, "original_model", None)
    return inner if isinstance(inner, nn.Module) else None


@contextmanager
def _watch_blocks(model: Any, observer: Observer, scope: Scope) -> Iterator[None]:
    """HookedTransformer calls its own `forward` without hooks, so the pass is read off the calls of
    its blocks.

    A pass is reported at the first block that runs: a block index that does not grow, or another
    shape, begins a new pass, so runs that start or stop at a layer are seen too."""
    measured_before = n_measuring(model)
    now = _PassOfThread()

    def embedding(m: nn.Module, args: tuple[Any, ...]) -> None:
        if not is_copy(m, model.embed):
            now.ids = args[0]

    def block(index: int, original: nn.Module) -> Callable[..., None]:
        # Without keywords: a pass of another thread that began while the hook was put on.
        def before(m: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
            if kwargs is None or is_copy(m, original):
                return
            residual = args[0] if args else kwargs.get("resid_pre")
            if not isinstance(residual, Tensor):
                return
            starts = index <= now.block or residual.shape != now.shape
            now.block, now.shape = index, residual.shape
            if not starts or n_measuring(model) > measured_before:
                return
            if not scope():
                scope.n_elsewhere += 1
                return
            entry, ids = kwargs.get("past_kv_cache_entry"), now.ids
            observer.on_forward(
                ForwardInfo(
                    batch=residual.shape[0],
                    n_new=residual.shape[1],
                    past=0 if entry is None else int(entry.past_keys.shape[1]),
                    attention_mask=kwargs.get("attention_mask"),
                    input_ids=ids if ids is not None and ids.shape == residual.shape[:2] else None,
                )
            )

        return before

    with ExitStack() as stack:
        with CHANGING_HOOKS:
            handles = [model.embed.register_forward_pre_hook(embedding)]
            for i, module in enumerate(model.blocks):
                hook = block(i, module)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for handle in handles:
            stack.callback(remove_handle, handle)
        yield


class _PassOfThread(threading.local):
    """The pass that a thread is in: the last block that ran, and what it was given."""

    block = 2**31
    shape: Any = None
    ids: Tensor | None = None
