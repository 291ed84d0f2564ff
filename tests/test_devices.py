"""A model split over two devices, on a machine that has one.

`Pretend` gives every tensor a pretended device and refuses, as torch does, to compute on tensors of
two; the numbers are those of the CPU. What it cannot show is whether kernels of a real device agree
with the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from reference import SIZE, padded, prompt_ids
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from expertsteer_lens.hosts import as_host, capture
from expertsteer_lens.interventions.gates import Gate
from expertsteer_lens.steer.plan import SteeringPlan
from expertsteer_lens.steer.vector import SteeringVector

FIRST, SECOND = "cuda:0", "cuda:1"
TEXTS = ["the cat saw a dog", "once upon a time there was a big house", "sun"]
EARLY, LATE = "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"


def place_of(tensor: Tensor) -> str:
    return getattr(tensor, "_pretended", "cpu")


class Pretend(TorchFunctionMode):
    """Inside, `tensor.to("cuda:1")` moves a tensor in name only, and names must agree."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return torch.device(place_of(args[0]))
        target = kwargs.pop("device", None)
        if func is Tensor.to:
            target, args = self._destination(target, args, kwargs)
        elif func is Tensor.cpu:
            target = "cpu"
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        places = {place_of(t) for t in tensors if t.ndim > 0}
        places = places or {place_of(t) for t in tensors}
        if len(places) > 1 and target is None and func is not Tensor.copy_:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func.__name__} got "
                f"{sorted(places)}."
            )
        result = func(*args, **kwargs)
        where = str(torch.device(target)) if target is not None else next(iter(places), "cpu")
        return tree_map_only(Tensor, lambda t: self._put(t, where, tensors), result)

    @staticmethod
    def _destination(
        target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...]]:
        """Where `tensor.to(...)` goes; the arguments that are left say the dtype alone."""
        kwargs.setdefault("dtype", args[0].dtype)
        for value in args[1:]:
            if isinstance(value, Tensor):
                target, kwargs["dtype"] = place_of(value), value.dtype
            elif isinstance(value, (str, torch.device)):
                target = value
            elif isinstance(value, torch.dtype):
                kwargs["dtype"] = value
        return target, args[:1]

    @staticmethod
    def _put(result: Tensor, where: str, inputs: list[Tensor]) -> Tensor:
        if any(result is t for t in inputs) and place_of(result) != where:
            result = result.clone()
        result._pretended = where  # type: ignore[attr-defined]
        return result


def split(family: str) -> Any:
    """The model with its last block, norm and head on the second device, moved to as accelerate
    does."""
    model = models.hf(family, size=SIZE)
    model.tokenizer = models.tokenizer()
    inner = model.base_model
    layers = inner.h if hasattr(inner, "h") else inner.layers
    norm = next(
        getattr(inner, name)
        for name in ("ln_f", "norm", "final_layer_norm")
        if hasattr(inner, name)
    )
    head = model.get_output_embeddings()
    late = [layers[2], norm, head]
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._pretended = FIRST
    for module in late:
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor._pretended = SECOND

        def moved(*args: Any, inner: Any = module.forward, **kwargs: Any) -> Any:
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(SECOND), (args, kwargs))
            return inner(*args, **kwargs)

        module.forward = moved
    return model


@pytest.fixture(
    scope="module", params=["neox", "llama"]
)  # one in the centred basis, one in the raw; heads of their own
def pair(request: Any) -> tuple[Any, Any]:
    whole = models.hf(request.param, size=SIZE)
    whole.tokenizer = models.tokenizer()
    return whole, split(request.param)


def vector(hook: str, seed: int, **options: Any) -> SteeringVector:
    found = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(
        **{
            "hook_name": hook,
            "direction": found / found.norm(),
            "coefficient": 2.0,
            "relative_to": "unit",
            **options,
        }
    )


def both(**options: Any) -> tuple[SteeringVector, ...]:
    return vector(EARLY, 0, **options), vector(LATE, 1, **options)


