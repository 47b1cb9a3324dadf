"""Token ids and loss masks, compared with the published packages and the test suites of other projects."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from include.chat.chat_format import ChatFormat
from include.chat.conversation_encoder import ConversationEncoder
from include.chat.rendering import RENDERING_DATE
from include.chat.template import ChatTemplate, renders_tools
from include.chat.tokenized import IGNORED
from include.chat.tool_calls import call_fault
from include.data.conversation import Conversation, conversations_in, to_columns
from include.data.sharegpt import parse_row
from include.errors import BadRecipe, NotFound
from include.recipe import validate_recipe
from include.recipe.model import SHIPPED_TEMPLATES
from tests.include.chat.conftest import HELLO, MakeFormat, rows_of, trained_text
from tests.services.loading import load
from tests.services.older_packages import load_with_older_packages


@pytest.mark.parametrize("name", ["fastchat_dummy_conversation", "llamafactory_glaive_toolcall_en"])
def test_ids_and_masks_equal_the_golden_files_at_every_position(llama: ChatFormat, material: Path, name: str) -> None:
    lines = (material / "golden" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) >= 300
    for row, (ids, labels) in zip(rows, rows_of(llama, *[row["messages"] for row in rows]), strict=True):
        assert ids[:2048] == row["input_ids"]
        trained = [i for i, label in enumerate(labels[:2048]) if label != IGNORED]
        assert trained == row["trained"]
        assert all(labels[i] == ids[i] for i in trained)


@pytest.fixture(scope="module")
def cases(material: Path) -> dict[str, dict[str, Any]]:
    """Expectations of other projects' test suites, by name."""
    return {case["id"]: case for case in json.loads((material / "golden" / "expected_llama3.json").read_text("utf-8"))}


def test_the_notebook_row_is_rendered_as_the_notebook_prints_it(llama: ChatFormat, cases: dict) -> None:
    row = cases["notebook-finetome-item5"]
    assert llama.template.render(row["messages"]) == row["expected_text"]
    ((ids, labels),) = rows_of(llama, row["messages"])
    assert llama.decode(ids) == row["expected_decoded_input_ids"]
    # the notebook's print also counts the header's newlines, which today's Unsloth (the golden files) masks
    assert trained_text(llama, labels) == row["expected_decoded_labels_masked_as_space"].strip()
    prompt = cases["notebook-fibonacci-prompt"]
    assert llama.template.render(prompt["messages"], generation_prompt=True) == prompt["expected_text"]
    assert llama.decode(llama.prompt(prompt["messages"])) == prompt["expected_text"]


@pytest.mark.parametrize("name", ["llamacpp-llama3", "llamafactory-llama3", "meta-llama32-format"])
def test_texts_equal_those_of_other_projects(llama3: ChatFormat, cases: dict, name: str) -> None:
    case = cases[name]
    text = llama3.template.render(case["messages"], case["add_generation_prompt"])
    assert text.removeprefix("" if case["bos"] else "<|begin_of_text|>") == case["expected_text"]
    if not case["add_generation_prompt"]:
        ((ids, labels),) = rows_of(llama3, case["messages"])
        assert llama3.decode(ids) == text
        assert trained_text(llama3, labels) == "".join(answer for _, answer in case["multiturn_pairs"])


@pytest.mark.parametrize("name", ["meta-dialog", "meta-message", "axolotl-sharegpt-system"])
def test_ids_equal_those_of_other_projects(llama3: ChatFormat, cases: dict, name: str) -> None:
    case = cases[name]
    raw = json.dumps({"conversations": case.get("sharegpt")}).encode()
    messages = case.get("messages") or parse_row(raw).conversation.messages
    ids = rows_of(llama3, messages)[0][0] if messages[-1]["role"] == "assistant" else llama3.prompt(messages)
    assert ids[0 if case["bos"] else 1 :][: len(case["expected_ids"])] == case["expected_ids"]
    assert len(ids) - len(case["expected_ids"]) < 6, "at most the header of the answer"


