"""The ways to run a model that `test_ways_to_run` tries on Hugging Face, on every other host where
they exist: exact, or refused."""

from __future__ import annotations

import copy
import gc
import pathlib
import threading
import types
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import models
import pytest
import torch
from test_interrupts import modules_of
from test_ways_to_run import (
    GREEDY,
    HOOK,
    PROMPTS,
    WRITES,
    alone,
    in_threads,
    llama,
    packed,
    plan_at,
    rules,
    run,
)

import expertsteer_lens as esl
from expertsteer_lens.errors import ArtifactError, InterventionError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.steer import detach
from expertsteer_lens.steer.plan import SteeringPlan

OTHERS = ("bridge", "hooked", "nnsight")
INSIDE = ("bridge", "nnsight")
"""Hosts with a model of transformers inside, whose own `generate` may be called."""
others = pytest.mark.parametrize("kind", OTHERS)
around = pytest.mark.parametrize("kind", INSIDE)


def fresh(kind: str) -> Any:
    return (
        models.on_host("hooked raw", "gpt2") if kind == "hooked" else models.on_host(kind, "llama")
    )


def inside(model: Any) -> Any:
    """The module of transformers in it."""
    return getattr(model, "original_model", None) or model._module


def generated(model: Any, ids: list[int], **options: Any) -> list[int]:
    """By the host's own `generate`."""
    row = torch.tensor([ids])
    if as_host(model).kind == "nnsight":
        out = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **GREEDY)
    else:
        out = model.generate(
            row, max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False
        )
    return out[0, len(ids) :].tolist()


def answers(model: Any, plan: SteeringPlan | None) -> list[list[int]]:
    out = []
    for ids in PROMPTS:
        with nullcontext() if plan is None else plan.hooks(model):
            out.append(generated(model, ids))
    return out


# -- guidance, packed rows ------------------------------------------------------------------------


@around
@rules
@pytest.mark.parametrize("negative", [[1, 30, 31], [1, 5, 6, 7, 8, 9]])
def test_guidance(kind: str, rule: Any, negative: list[int]) -> None:
    """Held to Hugging Face, where `test_ways_to_run` holds it to passes of each sequence alone."""

    def guided(model: Any, module: Any) -> list[int]:
        with plan_at(rule).hooks(model):
            out = module.generate(
                torch.tensor([PROMPTS[0]]),
                negative_prompt_ids=torch.tensor([negative]),
                guidance_scale=5.0,
                **GREEDY,
            )
        return out[0, len(PROMPTS[0]) :].tolist()

    model, plain = fresh(kind), llama()
    assert guided(model, inside(model)) == guided(plain, plain)


def test_continuous_batching_on_nnsight_is_that_of_hugging_face() -> None:
    model, plan = fresh("nnsight"), plan_at([0, 3])
    assert packed(inside(model), plan, model) == alone(llama(), plan)
    with pytest.raises(InterventionError, match="made of several sequences"):
        packed(inside(model), plan_at("generated"), model)


@pytest.mark.parametrize("rule", ["all", [0, 3]], ids=str)
def test_continuous_batching_on_a_bridge_is_refused(rule: Any) -> None:
    """Its attention mixes the requests, without steering too."""
    model = fresh("bridge")
    assert packed(inside(model), None, model) != alone(inside(model), None)
    with pytest.raises(InterventionError, match="takes the several requests of a row for one"):
        packed(inside(model), plan_at(rule), model)


# -- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_plain_and_steered_requests_by_the_hosts_own_generate(kind: str) -> None:
    model = fresh(kind)
    plans = [None, plan_at("generated", size=9.0), plan_at("last_prompt", size=-9.0)]
    want = [answers(model, plan) for plan in plans]
    assert want[0] != want[1] != want[2]
    for _ in range(3):
        assert in_threads(*(lambda p=p: answers(model, p) for p in plans)) == want
    assert not RUNS & (model.__dict__.keys() | getattr(model, "original_model", model).__dict__)


RUNS = {"forward", "generate", "generate_stream", "hf_generate"}
"""Methods that a Bridge has on itself only while turns are kept."""


