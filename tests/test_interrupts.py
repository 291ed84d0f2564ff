"""Whatever ends a steered block, on every host: no hook of ours is left, and weights and outputs
are bit for bit as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import models
import pytest
import torch
from reference import HOOK, SIZE, plan_for, prompt_ids
from torch import Tensor, nn

from expertsteer_lens.errors import InterventionError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.steer.plan import SteeringPlan

HOSTS = ("bridge", "bridge compat", "hooked", "hooked raw", "huggingface", "nnsight", "NNsight")
hosts = pytest.mark.parametrize("kind", HOSTS)
errors = pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
IDS = torch.tensor([[1, 4, 7, 19, 6, 8]])
LAST = "blocks.2.hook_resid_post"


def fresh(kind: str) -> Any:
    return models.on_host(kind, "gpt2", size=SIZE)


def run(model: Any) -> Tensor:
    kind = as_host(model).kind
    with torch.no_grad():
        if kind == "transformer_lens":
            return model(IDS, return_type="logits")
        return (
            model(IDS) if kind == "huggingface" else model.trace(input_ids=IDS, trace=False)
        ).logits


def generate(model: Any) -> Any:
    """Three steps of the model's own generation."""
    kind = as_host(model).kind
    if kind == "transformer_lens":
        return model.generate(
            IDS, max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False
        )
    options = models.greedy(3)
    if kind == "huggingface" or callable(getattr(type(model), "generate", None)):
        return model.generate(input_ids=IDS, **options)
    return model.trace(input_ids=IDS, fn="generate", trace=False, **options)


class State(NamedTuple):
    """Everything of a model that steering could leave changed."""

    hooks: list[int]
    edits: list[Any]
    patched: list[str]
    weights: list[Tensor]
    output: Tensor


def modules_of(model: Any) -> list[nn.Module]:
    roots = [
        m
        for m in (model, getattr(model, "original_model", None), getattr(model, "_module", None))
        if m is not None
    ]
    found = {id(m): m for root in roots if isinstance(root, nn.Module) for m in root.modules()}
    points = getattr(model, "hook_dict", {}) if as_host(model).kind == "transformer_lens" else {}
    found.update({id(m): m for m in points.values()})
    return list(found.values())


def state(model: Any) -> State:
    output = run(model)  # a Bridge puts permanent hooks of its own on when it is first run
    everything = modules_of(model)
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "fwd_hooks", "bwd_hooks")
    names = ("generate", "hf_generate", "generate_stream", "forward")
    return State(
        hooks=[len(getattr(m, kind, ())) for m in everything for kind in kinds],
        edits=list(getattr(model, "_edits", [])) if hasattr(model, "_module") else [],
        patched=[
            f"{type(m).__name__}.{name}" for m in everything for name in names if name in m.__dict__
        ],
        weights=[
            p.detach().clone() for m in everything for p in m._parameters.values() if p is not None
        ],
        output=output,
    )


def assert_same(before: State, after: State) -> None:
    assert after.hooks == before.hooks
    assert after.edits == before.edits
    assert after.patched == before.patched
    assert all(torch.equal(x, y) for x, y in zip(before.weights, after.weights, strict=True))
    assert torch.equal(after.output, before.output)


def plan() -> SteeringPlan:
    both = plan_for("gpt2", "generated").vectors[0]
    late = SteeringPlan.from_vectors(
        {LAST: both.direction}, coefficient=2.0, relative_to="unit"
    ).vectors
    return SteeringPlan(vectors=(both, *late), positions="generated")


def raising_at(model: Any, error: type[BaseException], *, after: int = 0) -> Any:
    """A torch hook of somebody else, in the last block, that raises at the pass after `after`
    others."""
    passes = [0]

    def hook(*_: Any) -> None:
        passes[0] += 1
        if passes[0] > after:
            raise error("mine")

    host = as_host(model)
    block = (
        model.blocks[2]
        if host.kind == "transformer_lens"
        else getattr(model, "_module", model).get_submodule("transformer.h.2")
    )
    return block.register_forward_hook(hook)


@pytest.mark.parametrize("kind", ["bridge", "huggingface", "nnsight"])
def test_the_comparison_sees_a_hook_a_patch_an_edit_and_a_weight(kind: str) -> None:
    model = fresh(kind)
    before = state(model)
    assert_same(before, state(model))
    handle = plan().attach(model)
    with pytest.raises(AssertionError):
        assert_same(before._replace(output=run(model)), state(model))
    handle.remove()
    assert_same(before, state(model))
    with torch.no_grad():
        next(p for m in modules_of(model) for p in m._parameters.values() if p is not None).add_(
            1e-3
        )
    with pytest.raises(AssertionError):
        assert_same(before, state(model))


@errors
@hosts
def test_an_exception_in_the_block(kind: str, error: type[BaseException]) -> None:
    model = fresh(kind)
    before = state(model)

    def fails() -> None:
        with plan().hooks(model):
            assert not torch.equal(run(model), before.output)
            raise error("mine")

    with pytest.raises(error, match="mine"):
        fails()
    assert_same(before, state(model))


