"""Reading by attention: the weights are the model's own, on every host, and nothing else of the
model is changed."""

from __future__ import annotations

import threading

import architectures
import models
import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.errors import ArgumentError, DataError, HostError
from expertsteer_lens.hosts import as_host
from expertsteer_lens.hosts.attention import attention_weights, eager_attention

HOOK = "blocks.1.hook_resid_post"
TEXTS = ["the cat was happy today and then it ran home", "a boy ran home", "sun"]
CHAT = (
    "{% for m in messages %}{{ '<s> ' if m['role'] == 'user' else '</s> ' }}"
    "{{ m['content'] }} {% endfor %}</s>"
)
HOSTS = ("huggingface", "bridge", "bridge, compatible", "nnsight", "hooked")


def model_of(way: str, family: str = "llama"):
    if way == "hooked":
        if not models.has_hooked_transformer():
            pytest.skip("HookedTransformer is gone from this TransformerLens")
        return models.hooked("gpt2" if family == "llama" else family)
    if way.startswith("bridge"):
        return models.bridge(family, compat="compatible" in way)
    model = models.hf(family)
    model.tokenizer = models.tokenizer()
    if way == "nnsight":
        from nnsight import TransformersModel

        return TransformersModel(models.hf(family), tokenizer=models.tokenizer())
    return model


def of(family: str, **options):
    """A tiny model of an architecture, with a tokenizer."""
    model = architectures.built(family, **options)
    model.tokenizer = models.tokenizer()
    return model


def attentions(model, text):
    """Weights `[layer][head, query, key]` as the model itself returns them, of one text."""
    batch = as_host(model).tokenize([text])
    with eager_attention(model):
        out = model(batch.input_ids, use_cache=False, output_attentions=True)
    return [None if weights is None else weights[0] for weights in out.attentions]


def by_hand(model, text, hook_name=HOOK, inside=None):
    """The row of one text, from `output_attentions` and the states of all its tokens."""
    rows = esl.capture(model, [text], [hook_name], positions="all")[hook_name]
    weights = attentions(model, text)[int(hook_name.split(".")[1])].mean(0)[-1].clone()
    if inside is not None:
        weights[[i for i in range(len(weights)) if i not in inside]] = 0
    weights[0] = 0
    return (weights / weights.sum()) @ rows


def close(one, other):
    torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


class TestWeights:
    def test_they_sum_to_one_and_are_the_heads_mean_at_the_last_real_token(self):
        pattern = torch.rand(2, 3, 4, 4).softmax(-1)
        real = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
        weights = attention_weights(pattern, real, real)
        close(weights.sum(1), torch.ones(2))
        for row, last in ((0, 3), (1, 2)):
            expected = pattern[row, :, last, 1 : last + 1].mean(0)
            close(weights[row, 1 : last + 1], expected / expected.sum())
        assert weights[:, 0].eq(0).all()  # the first token
        assert weights[1, 3] == 0  # padding

    def test_the_first_token_counts_where_it_is_the_only_one(self):
        pattern = torch.eye(3)[None, None] * 0.5 + 0.1
        real = torch.ones(1, 3).bool()
        alone = torch.tensor([[True, False, False]])
        assert attention_weights(pattern, real, alone).tolist() == [[1.0, 0.0, 0.0]]

    def test_a_text_without_attention_on_its_tokens_has_none(self):
        pattern = torch.tensor([0.5, 0.0, 0.0, 0.5]).expand(1, 1, 4, 4)
        looked_at = torch.tensor([[False, True, True, False]])
        assert attention_weights(pattern, torch.ones(1, 4), looked_at).eq(0).all()


