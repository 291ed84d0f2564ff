from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.cli.inputs import read_texts
from expertsteer_lens.data.behaviour import Behaviour
from expertsteer_lens.data.contrast import ContrastPairs, text_hash
from expertsteer_lens.data.texts import are_states_of, texts_sha256
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

    def test_one_pair_is_enough_to_label_with(self):
        assert len(ContrastPairs.from_lists(GOOD[:1], BAD[:1])) == 1

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
        (tmp_path / "empty.jsonl").write_text("\n\n")
        with pytest.raises(DataError, match=r"empty\.jsonl holds no pair; give one JSON object a"):
            ContrastPairs.from_jsonl(tmp_path / "empty.jsonl")
        with pytest.raises(
            DataError, match=r"line 1: no field 'positive' .* rename it in the file"
        ):
            ContrastPairs.from_jsonl(path)
        path.write_text('{"positive": "a", "negative": "b"}\n{"positive": ')
        with pytest.raises(
            DataError, match=r"is not JSON \(Expecting value, line 2\); give one JSON object"
        ):
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


def test_pairs_and_prompts_are_tables_that_a_notebook_shows():
    asked = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    pairs = ContrastPairs.from_lists(["It was warm.", asked], ["It was cold.", "No."])
    frame = pairs.to_pandas()
    assert frame.positive.tolist() == ["It was warm.", "user: Why?\nassistant: Because."]
    assert frame.negative.tolist() == ["It was cold.", "No."]
    assert "It was cold." in pairs._repr_html_()
    shared = Behaviour(["a", "b"], [" x", " y"], [" z"]).to_pandas()
    assert shared.positive.tolist() == [(" x", " y")] * 2
    own = Behaviour(["a", "b"], [[" 4"], [" 6"]], [[" 5"], [" 7", " 8"]]).to_pandas()
    assert own.values.tolist() == [["a", (" 4",), (" 5",)], ["b", (" 6",), (" 7", " 8")]]


def test_labels_are_a_fresh_tensor_each_time():
    pairs = ContrastPairs.from_lists(GOOD, BAD)
    pairs.labels.zero_()
    assert pairs.labels.sum() == 3
    assert pairs.labels.dtype == torch.float32


NO_LISTS = {
    "a str": ("abc", "one str; wrap it in a list"),
    "bytes": (b"abc", "one bytes; wrap it"),
    "a dict": ({"a": 1, "b": 2}, "a dict, which has no order of its own; give a list"),
    "a set": ({"a", "b"}, "a set, which has no order"),
    "a frozenset": (frozenset({"a", "b"}), "a frozenset, which has no order"),
    "None": (None, "got NoneType"),
    "a number": (3, "got int"),
}


@pytest.mark.parametrize(("value", "message"), NO_LISTS.values(), ids=NO_LISTS)
class TestWhatIsNoList:
    """Every list of texts, wherever it is taken."""

    def test_pairs(self, value: Any, message: str):
        for sides in ((value, BAD), (GOOD, value)):
            with pytest.raises(DataError, match=f"(posi|nega)tive must be a list of .*{message}"):
                ContrastPairs.from_lists(*sides)
            with pytest.raises(DataError, match=message):
                ContrastPairs(*sides)

    def test_behaviours(self, value: Any, message: str):
        given = {"prompts": ["p", "q"], "positive": [" a"], "negative": [" b"]}
        for name in given:
            with pytest.raises(DataError, match=f"{name} must be a list of texts, .*{message}"):
                Behaviour(**{**given, name: value})

    def test_completions_of_one_prompt(self, value: Any, message: str):
        if not isinstance(value, str):  # a list of str is a list of shared completions
            with pytest.raises(DataError, match=rf"positive\[1\] must be a list .*{message}"):
                Behaviour(["p", "q"], [[" a"], value], [" b"])

    def test_items_and_rows(self, value: Any, message: str):
        for read in (ContrastPairs.from_multiple_choice, Behaviour.from_multiple_choice):
            with pytest.raises(DataError, match=f"items must be a list of items, .*{message}"):
                read(value)
        with pytest.raises(DataError, match=f"dataset must be a list of rows, .*{message}"):
            ContrastPairs.from_dataset(value)

    def test_choices_of_an_item(self, value: Any, message: str):
        if not isinstance(value, dict):  # choices may have keys
            item = {"question": "q", "choices": value, "answer": "a"}
            with pytest.raises(DataError, match=f"item 0: choices must be a list .*{message}"):
                Behaviour.from_multiple_choice([item])

    def test_texts_to_capture(self, value: Any, message: str):
        from expertsteer_lens.data.chat import check_texts

        with pytest.raises(DataError, match=f"anchors must be a list of texts, .*{message}"):
            check_texts("anchors", value)


