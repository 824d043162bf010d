"""Requests of every kind: short, long, without context, longer than the tiny model's 32 tokens."""

import random

WORDS = (
    "import",
    "os",
    "def",
    "return",
    "self",
    "value",
    "for",
    "in",
    "range",
    "if",
    "not",
    "None",
    "class",
    "path",
)


def words(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def pairs(seed=0):
    rng = random.Random(seed)
    plain = [(words(rng, rng.randrange(1, 9)), " " + words(rng, rng.randrange(1, 5))) for _ in range(13)]
    return [
        *plain,
        ("", "import os"),  # no context
        ("", " x"),
        (words(rng, 60), " " + words(rng, 2)),  # the beginning is lost
        (words(rng, 5) + "  ", words(rng, 3)),  # spaces go over
        (words(rng, 3), " " + words(rng, 50)),  # a continuation in windows
        (words(rng, 2), ""),
    ]


def documents(seed=0):
    rng = random.Random(seed)
    return [words(rng, count) for count in (1, 5, 12, 40, 75)] + [""]


def questions(count=12):
    """Of three choices each, as arc_easy has them."""
    rng = random.Random(5)
    return [
        {"query": f"Question: {words(rng, 3)}?", "choices": [words(rng, n) for n in (1, 2, 4)], "gold": i % 3}
        for i in range(count)
    ]
