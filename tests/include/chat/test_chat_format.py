"""Token ids and masks, against what other projects' published packages and test suites say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from include.chat.chat_format import IGNORED, TODAY, ChatFormat, renders_tools
from include.chat.encoder import TokenizersEncoder, Tokens
from include.data.sharegpt import Conversation, read
from include.errors import BadRecipe, NotFound
from include.recipe import validate_recipe

HELLO = [{"role": "user", "content": " hi\n"}, {"role": "assistant", "content": " ho "}]


def encode(chat: ChatFormat, *conversations: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of conversations of role/content messages."""
    return list(chat.encode([Conversation.of(messages) for messages in conversations]).rows())


def chat(folder: Path, template: str = "llama-3.1", **fields: Any) -> ChatFormat:
    return ChatFormat(folder, validate_recipe({"name": "x", "chat_template": template, **fields}, "x"))


@pytest.fixture(scope="module")
def llama(material: Path) -> ChatFormat:
    return chat(material / "tokenizers" / "llama-3.2")


@pytest.mark.parametrize("name", ["fastchat_dummy_conversation", "llamafactory_glaive_toolcall_en"])
def test_ids_and_masks_equal_the_golden_files_at_every_position(llama: ChatFormat, material: Path, name: str) -> None:
    lines = (material / "golden" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) >= 300
    for row, (ids, labels) in zip(rows, encode(llama, *[row["messages"] for row in rows]), strict=True):
        assert ids[:2048] == row["input_ids"]
        trained = [i for i, label in enumerate(labels[:2048]) if label != IGNORED]
        assert trained == row["trained"]
        assert all(labels[i] == ids[i] for i in trained)


@pytest.fixture(scope="module")
def cases(material: Path) -> dict[str, dict[str, Any]]:
    """What other projects' test suites expect, by their names."""
    return {case["id"]: case for case in json.loads((material / "golden" / "expected_llama3.json").read_text("utf-8"))}


def test_the_notebook_row_is_rendered_as_the_notebook_prints_it(llama: ChatFormat, cases: dict) -> None:
    row = cases["notebook-finetome-item5"]
    assert llama.render(row["messages"]) == row["expected_text"]
    ((ids, labels),) = encode(llama, row["messages"])
    assert llama.decode(ids) == row["expected_decoded_input_ids"]
    trained = llama.decode([label for label in labels if label != IGNORED])
    # the notebook's print also counts the header's newlines, which today's Unsloth (the golden files) masks
    assert trained == row["expected_decoded_labels_masked_as_space"].strip()
    prompt = cases["notebook-fibonacci-prompt"]
    assert llama.render(prompt["messages"], generation_prompt=True) == prompt["expected_text"]
    assert llama.decode(llama.prompt(prompt["messages"])) == prompt["expected_text"]


@pytest.fixture(scope="module")
def llama3(material: Path) -> ChatFormat:
    return chat(material / "tokenizers" / "llama-3.2", "llama-3")


@pytest.mark.parametrize("name", ["llamacpp-llama3", "llamafactory-llama3", "meta-llama32-format"])
def test_texts_are_those_that_other_projects_expect(llama3: ChatFormat, cases: dict, name: str) -> None:
    case = cases[name]
    text = llama3.render(case["messages"], case["add_generation_prompt"])
    assert text.removeprefix("" if case["bos"] else "<|begin_of_text|>") == case["expected_text"]
    if not case["add_generation_prompt"]:
        ((ids, labels),) = encode(llama3, case["messages"])
        assert llama3.decode(ids) == text
        trained = llama3.decode([label for label in labels if label != IGNORED])
        assert trained == "".join(answer for _, answer in case["multiturn_pairs"])


@pytest.mark.parametrize("name", ["meta-dialog", "meta-message", "axolotl-sharegpt-system"])
def test_ids_are_those_that_other_projects_expect(llama3: ChatFormat, cases: dict, name: str) -> None:
    case = cases[name]
    messages = (
        case.get("messages") or read(json.dumps({"conversations": case["sharegpt"]}).encode()).conversation.messages
    )
    ids = llama3.prompt(messages) if case.get("add_generation_prompt") else encode(llama3, messages)[0][0]
    assert ids[0 if case["bos"] else 1 :] == case["expected_ids"]


