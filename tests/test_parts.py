"""Held out means held out: which texts are in which part is told by their content. No model is run
here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.chat import Chat
from expertsteer_lens.data.contrast import ContrastPairs
from expertsteer_lens.data.parts import hashes_of
from expertsteer_lens.errors import ArgumentError, DataError
from expertsteer_lens.evaluation.run import _not_held_out
from expertsteer_lens.learn.config import RFMConfig
from expertsteer_lens.learn.rfm import fit_rfm
from expertsteer_lens.pipeline.config import ExpertSteerConfig
from expertsteer_lens.pipeline.fit_data import FitTexts, divide_texts, split_anchors

PAIRS = ContrastPairs.from_lists([f"warm {i}" for i in range(8)], [f"cold {i}" for i in range(8)])
ANCHORS = [f"anchor {i}" for i in range(20)]
NEUTRAL = [f"neutral {i}" for i in range(6)]


def prompts(texts: list[str]) -> Behaviour:
    return Behaviour(tuple(texts), (" yes",), (" no",))


def divide(pairs: ContrastPairs = PAIRS, **given: Any) -> FitTexts:
    given = {"anchors": ANCHORS, "behaviour": None, "test_behaviour": None, "neutral": None} | given
    return divide_texts(pairs, ExpertSteerConfig(), 0, **given)


class TestDividingTheTextsOfAFit:
    def test_prompts_to_test_on_need_prompts_to_choose_by(self):
        with pytest.raises(ArgumentError, match="without behaviour, the prompts to choose layers"):
            divide(test_behaviour=prompts(["a", "b"]))

    def test_prompts_that_choose_layers_cannot_test_too(self):
        chosen, tested = prompts(["a", "b", "c"]), prompts(["d", "c"])
        with pytest.raises(DataError, match=r"test_behaviour shares texts with behaviour \(1 of"):
            divide(behaviour=chosen, test_behaviour=tested)
        found = divide(behaviour=chosen, test_behaviour=tested.select([0]))
        assert found.test_behaviour is not None
        assert found.test_behaviour.prompts == ("d",)

    @pytest.mark.parametrize("seed", range(5))
    def test_a_prompt_that_comes_twice_is_in_one_part_with_both_completions(self, seed):
        texts = [f"prompt {i}" for i in range(8)] * 2
        own = Behaviour(tuple(texts), tuple((f" {i}",) for i in range(16)), (" no",))
        first, second = own.split(0.5, seed=seed)
        assert len(first) == len(second) == 8
        assert not set(first.prompts) & set(second.prompts)
        assert sorted(first.positive + second.positive) == sorted(own.positive)

    def test_too_few_distinct_prompts_are_named(self):
        with pytest.raises(ArgumentError, match=r"of 1 distinct prompts \(4 in all\).*more dist"):
            prompts(["a"] * 4).split(0.5)

    def test_neutral_texts_are_neither_anchors_nor_texts_of_pairs(self):
        with pytest.raises(DataError, match=r"neutral shares texts with anchors \(2 of its 8, the"):
            divide(neutral=[*NEUTRAL, *ANCHORS[:2]])
        for anchors in (ANCHORS, None):
            with pytest.raises(DataError, match="neutral shares texts with the texts of pairs"):
                divide(neutral=[*NEUTRAL, PAIRS.texts[3]], anchors=anchors)

    def test_a_neutral_text_that_comes_twice_is_in_one_half(self):
        found = divide(neutral=["n", "n", "m", "k", "k", "k"])
        assert found.calibration_texts == ["n", "n", "k", "k", "k"]
        assert found.test_texts == ["m"]
        with pytest.raises(DataError, match="neutral holds 1 text"):
            divide(neutral=["n", "n"])

    @pytest.mark.parametrize("seed", range(5))
    def test_an_anchor_that_comes_twice_is_in_one_part(self, seed):
        parts = split_anchors(ANCHORS * 2, 0.4, seed)
        assert [len(part) for part in parts] == [24, 8, 8]
        assert sum(len(set(part)) for part in parts) == len(ANCHORS)

    @pytest.mark.parametrize("seed", range(5))
    def test_an_anchor_that_is_a_text_of_a_pair_is_not_held_out(self, seed):
        parts = split_anchors([*ANCHORS, *PAIRS.texts[:4]], 0.4, seed, fitted=PAIRS.texts)
        assert [len(part) for part in parts] == [14, 5, 5]
        assert set(PAIRS.texts[:4]) <= set(parts[0])
        with pytest.raises(DataError, match=r"9 distinct texts \(8 are texts of pairs"):
            split_anchors([*PAIRS.texts[:8], "one more"], 0.4, seed, fitted=PAIRS.texts)

    def test_the_texts_of_the_pairs_may_stand_in_for_anchors(self):
        found = divide(anchors=None)
        parts = (found.fit_texts, found.calibration_texts, found.test_texts)
        assert sorted(t for part in parts for t in part) == sorted(PAIRS.texts)


def test_white_space_at_the_ends_and_how_a_letter_is_composed_make_no_other_text():
    composed, apart = "caf\u00e9 is", "cafe\u0301 is"
    alike = [composed, apart, f"{composed} ", f"\n{apart}"]
    chats = [Chat.ask(text, "Yes.") for text in alike]
    assert len(set(hashes_of(alike))) == len(set(hashes_of(chats))) == 1
    assert len(set(hashes_of(["a b", "a  b", "A b"]))) == 3
    first, second = prompts([*alike, "another"]).split(0.5)
    assert sorted(map(len, (first, second))) == [1, 4]


@pytest.mark.parametrize("seed", range(5))
def test_pairs_with_a_text_in_common_stay_together(seed):
    chain = ContrastPairs.from_lists(["p0", "p0", "p1", *"abcd"], ["n0", "n1", "n1", *"efgh"])
    first, second = chain.split(0.5, seed=seed)
    assert len(first) + len(second) == 7
    assert not set(first.texts) & set(second.texts)


class TestValidationOfTheRFM:
    def rows(self, n: int, copies: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise that says nothing of its labels, several times."""
        rows = torch.randn(n, 30, generator=torch.Generator().manual_seed(0))
        return rows.repeat(copies, 1), (torch.arange(n) % 2).repeat(copies)

    def test_equal_rows_are_never_on_both_sides(self):
        rows, labels = self.rows(40, 6)
        auc = fit_rfm(rows, labels, RFMConfig(n_rounds=1)).validation_auc
        assert auc is not None
        assert auc < 0.8  # by twins on both sides: 1.0

    def test_rows_of_one_text_are_never_on_both_sides(self):
        rows, labels = self.rows(40, 6)
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
        rows = rows + 1e-4 * noise
        config = RFMConfig(n_rounds=1)
        groups = list(range(40)) * 6
        by_group = fit_rfm(rows, labels, config, groups=groups).validation_auc
        by_row = fit_rfm(rows, labels, config).validation_auc
        assert by_group is not None
        assert by_group < 0.8
        assert by_row == 1.0

    def test_two_pairs_six_times_each_are_two_pairs(self):
        rows, labels = self.rows(4, 6)
        with pytest.raises(DataError, match="2 negative and 2 positive distinct rows"):
            fit_rfm(rows, labels, RFMConfig())

    def test_groups_that_are_not_one_integer_a_row_are_named(self):
        rows, labels = self.rows(20, 1)
        for groups in ([0, 1], [0.5] * 20):
            with pytest.raises(DataError, match="groups must hold one integer per row"):
                fit_rfm(rows, labels, groups=groups)


