"""A plan in the weights says what the steered model says, in the model's own class."""

from __future__ import annotations

import models
import pytest
import torch
from architectures import MIXED, made

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, ArtifactError, HostError

D = models.D_MODEL
IDS = torch.tensor([[1, 7, 12, 30, 5, 9, 40, 41, 42, 43, 11, 3]])
THERE, BLOCK = None, True
# The switch that is turned on, and whether blocks are added.
FAMILIES = {
    "gpt2": (THERE,),
    "phi": (THERE,),
    "opt_350m": (THERE,),
    "gpt_oss": (THERE,),
    "llama": ("mlp_bias",),
    "granite": ("mlp_bias",),
    "cohere": ("attention_bias",),
    "qwen2": (THERE, BLOCK),
    "qwen3": ("attention_bias", BLOCK),
    "gemma3": ("attention_bias", BLOCK),
    "olmo2": ("attention_bias", BLOCK),
}
MORE = {
    "gpt_j": (THERE,),
    "gpt_neo": (THERE,),
    "gpt_neox": (THERE,),
    "opt": (THERE,),
    "bloom": (THERE,),
    "starcoder2": (THERE,),
    "falcon": ("bias",),
    "llama_tied": ("mlp_bias",),
    "nemotron": ("mlp_bias",),
    "smollm3": ("mlp_bias",),
    "falcon_h1": ("mlp_bias",),
    "mamba": ("use_bias",),
    "mamba2": ("use_bias",),
    "gemma": ("attention_bias", BLOCK),
    "gemma2": ("attention_bias", BLOCK),
    "olmo": ("attention_bias", BLOCK),
    "stablelm": ("use_qkv_bias", BLOCK),
    "glm4": (THERE, BLOCK),
    "qwen2_moe": (THERE, BLOCK),
    "qwen3_moe": ("attention_bias", BLOCK),
    "deepseek_v3": ("attention_bias", BLOCK),
    "llama4": ("attention_bias", BLOCK),
}


BOTH = ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")


def plan_of(*hook_names: str, coefficient: float = 3.5, **options) -> esl.SteeringPlan:
    generator = torch.Generator().manual_seed(4)
    names = hook_names or ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")
    vectors = {name: torch.randn(D, generator=generator) for name in names}
    return esl.SteeringPlan.from_vectors(
        vectors, coefficient=coefficient, relative_to="unit", **options
    )


@torch.no_grad()
def log_probs(model) -> torch.Tensor:
    return model(input_ids=IDS).logits.float().log_softmax(-1)


def steered(plan, model) -> torch.Tensor:
    with plan.hooks(model):
        return log_probs(model)


def check(family: str, folder) -> None:
    """Equal to hooks to 1e-5, in the own class, and again after saving and loading without us."""
    import transformers

    model, plan = made(family), plan_of()
    plain, wanted = log_probs(model), steered(plan, model)
    assert float((wanted - plain).abs().max()) > 0.1, "the plan does nothing here"
    baked = plan.bake(model)
    torch.testing.assert_close(log_probs(baked), wanted, atol=1e-5, rtol=0)
    assert type(baked) is type(model)
    switch, *adds_block = {**FAMILIES, **MORE}[family]
    assert baked.config.num_hidden_layers == (5 if adds_block else 3)
    assert {note["switch"] for note in baked.config.expertsteer_lens["baked"]} == {switch}
    baked.save_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(log_probs(loaded), wanted, atol=1e-5, rtol=0)
    assert torch.equal(log_probs(model), plain)  # the model itself is left as it was


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_says_what_the_steered_model_says_and_loads_without_us(family, tmp_path):
    check(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE)
def test_it_does_in_other_families(family, tmp_path):
    check(family, tmp_path)


@pytest.mark.parametrize("family", ["mistral", "gemma4", "lfm2"])
def test_a_class_without_a_place_is_refused_with_the_reason(family):
    with pytest.raises(HostError, match=r"no place for the vector \(as a bias of the block: ther"):
        plan_of().bake(made(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "phi3", "mpt"])
