"""Steering among the hooks, caches, patches and edits of others: each sees what its place in the
order says it sees.

Order, counts and removal on TransformerLens are in `test_host_transformer_lens`; here is what
people put on top of steering."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import Tensor

from expertsteer_lens.errors import InterventionError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.interventions import edits
from expertsteer_lens.steer.plan import SteeringPlan

HOOK, NEXT = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
IDS = torch.tensor([[1, 4, 7, 19, 6, 8]])
OTHER = torch.tensor([[1, 5, 9, 19, 6, 8]])
KINDS = ("bridge", "bridge compat", "hooked", "hooked raw")
kinds = pytest.mark.parametrize("kind", KINDS)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@functools.cache
def model_of(kind: str, family: str = "llama") -> Any:
    return models.on_host(kind, family)


def vector(seed: int = 0) -> Tensor:
    found = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(seed))
    return (found - found.mean()) / (
        found - found.mean()
    ).norm()  # mean-free: the same in either basis


def plan_at(
    name: str = HOOK, *, seed: int = 0, coefficient: float = 4.0, **options: Any
) -> SteeringPlan:
    return SteeringPlan.from_vectors(
        {name: vector(seed)},
        coefficient=coefficient,
        relative_to=options.pop("relative_to", "unit"),
        **options,
    )


def probe(seen: list[Tensor], name: str = HOOK) -> tuple[str, Callable[..., None]]:
    return (name, lambda x, hook: seen.append(x.detach().clone()))


def logits(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, return_type="logits", **options)


def hooked_logits(model: Any, hooks: list[Any], ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(ids, fwd_hooks=hooks, return_type="logits")


# -- probes, and hooks that edit ------------------------------------------------------------------


@kinds
def test_probes_see_what_stands_before_them_in_the_list(kind: str) -> None:
    model, first, second = model_of(kind), plan_at(), plan_at(seed=1)
    readings: list[Tensor] = []
    between = [
        probe(readings),
        *first.fwd_hooks(model),
        probe(readings),
        *second.fwd_hooks(model),
        probe(readings),
    ]
    found = hooked_logits(model, between)
    untouched, after_first, after_both = readings
    a, b = first.vectors[0].delta, second.vectors[0].delta
    torch.testing.assert_close(after_first - untouched, a.expand_as(untouched), **CLOSE)
    torch.testing.assert_close(after_both - untouched, (a + b).expand_as(untouched), **CLOSE)
    with first.hooks(model), second.hooks(model):
        assert torch.equal(logits(model), found)  # probes change nothing


@kinds
def test_a_hook_of_the_user_that_edits_acts_in_its_turn(kind: str) -> None:
    model, plan, u = model_of(kind), plan_at(), vector(5) + 0.3 * vector(0)
    ablation = (
        HOOK,
        lambda x, hook: edits.ablate(x, u),
    )  # does not commute with adding the plan's vector
    for before in (True, False):
        seen: list[Tensor] = []
        hooks = [ablation, *plan.fwd_hooks(model)] if before else [*plan.fwd_hooks(model), ablation]
        plain: list[Tensor] = []
        hooked_logits(model, [probe(plain), *hooks, probe(seen)])
        x, v = plain[0], plan.vectors[0].delta
        want = edits.ablate(x, u) + v if before else edits.ablate(x + v, u)
        other = edits.ablate(x + v, u) if before else edits.ablate(x, u) + v
        torch.testing.assert_close(seen[0], want, **CLOSE)
        assert (seen[0] - other).abs().max() > 0.1


@kinds
def test_hooks_put_on_the_model_before_and_inside_a_block_act_before_and_after_it(
    kind: str,
) -> None:
    model = model_of(kind)
    double = lambda x, hook: 2 * x  # noqa: E731
    v = plan_at().vectors[0].delta
    plain: list[Tensor] = []
    hooked_logits(model, [probe(plain)])
    for before, want in ((True, 2 * plain[0] + v), (False, 2 * (plain[0] + v))):
        seen: list[Tensor] = []
        try:
            if before:
                model.add_hook(HOOK, double)
            with plan_at().hooks(model):
                if not before:
                    model.add_hook(HOOK, double)
                hooked_logits(model, [probe(seen)])
        finally:
            model.reset_hooks()
        torch.testing.assert_close(seen[0], want, **CLOSE)


@kinds
def test_steering_outlives_the_runs_of_others_inside_the_block(kind: str) -> None:
    model = model_of(kind)
    with plan_at().hooks(model) as report:
        steered = logits(model)
        for _ in range(2):
            with torch.no_grad():
                model.run_with_cache(IDS)
            hooked_logits(model, [probe([])])
            with model.hooks(fwd_hooks=[probe([])]):
                logits(model)
        assert torch.equal(logits(model), steered)
    assert report.n_fired == {HOOK: 8}


# -- caches ---------------------------------------------------------------------------------------


@kinds
def test_a_cache_of_a_steered_run_differs_from_the_hook_point_on_and_nowhere_before(
    kind: str,
) -> None:
    model, plan = model_of(kind), plan_at()
    with torch.no_grad():
        _, plain = model.run_with_cache(IDS)
        with plan.hooks(model):
            _, inside = model.run_with_cache(IDS)
        with model.hooks(fwd_hooks=plan.fwd_hooks(model)):
            _, listed = model.run_with_cache(IDS)
    for name in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"):
        assert torch.equal(inside[name], plain[name])
    torch.testing.assert_close(
        inside[HOOK] - plain[HOOK], plan.vectors[0].delta.expand_as(plain[HOOK]), **CLOSE
    )
    assert torch.equal(inside["blocks.2.hook_resid_pre"], inside[HOOK])
    assert (inside[NEXT] - plain[NEXT]).abs().max() > 0.1
    for name in plain:
        assert torch.equal(listed[name], inside[name])


# -- activation patching --------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out"])
@kinds
def test_transformer_lens_patching_under_a_plan_is_patching_the_steered_model(
    kind: str, site: str
) -> None:
    """Against the definition: for each place one run, steered, with that entry of the activation
    replaced."""
    from transformer_lens import patching

    model, plan = model_of(kind), plan_at(positions=slice(1, None))
    metric = lambda out: out[0, -1, 5]  # noqa: E731
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with plan.hooks(model) as report:
            _, clean = model.run_with_cache(IDS)
            found = getattr(patching, f"get_act_patch_{site}")(model, OTHER, clean, metric)
    assert report.n_forwards == 1 + found.numel()
    for layer in range(models.N_LAYERS):
        name = f"blocks.{layer}.hook_{site}"
        for position in (1, 5):

            def put(x: Tensor, hook: Any, name: str = name, position: int = position) -> Tensor:
                x = x.clone()
                x[:, position] = clean[name][:, position]
                return x

            want = metric(hooked_logits(model, [*plan.fwd_hooks(model), (name, put)], OTHER))
            torch.testing.assert_close(found[layer, position], want, **CLOSE)
    unsteered = metric(logits(model, OTHER))
    assert (found - unsteered).abs().max() > 0.1


@kinds
def test_patching_the_whole_difference_in_restores_the_steered_run(kind: str) -> None:
    model, plan = model_of(kind), plan_at()
    names = [HOOK, NEXT]
    with torch.no_grad():
        _, plain = model.run_with_cache(IDS, names_filter=names)
        with plan.hooks(model):
            steered = logits(model)
            _, cache = model.run_with_cache(IDS, names_filter=names)
    for name in names:
        difference = cache[name] - plain[name]
        patched = hooked_logits(model, [(name, lambda x, hook, d=difference: x + d)])
        torch.testing.assert_close(patched, steered, atol=1e-4, rtol=1e-4)
    assert (logits(model) - steered).abs().max() > 0.1


@kinds
def test_patching_the_entry_of_the_next_block_overwrites_the_steering(kind: str) -> None:
    model = model_of(kind)
    plain = logits(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(IDS, names_filter="blocks.2.hook_resid_pre")
    with plan_at().hooks(model):
        put = ("blocks.2.hook_resid_pre", lambda x, hook: cache["blocks.2.hook_resid_pre"])
        torch.testing.assert_close(hooked_logits(model, [put]), plain, **CLOSE)


# -- two plans ------------------------------------------------------------------------------------


@kinds
def test_two_plans_are_one_plan_with_the_vectors_of_both(kind: str) -> None:
    model = model_of(kind)
    first = plan_at()
    for second in (
        plan_at(seed=1),
        plan_at(NEXT, seed=1),
        plan_at(seed=0, coefficient=1.0, edit="ablate"),
    ):
        both = SteeringPlan(vectors=first.vectors + second.vectors)
        with both.hooks(model):
            want = logits(model)
        with first.hooks(model), second.hooks(model):
            torch.testing.assert_close(logits(model), want, **CLOSE)
        torch.testing.assert_close(
            hooked_logits(model, first.fwd_hooks(model) + second.fwd_hooks(model)), want, **CLOSE
        )
        assert first.last_run is not second.last_run
    with second.hooks(model), first.hooks(model):  # ablate, then add: another order, another model
        assert (logits(model) - want).abs().max() > 0.1


@kinds
def test_opposite_plans_cancel_and_the_same_plan_twice_is_twice_as_strong(kind: str) -> None:
    model, plan = model_of(kind), plan_at()
    with plan.hooks(model), plan.with_coefficient(-4.0).hooks(model):
        torch.testing.assert_close(logits(model), logits_of_nothing(model), atol=1e-4, rtol=1e-4)
    with plan.with_coefficient(8.0).hooks(model):
        want = logits(model)
    with plan.hooks(model) as outer, plan.hooks(model) as inner:
        torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=1e-4)
    assert (outer.n_edited, inner.n_edited) == ({HOOK: 6}, {HOOK: 6})


def logits_of_nothing(model: Any) -> Tensor:
    with as_host(model).quiet():
        return logits(model)


@kinds
def test_each_plan_keeps_its_own_positions_while_text_is_generated(kind: str) -> None:
    model = model_of(kind)
    rules: dict[Any, int] = {"prompt": 6, "generated": 4, 2: 1}
    reports = []
    handles = [plan_at(seed=i, positions=rule).attach(model) for i, rule in enumerate(rules)]
    try:
        model.generate(IDS, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    finally:
        for handle in handles:
            reports.append(handle.report)
            handle.remove()
    assert [report.n_edited[HOOK] for report in reports] == list(rules.values())


@kinds
def test_reset_hooks_under_two_plans_is_noticed_by_both(kind: str) -> None:
    model, outer, inner = model_of(kind), plan_at(), plan_at(NEXT, seed=1)

    def resets() -> None:
        with inner.hooks(model):
            logits(model)
            model.reset_hooks()

    def runs_on() -> None:
        with outer.hooks(model):
            with pytest.raises(
                InterventionError, match=rf"\['{NEXT}'\] was removed while it was on"
            ):
                resets()

    with pytest.raises(InterventionError, match=rf"\['{HOOK}'\] was removed while it was on"):
        runs_on()
    assert torch.equal(logits(model), logits_of_nothing(model))


@kinds
def test_after_reset_hooks_a_pass_of_an_attached_plan_is_refused_not_run_unsteered(
    kind: str,
) -> None:
    model = model_of(kind)
    handle = plan_at().attach(model)
    try:
        logits(model)
        model.reset_hooks()
        with pytest.raises(InterventionError, match="was removed while it was on"):
            logits(model)
    finally:
        handle.remove()
    assert torch.equal(logits(model), logits_of_nothing(model))
