"""`plan.edit`: one implementation of positions and edits, here and on a server that lacks the
package."""

from __future__ import annotations

import pickletools
from typing import Any

import models
import pytest
import torch
from reference import CLOSE, HOOK, N_NEW, SIZE, plan_for, prompt_ids, vector
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, DataError, InterventionError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.interventions.edits import EDITS, Edit, register_edit
from expertsteer_lens.steer.plan import SteeringPlan

nnsight = pytest.importorskip("nnsight")
cloudpickle = pytest.importorskip("cloudpickle")

GENERATE = models.greedy(N_NEW)


def fresh(family: str = "llama") -> Any:
    return nnsight.TransformersModel(models.hf(family, size=SIZE), tokenizer=models.tokenizer())


@pytest.fixture(scope="module")
def model() -> Any:
    return fresh()


@pytest.fixture(scope="module")
def recurrent() -> Any:
    import transformers

    torch.manual_seed(0)
    small = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=3, state_size=4, **small)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in module.parameters():
        parameter.data += SIZE * torch.randn_like(parameter)
    return nnsight.TransformersModel(module, tokenizer=models.tokenizer())


def steered_steps(model: Any, path: str, ids: Tensor, **options: Any) -> list[Tensor]:
    """What a block puts out in each pass of a generation."""
    seen: list[Tensor] = []
    handle = model._module.get_submodule(path).register_forward_hook(
        lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out).clone())
    )
    try:
        model.generate(input_ids=ids, **GENERATE, **options)
    finally:
        handle.remove()
    return seen


# -- recurrent models -----------------------------------------------------------------------------


def reversed_in(rule: Any, coefficient: float = 5.0) -> SteeringPlan:
    v = torch.randn(32, generator=torch.Generator().manual_seed(3))
    return SteeringPlan.from_vectors(
        {HOOK: v}, coefficient=coefficient, relative_to="unit", positions=rule
    )


@pytest.mark.parametrize("rule", [0, 5, "generated", "last_prompt", slice(2, None), [1, -1]])
def test_hooks_and_edit_agree_on_a_model_whose_cache_counts_no_tokens(
    recurrent: Any, rule: Any
) -> None:
    plan, ids = reversed_in(rule), torch.tensor([prompt_ids()[0]])
    path = as_host(recurrent).blocks.layers[1]
    plain = steered_steps(recurrent, path, ids)
    with plan.hooks(recurrent):
        want = steered_steps(recurrent, path, ids)
    handle = plan.edit(recurrent)
    found = steered_steps(recurrent, path, ids)
    handle.remove()
    assert len(found) == N_NEW
    for mine, theirs in zip(found, want, strict=True):
        assert torch.equal(mine, theirs)
    assert any(not torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    there = plan.edit(as_host(recurrent, remote="local"))
    with torch.no_grad(), recurrent.generate(input_ids=ids, remote="local", **GENERATE) as tracer:
        out = tracer.result.save()
    there.remove()
    with plan.hooks(recurrent):
        assert torch.equal(out, recurrent.generate(input_ids=ids, **GENERATE))


def test_two_plans_on_such_a_model_count_each_pass_once(recurrent: Any) -> None:
    module, ids = recurrent._module, torch.tensor([prompt_ids()[0]])
    n = ids.shape[1]
    with reversed_in(n).hooks(module) as first, reversed_in(n, -3.0).hooks(module) as second:
        module.generate(ids, **GENERATE)
    assert first.n_edited == second.n_edited == {HOOK: 1}


def test_an_edit_goes_on_from_the_cache_of_an_earlier_run(recurrent: Any) -> None:
    import transformers

    plan, ids = reversed_in(6), torch.tensor([[1, 4, 7, 19, 6, 8, 5]])
    with plan.hooks(recurrent), torch.no_grad():
        want = recurrent._module(ids).logits[:, -1]
    handle = plan.edit(recurrent)
    cache = transformers.DynamicCache(config=recurrent._module.config)
    with torch.no_grad():
        for part in (ids[:, :-1], ids[:, -1:]):
            after = recurrent.trace(input_ids=part, cache_params=cache, use_cache=True, trace=False)
    handle.remove()
    torch.testing.assert_close(after.logits[:, -1], want, **CLOSE)


# -- the same refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda real: real.flip(1).cumsum(1).flip(1) <= 2, "is not causal"),
        (lambda real: real.long(), r"must return a bool tensor of shape \(1, 6\), got torch.int64"),
        (lambda real: real[:, :1], r"must return a bool tensor of shape"),
    ],
    ids=["not causal", "wrong dtype", "wrong shape"],
)
def test_a_function_of_the_mask_is_refused_by_edit_as_by_hooks(
    model: Any, rule: Any, message: str
) -> None:
    plan = plan_for("llama", "all").with_positions(rule)
    ids = torch.tensor([[1, 4, 7, 19, 6, 8]])
    handle = plan.edit(model)
    with pytest.raises(InterventionError, match=message):
        model.generate(input_ids=ids, **GENERATE)
    handle.remove()
    with pytest.raises(InterventionError, match=message), plan.hooks(model):
        model.generate(input_ids=ids, **GENERATE)