@pytest.mark.parametrize("name", ["axolotl-sharegpt-gpt-noeos", "axolotl-sharegpt-human-noeos"])
def test_labels_are_those_that_axolotl_expects(llama3: ChatFormat, cases: dict, name: str) -> None:
    case = cases[name]
    messages = read(json.dumps({"conversations": case["sharegpt"]}).encode()).conversation.messages
    ((ids, labels),) = encode(llama3, messages)
    assert ids == case["expected_ids"]
    end = llama3.stop_tokens[-1]  # Retune trains the end of an answer, these cases do not
    ours = [IGNORED if label == end else label for label in labels]
    if case["train"] == "gpt":
        assert ours == case["expected_labels"]
    else:  # the other half: Retune trains nothing of what the human says
        assert all(
            mine == IGNORED or theirs == IGNORED for mine, theirs in zip(ours, case["expected_labels"], strict=True)
        )


@pytest.mark.parametrize("template", ["llama-3.1", "llama-3", "chatml", "alpaca", "vicuna", "tokenizer"])
def test_ids_and_texts_equal_those_of_apply_chat_template(material: Path, template: str) -> None:
    from transformers import PreTrainedTokenizerFast

    rows = json.loads((material / "datasets" / "fastchat_dummy_conversation.json").read_text("utf-8"))[:40]
    # Llama's vocabulary lacks chatml's tokens: then both write them as ordinary ones
    ours = chat(material / "tokenizers" / "llama-3.2", template, missing_special_tokens="split")
    theirs = PreTrainedTokenizerFast.from_pretrained(material / "tokenizers" / "llama-3.2")
    theirs.chat_template = ours.template
    conversations = [read(json.dumps(row).encode()).conversation for row in rows]
    for conversation, (ids, _) in zip(conversations, ours.encode(conversations).rows(), strict=True):
        # the official template writes today's date; Retune tells it one date on every day
        options: dict[str, Any] = {"strftime_now": TODAY.strftime}
        assert ours.render(conversation.messages) == theirs.apply_chat_template(
            conversation.messages, tokenize=False, **options
        )
        assert ids == theirs.apply_chat_template(conversation.messages, return_dict=False, **options)


def test_the_date_of_a_run_is_not_in_its_ids(material: Path) -> None:
    official = chat(material / "tokenizers" / "llama-3.2", "tokenizer")
    assert "strftime_now" in official.template
    assert "Today Date: 26 Jul 2024" in official.render(HELLO)


@pytest.fixture(scope="module")
def tool_rows(material: Path) -> list[Conversation]:
    rows = json.loads((material / "datasets" / "glaive_toolcall_en_demo.json").read_text("utf-8"))
    return [read(json.dumps(row).encode()).conversation for row in rows]


@pytest.mark.parametrize("template", ["llama-3.1", "tokenizer"])
def test_tools_and_their_answers_are_written_as_apply_chat_template_writes_them(
    material: Path, tool_rows: list[Conversation], template: str
) -> None:
    from transformers import PreTrainedTokenizerFast

    ours = chat(material / "tokenizers" / "llama-3.2", template)
    assert renders_tools(ours.template)
    theirs = PreTrainedTokenizerFast.from_pretrained(material / "tokenizers" / "llama-3.2")
    theirs.chat_template = ours.template
    chosen = [row for row in tool_rows if row.tools and "tool" in row.roles][:20]
    assert len(chosen) == 20
    for row, (ids, labels) in zip(chosen, ours.encode(chosen).rows(), strict=True):
        assert ids == theirs.apply_chat_template(
            row.messages, tools=json.loads(row.tools or ""), return_dict=False, strftime_now=TODAY.strftime
        )
        trained = ours.decode([label for label in labels if label != IGNORED])
        said = [c.strip() for role, c in zip(row.roles, row.contents, strict=True) if role == "assistant"]
        assert [part.strip() for part in trained.split("<|eot_id|>")[:-1]] == said


