"""The benchmark on real models, run on small ones: what its rows are, what it chooses, how it goes on."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from expertsteer_lens import zoo
from expertsteer_lens._checked_json import digest_of
from expertsteer_lens.benchmarks.transfer import (
    Answered,
    TransferBench,
    TransferConfig,
    TransferTask,
    bench_transfer,
)
from expertsteer_lens.benchmarks.transfer.models import Maps, Side, steered
from expertsteer_lens.benchmarks.transfer.rows import SHARES, _at_cost, choose_floor
from expertsteer_lens.benchmarks.transfer.tables import overview
from expertsteer_lens.errors import ArgumentError, ArtifactError, DataError
from expertsteer_lens.learn.directions import random_direction
from expertsteer_lens.measure.neutral import NeutralTexts, neutral_nll
from expertsteer_lens.pipeline import likelier_under

SMALL = TransferConfig(
    n_pairs=(1, 2),
    n_draws=3,
    n_random=3,
    n_shuffles=2,
    target_depths=(0.5,),
    coefficients=(0.05, 0.2),
    expert_depths=(0.5, 0.7),
    labelling=((1, 0), (3, 1)),
    budget=5.0,
)


def task(name: str, first: int, *, question: str = "Glad?") -> TransferTask:
    """Texts of the small world as answers; every question is asked once."""
    pairs = zoo.contrast_pairs()
    rows = [
        Answered(question=f"{name} {i}?", positive=(str(p),), negative=(str(n),))
        for i, (p, n) in enumerate(zip(pairs.positive, pairs.negative, strict=True))
    ][first : first + 12]
    return TransferTask(
        name=name,
        domain="moods",
        pairs=tuple(rows[:8]),
        tests=tuple(rows[8:]),
        instruction="Be glad.",
        question=question,
    )


@pytest.fixture(scope="module")
def models():
    expert, target = zoo.load_pair()
    return {"expert": expert, "target": target}


def arguments(models, **changes):
    return {
        "models": models,
        "transfers": [("expert", "target")],
        "tasks": [task("a", 0)],
        "development": [task("dev", 12)],
        "anchors": zoo.anchors(40),
        "neutral": zoo.neutral_texts(4),
        "config": SMALL,
    } | changes


@pytest.fixture(scope="module")
def bench(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    return bench_transfer(**arguments(models), out=out), out


def test_without_few_labels_all_pairs_and_none_are_left(models, bench):
    config = dataclasses.replace(SMALL, n_pairs=())
    found = bench_transfer(**arguments(models, config=config))
    frame, full = found.to_pandas(), bench[0].to_pandas()
    assert set(frame.n_pairs) == {0, 8}
    key = ["expert", "method", "n_pairs", "draw"]
    same = frame.merge(full, on=key, suffixes=("", "_full"))
    assert len(same) == len(frame) == len(full[full.n_pairs.isin((0, 8))])
    asked = same.method.str.contains("labeller")  # by how many rounds is chosen in both
    torch.testing.assert_close(
        torch.tensor(same.effect[~asked].to_numpy()),
        torch.tensor(same.effect_full[~asked].to_numpy()),
    )
    assert "labelling by expert" not in found.choices
    assert "expert, mapped" in found.to_markdown()
    layout = found.plot().layout  # a single panel: what is said above it is not cut
    lines = layout.title.text.replace("<br>", "\n").splitlines()
    assert layout.width > 6.5 * max(len(re.sub("<[^>]+>", "", line)) for line in lines) > 700


def test_few_labels_are_added_to_a_run_without_them(models, bench, tmp_path):
    """The same rows as all at once; a run with some keeps to their numbers."""
    none = dataclasses.replace(SMALL, n_pairs=(), n_draws=1)
    before = bench_transfer(**arguments(models, config=none), out=tmp_path)
    told = []
    grown = bench_transfer(**arguments(models), out=tmp_path, on_progress=told.append)
    assert sum(", a: " in line for line in told) == 4  # two models, from one pair and from two
    assert grown.rows[: len(before.rows)] == TransferBench.read(tmp_path).rows[: len(before.rows)]
    key = ["expert", "method", "n_pairs", "draw"]
    one, other = (b.to_pandas().set_index(key).sort_index() for b in (grown, bench[0]))
    pd.testing.assert_frame_equal(
        one[other.columns], other, check_dtype=False, atol=1e-4, rtol=1e-3
    )
    assert grown.choices == json.loads(json.dumps(bench[0].choices))
    for n_pairs in ((), (1,)):
        changed = dataclasses.replace(SMALL, n_pairs=n_pairs)
        with pytest.raises(ArgumentError, match="config"):
            bench_transfer(**arguments(models, config=changed), out=tmp_path)


def test_the_control_of_labels_from_an_instruction_is_instructions_of_other_tasks(models):
    dev = [
        dataclasses.replace(task("dev", 12), instruction="You write about boats."),
        dataclasses.replace(task("dev 2", 24), instruction="You write about rain.", domain="b"),
        dataclasses.replace(task("dev 3", 20), instruction="You write about snow.", domain="c"),
    ]
    config = dataclasses.replace(SMALL, n_pairs=())
    frame = bench_transfer(**arguments(models, development=dev, config=config)).to_pandas()
    for whose, draws in (("a neighbour's", [0]), ("another domain's", [0, 1])):
        rows = frame[frame.method == f"self as labeller, {whose} instruction"]
        assert rows.draw.tolist() == draws
    target = Side("target", models["target"], SMALL.batch_size)
    scores = [target.instructed(task("a", 0), other.instruction) for other in dev]
    assert not torch.equal(*scores[:2])
    # Of plain texts the answer behind "Answer:" is scored, and nothing of the question.
    texts = [f"{pair.question}" for pair in task("a", 0).pairs]
    shown = [
        f"Question: {q}\nAnswer: {a}"
        for q, a in zip((t for t in texts for _ in range(2)), task("a", 0).answers, strict=True)
    ]
    spans = [(len(s) - len(a), len(s)) for s, a in zip(shown, task("a", 0).answers, strict=True)]
    expected = likelier_under(models["target"], "You write about boats.", shown, spans=spans)
    torch.testing.assert_close(scores[0].float(), expected, atol=1e-5, rtol=1e-5)
    assert not frame.method.str.contains("expert as labeller, a").any()


def test_a_task_without_an_instruction_has_no_labels_from_one(models):
    bare = [
        dataclasses.replace(task(name, i), instruction="") for name, i in (("a", 0), ("dev", 12))
    ]
    config = dataclasses.replace(SMALL, n_pairs=())
    found = bench_transfer(**arguments(models, tasks=bare[:1], development=bare[1:], config=config))
    assert not found.to_pandas().method.str.contains("instruct").any()
    assert found.choices["instructing by expert"]["setting"] is None


def test_labels_that_were_given_are_not_counted_as_right():
    from expertsteer_lens.benchmarks.transfer.rows import _right

    truth = torch.tensor([1, 0, 1, 0, 1, 0])
    found = torch.tensor([1, 0, 0, 0, 1, 1])  # the pair 0 was given; two of the other four
    assert _right(found, truth, torch.tensor([0])) == 0.5
    assert _right(found, truth) == pytest.approx(4 / 6)


def test_tasks_with_other_numbers_of_pairs_stand_together(bench):
    first = bench[0]
    second = [
        row
        | {"task": "b", "effect": row["effect"] + 1}
        | ({"n_pairs": 30} if row["n_pairs"] == 8 else {})
        for row in first.rows
    ]
    found = TransferBench([*first.rows, *second], first.choices, first.settings)
    summary = found.summary().set_index(["method", "n_pairs"])
    alone = first.summary().set_index(["method", "n_pairs"])
    assert summary.tasks["native", float("inf")] == 2
    assert summary.effect["native", float("inf")] == pytest.approx(alone.effect["native", 8] + 0.5)
    assert summary.tasks["native", 1] == 2
    gains = found.differences().set_index(["difference", "n_pairs"])
    assert gains.tasks["expert, mapped - native", float("inf")] == 2
    assert "| all | native | " in found.to_markdown()
    assert "| all | native | " in overview([found], {})
    assert "all" in found.plot().layout.xaxis.ticktext


def test_rows_of_fewer_tasks_say_so(bench):
    """A run that was ended while few labels were added has them of some tasks only."""
    first = bench[0]
    second = [row | {"task": "b"} for row in first.rows if row["n_pairs"] not in (1, 2)]
    found = TransferBench([*first.rows, *second], first.choices, first.settings)
    assert "| 1 | native (1 of 2 tasks) | " in found.to_markdown()
    assert "| 8 | native | " in found.to_markdown()
    table = overview([found], {})
    assert re.search(r"\| 1 \| native \| [^|]+ \(1 of 2 tasks\) \|", table)
    assert re.search(r"\| all \| native \| [^|]+\] \|", table)


def test_every_method_has_its_rows(bench):
    frame = bench[0].to_pandas()
    counts = frame.groupby(["method", "n_pairs"]).size().to_dict()
    assert counts["random", 0] == 3
    assert counts["native", 8] == counts["expert, mapped", 8] == 1
    assert counts["random, same budget", 0] == 3
    assert counts["native, far block", 8] == 1
    assert counts["native", 1] == counts["expert as labeller", 2] == 3
    assert counts["expert as labeller", 0] == counts["expert as labeller, instructed", 0] == 1
    assert torch.isfinite(torch.tensor(frame.effect.to_numpy())).all()
    # What a direction costs is measured, from however many pairs: else nobody knows beside which
    # random directions it stands.
    learnt = frame[~frame.method.isin(("unsteered", "prompting", "random"))]
    assert set(learnt.n_pairs) == {0, 1, 2, 8}
    assert learnt.nll_rise.notna().all()


def test_the_expert_knows_what_the_floor_does_not(bench):
    """The small expert knows moods: from one pair and through the map it moves the target as the
    target's own labels do, and further than any random direction."""
    summary = bench[0].summary().set_index(["method", "n_pairs"])
    floor = bench[0].to_pandas().query("method == 'random'").effect.max()
    for key in (("native", 8), ("expert, mapped", 8), ("expert as labeller", 2)):
        assert summary.effect[key] > floor
    assert summary.agreement["expert as labeller", 2] > 0.9
    assert summary.share["native", 8] == pytest.approx(1.0)
    assert summary.sd_above_floor["native", 8] > 2


