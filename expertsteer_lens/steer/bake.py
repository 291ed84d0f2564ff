"""A plan as part of the weights: a copy of the model that needs nothing of this package.

Where a vector goes is found by trial, not looked up by architecture: a bias of the block is moved a
little, and counts if what changes at the hook point is that vector and nothing else. In this order:

1. a bias that is there (GPT-2, GPT-NeoX, Phi, OPT, BLOOM, GPT-OSS, ...);
2. one that a switch of the model's configuration brings (`mlp_bias` of Llama and Granite,
   `attention_bias` of Cohere, ...); all others that come with it are 0;
3. an additional block behind the steered one, which adds the vector and nothing else: its attention
   has a constant output (Qwen 2, Qwen 3, OLMo), which a norm behind it may scale (Gemma 2 and 3).

The copy is then run beside the steered model, and refused if it says anything else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expertsteer_lens.errors import HostError
from expertsteer_lens.hosts import Host, as_host
from expertsteer_lens.hosts.blocks import find_blocks, text_config
from expertsteer_lens.hosts.facts import probe_batch
from expertsteer_lens.hosts.model_copy import CannotHoldError, attention_of, copied, moved

from .checks import check_model
from .constant import constant_additions

if TYPE_CHECKING:
    from .plan import SteeringPlan

SWITCHES = ("mlp_bias", "use_bias", "bias", "attention_bias", "qkv_bias", "use_qkv_bias")
"""Names under which configurations of transformers switch biases on."""


def bake(plan: SteeringPlan, model: Any, *, allow_mismatch: bool = False) -> Any:
    """See `SteeringPlan.bake`."""
    host = _plain_host(model)
    check_model(plan, host, allow_mismatch=allow_mismatch)
    deltas: dict[str, Tensor] = {}
    for name, delta in constant_additions(plan, can="baked", they="weights").items():
        # The MLP adds last, and that it adds up was measured by `check_model`.
        place = name.replace("hook_mlp_out", "hook_resid_post")
        deltas[place] = deltas[place] + delta if place in deltas else delta
    layers = [_layer(name) for name in deltas]
    wanted = _steered(plan, host, allow_mismatch)
    refusals: list[str] = []
    for trial in _trials(model, layers):
        try:
            baked = trial.run(host, deltas)
        except CannotHoldError as reason:
            refusals.append(f"{trial}: {reason}")
            continue
        _check_equal(baked, host, wanted)
        before = (getattr(model.config, "expertsteer_lens", None) or {}).get("baked", [])
        baked.model.config.expertsteer_lens = {"baked": [*before, *baked.notes]}
        return baked.model
    raise HostError(
        f"this plan cannot be part of the weights of {type(model).__name__}: its class has no "
        f"place for the vector ({'; '.join(refusals)}). Use plan.hooks(model), or export the plan "
        "for a program that adds vectors itself."
    )


def _plain_host(model: Any) -> Host:
    host = as_host(model)
    if host.kind != "huggingface" or not hasattr(model, "save_pretrained"):
        raise HostError(
            f"only a Hugging Face model can be baked, got a {type(model).__name__} ({host.kind}); "
            "load it with AutoModelForCausalLM."
        )
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise HostError("the model carries an adapter; merge_and_unload() it first, then bake.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise HostError("the model is quantised; bake the full weights, then quantise the result.")
    if any(p.device.type == "meta" for p in model.parameters()):
        raise HostError("some weights are not in memory; load the model without offloading.")
    return host


# -- trials ---------------------------------------------------------------------------------------


@dataclass
class _Baked:
    """A copy that holds some of the vectors, and where."""

    model: Any
    host: Host
    notes: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Trial:
    """One way to make room: a switch of the configuration, and blocks that are added."""

    switch: str | None
    after: tuple[int, ...] = ()

    def run(self, host: Host, deltas: Mapping[str, Tensor]) -> _Baked:
        """The copy with every vector in it."""
        if self.after and any(not name.endswith("hook_resid_post") for name in deltas):
            raise CannotHoldError("an additional block adds at a block's output only")
        width = host.d_model
        made = copied(
            host.model,
            switch=self.switch,
            after=self.after,
            check=lambda skeleton: self.check(skeleton, [*map(_layer, deltas)], width),
        )
        baked = _Baked(made, as_host(made, tokenizer=host.tokenizer))
        for name, delta in deltas.items():
            here = f"blocks.{self.block(_layer(name))}.{name.rpartition('.')[2]}"
            try:
                found = _put_in_bias(baked.host, here, delta)
            except CannotHoldError:
                if not self.after:
                    raise
                found = _put_in_attention(baked.host, here, delta)
            note = {"hook_name": name, "switch": self.switch, **found}
            if self.after:
                note["additional_block"] = self.block(_layer(name))
            baked.notes.append(note)
        return baked

    def block(self, layer: int) -> int:
        """Where the vector of that layer goes: its own block, or the one added behind it."""
        return moved(layer, self.after) + (1 if self.after else 0)

    def check(self, skeleton: nn.Module, layers: Sequence[int], width: int) -> None:
        """Raise before any weight is copied if a block has no bias at all that could do."""
        paths = find_blocks(skeleton).layers
        for layer in layers:
            block = skeleton.get_submodule(paths[self.block(layer)])
            names = [n for n, p in block.named_parameters() if _is_bias(n, p, width)]
            if self.after:
                attention, _, _ = attention_of(block)
                names = [n for n, _ in attention.named_parameters() if n.endswith("bias")]
            if not names:
                raise CannotHoldError("there is no bias")

    def __str__(self) -> str:
        where = "in an additional block" if self.after else "as a bias of the block"
        return where if self.switch is None else f"{where} with {self.switch}=True"


def _trials(model: Any, layers: Sequence[int]) -> list[_Trial]:
    config = text_config(model)
    switches = [None, *(name for name in SWITCHES if getattr(config, name, None) is False)]
    after = tuple(sorted(set(layers)))
    return [*(_Trial(switch) for switch in switches), *(_Trial(s, after) for s in switches)]


def _layer(hook_name: str) -> int:
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_post|attn_out)", hook_name)
    if match is None:
        raise HostError(
            f"hook {hook_name!r} cannot be baked: no bias of a block is added there; attention and "
            "MLP outputs and 'blocks.{layer}.hook_resid_post' can."
        )
    return int(match[1])


# -- where the vector goes ------------------------------------------------------------------------


@torch.no_grad()
def _put_in_bias(host: Host, hook_name: str, delta: Tensor) -> dict[str, Any]:
    """Add `delta` to a bias of the block that reaches the hook point as it is, or times a number.

    Raises:
        CannotHoldError: no bias does.
    """
    path = _block_path(host, hook_name)
    block, before = host.model.get_submodule(path), _at(host, hook_name)
    names = [name for name, p in block.named_parameters() if _is_bias(name, p, delta.shape[0])]
    step = delta.double() * float(before.norm(dim=-1).median() / delta.double().norm())
    for name in reversed(names):
        parameter = block.get_parameter(name)
        kept = parameter.data.clone()
        parameter.data = (kept.double() + step.to(kept.device)).to(kept.dtype)
        factor = _factor(_at(host, hook_name) - before, step, host.dtype)
        parameter.data = kept
        if factor is not None:
            whole = kept.double() + delta.double().to(kept.device) / factor
            parameter.data = whole.to(kept.dtype)
            return {"parameter": f"{path}.{name}", "factor": factor}
    raise CannotHoldError(
        "it has no such bias" if not names else f"none of {names} is added to it unchanged"
    )


@torch.no_grad()
def _put_in_attention(host: Host, hook_name: str, delta: Tensor) -> dict[str, Any]:
    """In an empty block, make `delta` the output of attention at every token.

    Raises:
        CannotHoldError: its attention has no bias, or more stands behind it than a norm.
    """
    path = _block_path(host, hook_name)
    attention, last, norm = attention_of(host.model.get_submodule(path))
    before, goal = _at(host, hook_name.replace("_post", "_pre")), delta.double()
    factor = 1.0
    for _ in range(2):  # a factor of the block is seen the first time, and divided out
        constant = goal / factor if norm is None else _before_norm(norm, goal / factor)
        name = _set_constant(attention, last, constant)
        found = _factor(_at(host, hook_name) - before, goal, host.dtype)
        if found == 1.0:
            return {"parameter": f"{path}: {name}", "factor": factor}
        if found is None:
            break
        factor *= found
    raise CannotHoldError("what its attention gives is not added unchanged")


def _set_constant(attention: nn.Module, last: nn.Module, constant: Tensor) -> str:
    """Make the output of an attention without weights constant: by the bias of its last map, or by
    values that are 1 in one coordinate, since the weights of attention add up to 1."""
    if isinstance(getattr(last, "bias", None), Tensor):
        bias: Any = last.bias
        bias.data = constant.to(bias)
        return "bias of attention"
    values: Any = next(
        (m for name, m in attention.named_modules() if name.endswith("v_proj")), None
    )
    if values is None or not isinstance(getattr(values, "bias", None), Tensor):
        raise CannotHoldError("its attention has no bias")
    values.bias.data[0] = 1.0
    weight: Any = last.weight
    weight.data[:, 0] = constant.to(weight)
    return "values of attention"


def _before_norm(norm: Any, goal: Tensor) -> Tensor:
    """Set the norm's weight to one number g, and return what it makes `goal` of.

    An RMSNorm gives g x / sqrt(mean(x²) + eps), whose size is below g: g is a power of two (exact
    in every number type) and x is so small that eps brings it to the size of `goal`.
    """
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    weight = getattr(norm, "weight", None)
    if eps is None or weight is None or getattr(norm, "bias", None) is not None:
        raise CannotHoldError("the norm behind its attention is no RMSNorm")
    size = float(goal.pow(2).mean().sqrt())
    gain = math.ldexp(1.0, math.ceil(math.log2(size / 0.9)))
    share = size / gain
    one = torch.full_like(weight, 2.0)
    weight.data = torch.zeros_like(weight)  # (0 + weight) or (1 + weight): told by what it gives
    offset = 1.0 if bool(norm(one).abs().max() > 0.5) else 0.0
    weight.data.fill_(gain - offset)
    root = math.sqrt(eps / (1.0 - share * share))
    return goal * (share * root / size)


def _factor(change: Tensor, step: Tensor, dtype: torch.dtype) -> float | None:
    """The number by which `change` `[batch, pos, d]` is `step` at every token; None if it is not,
    1 exactly where it is 1 to rounding."""
    exact = dtype in (torch.float32, torch.float64)
    change, step = change.double(), step.double().to(change.device)
    factor = float((change @ step).mean() / step.pow(2).sum())
    error = float((change - factor * step).abs().max() / step.abs().max())
    tolerance = 1e-3 if exact else 0.1
    if abs(factor) < 1e-3 or error > tolerance * abs(factor):
        return None
    return 1.0 if abs(factor - 1.0) < (1e-4 if exact else 1e-2) else factor


def _is_bias(name: str, parameter: Tensor, width: int) -> bool:
    """Also one bias an expert: what a router's weights, which add up to 1, make of equal ones."""
    return name.endswith("bias") and parameter.shape[-1] == width