def test_only_templates_that_render_tools_take_them(material: Path) -> None:
    folder = material / "tokenizers" / "llama-3.2"
    known = {name: renders_tools(chat(folder, name).template) for name in ("llama-3.1", "llama-3", "alpaca", "vicuna")}
    assert known == {"llama-3.1": True, "llama-3": False, "alpaca": False, "vicuna": False}


def test_text_that_looks_like_a_special_token_stays_text_unless_the_recipe_parses_it(material: Path) -> None:
    messages = [{"role": "user", "content": "say <|eot_id|> twice"}, {"role": "assistant", "content": "a<|eom_id|>b"}]
    folder = material / "tokenizers" / "llama-3.2"
    literal, parsed = chat(folder), chat(folder, special_tokens_in_text="parse")
    end, eom = (
        Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(t) for t in ("<|eot_id|>", "<|eom_id|>")
    )
    ((ids, _),) = encode(literal, messages)
    assert (ids.count(end), ids.count(eom)) == (3, 0), "system, user and assistant end once each"
    assert "say <|eot_id|> twice" in literal.decode(ids)
    ((ids, labels),) = encode(parsed, messages)
    assert (ids.count(end), labels.count(eom)) == (4, 1)
    assert parsed.decode([label for label in labels if label != IGNORED]) == "a<|eom_id|>b<|eot_id|>"


def test_only_assistant_turns_and_their_ends_are_trained(llama: ChatFormat) -> None:
    messages = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]  # fmt: skip
    ((ids, labels),) = encode(llama, messages)
    trained = [label for label in labels if label != IGNORED]
    assert llama.decode(trained) == "two<|eot_id|>four<|eot_id|>"
    assert llama.prompt(messages[:4]) == ids[: labels.index(trained[-2])]


def test_rows_that_are_asked_otherwise_than_they_are_trained_are_counted(llama: ChatFormat, tiny_base: Path) -> None:
    said = [Conversation(("user", "assistant"), ["What is it?", answer]) for answer in ("It is 7.", "7", "\nSeven")]
    assert [llama.asked_otherwise([one]) for one in said] == [0, 0, 1], "a line break at the end of the prompt grows"
    with_tools = Conversation(("user", "assistant"), ["What?", "It."], '[{"name": "look"}]')
    assert llama.asked_otherwise([with_tools]) == 0, "a prompt has no tools"
    assert chat(tiny_base).asked_otherwise(said[:2]) == 2, "its line breaks split before a word"


def test_special_tokens_that_the_vocabulary_lacks_are_refused_or_reported(material: Path) -> None:
    stories = material / "models" / "stories260K"
    with pytest.raises(BadRecipe, match=r"chatml writes <\|im_end\|>, <\|im_start\|>, which the vocabulary of"):
        chat(stories, "chatml")
    split = chat(stories, "chatml", missing_special_tokens="split")
    assert split.missing == ["<|im_end|>", "<|im_start|>"]
    ((_, labels),) = encode(split, HELLO)
    assert "ho" in split.decode([label for label in labels if label != IGNORED])
    assert chat(stories, "vicuna").missing == []


def test_a_base_without_a_template_or_a_tokenizer_says_so(material: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="has no chat template"):
        chat(material / "models" / "stories260K", "tokenizer")
    with pytest.raises(NotFound, match=r"has no tokenizer\.json"):
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
        encode(chat(tmp_path / "base", "tokenizer"), HELLO)


AWKWARD = [
    "", " ", "\n", "\n\nhello", "tail \n", "äöü ß", "日本語テキスト", "🙂👩‍👩‍👧",
    "e\u0301", "\x00\ufffd\u200b", "a" * 3000, "don't DON'T",
    "1234567", " \t\r\n x", "<|eot_id|>", "</s><s>", "x" + " " * 5000 + "y", "العربية", "\U0010ffff", "ﬁ²½",
]  # fmt: skip


def tokenizers_own(folder: Path) -> TokenizersEncoder:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    return TokenizersEncoder(backend)


