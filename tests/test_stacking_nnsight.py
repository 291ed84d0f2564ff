"""Steering among the edits and traces of an nnsight user: order, exact removal, and the user's own
reads and writes."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import Tensor

from expertsteer_lens.errors import InterventionError
from expertsteer_lens.steer.plan import SteeringPlan

nnsight = pytest.importorskip("nnsight")

HOOK = "blocks.1.hook_resid_post"
IDS = torch.tensor([[1, 4, 7, 19, 6, 8]])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def model() -> Any:
    return nnsight.TransformersModel(models.hf("llama"), tokenizer=models.tokenizer())


def plan_of(seed: int = 0, **options: Any) -> SteeringPlan:
    v = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(seed))
    return SteeringPlan.from_vectors({HOOK: v}, coefficient=4.0, relative_to="unit", **options)


def state(model: Any) -> Tensor:
    """What a trace reads at the steered layer."""
    with torch.no_grad(), model.trace(input_ids=IDS):
        found = model.model.layers[1].output.save()
    return found


def double(model: Any) -> Any:
    """The user's edit: the steered layer's output, doubled."""
    with model.edit(inplace=True):
        model.model.layers[1].output = 2 * model.model.layers[1].output
    return model._edits[-1]


@pytest.mark.parametrize("way", ["edit", "hooks", "attach"])
@pytest.mark.parametrize("mine_first", [True, False])
def test_the_users_edit_and_the_plan_act_in_the_order_they_were_made(
    model: Any, way: str, mine_first: bool
) -> None:
    plan, plain = plan_of(), state(model)
    v = plan.vectors[0].delta
    mine = double(model) if mine_first else None
    if way == "hooks":
        with plan.hooks(model):
            mine = mine or double(model)
            found = state(model)
    else:
        handle = getattr(plan, way)(model)
        mine = mine or double(model)
        found = state(model)
        handle.remove()
    torch.testing.assert_close(found, 2 * plain + v if mine_first else 2 * (plain + v), **CLOSE)
    assert model._edits == [mine]  # the plan's edit is gone, the user's is not
    assert torch.equal(state(model), 2 * plain)


def test_plans_as_edits_come_off_one_by_one_in_any_order(model: Any) -> None:
    plain = state(model)
    first, second = plan_of(), plan_of(1)
    a, b = first.vectors[0].delta, second.vectors[0].delta
    handles = [first.edit(model), second.edit(model)]
    torch.testing.assert_close(state(model), plain + a + b, **CLOSE)
    handles[0].remove()
    torch.testing.assert_close(state(model), plain + b, **CLOSE)
    handles[1].remove()
    handles[1].remove()
    assert torch.equal(state(model), plain)


def test_what_a_trace_writes_stands_on_what_apply_made(model: Any) -> None:
    plan, plain = plan_of(), state(model)
    with torch.no_grad(), model.trace(input_ids=IDS):
        plan.apply(model)
        read = model.model.layers[1].output.save()
        model.model.layers[1].output = 3 * model.model.layers[1].output
        entering = model.model.layers[2].input.save()
    torch.testing.assert_close(read, plain + plan.vectors[0].delta, **CLOSE)
    torch.testing.assert_close(entering, 3 * read, **CLOSE)


def test_apply_stands_on_the_users_edits_and_adds_to_other_plans(model: Any) -> None:
    plain, v = state(model), plan_of().vectors[0].delta
    double(model)
    with plan_of(1).hooks(model), torch.no_grad():
        with model.trace(input_ids=IDS):
            plan_of().apply(model)
            found = model.model.layers[1].output.save()
    torch.testing.assert_close(found, 2 * plain + plan_of(1).vectors[0].delta + v, **CLOSE)
    assert len(model._edits) == 1


def test_a_patch_between_traces_of_a_session_carries_the_steering(model: Any) -> None:
    plan = plan_of()
    with torch.no_grad():
        with plan.hooks(model):
            want = model.trace(input_ids=IDS, trace=False).logits
        with model.session():
            with model.trace(input_ids=IDS):
                plan.apply(model)
                steered = model.model.layers[1].output
            with model.trace(input_ids=IDS):
                model.model.layers[1].output = steered
                patched = model.output.logits.save()
        plain = model.trace(input_ids=IDS, trace=False).logits
    torch.testing.assert_close(patched, want, **CLOSE)
    assert (plain - want).abs().max() > 0.1


def test_clear_edits_under_a_plan_is_noticed(model: Any) -> None:
    def clears() -> None:
        with plan_of().hooks(model):
            state(model)
            model.clear_edits()

    with pytest.raises(InterventionError, match="was removed while it was on"):
        clears()
    assert model._edits == []


def test_an_error_in_the_users_trace_comes_out_as_it_is_and_leaves_nothing(model: Any) -> None:
    plain = state(model)

    def fails() -> None:
        with model.trace(input_ids=IDS):
            plan_of().apply(model)
            model.model.layers[2].output.save()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fails()
    assert torch.equal(state(model), plain)
