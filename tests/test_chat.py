"""Conversations where texts are taken: each model is shown them in its own template, and nothing
else changes."""

from __future__ import annotations

import json
from typing import Any

import models
import pytest
import torch

import expertsteer_lens as esl
from expertsteer_lens.data.chat import Chat
from expertsteer_lens.errors import DataError
from expertsteer_lens.hosts import texts_sha256
from expertsteer_lens.measure.metrics import behaviour_metric, choice_accuracy

TAGS = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content | trim }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TAGS
)
SPACED = (  # the space in front of an answer belongs to the answer, not to the header
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ "
    "m.content }}</s>{% endif %}"
    "{% endfor %}"
)
BARE = "{% for m in messages %}{{ m.content }} {% endfor %}"
ASKED = [{"role": "user", "content": "Was it good?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "It was"}]


def tokenizer(template: str | None) -> Any:
    found = models.tokenizer()
    found.chat_template = template
    return found


class TestRendering:
    def test_it_ends_where_the_assistant_speaks_or_with_what_it_said(self):
        assert Chat(tuple(ASKED)).render(tokenizer(TAGS)) == "<user> Was it good? </s><assistant> "
        assert (
            Chat(tuple(ANSWERED)).render(tokenizer(TAGS))
            == "<user> Was it good? </s><assistant> It was"
        )

    def test_an_answer_is_spelt_as_its_template_spells_it(self):
        assert Chat(tuple(ASKED)).render(tokenizer(SPACED)) == "[INST] Was it good? [/INST]"
        assert (
            Chat(tuple(ANSWERED)).render(tokenizer(SPACED)) == "[INST] Was it good? [/INST] It was"
        )

    def test_a_completion_goes_on_from_the_prompt_letter_by_letter(self):
        for messages in (ASKED, ANSWERED):
            prompt = Chat(tuple(messages))
            one, two = (c.render(tokenizer(TAGS)) for c in (prompt, prompt + " very fine"))
            assert two.startswith(one)
        assert (Chat(tuple(ASKED)) + " yes").messages[-1] == ("assistant", "yes")
        assert (Chat(tuple(ANSWERED)) + " fun").messages[-1] == ("assistant", "It was fun")

    def test_a_prefix_goes_in_front_of_the_first_question(self):
        chat = Chat.ask("Why?", "So.", system="Be kind.")
        assert ("Think. " + chat).messages == (
            ("system", "Be kind."),
            ("user", "Think. Why?"),
            ("assistant", "So."),
        )

    def test_equal_chats_are_equal_in_sets_and_hashes_and_others_are_not(self):
        one, same, other = Chat(tuple(ASKED)), Chat.ask("Was it good?"), Chat.ask("Was it bad?")
        assert len({one, same, other}) == 2
        assert texts_sha256([one]) == texts_sha256([same]) != texts_sha256([other])
        assert str(Chat(tuple(ANSWERED))) == "user: Was it good?\nassistant: It was"
        assert len(one) == len("Was it good?")

    def test_templates_that_lack_or_refuse_are_named(self):
        with pytest.raises(
            DataError,
            match=r"has no chat template, .* set tokenizer\.chat_template, or give plain texts",
        ):
            Chat.ask("Why?").render(tokenizer(None))
        with pytest.raises(
            DataError, match=r"refuses a chat with roles \['system', 'user'\]: no system here"
        ):
            Chat.ask("Why?", system="Be kind.").render(tokenizer(STRICT))

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], "needs at least one message"),
            ([{"role": "assistant", "content": "So."}], "needs a user's message"),
            ([*ASKED, {"role": "system", "content": "x"}], "a system message only in front"),
            (
                [{"role": "tool", "content": "x"}],
                r"messages\[0\] has role 'tool'; roles are system, user, assistant",
            ),
            (
                [{"role": "user", "content": " "}],
                r"messages\[0\] \(user\) must have a text as content, got ' '",
            ),
            ([{"role": "user", "text": "x"}], "must have 'role' and 'content' only"),
            (
                [{"role": "user", "content": "x \ud800"}],
                r"messages\[0\] holds half of a character",
            ),
            ("hello", "messages must be a list of messages, got one str"),
            (ASKED[0], "messages must be a list of messages, got a dict"),
            (["hello"], r"messages\[0\] must be a dict with 'role' and 'content', got 'hello'"),
        ],
    )
    def test_what_is_no_conversation_is_refused(self, messages, message):
        with pytest.raises(DataError, match=message):
            Chat(messages)


