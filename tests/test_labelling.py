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


def test_a_question_stands_where_it_is_put():
    _, target = zoo.load_pair()
    host = esl.hosts.as_host(target)
    from expertsteer_lens.pipeline.asking import _asked

    texts = [str(zoo.contrast_pairs().positive[0])]
    assert _asked(host, "Is it glad?", texts[0], ("Yes", "No")) == (
        f"Text: {texts[0]}\nIs it glad? Answer Yes or No.\nAnswer:"
    )
    assert _asked(host, "{text} It was", texts[0], ("a", "b")) == f"{texts[0]} It was"


def test_asked_scores_are_what_single_texts_give():
    """Batches of texts of several lengths against one text at a time, read by hand."""
    from expertsteer_lens.pipeline import ask_about

    _, target = zoo.load_pair()
    texts = [str(p) for p in zoo.behaviour(5).prompts]
    found = ask_about(target, "{text}", texts, answers=(" happy", " sad"), batch_size=3)
    host = esl.hosts.as_host(target)
    first = [host.tokenizer.encode(w, add_special_tokens=False)[0] for w in (" happy", " sad")]
    for text, score in zip(texts, found, strict=True):
        log_probs = host.forward(host.tokenize([text])).detach()[0, -1].log_softmax(-1)
        assert float(score) == pytest.approx(
            float(log_probs[first[0]] - log_probs[first[1]]), abs=1e-4
        )


def test_asked_scores_lead_self_training_where_nothing_is_labelled():
    """A noisy answer to every text is enough to say which division is meant, and which side."""
    heap, labels = states()
    noise = torch.randn(len(labels), generator=torch.Generator().manual_seed(5)).double()
    asked = labels + noise
    scores = score_states(None, None, [heap], n_rounds=1, start=asked)
    assert accuracy(asked, labels) < 0.8 < 0.97 < accuracy(scores, labels)
    assert accuracy(score_states(None, None, [heap], n_rounds=1, start=-asked), labels) < 0.03


def test_a_question_alone_labels_texts():
    """The small target continues a text by the mood it is in: asked that way, it labels moods."""
    _, target = zoo.load_pair()
    pairs = zoo.contrast_pairs()
    labelled = esl.label_texts(
        target, None, pairs.texts, question="{text}", answers=(" happy", " sad")
    )
    assert labelled.provenance["question"] == "{text}"
    assert labelled.provenance["pairs"] is None
    assert len(labelled) == len(pairs.texts)


