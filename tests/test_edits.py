"""Edits are pure functions with laws: identities, projections, norms, masks, dtypes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, WidthError
from expertsteer_lens.interventions import edits
from expertsteer_lens.interventions.edits import EDITS, Edit, find_edit, register_edit
from expertsteer_lens.interventions.vector_edit import VectorEdit

WEIGHTS = torch.linspace(-0.5, 1.0, 8, dtype=torch.float64)


def parameters_of(name: str) -> dict[str, Tensor]:
    """Those of `EVERY_EDIT`."""
    own = {"weights": WEIGHTS, "bias": torch.tensor(0.5)}
    return {key: own[key] for key in EDITS[name].parameters}


EVERY_EDIT = {
    "add": lambda x, v, **k: edits.add(x, 1.5 * v, **k),
    "add_relative": lambda x, v, **k: edits.add_relative(x, v, coefficient=0.6, **k),
    "add_contextual": lambda x, v, **k: edits.add_contextual(
        x, v, coefficient=0.6, weights=WEIGHTS, bias=0.5, **k
    ),
    "ablate": edits.ablate,
    "rescale": lambda x, v, **k: edits.rescale(x, v, coefficient=-1.5, **k),
    "clamp": lambda x, v, **k: edits.clamp(x, v, low=2.0, high=2.0, **k),
}


def sample(seed: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    v = torch.randn(8, generator=generator, dtype=torch.float64)
    w = torch.randn(8, generator=generator, dtype=torch.float64)
    return x.to(dtype), v.to(dtype), w.to(dtype)


def along(x: Tensor, v: Tensor) -> Tensor:
    return x @ (v / v.norm())


seeds = st.integers(0, 10_000)
few = settings(max_examples=15, deadline=None)


@few
@given(seeds)
def test_adding_a_then_b_is_adding_their_sum(seed: int) -> None:
    x, v, w = sample(seed)
    torch.testing.assert_close(edits.add(edits.add(x, v), w), edits.add(x, v + w))


@few
@given(seeds)
def test_ablate_leaves_nothing_along_the_direction_and_everything_else(seed: int) -> None:
    x, v, w = sample(seed)
    out = edits.ablate(x, v)
    across = w - along(w, v) * v / v.norm()
    torch.testing.assert_close(along(out, v), torch.zeros(2, 3, dtype=x.dtype), atol=1e-10, rtol=0)
    torch.testing.assert_close(out @ across, x @ across)


@few
@given(seeds)
def test_ablate_is_idempotent_and_half_ablate_is_not(seed: int) -> None:
    x, v, _ = sample(seed)
    torch.testing.assert_close(edits.ablate(edits.ablate(x, v), v), edits.ablate(x, v))
    half = edits.ablate(x, v, coefficient=0.5)
    torch.testing.assert_close(along(half, v), 0.5 * along(x, v))
    assert not torch.allclose(edits.ablate(half, v, strength=0.5), half)


@few
@given(seeds, st.floats(-2, 2))
def test_rescale_multiplies_the_component_only(seed: int, factor: float) -> None:
    x, v, _ = sample(seed)
    out = edits.rescale(x, v, coefficient=factor - 1)
    torch.testing.assert_close(along(out, v), factor * along(x, v), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(edits.ablate(out, v), edits.ablate(x, v), atol=1e-4, rtol=1e-4)


@few
@given(seeds, st.floats(-1, 1), st.floats(0, 1))
def test_clamp_puts_the_projection_between_its_bounds_and_touches_nothing_else(
    seed: int, low: float, width: float
) -> None:
    x, v, _ = sample(seed)
    out = edits.clamp(x, v, low=low, high=low + width)
    torch.testing.assert_close(along(out, v), along(x, v).clamp(low, low + width))
    torch.testing.assert_close(edits.ablate(out, v), edits.ablate(x, v))
    torch.testing.assert_close(edits.clamp(out, v, low=low, high=low + width), out)


def test_clamp_with_one_bound_leaves_the_other_side_alone() -> None:
    x, v, _ = sample(0)
    assert float(along(x, v).min()) < 0.3 < float(along(x, v).max())
    torch.testing.assert_close(along(edits.clamp(x, v, low=0.3), v), along(x, v).clamp(min=0.3))
    torch.testing.assert_close(along(edits.clamp(x, v, high=0.3), v), along(x, v).clamp(max=0.3))


@pytest.mark.parametrize("name", EVERY_EDIT)
def test_preserve_norm_changes_the_angle_and_keeps_the_norm(name: str) -> None:
    x, v, _ = sample(1)
    plain, kept = EVERY_EDIT[name](x, v), EVERY_EDIT[name](x, v, preserve_norm=True)
    torch.testing.assert_close(kept.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(plain.norm(dim=-1), x.norm(dim=-1), rtol=1e-3)
    torch.testing.assert_close(
        torch.cosine_similarity(kept, plain, dim=-1), torch.ones(2, 3, dtype=x.dtype)
    )


@pytest.mark.parametrize("name", EVERY_EDIT)
def test_the_length_of_a_direction_does_not_matter_but_that_of_a_delta_does(name: str) -> None:
    x, v, _ = sample(2)
    same = torch.allclose(EVERY_EDIT[name](x, v), EVERY_EDIT[name](x, 7 * v))
    assert same == (name != "add")


@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("name", EVERY_EDIT)
def test_tokens_outside_the_mask_come_back_bit_for_bit(name: str, preserve_norm: bool) -> None:
    x, v, _ = sample(3, dtype=torch.float32)
    mask = torch.tensor([[True, False, False], [False, False, True]])
    before = x.clone()
    out = EVERY_EDIT[name](x, v, mask=mask, preserve_norm=preserve_norm)
    assert torch.equal(out[~mask], x[~mask])
    torch.testing.assert_close(out[mask], EVERY_EDIT[name](x, v, preserve_norm=preserve_norm)[mask])
    assert not torch.allclose(out[mask], x[mask])
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY_EDIT)
def test_dtype_is_kept_and_a_float32_direction_may_meet_any(name: str, dtype: torch.dtype) -> None:
    x, v, _ = sample(4)
    out = EVERY_EDIT[name](x.to(dtype), v.float())
    assert out.dtype == dtype
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 3e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(out.double(), EVERY_EDIT[name](x, v), atol=tolerance, rtol=tolerance)


def test_float64_activations_are_not_squeezed_through_float32() -> None:
    x, v, _ = sample(5)
    left = along(edits.ablate(x, v), v).abs().max()
    assert float(left) < 1e-14


def test_a_zero_delta_is_bit_equal_and_so_is_coefficient_zero() -> None:
    x, v, _ = sample(6, dtype=torch.float32)
    assert torch.equal(edits.add(x, 0 * v), x)
    assert torch.equal(edits.rescale(x, v, coefficient=0.0), x)


def test_coefficients_may_differ_by_row() -> None:
    x, v, _ = sample(7)
    per_row = torch.tensor([[0.0], [1.0]], dtype=x.dtype)
    out = edits.ablate(x, v, coefficient=per_row)
    torch.testing.assert_close(out[0], x[0])
    torch.testing.assert_close(out[1], edits.ablate(x, v)[1])


def test_gradients_flow_to_the_delta() -> None:
    x, v, _ = sample(8)
    v.requires_grad_(True)
    edits.add(x, v).sum().backward()
    torch.testing.assert_close(v.grad, torch.full_like(v, 6.0))


def test_centre_is_the_projection_along_ones() -> None:
    x, _, _ = sample(9)
    torch.testing.assert_close(edits.centre(x), edits.ablate(x, torch.ones(8, dtype=x.dtype)))


def test_errors_name_the_argument_and_what_arrived() -> None:
    x, v, _ = sample(10)
    with pytest.raises(WidthError, match="delta has width 5, but the activations have width 8"):
        edits.add(x, torch.ones(5, dtype=x.dtype))
    with pytest.raises(WidthError, match="direction has width 5"):
        edits.ablate(x, torch.ones(5, dtype=x.dtype))
    with pytest.raises(ArgumentError, match=r"mask must have shape \(2, 3\), got \(2, 2\)"):
        edits.add(x, v, mask=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="needs low, high or both"):
        edits.clamp(x, v)
    with pytest.raises(ArgumentError, match="needs low <= high, got low=1"):
        edits.clamp(x, v, low=1.0, high=0.0)
    with pytest.raises(ArgumentError, match="the norm of direction must be a number"):
        edits.ablate(x, torch.zeros(8, dtype=x.dtype))
    with pytest.raises(ArgumentError, match="rescale needs a coefficient"):
        edits.rescale(x, v)


def test_the_old_keywords_still_work_and_say_the_new_one() -> None:
    x, v, _ = sample(11)
    with pytest.warns(DeprecationWarning, match=r"ablate\(strength=s\) is now .*coefficient=s\)"):
        assert torch.equal(edits.ablate(x, v, strength=0.3), edits.ablate(x, v, coefficient=0.3))
    with pytest.warns(DeprecationWarning, match=r"factor=f\) is now .*coefficient=f - 1\)"):
        old = edits.rescale(x, v, factor=1.7)
    torch.testing.assert_close(old, edits.rescale(x, v, coefficient=0.7))


# -- the table ------------------------------------------------------------------------------------


def mirror(activations: Tensor, direction: Tensor, coefficient: float | Tensor) -> Tensor:
    return activations - (2 * coefficient * (activations @ direction))[..., None] * direction


@pytest.fixture
def mirrored() -> Iterator[Edit]:
    edit = Edit(mirror, coefficient="fraction")
    register_edit("mirror", edit)
    yield edit
    del EDITS["mirror"]


@pytest.mark.parametrize("name", EDITS)
def test_the_table_holds_the_functions_above(name: str) -> None:
    x, v, _ = sample(12)
    unit, c = v / v.norm(), 0.7
    same = {
        "add": lambda: edits.add(x, c * unit),
        "add_relative": lambda: edits.add_relative(x, v, coefficient=c),
        "add_contextual": lambda: edits.add_contextual(
            x, v, coefficient=c, weights=WEIGHTS, bias=0.5
        ),
        "ablate": lambda: edits.ablate(x, v, coefficient=c),
        "rescale": lambda: edits.rescale(x, v, coefficient=c),
        "clamp": lambda: edits.clamp(x, v, low=torch.tensor(c)),  # which float32 rounds
    }
    made = EDITS[name].function(x, unit, c, **parameters_of(name))
    torch.testing.assert_close(made, same[name]())
    assert EDITS[name].is_constant == (name == "add")


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_by_row_is_the_edit_of_each_row(name: str) -> None:
    x, v, _ = sample(13, dtype=torch.float32)
    own = {"centred": True, "parameters": parameters_of(name)}
    one = VectorEdit(EDITS[name], "h", v / v.norm(), 0.8, **own)
    rows = torch.tensor([2.0, -1.0])
    whole = one(x, rows=rows)
    for i, factor in enumerate(rows.tolist()):
        alone = VectorEdit(EDITS[name], "h", v / v.norm(), 0.8 * factor, **own)
        torch.testing.assert_close(whole[i], alone(x)[i])


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_in_the_centred_basis_is_done_on_what_is_left_of_the_mean(name: str) -> None:
    x, v, _ = sample(14)
    if name not in ("add", "add_relative", "add_contextual"):  # these need a mean-free direction
        v = edits.centre(v)
    own = {"centred": True, "parameters": parameters_of(name)}
    one = VectorEdit(EDITS[name], "h", v / v.norm(), 0.8, **own)
    shift = torch.randn(2, 3, 1, dtype=x.dtype)
    torch.testing.assert_close(one(x + shift) - shift, one(x))
    torch.testing.assert_close(one(x).mean(-1), x.mean(-1))


@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_without_weights_a_strength_by_context_is_the_fixed_one(
    centred: bool, preserve_norm: bool
) -> None:
    x, v, _ = sample(16)  # v has a mean of its own
    rest = {"centred": centred, "preserve_norm": preserve_norm}
    own = {"weights": torch.zeros(8), "bias": torch.tensor(1.0)}
    fixed = VectorEdit(EDITS["add"], "h", v / v.norm(), 0.8, **rest)(x)
    learnt = VectorEdit(EDITS["add_contextual"], "h", v / v.norm(), 0.8, parameters=own, **rest)
    torch.testing.assert_close(learnt(x), fixed)
    assert not torch.allclose(fixed, x)


def test_a_strength_by_context_reads_each_token_and_the_coefficient_scales_the_whole() -> None:
    x, v, _ = sample(17)
    out = EVERY_EDIT["add_contextual"](x, v)
    strengths = ((out - x) @ (v / v.norm())) / 0.6
    torch.testing.assert_close(strengths, 0.5 + x @ WEIGHTS)
    twice = edits.add_contextual(x, v, coefficient=1.2, weights=WEIGHTS, bias=0.5)
    torch.testing.assert_close(twice - x, 2 * (out - x))
    with pytest.raises(WidthError, match="weights has width 5, but the activations have width 8"):
        edits.add_contextual(x, v, coefficient=1.0, weights=WEIGHTS[:5])


def test_an_edit_of_ones_own_is_known_by_its_name(mirrored: Edit) -> None:
    x, v, _ = sample(15)
    assert find_edit("mirror") is mirrored
    out = VectorEdit(mirrored, "h", v / v.norm(), 1.0)(x)
    torch.testing.assert_close(along(out, v), -along(x, v))
    register_edit("mirror", mirrored)  # the same again is no conflict


def test_what_is_no_edit_cannot_be_registered(mirrored: Edit) -> None:
    with pytest.raises(ArgumentError, match="there is already an edit 'mirror'"):
        register_edit("mirror", Edit(mirror, coefficient="length"))
    with pytest.raises(ArgumentError, match="there is already an edit 'add'"):
        register_edit("add", mirrored)
    with pytest.raises(ArgumentError, match=r"must be an Edit\(function"):
        register_edit("other", mirror)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="must be a plain word, got 'my edit'"):
        register_edit("my edit", mirrored)
    with pytest.raises(ArgumentError, match="needs a function of"):
        Edit("mirror")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"coefficient must be one of \['fraction', 'length'\]"):
        Edit(mirror, coefficient="size")  # type: ignore[arg-type]
    with pytest.raises(
        ArgumentError, match=r"closest: 'mirror'\. One of your own must be registered"
    ):
        find_edit("mirrors")


CELL = """
from expertsteer_lens.interventions.edits import Edit, register_edit
def halve(activations, direction, coefficient):
    return activations * (1 - 0.5 * coefficient)
register_edit("mine", Edit(halve, coefficient="fraction"))
"""


def test_a_cell_that_registers_may_be_run_again():
    cell = {"__name__": "__main__"}
    try:
        exec(CELL, cell)
        first = EDITS["mine"]
        exec(CELL, cell)
        assert EDITS["mine"] is not first  # the new definition is the one that counts
        other = CELL.replace("halve", "third")
        with pytest.raises(ArgumentError, match="there is already an edit 'mine'"):
            exec(other, cell)
        with pytest.raises(ArgumentError, match="there is already an edit 'add'"):
            exec(CELL.replace('"mine"', '"add"'), cell)
    finally:
        EDITS.pop("mine", None)