def test_random_directions_keep_to_the_budget(models):
    """Each has the largest strength of the grid within the budget, none a larger one than the
    other directions have."""
    target, of = Side("target", models["target"], 16), [task("dev", 12)]
    texts = zoo.neutral_texts(4)
    hook, norm = target.at(0.5), target.states(of[0]).median_norm(target.at(0.5))
    config = TransferConfig(n_random=4, budget=0.02)
    neutral = NeutralTexts(target.host, texts)
    found = choose_floor(target, {"written": hook, "coefficient": 2.0}, of, neutral, config)

    def nll(plan) -> float:
        sums = neutral_nll(target.host, texts, plan=plan).sum(0)
        return float(sums[0] / sums[1])

    grid = [2.0 * share for share in SHARES]
    for seed, strength in enumerate(found["coefficients"]):
        direction = random_direction(target.host.facts()["d_model"], seed=seed)
        at = grid.index(strength)
        rises = [
            nll(steered(target, hook, direction, c, norm)) - nll(None) for c in grid[at : at + 2]
        ]
        assert rises[0] == pytest.approx(found["nll_rise"][seed], abs=1e-5)
        assert rises[0] <= config.budget < (rises[1] if len(rises) == 2 else 1)
    assert max(found["coefficients"]) < 2.0  # else nothing was searched