class TestWhereTextsAreTaken:
    @pytest.fixture(scope="class")
    def host(self):
        return esl.as_host(models.hf("llama"), tokenizer=tokenizer(TAGS))

    def test_lists_of_messages_become_chats(self):
        pairs = esl.ContrastPairs.from_lists([ANSWERED, "plain"], [ASKED, "text"])
        assert pairs.positive == (Chat(tuple(ANSWERED)), "plain")
        with pytest.raises(
            DataError,
            match=r"positive\[0\] must be a str or a list of messages, got dict; wrap one conv",
        ):
            esl.ContrastPairs.from_lists(ASKED, ASKED)
        with pytest.raises(DataError, match=r"positive\[0\]\[0\] must be a str, got Chat"):
            esl.Behaviour(["p"], [[Chat.ask("Why?")]], [[" no"]])

    def test_files_may_hold_them(self, tmp_path):
        path = tmp_path / "pairs.jsonl"
        path.write_text(
            "\n".join(json.dumps({"positive": ANSWERED, "negative": ASKED}) for _ in range(2))
        )
        assert esl.ContrastPairs.from_jsonl(path).negative[1] == Chat.ask("Was it good?")

    def test_multiple_choice_items_may_be_asked_in_a_conversation(self):
        items = [
            {"question": f"Is {i} even?", "choices": ["yes", "no"], "answer": i % 2}
            for i in range(4)
        ]
        pairs = esl.ContrastPairs.from_multiple_choice(items, chat=True)
        assert pairs.positive[1] == Chat.ask("Is 1 even?", "no")
        assert pairs.negative[1] == Chat.ask("Is 1 even?", "yes")
        behaviour = esl.Behaviour.from_multiple_choice(items, chat=True)
        assert behaviour.prompts[1] == Chat.ask("Is 1 even?")
        assert behaviour.completions(1) == ((" no",), (" yes",))

    def test_ids_are_the_templates_without_a_second_bos(self, host):
        chat = Chat(tuple(ANSWERED))
        plain = host.tokenizer(chat.render(host.tokenizer), add_special_tokens=False)["input_ids"]
        assert host.tokenize([ANSWERED]).input_ids[0].tolist() == plain
        bos = host.tokenizer.bos_token_id
        assert bos is not None
        assert host.tokenize([chat], prepend_bos=True).input_ids[0].tolist() == [bos, *plain]
        assert host.tokenize(["hello"]).input_ids[0, 0] == bos

    def test_capture_reads_the_rendered_text(self, host):
        chat = Chat(tuple(ANSWERED))
        one = esl.capture(host, [ANSWERED])
        two = esl.capture(host, [chat.render(host.tokenizer)], prepend_bos=False)
        for name in one:
            assert torch.equal(one[name], two[name])
        assert host.generate_tokens([ASKED], max_new_tokens=2, stop_at_eos=False)

    @torch.no_grad()
    def test_completions_are_scored_as_what_the_assistant_says(self, host):
        said = {
            word: host.tokenize([Chat.ask("Was it good?", word)]).input_ids[0]
            for word in ("dog", "cat")
        }
        asked = host.tokenize([ASKED])
        n = asked.input_ids.shape[1]
        assert all(
            len(ids) == n + 1 and torch.equal(ids[:n], asked.input_ids[0]) for ids in said.values()
        )
        logits = host.forward(asked)[0, -1]
        want = float(logits[said["dog"][-1]] - logits[said["cat"][-1]])
        behaviour = esl.Behaviour([ASKED], [" dog"], [" cat"])
        assert float(behaviour_metric(host, behaviour)) == pytest.approx(want, abs=1e-5)
        assert bool(choice_accuracy(host, behaviour)) == (want > 0)
        assert str(behaviour.with_prefix("Think. ").prompts[0]) == "user: Think. Was it good?"


