"""What is measured on a model rather than read off its configuration: its basis and its
fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from expertsteer_lens.errors import ModelStateError

from .parts import EditFn, TokenBatch
from .scope import CHANGING_HOOKS, Scope, scope_or_new

if TYPE_CHECKING:
    from .base import Host

# Measurements, remembered per model as long as its weights stay the same.
_MEMORY: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[str, str]]] = (
    weakref.WeakKeyDictionary()
)


def facts(weights: nn.Module) -> dict[str, str]:
    """The measurements of these weights; emptied when they change (see `_stamp`)."""
    stamp = _stamp(weights)
    known = _MEMORY.get(weights)
    if known is None or known[0] != stamp:
        known = (stamp, {})
        _MEMORY[weights] = known
    return known[1]


_N_SAMPLED = 16
"""Values of each parameter that are looked at to see whether it was written to."""


@torch.no_grad()
def _stamp(weights: nn.Module) -> tuple[Any, ...]:
    """Equal as long as the model computes the same: which parameters there are, where, how often
    each was written to, a few of its values, and which adapters are at work.

    Writes through `.data` (merged adapters, quantisers) count no version, so the values are looked
    at: `_N_SAMPLED` of each, evenly spread. A change of a few other values is not seen."""
    places: list[tuple[Any, ...]] = []
    sampled = []
    for parameter in weights.parameters():
        places.append((id(parameter), _version(parameter)))
        for p in _plain_tensors(parameter.detach()):
            is_here = p.device.type != "meta"
            places.append((p.data_ptr() if is_here else 0, p.dtype))
            if is_here and p.numel():
                flat = p.as_strided((p.numel(),), (1,)) if p.is_contiguous() else p.reshape(-1)
                sampled.append(flat[:: max(1, flat.shape[0] // _N_SAMPLED)][: _N_SAMPLED + 1])
    by_kind: dict[Any, list[Tensor]] = {}
    for values in sampled:
        by_kind.setdefault((values.device, values.dtype), []).append(values)
    numbers = tuple(_digest(torch.cat(values)) for values in by_kind.values())
    return (tuple(places), numbers, _adapters(weights))


_CHUNK = 1 << 26
"""Bytes that are brought to the CPU at once."""


@torch.no_grad()
def weights_digest(weights: nn.Module) -> str | None:
    """SHA-256 of every bit of the parameters and the buffers that are saved with them, and of which
    adapters are at work; None where some are kept by a program we cannot ask for them.

    Every value counts, so it is not remembered: a gigabyte takes 1 to 1.5 s on one core. Where the
    weights lie (which device, in memory or on disk) does not count."""
    digest = hashlib.sha256(repr(_adapters(weights)).encode())
    for owner, module in weights.named_modules():
        kept = {**module._parameters, **module._buffers}
        for name, value in kept.items():
            if value is None or name in module._non_persistent_buffers_set:
                continue
            found = _where_offloaded(weights, owner, name) if value.device.type == "meta" else value
            if found is None:
                return None
            for part in _plain_tensors(found.detach()):
                digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
                flat = part.contiguous().reshape(-1).view(torch.uint8)
                for at in range(0, flat.shape[0], _CHUNK):
                    piece: Any = flat[at : at + _CHUNK].cpu().numpy()
                    digest.update(memoryview(piece))
    return digest.hexdigest()


def _where_offloaded(weights: nn.Module, owner: str, name: str) -> Tensor | None:
    """The values of a parameter that accelerate keeps elsewhere between passes."""
    path = owner.split(".") if owner else []
    for depth in range(len(path), -1, -1):
        module = weights.get_submodule(".".join(path[:depth]))
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            kept = getattr(one, "weights_map", None)
            with contextlib.suppress(KeyError):
                if kept is not None:
                    found = kept[".".join([*path[depth:], name])]
                    return found if isinstance(found, Tensor) else None
    return None


def _plain_tensors(value: Tensor) -> Iterator[Tensor]:
    """The tensor, or those that one of another kind is made of (quantised: integers and scales)."""
    if not is_traceable_wrapper_subclass(value):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(value, name))


def _digest(values: Tensor) -> bytes:
    """Of the very bits, so that NaN equals itself."""
    plain = values.contiguous().view(torch.uint8).cpu()
    return hashlib.sha256(plain.numpy().tobytes()).digest()


def _adapters(weights: nn.Module) -> tuple[Any, ...]:
    """Which adapters of PEFT are at work, merged or switched off, and how strongly, in each layer
    that has some."""
    found: list[tuple[Any, ...]] = []
    for name, module in weights.named_modules():
        if isinstance(getattr(module, "_adapters_disabled", None), bool):
            # Virtual tokens belong to the model as a whole, which says so of itself.
            active = str(getattr(module, "active_adapter", ""))
            found.append((name, module._adapters_disabled, active, (), None))
        # Models of transformers have methods of these names, adapter layers have values.
        if hasattr(module, "active_adapters") and not callable(
            getattr(module, "disable_adapters", print)
        ):
            names = module.active_adapters
            scaling = getattr(module, "scaling", {})
            found.append(
                (
                    name,
                    bool(module.disable_adapters),
                    tuple(names) if isinstance(names, list | tuple) else str(names),
                    tuple(getattr(module, "merged_adapters", ())),
                    tuple(scaling.items()) if isinstance(scaling, dict) else scaling,
                )
            )
    return tuple(found)


def _version(parameter: Tensor) -> int:
    try:
        return parameter._version
    except RuntimeError:  # inference tensors count no versions
        return 0


def _fixed_numbers(tag: str, count: int, below: int) -> list[int]:
    """`count` numbers in [0, below) that are the same on every machine and version."""
    return [
        int.from_bytes(hashlib.sha256(f"{tag}:{i}".encode()).digest()[:8], "big") % below
        for i in range(count)
    ]


def probe_batch(host: Host) -> TokenBatch:
    """Two rows of fixed token ids, the same on every machine: what models are measured on."""
    width = min(24, host.n_ctx or 24)
    ids = torch.tensor(_fixed_numbers("tokens", 2 * width, host.d_vocab), dtype=torch.long).reshape(
        2, width
    )
    return TokenBatch(ids, torch.ones_like(ids)).to(host.device)


@torch.no_grad()
def measure_basis(host: Host) -> str:
    """Add a constant to every coordinate of the first block's output and see whether the
    predictions move.

    The yardstick is a random perturbation of the same norm at the same place: "centred" if the
    constant moves the log-probabilities by less than 1/1000 of it (1/10 in half precision, where
    rounding alone shows). True of pre-LayerNorm models only; RMSNorm models and post-LayerNorm
    models are "raw"."""
    name, batch = host.hook_names()[0], probe_batch(host)
    noise = torch.randn(host.d_model, generator=torch.Generator().manual_seed(0))

    def shifted_by(vector: Tensor) -> EditFn:
        def fn(x: Tensor) -> Tensor:
            size = 0.5 * x.float().pow(2).mean().sqrt()
            return (x.float() + size * vector.to(x.device) / vector.pow(2).mean().sqrt()).to(
                x.dtype
            )

        return fn

    with host.quiet():
        plain = host.forward(batch).float().log_softmax(-1)
        moved = []
        for vector in (torch.ones(host.d_model), noise):
            with host.intervene({name: shifted_by(vector)}):
                moved.append(
                    float((host.forward(batch).float().log_softmax(-1) - plain).abs().max())
                )
    if moved[1] == 0.0:
        raise ModelStateError(
            f"editing {name!r} changes nothing in the output of {host.name!r}; its hooks are dead."
        )
    tolerance = 1e-3 if host.dtype in (torch.float32, torch.float64) else 0.1
    return "centred" if moved[0] < tolerance * moved[1] else "raw"


def execution_device(model: nn.Module) -> torch.device | None:
    """Where accelerate runs a model whose weights it keeps elsewhere (in memory or on disk); None
    if it does not."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def training_noise(model: nn.Module) -> bool:
    """Whether the model is in training mode, or a part of it is that has dropout: results would
    then be random.

    A part counts if it is a dropout module, or keeps a rate of its own, as attention modules and
    routers of experts (jitter) do, and the rate is above 0. Other parts may be in training mode
    without any effect, e.g. an adapter that was just added."""
    return model.training or any(
        part.training and _dropout_rate(part) > 0 for part in model.modules()
    )


