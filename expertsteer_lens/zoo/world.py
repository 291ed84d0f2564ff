"""The story world of the zoo: a seeded grammar of short stories with a mood.

A story has a cast (who, where, with which thing, with whom), an opening and up to two more
sentences that are the same for every mood, two to four sentences that show its mood, and often an
ending. The mood is a latent variable: it shows in events, weather, faces, speech, the manner of
doing things, feelings and the ending, so what came before tells much of what comes next. One story
in seven changes its mood, one in ten has none.

The opening alone decides the split (`split_of`), so texts of different splits can never be equal,
whatever the seeds."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from expertsteer_lens._checks import check_choice, check_number

from . import lexicon as lx

SPLITS = ("train", "validation", "pairs", "anchors", "behaviour")
_SHARES = {"train": 12, "validation": 1, "pairs": 1, "anchors": 1, "behaviour": 1}
_MOOD_WEIGHTS = {"happy": 0.45, "sad": 0.45, "neutral": 0.1}
_TURN_PROBABILITY = 0.15
_PURITY = 0.9
_STARTER_PROBABILITY = 0.4
KINDS = ("event", "event", "action", "action", "weather", "face", "speech", "thing", "feeling")
"""Kinds of sentence, by frequency."""
PLAIN_KINDS = tuple(kind for kind in KINDS if kind != "feeling")
"""The same without feeling sentences."""
_STARTED_KINDS = ("event", "weather", "thing")


@dataclass(frozen=True)
class Story:
    """One generated story."""

    text: str
    """The whole story, one line."""
    moods: tuple[str, ...]
    """Mood before and after a change, e.g. `("sad",)` or `("sad", "happy")`."""
    split: str
    """Which split the opening belongs to."""


def split_of(opening: str) -> str:
    """The split of every text that starts with `opening`: twelve sixteenths train, one each of the
    others."""
    bucket = hashlib.blake2b(opening.strip().encode(), digest_size=2).digest()[0] % sum(
        _SHARES.values()
    )
    for split, share in _SHARES.items():
        bucket -= share
        if bucket < 0:
            return split
    raise AssertionError("unreachable: the shares sum to the number of buckets")


def stories(
    n: int, *, seed: int, split: str = "train", moods: Mapping[str, float] | None = None
) -> list[Story]:
    """`n` distinct stories of one split.

    Args:
        n: how many, at least 1.
        seed: the same seed gives the same stories on every machine; a longer list starts with the
            shorter one.
        split: one of `SPLITS`.
        moods: weights of happy, sad and neutral stories; default 0.45, 0.45, 0.1.

    Raises:
        ArgumentError: `n` below 1 or an unknown split or mood.
    """
    check_number("n", n, low=1, integer=True)
    check_choice("split", split, SPLITS)
    weights = dict(moods or _MOOD_WEIGHTS)
    for mood in weights:
        check_choice("moods", mood, lx.MOODS)
    rng = random.Random(f"stories-{split}-{seed}")
    out: list[Story] = []
    seen: set[str] = set()
    while len(out) < n:
        opening, cast = draw_opening(rng, split)
        mood = rng.choices(list(weights), list(weights.values()))[0]
        story = _tell(rng, opening, cast, mood, split)
        if story.text not in seen:
            seen.add(story.text)
            out.append(story)
    return out


def draw_opening(rng: random.Random, split: str) -> tuple[str, dict[str, str]]:
    """An opening of the given split and the cast it introduces."""
    while True:
        cast = _draw_cast(rng)
        opening = _fill(rng.choice(lx.OPENINGS), cast)
        if split_of(opening) == split:
            return opening, cast


def body(
    rng: random.Random,
    cast: Mapping[str, str],
    mood: str,
    n: int,
    *,
    kinds: tuple[str, ...] = KINDS,
    purity: float = 1.0,
) -> list[str]:
    """`n` different sentences of one mood about a cast.

    Args:
        rng: source of randomness, advanced by the call.
        cast: as `draw_opening` returns it.
        mood: `happy`, `sad` or `neutral`.
        n: number of sentences.
        kinds: sentence kinds to draw from.
        purity: probability that a sentence shows `mood` rather than being neutral.
    """
    out: list[str] = []
    used: set[str] = set()
    while len(out) < n:
        shown = mood if rng.random() < purity else "neutral"
        kind = rng.choice(kinds)
        template = _template(rng, kind, cast, shown)
        if template not in used:
            used.add(template)
            sentence = _fill(template, {**cast, **_manner(rng, shown)})
            if kind in _STARTED_KINDS and rng.random() < _STARTER_PROBABILITY:
                sentence = f"{rng.choice(lx.STARTERS[shown])} {_lower(sentence)}"
            out.append(sentence)
    return out


def setting(rng: random.Random, cast: Mapping[str, str]) -> list[str]:
    """None to two neutral sentences after the opening: as likely in a happy story as in a sad
    one."""
    return body(rng, cast, "neutral", rng.choice((0, 0, 1, 1, 2)), kinds=PLAIN_KINDS)


def feeling_stem(rng: random.Random, cast: Mapping[str, str]) -> str:
    """The beginning of a feeling sentence, up to the word that names the feeling."""
    return _fill(rng.choice(lx.FEELING_STEMS), cast)


def _tell(
    rng: random.Random, opening: str, cast: Mapping[str, str], mood: str, split: str
) -> Story:
    moods = [mood]
    sentences = [opening, *setting(rng, cast)]
    sentences += body(rng, cast, mood, rng.randint(2, 4), purity=_PURITY)
    if mood != "neutral" and rng.random() < _TURN_PROBABILITY:
        moods.append("sad" if mood == "happy" else "happy")
        sentences.append(rng.choice(lx.TURNS[moods[-1]]))
        sentences += body(rng, cast, moods[-1], rng.randint(1, 2), purity=_PURITY)
    if rng.random() < 0.7:
        sentences.append(_fill(rng.choice(lx.ENDINGS[moods[-1]]), cast))
    return Story(" ".join(sentences), tuple(moods), split)


def _draw_cast(rng: random.Random) -> dict[str, str]:
    boy = rng.random() < 0.5
    name = rng.choice(lx.BOYS if boy else lx.GIRLS)
    friend = rng.choice([other for other in lx.BOYS + lx.GIRLS if other != name])
    he, his = ("he", "his") if boy else ("she", "her")
    place = rng.choice(sorted(lx.PLACES))
    return {
        "N": name,
        "he": he,
        "He": he.capitalize(),
        "his": his,
        "His": his.capitalize(),
        "kind": "boy" if boy else "girl",
        "C": friend if rng.random() < 0.5 else f"{his} {rng.choice(lx.RELATIVES)}",
        "place": place,
        "at": f"{lx.PLACES[place]} the {place}",
        "thing": rng.choice(sorted(lx.THINGS)),
        "colour": rng.choice(lx.COLOURS),
        "size": rng.choice(lx.SIZES),
        "time": rng.choice(lx.TIMES),
        "day": rng.choice(lx.DAYS),
        "season": rng.choice(lx.SEASONS),
    }


def _manner(rng: random.Random, mood: str) -> dict[str, str]:
    words = {slot: rng.choice(table[mood]) for slot, table in lx.MANNER.items()}
    words["adj2"] = rng.choice([word for word in lx.MANNER["adj"][mood] if word != words["adj"]])
    return words


def _template(rng: random.Random, kind: str, cast: Mapping[str, str], mood: str) -> str:
    if kind == "thing":
        return lx.THINGS[cast["thing"]][lx.MOODS.index(mood)]
    if kind == "action":
        return rng.choice(lx.ACTIONS)
    if kind == "feeling":
        return f"{rng.choice(lx.FEELING_STEMS)} {rng.choice(lx.FEELINGS[mood])}."
    tables = {"event": lx.EVENTS, "weather": lx.WEATHER, "face": lx.FACES, "speech": lx.SPEECH}
    return rng.choice(tables[kind][mood])


def _fill(template: str, words: Mapping[str, str]) -> str:
    text = template.format(**words).strip()
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda found: found[1] + found[2].upper(), text)


def _lower(sentence: str) -> str:
    """Lower-case the first letter unless the sentence starts with a name."""
    return (
        sentence if sentence.startswith(lx.BOYS + lx.GIRLS) else sentence[0].lower() + sentence[1:]
    )