@pytest.mark.parametrize(
    ("question", "answers", "word"),
    [
        (None, ("Yes", "No"), "nothing says what is positive"),
        ("  ", ("Yes", "No"), "question"),
        ("Glad?", ("Yes", "Yes"), "told apart"),
        ("Glad?", ("Yes",), "two words"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(question, answers, word):
    _, target = zoo.load_pair()
    texts = zoo.contrast_pairs().texts[:6]
    with pytest.raises(ArgumentError, match=word):
        esl.label_texts(target, None, texts, question=question, answers=answers)


def test_a_chat_model_is_asked_in_its_template():
    """The answers are what the assistant says next, whatever stands in front of them."""
    from expertsteer_lens.pipeline import ask_about

    _, target = zoo.load_pair()
    tokenizer = esl.as_host(target).tokenizer
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Once {{ m.content }} Now she "
        "was"
        "{% else %} {{ m.content }}{% endif %}{% endfor %}"
    )
    try:
        texts = ["Ella had a boat.", "Rose played with Leo in the barn."]
        found = ask_about(target, "{text}", texts, answers=("happy", "sad"))
    finally:
        tokenizer.chat_template = None
    plain = [f"Once {text} Now she was" for text in texts]
    by_hand = ask_about(target, "{text}", plain, answers=(" happy", " sad"))
    assert found.tolist() == pytest.approx(by_hand.tolist(), abs=1e-4)


# -- labels from an instruction -------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n"
    "{% else %}{{ m.content }}{% if not loop.last %} {% endif %}{% endif %}{% endfor %}"
)


def by_hand(host, front: str, answer: str) -> float:
    """Mean log-probability of the answer's tokens behind what stands in front, nats."""
    ids = host.tokenize([front + answer]).input_ids
    n_front = host.tokenize([front]).input_ids.shape[1] if front else 1  # what begins every text
    log_probs = host.forward(host.tokenize([front + answer])).detach()[0].log_softmax(-1)
    return float(log_probs[:-1].gather(-1, ids[0, 1:, None])[n_front - 1 :].mean())


def test_an_instruction_scores_texts_by_how_much_likelier_it_makes_them():
    """Batches of texts of several lengths against single passes, with and without `against`."""
    from expertsteer_lens.pipeline import likelier_under

    _, target = zoo.load_pair()
    host = esl.as_host(target)
    texts = ["Ella had a boat.", "Rose played with Leo in the barn.", "She cried."]
    for against in (None, "He felt upset."):
        found = likelier_under(target, "She was sad.", texts, against=against, batch_size=2)
        other = "" if against is None else f"{against}\n"
        expected = [by_hand(host, "She was sad.\n", t) - by_hand(host, other, t) for t in texts]
        assert found.tolist() == pytest.approx(expected, abs=1e-4)
    part = likelier_under(target, "She was sad.", texts, spans=[(9, 15), (5, 11), (0, 3)])
    front = "Ella had"  # of the span alone, behind all that stands before it
    expected = by_hand(host, f"She was sad.\n{front}", " a boat") - by_hand(host, front, " a boat")
    assert float(part[0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("template", "told", "told_twice"),
    [
        (TEMPLATE, "She was sad.\nOnce", "She was sad.\n\nBe brief.\nOnce"),
        # A template that leaves system messages out, and one that refuses them.
        (TEMPLATE.replace("{{ m.content }}\n", ""), "She was sad.\nOnce", None),
        (
            TEMPLATE.replace("{{ m.content }}\n", "{{ raise_exception('no') }}"),
            "She was sad.\nOnce",
            None,
        ),
    ],
    ids=["shown", "left out", "refused"],
)
def test_a_chat_model_is_told_in_its_system_message_or_by_the_user(template, told, told_twice):
    from expertsteer_lens.pipeline import likelier_under

    _, target = zoo.load_pair()
    host = esl.as_host(target)
    chats = [esl.Chat.ask("Once", "she had a boat.")]
    briefly = [esl.Chat.ask("Once", "she had a boat.", system="Be brief.")]
    host.tokenizer.chat_template = template
    try:
        found = float(likelier_under(target, "She was sad.", chats)[0])
        twice = None if told_twice is None else likelier_under(target, "She was sad.", briefly)
    finally:
        host.tokenizer.chat_template = None
    answer = " she had a boat."
    expected = by_hand(host, told, answer) - by_hand(host, "Once", answer)
    assert found == pytest.approx(expected, abs=1e-4)
    if twice is not None:
        expected = by_hand(host, told_twice, answer) - by_hand(host, "Be brief.\nOnce", answer)
        assert float(twice[0]) == pytest.approx(expected, abs=1e-4)


def test_an_instruction_alone_labels_texts():
    """The small expert finds glad stories likelier after glad words; swapped, it labels the other
    way round. The small target does not."""
    expert, target = zoo.load_pair()
    pairs = zoo.contrast_pairs(60)
    said = {"instruction": "Ella was happy.", "against": "Ella was sad."}
    labelled = esl.label_texts(expert, None, pairs.texts, **said, progress=False)
    assert labelled.agreement(pairs.labels) > 0.95
    assert labelled.provenance["instruction"] == "Ella was happy."
    assert labelled.provenance["against"] == "Ella was sad."
    swapped = {"instruction": said["against"], "against": said["instruction"]}
    other = esl.label_texts(expert, None, pairs.texts, **swapped, progress=False)
    assert other.agreement(pairs.labels) < 0.05
    own = esl.label_texts(target, None, pairs.texts, **said, progress=False)
    assert own.agreement(pairs.labels) < 0.8


@pytest.mark.parametrize(
    ("given", "error", "word"),
    [
        ({"instruction": " "}, ArgumentError, "instruction must be a text"),
        ({"instruction": "Be glad.", "against": ""}, ArgumentError, "against must be a text"),
        ({"against": "Be sad."}, ArgumentError, "nothing says what is positive"),
        ({"question": "Glad?", "against": "Be sad."}, ArgumentError, "goes with instruction"),
    ],
)
def test_an_instruction_that_says_nothing_is_refused(given, error, word):
    _, target = zoo.load_pair()
    with pytest.raises(error, match=word):
        esl.label_texts(target, None, zoo.contrast_pairs().texts[:6], **given)


def test_a_text_with_nothing_before_it_has_no_probability(monkeypatch):
    from expertsteer_lens.hosts.parts import TokenBatch
    from expertsteer_lens.pipeline import likelier_under

    _, target = zoo.load_pair()
    host = esl.as_host(target)
    whole = type(host).tokenize

    def bare(self, texts, **options) -> TokenBatch:
        """As a tokenizer that puts nothing in front of a text."""
        return whole(self, texts, **{**options, "prepend_bos": False})

    monkeypatch.setattr(type(host), "tokenize", bare)
    with pytest.raises(DataError, match=r"texts\[1\] has one token and nothing before it"):
        likelier_under(target, "Be glad.", ["Once upon a time", "Once"])
