"""Labels for unlabelled texts from a few labelled ones: what is found, and what is refused."""

from __future__ import annotations

import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens import zoo
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.pipeline.labelling import LabelledTexts, best_cut, score_states


def states(
    n: int = 200, d: int = 30, *, nuisance: float = 0.0, share: float = 0.5, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[n, d]` that differ along coordinate 0 by label (share of label 1), and by `nuisance`
    along coordinate 1 at random."""
    g = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) < share * n).double()
    rows = torch.randn(n, d, generator=g, dtype=torch.float64)
    rows[:, 0] += 5 * labels
    rows[:, 1] += nuisance * (torch.rand(n, generator=g) < 0.5)
    return rows, labels


def few(n_pairs: int, *, shift: float = 0.0, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Labelled rows of the same world, all of them moved by `shift`."""
    rows, labels = states(2 * n_pairs, seed=seed)
    return rows + shift, labels


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return float(((scores > best_cut(scores)) == (labels > 0.5)).double().mean())


def test_self_training_finds_what_the_texts_divide_into():
    heap, labels = states()
    pairs, signs = few(1)
    alone = score_states([pairs], signs, [heap], n_rounds=0)
    trained = score_states([pairs], signs, [heap], n_rounds=4)
    assert accuracy(trained, labels) > 0.97 > accuracy(alone, labels)


def test_classes_of_unequal_size_are_not_cut_in_the_middle():
    heap, labels = states(share=0.2)
    scores = score_states([few(2)[0]], few(2)[1], [heap])
    assert accuracy(scores, labels) > 0.97
    assert abs(float((scores > best_cut(scores)).double().mean()) - 0.2) < 0.05


def test_labelled_texts_may_be_of_another_kind():
    heap, labels = states()
    pairs, signs = few(2, shift=100.0)
    assert accuracy(score_states([pairs], signs, [heap]), labels) > 0.97


def test_swapped_labels_swap_the_scores():
    heap, _ = states()
    pairs, signs = few(2)
    forwards = score_states([pairs], signs, [heap])
    backwards = score_states([pairs], 1 - signs, [heap])
    torch.testing.assert_close(forwards, -backwards)


def test_flattening_keeps_self_training_from_a_larger_division():
    heap, labels = states(nuisance=30.0)
    pairs, signs = few(8)
    drifted = score_states([pairs], signs, [heap], flatten=1)
    kept = score_states([pairs], signs, [heap], flatten=3)
    assert accuracy(kept, labels) > 0.9 > accuracy(drifted, labels)


def test_flatten_larger_than_the_rank_is_the_rank():
    heap, labels = states(n=6, d=3)
    assert score_states([few(2)[0][:, :3]], few(2)[1], [heap], flatten=50).isfinite().all()
    assert len(labels) == 6


def test_layers_without_variation_are_left_out():
    heap, _ = states()
    pairs, signs = few(2)
    both = score_states([pairs, pairs], signs, [torch.ones_like(heap), heap])
    torch.testing.assert_close(both, score_states([pairs], signs, [heap]))
    with pytest.raises(DataError, match="same state at every layer"):
        score_states([pairs], signs, [torch.ones_like(heap)])


@pytest.fixture(scope="module")
def labelled() -> LabelledTexts:
    expert, _ = zoo.load_pair()
    pairs = zoo.contrast_pairs()
    one = esl.ContrastPairs.from_lists(pairs.positive[:1], pairs.negative[:1])
    return esl.label_texts(expert, one, pairs.texts, progress=False)


def test_an_expert_labels_with_one_pair(labelled):
    known = zoo.contrast_pairs().labels
    assert labelled.agreement(known) > 0.95
    assert labelled.agreement(1 - known) < 0.05
    assert "positive)" in repr(labelled)
    assert list(labelled.to_pandas().columns) == ["text", "score", "label"]
    assert len(labelled.to_pandas()) == len(labelled) == len(known)


def test_pairs_are_the_clearest_first(labelled):
    pairs = labelled.pairs(3)
    order = labelled.scores.argsort(descending=True, stable=True)
    assert pairs.positive == tuple(labelled.texts[i] for i in order[:3])
    assert pairs.negative[0] == labelled.texts[int(order[-1])]
    smaller = min(int(labelled.labels.sum()), int((1 - labelled.labels).sum()))
    assert len(labelled.pairs()) == smaller
    with pytest.raises(ArgumentError, match="n "):
        labelled.pairs(smaller + 1)


def test_bad_input_is_named():
    expert, _ = zoo.load_pair()
    pairs = zoo.contrast_pairs()
    with pytest.raises(DataError, match="at least 4"):
        esl.label_texts(expert, pairs, pairs.texts[:3])
    with pytest.raises(ArgumentError, match="n_rounds"):
        esl.label_texts(expert, pairs, pairs.texts, n_rounds=-1)
    with pytest.raises(ArgumentError, match="flatten"):
        esl.label_texts(expert, pairs, pairs.texts, flatten=0)
    with pytest.raises(DataError, match="pairs must be ContrastPairs, got list"):
        esl.label_texts(expert, [("a", "b")], pairs.texts)
    with pytest.raises(ArgumentError, match="config must be an ExpertSteerConfig"):
        esl.label_texts(expert, pairs, pairs.texts, config={"reading": "last"})


def test_known_labels_are_checked(labelled):
    known = zoo.contrast_pairs().labels
    assert labelled.agreement(2 * known - 1) == labelled.agreement(known)
    with pytest.raises(DataError, match="one label per row"):
        labelled.agreement([1, 0])
    with pytest.raises(DataError, match="NaN"):
        labelled.agreement([float("nan")] * len(known))


def test_shuffled_labels_of_the_pairs_label_at_random():
    heap, labels = states()
    found = []
    for seed in range(40):
        rows, signs = few(4, seed=seed + 10)
        order = torch.randperm(len(signs), generator=torch.Generator().manual_seed(seed))
        found.append(accuracy(score_states([rows], signs[order], [heap]), labels))
    assert 0.25 < sum(found) / len(found) < 0.75


def test_texts_that_nothing_divides_are_labelled_at_random():
    g = torch.Generator().manual_seed(3)
    heap = torch.randn(200, 30, generator=g, dtype=torch.float64)
    labels = (torch.arange(200) < 100).double()
    assert abs(accuracy(score_states([few(4)[0]], few(4)[1], [heap]), labels) - 0.5) < 0.12
