"""Token ids and masks, against what other projects' published packages and test suites say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from include.chat import IGNORED, ChatFormat
from include.encoder import TokenizersEncoder
from include.errors import BadRecipe, Missing
from include.recipe import check

HELLO = [{"role": "user", "content": " hi\n"}, {"role": "assistant", "content": " ho "}]


def chat(folder: Path, template: str = "llama-3.1", **fields: Any) -> ChatFormat:
    return ChatFormat(folder, check({"name": "x", "chat_template": template, **fields}, "x"))


@pytest.fixture(scope="module")
def llama(material: Path) -> ChatFormat:
    return chat(material / "tokenizers" / "llama-3.2")


@pytest.mark.parametrize("name", ["fastchat_dummy_conversation", "llamafactory_glaive_toolcall_en"])
def test_ids_and_masks_equal_the_golden_files_at_every_position(llama: ChatFormat, material: Path, name: str) -> None:
    lines = (material / "golden" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if {m["role"] for m in row["messages"]} <= {"user", "assistant"}]
    assert len(rows) > 100
    for row, (ids, labels) in zip(rows, llama.encode([row["messages"] for row in rows]).rows(), strict=True):
        assert ids[:2048] == row["input_ids"]
        trained = [i for i, label in enumerate(labels[:2048]) if label != IGNORED]
        assert trained == row["trained"]
        assert all(labels[i] == ids[i] for i in trained)


def test_the_notebook_row_is_rendered_as_the_notebook_prints_it(llama: ChatFormat, material: Path) -> None:
    cases = {case["id"]: case for case in json.loads((material / "golden" / "expected_llama3.json").read_text("utf-8"))}
    row = cases["notebook-finetome-item5"]
    assert llama.render(row["messages"]) == row["expected_text"]
    prompt = cases["notebook-fibonacci-prompt"]
    assert llama.render(prompt["messages"], generation_prompt=True) == prompt["expected_text"]
    assert llama.tokenizer.decode(llama.prompt(prompt["messages"])) == prompt["expected_text"]


@pytest.mark.parametrize("template", ["llama-3.1", "llama-3", "alpaca", "vicuna", "tokenizer"])
def test_ids_equal_the_tokenizers_own(material: Path, template: str) -> None:
    rows = json.loads((material / "datasets" / "fastchat_dummy_conversation.json").read_text("utf-8"))[:40]
    roles = {"human": "user", "gpt": "assistant"}
    conversations = [
        [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]] for row in rows
    ]
    assert chat(material / "tokenizers" / "llama-3.2", template).prove([HELLO, *conversations]) == 41


def test_text_that_looks_like_a_special_token_stays_text(llama: ChatFormat) -> None:
    end = llama.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    encoded = llama.encode([[{"role": "user", "content": "say <|eot_id|>"}, {"role": "assistant", "content": "no"}]])
    assert encoded.ids.tolist().count(end) == 3, "system, user and assistant end once each"
    assert "say <|eot_id|>" in llama.tokenizer.decode(encoded.ids.tolist())


def test_only_assistant_turns_and_their_ends_are_trained(llama: ChatFormat) -> None:
    messages = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]  # fmt: skip
    ((ids, labels),) = llama.encode([messages]).rows()
    trained = [label for label in labels if label != IGNORED]
    assert llama.tokenizer.decode(trained) == "two<|eot_id|>four<|eot_id|>"
    assert llama.prompt(messages[:4]) == ids[: labels.index(trained[-2])]


def test_special_tokens_that_the_vocabulary_lacks_are_refused_or_reported(material: Path) -> None:
    stories = material / "models" / "stories260K"
    with pytest.raises(BadRecipe, match=r"chatml writes <\|im_end\|>, <\|im_start\|>, which the vocabulary of"):
        chat(stories, "chatml")
    split = chat(stories, "chatml", missing_special_tokens="split")
    assert split.missing == ["<|im_end|>", "<|im_start|>"]
    ((_, labels),) = split.encode([HELLO]).rows()
    assert "ho" in split.tokenizer.decode([label for label in labels if label != IGNORED])
    assert chat(stories, "vicuna").missing == []


def test_a_base_without_a_template_or_a_tokenizer_says_so(material: Path, tmp_path: Path) -> None:
    with pytest.raises(Missing, match="has no chat template"):
        chat(material / "models" / "stories260K", "tokenizer")
    with pytest.raises(Missing, match=r"has no tokenizer\.json"):
        chat(tmp_path)


def test_a_template_that_rewrites_turns_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_base, tmp_path / "base")
    template = (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
        "{{ m['content'].split('</think>')[-1] }}<|eot_id|>{% endfor %}"
    )
    (tmp_path / "base" / "chat_template.jinja").write_text(template)
    with pytest.raises(BadRecipe, match="rewrites what turns say"):
        chat(tmp_path / "base", "tokenizer").encode([HELLO])


AWKWARD = [
    "", " ", "\n", "\n\nhello", "tail \n", "äöü ß", "日本語テキスト", "🙂👩‍👩‍👧",
    "e\u0301", "\x00\ufffd\u200b", "a" * 3000, "don't DON'T",
    "1234567", " \t\r\n x", "<|eot_id|>", "</s><s>", "x" + " " * 5000 + "y", "العربية", "\U0010ffff", "ﬁ²½",
]  # fmt: skip


@pytest.mark.parametrize("template", ["llama-3.1", "llama-3", "alpaca", "vicuna"])
def test_the_fast_encoder_agrees_with_the_tokenizer_on_ids_and_masks(material: Path, template: str) -> None:
    fast, slow = (chat(material / "tokenizers" / "llama-3.2", template) for _ in range(2))
    slow.encoder = TokenizersEncoder(slow.tokenizer.backend_tokenizer)
    assert (fast.encoder.name, slow.encoder.name) == ("tiktoken", "tokenizers")
    conversations = [
        [{"role": "user", "content": one}, {"role": "assistant", "content": other}]
        for one in AWKWARD
        for other in AWKWARD
    ]
    assert list(fast.encode(conversations).rows()) == list(slow.encode(conversations).rows())


def test_a_vocabulary_that_tiktoken_could_merge_otherwise_keeps_the_tokenizers_encoder(
    tiny_base: Path, material: Path
) -> None:
    assert chat(tiny_base).encoder.name == "tokenizers"
    assert chat(material / "models" / "stories260K", "vicuna").encoder.name == "tokenizers"


def test_a_fast_encoder_that_differs_on_a_real_row_is_given_up(material: Path) -> None:
    wrong = chat(material / "tokenizers" / "llama-3.2")
    right = wrong.encode([HELLO]).ids.tolist()

    class Shifted:
        name = "shifted"

        def encode(self, texts: list) -> list:
            return [
                (ids + 1, spans) for ids, spans in TokenizersEncoder(wrong.tokenizer.backend_tokenizer).encode(texts)
            ]

    wrong.encoder = Shifted()
    assert wrong.prove([HELLO]) == 1
    assert wrong.encoder.name == "tokenizers"
    assert wrong.encode([HELLO]).ids.tolist() == right
