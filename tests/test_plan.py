"""Steering plans: what they hold, what they refuse, what they do to a model, and what they say if
they could not."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, replace
from typing import Any

import models
import pytest
import torch
from torch import Tensor

from expertsteer_lens.data.activations import ActivationStore
from expertsteer_lens.errors import (
    ArgumentError,
    ArtifactError,
    DataError,
    HookNameError,
    HostError,
    InterventionError,
    ModelStateError,
    WidthError,
)
from expertsteer_lens.hosts import as_host, capture
from expertsteer_lens.interventions import edits
from expertsteer_lens.interventions.edits import EDITS, Edit, register_edit
from expertsteer_lens.interventions.gates import Gate
from expertsteer_lens.measure.calibration import calibrate
from expertsteer_lens.steer import detach
from expertsteer_lens.steer.plan import SteeringPlan
from expertsteer_lens.steer.vector import SteeringVector

D = models.D_MODEL
HOOK, NEXT = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
IDS = torch.tensor([[1, 4, 7, 19, 6, 8], [1, 5, 9, 20, 7, 33]])
PROMPTS = ["the cat saw a dog", "once upon a time", "sun", "the dog ran home and the cat ran"]


@functools.cache
def model_of(family: str = "llama") -> Any:
    return models.bridge(family)


def direction(seed: int = 0, *, unit: bool = True) -> Tensor:
    v = torch.randn(D, generator=torch.Generator().manual_seed(seed))
    return v / v.norm() if unit else v


def vector(seed: int = 0, **options: Any) -> SteeringVector:
    fields: dict[str, Any] = {
        "hook_name": HOOK,
        "coefficient": 4.0,
        "relative_to": "unit",
        "parameters": models.edit_parameters(options.get("edit", "add")),
        **options,
    }
    return SteeringVector(direction=direction(seed), **fields)


def plan_of(*vectors: SteeringVector, **options: Any) -> SteeringPlan:
    return SteeringPlan(vectors=vectors or (vector(),), **options)


def run(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, return_type="logits", **options)


def at(name: str, model: Any, ids: Tensor = IDS) -> Tensor:
    """The activation at a hook point, hooks installed so far included."""
    seen: list[Tensor] = []
    with as_host(model).intervene({name: lambda x: seen.append(x.clone())}):
        run(model, ids)
    return seen[0]


# -- data -----------------------------------------------------------------------------------------


def test_delta_is_coefficient_times_median_norm_times_direction() -> None:
    v = vector(coefficient=-0.5, relative_to="median_norm", median_norm=8.0)
    torch.testing.assert_close(v.delta, -4.0 * direction())
    torch.testing.assert_close(vector(coefficient=3.0).delta, 3.0 * direction())
    assert (v.scale, vector(coefficient=3.0).scale) == (-4.0, 3.0)


def test_a_vector_is_a_copy_and_cannot_be_changed() -> None:
    source = direction()
    v = SteeringVector(hook_name=HOOK, direction=source, coefficient=1.0, relative_to="unit")
    source.mul_(0.0)
    torch.testing.assert_close(v.direction, direction())
    assert v.direction.dtype == torch.float32
    with pytest.raises(FrozenInstanceError):
        v.coefficient = 2.0  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        plan_of().positions = "prompt"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"direction": 2 * direction()},
            ArgumentError,
            "must be a unit vector, got norm 2; SteeringPlan.from_vectors",
        ),
        (
            {"direction": torch.full((D,), torch.nan)},
            DataError,
            f"with {D} values that are NaN or Inf",
        ),
        (
            {"direction": torch.ones(2, D)},
            DataError,
            r"must be a finite vector \[d\], got shape \(2, 32\)",
        ),
        ({"coefficient": float("inf")}, ArgumentError, "coefficient must be a number"),
        ({"coefficient": "0.1"}, ArgumentError, "coefficient must be a number"),
        ({"relative_to": "norm"}, ArgumentError, "relative_to must be one of"),
        (
            {"relative_to": "median_norm"},
            ArgumentError,
            "needs median_norm; pass it, or relative_to='unit'",
        ),
        (
            {"relative_to": "median_norm", "median_norm": 0.0},
            ArgumentError,
            "median_norm must be a number",
        ),
        ({"edit": "ad"}, ArgumentError, "edit must be one of .*closest: 'add'"),
        (
            {"edit": "ablate", "relative_to": "median_norm", "median_norm": 1.0},
            ArgumentError,
            "takes a fraction",
        ),
        (
            {"edit": "rescale", "relative_to": "median_norm", "median_norm": 1.0},
            ArgumentError,
            "pass relative_to='unit'",
        ),
    ],
)
def test_a_bad_vector_is_refused(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    fields = {
        "hook_name": HOOK,
        "direction": direction(),
        "coefficient": 1.0,
        "relative_to": "unit",
        **change,
    }
    with pytest.raises(error, match=words):
        SteeringVector(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vectors": ()}, "at least one SteeringVector"),
        ({"vectors": (direction(),)}, "from_vectors takes tensors"),
        (
            {"vectors": (vector(),), "basis": "centered"},
            "basis must be 'raw', 'centred' or None, got 'centered'",
        ),
        ({"vectors": (vector(),), "positions": "lastprompt"}, "closest: 'last_prompt'"),
        ({"vectors": (vector(),), "positions": 10**30}, "is beyond the end of every text"),
        ({"vectors": (vector(),), "positions": [0, -(2**63)]}, "is beyond the end of every text"),
        (
            {"vectors": (vector(),), "positions": slice(0, 10**5000)},
            "holds one int too large to show, which is beyond",
        ),
    ],
)
def test_a_bad_plan_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        SteeringPlan(**fields)


def test_from_vectors_uses_directions_only_and_keeps_strengths_apart() -> None:
    plan = SteeringPlan.from_vectors(
        {HOOK: direction(0, unit=False).double(), NEXT: 100 * direction(1)},
        coefficient={HOOK: 0.2, NEXT: -0.1},
        median_norms={HOOK: 10.0, NEXT: 20.0},
        positions=[3, -1],
        edit="clamp",
        preserve_norm=True,
        basis="centred",
    )
    torch.testing.assert_close(plan.vectors[0].delta, 2.0 * direction(0))
    torch.testing.assert_close(plan.vectors[1].delta, -2.0 * direction(1))
    assert [v.hook_name for v in plan.vectors] == [HOOK, NEXT]
    assert {(v.edit, v.preserve_norm) for v in plan.vectors} == {("clamp", True)}
    assert (plan.positions, plan.basis) == ((3, -1), "centred")


def test_from_vectors_takes_norms_basis_and_target_from_captured_activations() -> None:
    store = capture(model_of("gpt2"), PROMPTS)
    plan = SteeringPlan.from_vectors({HOOK: direction()}, coefficient=0.5, median_norms=store)
    assert plan.vectors[0].median_norm == pytest.approx(store.median_norm(HOOK))
    assert plan.basis == "centred"
    facts = {k: store.provenance[k] for k in ("fingerprint", "name", "d_model", "n_layers")}
    assert plan.target == facts


@pytest.mark.parametrize(
    ("vectors", "options", "error", "words"),
    [
        ({}, {}, ArgumentError, "vectors is empty"),
        (
            {HOOK: torch.zeros(D)},
            {"relative_to": "unit"},
            ArgumentError,
            "is zero and has no direction",
        ),
        (
            {HOOK: torch.ones(2, D)},
            {"relative_to": "unit"},
            DataError,
            r"must be a finite tensor \[d\]",
        ),
        (
            {HOOK: torch.full((D,), torch.inf)},
            {"relative_to": "unit"},
            DataError,
            "must be a finite tensor",
        ),
        (
            {HOOK: "abc"},
            {"relative_to": "unit"},
            DataError,
            r"a tensor \[d\] of numbers, got 'abc'",
        ),
        ({HOOK: direction()}, {}, ArgumentError, "needs median_norms: a number per hook name"),
        (
            {HOOK: direction()},
            {"median_norms": {NEXT: 1.0}},
            ArgumentError,
            "median_norms has no entry for",
        ),
        (
            {HOOK: direction()},
            {"coefficient": {NEXT: 1.0}},
            ArgumentError,
            "coefficient has no entry for",
        ),
        (
            {HOOK: direction()},
            {"median_norms": ActivationStore({NEXT: torch.ones(2, D)})},
            HookNameError,
            "not on this model",
        ),
    ],
)
def test_from_vectors_refuses(
    vectors: Any, options: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        SteeringPlan.from_vectors(vectors, **options)


def test_with_coefficient_sets_the_largest_and_keeps_the_ratios() -> None:
    plan = plan_of(vector(coefficient=0.1), vector(1, coefficient=-0.4, hook_name=NEXT))
    assert [v.coefficient for v in plan.with_coefficient(0.8).vectors] == pytest.approx([-0.2, 0.8])
    assert [v.coefficient for v in plan.with_coefficient(0.0).vectors] == [0.0, 0.0]
    off = plan_of(vector(coefficient=0.0), vector(1, coefficient=0.0, hook_name=NEXT))
    assert [v.coefficient for v in off.with_coefficient(0.3).vectors] == [0.3, 0.3]
    assert [v.coefficient for v in plan.vectors] == [0.1, -0.4]
    with pytest.raises(ArgumentError, match="coefficient must be a number"):
        plan.with_coefficient(float("nan"))


def test_random_directions_change_the_directions_only() -> None:
    plan = plan_of(
        vector(), vector(1, hook_name=NEXT, coefficient=-2.0), positions="prompt", basis="centred"
    )
    one, again, other = (plan.with_random_directions(seed=s) for s in (0, 0, 1))
    for before, after in zip(plan.vectors, one.vectors, strict=True):
        assert (before.hook_name, before.coefficient, before.scale) == (
            after.hook_name,
            after.coefficient,
            after.scale,
        )
        assert float(after.direction.norm()) == pytest.approx(1.0, abs=1e-6)
        assert abs(float(after.direction.mean())) < 1e-7  # centred plans stay centred
        assert abs(float(before.direction @ after.direction)) < 0.6
    assert (one.positions, one.basis) == ("prompt", "centred")
    assert torch.equal(one.vectors[0].direction, again.vectors[0].direction)
    assert not torch.allclose(one.vectors[0].direction, other.vectors[0].direction)
    assert not torch.allclose(one.vectors[0].direction, one.vectors[1].direction)
    assert (
        abs(float(plan_of(basis="raw").with_random_directions(seed=0).vectors[0].direction.mean()))
        > 1e-3
    )
    assert one.provenance["directions"] == "random, seed 0"


def test_shown_as_text_and_as_a_table() -> None:
    plan = plan_of(
        vector(coefficient=0.2, relative_to="median_norm", median_norm=31.2),
        target={"name": "tiny"},
    )
    assert "blocks.1.hook_resid_post: add +0.2×31.2 (median norm), d=32" in repr(plan)
    assert "for tiny" in repr(plan)
    table = plan.to_pandas()
    assert table.loc[0, "layer"] == 1
    assert table.loc[0, "scale"] == pytest.approx(6.24)


# -- effect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", list(EDITS))
def test_coefficient_zero_is_bit_equal_to_no_steering(edit: str) -> None:
    model = model_of()
    plain = run(model)
    for preserve_norm in (False, True):
        with plan_of(vector(coefficient=0.0, edit=edit, preserve_norm=preserve_norm)).hooks(
            model
        ) as report:
            assert torch.equal(run(model), plain)
        assert report.n_edited == {HOOK: 0}
        assert report.n_selected == {HOOK: 12}


@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("edit", list(EDITS))
def test_each_edit_does_what_the_pure_function_does(
    edit: str, family: str, preserve_norm: bool
) -> None:
    """In centred coordinates (gpt2) the edit sees Px, and the mean of x is left alone."""
    model, c = model_of(family), 3.0 if edit in ("add", "clamp") else 0.7
    x = at(HOOK, model)
    centred = family == "gpt2"
    base, v = (edits.centre(x), edits.centre(direction())) if centred else (x, direction())
    keep = {"preserve_norm": preserve_norm}
    wanted = {
        "add": lambda: edits.add(base, c * v, **keep),
        # What is added is a multiple of the direction, here of its mean-free part, whose norm is
        # below 1.
        "add_relative": lambda: edits.add_relative(base, v, coefficient=c * v.norm(), **keep),
        "add_contextual": lambda: edits.add_contextual(
            base, v, coefficient=c * v.norm(), **models.edit_parameters(edit), **keep
        ),
        "ablate": lambda: edits.ablate(base, direction(), coefficient=c, **keep),
        "clamp": lambda: edits.clamp(base, direction(), low=c, **keep),
        "rescale": lambda: edits.rescale(base, direction(), coefficient=c, **keep),
    }[edit]()
    plan = plan_of(vector(coefficient=c, edit=edit, preserve_norm=preserve_norm))
    with plan.hooks(model):
        after = at(HOOK, model)
    torch.testing.assert_close(after, x + (wanted - base), atol=2e-5, rtol=0)
    assert (after - x).abs().max() > 0.1


@pytest.mark.parametrize("per", ["row", "token"])
def test_a_plain_addition_behind_an_open_gate_is_the_ungated_one_bit_for_bit(per: str) -> None:
    model: Any = models.hf("llama", dtype=torch.bfloat16)
    model.tokenizer = models.tokenizer()
    gate = Gate(direction=direction(1), threshold=-1e9, per=per)
    with plan_of(vector(coefficient=3.3)).hooks(model), torch.no_grad():
        free = model(IDS).logits
    with plan_of(vector(coefficient=3.3, gate=gate)).hooks(model) as report, torch.no_grad():
        gated = model(IDS).logits
    assert report.n_edited == {HOOK: 12}
    assert torch.equal(gated, free)


# -- an edit of the user's ------------------------------------------------------------------------


def mirror(x: Tensor, v: Tensor, coefficient: float | Tensor) -> Tensor:
    return x - (2 * coefficient * (x @ v))[..., None] * v


@pytest.fixture
def mirrored() -> Iterator[None]:
    def between_0_and_1(coefficient: float) -> None:
        if not 0 <= coefficient <= 1:
            raise ArgumentError(f"mirror takes a coefficient in [0, 1], got {coefficient}.")

    register_edit("mirror", Edit(mirror, coefficient="fraction", check=between_0_and_1))
    yield
    del EDITS["mirror"]


@pytest.mark.usefixtures("mirrored")
@pytest.mark.parametrize("kind", ["bridge", "huggingface", "nnsight"])
def test_an_edit_of_the_users_own_is_done_on_every_host(kind: str) -> None:
    model, _ = steerable(kind)
    host, plan = as_host(model), plan_of(vector(coefficient=1.0, edit="mirror"))
    states = {}
    for name in ("plain", "mirrored"):
        with plan.hooks(model) if name == "mirrored" else nullcontext():
            states[name] = capture(host, PROMPTS, [HOOK], positions="all")[HOOK]
    torch.testing.assert_close(
        states["mirrored"], mirror(states["plain"], direction(), 1.0), atol=1e-5, rtol=0
    )
    assert (states["mirrored"] - states["plain"]).abs().max() > 0.1
    half = plan.with_coefficient(0.5)
    with half.hooks(model):
        gone = capture(host, PROMPTS, [HOOK], positions="all")[HOOK] @ direction()
    torch.testing.assert_close(gone, torch.zeros_like(gone), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("mirrored")
def test_what_an_edit_says_of_its_coefficient_is_checked() -> None:
    with pytest.raises(ArgumentError, match=r"mirror takes a coefficient in \[0, 1\], got 2"):
        vector(coefficient=2.0, edit="mirror")
    with pytest.raises(ArgumentError, match=r"mirror takes a coefficient in \[0, 1\], got 3"):
        plan_of(vector(coefficient=1.0, edit="mirror")).with_coefficient(3.0)
    with pytest.raises(ArgumentError, match="edit='mirror' takes a fraction as its coefficient"):
        vector(coefficient=1.0, edit="mirror", relative_to="median_norm", median_norm=2.0)


@pytest.mark.usefixtures("mirrored")
def test_an_edit_of_the_users_own_is_calibrated_like_any_other() -> None:
    plan = plan_of(vector(coefficient=1.0, edit="mirror"))
    result = calibrate(plan, model_of(), PROMPTS, budget=5.0, grid=(0.25, 0.5))
    assert result.coefficient in (0.0, 0.25, 0.5)


def test_a_negative_clamp_is_an_upper_bound() -> None:
    model = model_of()
    before = at(HOOK, model) @ direction()
    with plan_of(vector(coefficient=-0.2, edit="clamp")).hooks(model):
        after = at(HOOK, model) @ direction()
    torch.testing.assert_close(after, before.clamp(max=-0.2), atol=1e-5, rtol=0)
    assert float(before.min()) < -0.2 < float(before.max())


def test_vectors_at_one_hook_point_act_in_the_order_of_the_plan() -> None:
    model = model_of()
    add, ablate = vector(0, coefficient=5.0), vector(0, coefficient=1.0, edit="ablate")
    with plan_of(add, ablate).hooks(model):
        gone = at(HOOK, model) @ direction()
    with plan_of(ablate, add).hooks(model):
        left = at(HOOK, model) @ direction()
    torch.testing.assert_close(gone, torch.zeros_like(gone), atol=1e-5, rtol=0)
    torch.testing.assert_close(left, torch.full_like(left, 5.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("edit", list(EDITS))
def test_row_coefficients_steer_each_row_by_its_own_strength(edit: str) -> None:
    model, ids = model_of(), IDS[:1].expand(4, -1)
    factors = [0.0, 1.0, -1.0, 0.5]
    plan = plan_of(vector(coefficient=4.0 if edit in ("add", "clamp") else 0.8, edit=edit))
    plain = run(model, ids)
    with plan.hooks(model, row_coefficients=factors) as report:
        together = run(model, ids)
    assert torch.equal(together[0], plain[0])
    for row, factor in enumerate(factors[1:], start=1):
        with plan.with_coefficient(plan.vectors[0].coefficient * factor).hooks(model):
            torch.testing.assert_close(together[row], run(model, ids)[row], atol=2e-5, rtol=0)
    assert report.n_edited == {HOOK: 18}
    with pytest.raises(
        ArgumentError, match="row_coefficients has 4 entries, but the batch has 2 rows"
    ):
        with plan.hooks(model, row_coefficients=factors):
            run(model)
    with pytest.raises(ArgumentError, match="must be a list of finite numbers"):
        plan.hooks(model, row_coefficients=[float("nan")])


def test_fwd_hooks_are_the_same_edits_as_a_plain_list() -> None:
    model = model_of()
    plan = plan_of(vector(), vector(1, hook_name=NEXT), positions="last_prompt")
    with plan.hooks(model):
        want = run(model)
    with torch.no_grad():
        mine: list[int] = []
        hooks = [*plan.fwd_hooks(model), (NEXT, lambda tensor, hook: mine.append(1))]
        got = model.run_with_hooks(IDS, fwd_hooks=hooks, return_type="logits")
    assert torch.equal(got, want)
    assert mine == [1]
    assert plan.last_run is not None
    assert plan.last_run.n_edited == {HOOK: 2, NEXT: 2}
    assert plan.last_run.n_forwards == 1
    assert plan.last_run.to_pandas().values.tolist() == [[HOOK, 1, 2, 2], [NEXT, 1, 2, 2]]


def test_fwd_hooks_take_the_mask_of_a_padded_batch() -> None:
    model, plan = model_of(), plan_of(positions="last_prompt")
    ids = torch.tensor([[1, 4, 7, 0, 0], [1, 5, 9, 20, 7]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with plan.hooks(model):
        want = run(model, ids, attention_mask=mask)
    with torch.no_grad():
        options = {"attention_mask": mask, "return_type": "logits"}
        got = model.run_with_hooks(ids, fwd_hooks=plan.fwd_hooks(model, mask), **options)
        wrong = model.run_with_hooks(ids, fwd_hooks=plan.fwd_hooks(model), **options)
    assert torch.equal(got, want)
    assert not torch.allclose(
        wrong[0, 2], want[0, 2]
    )  # without the mask the last column is taken for the last token


def test_fwd_hooks_refuse_tensors_without_a_batch_axis() -> None:
    hooks = plan_of().fwd_hooks(model_of())
    with pytest.raises(HookNameError, match=r"steering needs \[batch, pos, d\]"):
        model_of().run_with_hooks(IDS[:1], fwd_hooks=hooks, remove_batch_dim=True)


def test_attach_steers_until_removed_and_says_what_it_did() -> None:
    model = model_of()
    plain, plan = run(model), plan_of()
    with plan.hooks(model):
        want = run(model)
    handle = plan.attach(model)
    assert torch.equal(run(model), want)
    assert handle.report.n_forwards == 1
    assert plan.last_run is handle.report
    handle.remove()
    handle.remove()
    assert torch.equal(run(model), plain)
    assert "1 forward passes" in repr(handle)


@pytest.mark.parametrize("kind", ["bridge", "huggingface", "nnsight"])
def test_the_model_owns_what_is_attached_to_it(kind: str) -> None:
    """A dropped handle goes on steering, `detach` finds it again, and the model is not kept
    alive."""
    model, handles = steerable(kind)
    plain, plan = output(model), plan_of()
    with plan.hooks(model):
        want = output(model)
    plan.attach(model)
    gc.collect()
    assert torch.equal(output(model), want)
    assert plan.last_run is not None
    assert plan.last_run.n_edited[HOOK] == 12
    kept = plan_of(vector(1)).attach(model)
    assert not torch.equal(output(model), want)
    detach(model)
    assert torch.equal(output(model), plain)
    kept.remove()  # nothing happens
    detach(model)
    assert handles() == 0


@pytest.mark.parametrize("kind", ["bridge", "huggingface"])
def test_an_attached_model_is_freed_with_its_steering(kind: str) -> None:
    model = steerable(kind)[0]
    plan_of().attach(model)
    output(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_handle_that_was_used_and_dropped_is_nothing_to_detach() -> None:
    model, count = steerable("huggingface")
    before, plan = count(), plan_of()
    plan.attach(model).remove()
    gc.collect()
    detach(model)
    plan.attach(model)
    assert count() > before
    detach(model)
    assert count() == before


def test_two_models_are_detached_one_at_a_time() -> None:
    (one, _), (other, _) = steerable("huggingface"), steerable("huggingface")
    plain, plan = output(one), plan_of()
    plan.attach(one)
    plan.attach(other)
    detach(one)
    assert torch.equal(output(one), plain)
    assert not torch.equal(output(other), plain)


def steerable(kind: str) -> tuple[Any, Callable[[], int]]:
    """A fresh model, and how many hooks and edits are on it."""
    if kind == "bridge":
        model = models.bridge("llama")
        return model, lambda: sum(len(p.fwd_hooks) for p in model.hook_dict.values())
    module: Any = models.hf("llama")
    module.tokenizer = models.tokenizer()
    model = module
    if kind == "nnsight":
        nnsight = pytest.importorskip("nnsight")
        model = nnsight.TransformersModel(module, tokenizer=models.tokenizer())

    def count() -> int:
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
        return hooks + len(getattr(model, "_edits", [])) if kind == "nnsight" else hooks

    return model, count


def output(model: Any) -> Tensor:
    with torch.no_grad():
        if hasattr(model, "trace"):
            return model.trace(input_ids=IDS, trace=False).logits
        found = model(IDS)
        return found if isinstance(found, Tensor) else found.logits


def test_attach_without_a_run_or_after_reset_hooks_is_no_error() -> None:
    model = model_of()
    plan_of().attach(model).remove()
    handle = plan_of().attach(model)
    model.reset_hooks()
    handle.remove()
    assert "generate" not in model.__dict__


def test_a_long_run_keeps_its_counts_small_and_right() -> None:
    model, plan = model_of(), plan_of(positions="last_prompt")
    with plan.hooks(model) as report:
        for _ in range(600):
            report._selected[HOOK].append(torch.tensor(1))
        for _ in range(3):
            run(model)
        assert len(report._selected[HOOK]) < 520
    assert report.n_selected == {HOOK: 606}


def test_last_run_is_none_before_any_and_belongs_to_one_plan() -> None:
    plan = plan_of(positions="generated")
    assert plan.last_run is None
    with plan.hooks(model_of()) as report:
        model_of().generate(IDS[:1], max_new_tokens=3, verbose=False, stop_at_eos=False)
    assert plan.last_run is report
    assert (report.n_forwards, report.n_fired, report.n_edited) == (3, {HOOK: 3}, {HOOK: 3})
    assert "3 forward passes" in repr(report)
    assert plan.with_coefficient(1.0).last_run is None


# -- refusals -------------------------------------------------------------------------------------


def enter(plan: SteeringPlan, model: Any = None, **options: Any) -> None:
    model = model_of() if model is None else model
    with plan.hooks(model, **options):
        run(model)


def test_a_plan_for_another_model_is_refused_unless_allowed() -> None:
    host, other = as_host(model_of()), as_host(model_of("neox"))
    plan = plan_of(target={"fingerprint": host.fingerprint, "name": host.name})
    enter(plan)
    with pytest.raises(
        ArtifactError,
        match=rf"fitted on fingerprint {host.fingerprint} \(tiny-llama\).*{other.fingerprint}",
    ):
        enter(plan, other.model)
    enter(plan, other.model, allow_mismatch=True)
    with pytest.raises(ArtifactError, match="pass allow_mismatch=True"):
        plan.fwd_hooks(other.model)
    with pytest.raises(ArtifactError, match="pass allow_mismatch=True"):
        plan.attach(other.model)


def test_a_centred_plan_is_refused_where_centring_changes_the_output() -> None:
    enter(plan_of(basis="centred"), model_of("gpt2"))
    with pytest.raises(
        ModelStateError, match="in the centred basis, but the output of 'tiny-llama' changes"
    ):
        enter(plan_of(basis="centred"))
    enter(plan_of(basis="centred"), allow_mismatch=True)


def test_the_width_must_be_that_of_the_hook_point() -> None:
    narrow = SteeringVector(
        hook_name=HOOK, direction=torch.ones(16) / 4, coefficient=1.0, relative_to="unit"
    )
    with pytest.raises(
        WidthError,
        match=r"'blocks.1.hook_resid_post' has width 16, but 'tiny-llama' has d_model=32",
    ):
        enter(plan_of(narrow))
    with pytest.raises(WidthError, match="has width 16, but the activations there have width 48"):
        enter(plan_of(replace(narrow, hook_name="blocks.1.mlp.hook_post")))


def test_a_block_in_which_the_model_was_not_run_is_an_error() -> None:
    with pytest.raises(InterventionError, match="'tiny-llama' was not run inside the block"):
        with plan_of().hooks(model_of()):
            run(model_of("gpt2"))


def test_a_hook_that_never_fires_is_an_error() -> None:
    with pytest.raises(
        InterventionError,
        match=r"\['blocks.2.hook_resid_post'\] never fired in 1 forward passes.*stop_at_layer",
    ):
        with plan_of(vector(), vector(hook_name=NEXT)).hooks(model_of()):
            run(model_of(), stop_at_layer=2)


def test_positions_that_select_no_token_are_an_error() -> None:
    with pytest.raises(InterventionError, match="positions=50 selected no token"):
        enter(plan_of(positions=50))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_without_a_mask_is_refused_where_it_matters(side: str) -> None:
    model = model_of()
    ids = torch.tensor(
        [[1, 4, 7, 0, 0], [1, 5, 9, 20, 7]]
        if side == "right"
        else [[0, 0, 1, 4, 7], [1, 5, 9, 20, 7]]
    )
    mask = (ids != 0).long()
    with pytest.raises(
        DataError, match=r"seems to be padded \(pad id 0\) and came without an attention mask"
    ):
        with plan_of(positions="last_prompt").hooks(model):
            run(model, ids)
    with plan_of(positions="last_prompt").hooks(model) as report:
        run(model, ids, attention_mask=mask)
    assert report.n_edited == {HOOK: 2}
    with plan_of(positions="all").hooks(model) as report:
        run(model, ids)  # every token, padding included: harmless, nothing looks at it
    assert report.n_edited == {HOOK: 10}


def test_a_host_without_traces_says_what_to_use() -> None:
    with pytest.raises(
        HostError,
        match=r"apply works inside an nnsight trace; on transformer_lens use `with plan.hooks",
    ):
        plan_of().apply(model_of())


# -- gates ----------------------------------------------------------------------------------------


def gate_between(
    model: Any, ids: Tensor, *, per: str = "row", hook_name: str | None = None, **options: Any
) -> Gate:
    """A gate that the last token of row 1 opens and that of row 0 does not (or the other way
    round)."""
    scores = at(hook_name or HOOK, model, ids)[:, -1] @ direction(7)
    sign = 1.0 if scores[1] > scores[0] else -1.0
    return Gate(
        direction=sign * direction(7),
        threshold=float(sign * scores.mean()),
        per=per,
        hook_name=hook_name,
        **options,
    )


@pytest.mark.parametrize("opens", ["above", "below"])
@pytest.mark.parametrize("where", [None, "blocks.0.hook_resid_post"])
def test_a_row_gate_steers_the_rows_that_open_it_and_leaves_the_others_bit_equal(
    where: str | None, opens: str
) -> None:
    model = model_of()
    gate = gate_between(model, IDS, hook_name=where, opens=opens)
    plain = run(model)
    with plan_of().hooks(model):
        steered = run(model)
    with plan_of(vector(gate=gate)).hooks(model) as report:
        gated = run(model)
    shut, open_ = (0, 1) if opens == "above" else (1, 0)
    assert torch.equal(gated[shut], plain[shut])
    torch.testing.assert_close(gated[open_], steered[open_], atol=2e-5, rtol=0)
    assert report.n_edited == {HOOK: 6}
    assert report.n_selected == {HOOK: 12}


def test_a_token_gate_decides_for_every_token() -> None:
    model = model_of()
    scores = at(HOOK, model) @ direction(7)
    gate = Gate(direction=direction(7), threshold=float(scores.median()), per="token")
    x = at(HOOK, model)
    with plan_of(vector(gate=gate)).hooks(model):
        after = at(HOOK, model)
    changed = (after != x).any(-1)
    assert torch.equal(changed, scores >= scores.median())
    assert 0 < int(changed.sum()) < changed.numel()


def test_a_row_gate_decides_once_per_sequence_cached_or_not_and_in_any_batch() -> None:
    model, host = model_of(), as_host(model_of())
    ids = torch.stack([IDS[0], IDS[1], IDS[0].flip(0), IDS[1].roll(2)])
    gate = gate_between(model, ids[:2])
    plan = plan_of(vector(gate=gate, coefficient=8.0), positions="generated")
    options = {
        "max_new_tokens": 4,
        "verbose": False,
        "stop_at_eos": False,
        "do_sample": False,
        "return_type": "tokens",
    }
    found = []
    for cached in (True, False):
        with plan.hooks(model):
            found.append(model.generate(ids, use_past_kv_cache=cached, **options))
        with plan.hooks(model):
            rows = [model.generate(row[None], use_past_kv_cache=cached, **options) for row in ids]
        found.append(torch.cat(rows))
    assert all(torch.equal(found[0], other) for other in found[1:])
    plain = model.generate(ids, **options)
    assert torch.equal(found[0][0], plain[0])
    assert not torch.equal(found[0][1], plain[1])
    assert host.kind == "transformer_lens"


def test_gates_work_in_a_plain_list_of_hooks_too() -> None:
    model = model_of()
    for where in (None, "blocks.0.hook_resid_post"):
        plan = plan_of(vector(gate=gate_between(model, IDS, hook_name=where)), positions="prompt")
        with plan.hooks(model):
            want = run(model)
        with torch.no_grad():
            got = model.run_with_hooks(IDS, fwd_hooks=plan.fwd_hooks(model), return_type="logits")
        assert torch.equal(got, want)


def test_a_gate_in_centred_coordinates_ignores_the_mean() -> None:
    """The same gate on raw and on processed weights, whose activations differ by their means."""
    raw, processed = model_of("gpt2"), models.bridge("gpt2", compat=True)
    scores = edits.centre(at(HOOK, raw)) @ direction(7)
    gate = Gate(direction=direction(7), threshold=float(scores.median()) + 1e-3, per="token")
    counts = []
    for model in (raw, processed):
        with plan_of(vector(gate=gate)).hooks(model) as report:
            run(model)
        counts.append(report.n_edited)
    assert counts[0] == counts[1] == {HOOK: int((scores >= gate.threshold).sum())}


def test_a_gate_after_its_vector_and_a_gate_that_missed_the_prompt_are_errors() -> None:
    model = model_of()
    late = Gate(direction=direction(7), threshold=0.0, hook_name=NEXT)
    with pytest.raises(HookNameError, match="hook_resid_post', after it"):
        enter(plan_of(vector(gate=late)))
    unknown = Gate(direction=direction(7), threshold=0.0, hook_name="blocks.1.hook_resid_pots")
    with pytest.raises(HookNameError, match="hook_resid_pots"):
        enter(plan_of(vector(gate=unknown)))
    gated = plan_of(vector(gate=Gate(direction=direction(7), threshold=0.0)))
    with pytest.raises(
        InterventionError, match="decides at the last prompt token, which is not in this pass"
    ):
        with gated.hooks(model, prompt_lengths=9):
            run(model)


def test_a_table_of_a_plan_holds_hook_names_without_a_layer() -> None:
    names = ["conv2.hook_out", "hook_embed", HOOK]
    plan = plan_of(*(vector(hook_name=name) for name in names))
    table = plan.to_pandas()
    assert table["hook_name"].tolist() == names
    assert table["layer"].isna().tolist() == [True, True, False]
    assert table["layer"].tolist()[2] == 1


def test_dropout_in_a_part_of_the_model_is_refused() -> None:
    model: Any = models.hf("gpt2")
    model.tokenizer = models.tokenizer()
    for module in model.modules():
        module.train(isinstance(module, torch.nn.Dropout))
    assert not model.training
    with pytest.raises(ModelStateError, match="a part of it with dropout"):
        capture(model, PROMPTS)
    with pytest.raises(ModelStateError, match=r"call model\.eval\(\)"):
        with plan_of().hooks(model):
            pass
    model.eval()
    capture(model, PROMPTS[:1])


def test_a_rate_of_dropout_kept_as_a_number_is_seen_and_parts_without_are_not() -> None:
    from expertsteer_lens.hosts.facts import training_noise

    model: Any = models.hf("llama")
    block = model.model.layers[1]
    block.train()
    assert not training_noise(model)  # a Llama without dropout: its mode means nothing
    block.self_attn.attention_dropout = 0.1
    assert training_noise(model)
    block.self_attn.eval()
    assert not training_noise(model)
    block.mlp.jitter_noise = 0.3  # the router of a mixture of experts keeps it so
    assert training_noise(model)
    block.mlp.eval()
    assert not training_noise(model)
    model.training = True
    assert training_noise(model)