GATE = {
    "direction": torch.randn(32, generator=torch.Generator().manual_seed(9)),
    "threshold": 0.0,
    "hook_name": EARLY,
}
PLANS: dict[str, Callable[[], SteeringPlan]] = {
    "add": lambda: SteeringPlan(vectors=both()),
    "ablate": lambda: SteeringPlan(
        vectors=both(edit="ablate", coefficient=0.7), positions="prompt"
    ),
    "rescale": lambda: SteeringPlan(
        vectors=both(edit="rescale", coefficient=0.7), positions=[0, -1]
    ),
    "clamp": lambda: SteeringPlan(vectors=both(edit="clamp"), positions="generated"),
    "norm kept": lambda: SteeringPlan(vectors=both(preserve_norm=True), positions=slice(1, None)),
    "mask function": lambda: SteeringPlan(
        vectors=both(), positions=lambda mask: mask.cumsum(1) % 2 == 0
    ),
    "gate per row": lambda: SteeringPlan(
        vectors=both(gate=Gate(**GATE, per="row")), positions="all"
    ),
    "gate per token": lambda: SteeringPlan(
        vectors=both(gate=Gate(**GATE, per="token")), positions="prompt"
    ),
    "gated and free at one place": lambda: SteeringPlan(
        vectors=(vector(LATE, 1, gate=Gate(**GATE)), vector(LATE, 2)), positions="all"
    ),
}


@pytest.mark.parametrize("rows", [None, [0.0, 1.0, -1.0, 0.5]], ids=["", "by row"])
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_on_a_split_model_gives_the_numbers_of_the_whole_one(
    pair: Any, name: str, rows: Any
) -> None:
    whole, parts = pair
    ids, mask = padded(prompt_ids(), "left")
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    plan = PLANS[name]()
    with torch.no_grad():
        with plan.hooks(whole, row_coefficients=rows) as report:
            want = whole(ids, **options).logits
        with Pretend():
            moved = {key: value.to(FIRST) for key, value in options.items()}
            with plan.hooks(parts, row_coefficients=rows) as split_report:
                found = parts(ids.to(FIRST), **moved).logits
                assert str(found.device) == SECOND
            assert split_report.n_edited == report.n_edited
    assert torch.equal(found, want)
    assert report.n_edited[LATE] > 0


def test_captures_of_a_split_model_are_those_of_the_whole_one(pair: Any) -> None:
    whole, parts = pair
    for positions in ("last", "mean", "all"):
        want = capture(whole, TEXTS, positions=positions)
        with Pretend():
            found = capture(parts, TEXTS, positions=positions)
            assert {place_of(found[name]) for name in found} == {"cpu"}
        for name in want:
            assert torch.equal(found[name], want[name])
        assert found.provenance["fingerprint"] == want.provenance["fingerprint"]


def test_a_long_run_adds_its_counts_up_across_devices(pair: Any) -> None:
    """Counts stay on their devices until asked for, or until there are very many."""
    _, parts = pair
    ids = torch.tensor([prompt_ids()[0]])
    plan = SteeringPlan(
        vectors=(vector(LATE, 1, gate=Gate(**GATE, per="token")), vector(LATE, 2)),
        positions="prompt",
    )
    with Pretend(), torch.no_grad(), plan.hooks(parts) as report:
        parts(ids.to(FIRST))
        once = report.n_edited[LATE]
        report._edited[LATE] += [torch.tensor(once).to(FIRST)] * 600
        parts(ids.to(FIRST))
        assert len(report._edited[LATE]) < 520
        assert report.n_edited[LATE] == 602 * once


def test_the_pretended_devices_refuse_what_real_ones_refuse(pair: Any) -> None:
    """Negative control: an edit that stays where it was made fails on the second device, and on the
    first."""
    _, parts = pair
    ids = torch.tensor([prompt_ids()[0]])
    for name in (EARLY, LATE):
        for stays in (FIRST, SECOND):
            with Pretend(), torch.no_grad():
                host, v = as_host(parts), torch.ones(32).to(stays)
                with host.intervene({name: lambda x, v=v: x + v}):
                    if (name == EARLY) == (stays == FIRST):
                        parts(ids.to(FIRST))
                    else:
                        with pytest.raises(
                            RuntimeError, match="Expected all tensors to be on the same device, but"
                        ):
                            parts(ids.to(FIRST))
