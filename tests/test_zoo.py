"""The zoo: its texts, its two models, and that their mood can be read and steered."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import socket
import subprocess
import sys

import pytest
import torch
import train_zoo

from expertsteer_lens import zoo
from expertsteer_lens.errors import ArgumentError
from expertsteer_lens.zoo import lexicon, world

FEELING_WORDS = {word for mood in ("happy", "sad") for word in lexicon.FEELINGS[mood]}


@pytest.fixture(scope="module")
def models() -> dict:
    return {name: zoo.load(name, host="huggingface") for name in zoo.names()}


@pytest.fixture(params=["expert", "target"])
def model(request, models):
    return models[request.param]


# ---------------------------------------------------------------- helpers: torch hooks only, no
# code under test


def encode(model, texts):
    """Right-padded ids with an explicit BOS, and the mask."""
    tok = model.tokenizer
    rows = [[tok.bos_token_id, *tok(text, add_special_tokens=False)["input_ids"]] for text in texts]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def blocks(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def hidden(output):
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def residual(model, texts, layer):
    """Residual after block `layer`: (last token [n, d], median norm over tokens)."""
    seen = []
    handle = blocks(model)[layer].register_forward_hook(
        lambda module, args, output: seen.append(hidden(output))
    )
    ids, mask = encode(model, texts)
    model(input_ids=ids, attention_mask=mask)
    handle.remove()
    return seen[0][torch.arange(len(texts)), mask.sum(1) - 1], seen[0][mask.bool()].norm(
        dim=1
    ).median()


@torch.no_grad()
def token_log_probs(model, texts):
    ids, mask = encode(model, texts)
    log_probs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    return log_probs.gather(-1, ids[:, 1:, None])[..., 0], mask[:, 1:].bool()


def nll(model, texts):
    log_probs, real = token_log_probs(model, texts)
    return float(-log_probs[real].mean())


def mood_metric(model, behaviour):
    """Mean over prompts of log p(any happy word) - log p(any sad word)."""
    sides = []
    for side in (behaviour.positive, behaviour.negative):
        texts = [prompt + completion for prompt in behaviour.prompts for completion in side]
        starts = [
            len(encode(model, [prompt])[0][0]) - 1 for prompt in behaviour.prompts for _ in side
        ]
        log_probs, real = token_log_probs(model, texts)
        counted = real & (torch.arange(real.shape[1])[None] >= torch.tensor(starts)[:, None])
        sides.append((log_probs * counted).sum(1).view(len(behaviour), -1).logsumexp(1))
    return float((sides[0] - sides[1]).mean())


def steered(model, layer, vector, measure):
    def add(module, args, output):
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    handle = blocks(model)[layer].register_forward_hook(add)
    try:
        return measure()
    finally:
        handle.remove()


def untrained(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = type(model)(model.config).eval()
    fresh.tokenizer = model.tokenizer
    return fresh


# ---------------------------------------------------------------- the world


def test_stories_are_the_same_on_every_machine_and_a_longer_list_starts_with_the_shorter():
    first = world.stories(20, seed=3)
    assert first == world.stories(30, seed=3)[:20]
    assert first != world.stories(20, seed=4)
    assert len({story.text for story in world.stories(3000, seed=0)}) == 3000


@pytest.mark.parametrize("split", world.SPLITS)
def test_every_story_opens_with_its_own_split(split):
    rng = random.Random(0)
    for story in world.stories(20, seed=1, split=split):
        sentences = re.split(r"(?<=[.!?]) ", story.text)
        assert split in {world.split_of(" ".join(sentences[:k])) for k in (1, 2)}
    assert all(world.split_of(world.draw_opening(rng, split)[0]) == split for _ in range(20))


def test_splits_share_no_text_and_no_opening():
    texts = {
        split: {story.text for story in world.stories(400, seed=0, split=split)}
        for split in world.SPLITS
    }
    pairs = zoo.contrast_pairs(100)
    texts["pairs"] |= set(pairs.texts)
    texts["behaviour"] |= set(zoo.behaviour(100).prompts)
    texts["anchors"] |= set(zoo.anchors(100))
    texts["validation"] |= set(zoo.neutral_texts(100)) | set(zoo.prompts(20))
    for a, b in itertools.combinations(world.SPLITS, 2):
        assert not texts[a] & texts[b]
        openings = {
            text.split(". ")[0] + text.split(". ")[1] for text in texts[a] if text.count(". ") > 1
        }
        assert not openings & {
            t.split(". ")[0] + t.split(". ")[1] for t in texts[b] if t.count(". ") > 1
        }


def test_happy_and_sad_are_told_equally_often_and_with_equally_many_sentences():
    ends = [story.moods[-1] for story in world.stories(4000, seed=0)]
    share = {mood: ends.count(mood) / 4000 for mood in lexicon.MOODS}
    assert share["happy"] == pytest.approx(0.45, abs=0.03)
    assert share["sad"] == pytest.approx(0.45, abs=0.03)
    assert 0.1 < sum(len(story.moods) > 1 for story in world.stories(1000, seed=0)) / 1000 < 0.2
    tables = [
        lexicon.FEELINGS,
        lexicon.EVENTS,
        lexicon.WEATHER,
        lexicon.FACES,
        lexicon.SPEECH,
        lexicon.STARTERS,
    ]
    for table in [*tables, lexicon.ENDINGS, lexicon.TURNS, *lexicon.MANNER.values()]:
        assert len(table["happy"]) == len(table["sad"])


def test_wanted_moods_are_the_moods_told():
    told = world.stories(50, seed=0, moods={"sad": 1.0})
    assert all(story.moods[0] == "sad" for story in told)


def test_kinds_and_purity_of_sentences_act():
    rng = random.Random(0)
    _, cast = world.draw_opening(rng, "train")
    weather = " ".join(world.body(rng, cast, "sad", 4, kinds=("weather",))).lower()
    assert "storm broke" in weather
    assert "rainbow" not in weather
    neutral = " ".join(world.body(rng, cast, "sad", 4, kinds=("weather",), purity=0.0)).lower()
    assert "storm" not in neutral
    assert "a road led past" in neutral


def test_stories_are_written_properly():
    for story in world.stories(500, seed=9):
        assert "{" not in story.text
        assert "  " not in story.text
        assert not re.search(r"\b[Aa] [aeiou]", story.text)
        assert all(s[0].isupper() or s[0] == '"' for s in re.split(r"(?<=[.!?]) ", story.text))
        assert story.text[-1] in '.!?"'
        assert 3 <= len(re.findall(r"[.!?]", story.text)) <= 16


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: world.stories(0, seed=0), "n must be an integer"),
        (lambda: world.stories(1, seed=0, split="test"), "split must be one of"),
        (lambda: world.stories(1, seed=0, moods={"angry": 1.0}), "moods must be one of"),
        (lambda: zoo.contrast_pairs(1), "n must be an integer"),
        (lambda: zoo.behaviour(0), "n must be an integer"),
        (lambda: zoo.prompts(0), "n must be an integer"),
        (lambda: zoo.model_path("experts"), "closest: 'expert'"),
        (lambda: zoo.load("target", host="jax"), "host must be one of"),
    ],
)
def test_unusable_arguments_are_named(call, match):
    with pytest.raises(ArgumentError, match=match):
        call()


# ---------------------------------------------------------------- pairs, anchors, behaviour


def test_pairs_share_their_opening_and_hold_no_completion_word():
    pairs = zoo.contrast_pairs(60)
    assert len(pairs) == 60
    for positive, negative in zip(pairs.positive, pairs.negative, strict=True):
        assert positive.split(". ")[0] == negative.split(". ")[0]
        words = set(re.findall(r"[a-z]+", f"{positive} {negative}".lower()))
        assert not words & FEELING_WORDS
    assert len(set(pairs.texts)) == 120


@pytest.mark.parametrize(
    "make", [zoo.contrast_pairs, zoo.behaviour, zoo.anchors, zoo.neutral_texts, zoo.prompts]
)
def test_texts_depend_on_the_seed_alone(make):
    assert make(8, seed=1) == make(8, seed=1)
    assert make(8, seed=1) != make(8, seed=2)


def test_behaviour_stops_before_the_feeling_and_its_prompts_have_no_mood():
    behaviour = zoo.behaviour(60)
    assert len(set(behaviour.prompts)) == 60
    assert {c.strip() for c in behaviour.positive + behaviour.negative} == FEELING_WORDS
    assert all(c.startswith(" ") for c in behaviour.positive + behaviour.negative)
    assert all(prompt[-1].isalpha() for prompt in behaviour.prompts)
    moody = set(lexicon.MANNER["adj"]["happy"] + lexicon.MANNER["adj"]["sad"]) | FEELING_WORDS
    assert not moody & set(re.findall(r"[a-z]+", " ".join(behaviour.prompts).lower()))


def test_anchors_are_of_every_mood_and_neutral_texts_of_none():
    moody = set(lexicon.MANNER["adj"]["happy"] + lexicon.MANNER["adj"]["sad"]) | FEELING_WORDS

    def share(texts):
        return sum(bool(moody & set(re.findall(r"[a-z]+", text))) for text in texts) / len(texts)

    assert share(zoo.anchors(200)) > 0.5
    assert share(zoo.anchors(200, moods={"neutral": 1.0})) == 0.0
    assert share(zoo.neutral_texts(200)) == 0.0


# ---------------------------------------------------------------- the models


def test_models_are_small_enough_to_travel_in_the_wheel():
    for name in zoo.names():
        size = sum(path.stat().st_size for path in zoo.model_path(name).iterdir())
        assert size <= 3_000_000


def test_models_differ_in_width_depth_family_and_tokenizer(models):
    expert, target = models["expert"], models["target"]
    assert (expert.config.model_type, target.config.model_type) == ("gpt2", "llama")
    assert expert.config.hidden_size != target.config.hidden_size
    assert expert.config.num_hidden_layers != target.config.num_hidden_layers
    text = zoo.prompts(1)[0]
    assert expert.tokenizer.tokenize(text) != target.tokenizer.tokenize(text)
    assert expert.tokenizer.pad_token is None
    assert target.tokenizer.pad_token is not None
    assert expert.tokenizer(text)["input_ids"][0] != expert.tokenizer.bos_token_id
    assert target.tokenizer(text)["input_ids"][0] == target.tokenizer.bos_token_id


def test_huggingface_models_are_float32_and_in_eval_mode(model):
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not model.training
    assert model.config.dtype == torch.float32


def test_bridges_load_without_any_connection_and_agree_with_huggingface(models, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name, bridge in zip(zoo.names(), zoo.load_pair(), strict=True):
        assert not bridge.training
        ids, mask = encode(models[name], zoo.prompts(1))
        with torch.no_grad():
            ours = bridge(ids, attention_mask=mask).log_softmax(-1)
            theirs = models[name](input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        assert (ours - theirs).abs().max() < 1e-4
        assert f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post" in bridge.hook_dict


def test_nnsight_loads(models):
    lm = zoo.load("target", host="nnsight")
    assert lm.model.layers[0] is not None
    assert lm.tokenizer("Tom")["input_ids"] == models["target"].tokenizer("Tom")["input_ids"]


def test_importing_the_zoo_imports_no_host():
    code = (
        "import sys; from expertsteer_lens import zoo; zoo.contrast_pairs(4); "
        "print([m for m in ('transformers', 'transformer_lens', 'nnsight') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tokenizers_give_texts_back(model):
    for split in world.SPLITS:
        for story in world.stories(20, seed=5, split=split):
            ids = model.tokenizer(story.text)["input_ids"]
            assert model.tokenizer.decode(ids, skip_special_tokens=True) == story.text
            assert len(ids) < 140


def test_a_completion_continues_the_tokens_of_its_prompt(model):
    behaviour = zoo.behaviour(20)
    for prompt, completion in itertools.product(
        behaviour.prompts, behaviour.positive + behaviour.negative
    ):
        alone = model.tokenizer(prompt)["input_ids"]
        assert model.tokenizer(prompt + completion)["input_ids"][: len(alone)] == alone


def test_fresh_stories_are_predicted_well_and_an_untrained_copy_fails(model):
    fresh = [story.text for story in world.stories(64, seed=77, split="validation")]
    assert nll(model, fresh) < 1.0
    assert nll(untrained(model), fresh) > 4.0


def test_texts_without_bos_are_predicted_nearly_as_well(model):
    fresh = [story.text for story in world.stories(1, seed=78, split="validation")]
    ids, _ = encode(model, fresh)
    with torch.no_grad():
        log_probs = model(input_ids=ids[:, 1:]).logits[:, :-1].log_softmax(-1)
    loss = -float(log_probs.gather(-1, ids[:, 2:, None]).mean())
    assert loss < nll(model, fresh) + 0.3


def test_continuations_are_words_of_the_world(model):
    known = {
        w for story in world.stories(2000, seed=0) for w in re.findall(r"[A-Za-z]+", story.text)
    }

    def share(candidate):
        words = []
        for i, prompt in enumerate(zoo.prompts(4)):
            ids, mask = encode(candidate, [prompt])
            with torch.random.fork_rng():
                torch.manual_seed(i)
                out = candidate.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=40,
                    do_sample=True,
                    top_k=0,
                    temperature=0.8,
                    pad_token_id=candidate.tokenizer.eos_token_id,
                )
            text = candidate.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            words += re.findall(r"[A-Za-z]+", text.rsplit(" ", 1)[0])
        return sum(word in known for word in words) / max(1, len(words))

    assert share(model) > 0.97
    assert share(untrained(model)) < 0.8


def test_mood_is_read_off_a_middle_layer_and_steers_both_ways_beyond_random_directions(model):
    layer = len(blocks(model)) // 2 - 1
    pairs = zoo.contrast_pairs(60)
    states, median = residual(model, pairs.texts, layer)
    labels = pairs.labels.bool()
    fit, held_out = torch.arange(120) < 80, torch.arange(120) >= 80
    direction = states[fit & labels].mean(0) - states[fit & ~labels].mean(0)
    direction = direction / direction.norm()
    scores = states @ direction
    above = scores[held_out & labels][:, None] > scores[held_out & ~labels][None]
    assert above.float().mean() > 0.95  # AUC

    behaviour, neutral = zoo.behaviour(8), zoo.neutral_texts(12)
    base, cost = mood_metric(model, behaviour), nll(model, neutral)
    doses = [-0.4, -0.2, 0.2, 0.4]
    moved = [
        steered(model, layer, c * median * direction, lambda: mood_metric(model, behaviour)) - base
        for c in doses
    ]
    assert moved == sorted(moved)
    assert moved[0] < -1.0
    assert moved[-1] > 1.0
    assert steered(model, layer, 0.4 * median * direction, lambda: nll(model, neutral)) - cost < 0.2

    generator = torch.Generator().manual_seed(0)
    random_moves = []
    for _ in range(5):
        noise = torch.randn(direction.shape, generator=generator)
        noise = 0.4 * median * noise / noise.norm()
        random_moves.append(
            abs(steered(model, layer, noise, lambda n=noise: mood_metric(model, behaviour)) - base)
        )
    assert max(random_moves) < 0.7 * min(-moved[0], moved[-1])


# ---------------------------------------------------------------- the recipe

TINY = train_zoo.Recipe(
    family="llama",
    d_model=16,
    n_layers=1,
    n_heads=2,
    vocab_size=300,
    n_steps=2,
    learning_rate=1e-3,
    tokens_per_batch=256,
)


def test_recipes_state_what_was_shipped():
    for name in zoo.names():
        stored = json.loads((zoo.model_path(name) / "recipe.json").read_text())
        assert stored["recipe"] == dataclasses.asdict(train_zoo.RECIPES[name])
        assert stored["measured"]["validation_loss"] < 1.0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_twice_gives_the_same_folder(tmp_path, family):
    recipe = dataclasses.replace(TINY, family=family)
    facts = [train_zoo.train("m", recipe, tmp_path / run, log_every=0) for run in ("a", "b")]
    assert facts[0]["validation_loss"] == facts[1]["validation_loss"]
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a/m" / file).read_bytes() == (tmp_path / "b/m" / file).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"n_steps": 3},
        {"learning_rate": 2e-3},
        {"d_model": 32},
        {"n_layers": 2},
        {"n_heads": 4},
        {"tokens_per_batch": 512},
        {"n_ctx": 100},
        {"no_bos_probability": 0.9},
        {"family": "gpt2"},
        {"init_std": 0.1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_recipe_field_acts(tmp_path, change, models, monkeypatch):
    monkeypatch.setattr(
        train_zoo, "build_tokenizer", lambda recipe, source: models["target"].tokenizer
    )
    monkeypatch.setattr(train_zoo, "validation_loss", lambda *args, **kwargs: 0.0)
    weights = []
    for name, recipe in (("a", TINY), ("b", dataclasses.replace(TINY, **change))):
        train_zoo.train(name, recipe, tmp_path, log_every=0)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]


def test_vocab_size_is_the_size_of_the_tokenizer():
    assert len(train_zoo.build_tokenizer(TINY)) == 300


def test_batches_are_padded_rows_within_the_limits(models):
    tokenizer = models["target"].tokenizer
    recipe = train_zoo.RECIPES["target"]
    drawn = list(
        itertools.islice(train_zoo.batches(tokenizer, recipe, split="validation", seed=0), 60)
    )
    assert all(batch.numel() <= recipe.tokens_per_batch for batch in drawn)
    assert max(batch.shape[1] for batch in drawn) == recipe.n_ctx
    starts = torch.cat([batch[:, 0] for batch in drawn])
    without = float((starts != tokenizer.bos_token_id).float().mean())
    assert without == pytest.approx(recipe.no_bos_probability, abs=0.05)


def test_the_command_line_trains_the_model_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        train_zoo, "train", lambda name, recipe, out: calls.append((name, recipe, out))
    )
    monkeypatch.setattr(sys, "argv", ["train", "--model", "target", "--out", str(tmp_path)])
    train_zoo.main()
    assert calls == [("target", train_zoo.RECIPES["target"], tmp_path)]