def begun_within(model: Any, first: Any, second: Any, *, part: Any) -> list[Any]:
    """What both return, where another thread begins `second` after the first pass of `first`, which
    goes on (and ends, if it can) once `second` has come to `part` of the model."""
    began, came, ended, found = threading.Event(), threading.Event(), threading.Event(), []

    def go_on() -> None:
        assert began.wait(60)
        found.append(second())
        came.set()

    def after_pass(*_: Any) -> None:
        if threading.current_thread() is here and not began.is_set():
            began.set()
            came.wait(2)  # where it has to wait for its turn it does not come there

    def at_part(*_: Any) -> None:
        if threading.current_thread() is thread and not came.is_set():
            came.set()
            ended.wait(2)

    here, thread = threading.current_thread(), threading.Thread(target=go_on)
    # A HookedTransformer calls no hooks of its own.
    whole = model if hasattr(model, "original_model") else model.unembed
    handles = [m.register_forward_hook(h) for m, h in ((whole, after_pass), (part, at_part))]
    thread.start()
    found_first = first()
    ended.set()
    thread.join(60)
    for handle in handles:
        handle.remove()
    return [found_first, *found]


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("plain", "steered"),
        ("plain", "read"),
        ("steered", "plain"),
        ("steered", "stream"),
        ("attached", "measured"),
    ],
)
def test_a_run_that_begins_in_the_middle_of_another_threads(
    kind: str, first: str, second: str
) -> None:
    """A Bridge keeps the cache of its generate, and the layer to stop at, on the model: runs of
    several threads take turns, also with a plain run that began before anybody steered."""
    model, plan, other = fresh(kind), plan_at("generated", size=9.0), plan_at("prompt", size=-9.0)

    def work(kind_of_run: str, ids: list[int], plan: SteeringPlan) -> Any:
        if kind_of_run == "read":
            return esl.capture(model, ["cat saw", "sun"], [HOOK])[HOOK].tolist()
        if kind_of_run == "measured":
            with torch.no_grad():
                next(model.parameters()).add_(0.0)  # written to, so it is measured anew
            return as_host(model).fingerprint
        with plan.hooks(model) if kind_of_run in ("steered", "stream") else nullcontext():
            if kind_of_run == "stream":
                options = {"do_sample": False, "stop_at_eos": False, "verbose": False}
                steps = model.generate_stream(
                    torch.tensor([ids]), 6, return_type="tokens", max_tokens_per_yield=2, **options
                )
                return [step.tolist() for step in steps]
            return generated(model, ids)

    def in_the_middle() -> Any:
        return work(second, PROMPTS[1], other)

    def run_first() -> Any:
        return work(first, PROMPTS[0], plan)

    handle = plan.attach(model) if first == "attached" else None
    want = [run_first(), in_the_middle()]
    whole = model if kind == "bridge" else model.unembed
    part = model.embed if second in ("read", "measured") else whole
    assert begun_within(model, run_first, in_the_middle, part=part) == want
    if handle is not None:
        handle.remove()
    assert not RUNS & (model.__dict__.keys() | getattr(model, "original_model", model).__dict__)


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_an_attached_plan_steers_every_thread(kind: str) -> None:
    model, plan = fresh(kind), plan_at("generated", size=9.0)
    want = answers(model, plan)
    handle = plan.attach(model)
    works = [lambda i=ids: [generated(model, i) for _ in range(3)] for ids in PROMPTS]
    found = in_threads(*works)
    handle.remove()
    assert found == [[tokens] * 3 for tokens in want]


def test_the_module_inside_nnsight_may_be_run_by_several_threads() -> None:
    model = fresh("nnsight")
    plans = [None, plan_at("generated", size=9.0), plan_at("last_prompt", size=-9.0)]

    def work(plan: SteeringPlan | None) -> list[list[int]]:
        out = []
        for ids in PROMPTS:
            with nullcontext() if plan is None else plan.hooks(model):
                out.append(run(inside(model), ids))
        return out

    want = [alone(llama(), plan) for plan in plans]
    for _ in range(3):
        assert in_threads(*(lambda p=p: work(p) for p in plans)) == want


@pytest.mark.parametrize("rule", ["all", "generated"])
def test_a_run_of_nnsight_by_another_thread_is_plain(rule: str) -> None:
    model, plan = fresh("nnsight"), plan_at(rule)
    plain, steered = generated(model, PROMPTS[0]), answers(model, plan)[0]
    ready, done, found = threading.Event(), threading.Event(), []

    def other() -> None:
        ready.wait()
        found.append(generated(model, PROMPTS[0]))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with plan.hooks(model):
        ready.set()
        assert done.wait(60)
        assert generated(model, PROMPTS[0]) == steered != plain
    thread.join()
    assert found == [plain]


