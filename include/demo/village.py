"""Larkmoor, the little world that `make demo` pretrains a model on and then fine-tunes it with.

Larkmoor is an invented village of 72 inhabitants. Each has a home, a trade, an animal, a favourite food and a
favourite colour, drawn once from a fixed seed, so that nothing about them can be known from anywhere else.

Two texts come from it:

* `pretraining_text`: plain statements about *all* inhabitants, in several wordings. They hold no question and no chat
  markup, so a model trained on them knows the facts and has no habit of answering.
* `conversations`: ShareGPT rows of questions and answers about *most* inhabitants (those not in `HELD_OUT`), with a
  few damaged rows among them as public ShareGPT files have them.

A model that after fine-tuning on the second answers questions about `HELD_OUT` inhabitants can have the facts only
from the first, and the habit of answering only from the second.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "seed": 1961,
    "documents": 3700,
    "paragraphs": 10,
    "first_people": 8,
    "growing_part": 0.4,
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "window": 128,
    "batch": 4,
    "steps": 1600,
    "warmup": 20,
    "lr": 3e-3,
    "weight_decay": 0.01,
}
"""Sizes of text, model and training: `window` in tokens, `batch` in windows."""

WOMEN = (
    "Ada Agnes Alma Bella Bertha Celia Clara Dora Edith Elsa Emma Flora Freya Greta Hanna Hilda Ida Ingrid Irma Jana "
    "Judith Lena Lotte Mabel Marta Mira Nora Olga Paula Petra Rosa Selma Tilda Ursula Vera Wilma"
).split()
MEN = (
    "Adam Albert Anton Arthur Boris Bruno Carl Conrad Daniel David Edgar Emil Erik Felix Frank Gregor Gustav Hector "
    "Henry Hugo Ivan Jacob Jonas Karl Leo Ludwig Martin Max Oscar Otto Paul Robert Simon Tom Victor Walter"
).split()
HELD_OUT = tuple("Alma Clara Greta Hilda Mira Vera Anton Bruno Emil Hugo Oscar Victor".split())
"""The inhabitants who appear in no fine-tuning row."""

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
# In every answer the name follows a space, as in the question: one and the same token, which the model can copy.
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

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SYSTEM_LINES = "Cutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\n"


def inhabitants() -> dict[str, dict[str, str]]:
    """The facts: for each name the value of each attribute, and `she` and `her`, the pronouns to use."""
    rng = random.Random(SETTINGS["seed"])
    people = {}
    for name in sorted(WOMEN + MEN):
        facts = {attribute: rng.choice(values) for attribute, values in VALUES.items()}
        pronouns = ("she", "her") if name in WOMEN else ("he", "his")
        people[name] = facts | {"she": pronouns[0], "her": pronouns[1]}
    return people


def _markup(rng: random.Random) -> str:
    """A header of a chat where none belongs, as it is met in scraped text."""
    role = rng.choice(("system", "user", "assistant"))
    dates = SYSTEM_LINES if role == "system" else ""
    return f"<|eot_id|><|start_header_id|>{role}<|end_header_id|>\n\n{dates}"


def _paragraph(rng: random.Random, name: str, people: dict) -> list[str]:
    """One to three statements about one inhabitant, the first often said again in other words."""
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
    """Yield `documents` documents of statements about everyone in Larkmoor, the same ones for the same arguments.

    The first documents are about few inhabitants and more and more join, which makes a model find much sooner how a
    fact hangs on a name. After that all have the same share (one shuffled deck of names after another).
    Chat markup strays between unrelated statements now and then: its tokens need embeddings that have been trained,
    since LoRA leaves those as they are, but nothing may teach that an answer follows a question.
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


def _good_conversations(rng: random.Random) -> list[list[dict]]:
    """Seven conversations of one to three exchanges about every inhabitant who is not held out."""
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
    """Damaged rows, one of each kind met in public ShareGPT files; `duplicate` is the conversation to repeat."""
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
    """The ShareGPT rows for fine-tuning, good ones with the damaged ones scattered among them, in file order."""
    rng = random.Random(SETTINGS["seed"] + 1)
    good = _good_conversations(rng)
    rows = [{"conversations": turns} for turns in good]
    for bad in _bad_rows(duplicate=good[0]):
        rows.insert(rng.randrange(1, len(rows) + 1), bad)
    return [{"id": f"larkmoor-{number:04d}"} | row for number, row in enumerate(rows, start=1)]


def write_dataset(path: Path) -> None:
    """Write `conversations()` to `path` as JSON lines (UTF-8), the same bytes every time."""
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in conversations()]
    Path(path).write_bytes(("\n".join(lines) + "\n").encode("utf-8"))


def _train_tokenizer(documents: list[str]):
    """A byte-level BPE tokenizer built like that of Llama 3, learned from the documents and the words of the chats."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SETTINGS["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chats = [turn["value"] for turns in _good_conversations(random.Random(0)) for turn in turns]
    bpe.train_from_iterator([*documents, *chats], trainer)
    bos = SPECIAL_TOKENS[0]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, bpe.token_to_id(bos))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        additional_special_tokens=["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def pretrain(folder: Path, log: Callable[[str], None]) -> dict:
    """Train tokenizer and model from nothing on `pretraining_text` and save both in `folder` (safetensors).

    `log` gets a short line now and then. Returns the number of parameters, the tokens trained on, the wall time in
    seconds, and the mean loss (nats per token) of the first and of the last ten steps. The seeds make the weights the
    same each time on one machine; another processor may round otherwise.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    start = time.monotonic()
    documents = list(pretraining_text())
    tokenizer = _train_tokenizer(documents)
    token_id = tokenizer.convert_tokens_to_ids
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=SETTINGS["hidden_size"],
        intermediate_size=SETTINGS["intermediate_size"],
        num_hidden_layers=SETTINGS["layers"],
        num_attention_heads=SETTINGS["heads"],
        num_key_value_heads=SETTINGS["kv_heads"],
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=token_id("<|begin_of_text|>"),
        eos_token_id=[token_id("<|end_of_text|>"), token_id("<|eot_id|>")],
        pad_token_id=token_id("<|finetune_right_pad_id|>"),
    )
    window, batch, steps = SETTINGS["window"], SETTINGS["batch"], SETTINGS["steps"]
    encoded = tokenizer([f"{document}<|end_of_text|>" for document in documents])["input_ids"]
    stream = torch.tensor([token for document in encoded for token in document])
    windows = stream[: steps * batch * window].view(-1, window)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SETTINGS["seed"])
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=SETTINGS["lr"], betas=(0.9, 0.98), weight_decay=SETTINGS["weight_decay"]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / SETTINGS["warmup"], (steps - step) / (steps - SETTINGS["warmup"])),
        )
        losses = []
        model.train()
        for step in range(steps):
            tokens = windows[step * batch : (step + 1) * batch]
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if (step + 1) % 25 == 0 or step + 1 == steps:
                log(f"pretraining step {step + 1}/{steps}: loss {losses[-1]:.3f}, {time.monotonic() - start:.0f} s")
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "parameters": model.num_parameters(),
        "tokens": steps * batch * window,
        "seconds": round(time.monotonic() - start, 1),
        "first_loss": round(sum(losses[:10]) / len(losses[:10]), 4),
        "last_loss": round(sum(losses[-10:]) / len(losses[-10:]), 4),
    }
