"""nnsight: steering around and inside traces, generations, sessions and edits, and on a server that
lacks this package.

Families, rules and paddings are in `test_host_parity`; here is what only nnsight has.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import warnings
from typing import Any

import models
import pytest
import torch
from reference import (
    CLOSE,
    HOOK,
    N_NEW,
    RULES,
    SIZE,
    n_edited,
    padded,
    plan_for,
    prompt_ids,
    reference,
    vector,
)
from torch import Tensor, nn

from expertsteer_lens.errors import (
    ArgumentError,
    DataError,
    HookNameError,
    HostError,
    InterventionError,
    ModelStateError,
)
from expertsteer_lens.hosts import as_host, capture
from expertsteer_lens.interventions.gates import Gate
from expertsteer_lens.steer.plan import SteeringPlan

nnsight = pytest.importorskip("nnsight")

TEXTS = ["the cat saw a dog", "once upon a time there was a big house", "sun"]
IDS = torch.tensor([[1, 4, 7, 19, 6, 8]])
GENERATE = models.greedy(N_NEW)


def fresh(family: str = "llama") -> Any:
    return nnsight.TransformersModel(models.hf(family, size=SIZE), tokenizer=models.tokenizer())


@pytest.fixture(scope="module")
def model() -> Any:
    return fresh()


@pytest.fixture(autouse=True)
def _nothing_is_left(model: Any) -> Any:
    yield
    assert model._edits == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model._module.modules())
    assert "generate" not in model._module.__dict__


def logits(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.trace(input_ids=ids, trace=False, **options).logits


def stream(model: Any, ids: Tensor = IDS) -> Tensor:
    """What a user's trace reads at the steered layer's output."""
    with torch.no_grad(), model.trace(input_ids=ids):
        found = model.model.layers[1].output.clone().save()
    return found


# -- which models ---------------------------------------------------------------------------------


def test_every_class_of_nnsight_gives_the_same_numbers() -> None:
    with pytest.warns(Warning, match="LanguageModel is deprecated"):
        deprecated = nnsight.LanguageModel(
            models.hf("llama", size=SIZE), tokenizer=models.tokenizer()
        )
    bare = nnsight.NNsight(models.hf("llama", size=SIZE))
    hosts = [as_host(fresh()), as_host(deprecated), as_host(bare, tokenizer=models.tokenizer())]
    assert [repr(host).split(": ")[1] for host in hosts] == [
        f"{name}, because its class is nnsight's"
        for name in ("TransformersModel", "LanguageModel", "NNsight")
    ]
    assert all(host.name == "LlamaForCausalLM" for host in hosts)
    assert len({host.fingerprint for host in hosts}) == 1
    tokens, stores = [], []
    for host in hosts:
        with plan_for("llama", "generated").hooks(host.model):
            tokens.append(host.generate_tokens(TEXTS, max_new_tokens=3, stop_at_eos=False))
            stores.append(capture(host, TEXTS))
    want = [one.tokens for one in reference("llama", "generated")[:3]]
    assert tokens == [want, want, want]
    assert all(torch.equal(store[HOOK], stores[0][HOOK]) for store in stores)


def test_what_is_no_whole_language_model_is_refused(model: Any) -> None:
    with pytest.raises(
        HostError, match=r"'model\.model' is a part of an nnsight model; pass the whole model"
    ):
        as_host(model.model)
    with pytest.raises(HostError, match="wraps a Linear, which is no Hugging Face language model"):
        as_host(nnsight.NNsight(nn.Linear(2, 2)))
    other = fresh()
    other._edits = ()  # as in a version that keeps them elsewhere
    with pytest.raises(HostError, match="of this nnsight is not supported; wrap the model with"):
        as_host(other)
    plan = SteeringPlan.from_vectors(
        {"blocks.1.hook_resid_pots": torch.ones(32)}, relative_to="unit"
    )
    with pytest.raises(HookNameError, match="hook_resid_pots"):
        plan.attach(model)


# -- around and inside a trace --------------------------------------------------------------------


def test_a_trace_inside_the_block_reads_the_steered_stream(model: Any) -> None:
    plain = stream(model)
    with plan_for("llama", "last_prompt").hooks(model) as report:
        steered = stream(model)
        assert torch.equal(logits(model), logits(model))
    torch.testing.assert_close(steered[:, -1] - plain[:, -1], vector("llama")[None], **CLOSE)
    assert torch.equal(steered[:, :-1], plain[:, :-1])
    assert report.n_edited == {HOOK: 3}
    assert torch.equal(stream(model), plain)


def test_apply_is_hooks_said_inside_the_trace_and_counts_the_same(model: Any) -> None:
    plan = plan_for("llama", "generated")
    with plan.hooks(model):
        want, out = stream(model), logits(model)
    with torch.no_grad(), model.trace(input_ids=IDS):
        plan.apply(model)
        found = model.model.layers[1].output.clone().save()
        after = model.output.logits.save()
    assert torch.equal(found, want)
    assert torch.equal(after, out)
    assert plan.last_run is not None
    assert plan.last_run.n_edited == {HOOK: 1}
    assert torch.equal(logits(model), logits(model, IDS))


def test_apply_in_an_invoke_steers_its_own_rows(model: Any) -> None:
    plan = plan_for("llama", "last_prompt")
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(input_ids=IDS):
            plain = model.model.layers[1].output.clone().save()
        with tracer.invoke(input_ids=IDS):
            plan.apply(model)
            steered = model.model.layers[1].output.clone().save()
    difference = steered - plain
    torch.testing.assert_close(difference[0, -1], vector("llama"), **CLOSE)
    assert difference[0, :-1].abs().max() < 1e-4
    assert plan.last_run is not None
    assert plan.last_run.n_edited == {HOOK: 1}


def test_apply_in_a_generation_steers_every_step_said_once_or_in_the_loop(model: Any) -> None:
    plan, want = plan_for("llama", "generated"), reference("llama", "generated")[0]
    ids = torch.tensor([prompt_ids()[0]])
    with model.generate(input_ids=ids, **GENERATE) as tracer:
        plan.apply(model)
        out = tracer.result.save()
    assert out[0, -N_NEW:].tolist() == want.tokens
    with model.generate(input_ids=ids, **GENERATE) as tracer:
        seen = nnsight.save([])
        for _ in tracer.iter[:N_NEW]:
            plan.apply(model)
            seen.append(model.lm_head.output[0, -1].argmax())
    assert [int(token) for token in seen] == want.tokens
    assert plan.last_run is not None
    assert plan.last_run.n_edited == n_edited([want], cached=True)


def test_apply_too_late_outside_of_a_trace_and_without_effect_is_an_error(model: Any) -> None:
    plan = plan_for("llama", "all")
    with pytest.raises(
        HostError, match=r"apply\(model\) was called outside of a trace; call it first thing inside"
    ):
        plan.apply(model)

    def late() -> None:
        with model.trace(input_ids=IDS):
            _ = model.model.layers[0].output.save()
            plan.apply(model)

    with pytest.raises(InterventionError, match="was called after the model began to run"):
        late()

    def nowhere() -> None:
        with model.trace(input_ids=IDS):
            plan.with_positions(50).apply(model)

    with pytest.raises(InterventionError, match="positions=50 selected no token"):
        nowhere()


def test_sessions_are_steered_from_outside_and_trace_by_trace(model: Any) -> None:
    plan, plain = plan_for("llama", "all"), logits(model)
    with plan.hooks(model) as report, torch.no_grad(), model.session():
        with model.trace(input_ids=IDS):
            first = model.output.logits.save()
        with model.trace(input_ids=IDS):
            second = model.output.logits.save()
    assert report.n_edited == {HOOK: 12}
    assert torch.equal(first, second)
    with torch.no_grad(), model.session():
        with model.trace(input_ids=IDS):
            plan.apply(model)
            steered = model.output.logits.save()
        with model.trace(input_ids=IDS):
            after = model.output.logits.save()
    assert torch.equal(steered, first)
    assert torch.equal(after, plain)


def test_calls_of_the_wrapped_module_and_scans_are_no_obstacle(model: Any) -> None:
    plan, module = plan_for("llama", "generated"), model._module
    ids = torch.tensor([prompt_ids()[0]])
    with plan.hooks(model) as report:
        out = module.generate(ids, **GENERATE)  # nobody asked nnsight
        with model.scan(input_ids=IDS):
            shape = nnsight.save(tuple(model.model.layers[1].output.shape))
    assert out[0, -N_NEW:].tolist() == reference("llama", "generated")[0].tokens
    assert shape == (1, 6, 32)
    assert report.n_edited == n_edited(reference("llama", "generated")[:1], cached=True)


def test_a_users_own_intervention_comes_after_steering(model: Any) -> None:
    with plan_for("llama", "all").hooks(model):
        want = stream(model)
        with torch.no_grad(), model.trace(input_ids=IDS):
            model.model.layers[1].output = 2 * model.model.layers[1].output
            doubled = model.model.layers[2].input.clone().save()
    torch.testing.assert_close(doubled, 2 * want, **CLOSE)


# -- edits ----------------------------------------------------------------------------------------


def test_an_edit_steers_every_later_run_until_exactly_it_is_removed() -> None:
    model = fresh()
    plain = logits(model)
    with model.edit(inplace=True):
        model.model.layers[0].output = 1.5 * model.model.layers[0].output
    own, users = logits(model), list(model._edits)
    handle = plan_for("llama", "generated").edit(model)
    steered = logits(model)
    with plan_for("llama", "generated").hooks(model):
        twice = logits(model)
    assert torch.equal(logits(model), steered)
    other = plan_for("llama", 0).edit(model)
    handle.remove()
    handle.remove()
    assert model._edits == [*users, other._edit]
    other.remove()
    assert model._edits == users
    assert torch.equal(logits(model), own)
    assert len({float(x.sum()) for x in (plain, own, steered, twice)}) == 4
    again = plan_for("llama", "generated").edit(model)
    model.clear_edits()
    again.remove()  # nothing happens
    assert torch.equal(logits(model), plain)


def test_what_an_edit_cannot_hold_is_refused(model: Any) -> None:
    plan = plan_for("llama", "all")
    gated = SteeringPlan.from_vectors(
        {HOOK: vector("llama")},
        relative_to="unit",
        gate=Gate(direction=vector("llama"), threshold=0.0),
    )
    with pytest.raises(HostError, match=r"an nnsight edit cannot hold gates; use plan.hooks"):
        gated.edit(model)
    with pytest.raises(
        HostError, match=r"edit makes an nnsight edit; on huggingface use `handle = plan.attach"
    ):
        plan.edit(models.hf("llama"))
    ids, _ = padded(prompt_ids()[:2], "left")
    handle = plan_for("llama", -1).edit(model)
    with pytest.raises(DataError, match="does not say which tokens of the batch are padding"):
        logits(model, ids, attention_mask=torch.zeros(2, 1, 10, 10))
    with pytest.raises(
        InterventionError, match=r"several tokens on top of a cache.*pass prompt_lengths="
    ):
        model.generate(input_ids=IDS, prefill_chunk_size=2, **GENERATE)
    handle.remove()
    handle = plan_for("llama", -7).edit(model)
    with pytest.raises(DataError, match="position -7 is before the first token of row 0"):
        logits(model)
    handle.remove()


def test_a_prompt_in_chunks_is_followed_by_hooks_and_refused_by_apply(model: Any) -> None:
    plan, want = plan_for("llama", "last_prompt"), reference("llama", "last_prompt")[0]
    ids = torch.tensor([prompt_ids()[0]])
    with plan.hooks(model):
        out = model.generate(input_ids=ids, prefill_chunk_size=2, **GENERATE)
    assert out[0, -N_NEW:].tolist() == want.tokens

    def applied() -> None:
        with model.generate(input_ids=ids, prefill_chunk_size=2, **GENERATE):
            plan.apply(model)

    with pytest.raises(
        InterventionError, match=r"several tokens on top of a cache.*pass prompt_lengths="
    ):
        applied()
    with model.generate(input_ids=ids, prefill_chunk_size=2, **GENERATE) as tracer:
        plan.apply(model, prompt_lengths=ids.shape[1])
        out = tracer.result.save()
    assert out[0, -N_NEW:].tolist() == want.tokens


def test_edits_removed_by_the_user_are_an_error_on_the_next_run(model: Any) -> None:
    def cleared() -> None:
        with plan_for("llama", "all").hooks(model):
            logits(model)
            model.clear_edits()
            logits(model)
            raise AssertionError("the second run should not have happened")

    with pytest.raises(
        InterventionError,
        match=r"\['blocks.1.hook_resid_post'\] was removed while it was on .*clear_edits",
    ):
        cleared()


# -- elsewhere ------------------------------------------------------------------------------------


def test_a_remote_model_is_measured_captured_and_generated_from_as_a_local_one(model: Any) -> None:
    here, there = as_host(model), as_host(model, remote="local")
    assert (there.basis, there.fingerprint) == (here.basis, here.fingerprint)
    for positions in ("last", "mean", "all", 1):
        mine, theirs = (capture(host, TEXTS, positions=positions) for host in (here, there))
        for name in mine:
            torch.testing.assert_close(theirs[name], mine[name], atol=1e-6, rtol=0)
    assert there.generate_tokens(TEXTS, max_new_tokens=3) == here.generate_tokens(
        TEXTS, max_new_tokens=3
    )
    with pytest.raises(
        HostError,
        match=r"a remote model cannot be watched from here; steer it with `handle = plan.edit",
    ):
        plan_for("llama", "all").attach(there)
    with pytest.raises(ArgumentError, match="remote cannot be given"):
        as_host(models.hf("llama"), remote="local")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", ["edit", "attach"])
def test_a_scan_is_no_obstacle_to_what_stays_on_the_model(model: Any, way: str, rule: str) -> None:
    """A scan runs the model on tensors without values: nothing can be placed or edited in it, and
    nothing has to be."""
    handle = getattr(plan_for("llama", RULES[rule][0]), way)(model)
    steered = logits(model)
    with model.scan(input_ids=IDS):
        shape = nnsight.save(tuple(model.model.layers[1].output.shape))
    assert shape == (1, 6, 32)
    assert torch.equal(logits(model), steered)
    handle.remove()


def test_a_remote_run_under_hooks_is_refused_in_words(model: Any) -> None:
    def sent() -> None:
        with (
            plan_for("llama", "all").hooks(model),
            torch.no_grad(),
            model.trace(input_ids=IDS, remote="local"),
        ):
            model.output.logits.save()

    plain = logits(model)
    with pytest.raises(
        InterventionError,
        match=r"stays on this machine .*; use `handle = plan\.edit\(as_host\(model, remote",
    ):
        sent()
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("rule", RULES)
def test_an_edit_travels_and_steers_there_as_it_does_here(model: Any, rule: str) -> None:
    want = reference("llama", rule)[1]
    ids = torch.tensor([prompt_ids()[1]])
    handle = plan_for("llama", RULES[rule][0]).edit(as_host(model, remote="local"))
    with model.generate(input_ids=ids, remote="local", **GENERATE) as tracer:
        out = tracer.result.save()
    with torch.no_grad(), model.trace(input_ids=ids, remote="local"):
        first = model.output.logits[0, -1].save()
    handle.remove()
    assert out[0, -N_NEW:].tolist() == want.tokens
    torch.testing.assert_close(first.log_softmax(-1), want.rows[0], **CLOSE)


SERVER = """
import sys, torch

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("expertsteer_lens", "jaxtyping", "reference", "models"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from nnsight import TransformersModel
from nnsight.schema.request import RequestModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
model = TransformersModel(hf, tokenizer=AutoTokenizer.from_pretrained(folder))
persistent = model._remoteable_persistent_objects()
tracer = RequestModel.deserialize(open(folder + "/request", "rb").read(), persistent)
with torch.no_grad():
    tracer.execute(tracer.info.code)
assert not any(name.startswith("expertsteer") for name in sys.modules)
torch.save(tracer.info.frame.f_locals["kept"][0], folder + "/result")
"""


class Posted:
    """An nnsight backend that writes the request instead of sending it."""

    def __init__(self, file: pathlib.Path) -> None:
        self.file = file

    def __call__(self, tracer: Any) -> None:
        from nnsight.schema.request import RequestModel

        self.file.write_bytes(RequestModel.serialize(tracer))


def test_a_process_without_this_package_runs_the_edit(tmp_path: pathlib.Path) -> None:
    model, plan = fresh(), plan_for("llama", [0, -1])
    model._module.save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    plain = logits(model)
    handle = plan.edit(model)
    want = logits(model)
    kept: list[Tensor] = []
    with model.trace(input_ids=IDS, backend=Posted(tmp_path / "request")):
        kept.append(model.output.logits)
    handle.remove()
    assert kept == []  # nothing ran here
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    there = torch.load(tmp_path / "result")
    torch.testing.assert_close(there, want, **CLOSE)
    assert (want - plain).abs().max() > 0.1


def test_weights_that_only_a_server_has_are_not_loaded_to_look_at_them(
    tmp_path: pathlib.Path,
) -> None:
    models.hf("llama", size=SIZE).save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)

    def unloaded() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"task": "text-generation", "tokenizer": models.tokenizer()}
            return nnsight.TransformersModel(str(tmp_path), attn_implementation="eager", **options)

    model, plan = unloaded(), plan_for("llama", "all")
    assert as_host(model).name == tmp_path.name
    with pytest.raises(
        ModelStateError, match=r"weights of .* are not loaded here.*call\s+model.dispatch\(\)"
    ):
        plan.edit(model)
    assert not model.dispatched
    there, here = capture(as_host(unloaded(), remote="local"), TEXTS), capture(fresh(), TEXTS)
    assert all(torch.equal(there[name], here[name]) for name in here)
    based = SteeringPlan(vectors=plan.vectors, basis="raw")
    handle = based.edit(model)
    assert not model.dispatched
    steered = logits(model)  # the first run that is not remote loads them
    handle.remove()
    with plan.hooks(model):
        torch.testing.assert_close(logits(model), steered, **CLOSE)
    other = unloaded()
    with plan.hooks(other) as report:
        logits(other)
    assert report.n_edited == {HOOK: 6}


def test_padding_without_a_mask_is_refused_in_a_trace(model: Any) -> None:
    ids, mask = padded(prompt_ids()[:2], "left")
    plan = plan_for("llama", "last_prompt")
    with plan.hooks(model) as report:
        logits(model, ids, attention_mask=mask)
    assert report.n_edited == {HOOK: 2}

    def opaque() -> None:
        with model.trace(input_ids=ids, attention_mask=torch.zeros(2, 1, 10, 10)):
            plan.apply(model)

    with pytest.raises(DataError, match="does not say which tokens of the batch are padding"):
        opaque()
