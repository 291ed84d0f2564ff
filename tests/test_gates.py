"""Gates on tensors: scores, thresholds fitted on validation data, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from expertsteer_lens.errors import ArgumentError, DataError, WidthError
from expertsteer_lens.interventions.gates import Gate, fit_gate

W = torch.tensor([1.0, -2.0, 0.5])


def data(n: int = 60, *, shift: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % 2).float()
    return torch.randn(n, 3, generator=generator) + shift * labels[:, None] * W / W.norm(), labels


def balanced_accuracy(gate: Gate, x: Tensor, y: Tensor) -> float:
    opened = gate.is_open(x)
    return float((opened[y == 1].float().mean() + (~opened[y == 0]).float().mean()) / 2)


def test_a_linear_score_is_the_inner_product_whatever_the_leading_axes() -> None:
    gate = Gate(direction=W, threshold=0.5)
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(gate.scores(x), x @ W)
    assert torch.equal(gate.is_open(x), x @ W >= 0.5)
    assert torch.equal(Gate(direction=W, threshold=0.5, opens="below").is_open(x), x @ W < 0.5)


def test_any_score_of_rows_will_do() -> None:
    gate = Gate(score=lambda rows: rows.norm(dim=1), threshold=1.0)
    x = torch.randn(2, 4, 3)
    assert torch.equal(gate.is_open(x), x.norm(dim=-1) >= 1.0)


def test_the_fitted_threshold_is_the_best_of_all_thresholds() -> None:
    x, y = data()
    gate = fit_gate(x, y, direction=W)
    scores = x @ W
    every = [balanced_accuracy(Gate(direction=W, threshold=float(t)), x, y) for t in scores]
    assert balanced_accuracy(gate, x, y) == pytest.approx(max(every))
    assert balanced_accuracy(gate, x, y) > 0.75
    assert float(scores.min()) < gate.threshold < float(scores.max())


def test_the_threshold_lies_in_the_middle_of_the_widest_gap_of_separable_data() -> None:
    x = torch.tensor([[0.0], [1.0], [5.0], [6.0]])
    gate = fit_gate(x, torch.tensor([0, 0, 1, 1]), direction=torch.ones(1))
    assert gate.threshold == 3.0


def test_a_direction_the_wrong_way_round_opens_for_all_or_is_no_better_than_that() -> None:
    x, y = data(shift=6.0)
    assert balanced_accuracy(fit_gate(x, y, direction=-W), x, y) < 0.6
    assert balanced_accuracy(fit_gate(x, y, direction=W), x, y) > 0.95


def test_equal_scores_cannot_be_told_apart() -> None:
    x = torch.ones(4, 3)
    gate = fit_gate(x, torch.tensor([0, 1, 0, 1]), direction=W)
    assert gate.is_open(x).all()


def test_shuffled_labels_fit_a_gate_that_fails_on_new_data() -> None:
    x, y = data(400)
    new, truth = data(400, seed=1)
    shuffled = y[torch.randperm(400, generator=torch.Generator().manual_seed(2))]
    real = balanced_accuracy(fit_gate(x, y, direction=W), new, truth)
    noise_direction = torch.tensor([2.0, 1.0, 0.0])  # orthogonal to what separates the classes
    noise = balanced_accuracy(fit_gate(x, shuffled, direction=noise_direction), new, truth)
    assert real > 0.8
    assert abs(noise - 0.5) < 0.1


def test_a_gate_goes_to_json_and_back() -> None:
    gate = fit_gate(*data(), direction=W, hook_name="blocks.0.hook_resid_post", per="token")
    back = Gate.from_dict(gate.to_dict())
    x = torch.randn(50, 3)
    assert torch.equal(back.is_open(x), gate.is_open(x))
    assert (back.hook_name, back.per, back.opens, back.threshold) == (
        gate.hook_name,
        "token",
        "above",
        gate.threshold,
    )
    assert "per token, at blocks.0.hook_resid_post" in repr(gate)
    with pytest.raises(ArgumentError, match="callable score and cannot be written"):
        Gate(score=lambda rows: rows[:, 0], threshold=0.0).to_dict()


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"threshold": 0.0}, ArgumentError, "exactly one of direction and score"),
        (
            {"threshold": 0.0, "direction": W, "score": len},
            ArgumentError,
            "exactly one of direction and score",
        ),
        ({"threshold": float("nan"), "direction": W}, ArgumentError, "threshold must be a number"),
        ({"threshold": 0.0, "direction": W, "per": "batch"}, ArgumentError, "per must be one of"),
        ({"threshold": 0.0, "direction": W, "opens": "up"}, ArgumentError, "opens must be one of"),
        ({"threshold": 0.0, "direction": torch.zeros(3)}, DataError, "finite nonzero vector"),
        ({"threshold": 0.0, "direction": torch.ones(1, 3)}, DataError, r"got shape \(1, 3\)"),
    ],
)
def test_a_bad_gate_is_refused(fields: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Gate(**fields)


def test_widths_and_score_shapes_are_checked() -> None:
    with pytest.raises(WidthError, match="gate's direction has width 3, the activations 5"):
        Gate(direction=W, threshold=0.0).scores(torch.ones(2, 5))
    with pytest.raises(DataError, match=r"must return shape \(2,\), got \(2, 3\)"):
        Gate(score=lambda rows: rows, threshold=0.0).scores(torch.ones(2, 3))
    with pytest.raises(DataError, match="two classes"):
        fit_gate(torch.ones(3, 3), torch.ones(3), direction=W)
