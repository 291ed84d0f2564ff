"""How texts are read: the answer's tokens, and token pairs of two models."""

from __future__ import annotations

import dataclasses
import importlib
import weakref

import models
import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.data.parts import hashes_of
from expertsteer_lens.data.spans import answer_span
from expertsteer_lens.errors import ArgumentError, DataError, HookNameError, HostError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.hosts.side_by_side import TokenSample, capture_side_by_side
from expertsteer_lens.hosts.token_ends import NO_END, token_ends
from expertsteer_lens.pipeline.experts import Experts
from expertsteer_lens.pipeline.fit_data import reading_of
from expertsteer_lens.pipeline.token_pairs import TokenPairs, candidate_pairs, why_not_tokens

HOOK = "blocks.1.hook_resid_post"
TEXTS = ["the cat was happy today", "the cat was very sad", "a boy ran home"]
SMALL = esl.ExpertSteerConfig(
    mi=esl.MIConfig(n_permutations=2, n_bootstrap=10, n_components=4),
    pairing=esl.PairingConfig(n_candidates=3, n_layers=2),
    rfm=esl.RFMConfig(bandwidth=(1.0,), n_rounds=2),
)


@pytest.fixture(scope="module")
def host():
    return as_host(models.hf("llama"), tokenizer=models.tokenizer())


@pytest.fixture(scope="module")
def zoo():
    expert, target = esl.zoo.load_pair(host="huggingface")
    return as_host(expert), as_host(target)


def by_hand(host, text, inside):
    """Mean state of the tokens (BOS first) whose index is in `inside`."""
    rows = esl.capture(host.model, [text], [HOOK], positions="all")[HOOK]
    return rows[list(inside)].mean(0)


