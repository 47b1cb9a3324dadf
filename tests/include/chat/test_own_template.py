"""Chat templates of a recipe's own: files and text, their limits, and what a broken one says."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from include.chat.chat_format import ChatFormat
from include.chat.own_template import pin_template
from include.chat.rendering import LARGEST_TEXT, render, render_limited
from include.chat.tool_calls import call_fault, calls_template
from include.data.conversation import Conversation
from include.data.parallel import in_order
from include.errors import BadData, BadRecipe, NotFound, RetuneError, TooCostly
from include.paths import PROJECT
from include.recipe import validate_recipe
from tests.include.chat import families as f
from tests.include.chat.conftest import HELLO

OWN = """{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"""
ARGUMENTS = {"conversations": [HELLO], "eos_token": "</s>"}


def pinned(chat_template: str) -> str:
    return pin_template(validate_recipe({"name": "x", "chat_template": chat_template}, "x"))


def test_a_path_becomes_the_content_of_its_file_and_text_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own.jinja"
    file.write_bytes(OWN.replace("\n", "\r\n").encode())
    assert pinned(str(file)) == OWN.replace("\n", "\r\n")
    assert pinned(OWN) == OWN
    assert (pinned("chatml"), pinned("tokenizer")) == ("chatml", "tokenizer")
    monkeypatch.chdir(tmp_path)  # a relative path begins in the checkout, as a dataset's does
    assert pinned("include/templates/vicuna.jinja") == (PROJECT / "include/templates/vicuna.jinja").read_text("utf-8")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, NotFound, r"field 'chat_template': the file .*own\.jinja cannot be read \(No such file or directory\)"),
        (b"\x89PNG\r\n\x1a\n\0\0", BadRecipe, r"own\.jinja is not a text file \(UTF-8\)"),
        (b"\xff\xfe{{ messages }}", BadRecipe, r"own\.jinja is not a text file"),
        (b"{{ messages }}\0", BadRecipe, r"own\.jinja is not a text file"),
        (b"", BadRecipe, r"own\.jinja is not a chat template: it does not read the variable messages"),
        (b"{{ message }}", BadRecipe, "does not read the variable messages"),
        (b"the messages of today", BadRecipe, "is not a chat template"),
        (b"{{ messages }}" + b" " * 2**18, BadRecipe, "has 262,158 bytes, and a template may have 262,144"),
        (b"{{ messages }}\n{% for x in %}", BadRecipe, r"own\.jinja is not a jinja template: line 2: Expected an expr"),
        (b"{{ messages }}\n\n{{ bos_token | nosuch }}", BadRecipe, "line 3: No filter named 'nosuch'"),
        (b"{{ messages }}\n{% endfor %}", BadRecipe, "line 2: Encountered unknown tag 'endfor'"),
    ],
)
def test_a_file_that_is_no_chat_template_is_refused_plainly(
    content: bytes | None, error: type[RetuneError], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=message):
        pinned(str(file))


def test_a_broken_text_is_named_by_its_line() -> None:
    with pytest.raises(BadRecipe, match="field 'chat_template': the text is not a jinja template: line 2: "):
        pinned("{{ messages }}\n{% if %}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{{ 'x' * 10**10 }}", "too much memory"),
        ("{{ messages[0].content * 10**9 }}", "too much memory"),
        ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "much memory"),
        ("{{ 'x' * 10**7 }}", "writes 10,000,000 characters"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "maximum recursion depth exceeded"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "one conversation takes more than 5 seconds",
        ),
    ],
)
def test_a_template_without_limits_ends_in_a_plain_error_within_seconds(source: str, message: str) -> None:
    began = time.process_time()
    with pytest.raises(TooCostly, match=f"field 'chat_template': the text cannot be used: .*{message}"):
        pinned("{% set _ = messages %}" + source)
    assert time.process_time() - began < 5, "the work is not done in this process"
    assert render_limited("own", OWN, ARGUMENTS) == render("own", OWN, ARGUMENTS), "the next one is rendered again"


def test_a_long_conversation_is_not_taken_for_a_large_template() -> None:
    long = [{"role": "user", "content": "x" * (2 * LARGEST_TEXT)}]
    assert len(render_limited("own", OWN, {**ARGUMENTS, "conversations": [long]})) > 2 * LARGEST_TEXT


def test_templates_render_as_transformers_renders_them_also_in_forked_processes(
    tiny_base: Path, base_with: Callable[..., Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    expected = tokenizer.apply_chat_template(HELLO, chat_template=OWN, tokenize=False)
    for chat in (
        ChatFormat(tiny_base, chat_template=OWN),
        ChatFormat(base_with(OWN), chat_template="tokenizer"),
    ):
        assert chat.template.source == OWN
        assert chat.template.render(HELLO) == expected
        parts = [[{"role": "user", "content": "x" * (1000 * part)}] for part in range(64)]
        found = in_order(lambda part, chat=chat: {chat.template.render(part) for _ in range(20)}, parts)
        assert [len(texts) for texts in found] == [1] * 64, "each process gets the answers to its own questions"
        assert chat.template.render(HELLO) == expected, "and in this process after the fork"


def test_a_refusal_of_the_template_and_its_limits_are_told_apart(base_with: Callable[..., Path]) -> None:
    folder = base_with(OWN + "{% if messages | length > 2 %}{{ raise_exception('at most two turns') }}{% endif %}")
    chat = ChatFormat(folder, chat_template="tokenizer")
    with pytest.raises(BadData, match=r"tokenizer does not accept .* roles user, assistant, user.*at most two turns"):
        chat.template.render([*HELLO, HELLO[0]])
    (folder / "chat_template.jinja").write_text(OWN + "{{ 'x' * (10**6 * (messages | length)) }}")
    with pytest.raises(TooCostly, match="tokenizer cannot be used: it writes 2,000,0"):
        ChatFormat(folder, chat_template="tokenizer").encode([Conversation.of(HELLO)])


def test_a_template_that_calls_make_endless_is_not_tried_for_each_row() -> None:
    source = OWN + "{% for m in messages if m.tool_calls %}{{ m.role * 10**9 }}{% endfor %}{{ tools }}"
    template = calls_template(source, source, None, {})
    messages = f.calling("object")
    assert call_fault(template, Conversation.of(f.PLAIN)) == ""
    with pytest.raises(TooCostly, match=r"chat_template\.jinja cannot be used: it needs too much memory"):
        call_fault(template, Conversation.of(messages))