class TestWhatAnEvaluationTestsOn:
    def fit(self, given: bool = True) -> Any:
        """What is read of a fit."""
        data = SimpleNamespace(
            validation_behaviour=prompts(["v1", "v2"]),
            calibration_texts=("c1", "c2"),
            text_hashes={"pairs": hashes_of(PAIRS.texts), "anchors": hashes_of(ANCHORS)},
            provenance={"anchors": {"given": given}},
        )
        return SimpleNamespace(data=data)

    def test_what_the_fit_held_out_is_held_out(self):
        assert _not_held_out(self.fit(), ["t1"], ["n1"], ["c1", "c2"]) == []
        assert _not_held_out(None, ["t1"], ["n1"], ["c1"]) == []

    @pytest.mark.parametrize(
        ("tested", "neutral", "calibration", "said"),
        [
            (["v2", "t"], ["n"], ["c"], "1 of 2 test prompts are among the validation prompts"),
            (["warm 1"], ["n"], ["c"], "1 of 1 test prompts are among the texts of its pairs"),
            (["t"], ["c", "n"], ["c"], "1 of 2 neutral test texts are among the calibration"),
            (["t"], ["c1"], ["c"], "neutral test texts are among the calibration texts of the fit"),
            (["t"], ["anchor 3"], ["c"], "1 of 1 neutral test texts are among the anchors"),
            (["t"], ["n"], ["anchor 3"], "1 of 1 calibration texts are among the anchors"),
            (["t"], ["cold 3"], ["c"], "1 of 1 neutral test texts are among the texts of its"),
            (["anchor 3"], ["n"], ["c"], "1 of 1 test prompts are among the anchors"),
            (["t"], ["n"], ["v1"], "1 of 1 calibration texts are among the validation prompts"),
            (["v2 \n"], ["n"], ["c"], "1 of 1 test prompts are among the validation prompts"),
        ],
    )
    def test_what_is_not_is_said(self, tested, neutral, calibration, said):
        (line,) = _not_held_out(self.fit(), tested, neutral, calibration)
        assert said in line

    def test_prompts_that_chose_among_directions_learnt_from_them_are_said(self):
        fit = self.fit()
        fit.data.validation_behaviour = prompts(["warm 1", "v2"])
        (line,) = _not_held_out(fit, ["t"], ["n"], ["c"])
        assert line == "1 of 2 validation prompts of the fit are among the texts of its pairs"

    def test_pairs_that_stand_in_for_anchors_are_held_out_from_the_map(self):
        assert _not_held_out(self.fit(given=False), ["t"], ["cold 3"], ["c"]) == []