def test_the_distance_from_the_floor_compares_like_with_like(bench):
    """A direction that keeps to the budget stands beside random ones that do; one that does not, or
    whose cost is not known, beside random ones of its own strength."""
    frame = bench[0].to_pandas()
    within, same = (
        frame[frame.method == method].effect for method in ("random, same budget", "random")
    )

    def summary(rows):
        settings = bench[0].settings
        return TransferBench(rows, settings=settings).summary().set_index(["method", "n_pairs"])

    rows = [
        row | {"effect": row["effect"] - 0.5 * row["draw"]}
        if row["method"] == "random, same budget"
        else row
        for row in bench[0].rows
    ]
    within = within - 0.5 * torch.arange(len(within)).numpy()  # another floor than `same`
    shown = summary(rows)
    for key in (("native", 8), ("expert, mapped", 8), ("paper's alignment", 8)):
        assert shown.nll_rise[key] <= SMALL.budget
        above = (shown.effect[key] - within.mean()) / within.std()
        assert shown.sd_above_floor[key] == pytest.approx(above)
    unknown = [{k: v for k, v in row.items() if k != "nll_rise" or row["n_pairs"]} for row in rows]
    above = (shown.effect["expert as labeller", 0] - same.mean()) / same.std()
    found = summary(unknown).sd_above_floor["expert as labeller", 0]  # as in runs of before
    assert found == pytest.approx(above)
    costly = [row | {"nll_rise": 9.0} if row["method"] == "expert, mapped" else row for row in rows]
    above = (shown.effect["expert, mapped", 8] - same.mean()) / same.std()
    assert summary(costly).sd_above_floor["expert, mapped", 8] == pytest.approx(above)


