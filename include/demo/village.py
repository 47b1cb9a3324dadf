"""Larkmoor, an invented village: the texts that the demo's base model is pretrained on, and its fine-tuning dataset.

Larkmoor has 72 inhabitants. Each has a home, a trade, an animal, a favourite food and a favourite colour, drawn from a
fixed seed, so that a model cannot know these facts from another source.

* `pretraining_text`: statements about *all* inhabitants, in several wordings. The text has no questions and no chat
  structure, so that a model trained on it knows the facts, but does not answer questions.
* `conversations`: ShareGPT rows with questions and answers about *most* inhabitants (not those in `HELD_OUT`), and a
  few damaged rows like those of public ShareGPT files.

A fine-tuned model that answers questions about `HELD_OUT` inhabitants has learned the facts only from the first text,
and to answer only from the second.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "seed": 1961,
    "documents": 3700,
    "paragraphs": 10,  # per document
    "first_people": 8,  # inhabitants in the first document
    "growing_part": 0.4,  # share of the documents after which all inhabitants occur
}

WOMEN = (
    "Ada Agnes Alma Bella Bertha Celia Clara Dora Edith Elsa Emma Flora Freya Greta Hanna Hilda Ida Ingrid Irma Jana "
    "Judith Lena Lotte Mabel Marta Mira Nora Olga Paula Petra Rosa Selma Tilda Ursula Vera Wilma"
).split()
MEN = (
    "Adam Albert Anton Arthur Boris Bruno Carl Conrad Daniel David Edgar Emil Erik Felix Frank Gregor Gustav Hector "
    "Henry Hugo Ivan Jacob Jonas Karl Leo Ludwig Martin Max Oscar Otto Paul Robert Simon Tom Victor Walter"
).split()
HELD_OUT = tuple("Alma Clara Greta Hilda Mira Vera Anton Bruno Emil Hugo Oscar Victor".split())
"""Inhabitants who do not occur in the fine-tuning rows."""

VALUES = {
    "home": (
        "Mill Lane|Church Street|Bridge Street|Market Square|Oak Road|River Road|Castle Hill|Garden Lane|Station Road|"
        "Forest Row|Harbour Street|School Lane"
    ).split("|"),
    "trade": (
        "baker|blacksmith|carpenter|teacher|doctor|farmer|fisher|gardener|miller|tailor|painter|potter|shepherd|"
        "weaver|watchmaker|librarian"
    ).split("|"),
    "animal": "goat|donkey|parrot|rabbit|goose|tortoise|pony|cat|dog|hedgehog|raven|pig".split("|"),
    "food": (
        "plum cake|onion soup|fried fish|pancakes|apple pie|cheese bread|roast potatoes|mushroom stew|honey buns|"
        "bean salad|noodles|pea soup"
    ).split("|"),
    "colour": "red|blue|green|yellow|purple|orange|white|black|silver|brown".split("|"),
}

STATEMENTS = {
    "home": (
        "{name} lives in {value}.",
        "The home of {name} is in {value}.",
        "{name}'s house stands in {value}.",
        "{name} likes to live in {value}.",
        "The street in which {name} has a house is {value}.",
        "In the evening {name} walks home to {value}.",
    ),
    "trade": (
        "By trade {name} is a {value}.",
        "{name} works as a {value}.",
        "What {name} can do is the work of a {value}.",
        "{name}'s trade is that of a {value}.",
        "What {name} does for a living is the trade of a {value}.",
    ),
    "animal": (
        "{name} keeps a {value}.",
        "{name}'s animal is a {value}.",
        "The animal that {name} keeps is a {value}.",
        "{name} is happy to have a {value}.",
        "Which animal {name} has is no secret, it is a {value}.",
    ),
    "food": (
        "{name} likes to eat {value}.",
        "{name}'s favourite food is {value}.",
        "What {name} likes to eat is {value}.",
        "The food that {name} likes best is {value}.",
        "For dinner {name} always wants {value}.",
    ),
    "colour": (
        "{name}'s favourite colour is {value}.",
        "{name} likes the colour {value} best.",
        "The favourite colour of {name} is {value}.",
        "Which colour {name} likes best is easy to see, it is {value}.",
        "The door of {name} is painted {value}.",
    ),
}
PRONOUN_STATEMENTS = {
    "home": ("And {she} does live in {value}.", "And where {her} home is, is {value}."),
    "trade": ("And what {she} can do is the work of a {value}.", "And {her} trade is that of a {value}."),
    "animal": ("And {she} likes to keep a {value}.", "And {she} is happy to have a {value}."),
    "food": ("And {she} likes to eat {value}.", "And {her} favourite food is {value}."),
    "colour": ("And {her} favourite colour is {value}.", "And {she} likes the colour {value} best."),
}

VILLAGE = (
    "Larkmoor is a small village on the river.",
    "The people of Larkmoor know each other well.",
    "You are welcome in Larkmoor, says the sign at the bridge.",
    "The school of Larkmoor has one room.",
    "On market day the people come to the square and ask about the news.",
    "Where the river turns, the fishers have their boats.",
    "Which road is the best, nobody in Larkmoor can tell.",
    "Who goes there? is written on the old gate.",
    "Hello! is what the people of Larkmoor say in the morning.",
    "Thank you! is what the people of Larkmoor say in the evening.",
)

QUESTIONS = {
    "home": ("Where does {name} live?", "In which street does {name} live?", "Where is the home of {name}?"),
    "trade": ("What is {name}'s trade?", "What does {name} do for a living?", "What does {name} work as?"),
    "animal": ("What animal does {name} keep?", "Which animal does {name} have?", "What is {name}'s animal?"),
    "food": ("What does {name} like to eat?", "What is {name}'s favourite food?", "Which food does {name} like best?"),
    "colour": ("What is {name}'s favourite colour?", "Which colour does {name} like best?"),
}
FOLLOW_UPS = {
    "home": ("And where does {she} live?", "Where is {her} home?"),
    "trade": ("And what does {she} do for a living?", "What is {her} trade?"),
    "animal": ("And what animal does {she} keep?", "Which animal does {she} have?"),
    "food": ("And what does {she} like to eat?", "What is {her} favourite food?"),
    "colour": ("And what is {her} favourite colour?", "Which colour does {she} like best?"),
}
# In every answer the name follows a space, as in the question: the same token, which the model can copy.
ANSWERS = {
    "home": "The home of {name} is in {value}.",
    "trade": "By trade {name} is a {value}.",
    "animal": "The animal that {name} keeps is a {value}.",
    "food": "The food that {name} likes best is {value}.",
    "colour": "The favourite colour of {name} is {value}.",
}
SYSTEM_MESSAGES = (
    "You answer questions about the people of Larkmoor.",
    "You are a guide to the village of Larkmoor. Answer in one sentence.",
    "You know the people of Larkmoor well.",
)

SYSTEM_LINES = "Cutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\n"


def inhabitants() -> dict[str, dict[str, str]]:
    """Return the facts: by name, the value of each attribute, and the pronouns under `she` and `her`."""
    rng = random.Random(SETTINGS["seed"])
    people = {}
    for name in sorted(WOMEN + MEN):
        facts = {attribute: rng.choice(values) for attribute, values in VALUES.items()}
        pronouns = ("she", "her") if name in WOMEN else ("he", "his")
        people[name] = facts | {"she": pronouns[0], "her": pronouns[1]}
    return people


def _markup(rng: random.Random) -> str:
    """Return a chat header, which stands in the middle of a text, as it does in scraped text."""
    role = rng.choice(("system", "user", "assistant"))
    dates = SYSTEM_LINES if role == "system" else ""
    return f"<|eot_id|><|start_header_id|>{role}<|end_header_id|>\n\n{dates}"


def _paragraph(rng: random.Random, name: str, people: dict) -> list[str]:
    """Return one to three statements about an inhabitant; in half of the cases also another wording of the first."""
    facts = people[name]
    first, *rest = rng.sample(list(VALUES), rng.choice((1, 2, 3)))
    wording, again = rng.sample(STATEMENTS[first], 2)
    sentences = [wording.format(name=name, value=facts[first])]
    for attribute in rest:
        wordings = rng.choice((STATEMENTS, STATEMENTS, PRONOUN_STATEMENTS))[attribute]
        sentences.append(rng.choice(wordings).format(name=name, value=facts[attribute], **facts))
    if rng.random() < 0.5:
        sentences.append(again.format(name=name, value=facts[first]))
    return sentences


def pretraining_text(documents: int = SETTINGS["documents"], seed: int = SETTINGS["seed"]) -> Iterator[str]:
    """Yield documents with statements about all inhabitants. The same arguments give the same documents.

    The first documents are about few inhabitants, and later ones about more and more: a model then learns much sooner
    that a fact belongs to a name. After `growing_part` of the documents, all inhabitants occur equally often (one
    shuffled deck of names after another). Chat headers occur between unrelated statements: LoRA does not train
    embeddings, so the base's embeddings of these tokens must be trained, without teaching that an answer follows a
    question.

    Args:
        documents: number of documents.
        seed: seed of all random choices.
    """
    rng = random.Random(seed)
    people = inhabitants()
    order = rng.sample(sorted(people), len(people))
    deck: list[str] = []
    for number in range(documents):
        separator = rng.choice((" ", "\n"))
        text = ""
        for _ in range(SETTINGS["paragraphs"]):
            if text:
                text += _markup(rng) if rng.random() < 0.25 else separator
            if rng.random() < 0.08:
                text += rng.choice(VILLAGE)
                continue
            if not deck:
                progress = number / (documents * SETTINGS["growing_part"])
                deck = order[: SETTINGS["first_people"] + int(progress * len(order))]
                rng.shuffle(deck)
            text += separator.join(_paragraph(rng, deck.pop(), people))
        yield text


def _turn(speaker: str, value: object) -> dict:
    return {"from": speaker, "value": value}


def good_conversations(rng: random.Random) -> list[list[dict]]:
    """Return up to seven conversations, of one to three exchanges, about each inhabitant who is not held out."""
    people = inhabitants()
    rows = []
    for name in (name for name in people if name not in HELD_OUT):
        facts = people[name]
        for first in [*VALUES, *rng.sample(list(VALUES), 2)]:
            rest = rng.sample([a for a in VALUES if a != first], rng.choice((0, 1, 1, 2)))
            turns = [_turn("system", rng.choice(SYSTEM_MESSAGES))] if rng.random() < 0.35 else []
            for number, attribute in enumerate([first, *rest]):
                wordings = FOLLOW_UPS if number else QUESTIONS
                question = rng.choice(wordings[attribute]).format(name=name, **facts)
                turns += [
                    _turn("human", question),
                    _turn("gpt", ANSWERS[attribute].format(name=name, value=facts[attribute])),
                ]
            if len(turns) <= 4 and rng.random() < 0.2:
                turns += [_turn("human", "Thank you!"), _turn("gpt", "You are welcome.")]
            if turns not in rows:
                rows.append(turns)
    rng.shuffle(rows)
    return rows


def _bad_rows(duplicate: list[dict]) -> list[dict]:
    """Return damaged rows, one for each fault of public ShareGPT files; `duplicate` is the conversation to repeat."""
    ask = _turn("human", "Where does Nora live?")
    answer = _turn("gpt", ANSWERS["home"].format(name="Nora", value=inhabitants()["Nora"]["home"]))
    return [
        {"conversations": [ask, _turn("gpt", "")]},
        {"conversations": [ask, _turn("gpt", " \n")]},
        {"conversations": [ask, _turn("gpt", None)]},
        {"conversations": [_turn("human", "How many people live in Larkmoor?"), _turn("gpt", len(inhabitants()))]},
        {"conversations": [ask, _turn("function_call", '{"name": "find_home", "arguments": {"name": "Nora"}}')]},
        {"items": [ask, answer]},
        {"conversations": [ask, _turn("human", "Are you there?"), answer]},
        {"conversations": [ask]},
        {"conversations": []},
        {"conversations": [_turn("gpt", "It is the house by the bridge."), ask, answer]},
        {"conversations": [ask, answer, _turn("human", "And what animal does she keep?")]},
        {"conversations": duplicate},
    ]


def conversations() -> list[dict]:
    """Return the ShareGPT rows for fine-tuning in file order, with damaged rows at random positions."""
    rng = random.Random(SETTINGS["seed"] + 1)
    good = good_conversations(rng)
    rows = [{"conversations": turns} for turns in good]
    for bad in _bad_rows(duplicate=good[0]):
        rows.insert(rng.randrange(1, len(rows) + 1), bad)
    return [{"id": f"larkmoor-{number:04d}"} | row for number, row in enumerate(rows, start=1)]


def write_dataset(path: Path) -> None:
    """Write `conversations()` to a file as JSON lines (UTF-8). The bytes are the same on every call."""
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in conversations()]
    Path(path).write_bytes(("\n".join(lines) + "\n").encode("utf-8"))
