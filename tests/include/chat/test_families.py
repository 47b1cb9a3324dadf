"""Every family trains on exactly what the model sees when it is asked, or is refused: proved against transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from include.chat.chat_format import ChatFormat
from include.chat.tokenized import IGNORED
from include.data.conversation import Conversation
from include.errors import BadData, BadRecipe
from tests.conftest import PROJECT
from tests.include.chat import families as f
from tests.include.chat.families import FAMILIES, Family, Message

REFUSED = "refused"
TABLE_END = "<!-- end of templates -->"
FORMS = ("reasoning_content", "thinking", "content")  # where templates look for a thought

# What is expected where the template alone does not say it: (family, conversation) by pattern, the first that fits.
# A function returns the answer as the model would have to write it behind its prompt, with its end: it gets the
# family, the prompt, the thought or None, and the content. REFUSED: the conversation must be refused with a reason.
Expectation = str | Callable[[Family, str, str | None, str], str]


def behind_the_opened_thought(family: Family, prompt: str, thought: str | None, content: str) -> str:
    """The prompt has opened the thought: it is closed, empty or not, before the answer."""
    assert family.ends
    return f"{thought or ''}\n</think>\n\n{content}{family.ends[0]}"


EXPECTED: dict[tuple[str, str], Expectation] = {
    ("trl/deepseek_r1_distill", "*call*"): REFUSED,
    ("trl/deepseekv3", "*call*"): REFUSED,
    ("trl/deepseek*", "*"): behind_the_opened_thought,
    ("trl/qwen3_5_nothink", "thought*"): REFUSED,  # its prompt closes an empty thought: enable_thinking
    ("DeepSeek-V3", "one call"): REFUSED,  # no token ends it
    ("case 29", "*call*"): REFUSED,  # its vocabulary lacks the token that ends a call
}


def variants(messages: list[Message], thoughts: tuple[str | None, ...] | None) -> Iterator[list[Message]]:
    """The forms in which templates read a conversation, the usual one first."""
    for form in [f.thought(messages, form, *thoughts) for form in FORMS] if thoughts else [messages]:
        if not any("tool_calls" in message for message in form):
            yield form
            continue
        for as_text, content in ((False, ""), (False, None), (True, ""), (True, None)):
            yield [_calling(message, as_text, content) if "tool_calls" in message else message for message in form]


def _calling(message: Message, as_text: bool, content: str | None) -> Message:
    """The same calls with their arguments as text or object; `content` where the turn has none."""
    calls = [dict(call, function=dict(call["function"])) for call in message["tool_calls"]]
    for call in calls if as_text else ():
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return message | {"content": message["content"] or content, "tool_calls": calls}


def oracle(tokenizer: Any, messages: list[Message], thoughts: tuple[str | None, ...] | None, tools: Any) -> Any:
    """The conversation in the first form of which the template writes the thoughts and calls, or None."""
    last = next((i for i, m in enumerate(messages) if "tool_calls" in m), len(messages) - 1)
    needed = []
    if thoughts and any(thoughts):
        number = max(i for i, words in enumerate(thoughts) if words)
        needed, last = [thoughts[number]], [i for i, m in enumerate(messages) if m["role"] == f.BOT][number]
    needed += [call["function"]["arguments"]["town"] for call in messages[last].get("tool_calls", ())]
    for form in variants(messages, thoughts):
        try:
            asked, written = f.text(tokenizer, form[:last], tools), f.text(tokenizer, form[: last + 1], tools)
            f.text(tokenizer, form, tools)
        except (TemplateError, TypeError):  # what templates raise for a form that they do not read
            continue
        if all(written.count(word) > asked.count(word) for word in needed):
            return form
    return None


CASES: dict[str, tuple[list[Message], tuple[str | None, ...] | None, list | None]] = {
    **{name: (messages, None, None) for name, messages in f.CONVERSATIONS.items()},
    **{name: (messages, thoughts, None) for name, (messages, thoughts) in f.THOUGHTS.items()},
    "one call": (f.calling("object"), None, f.TOOLS),
    "parallel calls": (f.calling("object", 2), None, f.TOOLS),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory, material: Path, published: Any) -> Path:
    """The folder of the family, as a repository of the Hub without weights."""
    return f.make_folder(FAMILIES[family], tmp_path_factory.mktemp("family") / "base", material, published)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return f.load(folder)


@pytest.fixture(scope="module")
def chat(family: str, folder: Path) -> ChatFormat:
    return ChatFormat(folder, chat_template=FAMILIES[family].shipped or "tokenizer", base_name="tests/base")


def given(messages: list[Message], thoughts: tuple[str | None, ...] | None, form: str, tools: Any) -> Conversation:
    """The conversation as a row of a dataset gives it."""
    conversation = Conversation.of(f.thought(messages, form, *thoughts) if thoughts else messages)
    if tools:
        conversation.tools = json.dumps(tools)
    return conversation


def stretches(labels: list[int]) -> list[tuple[int, int]]:
    """Begin and end of each trained stretch."""
    trained = [label != IGNORED for label in labels]
    begins = [i for i, t in enumerate(trained) if t and not (i and trained[i - 1])]
    ends = [i + 1 for i, t in enumerate(trained) if t and not (i + 1 < len(trained) and trained[i + 1])]
    return list(zip(begins, ends, strict=True))


def expected(
    name: str, case: str, tokenizer: Any, messages: list[Message], thoughts: tuple[str | None, ...] | None, tools: Any
) -> list[tuple[list[int], list[int]]] | None:
    """For each answer what the model sees when it is asked, and what it writes; None where the row is refused."""
    said = next((e for (n, c), e in EXPECTED.items() if fnmatch(name, n) and fnmatch(case, c)), None)
    form = oracle(tokenizer, messages, thoughts, tools)
    if said == REFUSED or (form is None and not callable(said)):
        return None
    form, pairs = form or messages, []
    thinking = iter(thoughts or ())
    for k, message in enumerate(form):
        if message["role"] != f.BOT:
            continue
        prompt = f.text(tokenizer, form[:k], tools, prompt=True)
        before = f.asked(tokenizer, form[:k], tools)
        if callable(said):
            answer = said(FAMILIES[name], prompt, next(thinking, None), messages[k]["content"])
        else:
            try:
                answer = f.answered(FAMILIES[name], tokenizer, form, k, tools)
            except f.Rewritten as reason:
                pytest.fail(f"{reason}: say in EXPECTED what {name} has to train for {case!r}")
        pairs.append((before, f.answer_ids(tokenizer, before, prompt, answer)))
    return pairs


@pytest.mark.parametrize(
    ("case", "written_as"),
    [(case, form) for case, (_, thoughts, _) in CASES.items() for form in (FORMS[::2] if thoughts else FORMS[:1])],
)
def test_answers_are_trained_behind_what_the_model_is_asked(
    family: str, tokenizer: Any, chat: ChatFormat, case: str, written_as: str
) -> None:
    messages, thoughts, tools = CASES[case]
    row = given(messages, thoughts, written_as, tools)
    pairs = expected(family, case, tokenizer, messages, thoughts, tools)
    if pairs is None:
        with pytest.raises((BadData, BadRecipe)):
            chat.encode([row])
        return
    encoded = chat.encode([Conversation.of(f.PLAIN), row])
    sequences = [
        (list(ids), list(labels))
        for origin, (ids, labels) in zip(encoded.origin, encoded.rows(), strict=True)
        if origin == 1
    ]
    found = [(ids[:b], ids[b:e]) for ids, labels in sequences for b, e in stretches(labels)]
    for ids, labels in sequences:
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    assert sorted(found) == sorted(pairs), "each answer once, behind exactly its prompt, and nothing else"


def outcome(chat: ChatFormat, *cases: str) -> str:
    """What becomes of conversations, in the words of the table of templates."""
    refused, sequences = [], 0
    for case in cases:
        messages, thoughts, tools = CASES[case]
        try:
            encoded = chat.encode([given(messages, thoughts, FORMS[0], tools)])
        except (BadData, BadRecipe):
            refused.append(case)
        else:
            sequences = max(sequences, len(encoded.ends))
    if len(refused) == len(cases):
        return "refused"
    trained = "trained" if sequences == 1 else f"trained, {sequences} sequences"
    return "; ".join([trained, *(f"{case}: refused" for case in refused)])


def test_the_table_of_templates_says_what_happens(family: str, chat: ChatFormat) -> None:
    if family.startswith("case "):
        return  # one of the other families
    ends = ", ".join(f"`{chat.decode([token])}`" for token in chat.stop_tokens)
    cells = [
        family,
        "published" if FAMILIES[family].published or FAMILIES[family].case else "small",
        ends,
        outcome(chat, "three"),
        outcome(chat, "thoughts in all"),
        outcome(chat, "one call", "parallel calls"),
    ]
    row = f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    document = PROJECT / "docs" / "base_models.md"
    if os.environ.get("WRITE_TABLE"):
        lines = document.read_text("utf-8").splitlines()
        lines = [line for line in lines if not line.startswith(f"| {family} |")]
        lines.insert(lines.index(TABLE_END), row)
        document.write_text("\n".join(lines) + "\n", "utf-8")
    assert row in document.read_text("utf-8").splitlines(), "run this test with WRITE_TABLE=1, without -n"


@pytest.fixture(scope="module")
def chat_of(tmp_path_factory: pytest.TempPathFactory, material: Path, published: Any) -> Callable[[str], ChatFormat]:
    """Returns the chat format of a family."""

    def make(name: str) -> ChatFormat:
        folder = f.make_folder(FAMILIES[name], tmp_path_factory.mktemp("family") / "base", material, published)
        return ChatFormat(folder, chat_template=FAMILIES[name].shipped or "tokenizer", base_name="tests/base")

    return make


def test_an_added_token_that_the_template_names_stays_text_in_a_question(chat_of: Callable[[str], ChatFormat]) -> None:
    chat = chat_of("Qwen3")
    token = chat.tokenizer.added.ids["<tool_call>"]
    assert "<tool_call>" not in chat.tokenizer.added.special
    ids = chat.prompt([{"role": "user", "content": "What does <tool_call> mean?"}])
    assert token not in ids
    assert "What does <tool_call> mean?" in chat.decode(ids)
    call = Conversation.of(f.calling("object"))
    call.tools = json.dumps(f.TOOLS)
    assert token in chat.encode([call]).ids, "the template itself writes it"


def test_generation_stops_at_each_token_that_ends_an_answer(chat_of: Callable[[str], ChatFormat]) -> None:
    for name, ends in (("gpt-oss", ["<|return|>", "<|call|>"]), ("trl/glm4moe", ["<|user|>", "<|observation|>"])):
        chat = chat_of(name)
        assert {chat.tokenizer.added.ids[end] for end in ends} <= {*chat.stop_tokens}, name


def test_a_template_that_leaves_out_one_of_two_equal_calls_is_refused(chat_of: Callable[[str], ChatFormat]) -> None:
    chat = chat_of("gpt-oss")
    messages = f.calling("object", 2)
    messages[1]["tool_calls"][1]["function"] = messages[1]["tool_calls"][0]["function"]
    conversation = Conversation.of(messages)
    conversation.tools = json.dumps(f.TOOLS)
    with pytest.raises(BadData, match="does not write the tool calls in the place of an answer"):
        chat.encode([conversation])


def test_results_get_the_names_and_ids_of_their_calls(chat_of: Callable[[str], ChatFormat]) -> None:
    messages = f.calling("object", 2)
    for result in messages[2:4]:
        del result["name"], result["tool_call_id"]
    results = chat_of("Qwen3").template.messages_of(Conversation.of(messages))[2:4]
    assert [(r["name"], r["tool_call_id"]) for r in results] == [
        ("get_weather", "call00000"),
        ("get_weather", "call00001"),
    ]


VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions.\n"
)
# what the model is asked after a system message and an exchange, and without them
PROMPTS = {
    "zephyr": (
        "<|system|>\nBe kind.</s>\n<|user|>\nOne?</s>\n<|assistant|>\nFirst.</s>\n<|user|>\nTwo?</s>\n<|assistant|>\n",
        "<|user|>\nOne?</s>\n<|assistant|>\n",
    ),
    "phi-3": (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nOne?<|end|>\n<|assistant|>\nFirst.<|end|>\n<|user|>\nTwo?<|end|>\n"
        "<|assistant|>\n",
        "<|user|>\nOne?<|end|>\n<|assistant|>\n",
    ),
    "vicuna_old": (
        "<s>Be kind.\n### Human: One?\n### Assistant: First.</s>\n### Human: Two?\n### Assistant:",
        f"<s>{VICUNA}### Human: One?\n### Assistant:",
    ),
    "mistral": ("<s>[INST] Be kind. One? [/INST]First.</s>[INST] Two? [/INST]", "<s>[INST] One? [/INST]"),
    "llama": (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nOne? [/INST] First. </s><s>[INST] Two? [/INST]",
        "<s>[INST] One? [/INST]",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nBe kind. One?<end_of_turn>\n<start_of_turn>model\nFirst.<end_of_turn>\n"
        "<start_of_turn>user\nTwo?<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>user\nOne?<end_of_turn>\n<start_of_turn>model\n",
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_shipped_templates_write_the_form_of_their_models(name: str, chat_of: Callable[[str], ChatFormat]) -> None:
    template, (whole, plain) = chat_of(f"shipped/{name}").template, PROMPTS[name]
    assert template.render(f.turns("One?", "First.", "Two?", system="Be kind."), True) == whole
    assert template.render(f.turns("One?"), True) == plain
    if name == "gemma":
        assert template.render(f.turns("One? ", " First.", "\nTwo?", system=" Be kind.\n"), True) == whole
    for wrong in ("critic", "tool"):
        with pytest.raises(BadData, match="does not accept a conversation"):
            template.render([*f.PLAIN, {"role": wrong, "content": "Why?"}])


def test_a_variable_that_the_template_does_not_read_is_named(tmp_path: Path, material: Path, published: Any) -> None:
    folder = f.make_folder(FAMILIES["Qwen3"], tmp_path / "base", material, published)
    ChatFormat(folder, chat_template="tokenizer", chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(BadRecipe, match=r"'chat_template_kwargs': .* does not read enable_thinkin\."):
        ChatFormat(folder, chat_template="tokenizer", chat_template_kwargs={"enable_thinkin": False})
