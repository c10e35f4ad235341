"""Prompts whose answers repeat what is known, and some whose answers do not."""

import json
import random

_WORDS = tuple(
    word
    for line in (
        "keeper lighthouse evening planks bottle letter spring piano room table sea harbour rope",
        "lamp winter captain window stairs island boat garden stone market bridge river tower",
    )
    for word in line.split()
)


def _sentences(dice: random.Random, count: int) -> str:
    def sentence() -> str:
        nouns = [dice.choice(_WORDS) for _ in range(4)]
        return "The {} of the {} lay beside the {}, and the {} was {}.".format(
            *nouns, dice.choice(["old", "green", "far away", "lost", "made of oak"])
        )

    return " ".join(sentence() for _ in range(count))


def _quotation(dice: random.Random) -> str:
    text = _sentences(dice, 10)
    return f"Text:\n{text}\n\nThe same text again, word for word:\n{text[:60]}"


def _edit(dice: random.Random) -> str:
    names = dice.sample(_WORDS, 5)
    code = "".join(
        f"def {name}_area(shape):\n    return shape.{name}_width * shape.{name}_height\n\n\n"
        for name in names
    )
    changed = code.replace("shape", "figure")
    return f"Before:\n```\n{code}```\n\nAfter, with figure in place of shape:\n```\n{changed[:150]}"


def _records(dice: random.Random) -> str:
    rows = [
        {"name": dice.choice(_WORDS), "place": dice.choice(_WORDS), "price": dice.randrange(99)}
        for _ in range(6)
    ]
    return "[\n" + "".join(f" {json.dumps(row)},\n" for row in rows)


def _prose(dice: random.Random) -> str:
    return f"A story about a {dice.choice(_WORDS)} and a {dice.choice(_WORDS)}. Once upon a time"


KINDS = {"quotation": _quotation, "edit": _edit, "records": _records, "prose": _prose}
