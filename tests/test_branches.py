"""What attention and MLP are said to add to the stream is what they add, or is refused."""

from __future__ import annotations

from typing import Any

import architectures
import models
import pytest
import torch
from test_cache_names import of_family

from expertsteer_lens.errors import HookNameError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.steer.plan import SteeringPlan

PARTS = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")


def host_of(family: str, kind: str) -> Any:
    if kind == "huggingface":
        return as_host(architectures.built(family, attn_implementation="eager"))
    return as_host(of_family(family))


@pytest.mark.parametrize("kind", ["huggingface", "transformer_lens"])
@pytest.mark.parametrize("family", ["gemma4", "falcon_h1", "llama4", "bloom", "granite", "gpt_j"])
def test_branches_add_up_to_the_block_or_are_refused(family: str, kind: str) -> None:
    host = host_of(family, kind)
    names = [f"blocks.1.{part}" for part in PARTS]
    refused = family in ("gemma4", "falcon_h1") or (
        kind == "huggingface" and family in ("llama4", "bloom", "granite")
    )
    if refused:
        for name in names[1:3]:
            with pytest.raises(HookNameError, match="do not add up to what the block adds"):
                host.check_hook_names([name])
        plan = SteeringPlan.from_vectors({names[1]: torch.ones(models.D_MODEL)}, relative_to="unit")
        with pytest.raises(HookNameError, match="use hook_resid_pre or hook_resid_post"):
            plan.attach(host.model)
        assert host.check_hook_names([names[0], names[3]]) == [names[0], names[3]]
        return
    host.check_hook_names(names)
    seen: dict[str, torch.Tensor] = {}
    keep = {name: lambda x, name=name: seen.__setitem__(name, x.clone()) for name in names}
    with torch.no_grad(), host.intervene(keep):
        host.forward(_batch())
    before, attention, mlp, after = (seen[name] for name in names)
    torch.testing.assert_close(before + attention + mlp, after, atol=1e-4, rtol=1e-4)


def _batch() -> Any:
    from expertsteer_lens.hosts.parts import pad_right

    return pad_right([[1, 7, 12, 30, 5]], 0)


def test_one_block_that_does_not_add_up_is_told_from_the_others() -> None:
    model = models.hf("llama")
    layer = model.model.layers[2]
    forward = type(layer).forward
    layer.forward = (lambda self, *args, **kwargs: 0.5 * forward(self, *args, **kwargs)).__get__(
        layer
    )
    host = as_host(model)
    assert host.check_hook_names(["blocks.0.hook_mlp_out", "blocks.1.hook_attn_out"])
    with pytest.raises(HookNameError, match=r"'blocks\.2\.hook_mlp_out' cannot be used"):
        host.check_hook_names(["blocks.2.hook_mlp_out"])
