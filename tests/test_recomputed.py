"""Gradients through a steered pass are right, or refused, also where gradient checkpointing runs
parts of the pass once more on the way back."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from expertsteer_lens.errors import InterventionError
from expertsteer_lens.interventions.gates import Gate
from expertsteer_lens.steer.plan import SteeringPlan

# Inside of a block, so run again with it in every version of transformers.
HOOK = "blocks.1.hook_attn_out"
SHORT, LONG = torch.tensor([[1, 5, 6, 7]]), torch.tensor([[1, 9, 10, 11, 12, 13]])


def plan_at(
    positions: object = "last_prompt", *, hook: str = HOOK, gate: Gate | None = None
) -> SteeringPlan:
    direction = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(5))
    return SteeringPlan.from_vectors(
        {hook: direction}, coefficient=6.0, relative_to="unit", positions=positions, gate=gate
    )


def checkpointing(model: Any, **options: Any) -> Any:
    """In training mode where it makes no noise: the model itself may not be."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    for layer in model.model.layers:
        layer.train()
    return model


def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return -model(ids, use_cache=False).logits.log_softmax(-1)[0, :, 7].mean()


def gradients(model: Any) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True)
    )


def wanted(plan: SteeringPlan | None, *texts: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of the mean loss without checkpointing, one pass at a time."""
    model = models.hf("llama")
    for ids in texts:
        if plan is None:
            loss(model, ids).backward()
        else:
            with plan.hooks(model):
                loss(model, ids).backward()
    return gradients(model)


RULES = ("all", "last_prompt", "prompt", [0, -1], slice(1, 3))


@pytest.mark.parametrize("kind", ["resid_pre", "attn_out", "resid_post"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_two_passes_before_one_backward_pass(rule: object, kind: str) -> None:
    plan = plan_at(rule, hook=f"blocks.1.hook_{kind}")
    model = checkpointing(models.hf("llama"), use_reentrant=False)
    with plan.hooks(model):
        (loss(model, SHORT) + loss(model, LONG)).backward()
    assert equal(gradients(model), wanted(plan, SHORT, LONG))
    assert not equal(wanted(plan, SHORT, LONG), wanted(None, SHORT, LONG))


def test_a_plain_pass_made_before_the_block_stays_plain_in_it() -> None:
    plan, model = plan_at("all"), checkpointing(models.hf("llama"), use_reentrant=False)
    before = loss(model, SHORT)
    with plan.hooks(model):
        loss(model, LONG)
        before.backward()
    assert equal(gradients(model), wanted(None, SHORT))


def test_gates_decide_again_as_they_did() -> None:
    direction = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(6))
    gates = [Gate(direction=direction, threshold=0.0, per=per) for per in ("token", "row")]
    for gate in gates:
        gated = plan_at("all", gate=gate)
        model = checkpointing(models.hf("llama"), use_reentrant=False)
        with gated.hooks(model):
            (loss(model, SHORT) + loss(model, LONG)).backward()
        assert equal(gradients(model), wanted(gated, SHORT, LONG))


def test_a_backward_pass_after_the_block_is_refused_where_blocks_are_run_again() -> None:
    plan, model = plan_at(), checkpointing(models.hf("llama"), use_reentrant=False)
    with plan.hooks(model):
        late = loss(model, SHORT)
    with pytest.raises(InterventionError, match=r"call backward\(\) inside the block"):
        late.backward()
    handle = plan.attach(model)
    late = loss(model, SHORT)
    handle.remove()
    with pytest.raises(InterventionError, match=r"call backward\(\) inside the block"):
        late.backward()


def test_a_backward_pass_after_the_block_is_right_without_checkpointing() -> None:
    plan, model = plan_at(), models.hf("llama")
    with plan.hooks(model):
        late = loss(model, SHORT)
    late.backward()
    assert equal(gradients(model), wanted(plan, SHORT))


@pytest.mark.parametrize("whole", [True, False])
def test_checkpoints_that_cannot_be_followed_are_refused_before_the_first_token(
    whole: bool,
) -> None:
    model = models.hf("llama") if whole else checkpointing(models.hf("llama"), use_reentrant=True)
    anchor = torch.zeros((), requires_grad=True)

    def run() -> None:
        if whole:
            checkpoint(lambda _: loss(model, SHORT), anchor, use_reentrant=True)
        else:
            loss(model, SHORT)

    handle = plan_at().attach(model)
    with pytest.raises(InterventionError, match="use_reentrant=False"):
        run()
    handle.remove()


def test_a_checkpoint_around_the_whole_model_is_followed() -> None:
    plan, model = plan_at(), models.hf("llama")
    with plan.hooks(model):
        one, two = (
            checkpoint(lambda ids=ids: loss(model, ids), use_reentrant=False)
            for ids in (SHORT, LONG)
        )
        (one + two).backward()
    assert equal(gradients(model), wanted(plan, SHORT, LONG))


def test_a_bridge_is_followed_as_well() -> None:
    plan, bridge = plan_at(), models.bridge("llama")

    def mean(ids: torch.Tensor) -> torch.Tensor:
        return -bridge(ids).log_softmax(-1)[0, :, 7].mean()

    def run(again: bool) -> list[torch.Tensor]:
        with plan.hooks(bridge):
            parts = [
                checkpoint(lambda ids=ids: mean(ids), use_reentrant=False) if again else mean(ids)
                for ids in (SHORT, LONG)
            ]
            sum(parts).backward()
        return gradients(bridge)

    assert equal(run(True), run(False))