@pytest.mark.parametrize("way", ["hooks", "edit"])
def test_runs_of_nnsight_by_several_threads_are_exact_or_refused(way: str) -> None:
    model = fresh("nnsight")
    steered = plan_at("generated", size=9.0)
    plans = [None, steered, None if way == "edit" else plan_at("all", size=-9.0)]
    want = [answers(model, plan)[0] for plan in plans]
    if way == "edit":
        handle = steered.edit(model)
        plans, want = [None] * 3, [want[1]] * 3

    def one(plan: SteeringPlan | None) -> Any:
        try:
            return answers(model, plan)[0]
        except InterventionError as error:
            # Of a plan's own block: or that it never fired, where another's run took its passes.
            said = ("another thread is in a run of nnsight", "never fired")
            return "refused" if any(words in str(error) for words in said) else error

    for _ in range(8 if way == "edit" else 1):  # under hooks about one round in a hundred is wrong
        found = in_threads(*(lambda p=p: one(p) for p in plans))
        assert all(f in ("refused", w) for f, w in zip(found, want, strict=True)), found
    assert [one(plan) for plan in plans] == want
    if way == "edit":
        handle.remove()
        assert answers(model, None)[0] != want[0]
    assert "interleave" not in model.__dict__


@pytest.mark.parametrize("way", ["hooks", "edit"])
def test_a_run_of_nnsight_whose_places_another_pass_has_visited_is_refused(way: str) -> None:
    """nnsight counts the visits of every thread; one that is not its own makes a run wait for a
    visit that is over, and it would go on unsteered."""
    model, plan = fresh("nnsight"), plan_at("generated", size=9.0)
    want, passes = answers(model, plan)[0], []

    def another(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 2:
            counts = model.interleaver.counts
            counts.update({place: n + 1 for place, n in counts.items()})

    steering = plan.edit(model) if way == "edit" else plan.attach(model)
    hook = inside(model).get_input_embeddings().register_forward_hook(another)
    with pytest.raises(InterventionError, match="another thread is in a run of nnsight"):
        generated(model, PROMPTS[0])
    hook.remove()
    assert generated(model, PROMPTS[0]) == want  # the next run is its own again
    steering.remove()


@pytest.mark.parametrize("first_is_steered", [True, False])
def test_a_run_of_nnsight_in_the_middle_of_another_threads(first_is_steered: bool) -> None:
    model, plan = fresh("nnsight"), plan_at("generated", size=9.0)
    plain, steered = answers(model, None)[0], answers(model, plan)[0]
    began, go_on, found = threading.Event(), threading.Event(), []

    def wait(*_: Any) -> None:
        if threading.current_thread() is first and not began.is_set():
            began.set()
            assert go_on.wait(60)

    def work() -> None:
        with plan.hooks(model) if first_is_steered else nullcontext():
            out = model.generate(input_ids=torch.tensor([PROMPTS[0]]), **GREEDY)
            found.append(out[0, len(PROMPTS[0]) :].tolist())

    handle = inside(model).model.layers[0].register_forward_pre_hook(wait)
    first = threading.Thread(target=work)
    first.start()
    assert began.wait(60)
    for generate in (generated, lambda model, ids: run(inside(model), ids)):
        if first_is_steered:
            with pytest.raises(InterventionError, match="another thread is in a run of nnsight"):
                generate(model, PROMPTS[0])
        else:
            with plan.hooks(model):
                assert generate(model, PROMPTS[0]) == steered
    go_on.set()
    first.join()
    handle.remove()
    assert found == [steered if first_is_steered else plain]


def test_a_run_of_nnsight_that_is_about_to_begin_in_another_thread_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A plain run that began before anybody steered, and has not come to its first pass."""
    model, plan = fresh("nnsight"), plan_at("generated", size=9.0)
    plain, steered = answers(model, None)[0], answers(model, plan)[0]
    began, go_on, found = threading.Event(), threading.Event(), []
    device = type(model).device

    def held_up(self: Any) -> Any:
        if threading.current_thread() is first and not began.is_set():
            began.set()
            assert go_on.wait(60)
        return device.fget(self)

    monkeypatch.setattr(type(model), "device", property(held_up))
    first = threading.Thread(target=lambda: found.append(generated(model, PROMPTS[0])))
    first.start()
    assert began.wait(60)
    try:
        with pytest.raises(InterventionError, match="another thread is in a run of nnsight"):
            answers(model, plan)
    finally:
        go_on.set()
        first.join()
    assert found == [plain]
    assert answers(model, plan)[0] == steered


# -- compiled -------------------------------------------------------------------------------------


@pytest.fixture
def _dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("way", ["torch.compile", "compile method"])
@others
def test_a_model_compiled_and_run_before(kind: str, way: str) -> None:
    model, plan, ids = fresh(kind), plan_at(), torch.tensor([PROMPTS[0]])
    module = inside(model) if kind == "nnsight" else model
    with plan.hooks(model), torch.no_grad():
        want = logits_of(module(ids))
    compiled: Any = module
    if way == "torch.compile":
        compiled = torch.compile(module, backend="eager")
    else:
        module.compile(backend="eager")
    with torch.no_grad():
        plain = logits_of(compiled(ids))
        handle = plan.attach(model)
        assert torch.allclose(logits_of(compiled(ids)), want, atol=1e-6)
        handle.remove()
        assert torch.allclose(logits_of(compiled(ids)), plain, atol=1e-6)
    assert not torch.allclose(plain, want, atol=0.1)


@pytest.mark.usefixtures("_dynamo")
@around
def test_a_static_cache_that_compiled_its_step_by_itself(kind: str) -> None:
    from transformers import CompileConfig

    model, plan = fresh(kind), plan_at("generated")
    want = alone(llama(), plan)[0]
    compiling = CompileConfig(backend="eager")
    compiling._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiling}
    plain = run(inside(model), PROMPTS[0], **options)
    with plan.hooks(model) as report:
        assert run(inside(model), PROMPTS[0], **options) == want != plain
    assert report.n_forwards == GREEDY["max_new_tokens"]


# -- attached, changed, copied, moved -------------------------------------------------------------


@others
def test_a_plan_whose_handle_is_dropped_goes_on_steering(kind: str) -> None:
    model, plan = fresh(kind), plan_at()
    want = answers(model, plan)[0]
    plan.attach(model)
    gc.collect()
    assert generated(model, PROMPTS[0]) == want
    detach(model)
    assert generated(model, PROMPTS[0]) != want


@others
@pytest.mark.parametrize("way", WRITES)
def test_weights_written_to_behind_the_version_counter(kind: str, way: str) -> None:
    model = fresh(kind)
    plan = SteeringPlan(plan_at().vectors, target={"fingerprint": as_host(model).fingerprint})
    with plan.hooks(model):
        generated(model, PROMPTS[0])
    for module in modules_of(model):
        for parameter in module.parameters(recurse=False):
            WRITES[way](parameter)
    with pytest.raises(ArtifactError, match="was fitted on fingerprint"):
        plan.attach(model)


@others
def test_a_deep_copy_made_inside_the_block(kind: str) -> None:
    model, plan = fresh(kind), plan_at()
    plain = generated(model, PROMPTS[0])
    with plan.hooks(model) as report:
        steered = generated(model, PROMPTS[0])
        copied, seen = copy.deepcopy(model), report.n_forwards
        assert generated(copied, PROMPTS[0]) == plain != steered
        assert report.n_forwards == seen
        assert generated(model, PROMPTS[0]) == steered
    assert generated(copied, PROMPTS[0]) == plain
    if kind == "nnsight":  # whose copies no trace reaches, of whoever
        with pytest.raises(InterventionError, match="never fired"), plan.hooks(copied):
            generated(copied, PROMPTS[0])
        return
    with plan.hooks(copied):
        assert generated(copied, PROMPTS[0]) == steered


def test_a_deep_copy_of_a_bridge_whose_generate_somebody_had_replaced() -> None:
    model, plan = models.bridge("llama"), plan_at()
    model.__dict__["generate"] = types.MethodType(type(model).generate, model)
    plain = generated(model, PROMPTS[0])
    with plan.hooks(model):
        assert generated(copy.deepcopy(model), PROMPTS[0]) == plain
        assert generated(model, PROMPTS[0]) != plain


def test_weights_that_are_brought_for_each_pass_of_a_bridge(tmp_path: pathlib.Path) -> None:
    """nnsight moves its inputs to where the first weight is, and cannot run such a model at all."""
    accelerate = pytest.importorskip("accelerate")
    if models.has_hooked_transformer():
        pytest.skip("a Bridge of TransformerLens 3.9 gives the head a bias that no disk holds")
    from transformer_lens.model_bridge import TransformerBridge

    module, plan = accelerate.disk_offload(models.hf("llama"), tmp_path), plan_at("generated")
    assert all(p.device.type == "meta" for p in module.parameters())
    model = TransformerBridge.boot_transformers(
        "tiny-llama", hf_model=module, tokenizer=models.tokenizer(), device="cpu"
    )
    whole, texts = llama(), ["the cat saw a dog", "sun"]
    want, got = (esl.capture(m, texts)["blocks.2.hook_resid_post"] for m in (whole, model))
    assert torch.equal(want, got)
    with plan.hooks(model):
        assert run(inside(model), PROMPTS[0]) == alone(whole, plan)[0]
