"""The words of the story world: who, where, with what, and how each mood shows.

Data only. Sentences are `str.format` templates; `world.py` fills them. Tables indexed by mood have
the keys `happy`, `sad` and `neutral`, and happy and sad tables are of equal length, so that neither
mood is favoured. All words and sentences are written for this project."""

from __future__ import annotations

MOODS = ("happy", "sad", "neutral")

BOYS = ("Tom", "Ben", "Sam", "Leo", "Max", "Jack")
GIRLS = ("Mia", "Lily", "Anna", "Rose", "Ella", "Nora")
RELATIVES = ("mother", "father", "sister", "uncle")
COLOURS = ("red", "blue", "green", "yellow", "white", "brown")
SIZES = ("small", "big", "old", "new")
TIMES = ("morning", "afternoon", "evening", "day")
DAYS = ("Monday", "Tuesday", "Friday", "Sunday")
SEASONS = ("spring", "summer", "autumn", "winter")

PLACES = {
    "garden": "in",
    "park": "in",
    "forest": "in",
    "barn": "in",
    "village": "in",
    "beach": "at",
    "farm": "at",
    "market": "at",
    "river": "by",
    "lake": "by",
}
"""Place: the preposition that goes with it."""

FEELINGS: dict[str, tuple[str, ...]] = {
    "happy": ("happy", "glad", "proud", "jolly", "hopeful"),
    "sad": ("sad", "upset", "lonely", "gloomy", "afraid"),
    "neutral": ("calm", "sleepy", "hungry", "busy", "curious"),
}
"""Words used only in feeling sentences: no contrast pair holds one, every behaviour completion is
one."""

FEELING_STEMS = (
    "{N} felt",
    "{He} felt very",
    "In the end, {N} was",
    "Now {he} was",
    "All this made {N} feel",
    "{N} told {C} that {he} was",
)

MANNER: dict[str, dict[str, tuple[str, ...]]] = {
    "walk": {
        "happy": ("skipped", "danced", "hopped", "raced"),
        "sad": ("trudged", "limped", "crept", "shuffled"),
        "neutral": ("walked", "went", "strolled", "moved"),
    },
    "adj": {
        "happy": ("bright", "golden", "lovely", "sunny", "warm", "pretty"),
        "sad": ("grey", "dismal", "dreary", "dull", "cold", "dark"),
        "neutral": ("wide", "plain", "large", "quiet", "ordinary", "simple"),
    },
    "said": {
        "happy": ("cheered", "laughed", "sang", "shouted"),
        "sad": ("sobbed", "groaned", "moaned", "whimpered"),
        "neutral": ("said", "replied", "answered", "called"),
    },
    "look": {
        "happy": ("smiled at", "grinned at", "beamed at"),
        "sad": ("frowned at", "wept over", "sighed at"),
        "neutral": ("looked at", "turned to", "pointed at"),
    },
}
"""Words that carry the mood inside sentences that fit every mood."""

OPENINGS = (
    "One {season} {time}, {N} and {C} went to the {place} with a {colour} {thing}.",
    "On {day} {N} and {C} were {at}. {N} had a {colour} {thing}.",
    "There was a {kind} named {N}. {He} and {C} took a {colour} {thing} to the {place}.",
    "Once upon a time, {N} lived near the {place}. {He} had a {size} {thing} and played with {C}.",
    "{N} was {at} one {season} {time}. {He} showed {C} a {size} {colour} {thing}.",
    "Early on {day} {N} took a {size} {thing} to the {place}. {C} came too.",
    "It was a {season} {time}. {N} and {C} walked to the {place} with a {colour} {thing}.",
    "{N} liked the {place}. One {time} {he} went there with {C} and a {size} {thing}.",
)
"""First one or two sentences: the same for every mood, and what tells the splits apart."""

EVENTS: dict[str, tuple[str, ...]] = {
    "happy": (
        "{N} found a shiny coin under the {thing}.",
        "{C} gave {N} a big hug.",
        "Everyone liked the {thing} and clapped.",
        "{N} won first prize with the {thing}.",
        "{C} told a funny joke, and they laughed until they fell over.",
        "A kind man gave {N} a sweet cake.",
        "{N} and {C} played together and had great fun.",
        "The {thing} was even better than before.",
        "{N} made a new friend {at}.",
        "{C} said that {N} had done very well.",
        "They shared warm bread and honey.",
        "{N} learned a new song, and everybody sang it.",
    ),
    "sad": (
        "{N} fell into the mud and hit {his} knee.",
        "{C} would not speak to {N}.",
        "Everyone laughed at the {thing} in a mean way.",
        "{N} lost the {thing} and could not find it.",
        "{C} had to go away, and nobody knew for how long.",
        "A rude man took the last cake from {N}.",
        "{N} and {C} had a bad fight.",
        "The {thing} broke, and nobody could fix it.",
        "{N} had no one to play with {at}.",
        "{C} said that {N} had done it all wrong.",
        "There was nothing left to eat.",
        "{N} waited for a friend, but the friend never came.",
    ),
    "neutral": (
        "{N} put the {thing} on the ground.",
        "{C} sat down next to {N}.",
        "Some people saw the {thing} and passed by.",
        "{N} turned the {thing} over and looked inside.",
        "{C} spoke about the way to the {place}.",
        "A man with a cart sold bread and cheese.",
        "{N} and {C} counted the stones.",
        "The {thing} was as big as a pot.",
        "{N} stayed {at} for an hour.",
        "{C} asked {N} for the time.",
        "They ate an apple and some bread.",
        "{N} tied {his} shoe and went on.",
    ),
}

