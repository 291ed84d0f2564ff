"""Any network with TransformerLens hook points that is no language model: vision and audio bridges,
toy networks.

Such a network is run on tensors, by the user or by `capture_tensors`; there are no tokens, no
padding and no generation, so positions are simply places along the second axis."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from expertsteer_lens.data.activations import ActivationStore, take_positions
from expertsteer_lens.errors import DataError, HostError, InterventionError
from expertsteer_lens.interventions.arithmetic import centre
from expertsteer_lens.interventions.clock import ForwardInfo

from .base import Host
from .facts import hooks_suspended
from .hook_points import HookPoints, functions_at
from .parts import EditFn, Observer, TokenBatch, guarded
from .pass_tracking import is_copy
from .scope import CHANGING_HOOKS, Scope, remove_handle, scope_or_new


class _Watching(threading.local):
    """Whoever watches, and the axes that this thread's pass had where he heard of it last.

    Several threads may be in a pass at once, at different hook points."""

    shape: torch.Size | None = None

    def __init__(self, observer: Observer, scope: Scope) -> None:
        self._observer, self._scope = observer, scope

    def begins(self) -> None:
        """A pass begins."""
        self.shape = None
        if not self._scope():
            self._scope.n_elsewhere += 1

    def sees(self, shape: torch.Size) -> None:
        """A pass is at a hook point."""
        if shape != self.shape and self._scope():
            self.shape = shape
            self._observer.on_forward(ForwardInfo(*shape))


class HookedModuleHost(Host):
    """A module with `hook_dict` that can be read and steered while its owner runs it.

    Activations `[batch, d]` are handled as `[batch, 1, d]`. Activations are taken and edited as
    they are (basis "raw")."""

    kind = "hooked_module"

    def __init__(self, model: Any) -> None:
        cfg = getattr(model, "cfg", None)
        super().__init__(
            model,
            parameters=model,
            tokenizer=None,
            name=str(getattr(cfg, "model_name", None) or type(model).__name__),
            n_layers=int(getattr(cfg, "n_layers", 0)),
            d_model=int(getattr(cfg, "d_model", 0)),
            d_vocab=0,
            n_ctx=None,
        )
        self._watching: list[_Watching] = []

    @property
    def basis(self) -> str:
        """ "raw": without inputs nobody can measure what the output is invariant to."""
        return "raw"

    @property
    def fingerprint(self) -> str:
        """Shape and a digest of the weights: equal weights, equal fingerprint."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().reshape(-1)[:1024].double().cpu().numpy().tobytes())
        return f"{self.n_layers}x{self.d_model}-{digest.hexdigest()}"

    def all_hook_names(self) -> list[str]:
        """Canonical names and aliases."""
        return list(self.model.hook_dict)

    def place(self, hook_name: str) -> int:
        """See `Host.place`."""
        return id(self.model.hook_dict[hook_name])

    def tokenize(self, *args: Any, **kwargs: Any) -> TokenBatch:
        """Raise `HostError`: there are no tokens."""
        raise HostError(
            f"{self.name!r} is no language model and takes no texts; use capture_tensors(model, "
            "inputs, ...)."
        )

    def forward(self, batch: TokenBatch, *, stop_at_layer: int | None = None) -> Tensor:
        """Raise `HostError`: there are no tokens."""
        raise HostError(
            f"{self.name!r} is no language model and takes no tokens; run it yourself on its own "
            "inputs."
        )

    def intervene(
        self, fns: Mapping[str, EditFn], *, scope: Scope | None = None
    ) -> AbstractContextManager[HookPoints]:
        """See `Host.intervene`."""
        self.check_hook_names(list(fns))
        checked = {name: self._report_passes(guarded(name, fn)) for name, fn in fns.items()}
        return functions_at(self.model, checked, scope=scope)

    def _report_passes(self, fn: EditFn) -> EditFn:
        def at_point(x: Tensor) -> Tensor | None:
            flat = isinstance(x, Tensor) and x.ndim == 2
            value = x[:, None] if flat else x
            for one in self._watching:
                one.sees(value.shape[:2])
            out = fn(value)
            return out[:, 0] if flat and out is not None else out

        return at_point

    @contextmanager
    def watch(self, observer: Observer, *, scope: Scope | None = None) -> Iterator[None]:
        """Tell `observer` about a pass of the scope when it reaches the first hook point, and again
        where the axes change."""
        with scope_or_new(scope) as acts:
            entry = _Watching(observer, acts)

            def begins(module: Any, *_: Any) -> None:
                if not is_copy(module, self.model):
                    entry.begins()

            with CHANGING_HOOKS:
                handle = self.model.register_forward_pre_hook(begins)
                self._watching = [*self._watching, entry]
            try:
                yield
            finally:
                remove_handle(handle)
                with CHANGING_HOOKS:
                    self._watching = [one for one in self._watching if one is not entry]

    def quiet(self) -> AbstractContextManager[None]:
        """See `Host.quiet`."""
        return hooks_suspended(list(self.model.hook_dict.values()))