@pytest.mark.parametrize("name", ["axolotl-sharegpt-gpt-noeos", "axolotl-sharegpt-human-noeos"])
def test_labels_equal_those_of_axolotl(llama3: ChatFormat, cases: dict, name: str) -> None:
    case = cases[name]
    messages = parse_row(json.dumps({"conversations": case["sharegpt"]}).encode()).conversation.messages
    ((ids, labels),) = rows_of(llama3, messages)
    assert ids == case["expected_ids"]
    end = llama3.stop_tokens[-1]  # Retune trains the end of an answer, these cases do not
    without_ends = [IGNORED if label == end else label for label in labels]
    if case["train"] == "gpt":
        assert without_ends == case["expected_labels"]
    else:  # the case trains the human's turns only, Retune trains none of them
        assert all(
            label == IGNORED or expected == IGNORED
            for label, expected in zip(without_ends, case["expected_labels"], strict=True)
        )


@pytest.mark.parametrize("template", [*SHIPPED_TEMPLATES, "tokenizer"])
def test_ids_and_texts_equal_those_of_apply_chat_template(
    material: Path, llama_encode: Callable[..., ConversationEncoder], published_tokenizer: Any, template: str
) -> None:
    rows = json.loads((material / "datasets" / "fastchat_dummy_conversation.json").read_text("utf-8"))[:40]
    chat = llama_encode(template)  # Llama's vocabulary lacks chatml's tokens: both write them as ordinary ones
    conversations = [parse_row(json.dumps(row).encode()).conversation for row in rows]
    # the official template writes today's date; Retune gives every template one fixed date
    settings: dict[str, Any] = {"chat_template": chat.template.source, "strftime_now": RENDERING_DATE.strftime}
    for conversation, (ids, _) in zip(conversations, chat.encode(conversations).rows(), strict=True):
        messages = conversation.messages
        text = published_tokenizer.apply_chat_template(messages, tokenize=False, **settings)
        assert chat.template.render(messages) == text
        assert ids == published_tokenizer.apply_chat_template(messages, return_dict=False, **settings)


@pytest.mark.parametrize("template", ["llama-3.1", "tokenizer"])
def test_tools_and_their_answers_are_written_as_apply_chat_template_writes_them(
    llama: ChatFormat,
    llama_encode: Callable[..., ConversationEncoder],
    published_tokenizer: Any,
    tool_rows: list[Conversation],
    template: str,
) -> None:
    chat = llama_encode(template)
    assert renders_tools(chat.template.source)
    settings: dict[str, Any] = {"chat_template": chat.template.source, "strftime_now": RENDERING_DATE.strftime}
    chosen = [row for row in tool_rows if row.tools and "tool" in row.roles][:20]
    assert len(chosen) == 20
    for row, (ids, labels) in zip(chosen, chat.encode(chosen).rows(), strict=True):
        tools = json.loads(row.tools or "")
        assert ids == published_tokenizer.apply_chat_template(row.messages, tools=tools, return_dict=False, **settings)
        answers = [c.strip() for role, c in zip(row.roles, row.contents, strict=True) if role == "assistant"]
        assert [part.strip() for part in trained_text(llama, labels).split("<|eot_id|>")[:-1]] == answers


