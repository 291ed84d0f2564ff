from __future__ import annotations

import math
from dataclasses import replace

import models
import pytest
import torch
from reference import kl_per_token

from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.measure.calibration import _within, calibrate
from expertsteer_lens.measure.metrics import (
    behaviour_gradient,
    behaviour_metric,
    neutral_nll,
)
from expertsteer_lens.measure.neutral import NeutralTexts
from expertsteer_lens.measure.strengths import DEFAULT_GRID, search, walk
from expertsteer_lens.steer.plan import SteeringPlan

TEXTS = ["the cat ran home", "a dog was here and it was big", "the sun and the moon and the rain"]
BEHAVIOUR = Behaviour(prompts=("the cat is", "it was"), positive=(" happy",), negative=(" sad",))
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return models.bridge("llama")


@pytest.fixture(scope="module")
def plan() -> SteeringPlan:
    direction = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(1))
    return SteeringPlan.from_vectors({HOOK: direction}, coefficient=0.1, median_norms={HOOK: 8.0})


def cost(model, plan, coefficient: float, unit: str = "nll") -> float:
    host = as_host(model)

    def mean(rows: torch.Tensor) -> float:
        return float(rows[:, 0].sum() / rows[:, 1].sum())

    steered = plan.with_coefficient(coefficient)
    if unit == "kl":
        return mean(kl_per_token(host, TEXTS, steered))
    return mean(neutral_nll(host, TEXTS, plan=steered)) - mean(neutral_nll(host, TEXTS))


@pytest.mark.parametrize("unit", ["nll", "kl"])
def test_the_coefficient_is_within_the_budget_and_the_next_is_not(model, plan, unit):
    budget = 0.5 * cost(model, plan, 0.3, "kl")
    found = calibrate(plan, model, TEXTS, budget=budget, unit=unit)
    if found.coefficient == DEFAULT_GRID[-1]:
        pytest.fail("the budget never bound, so this test shows nothing")
    following = DEFAULT_GRID[DEFAULT_GRID.index(found.coefficient) + 1]
    assert cost(model, plan, found.coefficient, unit) <= budget < cost(model, plan, following, unit)


def test_the_search_finds_what_a_walk_over_the_grid_finds_where_the_cost_grows(model, plan):
    costs = [cost(model, plan, c, "kl") for c in DEFAULT_GRID]
    assert costs == sorted(costs)
    for budget in (costs[2] * 1.01, costs[9] * 1.01, costs[-1] * 2):
        walked = calibrate(plan, model, TEXTS, budget=budget, unit="kl", grid=DEFAULT_GRID)
        drawn = calibrate(plan, model, TEXTS, budget=budget, unit="kl")
        assert drawn.coefficient == walked.coefficient
        assert len(drawn.curve) <= 12
        searched = calibrate(plan, model, TEXTS, budget=budget, unit="kl", curve=False)
        assert walked.coefficient == searched.coefficient
        assert len(searched.curve) <= 8  # the origin is one


def test_the_curve_holds_the_measured_effects_and_the_unsteered_origin(model, plan):
    found = calibrate(
        plan, model, TEXTS, budget=1.0, behaviour=BEHAVIOUR, grid=(0.1, 0.2), negative=True
    )
    assert [row["coefficient"] for row in found.curve] == [-0.2, -0.1, 0.0, 0.1, 0.2]
    assert found.curve[2] == {
        "coefficient": 0.0,
        "cost": 0.0,
        "effect": 0.0,
        "effect_se": 0.0,
        "band": "no effect",
    }
    host = as_host(model)
    expected = behaviour_metric(
        host, BEHAVIOUR, plan=plan.with_coefficient(0.2)
    ) - behaviour_metric(host, BEHAVIOUR)
    assert found.curve[-1]["effect"] == pytest.approx(float(expected.mean()), abs=1e-6)
    frame = found.to_pandas()
    within = frame[frame.cost <= 1.0]
    clear = within.effect.abs() > 2 * within.effect_se
    assert (within.band == clear.map({True: "usable", False: "no effect"})).all()
    assert found.to_dict()["curve"][0]["coefficient"] == -0.2