def test_rows_that_are_no_dicts_are_named():
    with pytest.raises(DataError, match="dataset row 1 must be a dict, got str"):
        ContrastPairs.from_dataset([{"positive": "a", "negative": "b"}, "positive and negative"])
    with pytest.raises(DataError, match="item 0 must be a dict, got str"):
        Behaviour.from_multiple_choice(["question choices answer"])
    with pytest.raises(DataError, match="column 'y' must hold 0/1 labels, got 'no' in row 1"):
        ContrastPairs.from_dataset([{"t": "a", "y": 1}, {"t": "b", "y": "no"}], text="t", label="y")


def test_half_characters_are_named_with_their_place():
    message = r"negative\[1\] holds half of a character \(lone surrogate U\+D800 at place 2\)"
    with pytest.raises(DataError, match=message):
        ContrastPairs.from_lists(["a", "b"], ["c", "d \ud800"])
    with pytest.raises(DataError, match=r"prompts\[0\] holds half of a character"):
        Behaviour(["\udfff"], [" a"], [" b"])
    with pytest.raises(DataError, match=r"positive\[0\]\[0\] holds half of a character"):
        Behaviour(["p"], [["\ud83d"]], [" b"])
    assert ContrastPairs.from_lists(["\U0001f600 a", "b"], ["c", "d"]).positive[0] == "\U0001f600 a"


class TestCompletionsCountOnce:
    def test_twice_on_one_side(self):
        with pytest.raises(DataError, match="positive holds ' happy' twice"):
            Behaviour(["p"], [" happy", " glad", " happy"], [" sad"])
        with pytest.raises(DataError, match=r"negative of prompts\[1\] holds ' c' twice"):
            Behaviour(["p", "q"], [" a"], [[" b"], [" c", " c"]])

    def test_on_both_sides(self):
        with pytest.raises(DataError, match="' yes' is both a positive and a negative completion;"):
            Behaviour(["p"], [" no", " yes"], [" yes"])
        with pytest.raises(DataError, match=r"' a' is both .* completion of prompts\[1\]"):
            Behaviour(["p", "q"], [[" b"], [" a"]], [" a"])

    def test_the_same_completion_for_two_prompts_is_fine(self):
        own = Behaviour(["p", "q"], [[" a"], [" b"]], [[" b"], [" a"]])
        assert own.completions(1) == ((" b",), (" a",))

    def test_an_option_that_stands_twice_is_one_completion(self):
        item = {"question": "q", "choices": ["a", "b", "b", "c"], "answer": 0}
        assert Behaviour.from_multiple_choice([item]).completions(0)[1] == (" b", " c")