class TestSpans:
    def test_the_mean_over_a_span_is_that_of_the_tokens_that_end_in_it(self, host):
        spans = [(12, 17), (12, 20), (0, 5)]  # "happy", "very sad", "a boy"
        store = esl.capture(host.model, TEXTS, [HOOK], positions="mean", spans=spans)
        for row, text, inside in zip(store[HOOK], TEXTS, ([4], [4, 5], [1, 2]), strict=True):
            torch.testing.assert_close(row, by_hand(host, text, inside), atol=1e-5, rtol=1e-5)
        assert store.provenance["spans"] == [list(s) for s in spans]

    def test_one_row_a_token_of_the_span(self, host):
        store = esl.capture(
            host.model, TEXTS[:2], [HOOK], positions="all", spans=[(4, 11), (12, 20)]
        )
        assert store.n == 4  # "cat was", "very sad"
        whole = esl.capture(host.model, TEXTS[:1], [HOOK], positions="all")[HOOK]
        torch.testing.assert_close(store[HOOK][:2], whole[2:4], atol=1e-5, rtol=1e-5)

    def test_a_plain_text_is_its_own_answer(self, host):
        """All of it, and not what the tokenizer puts before it; whatever is read beside it."""
        one = esl.capture(host.model, TEXTS, [HOOK], positions="answer")
        for row, text in zip(one[HOOK], TEXTS, strict=True):
            every = esl.capture(host.model, [text], [HOOK], positions="all")[HOOK]
            torch.testing.assert_close(row, every[1:].mean(0), atol=1e-5, rtol=1e-5)
        spans = [answer_span(text) for text in TEXTS]
        explicit = esl.capture(host.model, TEXTS, [HOOK], positions="answer", spans=spans)
        assert torch.equal(one[HOOK], explicit[HOOK])

    def test_the_unit_of_a_coefficient_is_the_norm_of_a_token_whatever_is_read(self, host):
        rows = esl.capture(host.model, TEXTS, [HOOK], positions="all")
        inside = esl.capture(
            host.model, TEXTS, [HOOK], positions="all", spans=[answer_span(t) for t in TEXTS]
        )
        for how, those in (("mean", rows), ("answer", inside)):
            store = esl.capture(host.model, TEXTS, [HOOK], positions=how, batch_size=2)
            assert store.median_norm(HOOK) == pytest.approx(those.median_norm(HOOK), rel=1e-5)
            assert store.median_norm(HOOK) > float(store[HOOK].norm(dim=1).median())
        part = esl.capture(host.model, TEXTS[:1], [HOOK], positions="mean", spans=[(12, 17)])
        assert part.median_norm(HOOK) == pytest.approx(float(rows[HOOK][4].norm()), rel=1e-5)

    def test_batches_do_not_matter(self, host):
        spans = [answer_span(t) for t in TEXTS]
        one, other = (
            esl.capture(host.model, TEXTS, [HOOK], positions="answer", spans=spans, batch_size=b)
            for b in (1, 3)
        )
        torch.testing.assert_close(one[HOOK], other[HOOK], atol=1e-5, rtol=1e-5)

    def test_a_span_without_a_token_is_named(self, host):
        with pytest.raises(
            DataError, match=r"no token of prompts\[1\] ends inside its span \(4, 5\)"
        ):
            esl.capture(host.model, TEXTS[:2], [HOOK], positions="mean", spans=[(0, 3), (4, 5)])

    def test_a_tokenizer_without_offsets_is_an_error_where_a_part_is_asked_for(self, host):
        class Slow:
            is_fast = False

            def __getattr__(self, name):
                return getattr(host.tokenizer, name)

            def __call__(self, *args, **kwargs):
                return host.tokenizer(*args, **kwargs)

        slow = as_host(models.hf("llama"), tokenizer=Slow())
        with pytest.raises(HostError, match="use a fast tokenizer, or read the whole text"):
            esl.capture(slow.model, TEXTS[:1], [HOOK], positions="mean", spans=[(0, 3)])
        assert reading_of(esl.ExpertSteerConfig(), slow, host) == "mean"
        assert reading_of(esl.ExpertSteerConfig(), host, host) == "answer"
        assert reading_of(esl.ExpertSteerConfig(reading="last"), slow, host) == "last"
        assert "target's tokenizer" in why_not_tokens(Experts.of(host), slow)
        assert "expert's tokenizer" in why_not_tokens(Experts({"": slow}), host)
        assert why_not_tokens(Experts.of(host), host) is None

    def test_pairs_say_where_their_texts_differ(self):
        pairs = esl.ContrastPairs.from_lists(
            ["It was a warm day.", "She laughed."], ["It was a cold day.", "She cried."]
        )
        parts = [t[s:e].strip() for t, (s, e) in zip(pairs.texts, pairs.answer_spans, strict=True)]
        assert parts == ["warm", "cold", "laughed.", "cried."]


@pytest.mark.parametrize("positions", [10**30, -(10**30), 2**63, -(2**63)])
def test_an_index_beyond_every_text_is_refused(host, positions):
    with pytest.raises(DataError, match=r"positions=-?\d+ is outside prompts\[0\]"):
        esl.capture(host.model, ["the cat saw a dog"], positions=positions)


def test_one_hook_name_in_place_of_a_list_is_named_whole(host):
    with pytest.raises(HookNameError, match=f"must be a list, got one str '{HOOK}'"):
        esl.capture(host.model, ["the cat"], HOOK)