def test_the_walk_stops_once_the_text_is_broken(model, plan):
    budget = cost(model, plan, 0.02, "kl") * 1.01
    found = calibrate(plan, model, TEXTS, budget=budget, unit="kl", grid=DEFAULT_GRID)
    assert found.coefficient == 0.02
    *before, last = [row["cost"] for row in found.curve]
    assert last > 5 * budget >= max(before)


def test_the_ratio_between_layers_is_kept(model):
    directions = {f"blocks.{i}.hook_resid_post": torch.ones(models.D_MODEL) + i for i in (0, 1)}
    both = SteeringPlan.from_vectors(
        directions,
        coefficient={"blocks.0.hook_resid_post": 0.1, HOOK: 0.4},
        median_norms=dict.fromkeys(directions, 5.0),
    )
    scaled = both.with_coefficient(
        calibrate(both, model, TEXTS, budget=0.05, curve=False).coefficient
    )
    assert scaled.vectors[1].coefficient == pytest.approx(4 * scaled.vectors[0].coefficient)


def test_past_the_first_break_every_coefficient_is_broken(model, plan):
    found = calibrate(plan, model, TEXTS, budget=cost(model, plan, 0.1, "kl") * 1.01, unit="kl")
    bands = [row["band"] for row in found.curve]
    assert bands == sorted(bands, key=["no effect", "usable", "broken"].index)
    assert found.curve[bands.index("broken") - 1]["coefficient"] == found.coefficient == 0.1


def gradient_plan(model) -> SteeringPlan:
    towards = behaviour_gradient(as_host(model), BEHAVIOUR, [HOOK])[HOOK]
    return SteeringPlan.from_vectors({HOOK: towards}, coefficient=0.1, median_norms={HOOK: 8.0})


@pytest.mark.parametrize(("factor", "sign"), [(1.0, "as labelled"), (-1.0, "reversed")])
def test_the_sign_is_checked_on_the_behaviour(model, factor, sign):
    plan = gradient_plan(model)
    turned = SteeringPlan.from_vectors(
        {HOOK: factor * plan.vectors[0].direction}, median_norms={HOOK: 8.0}
    )
    found = calibrate(turned, model, TEXTS, budget=1.0, behaviour=BEHAVIOUR, grid=(0.1, 0.2))
    assert found.sign == sign
    if factor > 0:
        assert found.apply(turned).provenance["calibration"]["sign"] == "as labelled"
    else:
        with pytest.warns(UserWarning, match="points the wrong way"):
            found.apply(turned)
    assert calibrate(turned, model, TEXTS, budget=1.0, grid=(0.1,)).sign is None


def test_per_layer_calibration_scales_what_each_layer_affords_alone(model):
    generator = torch.Generator().manual_seed(8)
    hooks = ["blocks.0.hook_resid_post", HOOK]
    plan = SteeringPlan.from_vectors(
        {h: torch.randn(models.D_MODEL, generator=generator) for h in hooks},
        coefficient=0.1,
        median_norms={hooks[0]: 2.0, hooks[1]: 20.0},
    )
    budget = cost(model, plan, 0.1, "kl") / 2
    alone = [
        calibrate(
            replace(plan, vectors=(v,)), model, TEXTS, budget=budget, unit="kl", curve=False
        ).coefficient
        for v in plan.vectors
    ]
    found = calibrate(plan, model, TEXTS, budget=budget, unit="kl", per_layer=True)
    assert alone[0] != alone[1]
    assert found.coefficients[hooks[0]] / found.coefficients[HOOK] == pytest.approx(
        alone[0] / alone[1]
    )
    assert max(found.coefficients.values()) == found.coefficient <= max(alone)
    steered = found.apply(plan)
    assert {v.hook_name: v.coefficient for v in steered.vectors} == found.coefficients
    with pytest.raises(ArgumentError, match="this calibration is for"):
        found.apply(replace(plan, vectors=plan.vectors[:1]))


