"""What every host shares: tokenising, readiness, the basis test, the fingerprint, generation one
prompt at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from expertsteer_lens._checks import check_number, shown, unknown_hook
from expertsteer_lens.data.activations import layer_of
from expertsteer_lens.data.chat import Chat, Text, check_texts
from expertsteer_lens.errors import (
    ArgumentError,
    DataError,
    HookNameError,
    HostError,
    InterventionError,
    ModelStateError,
)
from expertsteer_lens.interventions.arithmetic import centre

from .attention import OTHERS, AttendedRows, TakeWeights
from .facts import execution_device, measure_basis, measure_fingerprint, training_noise
from .facts import facts as facts_of
from .parts import EditFn, Observer, Registration, TokenBatch, pad_right
from .row_picker import RowPicker, TokenRows
from .scope import Scope

if TYPE_CHECKING:
    from .resume import KeptStream


class Host:
    """What the rest of the package knows about a model. A subclass supplies the model's own ways,
    up to `place`."""

    kind: ClassVar[str]
    """Its name in the table of hosts: "transformer_lens", "nnsight", "huggingface" or
    "hooked_module"."""
    reason: str = ""
    """What `as_host` saw in the model."""
    reads_norms: bool = True
    """Whether `read` fills `norms`."""
    packs_requests: ClassVar[bool] = True
    """Whether the model's `generate_batch` keeps several requests in one row apart."""

    def __init__(
        self,
        model: Any,
        *,
        parameters: nn.Module,
        tokenizer: Any,
        name: str,
        n_layers: int,
        d_model: int,
        d_vocab: int,
        n_ctx: int | None,
    ) -> None:
        """Keep what was read off the model.

        Args:
            model: the object the user gave.
            parameters: the module whose weights (and training mode) these are.
            tokenizer: None if the model has none.
            name: label for messages and files.
            n_layers: number of blocks.
            d_model: width of the residual stream.
            d_vocab: number of token ids.
            n_ctx: context length, None if the configuration does not say.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.n_layers = n_layers
        self.d_model = d_model
        self.d_vocab = d_vocab
        self.n_ctx = n_ctx
        self._weights = parameters

    # -- supplied by the subclass -----------------------------------------------------------------

    def all_hook_names(self) -> list[str]:
        """Every name `intervene` accepts."""
        raise NotImplementedError

    def forward(self, batch: TokenBatch, *, stop_at_layer: int | None = None) -> Tensor:
        """Logits `[batch, pos, vocab]`; gradients are the caller's choice.

        With `stop_at_layer=k < n_layers` only blocks 0..k-1 run, and what comes back is not logits.
        """
        raise NotImplementedError

    def logits_at(self, batch: TokenBatch, where: Tensor) -> Tensor:
        """Logits `[n, vocab]` at the positions of `where` (`[batch, pos]`, bool), row after row."""
        logits = self.forward(batch)
        return logits[where.to(logits.device)]

    def keep_stream(self, batch: TokenBatch, n_blocks: int) -> KeptStream | None:
        """The unsteered stream that leaves block `n_blocks - 1`, for `resume`.

        None where this host cannot run a pass from there, or not exactly; run full passes then.
        """
        return None

    def resume(self, kept: KeptStream) -> AbstractContextManager[None]:
        """Inside the block, passes over the batch of `kept` begin after its blocks.

        Hooks fire as always, also at the output of the last block that is not run.
        """
        raise HostError(f"{self.kind} cannot run a pass from a layer; run full passes.")

    def intervene(
        self, fns: Mapping[str, EditFn], *, scope: Scope | None = None
    ) -> AbstractContextManager[Registration]:
        """Inside the block, each `fn(activation [batch, pos, d])` is called at its hook point on
        every pass of the scope; by default those of this thread (or task), and of threads that it
        starts.

        A tensor returned replaces the activation (same shape, dtype and device, else
        `InterventionError`); None leaves it. Names are resolved before anything is registered, and
        exactly these hooks are removed at the end, whatever happens inside. Capture, steering and
        gradients are all built on this."""
        raise NotImplementedError

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
        """The rows `[n, d]` that `positions` picks at each hook point (see `RowPicker`, and for
        "attention" `AttendedRows`): copies on the CPU, float32, in the host's basis.

        Only the tokens of the mask `tokens` (`[batch, pos]`) are looked at; None: all real ones.
        Where `norms` is given, the norm of each token looked at is added to it, by hook name.
        `basis` is `self.basis`, if it was asked for already: the answer looks at every parameter.
        All of `also` are filled in the same pass.

        Rows are picked inside the hook: nothing but them outlives the layer, and nothing that is
        done to the live activation afterwards can reach them.

        Raises:
            InterventionError: a hook point did not fire.
        """
        rows: dict[str, Tensor] = {}
        looked_at = batch.attention_mask if tokens is None else tokens
        by_attention = positions == "attention"
        attended = AttendedRows(names if by_attention else (), batch.attention_mask, looked_at)
        picker = RowPicker("mean" if by_attention else positions, looked_at)
        # Measured by passes of its own, so not inside the hooks below.
        centred = (basis or self.basis) == "centred"
        pickers = [RowPicker("all", one.mask) for one in also]

        def reader(name: str) -> EditFn:
            def fn(activation: Tensor) -> None:
                for one, of_tokens in zip(also, pickers, strict=True):
                    if name in one.names:
                        one.rows[name] = of_tokens.rows(activation.detach())
                if name not in wanted:
                    return
                if by_attention:
                    attended.take(name, activation.detach())
                else:
                    rows[name] = picker.rows(activation.detach())
                if norms is not None:
                    of_each = self._norms(activation.detach().float(), centred)
                    norms.setdefault(name, []).append(picker.tokens(of_each).cpu())

            return fn

        wanted = set(names)
        asked = dict.fromkeys(names) | dict.fromkeys(name for one in also for name in one.names)
        stop = _layer_after(list(asked))
        with ExitStack() as stack:
            if by_attention:
                stack.enter_context(self.attention_at(attended.layers, attended.weigh))
            stack.enter_context(self.intervene({name: reader(name) for name in asked}))
            if stop is not None and stop < self.n_layers:
                self.forward(batch, stop_at_layer=stop)
            else:  # to the end, but nobody reads the logits: one token's will do
                one = torch.zeros_like(batch.input_ids, dtype=torch.bool)
                one[0, 0] = True
                self.logits_at(batch, one)
        rows |= attended.rows(self.name)
        fired = rows.keys() | {name for one in also for name in one.rows}
        missing = [name for name in asked if name not in fired]
        if missing:
            raise InterventionError(
                f"hook points {missing} did not fire in a forward pass of {self.name!r}."
            )
        for asked_too in also:
            for name, value in asked_too.rows.items():
                asked_too.rows[name] = self._in_basis(value, centred).cpu()
        return {name: self._in_basis(rows[name], centred).cpu() for name in names}

    def _norms(self, activation: Tensor, centred: bool) -> Tensor:
        """The norm of each token, `[batch, pos]`, in the host's basis."""
        norms: Tensor = torch.linalg.vector_norm(activation, dim=-1)
        if centred and activation.shape[-1] == self.d_model:
            # What centring takes off is orthogonal to what it leaves.
            taken = self.d_model * activation.mean(dim=-1).square()
            norms = (norms.square() - taken).clamp(min=0.0).sqrt()
        return norms

    def _in_basis(self, rows: Tensor, centred: bool) -> Tensor:
        return centre(rows) if centred and rows.shape[-1] == self.d_model else rows

    def attention_at(
        self, layers: Sequence[int], take: TakeWeights
    ) -> AbstractContextManager[None]:
        """Inside the block, `take` is called with the attention weights of each of these layers in
        every pass of this thread, before the output of the layer's block is read. Layers that have
        none to give are passed over in silence."""
        raise HostError(f"{self.kind} gives no attention weights; {OTHERS}.")

    def watch(
        self, observer: Observer, *, scope: Scope | None = None
    ) -> AbstractContextManager[None]:
        """Inside the block, tell `observer` where each forward pass of the scope is in its
        sequence, and about generate calls."""
        raise NotImplementedError

    def quiet(self) -> AbstractContextManager[None]:
        """Inside the block, hooks of others are out of action; afterwards they are back as they
        were."""
        raise NotImplementedError

    def _generate_ids(
        self, ids: Tensor, *, max_new_tokens: int, temperature: float, eos: int | None
    ) -> Tensor:
        """Continue one row of ids; the new ids only."""
        raise NotImplementedError

    def place(self, hook_name: str) -> Any:
        """What stands at a hook name; equal for two names of one hook point."""
        return hook_name

    def _unsteerable(self, hook_name: str) -> str | None:
        """Why an edit at this (existing) hook point would not do what it says, or None."""
        return None

    def _missing_hint(self, hook_name: str) -> str:
        """More to say about a name that does not exist."""
        return ""

    def _in_training(self) -> bool:
        return training_noise(self._weights)

    def __repr__(self) -> str:
        shape = f"{self.n_layers} layers, d_model={self.d_model}"
        return f"{type(self).__name__}({self.name!r}, {shape}): {self.reason}"

    # -- facts ------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where inputs are put: where the first parameter lives, or is brought for its pass if it
        is offloaded; the CPU for a network without any."""
        first = next(iter(self._weights.parameters()), None)
        found = torch.device("cpu") if first is None else first.device
        return found if found.type != "meta" else execution_device(self._weights) or found

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first floating-point parameter."""
        return next(p.dtype for p in self._weights.parameters() if p.is_floating_point())

    @property
    def basis(self) -> str:
        """ "centred" if the output does not change when a constant is added to the residual stream,
        else "raw".

        Measured once per set of weights, with every hook of others out of action.
        """
        facts = facts_of(self._weights)
        if "basis" not in facts:
            facts["basis"] = measure_basis(self)
        return facts["basis"]

    @property
    def fingerprint(self) -> str:
        """Shape and behaviour of the model: see `measure_fingerprint`, and `fingerprints_match` to
        compare two."""
        facts = facts_of(self._weights)
        if "fingerprint" not in facts:
            facts["fingerprint"] = measure_fingerprint(self)
        return facts["fingerprint"]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside the block, no weight asks for a gradient: the graph of a pass then holds nothing
        for the weights."""
        asked = [p for p in self._weights.parameters() if p.requires_grad]
        for parameter in asked:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in asked:
                parameter.requires_grad_(True)

    def facts(self) -> dict[str, Any]:
        """What files say of a model: name, fingerprint, d_model, n_layers, basis."""
        names = ("name", "fingerprint", "d_model", "n_layers", "basis")
        return {name: getattr(self, name) for name in names}

    def check_ready(self) -> None:
        """Raise `ModelStateError` if the model, or a part of it that has dropout, is in training
        mode, or its weights are not there."""
        if self.device.type == "meta":
            raise ModelStateError(
                f"the weights of {self.name!r} are not loaded (they are on the meta device); load "
                "them, or let accelerate bring them for each pass (cpu_offload, device_map)."
            )
        if self._in_training():
            raise ModelStateError(
                f"the model {self.name!r} (or a part of it with dropout) is in training mode, so "
                "dropout would make results random; call model.eval()."
            )

    def n_blocks_below(self, hook_names: Iterable[str]) -> int:
        """How many blocks a pass runs before an edit at these hook points can change anything.

        An edit at `blocks.3.hook_resid_post` leaves blocks 0 to 3 as they are: 4. Elsewhere in
        block 3 it leaves 3, and at a hook point outside of the blocks 0.
        """
        counts = []
        for name in hook_names:
            match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
            if match is None:
                return 0
            counts.append(int(match[1]) + (match[2] == "hook_resid_post"))
        return min(counts, default=0)

    # -- hook names -------------------------------------------------------------------------------

    def hook_names(self, kind: str = "hook_resid_post") -> list[str]:
        """`blocks.{i}.{kind}` for every layer that has it, in layer order."""
        names = set(self.all_hook_names())
        present = [
            f"blocks.{i}.{kind}" for i in range(self.n_layers) if f"blocks.{i}.{kind}" in names
        ]
        if not present:
            raise unknown_hook(f"blocks.0.{kind}", names, f"{self.name}, {self.n_layers} layers")
        return present

    def check_hook_names(self, names: Sequence[str], *, steering: bool = False) -> list[str]:
        """Return the names if all exist (and, for `steering`, if an edit there reaches what the
        name says).

        Raises:
            HookNameError: unknown name (with the closest), layer out of range, or a hook point that
                cannot be steered.
        """
        if isinstance(names, str):
            raise HookNameError(
                f"hook names must be a list, got one str {shown(names)}; wrap it in a list."
            )
        known = set(self.all_hook_names())
        for name in names:
            if name not in known:
                raise self._unknown(name, known)
            reason = self._unsteerable(name) if steering else None
            if reason:
                raise HookNameError(f"hook {name!r} cannot be steered on {self.kind}: {reason}")
        return list(names)

    def _unknown(self, name: str, known: set[str]) -> HookNameError:
        layer = re.match(r"blocks\.(\d+)\.", str(name))
        if layer and int(layer.group(1)) >= self.n_layers:
            return HookNameError(
                f"hook {name!r} is not on this model ({self.name}): layer {layer.group(1)} is out "
                "of range, "
                f"it has layers 0 to {self.n_layers - 1}."
            )
        error = unknown_hook(name, sorted(known), f"{self.name}, {self.n_layers} layers")
        return HookNameError(f"{error}{self._missing_hint(name)}")

    # -- tokens -----------------------------------------------------------------------------------

    def tokenize(
        self,
        prompts: Sequence[Text],
        *,
        prepend_bos: bool | None = None,
        max_length: int | None = None,
    ) -> TokenBatch:
        """Right-padded ids and mask, on the model's device, with our own BOS policy on every host.

        Args:
            prompts: texts, or chats (lists of messages), which are rendered with this model's own
                template.
            prepend_bos: None prepends BOS iff the tokenizer has one, and leaves a chat to its
                template. A text that already starts with it gets no second.
            max_length: most tokens allowed (BOS included); None: the model's context length.

        Raises:
            DataError: a prompt is empty, has no tokens, or is too long.
            ArgumentError: `prepend_bos=True` and there is no BOS token.
            HostError: the model has no tokenizer.
        """
        texts = check_texts("prompts", prompts)
        if self.tokenizer is None:
            raise HostError(
                f"the model {self.name!r} has no tokenizer; give it one: model.tokenizer = ..., or "
                "as_host(model, "
                "tokenizer=...)."
            )
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if prepend_bos and bos is None:
            raise ArgumentError(
                "prepend_bos=True, but the tokenizer has no BOS token; pass prepend_bos=None or "
                "False."
            )
        shown = [text.render(self.tokenizer) if isinstance(text, Chat) else text for text in texts]
        rows = [list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in shown]
        for i, row in enumerate(rows):
            prepend = prepend_bos if prepend_bos is not None else not isinstance(texts[i], Chat)
            if bos is not None and prepend and row[:1] != [bos]:
                rows[i] = [bos, *row]
        limit = max_length if max_length is not None else self.n_ctx
        for i, row in enumerate(rows):
            if not row:
                raise DataError(
                    f"prompts[{i}] has no tokens; give it a text or pass prepend_bos=True."
                )
            if limit is not None and len(row) > limit:
                where = "max_length" if max_length is not None else "the model's context length"
                raise DataError(
                    f"prompts[{i}] has {len(row)} tokens, more than {where} {limit}; shorten or "
                    "split it."
                )
        self._check_ids(rows)
        return pad_right(rows, self.pad_id).to(self.device)

    def _check_ids(self, rows: list[list[int]]) -> None:
        """Raise `DataError` for a token that the model has no embedding of."""
        if not self.d_vocab:
            return
        found = {max(row) for row in rows}
        if len({len(row) for row in rows}) > 1:
            found.add(self.pad_id)
        largest = max(found)
        if largest >= self.d_vocab:
            raise DataError(
                f"the tokenizer of {self.name!r} gives the token {largest} "
                f"({shown(self.tokenizer.convert_ids_to_tokens(largest))}), but the model has "
                f"embeddings of {self.d_vocab} tokens; call "
                "model.resize_token_embeddings(len(tokenizer)) after adding tokens, or let one "
                "that is there pad: tokenizer.pad_token = tokenizer.eos_token."
            )

    @property
    def pad_id(self) -> int:
        """What fills up rows: the mask hides it, so any id in the vocabulary would do."""
        for attribute in ("pad_token_id", "eos_token_id", "bos_token_id"):
            value = getattr(self.tokenizer, attribute, None)
            if isinstance(value, int):
                return value
        return 0

    # -- generation -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Text],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        prepend_bos: bool | None = None,
        stop_at_eos: bool = True,
    ) -> list[str]:
        """The continuation of each prompt (without the prompt), as text; see `generate_tokens`."""
        rows = self.generate_tokens(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            prepend_bos=prepend_bos,
            stop_at_eos=stop_at_eos,
        )
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    @torch.no_grad()
    def generate_tokens(
        self,
        prompts: Sequence[Text],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        prepend_bos: bool | None = None,
        stop_at_eos: bool = True,
    ) -> list[list[int]]:
        """The new token ids of each prompt, through the model's own `generate`, one prompt at a
        time.

        Args:
            prompts: texts.
            max_new_tokens: most tokens to add.
            temperature: 0 is greedy; above, tokens are sampled and `seed` is needed.
            seed: prompt i is sampled with `seed + i`; the global random state is left as it was.
            prepend_bos: see `tokenize`.
            stop_at_eos: stop at the tokenizer's EOS (which is then the last id).

        Raises:
            ArgumentError: bad numbers, or sampling without a seed.
        """
        check_number("max_new_tokens", max_new_tokens, low=1, integer=True)
        check_number("temperature", temperature, low=0.0)
        if temperature > 0 and seed is None:
            raise ArgumentError("temperature > 0 samples, which needs a seed; pass seed=0.")
        self.check_ready()
        eos = getattr(self.tokenizer, "eos_token_id", None) if stop_at_eos else None
        out = []
        for i, prompt in enumerate(check_texts("prompts", prompts)):
            ids = self.tokenize([prompt], prepend_bos=prepend_bos).input_ids
            devices = [ids.device] if ids.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed((seed or 0) + i)
                new = self._generate_ids(
                    ids, max_new_tokens=max_new_tokens, temperature=temperature, eos=eos
                )
            row = new.reshape(-1).tolist()
            out.append(row[: row.index(eos) + 1] if eos is not None and eos in row else row)
        return out


def _layer_after(names: Sequence[str]) -> int | None:
    try:
        return max(layer_of(name) for name in names) + 1
    except ArgumentError:  # a hook point outside the blocks (embedding, final norm)
        return None