@torch.no_grad()
def capture_tensors(
    model: nn.Module,
    inputs: Any,
    hook_names: Sequence[str],
    *,
    positions: str | int = "all",
    labels: Tensor | Sequence[int] | None = None,
) -> ActivationStore:
    """Run a model on tensors and keep what passes the hook points, for networks that read no texts.

    Example:
        >>> import torch
        >>> from transformer_lens.HookedRootModule import HookedRootModule
        >>> from transformer_lens.hook_points import HookPoint
        >>> from expertsteer_lens import SteeringPlan
        >>> class Network(HookedRootModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.hook_sum = HookPoint()
        ...         self.setup()
        ...     def forward(self, patches):
        ...         return self.hook_sum(patches).sum(dim=1)
        >>> network, patches = Network().eval(), torch.ones(2, 3, 4)
        >>> capture_tensors(network, patches, ["hook_sum"], positions="mean")["hook_sum"].shape
        torch.Size([2, 4])
        >>> direction = torch.tensor([0.0, 0.0, 0.0, 1.0])
        >>> plan = SteeringPlan.from_vectors(
        ...     {"hook_sum": direction}, coefficient=2.0, relative_to="unit", positions=0
        ... )
        >>> with plan.hooks(network):
        ...     network(patches)[0]
        tensor([3., 3., 3., 5.])

    Args:
        model: any model `as_host` accepts; it is called as it is.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments; a list holds several
            of these, run in turn.
        hook_names: which hook points; they must carry `[batch, pos, d]` or `[batch, d]`.
        positions: "all" (a row for each place along `pos`), "mean", "last" or an index.
        labels: one per row of the result.

    Raises:
        HookNameError: unknown hook name, or an activation of another shape.
        InterventionError: a hook point did not fire, or fired more than once in a pass.
        DataError: no inputs, NaN, or labels of another number.
    """
    from . import as_host

    host = as_host(model)
    host.check_ready()
    names = host.check_hook_names(list(hook_names))
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    centred = host.basis == "centred"

    def reader(name: str) -> EditFn:
        def fn(x: Tensor) -> None:
            taken = take_positions(x.detach().float(), positions).reshape(-1, x.shape[-1])
            rows[name].append(
                (centre(taken) if centred and x.shape[-1] == host.d_model else taken).cpu()
            )

        return fn

    batches = inputs if isinstance(inputs, list) else [inputs]
    if not batches:
        raise DataError("inputs is empty; give at least one batch of tensors.")
    for i, batch in enumerate(batches):
        with host.intervene({name: reader(name) for name in names}):
            _call(host.model, batch)
        wrong = {name: len(found) - i for name, found in rows.items() if len(found) != i + 1}
        if wrong:
            raise InterventionError(
                f"hook points must fire once in a pass of {host.name!r}, but fired {wrong} times."
            )
    facts = {
        "source": "capture_tensors",
        "host": host.kind,
        "name": host.name,
        "fingerprint": host.fingerprint,
    }
    shape = {
        "d_model": host.d_model,
        "n_layers": host.n_layers,
        "basis": host.basis,
        "positions": positions,
    }
    given = None if labels is None else torch.as_tensor(labels)
    return ActivationStore(
        {name: torch.cat(found) for name, found in rows.items()}, given, {**facts, **shape}
    )


def _call(model: Any, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        model(batch)
