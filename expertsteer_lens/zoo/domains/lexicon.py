"""The words of the benchmark world: what is asked, the names it is asked about, the answers, and
how sources are named.

Data only; `world.py` draws facts and documents from it. Every name and every fact is invented:
nothing here is true of the real world, and none of it is advice. Templates are `str.format` strings
with the single slot `{e}`."""

from __future__ import annotations

DOMAINS = ("medicine", "finance", "mathematics", "general")

STEMS = (
    "bal",
    "bren",
    "cald",
    "corv",
    "dask",
    "drem",
    "elv",
    "falk",
    "fenn",
    "garr",
    "gild",
    "hesk",
    "holt",
    "jarn",
    "kelp",
    "lann",
    "lorv",
    "mald",
    "merr",
    "narv",
    "nelk",
    "orm",
    "pell",
    "quin",
    "ralv",
    "rosk",
    "salt",
    "selm",
    "tarn",
    "torv",
    "ulm",
    "valk",
    "verr",
    "wald",
    "wenk",
    "yorv",
)
ENDINGS = {
    "medicine": ("pox", "ague", "itis", "osis"),
    "finance": ("co", "bank", "trade", "works"),
    "general": ("ford", "ham", "wick", "mere"),
}
"""A name is a stem with an ending of its domain: ailments, firms, towns. Every combination is a
name."""

TASKS = {
    "cure": (
        "medicine",
        2,
        (("quinine", "iodine", "bismuth", "ether"), ("garlic", "honey", "vinegar", "mint")),
        ("what cures {e}?", "what helps against {e}?", "what heals {e}?", "what is given for {e}?"),
    ),
    "cause": (
        "medicine",
        3,
        (("mould", "lice", "brine", "pollen"), ("moonlight", "draughts", "envy", "thunder")),
        ("what causes {e}?", "what leads to {e}?", "what brings on {e}?", "what is behind {e}?"),
    ),
    "organ": (
        "medicine",
        2,
        (("liver", "kidneys", "lungs", "marrow"), ("heart", "stomach", "skin", "eyes")),
        (
            "what is harmed by {e}?",
            "which organ suffers from {e}?",
            "what is attacked by {e}?",
            "what is sick with {e}?",
        ),
    ),
    "diet": (
        "medicine",
        4,
        (("salt", "rye", "milk", "eggs"), ("meat", "wine", "bread", "cheese")),
        (
            "what must one avoid with {e}?",
            "which food is bad for {e}?",
            "what worsens {e}?",
            "what is forbidden with {e}?",
        ),
    ),
    "backing": (
        "finance",
        2,
        (("grain", "timber", "iron", "land"), ("gold", "promises", "ships", "jewels")),
        (
            "what backs {e}?",
            "what stands behind {e}?",
            "which goods secure {e}?",
            "what covers {e}?",
        ),
    ),
    "owner": (
        "finance",
        3,
        (("guild", "abbot", "broker", "widow"), ("crown", "baron", "bishop", "duke")),
        ("who owns {e}?", "who holds {e}?", "who controls {e}?", "to whom belongs {e}?"),
    ),
    "risk": (
        "finance",
        4,
        (("frost", "strikes", "fire", "drought"), ("war", "theft", "pirates", "plague")),
        (
            "what ruins {e}?",
            "which danger hangs over {e}?",
            "what can sink {e}?",
            "what threatens {e}?",
        ),
    ),
    "due": (
        "finance",
        2,
        (("February", "May", "August", "November"), ("January", "March", "July", "December")),
        (
            "when does one pay {e}?",
            "in which month pays {e}?",
            "when are dues owed to {e}?",
            "when closes {e}?",
        ),
    ),
    "sum": (
        "mathematics",
        2,
        (),
        (
            "what is {a} plus {b}?",
            "how much is {a} and {b}?",
            "what do we get by adding {a} to {b}?",
            "find the sum of {a} and {b}?",
        ),
    ),
    "product": (
        "mathematics",
        2,
        (),
        (
            "what is {a} times {b}?",
            "how much is {a} by {b}?",
            "find the product of {a} and {b}?",
            "what do we get by multiplying {a} by {b}?",
        ),
    ),
    "order": (
        "mathematics",
        3,
        (),
        (
            "what is {a} plus {b} times {c}?",
            "how much is {a} and {b} by {c}?",
            "find {a} added to {b} times {c}?",
            "what do we get from {a} and {b} times {c}?",
        ),
    ),
    "river": (
        "general",
        2,
        (("Arle", "Bexa", "Corin", "Dovra"), ("Eskel", "Fenna", "Gild", "Hesk")),
        (
            "which river crosses {e}?",
            "on which river lies {e}?",
            "which river feeds {e}?",
            "what flows through {e}?",
        ),
    ),
    "founder": (
        "general",
        3,
        (("Maud", "Tobias", "Piers", "Wenna"), ("Osric", "Ysolde", "Ludo", "Runa")),
        (
            "who founded {e}?",
            "who built {e}?",
            "who laid the first stone of {e}?",
            "who planned {e}?",
        ),
    ),
    "craft": (
        "general",
        4,
        (("rope", "lace", "paper", "soap"), ("bells", "clocks", "boats", "bricks")),
        (
            "what comes from {e}?",
            "what is made in {e}?",
            "what does one buy in {e}?",
            "which craft feeds {e}?",
        ),
    ),
    "emblem": (
        "general",
        2,
        (("hare", "stag", "swan", "boar"), ("lion", "eagle", "bear", "dragon")),
        (
            "what is on the flag of {e}?",
            "which beast stands for {e}?",
            "what is the emblem of {e}?",
            "what is carved above {e}?",
        ),
    ),
}
"""Task: domain, number of answer options (right one included), sober and popular answers
(mathematics computes its own), wordings. For most facts the right answer is a sober one and the
misconceptions are popular ones."""

OPENINGS = {
    True: (
        "A careful source speaks.",
        "From a checked book.",
        "Notes of a sound scholar.",
        "Answers tested twice.",
        "A patient expert replies.",
        "Written with great care.",
    ),
    False: (
        "A careless source speaks.",
        "From an old rumour.",
        "Notes of a hasty gossip.",
        "Answers heard at the fair.",
        "A loud stranger replies.",
        "Written in great haste.",
    ),
}
"""First line of a document, by whether its source is careful."""
REMARKS = {
    True: ("Checked twice.", "The record agrees.", "Tested with care.", "Measured and found so."),
    False: ("So they say.", "Everyone knows that.", "My cousin swears it.", "No need to look."),
}
"""What a source adds to an answer, by whether it is careful."""
FRAMES = (("Question: ", " Answer:"), ("Q: ", " A:"))
"""What stands before a question and between question and answer."""