@errors
@pytest.mark.parametrize("what", [run, generate], ids=["pass", "generation"])
@hosts
def test_an_exception_in_the_middle_of_a_pass_or_a_generation(
    kind: str, what: Callable[[Any], Any], error: type[BaseException]
) -> None:
    model = fresh(kind)
    before = state(model)
    handle = raising_at(model, error, after=1 if what is generate else 0)
    with pytest.raises(error, match="mine"):
        with plan().hooks(model):
            what(model)
    handle.remove()
    assert_same(before, state(model))
    with plan().hooks(model) as report:  # and the model can be steered again
        generate(model)
    assert report.n_edited == {HOOK: 3, LAST: 3}


@hosts
def test_after_an_interrupted_generation_the_next_pass_starts_a_new_sequence(kind: str) -> None:
    model = fresh(kind)
    run(model)
    handle = plan_for("gpt2", "last_prompt").attach(model)
    breaker = raising_at(model, KeyboardInterrupt, after=1)
    with pytest.raises(KeyboardInterrupt):
        generate(model)
    breaker.remove()
    counted = handle.report.n_edited[HOOK]
    run(model)
    run(model)
    assert handle.report.n_edited[HOOK] == counted + 2
    handle.remove()


@errors
@hosts
def test_an_exception_in_a_score_that_a_gate_asks_for(
    kind: str, error: type[BaseException]
) -> None:
    """Code that steering itself calls in the middle of a pass."""
    from expertsteer_lens.interventions.gates import Gate

    def score(rows: Tensor) -> Tensor:
        raise error("mine")

    model = fresh(kind)
    before = state(model)
    vector = plan_for("gpt2", "all").vectors[0]
    gated = SteeringPlan.from_vectors(
        {HOOK: vector.direction}, relative_to="unit", gate=Gate(score=score, threshold=0.0)
    )
    with pytest.raises(error, match="mine"):
        with gated.hooks(model):
            run(model)
    assert_same(before, state(model))


@hosts
def test_hooks_that_cannot_all_be_put_on_are_taken_off_again(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steering is put on in several steps; whichever fails, the earlier ones are undone."""
    model = fresh(kind)
    before = state(model)
    host = as_host(model)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room")

    if host.kind == "transformer_lens":
        target: tuple[Any, str] = (model.hook_dict[LAST], "add_hook")
    else:
        target = (
            getattr(model, "_module", model).get_submodule("transformer.h.2"),
            "register_forward_hook",
        )
    for obj, name in (target, (type(host), "watch")):
        with monkeypatch.context() as patch:
            patch.setitem(obj.__dict__, name, refuse) if isinstance(
                obj, nn.Module
            ) else patch.setattr(obj, name, refuse)
            with pytest.raises(RuntimeError, match="no room"):
                plan().attach(model)
        assert_same(before, state(model))


@pytest.mark.parametrize("kind", ["bridge", "bridge compat", "hooked", "hooked raw"])
def test_reset_hooks_makes_the_next_pass_an_error_before_anything_runs(kind: str) -> None:
    model = fresh(kind)
    before = state(model)
    handle = plan().attach(model)
    assert not torch.equal(run(model), before.output)
    model.reset_hooks()
    reached: list[int] = []
    model.hook_dict["blocks.0.hook_resid_post"].add_hook(lambda x, hook: reached.append(1))
    for what in (run, generate):
        with pytest.raises(
            InterventionError,
            match=rf"steering at \['{HOOK}', '{LAST}'\] was removed while it was on",
        ):
            what(model)
    assert reached == []  # nothing half steered
    handle.remove()
    model.reset_hooks()
    assert_same(before, state(model))


def test_one_lost_hook_of_two_is_an_error_too() -> None:
    model = fresh("bridge")
    handle = plan().attach(model)
    model.hook_dict[LAST].remove_hooks("fwd")
    with pytest.raises(InterventionError, match=rf"steering at \['{LAST}'\] was removed"):
        run(model)
    handle.remove()


@errors
def test_an_exception_in_the_body_of_a_trace(error: type[BaseException]) -> None:
    model = fresh("nnsight")
    before = state(model)

    def fails() -> None:
        with model.trace(input_ids=IDS):
            plan().apply(model)
            _ = model.transformer.h[0].output.save()
            raise error("mine")

    with pytest.raises(error, match="mine"):
        fails()
    assert_same(before, state(model))
    handle = plan().edit(model)
    steered = run(model)
    with pytest.raises(error, match="mine"):
        fails()
    assert torch.equal(run(model), steered)  # an edit stays until it is removed
    handle.remove()
    assert_same(before, state(model))


def test_a_stream_that_is_not_read_to_its_end_ends_its_generation() -> None:
    model = fresh("bridge")
    if not callable(getattr(type(model), "generate_stream", None)):
        pytest.skip("this TransformerLens has no generate_stream")
    before = state(model)
    options = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with plan_for("gpt2", "last_prompt").hooks(model) as report:
        stream = model.generate_stream(torch.tensor([prompt_ids()[0]]), **options)
        next(stream)
        stream.close()
        run(model)
        run(model)
    assert report.n_edited == {HOOK: 3}
    assert_same(before, state(model))