WEATHER: dict[str, tuple[str, ...]] = {
    "happy": (
        "The sun came out and the sky was clear.",
        "A rainbow stood over the {place}.",
        "Birds sang in the warm light.",
        "Flowers opened everywhere, and the air was sweet.",
    ),
    "sad": (
        "Cold rain fell and the sky was black.",
        "A storm broke over the {place}.",
        "The wind howled in the dark trees.",
        "The flowers were dead, and the air was bitter.",
    ),
    "neutral": (
        "There were some clouds in the sky.",
        "A road led past the {place}.",
        "The wind came from the west.",
        "The grass was short, and the air was dry.",
    ),
}

FACES: dict[str, tuple[str, ...]] = {
    "happy": (
        "{N} laughed and clapped {his} hands.",
        "{N} smiled from ear to ear.",
        "{N} jumped up and down with joy.",
        "{C} danced in a circle.",
        "{His} eyes shone like stars.",
    ),
    "sad": (
        "{N} wept and hid {his} face.",
        "{N} cried big tears.",
        "{N} sat alone with a heavy heart.",
        "{C} turned away in tears.",
        "{His} lips shook, and {he} sobbed.",
    ),
    "neutral": (
        "{N} nodded and lifted {his} hands.",
        "{N} looked from left to right.",
        "{N} stood still and waited.",
        "{C} walked in a circle.",
        "{His} hair was short and brown.",
    ),
}

SPEECH: dict[str, tuple[str, ...]] = {
    "happy": (
        '"Hooray!" {said} {N}. "This is wonderful!"',
        '"What a lovely {time}!" {said} {C}.',
        '"I love this {thing}," {said} {N}.',
        '"Thank you so much!" {said} {N}.',
        '"We did it!" {said} {C}. "Well done!"',
    ),
    "sad": (
        '"Oh no!" {said} {N}. "This is terrible!"',
        '"What an awful {time}!" {said} {C}.',
        '"I hate this {thing}," {said} {N}.',
        '"Please do not leave me," {said} {N}.',
        '"It is all lost," {said} {C}. "I am sorry."',
    ),
    "neutral": (
        '"Look," {said} {N}. "Here is the {thing}."',
        '"What time is it?" {said} {C}.',
        '"I have a {thing}," {said} {N}.',
        '"Please open the door," {said} {N}.',
        '"It is over there," {said} {C}. "Come and see."',
    ),
}

ACTIONS = (
    "{N} {walk} down the {adj} path.",
    "{N} {look} the {adj} {thing}.",
    "{C} {walk} over the {adj} field.",
    "The {place} was {adj} and {adj2}.",
    "{N} {look} {C}.",
    "{N} {walk} to the {place} and {look} the {adj} sky.",
)
"""Sentences of every mood; the mood is in the words filled in from MANNER."""

THINGS: dict[str, tuple[str, str, str]] = {
    "kite": (
        "The kite flew high over the clouds.",
        "The kite tore in two.",
        "The kite had a long tail.",
    ),
    "ball": (
        "The ball bounced right into the goal.",
        "The ball rolled away and sank.",
        "The ball was made of leather.",
    ),
    "boat": (
        "The boat sailed fast and won the race.",
        "The boat filled with water.",
        "The boat was made of wood.",
    ),
    "book": (
        "The book was full of funny tales.",
        "The book fell into a puddle.",
        "The book had forty pages.",
    ),
    "drum": (
        "The drum made everyone dance.",
        "The drum got a big hole.",
        "The drum was tied with string.",
    ),
    "hat": ("The hat fit perfectly.", "The hat blew away in the storm.", "The hat had a wide rim."),
    "cup": (
        "The cup was full of hot chocolate.",
        "The cup cracked and cut a finger.",
        "The cup stood on a shelf.",
    ),
    "lamp": (
        "The lamp shone like a star.",
        "The lamp went out, and all was dark.",
        "The lamp had a metal ring.",
    ),
    "bell": (
        "The bell rang for the feast.",
        "The bell was stolen in the night.",
        "The bell hung on a rope.",
    ),
    "box": ("The box held a wonderful surprise.", "The box was empty.", "The box had a flat lid."),
}
"""Thing: what happens to it in a happy, a sad and a neutral story."""

TURNS: dict[str, tuple[str, ...]] = {
    "happy": (
        "But then everything got better.",
        "But then help came at last.",
        "Then a wonderful thing happened.",
    ),
    "sad": (
        "But then everything went wrong.",
        "But then bad news came.",
        "Then a terrible thing happened.",
    ),
}
"""The sentence before a change of mood, by the mood that follows."""

STARTERS: dict[str, tuple[str, ...]] = {
    "happy": ("Hurrah,", "Best of all,", "By good luck,"),
    "sad": ("Alas,", "Worst of all,", "By bad luck,"),
    "neutral": ("Then", "After that,", "Later,"),
}
"""What may stand before an event, the weather or what happens to the thing."""

ENDINGS: dict[str, tuple[str, ...]] = {
    "happy": (
        "It was the best {time} of all.",
        "They all went home smiling.",
        "{N} hugged {C} and laughed.",
        "{N} would love the {place} for ever.",
        "That night {N} had sweet dreams.",
    ),
    "sad": (
        "It was the worst {time} of all.",
        "They all went home in tears.",
        "{N} left {C} and cried.",
        "{N} would fear the {place} for ever.",
        "That night {N} could not sleep.",
    ),
    "neutral": (
        "It was the end of the {time}.",
        "They all went home for supper.",
        "{N} followed {C} and talked.",
        "{N} would see the {place} again.",
        "That night {N} read a book.",
    ),
}