def _dropout_rate(part: nn.Module) -> float:
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return float(part.p)
    rates = [value for name, value in vars(part).items() if "drop" in name or "jitter" in name]
    return max((value for value in rates if isinstance(value, float)), default=0.0)


FINGERPRINT_BITS = 256
_TOLERATED_BITS = 8
TOGETHER = " + "
"""Between the facts of several models that are spoken of together."""


@torch.no_grad()
def measure_fingerprint(host: Host) -> str:
    """`"{n_layers}x{d_model}-"` and 64 hex digits that say how the model ranks pairs of tokens on a
    fixed input.

    Bit j is set if, at a fixed place of a fixed token sequence, the logit of one fixed token
    exceeds that of another. Rankings do not change with the host, with weight processing (which
    shifts a row of logits by a constant) or with the last digits of arithmetic, so the same weights
    give the same fingerprint everywhere, up to a bit or two (`fingerprints_match` allows 8 of 256).
    Other weights agree on half the bits. It proves that two models behave alike on 48 tokens; it
    does not prove that every weight is equal: a light fine-tune may pass."""
    batch = probe_batch(host)
    with host.quiet():
        logits = host.forward(batch).float().cpu()
    rows = logits.reshape(-1, logits.shape[-1])
    where = torch.tensor(_fixed_numbers("places", FINGERPRINT_BITS, rows.shape[0]))
    vocab = min(host.d_vocab, rows.shape[1])
    first = torch.tensor(_fixed_numbers("first", FINGERPRINT_BITS, vocab))
    second = torch.tensor(_fixed_numbers("second", FINGERPRINT_BITS, vocab))
    bits = (rows[where, first] > rows[where, second]).tolist()
    number = sum(1 << j for j, bit in enumerate(bits) if bit)
    return f"{host.n_layers}x{host.d_model}-{number:0{FINGERPRINT_BITS // 4}x}"


