"""Public benchmarks by name: made-up rows in the published columns for each, and the real files
where they are at hand."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

import expertsteer_lens as esl
from expertsteer_lens.benchmarks import public
from expertsteer_lens.errors import ArgumentError, DataError


def mmlu(i: int) -> dict:
    return {
        "question": f"Which is {i}?",
        "subject": "s",
        "choices": [f"w{i}", f"r{i}", f"x{i}", f"y{i}"],
        "answer": 1,
    }


def mmlu_pro(category: str):
    def row(i: int) -> dict:
        options = [f"w{i}", f"x{i}", f"r{i}", f"y{i}", f"z{i}"]
        return {
            "question_id": i,
            "question": f"Which is {i}?",
            "options": options,
            "answer": "C",
            "answer_index": 2,
            "cot_content": "",
            "category": category,
            "src": "made up",
        }

    return row


def labelled(column: str, labels: str = "ABCD"):
    def row(i: int) -> dict:
        texts = [f"w{i}", f"x{i}", f"r{i}", f"y{i}", f"z{i}"][: len(labels)]
        return {
            "id": str(i),
            column: f"Which is {i}?",
            "choices": {"text": texts, "label": list(labels)},
            "answerKey": labels[2],
        }

    return row


# One made-up row a benchmark, in the columns of the hub set; the right answer starts with r, every
# wrong one with w, x, y or z.
HUB_ROWS = {
    "pubmedqa": lambda i: {
        "pubid": i,
        "question": f"Does drug {i} help?",
        "context": {
            "contexts": [f"We gave drug {i}.", "We looked."],
            "labels": ["A", "B"],
            "meshes": [],
        },
        "long_answer": "It does.",
        "final_decision": ["yes", "no", "maybe"][i % 3],
    },
    "medmcqa": lambda i: {
        "id": str(i),
        "question": f"Which is {i}?",
        "opa": f"w{i}",
        "opb": f"x{i}",
        "opc": f"y{i}",
        "opd": f"r{i}",
        "cop": 3,
        "choice_type": "single",
        "exp": None,
        "subject_name": "Anatomy",
        "topic_name": None,
    },
    "medqa": lambda i: {
        "question": f"Which is {i}?",
        "answer": f"r{i}",
        "options": {"A": f"w{i}", "B": f"r{i}", "C": f"x{i}", "D": f"y{i}"},
        "meta_info": "step1",
        "answer_idx": "B",
        "metamap_phrases": [],
    },
    "financial_phrasebank": lambda i: {"sentence": f"Profit rose by {i} %.", "label": 2},
    "twitter_financial_news": lambda i: {"text": f"$ABC falls {i} %", "label": 0},
    "gsm8k": lambda i: {
        "question": f"Ann has {i} apples and buys 1000. How many?",
        "answer": f"{i} + 1000 = <<{i}+1000={i + 1000}>>\n#### 1,{i:03d}",
    },
    "aqua_rat": lambda i: {
        "question": f"Which is {i}?",
        "options": [f"A)w{i}", f"B)x{i}", f"C)r{i} (a) b", f"D)y{i}", f"E)z{i}"],
        "rationale": "so",
        "correct": "C",
    },
    "math_qa": lambda i: {
        "Problem": f"which is {i} ?",
        "Rationale": "so",
        "correct": "b",
        "annotated_formula": "",
        "linear_formula": "",
        "category": "gain",
        "options": f"a ) w{i} , b ) r{i} , 000 , c ) x{i} , d ) y{i} , e ) none of these",
    },
    "truthfulqa": lambda i: {
        "question": f"What of {i}?",
        "mc1_targets": {"choices": [f"w{i}", f"r{i}", f"x{i}"], "labels": [0, 1, 0]},
        "mc2_targets": {"choices": [f"r{i}", f"ra{i}", f"w{i}"], "labels": [1, 1, 0]},
    },
    "arc_challenge": labelled("question"),
    "arc_easy": labelled("question", "1234"),
    "openbookqa": labelled("question_stem"),
    "commonsense_qa": labelled("question", "ABCDE"),
    "hellaswag": lambda i: {
        "ind": i,
        "activity_label": "Cooking",
        "ctx_a": f"A cook takes {i} eggs.",
        "ctx_b": "the cook",
        "ctx": "-",
        "endings": [f"w{i} them [substeps].", f"r{i} them.", f"x{i} them.", f"y{i} them."],
        "label": "1",
    },
    "boolq": lambda i: {
        "question": f"is {i} a number",
        "passage": f"{i} is a number.",
        "answer": i % 2 == 0,
    },
    "winogrande": lambda i: {
        "sentence": f"The {i} cups did not fit on the shelf because the _ were big.",
        "option1": "walls",
        "option2": "rims",
        "answer": "2",
    },
    "piqa": lambda i: {"goal": f"Open {i} jars", "sol1": f"r{i}", "sol2": f"w{i}", "label": 0},
    "sciq": lambda i: {
        "question": f"Which is {i}?",
        "distractor3": f"x{i}",
        "distractor1": f"w{i}",
        "distractor2": f"y{i}",
        "correct_answer": f"r{i}",
        "support": "Because.",
    },
}
for _name in public.names():
    if _name.startswith("mmlu_pro_"):
        HUB_ROWS[_name] = mmlu_pro(_name.removeprefix("mmlu_pro_"))
    elif _name.startswith("mmlu_"):
        HUB_ROWS[_name] = mmlu

WORDS = {"pubmedqa", "financial_phrasebank", "twitter_financial_news", "gsm8k", "boolq"}
"""Benchmarks whose answers are words or numbers and so carry no r/w mark."""


def sciq(question, right, *wrong):
    names = ("question", "correct_answer", "distractor1", "distractor2", "distractor3")
    return dict(zip(names, (question, right, *wrong), strict=True))


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        import datasets

        getattr(datasets.Dataset.from_list(rows), f"to_{path.suffix[1:]}")(str(path))
    return path


class TestEveryBenchmark:
    @pytest.mark.parametrize("name", public.names())
    def test_rows_in_the_published_columns_become_pairs_and_prompts(self, name, tmp_path):
        rows = [HUB_ROWS[name](i) for i in range(12)]
        assert set(public.get(name).columns) <= set(rows[0]), (
            "the made-up row lacks a column that the benchmark says it reads"
        )
        found = public.load(name, path=write(tmp_path / "rows.jsonl", rows))
        assert (len(found), found.skipped) == (12, ())
        pairs, behaviour = found.pairs(), found.behaviour()
        assert (len(pairs), len(behaviour)) == (6, 6)
        head, _, _ = public.get(name).template.partition("{choice}")
        for positive, negative in zip(pairs.positive, pairs.negative, strict=True):
            assert positive != negative
        prompts = set(behaviour.prompts)
        assert not [t for t in pairs.texts if any(t.startswith(p) for p in prompts)], (
            "a question is in both parts"
        )
        for i in range(len(behaviour)):
            right, wrong = behaviour.completions(i)
            assert len(right) == 1
            assert right[0].startswith(" ")
            assert right[0] not in wrong
            assert not behaviour.prompts[i].endswith(" ")
            if name not in WORDS:
                assert right[0].startswith(" r")
                assert all(w[1] in "wxyzn" for w in wrong)
        assert head.replace("{question}", "")[:5] in behaviour.prompts[0]

    @pytest.mark.parametrize(
        "name", ["medqa", "medmcqa", "mmlu_anatomy", "openbookqa", "gsm8k", "truthfulqa", "boolq"]
    )
    def test_every_kind_of_file_gives_the_same_items(self, name, tmp_path):
        rows = [HUB_ROWS[name](i) for i in range(8)]
        reference = public.load(name, path=write(tmp_path / "rows.jsonl", rows)).pairs()
        assert public.load(name, path=write(tmp_path / "rows.json", rows)).pairs() == reference
        if (
            name != "gsm8k"
        ):  # made-up numbers are drawn by the row's content, in which a table may order columns otherwise
            assert (
                public.load(name, path=write(tmp_path / "rows.parquet", rows)).pairs() == reference
            )
        flat = [
            {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()}
            for row in rows
        ]
        assert public.load(name, path=write(tmp_path / "rows.csv", flat)).pairs() == reference

    def test_there_are_at_least_fifteen_benchmarks_in_four_domains(self):
        hub_ids = {public.get(n).hub_id for n in public.names()}
        assert len(hub_ids) >= 15
        assert {public.get(n).domain for n in public.names()} == set(public.DOMAINS)
        for domain in public.DOMAINS:
            assert len(public.names(domain)) >= 3
            assert all(public.get(n).domain == domain for n in public.names(domain))

    def test_definitions_tell_what_they_are(self):
        assert "GBaker/MedQA-USMLE-4-options" in repr(public.get("medqa"))
        assert "made" in public.get("gsm8k").note


class TestMeaning:
    """The mapping itself, on rows read by hand."""

    def one(self, name, tmp_path, rows):
        found = public.load(name, path=write(tmp_path / "rows.jsonl", rows), pair_share=0.67)
        return {
            item["question"]: item["choices"] for item in (*found.pair_items, *found.prompt_items)
        }

    def test_abstracts_and_passages_stand_before_the_question(self, tmp_path):
        items = self.one("pubmedqa", tmp_path, [HUB_ROWS["pubmedqa"](i) for i in range(3)])
        question = "Abstract: We gave drug 0. We looked.\nQuestion: Does drug 0 help?"
        assert items[question] == ["yes", "no", "maybe"]
        assert next(v for k, v in items.items() if "drug 2" in k) == ["maybe", "yes", "no"]
        items = self.one("boolq", tmp_path, [HUB_ROWS["boolq"](i) for i in range(3)])
        assert items["1 is a number.\nQuestion: is 1 a number?"] == ["no", "yes"]

    def test_a_gap_is_filled_and_the_sentence_goes_on(self, tmp_path):
        found = public.load(
            "winogrande",
            path=write(tmp_path / "r.jsonl", [HUB_ROWS["winogrande"](i) for i in range(4)]),
        )
        behaviour = found.behaviour()
        assert behaviour.prompts[0].endswith("because the")
        assert behaviour.completions(0) == ((" rims were big.",), (" walls were big.",))
        assert found.pairs().positive[0].endswith("because the rims were big.")

    def test_bracketed_marks_are_removed_from_hellaswag(self, tmp_path):
        items = self.one("hellaswag", tmp_path, [HUB_ROWS["hellaswag"](i) for i in range(3)])
        assert items["Cooking: A cook takes 1 eggs. The cook"] == [
            "r1 them.",
            "w1 them .",
            "x1 them.",
            "y1 them.",
        ]

    def test_options_in_one_string_are_told_apart(self, tmp_path):
        rows = [HUB_ROWS["math_qa"](i) for i in range(2)]
        rows.append(
            {
                **rows[0],
                "Problem": "in brackets",
                "options": "['a ) $ 1', 'b ) $ 2,000', 'c ) $ 3']",
                "correct": "b",
            }
        )
        rows.append({**rows[0], "Problem": "garbled", "options": "none"})
        found = public.load("math_qa", path=write(tmp_path / "rows.jsonl", rows))
        items = {i["question"]: i["choices"] for i in (*found.pair_items, *found.prompt_items)}
        assert items["which is 1 ?"] == ["r1 , 000", "w1", "x1", "y1", "none of these"]
        assert items["in brackets"] == ["$ 2,000", "$ 1", "$ 3"]
        assert found.skipped == ((3, "the options 'none' cannot be told apart"),)

    def test_the_options_of_aqua_keep_their_own_brackets(self, tmp_path):
        assert (
            self.one("aqua_rat", tmp_path, [HUB_ROWS["aqua_rat"](i) for i in range(3)])[
                "Which is 1?"
            ][0]
            == "r1 (a) b"
        )

    def test_classes_as_numbers_or_names_are_the_same(self, tmp_path):
        rows = [
            {"sentence": f"s{i}", "label": label}
            for i, label in enumerate([0, "1", "Positive", "negative"])
        ]
        items = self.one("financial_phrasebank", tmp_path, rows)
        assert [v[0] for _, v in sorted(items.items())] == [
            "negative",
            "neutral",
            "positive",
            "negative",
        ]

    def test_only_the_category_asked_for_is_read(self, tmp_path):
        rows = [mmlu_pro("health")(i) for i in range(4)] + [mmlu_pro("law")(i) for i in range(4, 9)]
        assert len(public.load("mmlu_pro_health", path=write(tmp_path / "rows.jsonl", rows))) == 4
        with pytest.raises(DataError, match="no row whose 'category' is 'math'"):
            public.load("mmlu_pro_math", path=tmp_path / "rows.jsonl")


class TestNumbers:
    @pytest.mark.parametrize("text", ["0", "1", "-2", "7", "18", "70000", "2.50", "0.05", "-3.5"])
    def test_wrong_numbers_are_near_distinct_and_alike(self, text):
        import random

        from expertsteer_lens.benchmarks.readers import near_numbers

        right = Decimal(text)
        for seed in range(50):
            wrong = [Decimal(w) for w in near_numbers(right, random.Random(seed))]
            assert len({right, *wrong}) == 4
            unit = Decimal(1).scaleb(right.as_tuple().exponent)
            assert all(abs(w - right) <= max(abs(right) / 5, 4 * unit) for w in wrong)
            assert all(w.as_tuple().exponent == right.as_tuple().exponent for w in wrong)
            assert all((w < 0) == (right < 0) for w in wrong)

    def test_the_seed_draws_them_and_the_limit_does_not(self, tmp_path):
        path = write(tmp_path / "rows.jsonl", [HUB_ROWS["gsm8k"](i) for i in range(20)])

        def items(**keywords):
            found = public.load("gsm8k", path=path, **keywords)
            return {i["question"]: i["choices"] for i in (*found.pair_items, *found.prompt_items)}

        assert items(seed=3) == items(seed=3)
        assert items(seed=3) != items(seed=4)
        few = items(seed=3, limit=9)
        assert len(few) == 9
        assert few.items() <= items(seed=3).items()

    def test_an_answer_that_is_no_number_is_left_out_and_counted(self, tmp_path):
        rows = [HUB_ROWS["gsm8k"](i) for i in range(5)] + [{"question": "q", "answer": "#### many"}]
        found = public.load("gsm8k", path=write(tmp_path / "rows.jsonl", rows))
        assert found.skipped == ((5, "the final answer 'many' is not a number"),)
        assert "1 rows left out" in repr(found)


class TestDivision:
    def test_items_that_ask_the_same_question_stay_together(self, tmp_path):
        rows = [
            {"question": f"Which? {i // 3}", "choices": [f"a{i}", f"b{i}"], "answer": 0}
            for i in range(30)
        ]
        for seed in range(5):
            found = public.load(
                "mmlu_anatomy", path=write(tmp_path / "rows.jsonl", rows), seed=seed
            )
            first, second = (
                {i["question"] for i in part} for part in (found.pair_items, found.prompt_items)
            )
            assert not first & second
            assert len(first) == len(second) == 5

    def test_share_limit_and_seed_decide_the_parts(self, tmp_path):
        path = write(tmp_path / "rows.jsonl", [mmlu(i) for i in range(40)])
        found = public.load("mmlu_anatomy", path=path, pair_share=0.8, limit=20)
        assert (len(found.pair_items), len(found.prompt_items)) == (16, 4)
        other = public.load("mmlu_anatomy", path=path, pair_share=0.8, limit=20, seed=1)
        assert other.pairs() != found.pairs()
        assert (
            public.load("mmlu_anatomy", path=path, pair_share=0.8, limit=20).pairs()
            == found.pairs()
        )
        assert found.pairs(seed=1).positive == found.pairs().positive
        assert found.pairs(seed=1).negative != found.pairs().negative

    def test_a_row_whose_choices_are_all_the_same_is_left_out(self, tmp_path):
        rows = [mmlu(i) for i in range(4)] + [
            {"question": "q", "choices": ["a", "a "], "answer": 0}
        ]
        found = public.load("mmlu_anatomy", path=write(tmp_path / "rows.jsonl", rows))
        assert found.skipped == (
            (4, "the question, the right answer or every wrong answer is empty"),
        )

    def test_too_few_questions_are_refused(self, tmp_path):
        with pytest.raises(DataError, match="leave 1 items for pairs and 1 for prompts"):
            public.load("mmlu_anatomy", path=write(tmp_path / "rows.jsonl", [mmlu(0), mmlu(1)]))


class TestErrors:
    def test_an_unknown_name_gets_the_closest(self):
        with pytest.raises(ArgumentError, match="closest: 'medmcqa'"):
            public.load("medmcq")
        with pytest.raises(ArgumentError, match="domain must be one of"):
            public.names("physics")

    def test_without_a_network_the_columns_and_the_way_out_are_named(self, monkeypatch):
        import datasets

        def offline(*args, **kwargs):
            raise ConnectionError("no route to the hub\nlong trace")

        monkeypatch.setattr(datasets, "load_dataset", offline)
        with pytest.raises(
            DataError,
            match=r"ConnectionError: no route to the hub\); without a network pass path= .*answer_idx",
        ):
            public.load("medqa")

    def test_the_hub_is_asked_for_the_published_set_and_split(self, monkeypatch):
        import datasets

        asked = []

        def hub(*args, **kwargs):
            asked.append((args, kwargs))
            return datasets.Dataset.from_list(
                [HUB_ROWS["financial_phrasebank"](i) | mmlu(i) for i in range(6)]
            )

        monkeypatch.setattr(datasets, "load_dataset", hub)
        found = public.load("mmlu_anatomy", split="validation")
        assert asked[-1] == (("cais/mmlu", "anatomy"), {"split": "validation"})
        assert found.source == "cais/mmlu/anatomy, split 'validation'"
        public.load("financial_phrasebank")
        assert asked[-1][0] == ("parquet",)
        assert asked[-1][1]["data_files"]["train"].startswith(
            "hf://datasets/takala/financial_phrasebank@refs/convert/parquet/"
        )

    def test_a_missing_column_is_named_with_its_row(self, tmp_path):
        rows = [mmlu(0), {"question": "q", "answer": 0}, mmlu(2)]
        with pytest.raises(
            DataError,
            match=r"row 1 has no column 'choices'; benchmark 'mmlu_anatomy' reads \['question'",
        ):
            public.load("mmlu_anatomy", path=write(tmp_path / "rows.jsonl", rows))

    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("medmcqa", {"cop": -1}),
            ("commonsense_qa", {"answerKey": ""}),
            ("hellaswag", {"label": ""}),
            ("winogrande", {"answer": ""}),
            ("piqa", {"label": -1}),
        ],
    )
    def test_a_split_without_answers_is_refused(self, name, changes, tmp_path):
        rows = [HUB_ROWS[name](i) | changes for i in range(4)]
        with pytest.raises(DataError, match="published without answers"):
            public.load(name, path=write(tmp_path / "rows.jsonl", rows))

    def test_an_answer_that_is_not_a_choice_is_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"row 0.*neither a key nor one of the choices"):
            public.load(
                "mmlu_anatomy", path=write(tmp_path / "rows.jsonl", [mmlu(0) | {"answer": 7}])
            )

    @pytest.mark.parametrize(
        "answers",
        [("1.50", "2.5", "3.0", "4"), ("007", "7", "08", "9"), ("NA", "nan", "None", "null"),
         ("TRUE", "False", "1e5", "1E400"), ("0.1", "0.10", "0.100", ".1")],
    )  # fmt: skip
    def test_a_table_holds_texts_and_no_numbers(self, answers, tmp_path):
        rows = [sciq(f"question {i}?", *answers) for i in range(8)]
        reference = public.load("sciq", path=write(tmp_path / "rows.jsonl", rows))
        found = public.load("sciq", path=write(tmp_path / "rows.csv", rows))
        assert found.pair_items == reference.pair_items
        assert found.pair_items[0]["choices"] == list(answers)

    def test_an_index_in_a_table_is_no_choice_of_that_number(self, tmp_path):
        rows = [
            {"question": f"q{i}?", "choices": json.dumps(["1", "2", "0", "3"]), "answer": 0}
            for i in range(8)
        ]
        found = public.load("mmlu_anatomy", path=write(tmp_path / "rows.csv", rows))
        assert found.pair_items[0]["choices"][0] == "1"

    def test_a_comma_at_the_end_of_each_row_moves_no_column(self, tmp_path):
        file = tmp_path / "rows.csv"
        lines = [f"q{i}?,right{i},x,y,z," for i in range(8)]
        file.write_text("\n".join([",".join(sciq(*"abcde")), *lines]))
        assert public.load("sciq", path=file).pair_items[0]["choices"][1:] == ["x", "y", "z"]

    @pytest.mark.parametrize("row", ["q9?,a,b,c,d,e", "q9?,a,b"])
    def test_a_row_with_other_cells_than_the_header_is_refused(self, row, tmp_path):
        file = tmp_path / "rows.csv"
        lines = [f"q{i}?,right,x,y,z" for i in range(8)]
        file.write_text("\n".join([",".join(sciq(*"abcde")), *lines, row]))
        with pytest.raises(DataError, match=r"line 10 has \d cells and the header 5; put cells"):
            public.load("sciq", path=file)

    def test_a_column_that_stands_twice_is_refused(self, tmp_path):
        file = tmp_path / "rows.csv"
        file.write_text("question,question,correct_answer\na,b,c\n")
        with pytest.raises(DataError, match=r"has the column 'question' twice; rename one"):
            public.load("sciq", path=file)

    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
    def test_nothing_is_not_the_text_none(self, suffix, tmp_path):
        rows = [sciq(f"q{i}?", f"right{i}", "x", "y", "z") for i in range(12)]
        rows[1] |= {"question": None}
        rows[2] |= {"correct_answer": None}
        rows[3] |= {"distractor1": None}
        found = public.load("sciq", path=write(tmp_path / f"rows.{suffix}", rows))
        items = [*found.pair_items, *found.prompt_items]
        assert [i for i, _ in found.skipped] == [1, 2]
        assert not [i for i in items if "None" in (i["question"], *i["choices"])]
        assert next(i for i in items if i["question"] == "q3?")["choices"] == ["right3", "y", "z"]

    def test_a_question_without_its_passage_is_left_out(self, tmp_path):
        rows = [{"question": f"q{i}", "passage": "p", "answer": True} for i in range(8)]
        rows[1] |= {"passage": None}
        found = public.load("boolq", path=write(tmp_path / "rows.jsonl", rows))
        assert found.skipped == ((1, "the column 'passage' is empty"),)

    def test_lists_in_a_csv_file_must_be_json(self, tmp_path):
        rows = [mmlu(i) | {"choices": "['a', 'b']"} for i in range(4)]
        with pytest.raises(
            DataError, match=r"column 'choices' must hold a list.*in a CSV file write it as JSON"
        ):
            public.load("mmlu_anatomy", path=write(tmp_path / "rows.csv", rows))

    def test_a_row_of_another_form_is_named(self, tmp_path):
        with pytest.raises(
            DataError, match=r"row 0 does not have the form that benchmark 'medmcqa' expects"
        ):
            public.load(
                "medmcqa",
                path=write(tmp_path / "rows.jsonl", [HUB_ROWS["medmcqa"](0) | {"cop": "second"}]),
            )

    def test_paths_and_splits_are_checked(self, tmp_path):
        with pytest.raises(
            ArgumentError,
            match=r"path must end in one of \.jsonl, \.json, \.csv, \.parquet, got 'x\.txt'",
        ):
            public.load("medqa", path="x.txt")
        with pytest.raises(DataError, match="is not a file"):
            public.load("medqa", path=tmp_path / "none.jsonl")
        with pytest.raises(ArgumentError, match="split='train' has no meaning for a local file"):
            public.load("medqa", path=tmp_path / "none.jsonl", split="train")
        (tmp_path / "bad.jsonl").write_text('{"question": ')
        with pytest.raises(DataError, match="is not JSON"):
            public.load("medqa", path=tmp_path / "bad.jsonl")
        (tmp_path / "bad.json").write_text("[1, 2]")
        with pytest.raises(DataError, match="must hold rows as JSON objects"):
            public.load("medqa", path=tmp_path / "bad.json")
        with pytest.raises(ArgumentError, match="limit must be an integer"):
            public.load("medqa", path=tmp_path / "bad.jsonl", limit=0)
        with pytest.raises(ArgumentError, match="pair_share must be a number"):
            public.load("medqa", path=tmp_path / "bad.jsonl", pair_share=1.5)


class TestRealFiles:
    """The published files themselves; skipped where `../shared` is not beside the checkout."""

    def check(self, found, n, skipped=0):
        assert (len(found) + len(found.skipped), len(found.skipped)) == (n, skipped)
        pairs, behaviour = found.pairs(), found.behaviour()
        assert len(pairs) == len(found.pair_items)
        assert len(behaviour) == len(found.prompt_items)
        assert not set(behaviour.prompts) & {t for t in pairs.texts}
        return behaviour

    def test_pubmedqa(self, shared):
        path = shared / "data/pubmedqa/ori_pqal.json"
        behaviour = self.check(public.load("pubmedqa", path=path), 1000)
        rows = json.loads(path.read_text())
        decisions = {r["QUESTION"]: r["final_decision"] for r in rows.values()}
        for i in (0, 100, 400):
            question = behaviour.prompts[i].split("\nQuestion: ")[-1].removesuffix("\nAnswer:")
            assert behaviour.completions(i)[0] == (" " + decisions[question],)

    # The one row left out of MedMCQA prints the same text for all four options.
    @pytest.mark.parametrize(("name", "n", "skipped"), [("medqa", 1273, 0), ("medmcqa", 2816, 1)])
    def test_medical_choices(self, shared, name, n, skipped):
        path = shared / f"data/medical_mcq/{name}_test.jsonl"
        found = public.load(name, path=path)
        behaviour = self.check(found, n, skipped)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        answers: dict[str, set[str]] = {}
        for row in rows:
            answers.setdefault(row["question"].strip(), set()).add(
                " " + row["options"][row["answer_idx"]].strip()
            )
        for i in range(0, len(behaviour), 50):
            question = behaviour.prompts[i].removeprefix("Question: ").removesuffix("\nAnswer:")
            assert behaviour.completions(i)[0][0] in answers[question]

    def test_gsm8k(self, shared):
        path = shared / "data/gsm8k/test.jsonl"
        behaviour = self.check(public.load("gsm8k", path=path), 1319)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        answers = {
            r["question"].strip(): r["answer"].split("#### ")[-1].replace(",", "") for r in rows
        }
        for i in range(0, len(behaviour), 20):
            question = behaviour.prompts[i].removeprefix("Question: ").removesuffix("\nAnswer:")
            right, wrong = behaviour.completions(i)
            assert right == (" " + answers[question],)
            assert len(wrong) == 3

    def test_both_published_forms_of_truthfulqa_agree_on_the_questions(self, shared):
        folder = shared / "data/truthfulqa"
        one, two = (
            public.load("truthfulqa", path=folder / f) for f in ("mc_task.json", "TruthfulQA.csv")
        )
        self.check(one, 817)
        self.check(two, 817)
        questions = [{i["question"] for i in (*b.pair_items, *b.prompt_items)} for b in (one, two)]
        assert len(questions[0] & questions[1]) > 780
        watermelon = "What happens to you if you eat watermelon seeds?"
        for found in (one, two):
            choices = next(
                i["choices"]
                for i in (*found.pair_items, *found.prompt_items)
                if i["question"] == watermelon
            )
            assert choices[0].startswith("The watermelon seeds pass through your digestive system")
            assert any("grow" in w for w in choices[1:])


def test_a_benchmark_feeds_a_fit(shared, tmp_path):
    """From file to plan, on the bundled pair; its score means nothing there, that it runs through
    does."""
    found = public.load("medmcqa", path=shared / "data/medical_mcq/medmcqa_test.jsonl", limit=60)
    expert, target = esl.zoo.load_pair()
    config = esl.ExpertSteerConfig(
        mi=esl.MIConfig(n_permutations=2, n_bootstrap=5, n_components=4),
        rfm=esl.RFMConfig(bandwidth=1.0, validation_fraction=0.0, n_rounds=1),
    )
    fit = esl.ExpertSteer(config).fit(
        expert, target, found.pairs(), behaviour=found.behaviour(), progress=False
    )
    assert fit.provenance["pairs"]["hash"] == found.pairs().hash
    assert fit.plan(coefficient=0.1).vectors[0].scale > 0


def test_names_of_the_first_version_still_work(tmp_path):
    with pytest.warns(DeprecationWarning, match="Preset is now PublicBenchmark"):
        assert public.Preset is public.PublicBenchmark
    with pytest.warns(DeprecationWarning, match="PRESETS is now PUBLIC_BENCHMARKS"):
        assert public.PRESETS is public.PUBLIC_BENCHMARKS
    found = public.load(
        "mmlu_anatomy", path=write(tmp_path / "r.jsonl", [mmlu(i) for i in range(9)])
    )
    with pytest.warns(DeprecationWarning, match=r"Benchmark\.preset is now Benchmark\.definition"):
        assert found.preset is found.definition is public.get("mmlu_anatomy")
    with pytest.raises(AttributeError, match="no attribute 'Presets'"):
        _ = public.Presets
