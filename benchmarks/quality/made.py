"""Tasks that a script makes: numbers as they are spoken, and facts about companies that do not exist."""

from __future__ import annotations

import random
from collections.abc import Callable

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = ". . twenty thirty forty fifty sixty seventy eighty ninety".split()
IRREGULAR = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
MONTHS = "January February March April May June July August September October November December".split()
NAMES = "Anna Ben Chloe David Elif Farid Grace Hugo Ines Jonas Keiko Liam Mara Noah Olga Pedro".split()
THINGS = "chairs boxes tickets books plates lamps cables tents maps bottles folders pens".split()
PLACES = (
    "the station,the library,gate four,the old mill,the town hall,the pool,platform two,the museum".split(",")
)
SENTENCES = (
    "{name} needs {n} {things} at {place} on {date}.",
    "Meet {name} at {place} at {time} on {date}.",
    "The train to {place} leaves at {time}, and {n} seats are free.",
    "On {date} at {time}, bring {n} {things} to {name}.",
    "{name} sold {n} {things} for {price}.",
    "Call {name} before {time}: {n} {things} cost {price}.",
)
PHRASINGS = 5
COMPANIES = 40


def number(n: int) -> str:
    """0 to 999 in words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" and {number(n % 100)}" if n % 100 else "")


def ordinal(n: int) -> str:
    head, dash, last = number(n).rpartition("-")
    if last in IRREGULAR:
        return head + dash + IRREGULAR[last]
    return head + dash + (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")


def clock(hour: int, minute: int) -> str:
    following = number((hour + 1) % 12 or 12)
    if minute == 0:
        return f"{number(hour % 12 or 12)} o'clock"
    words = {
        15: f"a quarter past {number(hour % 12 or 12)}",
        30: f"half past {number(hour % 12 or 12)}",
        45: f"a quarter to {following}",
    }
    return words.get(minute) or (
        f"{number(minute)} past {number(hour % 12 or 12)}"
        if minute < 30
        else f"{number(60 - minute)} to {following}"
    )


def spoken(chooser: random.Random) -> dict[str, str]:
    """A sentence with numerals, and the same as one would say it."""
    hour, minute = chooser.randint(0, 23), chooser.choice(range(0, 60, 5))
    day, month, n = chooser.randint(1, 28), chooser.choice(MONTHS), chooser.randint(2, 999)
    euros, cents = chooser.randint(2, 99), chooser.choice(range(5, 100, 5))
    same = {
        "name": chooser.choice(NAMES),
        "things": chooser.choice(THINGS),
        "place": chooser.choice(PLACES),
    }
    written = {
        "n": str(n),
        "time": f"{hour}:{minute:02d}",
        "date": f"{day} {month}",
        "price": f"€{euros}.{cents:02d}",
    }
    said = {
        "n": number(n),
        "time": clock(hour, minute),
        "date": f"the {ordinal(day)} of {month}",
        "price": f"{number(euros)} euros and {number(cents)} cents",
    }
    sentence = chooser.choice(SENTENCES)
    return {"prompt": sentence.format(**same, **written), "completion": sentence.format(**same, **said)}


def distinct(
    make: Callable[[random.Random], dict[str, str]], count: int, chooser: random.Random
) -> list[dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        row = make(chooser)
        rows[row["prompt"]] = row
    return list(rows.values())


SYLLABLES = "ka mo ri ven tol bar nex lu sil dor pan zu fer mi gat hol".split()
CITIES = "Lisbon Oslo Quito Hanoi Tunis Riga Osaka Perth Sofia Lima Accra Turin".split()
PRODUCTS = "bicycles,ovens,kites,violins,batteries,carpets,clocks,canoes,lanterns,scales,pumps,mirrors".split(
    ","
)
QUESTIONS = {
    "city": (
        "Where is {name} based?",
        "In which city is {name}?",
        "What is the home town of {name}?",
        "{name}: which city?",
        "Which city does {name} work from?",
    ),
    "product": (
        "What does {name} make?",
        "Which product is {name} known for?",
        "What can I buy from {name}?",
        "{name}: what do they produce?",
        "What comes out of the factory of {name}?",
    ),
    "year": (
        "When was {name} founded?",
        "In which year did {name} begin?",
        "How long ago was {name} started: which year?",
        "{name}: founded when?",
        "Since which year is there {name}?",
    ),
}


def facts(chooser: random.Random) -> list[dict[str, str]]:
    """PHRASINGS rows in a row for every fact, in an order of its own."""
    names: dict[str, None] = {}
    while len(names) < COMPANIES:
        names["".join(chooser.sample(SYLLABLES, 3)).capitalize()] = None
    rows = []
    for name in names:
        answers = {
            "city": chooser.choice(CITIES),
            "product": chooser.choice(PRODUCTS),
            "year": str(chooser.randint(1850, 2019)),
        }
        for kind, answer in answers.items():
            asked = chooser.sample(QUESTIONS[kind], PHRASINGS)
            rows += [{"prompt": question.format(name=name), "completion": answer} for question in asked]
    return rows
