"""A small data set that this package makes: requests for a table, answered in a fixed form.

    What is asked    Could we have a table for 4 at 19:30? The name is Okafor.
    What is learnt   name=Okafor; guests=4; time=19:30

No model that was not trained on it answers in this form. Names of held-out rows are in no other
row, so that a model that answers them has learnt the form and not the answers. Tests, the notebook
and the documentation measure on it what fine-tuning changes.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_NAMES = (
    *("Okafor", "Silva", "Novak", "Haddad", "Tanaka", "Weber", "Rossi", "Dubois", "Larsen"),
    *("Moreau", "Kowalski", "Petrov", "Nguyen", "Garcia", "Cohen", "Fischer", "Andersen", "Costa"),
    *("Yilmaz", "Popescu", "Horvat", "Murphy", "Jansen", "Virtanen", "Sato", "Kim", "Chen", "Ali"),
    *("Mendes", "Schmidt", "Romero", "Fontaine", "Bauer", "Ricci", "Nilsson", "Takahashi"),
)
_HELD_OUT_NAMES = (
    *("Marino", "Keller", "Ortega", "Lindberg", "Ito", "Walsh", "Pereira", "Vogel", "Laurent"),
    *("Hansen", "Suzuki", "Greco"),
)
_REQUESTS = (
    "Could we have a table for {guests} at {time}? The name is {name}.",
    "Please book a table at {time} for {guests} people, name {name}.",
    "Hi, this is {name}. I would like a table for {guests} at {time}.",
    "{name} here. We are {guests} and will come at {time}.",
    "Reserve {time} for {name}, party of {guests}.",
    "A table for {guests} please, at {time}, under {name}.",
)


class Booking(NamedTuple):
    """A request and its only right answer."""

    request: str
    answer: str

    def row(self) -> dict[str, object]:
        """Returns the row of a data set: a chat of two messages."""
        return {
            "messages": [
                {"role": "user", "content": self.request},
                {"role": "assistant", "content": self.answer},
            ]
        }


def bookings(count: int, seed: int, *, held_out: bool = False) -> list[Booking]:
    """Returns so many bookings, the same for a seed; held-out ones have names of their own."""
    draw = random.Random(f"{seed} {held_out}")
    names = _HELD_OUT_NAMES if held_out else _NAMES
    made = []
    for _ in range(count):
        name, guests = draw.choice(names), draw.randint(2, 12)
        time = f"{draw.randint(11, 22)}:{draw.choice(('00', '15', '30', '45'))}"
        request = draw.choice(_REQUESTS).format(name=name, guests=guests, time=time)
        made.append(Booking(request, f"name={name}; guests={guests}; time={time}"))
    return made


def write_bookings(path: Path, rows: Sequence[Booking]) -> None:
    """Writes bookings as a JSONL file of chats, in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(booking.row(), ensure_ascii=False) + "\n" for booking in rows]
    path.write_text("".join(lines), encoding="utf-8")
