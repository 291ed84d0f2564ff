from __future__ import annotations

import pytest
import torch

from expertsteer_lens.errors import ArgumentError, DataError, WidthError
from expertsteer_lens.pair import RULES, PairingConfig, register_rule, select_layer_pairs

EXPERT = [f"blocks.{i}.hook_resid_post" for i in range(3)]
TARGET = [f"blocks.{i}.hook_resid_post" for i in range(4)]
SCORES = torch.arange(12, dtype=torch.float64).reshape(3, 4)
NO_SKIP = {"skip_first": 0, "skip_last": 0}


def pick(rule: str, scores: torch.Tensor | None = SCORES, seed: int = 0, **kwargs):
    return select_layer_pairs(
        EXPERT, TARGET, PairingConfig(rule=rule, **kwargs), scores=scores, seed=seed
    )


def test_attribution_and_max_mi_take_the_highest_score_and_min_mi_the_lowest():
    assert pick("attribution", **NO_SKIP).keys() == [(EXPERT[2], TARGET[3])]
    assert pick("max_mi", **NO_SKIP).keys() == [(EXPERT[2], TARGET[3])]
    assert pick("min_mi", **NO_SKIP).keys() == [(EXPERT[0], TARGET[0])]


def test_end_layers_of_the_target_are_skipped_by_default():
    assert pick("max_mi").keys() == [(EXPERT[2], TARGET[2])]
    assert pick("min_mi").keys() == [(EXPERT[0], TARGET[1])]


def test_several_pairs_have_distinct_target_layers_best_first():
    pairs = pick("attribution", n_pairs=3, **NO_SKIP)
    assert [p.target for p in pairs] == [TARGET[3], TARGET[2], TARGET[1]]
    assert [p.score for p in pairs] == [11.0, 10.0, 9.0]


def test_cells_without_a_score_are_never_chosen():
    scores = torch.full((3, 4), torch.nan, dtype=torch.float64)
    scores[1, 2] = -5.0
    assert pick("attribution", scores).keys() == [(EXPERT[1], TARGET[2])]
    with pytest.raises(ArgumentError, match="only 1 pairs have a score"):
        pick("attribution", scores, n_pairs=2)


def test_depth_pairs_equal_relative_depths():
    pairs = select_layer_pairs(EXPERT, EXPERT, PairingConfig(rule="depth", n_pairs=3, **NO_SKIP))
    assert sorted(pairs.keys()) == [(h, h) for h in EXPERT]


def test_random_depends_on_the_seed_and_only_on_it():
    keys = {seed: tuple(pick("random", None, seed=seed, **NO_SKIP).keys()) for seed in range(8)}
    assert keys[0] == tuple(pick("random", None, seed=0, **NO_SKIP).keys())
    assert len(set(keys.values())) > 1


def test_the_table_lists_every_allowed_pair_and_marks_the_chosen():
    frame = pick("min_mi").to_pandas()
    assert len(frame) == 6
    assert frame.chosen.tolist() == [True] + [False] * 5
    assert frame.score.is_monotonic_increasing


def test_the_pairs_draw_themselves():
    pytest.importorskip("plotly")
    pairs = pick("min_mi")
    figure = pairs.plot()
    best = pairs[0]
    assert best.expert.split(".")[1] in figure.layout.title.text
    drawn = [v for row in figure.data[0].z for v in row if v is not None]
    assert sorted(drawn) == sorted(pairs.to_pandas().score)


def test_scores_are_not_changed():
    scores = SCORES.clone()
    pick("min_mi", scores)
    assert torch.equal(scores, SCORES)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rule": "best"}, "rule must be one of"),
        ({"n_pairs": 0}, "n_pairs must be an integer"),
        ({"n_candidates": 0}, "n_candidates must be an integer"),
        ({"skip_first": -1}, "skip_first must be"),
        ({"skip_last": 1.5}, "skip_last must be an integer"),
    ],
)
def test_configuration_errors_name_the_field(kwargs, message):
    with pytest.raises(ArgumentError, match=message):
        PairingConfig(**kwargs)


def test_bad_scores_are_refused():
    with pytest.raises(ArgumentError, match="needs scores"):
        pick("min_mi", None)
    with pytest.raises(WidthError, match=r"shape \(3, 4\)"):
        pick("max_mi", SCORES.T)
    with pytest.raises(DataError, match="NaN or Inf"):
        pick("max_mi", torch.full((3, 4), torch.nan))
    with pytest.raises(ArgumentError, match="leave none of 4"):
        pick("max_mi", skip_first=2, skip_last=2)
    with pytest.raises(ArgumentError, match="n_pairs=3"):
        pick("max_mi", n_pairs=3)


def test_a_rule_of_ones_own_is_one_entry_in_the_table():
    @register_rule("own", needs="mi", lowest_first=True)
    def squares(scores, shape, seed):
        assert shape == (3, 4)
        return (scores - 5) ** 2

    try:
        pairs = pick("own", n_pairs=2, **NO_SKIP)
        assert pairs.keys() == [(EXPERT[1], TARGET[1]), (EXPERT[1], TARGET[0])]
        assert pairs.to_pandas().score.is_monotonic_increasing
        with pytest.raises(ArgumentError, match="needs scores: pass the matrix of mutual"):
            pick("own", None)
        with pytest.raises(ArgumentError, match="there is already a rule 'own'"):
            register_rule("own")(squares)
    finally:
        del RULES["own"]
    with pytest.raises(ArgumentError, match="needs must be one of"):
        register_rule("other", needs="gradients")


def test_a_rule_that_gives_another_shape_is_refused():
    register_rule("flat")(lambda scores, shape, seed: torch.zeros(shape[1]))
    try:
        with pytest.raises(WidthError, match=r"rule 'flat' must give scores of shape \(3, 4\)"):
            pick("flat", None)
    finally:
        del RULES["flat"]


def test_rules_say_what_they_need():
    assert {name: RULES[name].needs for name in RULES} == {
        "attribution": "effects",
        "min_mi": "mi",
        "max_mi": "mi",
        "depth": "nothing",
        "random": "nothing",
    }