@pytest.mark.parametrize("way", HOSTS)
class TestOnEveryHost:
    def test_a_row_is_the_mean_of_the_tokens_states_by_the_weights_of_the_model(self, way):
        model = model_of(way)
        family = "gpt2" if way == "hooked" else "llama"
        store = esl.capture(model, TEXTS, positions="attention")
        reference = models.hf(family)
        reference.tokenizer = models.tokenizer()
        assert store.provenance["positions"] == "attention"
        for name in store:
            states = esl.capture(model, TEXTS, [name], positions="all")[name]
            parts = states.split([11, 5, 2])
            for row, part, text in zip(store[name], parts, TEXTS, strict=True):
                weights = attentions(reference, text)[int(name.split(".")[1])].mean(0)[-1]
                weights[0] = 0
                close(row, (weights / weights.sum()) @ part)

    def test_batches_do_not_matter(self, way):
        model = model_of(way)
        one, other = (
            esl.capture(model, TEXTS, [HOOK], positions="attention", batch_size=b)[HOOK]
            for b in (1, 3)
        )
        close(one, other)

    def test_only_tokens_of_the_span_count(self, way):
        model = model_of(way)
        spans = [(12, 23), (2, 5), (0, 3)]  # "happy today", "boy", "sun"
        store = esl.capture(model, TEXTS, [HOOK], positions="attention", spans=spans)
        states = esl.capture(model, TEXTS, [HOOK], positions="all")[HOOK].split([11, 5, 2])
        close(store[HOOK][1], states[1][2])  # one token: itself
        close(store[HOOK][2], states[2][1])
        reference = models.hf("gpt2" if way == "hooked" else "llama")
        reference.tokenizer = models.tokenizer()
        weights = attentions(reference, TEXTS[0])[1].mean(0)[-1, 4:6]
        close(store[HOOK][0], (weights / weights.sum()) @ states[0][4:6])
        assert not torch.allclose(store[HOOK][0], states[0][4:6].mean(0), atol=1e-3)

    def test_hooks_and_settings_are_as_before_also_after_an_error(self, way):
        model = model_of(way)
        module = as_host(model)._weights
        count = lambda: sum(len(m._forward_hooks) for m in module.modules())  # noqa: E731
        before = count()
        esl.capture(model, TEXTS, [HOOK], positions="attention")
        assert count() == before
        next(module.parameters()).data.fill_(torch.nan)
        with pytest.raises(DataError, match="NaN"):
            esl.capture(model, TEXTS, [HOOK], positions="attention")
        assert count() == before


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_neo", "bloom", "gemma3", "gpt_oss", "deepseek_v3", "falcon_h1"]
)
def test_architectures_give_their_own_weights(family):
    """Also with sliding windows of 8 tokens (gemma3, gpt_oss), on a text of 11, and sinks."""
    model = of(family)
    for name in as_host(model).hook_names():
        store = esl.capture(model, TEXTS, [name], positions="attention")
        for row, text in zip(store[name], TEXTS, strict=True):
            close(row, by_hand(model, text, name))


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "deepseek_v3", "bloom"])
def test_a_bridge_reads_what_the_model_inside_it_reads(family):
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        "tiny",
        hf_model=architectures.built(family),
        tokenizer=models.tokenizer(),
        device="cpu",
        dtype=torch.float32,
    )
    one, other = (esl.capture(m, TEXTS, positions="attention") for m in (bridge, of(family)))
    for name in other:
        close(one[name], other[name])


