from __future__ import annotations

import json

import pytest
import torch

from expertsteer_lens.data.contrast import Behaviour, ContrastPairs, text_hash
from expertsteer_lens.errors import ArgumentError, DataError, ExpertSteerError

GOOD, BAD = ["a good day", "she laughed", "it was warm"], ["a bad day", "she cried", "it was cold"]


class TestContrastPairs:
    def test_texts_and_labels_alternate_positive_and_negative(self):
        pairs = ContrastPairs.from_lists(GOOD, BAD)
        assert pairs.texts == [
            "a good day",
            "a bad day",
            "she laughed",
            "she cried",
            "it was warm",
            "it was cold",
        ]
        assert pairs.labels.tolist() == [1, 0, 1, 0, 1, 0]

    def test_unequal_numbers_of_texts_are_named(self):
        with pytest.raises(DataError, match="got 3 positive and 2 negative"):
            ContrastPairs.from_lists(GOOD, BAD[:2])

    def test_one_example_is_refused(self):
        with pytest.raises(DataError, match="at least 2 pairs"):
            ContrastPairs.from_lists(GOOD[:1], BAD[:1])

    def test_empty_text_is_named_by_its_index(self):
        with pytest.raises(DataError, match=r"negative\[1\] is empty"):
            ContrastPairs.from_lists(GOOD, ["x", "  ", "y"])

    def test_empty_list_a_bare_string_and_a_number_are_refused(self):
        with pytest.raises(DataError, match="positive is empty"):
            ContrastPairs.from_lists([], [])
        with pytest.raises(DataError, match="wrap it in a list"):
            ContrastPairs.from_lists("abc", BAD)
        with pytest.raises(
            DataError, match=r"positive\[0\] must be a str or a list of messages, got int"
        ):
            ContrastPairs.from_lists([1, 2, 3], BAD)

    def test_the_same_text_on_both_sides_is_refused(self):
        with pytest.raises(DataError, match="pair 2 has the same text"):
            ContrastPairs.from_lists(GOOD, [*BAD[:2], GOOD[2]])

    def test_split_keeps_pairs_whole_and_parts_disjoint(self):
        pairs = ContrastPairs.from_lists(
            [f"good {i}" for i in range(20)], [f"bad {i}" for i in range(20)]
        )
        first, second = pairs.split(0.25, seed=3)
        assert (len(first), len(second)) == (5, 15)
        assert not set(first.texts) & set(second.texts)
        assert all(
            p.split()[1] == n.split()[1]
            for p, n in zip(first.positive, first.negative, strict=True)
        )
        assert pairs.split(0.25, seed=3)[0] == first
        assert pairs.split(0.25, seed=4)[0] != first

    def test_a_split_that_leaves_too_little_is_refused(self):
        with pytest.raises(ArgumentError, match="fewer than 2"):
            ContrastPairs.from_lists(GOOD, BAD).split(0.5)

    def test_jsonl_round_trip_and_its_errors(self, tmp_path):
        path = tmp_path / "pairs.jsonl"
        path.write_text(
            "\n".join(json.dumps({"yes": p, "no": n}) for p, n in zip(GOOD, BAD, strict=True))
            + "\n\n"
        )
        assert ContrastPairs.from_jsonl(
            path, positive="yes", negative="no"
        ) == ContrastPairs.from_lists(GOOD, BAD)
        with pytest.raises(DataError, match="line 1: no field 'positive'"):
            ContrastPairs.from_jsonl(path)
        path.write_text('{"positive": "a", "negative": "b"}\n{"positive": ')
        with pytest.raises(DataError, match="line 2: not JSON"):
            ContrastPairs.from_jsonl(path)

    def test_datasets_with_two_columns_or_with_labels_give_the_same_pairs(self):
        datasets = pytest.importorskip("datasets")
        wide = datasets.Dataset.from_dict({"positive": GOOD, "negative": BAD})
        long = datasets.Dataset.from_dict(
            {"t": [x for p in zip(GOOD, BAD, strict=True) for x in p], "y": [1, 0] * 3}
        )
        expected = ContrastPairs.from_lists(GOOD, BAD)
        assert ContrastPairs.from_dataset(wide) == expected
        assert ContrastPairs.from_dataset(long, text="t", label="y") == expected

    def test_dataset_errors_name_the_column(self):
        with pytest.raises(DataError, match="no column 'negative'"):
            ContrastPairs.from_dataset([{"positive": "a"}])
        with pytest.raises(DataError, match="must hold 0/1 labels"):
            ContrastPairs.from_dataset(
                [{"t": "a", "y": 3}, {"t": "b", "y": 0}], text="t", label="y"
            )

    def test_hash_depends_on_order_and_on_borders_between_texts(self):
        assert text_hash(["ab", "c"]) != text_hash(["a", "bc"])
        assert (
            ContrastPairs.from_lists(GOOD, BAD).hash
            != ContrastPairs.from_lists(GOOD[::-1], BAD[::-1]).hash
        )