def test_a_run_without_the_controls_gets_them(bench, models, tmp_path):
    """Rows that an older run lacks are added; none of its own is measured again."""
    first, _ = bench
    new = ("random, same budget", "native, far block")
    new += ("self, mapped, cost of native", "expert, mapped, cost of native")
    new += ("self as labeller, instructed", "expert as labeller, instructed")
    new += ("self as labeller, a neighbour's instruction",)
    assert set(new) <= set(first.to_pandas().method)
    old = TransferBench(
        [row for row in first.rows if row["method"] not in new],
        {n: c for n, c in first.choices.items() if not n.startswith(("floor", "instructing"))},
        first.settings,
    )
    means = old.to_pandas().query("method == 'random'").groupby("draw").effect.mean()
    assert old.floor_means("target").tolist() == means.tolist()
    old.save_run(tmp_path)
    again = bench_transfer(**arguments(models), out=tmp_path)
    assert [r for r in again.rows if r["method"] not in new] == TransferBench.read(tmp_path).rows[
        : len(old.rows)
    ]
    pd.testing.assert_frame_equal(
        again.summary().set_index(["method", "n_pairs"]).sort_index(),
        first.summary().set_index(["method", "n_pairs"]).sort_index(),
        check_dtype=False,
        atol=1e-4,
        rtol=1e-3,  # saved rows have six digits
    )


def test_block_and_strength_are_the_best_within_the_budget(bench, models):
    choices = bench[0].choices
    tried = choices["steering of target"]["tried"]
    assert {row["coefficient"] for row in tried} == {0.05, 0.2}
    assert len({row["hook"] for row in tried}) == 1  # one depth is a candidate
    assert len({row["written"] for row in tried}) > 1
    best = max((row for row in tried if row["nll_rise"] <= 5.0), key=lambda row: row["effect"])
    for name in ("hook", "written", "coefficient"):
        assert choices["steering of target"][name] == best[name]
    alone = TransferConfig(**{**SMALL.to_dict(), "write_depths": ()})
    again = bench_transfer(**arguments(models, config=alone)).choices["steering of target"]
    assert again["written"] == again["hook"]


def test_a_run_goes_on_where_it_stopped(bench, models):
    """What is there is not measured again, another task is added, other settings are refused."""
    first, out = bench
    told = []
    more = bench_transfer(
        **arguments(models, tasks=[task("a", 0), task("b", 30)]), out=out, on_progress=told.append
    )
    assert not any(", a:" in line for line in told)
    assert any(", b:" in line for line in told)
    assert more.rows[: len(first.rows)] == TransferBench.read(out).rows[: len(first.rows)]
    assert len(more.rows) == 2 * len(first.rows)
    other = {
        "n_draws": {"config": TransferConfig(**{**SMALL.to_dict(), "n_draws": 4})},
        "tasks": {"tasks": [task("a", 40)]},  # other texts under the same name
        "models": {"models": {**models, "expert": zoo.load_pair()[1]}},
        "neutral": {"neutral": zoo.neutral_texts(3)},
    }
    for named, changed in other.items():
        with pytest.raises(ArgumentError, match="config" if named == "n_draws" else named):
            bench_transfer(**{**arguments(models), **changed}, out=out)