class TestTokenPairs:
    def test_rows_belong_to_the_same_words(self, zoo):
        """Every pair of rows comes from tokens that end at the same character of one text."""
        expert, target = zoo
        texts = esl.zoo.anchors(6)
        hook = "blocks.1.hook_resid_post"
        pairs = TokenPairs([(hook, hook)], expert, SMALL, 0)
        moments = pairs.read(target, texts, range(6), progress=False).moments
        rows_e, rows_t, groups = [], [], []
        for i, text in enumerate(texts):
            found = {}
            for side, host in (("e", expert), ("t", target)):
                batch = host.tokenize([text])
                ends = token_ends(host, [text], batch)[0].tolist()
                states = esl.capture(host.model, [text], [hook], positions="all")[hook]
                found[side] = {e: x for e, x in zip(ends, states, strict=True) if e != NO_END}
            common = sorted(set(found["e"]) & set(found["t"]))
            assert len(common) > 4
            rows_e += [found["e"][c] for c in common]
            rows_t += [found["t"][c] for c in common]
            groups += [i] * len(common)
        assert moments.n == len(groups)
        from expertsteer_lens.align import PairedMoments

        by_hand = PairedMoments([(hook, hook)], d_expert=expert.d_model, d_target=target.d_model)
        by_hand.update(
            {hook: torch.stack(rows_e)}, {hook: torch.stack(rows_t)}, torch.tensor(groups)
        )
        for one, other in zip(moments.folds(), by_hand.folds(), strict=True):
            assert one.n == other.n
            for key in one.covariances:
                torch.testing.assert_close(
                    one.covariances[key], other.covariances[key], atol=1e-4, rtol=1e-4
                )

    def test_a_fit_uses_them_and_says_so(self, zoo):
        expert, target = zoo
        fit = esl.ExpertSteer(SMALL).fit(
            expert,
            target,
            esl.zoo.contrast_pairs(12),
            anchors=esl.zoo.anchors(30),
            behaviour=esl.zoo.behaviour(8),
            progress=False,
        )
        steps = {s["step"]: s for s in fit.steps}
        assert steps["token pairs"]["n"] > 10 * 21
        assert steps["align"]["on"] == f"{steps['token pairs']['n']} token pairs"
        assert steps["capture"]["reading"] == "answer"
        assert fit.data.maps_on == "tokens"
        assert len(fit.data.token_moments.pairs) <= 4
        assert set(fit.aligners) <= set(fit.data.token_moments.pairs)
        again = fit.refit()
        key = next(iter(fit.rfms))
        torch.testing.assert_close(again.direction(*key), fit.direction(*key))
        other = fit.refit(aligner=esl.AlignerConfig(kind="ridge"))
        assert set(other.aligners) <= set(fit.data.token_moments.pairs)
        for changes in (
            {"align_on_pairs": False},
            {"pairing": dataclasses.replace(SMALL.pairing, n_layers=3)},
            {"pairing": dataclasses.replace(SMALL.pairing, skip_last=0)},
        ):
            with pytest.raises(ArgumentError, match="acts only where token pairs are read"):
                fit.refit(**changes)
        by_mi = esl.PairingConfig(rule="min_mi")  # which takes one state a text
        fit.refit(pairing=by_mi, align_on_pairs=False)

    def test_a_saved_fit_goes_on_unless_its_moments_were_too_large(
        self, zoo, tmp_path, monkeypatch
    ):
        expert, target = zoo
        fit = esl.ExpertSteer(SMALL).fit(
            expert,
            target,
            esl.zoo.contrast_pairs(8),
            anchors=esl.zoo.anchors(20),
            behaviour=esl.zoo.behaviour(8),
            progress=False,
        )
        loaded = esl.load(esl.save(fit, tmp_path / "fit"), target=target)
        key = next(iter(fit.rfms))
        assert torch.equal(loaded.direction(*key), fit.direction(*key))
        assert loaded.data.maps_on == "tokens"
        other = loaded.refit(aligner=esl.AlignerConfig(kind="ridge"))
        same = fit.refit(aligner=esl.AlignerConfig(kind="ridge"))
        assert torch.equal(other.direction(*key), same.direction(*key))
        monkeypatch.setattr("expertsteer_lens.pipeline.fit_data.LARGEST_SAVED", 100)
        lean = esl.load(esl.save(fit, tmp_path / "lean"), target=target)
        assert lean.data.token_moments is None
        assert torch.equal(lean.direction(*key), fit.direction(*key))
        with pytest.raises(ArgumentError, match="token pairs, whose moments were too large to be"):
            lean.refit(aligner=esl.AlignerConfig(kind="ridge"))

    def test_states_of_an_absent_expert_give_one_state_a_text_and_the_steps_say_so(self, zoo):
        expert, target = zoo
        pairs, anchors = esl.zoo.contrast_pairs(8), esl.zoo.anchors(20)
        run = esl.ExpertSteer(SMALL)
        states = run.capture(expert, pairs, anchors=anchors)
        fit = run.fit(
            states, target, pairs, anchors=anchors, behaviour=esl.zoo.behaviour(8), progress=False
        )
        assert fit.data.maps_on == "texts"
        step = next(s for s in fit.steps if s["step"] == "token pairs")
        assert "one state a text" in step["because"]
        facts = {**states.provenance, "spans": [[0, 1]]}
        wrong = esl.ActivationStore(dict(states), provenance=facts)
        with pytest.raises(DataError, match="other parts of these texts than their answers"):
            run.fit(wrong, target, pairs, anchors=anchors, progress=False)

    def test_anchors_are_read_once_by_each_model(self, zoo, monkeypatch):
        """States and token pairs come of the same passes, and are those of separate ones."""
        seen: list[int] = []

        def counting(read):
            def counted(self, batch, *args, **kwargs):
                seen.append(int(batch.attention_mask.sum()))
                return read(self, batch, *args, **kwargs)

            return counted

        texts, names = esl.zoo.anchors(40), ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
        pairs = TokenPairs([(names[1], names[0])], zoo[0], SMALL, 0)
        alone = [esl.capture(host.model, texts, names, positions="mean") for host in zoo]
        separate = pairs.read(zoo[1], texts, range(40), progress=False).moments
        together = TokenPairs(pairs.pairs, zoo[0], SMALL, 0)
        for host in {type(host) for host in zoo}:
            monkeypatch.setattr(host, "read", counting(host.read))
        stores = capture_side_by_side(
            zoo,
            texts,
            (names, names),
            together.hook_names,
            together.taking(range(40)),
            positions="mean",
            batch_size=7,
        )
        assert sum(seen) == sum(int(host.tokenize(texts).lengths.sum()) for host in zoo)
        for store, reference in zip(stores, alone, strict=True):
            for name in names:
                assert torch.allclose(store[name], reference[name], atol=1e-5)
                assert store.median_norm(name) == pytest.approx(reference.median_norm(name))
        assert together.moments.n == separate.n
        for one, two in zip(together.moments.folds(), separate.folds(), strict=True):
            for key, covariance in one.covariances.items():
                assert torch.allclose(covariance, two.covariances[key], atol=1e-4)

    def test_layers_are_compared_on_a_sample_of_the_same_tokens(self, zoo, monkeypatch):
        monkeypatch.setattr("expertsteer_lens.pipeline.read_models.COMPARED", 90)
        fit = esl.ExpertSteer(SMALL).fit(
            *zoo, esl.zoo.contrast_pairs(8), anchors=esl.zoo.anchors(40), progress=False
        )
        data, mi = fit.data, fit.layer_pair_mi
        groups = data.expert_token_states.provenance["groups"]
        assert (mi.n_samples, mi.n_groups) == (len(groups), data.n_anchors)
        assert (
            next(s for s in fit.steps if s["step"] == "pair")["on"] == f"{len(groups)} token pairs"
        )
        # Rows are of the same words in both, at most three a text, in the order of the text.
        texts = esl.zoo.anchors(40)
        assert groups == sorted(groups)
        assert max(groups.count(g) for g in set(groups)) <= 3
        of_hash = dict(zip(hashes_of(texts), texts, strict=True))
        read = [of_hash[key] for key in data.text_hashes["anchors"]]
        ends: list[list[int]] = []
        for host, store in zip(
            zoo, (data.expert_token_states, data.target_token_states), strict=True
        ):
            name = list(store)[2]
            ends.append([])
            for row, group in zip(store[name], groups, strict=True):
                every = esl.capture(host.model, [read[group]], [name], positions="all")[name]
                place = int((every - row).norm(dim=1).argmin())
                torch.testing.assert_close(every[place], row, atol=1e-4, rtol=1e-4)
                ends[-1].append(
                    int(token_ends(host, [read[group]], host.tokenize([read[group]]))[0, place])
                )
        assert ends[0] == ends[1]
        assert all(
            one < other
            for one, other, g, h in zip(ends[0], ends[0][1:], groups, groups[1:], strict=False)
            if g == h
        )
        reference = esl.layer_pair_mi(
            data.expert_token_states, data.target_token_states, SMALL.mi, groups=groups
        )
        assert torch.equal(reference.matrix, mi.matrix)
        on_texts = fit.refit(mi_on="texts").layer_pair_mi
        assert (on_texts.n_samples, on_texts.n_groups) == (data.n_anchors, None)

    def test_a_sample_of_tokens_too_large_to_be_saved_is_read_again_or_refused(
        self, zoo, tmp_path, monkeypatch
    ):
        given = (*zoo, esl.zoo.contrast_pairs(8))
        fit = esl.ExpertSteer(SMALL).fit(*given, progress=False)
        monkeypatch.setattr("expertsteer_lens.pipeline.fit_data.LARGEST_SAVED", 100)
        lean = esl.load(esl.save(fit, tmp_path / "lean"), target=zoo[1])
        assert lean.data.expert_token_states is None
        assert torch.equal(lean.layer_pair_mi.matrix, fit.layer_pair_mi.matrix)
        with pytest.raises(ArgumentError, match="compared on token pairs, whose states were too"):
            lean.data.states_to_compare(lean.config)
        on = esl.ExpertSteer(SMALL).fit(*given, finished=lean.data, progress=False)
        assert torch.equal(on.layer_pair_mi.matrix, fit.layer_pair_mi.matrix)
        key = next(iter(fit.rfms))
        torch.testing.assert_close(on.direction(*key), fit.direction(*key))

    def test_equal_texts_are_one_group_of_the_sample(self, zoo):
        texts = esl.zoo.anchors(30)
        config = dataclasses.replace(SMALL, held_out=0.2)
        fit = esl.ExpertSteer(config).fit(
            *zoo, esl.zoo.contrast_pairs(8), anchors=[*texts, *texts], progress=False
        )
        groups = fit.data.expert_token_states.provenance["groups"]
        assert fit.data.n_anchors == 2 * len(set(groups)) == 2 * fit.layer_pair_mi.n_groups

    def test_without_tokens_in_common_layers_are_compared_on_texts(self, zoo, monkeypatch):
        among = TokenSample.among
        seen = iter(range(1000))

        def of_a_few(self, mask):
            taken = among(self, mask)
            return taken if next(seen) < 2 else torch.zeros_like(taken)  # the first pass alone

        monkeypatch.setattr(TokenSample, "among", of_a_few)
        config = dataclasses.replace(SMALL, batch_size=4)
        fit = esl.ExpertSteer(config).fit(
            *zoo, esl.zoo.contrast_pairs(8), anchors=esl.zoo.anchors(30), progress=False
        )
        assert fit.data.maps_on == "tokens"
        assert fit.data.expert_token_states is None
        step = next(s for s in fit.steps if s["step"] == "pair")
        assert step["on"] == f"{fit.data.n_anchors} texts"

    def test_a_sample_takes_tokens_evenly_of_each_text(self):
        sample = TokenSample(6, 2, (["a"], ["b"]))
        mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 0, 0]]).bool()
        assert sample.among(mask).int().tolist() == [[0, 1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 0, 0]]
        assert not sample.among(torch.zeros(1, 3, dtype=torch.bool)).any()

    def test_a_fit_reads_no_anchor_twice(self, zoo, monkeypatch):
        """The pairs are read twice (once to find the layers), the anchors once."""
        seen: list[int] = []
        for host in {type(host) for host in zoo}:
            read = host.read

            def counted(self, batch, *args, read=read, **kwargs):
                seen.append(len(batch))
                return read(self, batch, *args, **kwargs)

            monkeypatch.setattr(host, "read", counted)
        fit = esl.ExpertSteer(SMALL).fit(
            *zoo, esl.zoo.contrast_pairs(8), anchors=esl.zoo.anchors(30), progress=False
        )
        assert fit.data.maps_on == "tokens"
        assert sum(seen) == 2 * (2 * 16 + fit.data.n_anchors)

    def test_the_two_texts_of_a_pair_are_one_group_and_no_anchors(self, zoo, monkeypatch):
        """Groups are never divided between the folds; a pair's must not be an anchor's."""
        taken: list[list[int]] = []
        taking = TokenPairs.taking
        monkeypatch.setattr(
            TokenPairs,
            "taking",
            lambda self, groups: taken.append(list(groups)) or taking(self, groups),
        )
        esl.ExpertSteer(SMALL).fit(
            *zoo, esl.zoo.contrast_pairs(8), anchors=esl.zoo.anchors(30), progress=False
        )
        anchors, pairs = taken
        assert sorted(pairs) == pairs == [pairs[0] + i // 2 for i in range(16)]
        assert not set(anchors) & set(pairs)

    def test_states_kept_with_token_pairs_are_not_taken_by_a_fit_without(self, zoo):
        given = (*zoo, esl.zoo.contrast_pairs(8))
        with_tokens = esl.ExpertSteer(SMALL).fit(*given, progress=False)
        without = dataclasses.replace(SMALL, pair_tokens=False)
        with pytest.raises(ArgumentError, match=r"another config\.pair_tokens"):
            esl.ExpertSteer(without).fit(*given, finished=with_tokens.data, progress=False)

    def test_candidates_are_few_and_in_the_middle_of_the_expert(self):
        names = [f"blocks.{i}.hook_resid_post" for i in range(24)]
        labels = torch.tensor([1.0, 0.0]).repeat(10)
        generator = torch.Generator().manual_seed(0)
        rows = {n: torch.randn(20, 8, generator=generator) for n in names}
        rows[names[9]][labels == 1] += 5.0
        store = esl.ActivationStore(rows, labels)
        gradients = {n: torch.ones(8, dtype=torch.float64) for n in names}
        one = Experts({"": store})
        chosen = candidate_pairs(esl.ExpertSteerConfig(), one, names, store, gradients)
        experts, targets = ({k[i] for k in chosen} for i in (0, 1))
        assert len(chosen) == 16
        assert names[9] in targets
        assert all(6 <= names.index(e) <= 17 for e in experts)
        assert names[0] not in targets
        assert names[-1] not in targets

    def test_turned_off_the_maps_are_fitted_on_texts(self, zoo):
        expert, target = zoo
        config = dataclasses.replace(SMALL, pair_tokens=False)
        fit = esl.ExpertSteer(config).fit(
            expert,
            target,
            esl.zoo.contrast_pairs(8),
            anchors=esl.zoo.anchors(20),
            behaviour=esl.zoo.behaviour(8),
            progress=False,
        )
        assert fit.data.maps_on == "texts"
        assert "token pairs" not in [s["step"] for s in fit.steps]


def test_states_stand_in_memory_once(host, monkeypatch):
    # Rows kept beside the matrices, or a store's own copy of these, would be all states twice.
    module = importlib.import_module("expertsteer_lens.hosts.reading")
    read, taken, matrices = [], [], []

    def watch(states, index, counts):
        taken.append(sum(ref() is not None for ref in read))
        read.extend(weakref.ref(value) for value in states.values())

    def build(states, labels, provenance):
        matrices.extend(value.data_ptr() for value in states.values())
        return esl.ActivationStore(states, labels, provenance)

    monkeypatch.setattr(module, "_check_finite", watch)
    monkeypatch.setattr(module, "ActivationStore", build)
    names = ["blocks.0.hook_resid_post", HOOK]
    store = esl.capture(host.model, TEXTS, names, positions="all", batch_size=1)
    assert store.hook_names == names
    assert len(read) == len(names) * len(TEXTS)
    assert taken == [0, 0, 0]  # when a batch is looked at, nothing is left of those before
    assert [value.data_ptr() for value in store.values()] == matrices