def _block_path(host: Any, hook_name: str) -> str:
    path: str = host.blocks.layers[int(hook_name.split(".")[1])]
    return path


def _at(host: Host, hook_name: str) -> Tensor:
    """The activation at a hook point on fixed tokens, float64."""
    seen: list[Tensor] = []

    def keep(x: Tensor) -> None:
        seen.append(x.detach().double())

    with host.intervene({hook_name: keep}):
        host.forward(probe_batch(host), stop_at_layer=int(hook_name.split(".")[1]) + 1)
    return seen[-1]


# -- whether it is the same -----------------------------------------------------------------------


@torch.no_grad()
def _steered(plan: SteeringPlan, host: Host, allow_mismatch: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities on fixed tokens, unsteered and steered."""
    batch = probe_batch(host)
    with host.quiet():
        plain = host.forward(batch).float().log_softmax(-1)
        with replace(plan).hooks(host.model, allow_mismatch=allow_mismatch):
            return plain, host.forward(batch).float().log_softmax(-1)


@torch.no_grad()
def _check_equal(baked: _Baked, host: Host, wanted: tuple[Tensor, Tensor]) -> None:
    plain, steered = wanted
    got = baked.host.forward(probe_batch(baked.host)).float().log_softmax(-1).to(steered.device)
    effect, error = float((steered - plain).abs().max()), float((got - steered).abs().max())
    exact = host.dtype in (torch.float32, torch.float64)
    if not error <= (1e-4 + 1e-3 * effect if exact else 0.1 + 0.1 * effect):
        raise HostError(
            f"the copy of {host.name!r} with the plan in its weights differs from the steered "
            f"model by {error:.3g} nats, where steering moves {effect:.3g}; it cannot be baked. "
            "Use plan.hooks(model)."
        )
