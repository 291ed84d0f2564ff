"""Hugging Face: any causal model of transformers, read and steered through torch forward hooks on
its own modules.

Hook names are those of TransformerLens. Hooks of the user stay where they are; ours run in the
order of registration."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertsteer_lens.errors import HostError

from .attention import TakeWeights, eager_attention, weights_of_modules
from .base import Host
from .blocks import (
    Blocks,
    Place,
    find_blocks,
    first_argument,
    first_of,
    text_config,
    with_first,
    with_first_argument,
)
from .branches import check_branches
from .compiled import eager_where_compiled
from .facts import facts, hooks_suspended, probe_batch
from .generate_calls import watch_generate
from .parts import EditFn, Observer, TokenBatch, guarded
from .pass_tracking import is_copy, measuring, watch_causal_module
from .resume import KeptStream, keep_stream, logits_only_at, skip_blocks
from .scope import CHANGING_HOOKS, Scope, remove_handle, scope_or_new

NO_TOKEN = 2**31 - 1
"""An id no vocabulary holds: as `eos_token_id` it lets generation run on, and EOS be produced like
any other token."""

# Tokenizers given to `as_host`, or that lie beside a model's weights; None where there is none.
_TOKENIZERS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class HuggingFaceHost(Host):
    """A Hugging Face causal model that can be read and steered."""

    kind = "huggingface"

    def __init__(self, model: nn.Module, *, tokenizer: Any = None) -> None:
        config = text_config(model)
        if getattr(model.config, "is_encoder_decoder", False):
            raise HostError(
                f"{type(model).__name__} is an encoder-decoder; only decoder-only language models "
                "can be steered as a "
                "Hugging Face model. Boot it as a TransformerBridge and name its hook points."
            )
        if not hasattr(config, "vocab_size") or model.get_output_embeddings() is None:  # type: ignore[operator]
            raise HostError(
                f"{type(model).__name__} has no language-model head; load the model with "
                "AutoModelForCausalLM."
            )
        if tokenizer is not None:
            _TOKENIZERS[model] = tokenizer
        super().__init__(
            model,
            parameters=model,
            tokenizer=find_tokenizer(model),
            name=label(model),
            n_layers=int(config.num_hidden_layers),
            d_model=int(config.hidden_size),
            d_vocab=int(config.vocab_size),
            n_ctx=getattr(config, "max_position_embeddings", None),
        )
        self.blocks: Blocks = find_blocks(model)

    def all_hook_names(self) -> list[str]:
        """`blocks.{i}.` and `hook_resid_pre`, `hook_resid_post`, and `hook_attn_out`,
        `hook_mlp_out` where found."""
        return list(self.blocks.places)

    def check_hook_names(self, names: Any, *, steering: bool = False) -> list[str]:
        """See `Host.check_hook_names`; also refuses attention and MLP outputs that are not what the
        block adds up."""
        known = super().check_hook_names(names, steering=steering)
        check_branches(self, known, self._put)
        return known

    @contextmanager
    def _put(self, fns: Mapping[str, EditFn]) -> Iterator[None]:
        with scope_or_new(None) as here, self.torch_hooks(fns, active=here):
            yield

    def forward(self, batch: TokenBatch, *, stop_at_layer: int | None = None) -> Tensor:
        """Logits, or the residual entering `stop_at_layer`: the pass is left there by an exception
        of our own."""
        self.check_ready()
        options = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            **no_cache(self.model),
        }
        if stop_at_layer is None or stop_at_layer >= self.n_layers:
            return _logits_of(self.model(**options))

        block = self.model.get_submodule(self.blocks.layers[stop_at_layer])
        with scope_or_new(None) as here:

            def leave(_: nn.Module, args: Any, kwargs: Any = None) -> None:
                if here():
                    raise _Reached(first_argument(args, kwargs))

            with CHANGING_HOOKS:
                handle = block.register_forward_pre_hook(leave, with_kwargs=True)
            try:
                return _logits_of(self.model(**options))
            except _Reached as reached:
                return reached.residual
            finally:
                remove_handle(handle)

    def logits_at(self, batch: TokenBatch, where: Tensor) -> Tensor:
        """See `Host.logits_at`; the output head is applied at these positions only."""
        with logits_only_at(self.model.get_output_embeddings(), where):
            return self.forward(batch)

    def keep_stream(self, batch: TokenBatch, n_blocks: int) -> KeptStream | None:
        """See `Host.keep_stream`."""
        if not self._resumes_exactly(n_blocks):
            return None
        return self.run_and_keep(batch, n_blocks)

    def resume(self, kept: KeptStream) -> AbstractContextManager[None]:
        """See `Host.resume`."""
        return skip_blocks(self._block_modules(), kept)

    def _block_modules(self) -> list[nn.Module]:
        return [self.model.get_submodule(path) for path in self.blocks.layers]

    def run_and_keep(self, batch: TokenBatch, n_blocks: int) -> KeptStream:
        """The stream, whether or not a pass from there would be exact."""
        return keep_stream(
            self._block_modules(), n_blocks, lambda: self.forward(batch, stop_at_layer=n_blocks)
        )

    def _resumes_exactly(self, n_blocks: int) -> bool:
        known, name = facts(self._weights), f"resumes after {n_blocks}"
        if name not in known:
            known[name] = "exactly" if _resumes_exactly(self, n_blocks) else "not exactly"
        return known[name] == "exactly"

    @contextmanager
    def attention_at(self, layers: Sequence[int], take: TakeWeights) -> Iterator[None]:
        """See `Host.attention_at`; attention is computed by the model's own eager code
        meanwhile."""
        blocks = [(i, self.model.get_submodule(self.blocks.layers[i])) for i in layers]
        with eager_attention(self.model), eager_where_compiled(self.model):
            with weights_of_modules(blocks, take):
                yield

    @contextmanager
    def intervene(
        self, fns: Mapping[str, EditFn], *, scope: Scope | None = None
    ) -> Iterator[TorchHooks]:
        """Put each function at its module, in order; names are resolved before anything is
        registered."""
        self.check_hook_names(list(fns))
        checked = {name: guarded(name, fn) for name, fn in fns.items()}
        with scope_or_new(scope) as acts, self.torch_hooks(checked, active=acts) as registered:
            yield registered

    @contextmanager
    def torch_hooks(
        self, fns: Mapping[str, EditFn], *, active: Callable[[], bool]
    ) -> Iterator[TorchHooks]:
        """Torch hooks that act while `active()` holds, on names already checked."""
        registered = TorchHooks()
        with ExitStack() as stack:
            stack.enter_context(eager_where_compiled(self.model))
            for name, fn in fns.items():
                place = self.blocks.places[name]
                registered.add(name, self.model.get_submodule(place.path), place, fn, active)
                stack.callback(remove_handle, registered.entries[-1][2])
            yield registered

    @contextmanager
    def watch(self, observer: Observer, *, scope: Scope | None = None) -> Iterator[None]:
        """Tell `observer` about every forward pass and every generate call, until the end of the
        block."""
        with ExitStack() as stack:
            acts = stack.enter_context(scope_or_new(scope))
            base = self.model.get_submodule(self.blocks.base)
            stack.enter_context(watch_causal_module(base, observer, root=self.model, scope=acts))
            stack.enter_context(watch_generate(self._generating(), observer, scope=acts))
            yield

    def _generating(self) -> list[nn.Module]:
        """The model, and what it wraps (an adapter's model): whatever has a `generate` and holds
        the decoder."""
        parts = self.blocks.base.split(".")
        paths = [".".join(parts[:i]) for i in range(len(parts) + 1)]
        around = [self.model.get_submodule(path) for path in dict.fromkeys(paths)]
        return [one for one in around if hasattr(type(one), "generate")]

    def quiet(self) -> AbstractContextManager[None]:
        """See `Host.quiet`."""
        return self._quiet()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        base = self.model.get_submodule(self.blocks.base)
        with measuring(base), hooks_suspended(list(self.model.modules())):
            yield

    def _generate_ids(
        self, ids: Tensor, *, max_new_tokens: int, temperature: float, eos: int | None
    ) -> Tensor:
        options = generate_options(
            max_new_tokens=max_new_tokens, temperature=temperature, eos=eos, pad=self.pad_id
        )
        out: Tensor = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return out[:, ids.shape[1] :]


def _logits_of(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


class TorchHooks:
    """The torch hooks of one `intervene` call."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, Any, Any]] = []

    def add(
        self, name: str, module: nn.Module, place: Place, fn: EditFn, active: Callable[[], bool]
    ) -> None:
        """Register at one module; the hook does nothing on copies of it."""

        def before(m: nn.Module, args: Any, kwargs: Any = None) -> Any:
            # Without keywords: see `watch_causal_module`.
            if kwargs is None or not active() or is_copy(m, module):
                return None
            value = fn(first_argument(args, kwargs))
            return None if value is None else with_first_argument(args, kwargs, value)

        def after(m: nn.Module, _: Any, output: Any) -> Any:
            if not active() or is_copy(m, module):
                return None
            value = fn(first_of(output))
            return None if value is None else with_first(output, value)

        with CHANGING_HOOKS:
            if place.side == "input":
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
                self.entries.append((name, module._forward_pre_hooks, handle))
            else:
                handle = module.register_forward_hook(after)
                self.entries.append((name, module._forward_hooks, handle))

    def lost(self, *, thorough: bool = True) -> list[str]:
        """Hook names whose hook someone else removed."""
        return [name for name, hooks, handle in self.entries if handle.id not in hooks]


class _Reached(Exception):  # noqa: N818 - not an error: how a pass that has read enough is left
    def __init__(self, residual: Tensor) -> None:
        super().__init__()
        self.residual = residual


def find_tokenizer(model: nn.Module) -> Any:
    """`model.tokenizer`, the one given to `as_host`, or the one that lies beside the weights on
    this machine; else None."""
    attached = getattr(model, "tokenizer", None)
    if attached is not None:
        return attached
    if model not in _TOKENIZERS:
        _TOKENIZERS[model] = _local_tokenizer(getattr(model.config, "name_or_path", ""))
    return _TOKENIZERS[model]


def _local_tokenizer(name: str) -> Any:
    if not name:
        return None
    from transformers import AutoTokenizer

    try:  # a folder, or something already downloaded: nothing is fetched, and no code of it is run
        # (left open, transformers would ask on the terminal, and take what comes from a pipe)
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None  # none there, or not loadable: `tokenize` says what to do


def label(model: nn.Module) -> str:
    """The model's name; of a folder only its own name, not where it lies on this machine."""
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).is_dir() else name