QWEN_LIKE = """{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if m.tool_calls %}{% if m.content %}{{ m.content + "\n" }}{% endif %}{% for call in m.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% if not loop.last %}{{ "\n" }}{% endif %}{% endfor %}{% else %}{{ m.content }}{% endif %}<|eot_id|>
{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "a house", "n": 7}'}}


@pytest.mark.parametrize(
    ("template", "turns", "trained"),
    [
        (
            "llama-3.1",
            [{"content": None, "tool_calls": [CALL]}],
            ['{"name": "look", "parameters": {"at": "a house", "n": 7}}', "It is 7."],
        ),
        (
            QWEN_LIKE,
            [{"content": None, "function_call": CALL["function"]}, {"content": "I look.", "tool_calls": [CALL, CALL]}],
            [
                '<tool_call>\n{"name": "look", "arguments": {"at": "a house", "n": 7}}\n</tool_call>',
                "I look." + '\n<tool_call>\n{"name": "look", "arguments": {"at": "a house", "n": 7}}\n</tool_call>' * 2,
                "It is 7.",
            ],
        ),
    ],
)
def test_tool_calls_are_written_and_trained_as_apply_chat_template_writes_them(
    llama: ChatFormat, published_tokenizer: Any, template: str, turns: list[dict[str, Any]], trained: list[str]
) -> None:
    source = llama.template.source if template == "llama-3.1" else template
    chat = ConversationEncoder(
        ChatTemplate("calls", source, llama.tokenizer.named_tokens, llama.tokenizer.added), llama.encoder, {}
    )
    messages = [{"role": "user", "content": "What?"}]
    for turn in turns:
        messages += [{"role": "assistant", **turn}, {"role": "tool", "content": "7"}]
    messages.append({"role": "assistant", "content": "It is 7."})
    row = {"messages": messages, "functions": [{"name": "look"}]}
    parsed = parse_row(json.dumps(row).encode())
    conversation = parsed.conversation
    assert call_fault(chat.template, conversation) == ""
    ((ids, labels),) = chat.encode([conversation]).rows()
    # what the API's messages are for transformers: arguments as objects, every call in tool_calls
    function = {**CALL["function"], "arguments": {"at": "a house", "n": 7}}
    for message in messages:
        if message.pop("function_call", None) or message.get("tool_calls"):
            count = len(message.get("tool_calls", [1]))
            message["tool_calls"] = [{"type": "function", "function": function}] * count
    settings: dict[str, Any] = {"chat_template": source, "strftime_now": RENDERING_DATE.strftime}
    tools = row["functions"]
    assert ids == published_tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **settings)
    assert trained_text(llama, labels).split("<|eot_id|>") == [*trained, ""]
    # a masked call is context only, and other turns stay in the loss
    ((same, labels),) = chat.encode([replace(conversation, masked=(1,))]).rows()
    assert same == ids and trained_text(llama, labels).split("<|eot_id|>") == [*trained[1:], ""]
    # columns and pieces keep the calls with their turns
    assert list(conversations_in(pa.table(to_columns([conversation])))) == [conversation]
    assert Conversation.of(conversation.messages).calls == conversation.calls


def test_special_tokens_in_a_text_stay_text_unless_the_recipe_parses_them(
    llama: ChatFormat, llama_encode: Callable[..., ConversationEncoder]
) -> None:
    messages = [{"role": "user", "content": "say <|eot_id|> twice"}, {"role": "assistant", "content": "a<|eom_id|>b"}]
    end, eom = (llama.tokenizer.added.ids[token] for token in ("<|eot_id|>", "<|eom_id|>"))
    ((ids, _),) = rows_of(llama, messages)
    assert (ids.count(end), ids.count(eom)) == (3, 0), "system, user and assistant turns end once each"
    assert "say <|eot_id|> twice" in llama.decode(ids)
    ((ids, labels),) = rows_of(llama_encode("llama-3.1", parse=True), messages)
    assert (ids.count(end), labels.count(eom)) == (4, 1)
    assert trained_text(llama, labels) == "a<|eom_id|>b<|eot_id|>"


def test_only_assistant_turns_and_their_ends_are_in_the_loss(llama: ChatFormat) -> None:
    messages = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]  # fmt: skip
    ((ids, labels),) = rows_of(llama, messages)
    assert trained_text(llama, labels) == "two<|eot_id|>four<|eot_id|>"
    last_answer = [label for label in labels if label != IGNORED][-2]
    assert llama.prompt(messages[:4]) == ids[: labels.index(last_answer)]


def test_special_tokens_that_the_vocabulary_lacks_are_refused_or_reported(
    stories: Path, chat_format: MakeFormat
) -> None:
    with pytest.raises(BadRecipe, match=r"chatml writes <\|im_end\|>, <\|im_start\|>, which the vocabulary of"):
        chat_format(stories, "chatml")
    split = chat_format(stories, "chatml", missing_special_tokens="split")
    assert split.missing == ["<|im_end|>", "<|im_start|>"]
    ((_, labels),) = rows_of(split, HELLO)
    assert "ho" in trained_text(split, labels)
    assert chat_format(stories, "vicuna").missing == []


def test_a_base_without_a_template_or_a_tokenizer_is_refused_by_name(
    stories: Path, tmp_path: Path, chat_format: MakeFormat
) -> None:
    with pytest.raises(NotFound, match=r"tests/base has no chat template.*: alpaca, chatml, gemma, .*, zephyr"):
        chat_format(stories, "tokenizer")
    with pytest.raises(NotFound, match=r"tests/base has no tokenizer\.json"):
        chat_format(tmp_path)


def test_the_fields_of_the_recipe_decide_on_the_chat_format(stories: Path) -> None:
    fields = {"chat_template": "chatml", "special_tokens_in_text": "parse", "base_model": "tests/stories"}
    with pytest.raises(BadRecipe, match="the vocabulary of tests/stories lacks"):
        ChatFormat.from_recipe(stories, validate_recipe({"name": "x", **fields}, "x"))
    recipe = validate_recipe({"name": "x", **fields, "missing_special_tokens": "split"}, "x")
    chat = ChatFormat.from_recipe(stories, recipe)
    assert chat.template.name == "chatml"
    ((ids, _),) = rows_of(chat, [{"role": "user", "content": "a</s>b"}, {"role": "assistant", "content": "c"}])
    assert chat.id_of("eos_token") in ids, "parsed"


def test_the_saved_tokenizer_is_the_one_that_was_used(
    llama: ChatFormat, tiny_base: Path, chat_format: MakeFormat, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    chat = chat_format(tiny_base, "chatml", missing_special_tokens="split")
    chat.save(tmp_path / "tiny")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert loaded.apply_chat_template(HELLO, return_dict=False) == rows_of(chat, HELLO)[0][0]
    assert (loaded.bos_token_id, loaded.pad_token_id) == (chat.id_of("bos_token"), chat.id_of("pad_token"))
    assert loaded.pad_token == "<|eot_id|>", "without a token made for it, the end of text"

    llama.save(tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "tokenizer_config.json").read_text("utf-8"))
    assert config["pad_token"] == "<|finetune_right_pad_id|>"
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "chat_template" not in config, "it is in chat_template.jinja alone"
    for name, content in (
        ("tokenizer.json", llama.tokenizer.file.read_bytes()),
        ("chat_template.jinja", llama.template.source.encode()),
    ):
        assert (tmp_path / "llama" / name).read_bytes() == content


def test_a_saved_tokenizer_is_the_same_with_transformers_4_and_5(
    llama_folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """The real Llama 3.2 with its own template; one that transformers 5 wrote; one of a family's class, as Qwen2's."""
    newer, family = tmp_path / "newer", tmp_path / "family"
    written = json.loads((tiny_base / "tokenizer_config.json").read_text("utf-8"))
    assert written["tokenizer_class"] == "TokenizersBackend", "a class that transformers 4.57 does not know"
    for folder, changes in (
        (newer, {"extra_special_tokens": ["<|start_header_id|>"], "additional_special_tokens": ["<|end_of_text|>"]}),
        (family, {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<|start_header_id|>"]}),
    ):
        shutil.copytree(tiny_base, folder)
        (folder / "config.json").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps(written | changes))
    jobs, expected = [], []
    for base, template in ((llama_folder, "tokenizer"), (newer, "llama-3"), (family, "llama-3")):
        chat = ChatFormat(base, chat_template=template)
        folder = tmp_path / f"saved-{base.name}"
        chat.save(folder)
        jobs.append({"tokenizer": str(folder), "messages": HELLO, "text": "It is <|eot_id|> 5 ."})
        expected.append(rows_of(chat, HELLO)[0][0])
    config = json.loads((tmp_path / "saved-newer" / "tokenizer_config.json").read_text("utf-8"))
    assert config["additional_special_tokens"] == ["<|end_of_text|>", "<|start_header_id|>"]
    assert not {"extra_special_tokens", "backend", "is_local", "local_files_only"} & set(config)
    for job, ids, old, new in zip(jobs, expected, load_with_older_packages(jobs), map(load, jobs), strict=True):
        assert (old.pop("versions")["transformers"], new.pop("versions")["transformers"]) == ("4.57.3", "5.17.0")
        assert old == new, job["tokenizer"]
        assert old["ids"] == ids
        assert set(old["inputs"]) == {"input_ids", "attention_mask"}
