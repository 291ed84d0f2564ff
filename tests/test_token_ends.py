"""Places in the content of a text, found again in what any tokenizer and any template make of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from expertsteer_lens.data.chat import Chat
from expertsteer_lens.data.spans import answer_span, check_spans, content, differing_spans
from expertsteer_lens.errors import DataError
from expertsteer_lens.hosts.parts import pad_right
from expertsteer_lens.hosts.token_ends import NO_END, gives_offsets, token_ends, tokens_in

CORPUS = [
    "Once upon a time there was a little café by the sea.",
    "The capital of France is Paris; 3.14 is about pi.",
    "Straße, naïve, 東京, emoji 🙂 and more words here.",
] * 3
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
STRIPPING = TEMPLATE.replace("m.content", "m.content | trim")
SHOUTING = TEMPLATE.replace("m.content", "(m.content | upper) if m.role == 'user' else m.content")


def made(kind: str, template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    specials = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "[UNK]"]
    if kind == "byte-level":
        tok = Tokenizer(kinds.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.post_processor = processors.ByteLevel(trim_offsets=True)
        tok.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    elif kind == "sentencepiece":
        tok = Tokenizer(kinds.Unigram())
        tok.pre_tokenizer = pre_tokenizers.Metaspace()
        tok.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=specials, unk_token="[UNK]"
        )
    else:
        tok = Tokenizer(kinds.WordPiece(unk_token="[UNK]"))
        tok.normalizer = normalizers.Lowercase()
        tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials)
    tok.train_from_iterator(CORPUS, trainer)
    out = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", unk_token="[UNK]")
    out.chat_template = template
    return out


KINDS = ("byte-level", "sentencepiece", "wordpiece")
TOKENIZERS = {kind: made(kind) for kind in KINDS}


def ends(tokenizer, texts, *, bos=True):
    host = SimpleNamespace(tokenizer=tokenizer)
    shown = [t.render(tokenizer) if isinstance(t, Chat) else t for t in texts]
    rows = [tokenizer(s, add_special_tokens=False)["input_ids"] for s in shown]
    batch = pad_right([[tokenizer.bos_token_id, *r] if bos else r for r in rows], 0)
    return token_ends(host, texts, batch), batch


class TestSpans:
    def test_the_answer_is_the_assistants_last_message_or_everything(self):
        chat = Chat.ask("Why?", "Because I said so.", system="Be brief.")
        start, end = answer_span(chat)
        assert content(chat)[start:end] == "Because I said so."
        assert answer_span(Chat.ask("Why?")) == (0, 4)

    def test_plain_texts_differ_from_the_first_to_the_last_word_that_differs(self):
        for a, b, left, right in (
            ("I like tea.", "I like coffee.", "tea.", "coffee."),
            ("He is glad today", "He is sad today", "glad", "sad"),
            ("one two three", "four two six", "one two three", "four two six"),
            ("the cat sat", "the cat sat down", "sat", "sat down"),
            ("same", "same", "same", "same"),
        ):
            (s1, e1), (s2, e2) = differing_spans(a, b)
            assert (a[s1:e1].strip(), b[s2:e2].strip()) == (left, right)

    def test_words_are_not_cut(self):
        (s, e), _ = differing_spans("He felt happiness then.", "He felt happily then.")
        assert "He felt happiness then."[s:e].strip() == "happiness"

    def test_bad_spans_are_named(self):
        with pytest.raises(DataError, match=r"expected 1, got 2"):
            check_spans([(0, 1), (0, 1)], ["abc"])
        for span in ((2, 2), (1, 9), (-1, 2)):
            with pytest.raises(DataError, match=r"spans\[0\] is \(.*outside of the 3 characters"):
                check_spans([span], ["abc"])


@pytest.mark.parametrize("kind", KINDS)
class TestEnds:
    def test_every_character_up_to_an_end_was_read_and_no_more(self, kind):
        """The content before an end is what the tokens up to there say."""
        tokenizer = TOKENIZERS[kind]
        found, batch = ends(tokenizer, CORPUS[:3])
        for text, row, ids in zip(CORPUS, found.tolist(), batch.input_ids.tolist(), strict=False):
            real = [e for e in row if e != NO_END]
            assert real == sorted(set(real))
            assert real[-1] == len(text)
            if kind == "byte-level":
                for i, end in enumerate(row):
                    if end != NO_END:
                        assert tokenizer.decode(ids[1 : i + 1]) == text[:end]

    def test_bos_and_padding_have_none(self, kind):
        found, batch = ends(TOKENIZERS[kind], ["a time", CORPUS[0]])
        assert found[:, 0].tolist() == [NO_END, NO_END]
        assert (found[~batch.attention_mask.bool()] == NO_END).all()

    def test_words_of_a_template_have_none_and_messages_do(self, kind):
        chat = Chat.ask("Once upon a time?", "The capital of France.", system="more words")
        found, _ = ends(TOKENIZERS[kind], [chat], bos=False)
        real = {e for e in found[0].tolist() if e != NO_END}
        whole = content(chat)
        border = [len("more words"), len("more wordsOnce upon a time?"), len(whole)]
        assert set(border) <= real
        inside = tokens_in(found, [answer_span(chat)])
        assert inside.any()
        assert found[inside].min() > border[1]

    def test_a_template_that_strips_or_rewrites(self, kind):
        chat = Chat.ask("  Once upon a time  ", "The capital ")
        found, _ = ends(made(kind, STRIPPING), [chat], bos=False)
        reached = {content(chat)[:e].split()[-1] for e in found[0].tolist() if e != NO_END}
        assert {"time", "capital"} <= reached
        found, _ = ends(made(kind, SHOUTING), [chat, "Once upon"], bos=False)
        assert (found[0] == NO_END).all()
        assert (found[1] != NO_END).any()


def test_the_same_words_are_paired_whatever_the_tokenizer():
    chat = Chat.ask("Once upon a time there was a café?", "The capital of France is Paris.")
    common = None
    for kind in KINDS:
        found, _ = ends(TOKENIZERS[kind], [chat], bos=False)
        here = {e for e in found[0].tolist() if e != NO_END}
        common = here if common is None else common & here
    words = {content(chat)[:e].split()[-1] for e in common}
    assert {"capital", "France", "time", "upon", "Paris."} <= words


def test_bytes_of_one_character_have_one_end():
    found, _ = ends(TOKENIZERS["byte-level"], ["東京🙂"], bos=False)
    real = [e for e in found[0].tolist() if e != NO_END]
    assert real == [1, 2, 3]
    assert found.shape[1] > 3


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=30))
def test_any_text_has_ends_in_order_and_inside_it(text):
    for kind in KINDS:
        rows = TOKENIZERS[kind](text, add_special_tokens=False)["input_ids"]
        if not rows:
            continue
        found, _ = ends(TOKENIZERS[kind], [text])
        real = [e for e in found[0].tolist() if e != NO_END]
        assert real == sorted(set(real))
        assert all(0 < e <= len(text) for e in real)


def test_a_slow_tokenizer_gives_no_offsets():
    assert gives_offsets(TOKENIZERS["wordpiece"])
    assert not gives_offsets(SimpleNamespace(is_fast=False))
    assert not gives_offsets(None)


def test_tokens_in_takes_what_ends_inside():
    found = torch.tensor([[NO_END, 3, 7, 12], [NO_END, 2, 5, NO_END]])
    assert tokens_in(found, [(3, 12), (0, 2)]).tolist() == [
        [False, False, True, True],
        [False, True, False, False],
    ]