def test_others_without_a_place_are_refused(family):
    with pytest.raises(HostError, match="no place for the vector"):
        plan_of().bake(made(family))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_it_generates_the_same_with_a_cache_in_padded_batches_and_compiled(family):
    model, plan = made(family), plan_of()
    baked = plan.bake(model)
    ids = torch.tensor([[0, 0, 1, 7, 12], [1, 9, 30, 41, 5]])
    how = {"attention_mask": (ids != 0).long(), "max_new_tokens": 12, "do_sample": False}
    how["eos_token_id"] = None
    with plan.hooks(model):
        wanted = model.generate(ids, **how)
    assert torch.equal(baked.generate(ids, **how), wanted)
    assert not torch.equal(model.generate(ids, **how), wanted)
    if family != "gemma3":  # compiling takes seconds; once is enough
        return
    compiled = torch.compile(baked, backend="eager")
    torch.testing.assert_close(log_probs(compiled), steered(plan, model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "names",
    [
        ("blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"),
        ("blocks.2.hook_resid_pre",),
        ("blocks.1.hook_attn_out",),
    ],
)
def test_other_hook_points_of_a_block(names):
    model, plan = made("gpt2"), plan_of(*names)
    wanted = steered(plan, model)
    torch.testing.assert_close(log_probs(plan.bake(model)), wanted, atol=1e-5, rtol=0)


def test_the_last_block_and_neighbours_of_a_class_that_needs_more_blocks():
    names = [f"blocks.{layer}.hook_resid_post" for layer in (2, 0, 1)]
    model, plan = made("gemma3"), plan_of(*names)
    wanted, baked = steered(plan, model), plan.bake(model)
    torch.testing.assert_close(log_probs(baked), wanted, atol=1e-5, rtol=0)
    blocks = [note["additional_block"] for note in baked.config.expertsteer_lens["baked"]]
    assert blocks == [5, 1, 3]
    assert baked.config.layer_types == [kind for kind in MIXED for _ in range(2)]


def test_the_text_half_of_a_multimodal_model():
    model = made("gemma3_vision")
    plan = plan_of()
    wanted, baked = steered(plan, model), plan.bake(model)
    torch.testing.assert_close(log_probs(baked), wanted, atol=1e-5, rtol=0)
    assert baked.config.text_config.num_hidden_layers == 5


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_in_half_precision_it_is_as_near_as_rounding_allows(family):
    model, plan = made(family, torch.bfloat16), plan_of()
    wanted, plain, baked = steered(plan, model), log_probs(model), plan.bake(model)
    assert {p.dtype for p in baked.parameters()} == {torch.bfloat16}
    effect = float((wanted - plain).abs().mean())
    assert float((log_probs(baked) - wanted).abs().mean()) < 0.05 * effect


def test_a_second_plan_joins_the_first():
    one, two = plan_of("blocks.0.hook_resid_post"), plan_of("blocks.1.hook_resid_post")
    model = made("llama")
    twice = two.bake(one.bake(model))
    both = esl.SteeringPlan(vectors=(*one.vectors, *two.vectors))
    torch.testing.assert_close(log_probs(twice), steered(both, model), atol=1e-5, rtol=0)
    assert len(twice.config.expertsteer_lens["baked"]) == 2


def test_hooks_on_the_model_are_not_taken_along():
    model, plan = made("llama"), plan_of()
    wanted = steered(plan, model)
    with plan.hooks(model):
        log_probs(model)
        baked = plan_of("blocks.0.hook_resid_post", "blocks.2.hook_resid_post").bake(model)
    torch.testing.assert_close(log_probs(baked), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "generated"}, r"positions='generated' cannot be baked: weights steer every"),
        ({"edit": "clamp"}, "edit='clamp' at .* cannot be baked: only 'add' is a constant vector"),
        (
            {
                "edit": "add_contextual",
                "parameters": dict.fromkeys(BOTH, models.edit_parameters("add_contextual")),
            },
            "edit='add_contextual' at .* the strength depends on the activation, which weights do",
        ),
        ({"preserve_norm": True}, "preserve_norm=True at .* cannot be baked"),
        ({"coefficient": 0.0}, "nothing to be baked"),
    ],
)
def test_plans_that_are_no_constant_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        plan_of(**options).bake(made("llama"))


def test_an_additional_block_adds_at_the_output_of_a_block_only():
    with pytest.raises(HostError, match="an additional block adds at a block's output only"):
        plan_of("blocks.1.hook_attn_out").bake(made("qwen2"))


def test_models_that_cannot_be_copied_whole_are_refused():
    plan = plan_of()
    with pytest.raises(
        HostError, match=r"only a Hugging Face model can be baked, got a Transformer"
    ):
        plan.bake(models.bridge("gpt2"))
    model = models.hf("llama")
    model.hf_quantizer = object()
    with pytest.raises(HostError, match="is quantised; bake the full weights"):
        plan.bake(model)
    with pytest.raises(HostError, match=r"hook 'blocks\.0\.hook_resid_pre' cannot be baked"):
        plan_of("blocks.0.hook_resid_pre").bake(made("llama"))


def test_an_adapter_is_to_be_merged_first():
    peft = pytest.importorskip("peft")
    model = models.hf("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    with pytest.raises(HostError, match="carries an adapter; merge_and_unload"):
        plan_of().bake(adapted)


def test_a_plan_for_another_model_is_refused():
    import dataclasses

    plan = dataclasses.replace(plan_of(), target={"fingerprint": f"3x{D}-{0:064x}"})
    with pytest.raises(ArtifactError, match="allow_mismatch=True"):
        plan.bake(made("llama"))
    plan.bake(made("llama"), allow_mismatch=True)


def test_a_copy_that_says_something_else_is_refused(monkeypatch):
    from expertsteer_lens.steer import bake as module

    kept = module._put_in_bias

    def half(host, hook_name, delta):
        return kept(host, hook_name, delta / 2)

    monkeypatch.setattr(module, "_put_in_bias", half)
    with pytest.raises(HostError, match=r"differs from the steered model by .* nats"):
        plan_of().bake(made("llama"))