class TestTwoModelsTwoTemplates:
    """The zoo's two models, given chat templates of their own."""

    @pytest.fixture(scope="class")
    def texts(self):
        pairs, behaviour = esl.zoo.contrast_pairs(40), esl.zoo.behaviour(12)
        return {"pairs": pairs, "anchors": esl.zoo.anchors(80), "behaviour": behaviour}

    @staticmethod
    def as_chats(texts):
        """The same texts as the words of a user; a template that shows nothing else gives back the
        same text."""
        pairs, behaviour = texts["pairs"], texts["behaviour"]
        return {
            "pairs": esl.ContrastPairs.from_lists(
                [Chat.ask(t) for t in pairs.positive], [Chat.ask(t) for t in pairs.negative]
            ),
            "anchors": [[{"role": "user", "content": t}] for t in texts["anchors"]],
            "behaviour": esl.Behaviour(
                [Chat.ask(p) for p in behaviour.prompts], behaviour.positive, behaviour.negative
            ),
        }

    @staticmethod
    def models(expert_template: str, target_template: str) -> tuple[Any, Any]:
        expert, target = esl.zoo.load_pair(host="huggingface")
        esl.as_host(expert).tokenizer.chat_template = expert_template
        esl.as_host(target).tokenizer.chat_template = target_template
        return expert, target

    SHOWN = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {% endif %}{{ "
        "m.content }}{% endfor %}"
        "{% if add_generation_prompt %} {% endif %}"
    )

    def test_templates_that_add_nothing_change_nothing(self, texts):
        config = esl.ExpertSteerConfig(mi=esl.MIConfig(n_permutations=3, n_bootstrap=5))
        bare = self.SHOWN.replace("{% if add_generation_prompt %} {% endif %}", "")
        expert, target = self.models(bare, bare)
        behaviour = texts[
            "behaviour"
        ]  # after the user's words the assistant's begin without a space: the template has none
        chats, plain = self.as_chats(texts), dict(texts)
        plain["behaviour"] = chats["behaviour"] = behaviour
        one = esl.ExpertSteer(config).fit(expert, target, **chats, progress=False)
        two = esl.ExpertSteer(config).fit(expert, target, **plain, progress=False)
        assert one.layer_pairs.keys() == two.layer_pairs.keys()
        for name in one.data.expert_pair_states:
            assert torch.equal(one.data.expert_pair_states[name], two.data.expert_pair_states[name])
        key = one.layer_pairs.keys()[0]
        assert torch.equal(one.direction(*key), two.direction(*key))

    def test_each_model_sees_its_own_template(self, texts):
        chats = self.as_chats(texts)
        expert, target = self.models(self.SHOWN, self.SHOWN)
        plain = {
            k: esl.capture(m, chats["pairs"].texts)
            for k, m in (("expert", expert), ("target", target))
        }
        esl.as_host(expert).tokenizer.chat_template = self.SHOWN.replace("{% for", "Once. {% for")
        again = {
            k: esl.capture(m, chats["pairs"].texts)
            for k, m in (("expert", expert), ("target", target))
        }
        last = list(plain["expert"])[-1]
        assert not torch.allclose(plain["expert"][last], again["expert"][last], atol=1e-2)
        for name in plain["target"]:
            assert torch.equal(plain["target"][name], again["target"][name])

    def test_a_fit_on_chats_steers_and_survives_saving(self, texts, tmp_path):
        expert, target = self.models("{{ bos_token }}" + BARE, self.SHOWN)
        config = esl.ExpertSteerConfig(mi=esl.MIConfig(n_permutations=3, n_bootstrap=5))
        fit = esl.ExpertSteer(config).fit(expert, target, **self.as_chats(texts), progress=False)
        plan = fit.plan()
        result = esl.evaluate(
            plan, target, fit=fit, n_random=2, n_shuffles=0, n_generate=2, prompt_prefix="Once. "
        )
        assert result.plan.effect > result.floor[0] + 0.3
        back = esl.load(esl.save(fit, tmp_path / "fit"), target=target)
        assert back.test_behaviour == fit.test_behaviour
        assert isinstance(back.test_behaviour.prompts[0], Chat)
        assert back.calibration_texts == fit.calibration_texts


def test_a_chat_template_gets_the_arguments_of_the_chat() -> None:
    tokenizer = models.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if enable_thinking is defined and enable_thinking is false %} no thoughts{% endif %}"
    )
    chat = Chat.ask("Was it good?", template={"enable_thinking": False})
    assert chat.render(tokenizer) == "Was it good? no thoughts"
    assert Chat.ask("Was it good?").render(tokenizer) == "Was it good?"
    assert (chat + " Yes.").template == ("Well, " + chat).template == chat.template
    assert chat != Chat.ask("Was it good?")
    assert chat.encode() != Chat.ask("Was it good?").encode()


@pytest.mark.parametrize("bad", [3, {"a b": 1}, {"x": object()}])
def test_template_arguments_are_checked(bad: object) -> None:
    with pytest.raises(DataError, match="template must be a dict of JSON values"):
        Chat((("user", "Hello"),), bad)
    with pytest.raises(DataError, match="which a chat says itself"):
        Chat.ask("Hello", template={"tokenize": True})