def test_bad_arguments_are_explained(model, plan):
    with pytest.raises(ArgumentError, match=r"even coefficient 0\.005 costs"):
        calibrate(plan, model, TEXTS, budget=1e-9, unit="kl")
    host = as_host(models.hf("llama"), tokenizer=models.tokenizer(bos=False))
    with pytest.raises(DataError, match="every text is a single token, so nothing is predicted"):
        calibrate(plan, host, ["cat", "sun"])
    with pytest.raises(ArgumentError, match="grid must hold positive"):
        calibrate(plan, model, TEXTS, grid=(-0.1, 0.1))
    with pytest.raises(ArgumentError, match="budget must be"):
        calibrate(plan, model, TEXTS, budget=0.0)
    with pytest.raises(ArgumentError, match="unit must be one of"):
        calibrate(plan, model, TEXTS, unit="bits")
    with pytest.raises(DataError, match="texts is empty"):
        calibrate(plan, model, [])


@pytest.mark.parametrize("n_within", range(1, len(DEFAULT_GRID) + 1))
def test_the_search_finds_the_last_point_within_the_budget_from_wherever_it_begins(n_within):
    steps = sorted(DEFAULT_GRID)
    for near in steps:
        rows = search(
            lambda c: {"coefficient": c, "cost": 0.45 if steps.index(c) < n_within else 0.55},
            steps,
            0.5,
            near,
        )
        assert _within(rows, steps, 0.5, "it") == steps[n_within - 1]
        assert len(rows) == len({row["coefficient"] for row in rows}) <= 9
        if near == steps[n_within - 1]:  # this one, and the next that is too large
            assert len(rows) == (2 if n_within < len(steps) else 1)


@pytest.mark.parametrize("limit", [0.011, 0.07, 0.13, 0.41])
def test_where_damage_grows_with_the_square_three_measurements_find_the_coefficient(limit):
    steps = sorted(DEFAULT_GRID)
    for near in steps:
        rows = search(lambda c: {"coefficient": c, "cost": (c / limit) ** 2}, steps, 1.0, near)
        assert _within(rows, steps, 1.0, "it") == max(c for c in steps if c <= limit)
        assert len(rows) <= 3


def test_a_curve_reaches_from_a_quarter_of_what_was_found_to_five_times_the_budget(model, plan):
    budget = cost(model, plan, 0.1, "kl") * 1.01
    found = calibrate(plan, model, TEXTS, budget=budget, unit="kl")
    points = [row["coefficient"] for row in found.curve]
    assert points[1] <= 0.3 * found.coefficient < found.coefficient
    assert found.curve[-1]["cost"] > 5 * budget or points[-1] >= 4 * found.coefficient
    mirrored = calibrate(plan, model, TEXTS, budget=budget, unit="kl", negative=True)
    there = {row["coefficient"] for row in mirrored.curve}
    assert {c for c in there if c >= 0} == set(points)
    assert {-c for c in there if c < 0} <= set(points)


def test_a_length_is_searched_as_far_as_a_share_of_the_norm(model, plan):
    """The same steering, its strength as a length: the same curve, in other units."""
    host = as_host(model)
    norm = NeutralTexts(host, TEXTS).median_norm(HOOK)
    share = SteeringPlan.from_vectors(
        {HOOK: plan.vectors[0].direction}, coefficient=0.1, median_norms={HOOK: norm}
    )
    length = SteeringPlan.from_vectors(
        {HOOK: plan.vectors[0].direction}, coefficient=0.1 * norm, relative_to="unit"
    )
    budget = cost(model, share, 0.3, "kl")
    found, in_length = (
        calibrate(p, model, TEXTS, budget=budget, unit="kl", curve=False) for p in (share, length)
    )
    assert found.coefficient > 0.25
    assert in_length.coefficient == pytest.approx(found.coefficient * norm, rel=1e-5)
    two = SteeringPlan.from_vectors(
        {HOOK: plan.vectors[0].direction, "blocks.0.hook_resid_post": plan.vectors[0].direction},
        coefficient=0.1 * norm,
        relative_to="unit",
    )
    per_layer = calibrate(two, model, TEXTS, budget=budget, unit="kl", per_layer=True)
    assert max(per_layer.coefficients.values()) > 0.1 * norm