def fingerprints_match(first: str, second: str) -> bool:
    """Whether two fingerprints can be of the same weights: equal shape, and at most 8 of 256 bits
    apart.

    The margin covers other hosts, devices and half precision; unrelated models are about 128 bits
    apart. Those of several models, joined by " + ", match one by one."""
    if first == second:
        return True
    if TOGETHER in first:
        ours, theirs = first.split(TOGETHER), second.split(TOGETHER)
        same_number = len(ours) == len(theirs)
        return same_number and all(map(fingerprints_match, ours, theirs))
    (first_shape, _, first_bits), (second_shape, _, second_bits) = (
        first.partition("-"),
        second.partition("-"),
    )
    try:
        apart = (int(first_bits, 16) ^ int(second_bits, 16)).bit_count()
    except ValueError:
        return False
    return first_shape == second_shape and apart <= _TOLERATED_BITS


@contextlib.contextmanager
def hooks_suspended(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, `modules` are run without their forward hooks, but for what is put on meanwhile; and
    what was there is put back exactly. Other threads run with the hooks all the time."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    with CHANGING_HOOKS, scope_or_new(None) as here:
        saved = [
            (module, kind, module.__dict__[kind])
            for module in dict.fromkeys(modules)
            for kind in kinds
        ]
        try:
            for module, kind, hooks in saved:
                module.__dict__[kind] = _OwnHooks(here, hooks)
            yield
        finally:
            for module, kind, hooks in saved:
                module.__dict__[kind] = hooks


class _OwnHooks(OrderedDict[int, Any]):
    """The hooks of a module while it is measured: none but those put here, for whoever measures;
    what was there before, for all others."""

    def __init__(self, here: Scope, others: OrderedDict[int, Any]) -> None:
        super().__init__()
        self._here, self._others = here, others

    def items(self) -> Any:
        return super().items() if self._here() else self._others.items()

    def values(self) -> Any:
        return super().values() if self._here() else self._others.values()

    def __bool__(self) -> bool:
        return bool(self.items())