ITEMS = [
    {"question": "Two and two?", "choices": ["three", "four", "five"], "answer": 1},
    {"question": "Sky?", "choices": {"A": "blue", "B": "green"}, "answer": "A"},
    {"question": "Ice?", "choices": ["hot", "cold"], "answer": "cold"},
]


class TestMultipleChoice:
    def test_answers_as_index_key_or_text_are_understood(self):
        pairs = ContrastPairs.from_multiple_choice(ITEMS)
        assert [p.rsplit(" ", 1)[-1] for p in pairs.positive] == ["four", "blue", "cold"]
        assert [n.rsplit(" ", 1)[-1] for n in pairs.negative][1:] == ["green", "hot"]
        assert pairs.negative[0].rsplit(" ", 1)[-1] in ("three", "five")

    def test_the_wrong_answer_is_drawn_by_the_seed(self):
        items = [{"question": f"q{i}", "choices": list("abcdefgh"), "answer": 0} for i in range(8)]
        drawn = {ContrastPairs.from_multiple_choice(items, seed=s).negative for s in range(3)}
        assert len(drawn) == 3

    def test_behaviour_has_one_right_and_all_wrong_completions(self):
        behaviour = Behaviour.from_multiple_choice(ITEMS)
        assert behaviour.completions(0) == ((" four",), (" three", " five"))
        assert behaviour.prompts[1] == "Question: Sky?\nAnswer:"

    def test_bad_items_are_named(self):
        with pytest.raises(DataError, match="item 0 has no field 'answer'"):
            ContrastPairs.from_multiple_choice([{"question": "q", "choices": ["a"]}])
        with pytest.raises(DataError, match="neither a key nor one of the choices"):
            ContrastPairs.from_multiple_choice(
                [{"question": "q", "choices": ["a", "b"], "answer": "z"}]
            )
        with pytest.raises(DataError, match="no wrong choice"):
            ContrastPairs.from_multiple_choice([{"question": "q", "choices": ["a"], "answer": 0}])


class TestBehaviour:
    def test_shared_and_per_prompt_completions(self):
        shared = Behaviour(prompts=("p", "q"), positive=(" a", " b"), negative=(" c",))
        assert shared.completions(1) == ((" a", " b"), (" c",))
        own = Behaviour(
            prompts=("p", "q"), positive=((" a",), (" b",)), negative=((" c",), (" d", " e"))
        )
        assert own.completions(1) == ((" b",), (" d", " e"))
        assert own.select([1]).completions(0) == ((" b",), (" d", " e"))

    def test_wrong_number_of_per_prompt_lists_is_refused(self):
        with pytest.raises(
            DataError, match="positive has completions for 1 prompts, but there are 2"
        ):
            Behaviour(prompts=("p", "q"), positive=((" a",),), negative=(" c",))

    def test_split_is_disjoint_and_seeded(self):
        behaviour = Behaviour(
            prompts=tuple(f"p{i}" for i in range(10)), positive=(" a",), negative=(" b",)
        )
        validation, test = behaviour.split(0.5, seed=1)
        assert sorted(validation.prompts + test.prompts) == sorted(behaviour.prompts)
        assert not set(validation.prompts) & set(test.prompts)

    def test_prefix_goes_in_front_of_every_prompt(self):
        behaviour = Behaviour(prompts=("p", "q"), positive=(" a",), negative=(" b",)).with_prefix(
            "Be kind. "
        )
        assert behaviour.prompts == ("Be kind. p", "Be kind. q")

    def test_errors_are_ours_and_value_errors(self):
        with pytest.raises(ExpertSteerError):
            Behaviour(prompts=(), positive=(" a",), negative=(" b",))
        with pytest.raises(ValueError):
            Behaviour(prompts=("p",), positive=(), negative=(" b",))


def test_labels_are_a_fresh_tensor_each_time():
    pairs = ContrastPairs.from_lists(GOOD, BAD)
    pairs.labels.zero_()
    assert pairs.labels.sum() == 3
    assert pairs.labels.dtype == torch.float32
