"""Steering is exact, or refused before the first wrong token, however the model is run."""

from __future__ import annotations

import models
import pytest
import torch

from expertsteer_lens.errors import ArtifactError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.steer.plan import SteeringPlan

HOOK = "blocks.1.hook_resid_post"


def plan_at(positions: object = "all", *, hook: str = HOOK, size: float = 6.0) -> SteeringPlan:
    direction = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(5))
    return SteeringPlan.from_vectors(
        {hook: direction}, coefficient=size, relative_to="unit", positions=positions
    )


def llama() -> torch.nn.Module:
    model = models.hf("llama")
    model.tokenizer = models.tokenizer()
    return model


WRITES = {
    "times": lambda p: p.data.mul_(torch.randn_like(p)),
    "plus": lambda p: p.data.add_(torch.randn_like(p)),
    "copy": lambda p: p.data.copy_(torch.randn_like(p)),
}


@pytest.mark.parametrize("way", WRITES)
def test_weights_written_to_behind_the_version_counter_are_noticed(way: str) -> None:
    model = llama()
    made_for = {"fingerprint": as_host(model).fingerprint}
    plan = SteeringPlan(plan_at().vectors, target=made_for)
    with plan.hooks(model), torch.no_grad():
        model(torch.tensor([[1, 5, 6]]))
    for parameter in model.parameters():
        WRITES[way](parameter)
    with pytest.raises(ArtifactError, match="was fitted on fingerprint"):
        plan.attach(model)


def test_adapters_switched_off_after_the_fit_are_noticed_and_merging_them_changes_nothing() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), config).eval()
    fitted = as_host(model).fingerprint
    plan = SteeringPlan(plan_at().vectors, target={"fingerprint": fitted})
    with model.disable_adapter(), pytest.raises(ArtifactError, match="was fitted on fingerprint"):
        plan.attach(model)
    model.merge_adapter()
    plan.attach(model).remove()
    model.unmerge_adapter()
    plan.attach(model).remove()