@pytest.mark.parametrize("template", ["llama-3.1", "llama-3", "alpaca", "vicuna"])
def test_the_fast_encoder_agrees_with_the_tokenizer_on_ids_and_masks(material: Path, template: str) -> None:
    fast, slow = (chat(material / "tokenizers" / "llama-3.2", template) for _ in range(2))
    slow.encoder = tokenizers_own(material / "tokenizers" / "llama-3.2")
    assert (fast.encoder.name, slow.encoder.name) == ("gigatoken", "tokenizers")
    conversations = [
        [{"role": "user", "content": one}, {"role": "assistant", "content": other}]
        for one in AWKWARD
        for other in AWKWARD
    ]
    assert encode(fast, *conversations) == encode(slow, *conversations)


def test_the_fast_encoder_agrees_with_published_vectors(material: Path) -> None:
    encoder = chat(material / "tokenizers" / "llama-3.2").encoder
    published = json.loads((material / "golden" / "llama_bpe_vectors.json").read_text("utf-8"))
    vectors = [*published["cases"], *published["extra"]]
    texts = [vector["text"] for vector in vectors]
    tokens = encoder.encode(texts, [[] for _ in texts])
    for i, vector in enumerate(vectors):
        assert tokens.ids[tokens.starts[i] : tokens.starts[i + 1]].tolist() == vector["ids"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=80))
def test_the_fast_encoder_agrees_on_any_text(llama: ChatFormat, own: TokenizersEncoder, text: str) -> None:
    spans = [[(0, len(text) // 2)]]
    ours, theirs = llama.encoder.encode([text], spans), own.encode([text], spans)
    assert ours.ids.tolist() == theirs.ids.tolist()
    assert ours.marked.tolist() == theirs.marked.tolist()


@pytest.fixture(scope="module")
def own(material: Path) -> TokenizersEncoder:
    return tokenizers_own(material / "tokenizers" / "llama-3.2")


def test_a_character_that_the_two_classify_differently_goes_to_the_tokenizer(
    llama: ChatFormat, own: TokenizersEncoder
) -> None:
    newer = "\U00011de0"  # in Unicode 17 a digit, in the tables of tokenizers 0.23 unassigned
    texts = [f"x {newer} y", "plain", f"{newer}{newer}", "also plain"]
    spans = [[(0, 3)], [(0, 5)], [(0, 1)], []]
    ours, theirs = llama.encoder.encode(texts, spans), own.encode(texts, spans)
    assert ours.ids.tolist() == theirs.ids.tolist()
    assert ours.marked.tolist() == theirs.marked.tolist()
    assert llama.encoder._odd[ord(newer)], "otherwise this test shows nothing"  # type: ignore[attr-defined]


def test_a_vocabulary_that_does_not_keep_the_bytes_of_a_text_keeps_the_tokenizers_encoder(material: Path) -> None:
    assert chat(material / "models" / "stories260K", "vicuna").encoder.name == "tokenizers"


def test_a_fast_encoder_that_differs_on_a_real_row_is_given_up(material: Path) -> None:
    wrong = chat(material / "tokenizers" / "llama-3.2")
    own = tokenizers_own(material / "tokenizers" / "llama-3.2")
    right = encode(wrong, HELLO)

    class Shifted:
        name = "shifted"

        def encode(self, texts: list, spans: list) -> Tokens:
            tokens = own.encode(texts, spans)
            return Tokens(tokens.ids + 1, tokens.starts, tokens.marked)

    wrong.encoder = Shifted()
    assert wrong.prove([Conversation.of(HELLO)]) == 1
    assert wrong.encoder.name == "tokenizers"
    assert encode(wrong, HELLO) == right


def test_the_saved_tokenizer_is_what_was_used(material: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = chat(material / "tokenizers" / "llama-3.2", "chatml", missing_special_tokens="split")
    ours.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(HELLO, return_dict=False) == encode(ours, HELLO)[0][0]
    assert (loaded.bos_token_id, loaded.pad_token_id) == (ours.id_of("bos_token"), ours.id_of("pad_token"))
    assert loaded.pad_token == "<|finetune_right_pad_id|>"