def no_cache(model: nn.Module) -> dict[str, Any]:
    """`use_cache=False` where the model knows it: nobody asks for the keys and values of a single
    pass."""
    return {"use_cache": False} if hasattr(text_config(model), "use_cache") else {}


def generate_options(
    *, max_new_tokens: int, temperature: float, eos: int | None, pad: int
) -> dict[str, Any]:
    """Arguments of `generate` that leave nothing to the model's own generation settings (penalties,
    top-k, several EOS)."""
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "eos_token_id": NO_TOKEN if eos is None else eos,
        "pad_token_id": pad,
        **sampling,
    }


@torch.no_grad()
def _resumes_exactly(host: HuggingFaceHost, n_blocks: int) -> bool:
    """Whether a pass from there gives the very logits of a full pass, on a fixed input.

    Not so where upper blocks use more of the lower ones than their stream: shared keys and values,
    per-layer inputs. A pass over other tokens comes between, so that nothing left over from the
    full pass can help.
    """
    batch = probe_batch(host)
    other = TokenBatch(batch.input_ids.flip(0, 1), batch.attention_mask)
    with host.quiet():
        whole = host.forward(batch)
        kept = host.run_and_keep(batch, n_blocks)
        host.forward(other)
        try:
            with host.resume(kept):
                return torch.equal(host.forward(batch), whole)
        except (KeyError, IndexError, AttributeError, TypeError, RuntimeError):
            return False  # what the lower blocks would have handed on is not there