class TestBehaviourFiles:
    DATA = {"prompts": ["p", "q"], "positive": [" a"], "negative": [[" b"], [" c", " d"]]}  # noqa: RUF012

    def test_round_trip(self, tmp_path):
        path = tmp_path / "b.json"
        path.write_text(json.dumps(self.DATA))
        assert Behaviour.from_json(path) == Behaviour.from_dict(self.DATA) == Behaviour(**self.DATA)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", r"b\.json is not JSON \(.*line 1"),
            (b'{"prompts":\n [,', r"is not JSON \(.*line 2"),
            (
                b'{"prompts": []}\n{}',
                "Extra data, line 2.; give one JSON object with lists 'prompts'",
            ),
            (b"[1]", "must hold one JSON object, got list"),
            (b"\xff\xfe{\x00", r"b\.json is not UTF-8 text"),
            (b"[" * 100_000, "b.json is no JSON that can be read"),
            (b"1" + b"0" * 5000, "b.json is no JSON that can be read"),
            (b'{"prompts": ["p"], "positive": ["a"]}', r"b\.json: a behaviour lacks 'negative'"),
            (
                b'{"prompts": ["p"], "positive": null, "negative": ["a"]}',
                r"b\.json: positive must be a list of texts, got NoneType",
            ),
            (
                b'{"prompts": ["p"], "positive": ["a"], "negative": ["b"], "neagtive": ["c"]}',
                r"b\.json: a behaviour holds an unknown 'neagtive'",
            ),
            (
                b'{"prompts": ["\\ud800"], "positive": ["a"], "negative": ["b"]}',
                r"b\.json: prompts\[0\] holds half of a character",
            ),
        ],
    )
    def test_what_is_wrong_is_named_with_the_file(self, tmp_path, content, message):
        path = tmp_path / "b.json"
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            Behaviour.from_json(path)

    def test_pairs_files_that_are_no_text(self, tmp_path):
        path = tmp_path / "p.jsonl"
        path.write_text('{"positive": "a", "negative": "b"}', encoding="utf-16")
        with pytest.raises(DataError, match=r"p\.jsonl is not UTF-8 text"):
            ContrastPairs.from_jsonl(path)
        path.write_bytes(b"[" * 100_000)
        with pytest.raises(DataError, match=r"p\.jsonl is no JSON that can be read .*line 1"):
            ContrastPairs.from_jsonl(path)


class TestDigests:
    def test_a_separator_inside_a_text_is_not_a_border(self):
        assert texts_sha256(["a\x1eb"]) != texts_sha256(["a", "b"])
        assert text_hash(GOOD) == texts_sha256(GOOD)[:16]

    def test_states_know_their_texts(self):
        facts = {"texts_digest": texts_sha256(GOOD)}
        assert are_states_of(facts, GOOD)
        assert not are_states_of(facts, GOOD[::-1])
        assert are_states_of({}, GOOD)  # nothing is known
        assert not are_states_of({"texts_digest": texts_sha256(["a\x1eb"])}, ["a", "b"])

    def test_states_of_version_0_1_0_are_checked_by_its_rule(self):
        old = {"texts_sha256": hashlib.sha256("\x1e".join(GOOD).encode()).hexdigest()}
        assert are_states_of(old, GOOD)
        assert not are_states_of(old, BAD)
        golden = pathlib.Path(__file__).parent / "goldens" / "saved_0_1_0" / "ActivationStore"
        store = esl.load(golden)
        texts = esl.zoo.contrast_pairs(6).texts
        assert store.n == len(texts)
        assert are_states_of(store.provenance, texts)
        assert not are_states_of(store.provenance, texts[::-1])


ODD = "one cat\u2028two\u0085three\x0cfour\x1efive"
"""Characters at which `str.splitlines` cuts, and which end no line."""


def test_a_text_file_is_cut_at_line_ends_only_and_has_no_bom(tmp_path):
    for end in ("\n", "\r\n"):
        file = tmp_path / "a.txt"
        file.write_bytes(f"\ufefffirst{end}{end}{ODD}{end}".encode())
        assert read_texts(file) == ["first", ODD]


def test_json_lines_may_hold_characters_that_end_no_line(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"positive": f"{ODD} {i}", "negative": f"none {i}"} for i in range(2)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text("\ufeff" + lines, encoding="utf-8")
    assert ContrastPairs.from_jsonl(file).positive == (f"{ODD} 0", f"{ODD} 1")


def test_a_carriage_return_ends_no_line_and_marks_are_no_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeff\ufeffat 1%\rat 2%\r\n\ufeffsecond\n\ufeff\n".encode())
    assert read_texts(file) == ["at 1%\rat 2%", "second"]


def test_nul_is_no_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("a b\nc".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"has the character NUL at place 1, .*; save it as UTF-8"):
        read_texts(file)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"positive": "a", "negative": "b", "negative": "c"}')
    with pytest.raises(DataError, match=r"the key 'negative' stands twice in one object, line 1"):
        ContrastPairs.from_jsonl(file)