@pytest.mark.parametrize("per_layer", [False, True])
def test_signs_are_kept(model, per_layer):
    """A plan that steers away is calibrated on its side of zero, each of its layers on its own."""
    g = torch.Generator().manual_seed(2)
    names = (HOOK, "blocks.0.hook_resid_post")
    plan = SteeringPlan.from_vectors(
        {name: torch.randn(models.D_MODEL, generator=g) for name in names},
        coefficient=0.1,
        median_norms=dict.fromkeys(names, 8.0),
    )
    for signs in ((1, -1), (-1, 1), (-1, -1)):
        vectors = tuple(
            replace(v, coefficient=sign * c)
            for v, sign, c in zip(plan.vectors, signs, (0.1, 0.08), strict=True)
        )
        mixed = replace(plan, vectors=vectors)
        budget = 0.5 * cost(model, mixed, -0.3 if signs[0] < 0 else 0.3, "kl")
        found = calibrate(
            mixed, model, TEXTS, budget=budget, unit="kl", per_layer=per_layer, behaviour=BEHAVIOUR
        )
        own = {v.hook_name: v.coefficient for v in vectors}
        assert all(found.coefficients[name] * own[name] > 0 for name in names)
        coefficients = [row["coefficient"] for row in found.curve]
        assert coefficients == sorted(coefficients)
        row = next(r for r in found.curve if r["coefficient"] == found.coefficient)
        again = found.apply(mixed) if found.sign != "reversed" else None
        if again is not None:
            paid = cost(model, again, max((v.coefficient for v in again.vectors), key=abs), "kl")
            assert paid == pytest.approx(row["cost"], abs=1e-6)
            assert paid <= budget


def test_the_sign_of_the_effect_is_read_with_that_of_the_coefficient(model):
    towards = gradient_plan(model)
    for coefficient, sign in ((0.05, "as labelled"), (-0.05, "as labelled")):
        found = calibrate(
            towards.with_coefficient(coefficient),
            model,
            TEXTS,
            budget=10.0,
            grid=[0.05],
            behaviour=BEHAVIOUR,
        )
        assert found.coefficient == coefficient
        assert found.sign in (sign, "unclear")
        effect = next(r["effect"] for r in found.curve if r["coefficient"] == coefficient)
        assert effect * coefficient > 0


def test_a_cost_that_is_no_number_is_over_the_budget():
    from expertsteer_lens.measure.calibration import OverBudgetError, _banded, _within

    steps = (0.1, 0.2, 0.3, 0.4)

    def measure(coefficient: float) -> dict[str, float]:
        return {
            "coefficient": coefficient,
            "cost": math.nan if coefficient > 0.25 else coefficient**2,
        }

    for near in (0.1, 0.3, 0.4):
        rows = search(measure, steps, 1.0, near)
        assert _within(rows, steps, 1.0, "it") == 0.2
    assert [r["coefficient"] for r in walk(measure, steps, 1.0)] == [0.1, 0.2, 0.3]
    assert [r["band"] for r in _banded([measure(c) for c in steps], 1.0)] == [
        "usable",
        "usable",
        "broken",
        "broken",
    ]
    with pytest.raises(OverBudgetError, match="costs nan"):
        _within([{"coefficient": 0.1, "cost": math.nan}], steps, 1.0, "it")


def test_a_model_that_overflows_without_steering_is_refused(model, monkeypatch):
    host = as_host(model)
    whole = type(host).logits_at
    monkeypatch.setattr(type(host), "logits_at", lambda *a, **k: whole(*a, **k) * math.nan)
    with pytest.raises(DataError, match="load the model in float32"):
        NeutralTexts(host, TEXTS)