class TestHuggingFace:
    def test_the_way_attention_is_computed_is_as_before_whatever_happens(self, monkeypatch):
        model = of("gemma3_vision", attn_implementation="sdpa")
        parts = [model.config, model.config.text_config, model.config.vision_config]
        before = [part._attn_implementation for part in parts]
        assert before == ["sdpa"] * 3

        def half_way(self, name):
            self.config._attn_implementation_internal = name
            raise OSError("no kernel")

        def stopped():
            with eager_attention(model):
                assert model.config.text_config._attn_implementation == "eager"
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            stopped()
        assert [part._attn_implementation for part in parts] == before
        monkeypatch.setattr(type(model), "set_attn_implementation", half_way)
        with pytest.raises(OSError, match="no kernel"):
            esl.capture(model, TEXTS, [HOOK], positions="attention")
        monkeypatch.undo()
        assert [part._attn_implementation for part in parts] == before
        esl.capture(model, TEXTS, [HOOK], positions="attention")
        assert [part._attn_implementation for part in parts] == before

    def test_two_readers_at_once_leave_it_as_it_was(self):
        model = of("llama", attn_implementation="sdpa")
        inside, go_on = threading.Event(), threading.Event()

        def first():
            with eager_attention(model):
                inside.set()
                go_on.wait(10)

        thread = threading.Thread(target=first)
        thread.start()
        inside.wait(10)
        with eager_attention(model):
            go_on.set()
            thread.join()
            assert model.config._attn_implementation == "eager"
        assert model.config._attn_implementation == "sdpa"

    def test_every_hook_point_of_a_block_is_weighted_by_its_own_attention(self):
        model = model_of("huggingface")
        names = [f"blocks.1.{kind}" for kind in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")]
        store = esl.capture(model, TEXTS, names, positions="attention")
        for name in names:
            close(store[name][0], by_hand(model, TEXTS[0], name))

    def test_a_chat_is_read_at_its_answer(self):
        model = model_of("huggingface")
        model.tokenizer.chat_template = CHAT
        chat = esl.Chat.ask("the cat", "was very happy today")
        row = esl.capture(model, [chat], [HOOK], positions="attention")[HOOK][0]
        close(row, by_hand(model, chat, inside=range(4, 8)))  # <s> the cat </s> was ...

    def test_only_the_rows_are_kept(self):
        """The weights of a layer, heads x pos x pos, are gone before the next layer's."""
        model, alive, most = model_of("huggingface"), [], []
        import weakref

        def seen(layer, weights):
            alive.append(weakref.ref(weights))
            most.append(sum(ref() is not None for ref in alive))

        host = as_host(model)
        with torch.no_grad(), host.attention_at([0, 1, 2], seen):
            host.forward(host.tokenize(TEXTS))
        assert most == [1, 1, 1]

    def test_the_unit_of_a_coefficient_is_that_of_the_mean(self):
        model = model_of("huggingface")
        norms = [
            esl.capture(model, TEXTS, [HOOK], positions=how).median_norm(HOOK)
            for how in ("attention", "answer")
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


class TestErrors:
    def test_a_model_without_attention_is_named(self):
        with pytest.raises(HostError, match=r"gives no attention weights in layers \[1\].*Mamba"):
            esl.capture(of("mamba"), TEXTS, [HOOK], positions="attention")

    def test_layers_of_another_kind_are_named_with_those_that_have_some(self):
        model = of("qwen3_5")
        with pytest.raises(HostError, match=r"in layers \[0, 1\].*hook points of layers \[2\]"):
            esl.capture(model, TEXTS, positions="attention")
        name = "blocks.2.hook_resid_post"
        store = esl.capture(model, TEXTS, [name], positions="attention")
        rows = esl.capture(model, TEXTS, [name], positions="all")[name][:11]
        (weights,) = attentions(model, TEXTS[0])  # of its one layer with attention
        weights = weights.mean(0)[-1]
        weights[0] = 0
        close(store[name][0], (weights / weights.sum()) @ rows)

    def test_what_cannot_be_switched_is_read_as_it_was_loaded(self):
        model = of("falcon", attn_implementation="sdpa")
        with pytest.raises(HostError, match=r"a fused kernel.*attn_implementation='eager'"):
            esl.capture(model, TEXTS, [HOOK], positions="attention")
        assert model.config._attn_implementation == "sdpa"

    def test_a_span_outside_of_a_sliding_window_is_named(self):
        model = of("gemma3")  # 8 tokens in layers 0 and 2
        spans = [(0, 5), (0, 7)]  # "a boy"; "the cat"
        name = "blocks.0.hook_resid_post"
        with pytest.raises(DataError, match=r"of prompts\[1\] pays no attention in layer 0"):
            esl.capture(model, TEXTS[1::-1], [name], positions="attention", spans=spans)
        esl.capture(model, TEXTS[1::-1], [HOOK], positions="attention", spans=spans)

    def test_hook_points_outside_of_blocks_are_refused(self):
        model = model_of("bridge")
        with pytest.raises(ArgumentError, match="'hook_embed', which is in no block"):
            esl.capture(model, TEXTS, ["hook_embed"], positions="attention")

    def test_a_model_on_a_server_keeps_them(self):
        host = as_host(model_of("nnsight"), remote="local")
        with pytest.raises(HostError, match="of a remote model stay on its server; read with"):
            esl.capture(host, TEXTS, [HOOK], positions="attention")

    def test_a_network_without_texts_has_none(self):
        with pytest.raises(ArgumentError, match="positions must be 'last', 'mean', 'all'"):
            esl.hosts.capture_tensors(
                model_of("huggingface"), torch.ones(1, 3).long(), [HOOK], positions="attention"
            )


class TestInAFit:
    CONFIG = esl.ExpertSteerConfig(
        reading="attention",
        mi=esl.MIConfig(n_permutations=2, n_bootstrap=10, n_components=4),
        pairing=esl.PairingConfig(n_candidates=3, n_layers=2),
        rfm=esl.RFMConfig(bandwidth=(1.0,), n_rounds=2),
    )

    @pytest.fixture(scope="class")
    def zoo(self):
        return esl.zoo.load_pair(host="huggingface")

    @pytest.fixture(scope="class")
    def texts(self):
        return {"pairs": esl.zoo.contrast_pairs(), "anchors": esl.zoo.anchors(40)}

    def test_both_models_are_read_so_and_the_file_says_it(self, zoo, texts, tmp_path):
        expert, target = zoo
        fit = esl.ExpertSteer(self.CONFIG).fit(
            expert, target, **texts, behaviour=esl.zoo.behaviour()
        )
        pairs = texts["pairs"]
        for store, model in (
            (fit.data.expert_pair_states, expert),
            (fit.data.target_pair_states, target),
        ):
            name = next(iter(store))
            own = esl.capture(
                model, pairs.texts, [name], positions="attention", spans=pairs.answer_spans
            )
            close(store[name], own[name])
            assert store.provenance["positions"] == "attention"
        assert fit.data.provenance["reading"] == "attention"

    def test_states_read_so_serve_only_a_fit_that_reads_so(self, zoo, texts, tmp_path):
        expert, target = zoo
        steps = esl.ExpertSteer(self.CONFIG)
        kept = steps.capture(expert, **texts, store=tmp_path / "states")
        assert kept.provenance["positions"] == "attention"
        again = esl.ActivationStore.open(tmp_path / "states")
        steps.fit(again, target, **texts, behaviour=esl.zoo.behaviour())
        with pytest.raises(DataError, match=r"read at positions='attention', but config\.reading"):
            esl.ExpertSteer().fit(again, target, **texts, behaviour=esl.zoo.behaviour())

    def test_states_of_other_parts_are_refused(self, zoo, texts):
        expert, target = zoo
        whole = esl.capture(
            expert, [*texts["pairs"].texts, *texts["anchors"]], positions="attention",
            spans=[(0, len(t)) for t in [*texts["pairs"].texts, *texts["anchors"]]],
        )  # fmt: skip
        with pytest.raises(DataError, match="other parts of these texts than their answers"):
            esl.ExpertSteer(self.CONFIG).fit(whole, target, **texts, behaviour=esl.zoo.behaviour())