def test_prompt_lengths_are_checked_before_the_edit_is_put_on(model: Any) -> None:
    with pytest.raises(ArgumentError, match="prompt_lengths must be a positive int"):
        plan_for("llama", "prompt").edit(model, prompt_lengths=0)
    assert model._edits == []


def test_a_batch_that_looks_padded_is_refused_by_edit_as_by_hooks() -> None:
    bare = nnsight.NNsight(models.hf("llama", size=SIZE))  # which adds no mask of its own
    host = as_host(bare, tokenizer=models.tokenizer())
    plan, ids = plan_for("llama", "last_prompt"), torch.tensor([[0, 0, 1, 4], [1, 4, 7, 19]])
    for put_on in (plan.edit, plan.attach):
        handle = put_on(host)
        with pytest.raises(DataError, match="came without an attention mask"):
            bare.trace(input_ids=ids, trace=False)
        handle.remove()


# -- an edit of the user's ------------------------------------------------------------------------


def mirror(activations: Tensor, direction: Tensor, coefficient: Any) -> Tensor:
    along = activations @ direction
    return activations - (2 * coefficient * along)[..., None] * direction


@pytest.fixture
def mirrored() -> Any:
    register_edit("mirror", Edit(mirror, coefficient="fraction"))
    yield SteeringPlan.from_vectors(
        {HOOK: vector("llama")},
        coefficient=20.0,
        edit="mirror",
        relative_to="unit",
        positions="generated",
    )
    del EDITS["mirror"]


def by_context() -> SteeringPlan:
    return SteeringPlan.from_vectors(
        {HOOK: vector("llama")},
        coefficient=8.0,
        edit="add_contextual",
        relative_to="unit",
        positions="generated",
        parameters={HOOK: models.edit_parameters("add_contextual")},
    )


@pytest.mark.parametrize("kind", ["registered", "by context"])
def test_an_edit_with_something_of_its_own_travels_too(
    model: Any, mirrored: Any, kind: str
) -> None:
    plan = mirrored if kind == "registered" else by_context()
    ids = torch.tensor([prompt_ids()[1]])
    plain = model.generate(input_ids=ids, **GENERATE)
    with plan.hooks(model):
        want = model.generate(input_ids=ids, **GENERATE)
    handle = plan.edit(as_host(model, remote="local"))
    with model.generate(input_ids=ids, remote="local", **GENERATE) as tracer:
        out = tracer.result.save()
    assert torch.equal(model.generate(input_ids=ids, **GENERATE), want)
    handle.remove()
    assert torch.equal(out, want)
    assert not torch.equal(out, plain)


# -- what travels ---------------------------------------------------------------------------------


def packed_edit(model: Any, plan: SteeringPlan) -> bytes:
    from expertsteer_lens.hosts.nnsight import remote

    kept: list[bytes] = []
    pack = remote.pack

    def keep(value: Any) -> bytes:
        kept.append(pack(value))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "pack", keep)
        handle = plan.edit(as_host(model, remote="local"))
        with torch.no_grad(), model.trace(input_ids=torch.tensor([[1, 4, 7]]), remote="local"):
            model.output.logits.save()
        handle.remove()
    return kept[-1]


def strings_in(packed: bytes) -> set[str]:
    """Every string in a pickle: names of what reading it looks up are among them."""
    return {value for _, value, _ in pickletools.genops(packed) if isinstance(value, str)}


def test_what_is_sent_is_source_and_asks_for_nothing_of_ours(model: Any) -> None:
    """Bytecode would be read by the same version of Python only. That the package is not asked for
    is shown by a process that lacks it, in `test_host_nnsight`."""
    strings = strings_in(packed_edit(model, plan_for("llama", [0, -1])))
    assert "CodeType" not in strings
    sources = [s for s in strings if s.lstrip().startswith("def ")]
    assert any("def observe(" in s for s in sources)
    assert any("def mask(" in s for s in sources)
    assert any("def add(" in s for s in sources)


def test_bytecode_would_be_seen() -> None:
    from expertsteer_lens.hosts.nnsight.remote import pack
    from expertsteer_lens.steer.report import RunReport

    assert "CodeType" in strings_in(pack(RunReport))  # the methods that `dataclass` makes up


def test_the_package_is_registered_only_while_something_is_packed(model: Any) -> None:
    before = cloudpickle.list_registry_pickle_by_value()
    packed_edit(model, plan_for("llama", "all"))
    assert "expertsteer_lens" not in cloudpickle.list_registry_pickle_by_value() - before


def test_half_precision_that_overflows_is_an_error_and_no_nan() -> None:
    lens = nnsight.TransformersModel(
        models.hf("llama", dtype=torch.float16), tokenizer=models.tokenizer()
    )
    plan = SteeringPlan.from_vectors(
        {HOOK: vector("llama")}, coefficient=500_000.0, relative_to="unit"
    )
    handle = plan.edit(lens)
    with pytest.raises(InterventionError, match="above 65504"):
        lens.trace(input_ids=torch.tensor([[1, 5, 6]]), trace=False)
    handle.remove()