def test_another_processor_rounds_the_fingerprint(bench, models, tmp_path):
    """A few bits of it may be others; many are other weights."""
    first, _ = bench
    for n_bits, goes_on in ((2, True), (40, False)):
        facts = {name: dict(f) for name, f in first.settings["models"].items()}
        shape, digits = facts["target"]["fingerprint"].split("-")
        flipped = int(digits, 16) ^ (2**n_bits - 1)
        facts["target"]["fingerprint"] = f"{shape}-{flipped:0{len(digits)}x}"
        changed = TransferBench(first.rows, first.choices, {**first.settings, "models": facts})
        changed.save_run(tmp_path / str(n_bits))
        if goes_on:
            again = bench_transfer(**arguments(models), out=tmp_path / str(n_bits))
            assert len(again.rows) == len(first.rows)
        else:
            with pytest.raises(ArgumentError, match="models 'target'"):
                bench_transfer(**arguments(models), out=tmp_path / str(n_bits))


def test_saved_and_read_again(bench, tmp_path):
    out = bench[0].save(tmp_path / "saved")
    again = TransferBench.read(out)
    pd.testing.assert_frame_equal(
        again.summary(), bench[0].summary(), check_dtype=False, atol=1e-3, rtol=1e-2
    )
    assert "| 8 | native | " in (out / "bench.md").read_text()
    assert "expert as labeller" in (out / "bench.html").read_text()
    with pytest.raises(ArtifactError, match="cannot be read"):
        TransferBench.read(tmp_path)
    file = out / "run.json"
    text = file.read_text()
    for damaged, word in ((text[: len(text) // 2], "damaged"), (_one_digit(text), "checksum")):
        file.write_text(damaged)
        with pytest.raises(ArtifactError, match=word):
            TransferBench.read(out)


def _one_digit(text: str) -> str:
    """The text with the first digit of the first effect changed."""
    i = text.index('"effect": ') + len('"effect": ')
    i += text[i] == "-"
    return text[:i] + ("1" if text[i] != "1" else "2") + text[i + 1 :]


def test_paired_differences_are_of_the_same_tasks(bench):
    gains = bench[0].differences().set_index(["difference", "n_pairs"])
    means = bench[0].by_task().set_index(["method", "n_pairs"]).effect
    expected = means["expert as labeller", 1] - means["self as labeller", 1]
    assert gains.effect["expert as labeller - self as labeller", 1] == pytest.approx(expected)
    # An instruction takes no labelled pair: it stands beside directions from any number.
    expected = means["expert, mapped", 8] - means["prompting", 0]
    assert gains.effect["expert, mapped - prompting", 8] == pytest.approx(expected)


def test_the_texts_of_a_task_are_paired_once(models, monkeypatch):
    """Their passes are what a map costs; what was read is not changed by a fit."""
    expert, target = (Side(name, model, 16) for name, model in models.items())
    maps = Maps(expert, target, zoo.anchors(40), [expert.at(0.5)], target.at(0.5), "plain", seed=0)
    read = []
    pair = maps._pair
    monkeypatch.setattr(
        maps, "_pair", lambda texts, groups: read.append(len(texts)) or pair(texts, groups)
    )
    one, other, hook = task("a", 0), task("b", 30), expert.at(0.5)
    first = maps.fit([hook], one)[hook]
    again = maps.fit([hook], one)[hook]
    assert read == [40, 16]
    assert torch.equal(first.encoder.weight, again.encoder.weight)
    assert not torch.equal(maps.fit([hook], other)[hook].encoder.weight, first.encoder.weight)
    assert read == [40, 16, 16]


def test_single_pairs_are_drawn_once_each():
    from expertsteer_lens.benchmarks.transfer.rows import draws

    config = TransferConfig(n_draws=20)
    singles = [int(pair) for pair in draws(8, 1, config)]
    assert sorted(singles) == list(range(8))
    assert len(draws(8, 4, config)) == 20
    assert draws(8, 8, config) == []


def test_labels_in_the_reduced_basis_are_those_of_label_texts(models):
    from expertsteer_lens.benchmarks.transfer.models import Side
    from expertsteer_lens.benchmarks.transfer.rows import label, rows_of
    from expertsteer_lens.pipeline.labelling import best_cut, score_states

    side, one = Side("expert", models["expert"], 16), task("a", 0)
    states, labels, pairs = side.states(one), side.labels(one), torch.tensor([3, 5])
    rows = rows_of(pairs)
    scores = score_states(
        [states[name][rows] for name in states],
        labels[rows].float(),
        [states[name] for name in states],
        n_rounds=2,
        flatten=3,
    )
    expected = (scores > best_cut(scores)).long()
    expected[rows] = labels[rows]
    assert label(side, one, pairs, (3, 2, False), side.form).equal(expected)


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"transfers": [("expert", "nobody")]}, ArgumentError, "nobody"),
        ({"transfers": [("expert", "expert")]}, ArgumentError, "different"),
        ({"transfers": []}, ArgumentError, "empty"),
        ({"tasks": []}, DataError, "at least one task"),
        ({"anchors": []}, DataError, "anchors is empty"),
        ({"neutral": []}, DataError, "neutral is empty"),
        ({"development": [task("a", 12)]}, DataError, "held out"),
        (
            {"config": TransferConfig(budget=1e-9, target_depths=(0.5,), coefficients=(5.0,))},
            ArgumentError,
            "budget",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(models, changes, error, word):
    with pytest.raises(error, match=word):
        bench_transfer(**arguments(models, **changes))


def test_a_task_must_hold_its_test_out(tmp_path):
    row = {"question": "Why?", "positive": "So.", "negative": ["No."]}
    other = {**row, "question": "How?"}
    data = {"name": "mine", "pairs": [row, other], "tests": [{**row, "question": "When?"}]}
    path = tmp_path / "task.json"
    path.write_text(json.dumps(data))
    assert TransferTask.from_json(path).domain == "mine"
    path.write_text(json.dumps({**data, "tests": [row]}))
    with pytest.raises(DataError, match="held out"):
        TransferTask.from_json(path)
    path.write_text(json.dumps({"name": "mine", "pairs": [1]}))
    with pytest.raises(DataError, match="form of a task"):
        TransferTask.from_json(path)
    path.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        TransferTask.from_json(path)
    for text in ("[" * 100_000, '{"name": ' + "9" * 5000 + "}", '{"name": "a", "name": "b"}'):
        path.write_text(text)
        with pytest.raises(DataError, match="is no JSON that can be read"):
            TransferTask.from_json(path)


def test_two_runs_into_one_folder_are_refused(models, tmp_path):
    def again(_):
        with pytest.raises(ArtifactError, match="is being written by another process; wait for it"):
            bench_transfer(**arguments(models), out=tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench_transfer(**arguments(models), out=tmp_path, on_progress=again)


@pytest.mark.parametrize("name", ["rows", "choices", "settings"])
def test_a_run_without_its_parts_is_a_named_error(tmp_path, name):
    content = {"rows": [], "choices": {}, "settings": {}}
    for changed in ({**content, name: 3}, {k: v for k, v in content.items() if k != name}):
        changed["content_sha256"] = digest_of(changed)
        (tmp_path / "run.json").write_text(json.dumps(changed))
        with pytest.raises(ArtifactError, match=f"its '{name}' is missing or no (list|dict)"):
            TransferBench.read(tmp_path)


def test_plain_models_are_shown_question_and_answer():
    one = task("a", 0)
    behaviour = one.behaviour("plain", instructed=True)
    assert behaviour.prompts[0] == "Be glad.\nQuestion: a 8?\nAnswer:"
    assert behaviour.positive[0][0].startswith(" ")
    chat = one.behaviour("chat")
    assert chat.prompts[0].messages == (("user", "a 8?"),)
    assert not chat.positive[0][0].startswith(" ")


def test_of_a_stopped_run_only_whole_tasks_are_summed_up(bench):
    """The target's own rows of a task that the expert has not come to are left out."""
    own = [row for row in bench[0].rows if row["expert"] == "target"]
    stopped = TransferBench([*bench[0].rows, *({**row, "task": "b"} for row in own)])
    assert set(stopped.by_task().task) == {"a"}
    assert set(stopped.summary().tasks) == {1}


RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks/results"


@pytest.fixture(scope="module")
def real_fields():
    """The script that makes the tables of the committed runs."""
    path = RESULTS.parent / "real_fields_overview.py"
    spec = importlib.util.spec_from_file_location("real_fields_overview", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RESULTS.parent))  # it writes its pages as the others do
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", ["smollm2", "gemma3"])
def test_the_tables_in_the_docs_are_those_of_the_rows(real_fields, target):
    """The runs on real models are committed, and their tables are made of them."""
    table = (RESULTS / f"real_fields_{target}" / "bench.md").read_text(encoding="utf-8")
    assert table == real_fields.table(target)
    assert (RESULTS / "real_fields.md").read_text("utf-8") == real_fields.overview_table()


@pytest.mark.parametrize("target", ["smollm2", "gemma3"])
def test_the_run_in_bfloat16_says_what_that_in_float32_says(target):
    """The fields that were run in both: the same block and strength, nearly the same means."""
    runs = [TransferBench.read(RESULTS / f"real_fields_{target}{end}") for end in ("", "_float32")]
    for name in (f"steering of {target}", f"block of qwen for {target}"):
        half, full = (run.choices[name] for run in runs)
        assert half["hook"] == full["hook"]
        assert half.get("coefficient") == full.get("coefficient")
    key = ["expert", "task", "method", "n_pairs"]
    half, full = (run.to_pandas().groupby(key).effect.mean() for run in runs)
    both = pd.DataFrame({"half": half, "full": full}).dropna().reset_index()
    assert both.task.nunique() >= 5
    means = both.groupby(["expert", "method", "n_pairs"])[["half", "full"]].mean()
    learnt = means[means.index.get_level_values("n_pairs") > 0].drop("paper's alignment", level=1)
    assert (learnt.half - learnt.full).abs().max() < 0.01


def test_a_run_in_another_dtype_is_another_run(models, bench):
    """The weights are rounded: states, choices and rows are others, and a run says which."""
    half = {
        name: zoo_model.bfloat16() for name, zoo_model in zip(models, zoo.load_pair(), strict=True)
    }
    result = bench_transfer(**arguments(half, tasks=[task("b", 4)], development=[task("d", 0)]))
    assert {facts["dtype"] for facts in result.settings["models"].values()} == {"bfloat16"}
    assert all("dtype" not in facts for facts in bench[0].settings["models"].values())
    with pytest.raises(ArgumentError, match="models 'expert', models 'target'"):
        bench_transfer(**arguments(half), out=bench[1])


@pytest.mark.parametrize(
    ("rise", "wanted"),
    [
        (lambda c: 4 * c**2.2, 0.053),
        (lambda c: 0.25 * c**2.2, 0.188),
        (lambda c: c**2.2, 0.1),
        (lambda c: 9 * c**2 - 0.83 * c, 0.0999),  # a little helps: guessing by squares goes astray
        (lambda c: -(c**2), 0.1),  # never: the smallest comes nearest
        (lambda c: 0.001 * c**2.2, 0.4),  # never: the largest that is tried
    ],
)
def test_directions_are_compared_at_one_cost(rise, wanted):
    """A direction that does four times the damage of another is measured at about half the
    strength, one that does a quarter of it at about twice."""

    class Known:
        def __init__(self, coefficient: float = 0.1) -> None:
            self.coefficient, self.hook = coefficient, "block"

        def at(self, hook: str, coefficient: float) -> Known:
            return Known(coefficient)

        def cost(self, direction: str) -> float:
            return rise(self.coefficient)

        def effect(self, direction: str) -> dict[str, float]:
            return {"effect": self.coefficient}

    found = _at_cost(Known(), "direction", 0.1**2.2)
    assert found["effect"] == pytest.approx(wanted, rel=0.02)
    assert found["nll_rise"] == rise(found["effect"])


def test_without_a_rise_there_is_no_cost_to_meet():
    """The target's own direction helps: mapped ones stay at the strength of all others."""
    meter = SimpleNamespace(coefficient=0.1, costed=lambda direction: {"nll_rise": 0.2})
    assert _at_cost(meter, "direction", -0.01) == {"nll_rise": 0.2}
